"""One training epoch of the bundle box_prior against the same epoch with cross-entropy on full labels.

Both include their whole data pipeline: boxes that follow the image here, a label that is cropped and flipped there.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bundle_epochs import parsed_bundle
from timing import medians_ms, steady_allocator, write

from medconstraints.synthetic import make_cohort

SHAPE = (48, 64, 48)


def trainer(overlays: list[str], datalist: Path, output_dir: Path) -> Any:
    """The bundle's trainer for one epoch, without validation, logs and checkpoints."""
    parser = parsed_bundle("box_prior", overlays, datalist, output_dir)
    return parser.get_parsed_content("train#trainer")


def main() -> None:
    """Print and write the ratio."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--output", default="docs/results/benchmark_box_prior_epoch.json")
    arguments.add_argument("--runs", type=int, default=9)
    arguments.add_argument("--volumes", type=int, default=16)
    arguments.add_argument("--threads", type=int, default=1)
    args = arguments.parse_args()
    steady_allocator()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        datalist = make_cohort(
            Path(folder) / "cohort",
            num_training=args.volumes,
            num_validation=1,
            num_test=1,
            num_classes=2,
            shape=SHAPE,
            spacing_mm=(1.0, 1.0, 1.0),
        )
        boxes = trainer([], datalist, Path(folder))
        labels = trainer(["full_supervision"], datalist, Path(folder))
        labels.loss_function = lambda output, target: F.cross_entropy(output, target["label"][:, 0].long())
        for engine in (boxes, labels):
            engine.logger.setLevel(logging.WARNING)
        times = medians_ms({"boxes": boxes.run, "cross_entropy": labels.run}, runs=args.runs, warmup=1)
    row = {
        "case": f"{args.volumes} volumes of {' x '.join(map(str, SHAPE))}, 3 classes, a box per slice",
        "epoch_with_cross_entropy_s": times["cross_entropy"] / 1e3,
        "ratio": times["boxes"] / times["cross_entropy"],
    }
    sys.stdout.write(f"{row['case']}: {row['ratio']:.3f}x\n")
    write(args.output, [row])


if __name__ == "__main__":
    main()
