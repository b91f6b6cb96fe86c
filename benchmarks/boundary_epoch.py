"""One training epoch of the bundle boundary_loss against the same epoch without the boundary term and its maps."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bundle_epochs import parsed_bundle
from timing import medians_ms, steady_allocator, write

from medconstraints.synthetic import make_cohort

SHAPE = (48, 64, 48)


def epoch(datalist: Path, output_dir: Path, *, maps: bool, **options: Any) -> Callable[[], Any]:
    """One epoch of the trainer, without validation, logs and checkpoints; without maps nothing knows of them."""
    if not maps:
        plain = [{"_target_": "EnsureTyped", "keys": ["image", "label"], "track_meta": False}]
        options |= {"train#preprocessing#distance_map": [], "train#preprocessing#plain_tensors": plain}
        options["loss#losses#boundary"] = {"_target_": "medconstraints.losses.GeneralizedDiceLoss", "softmax": True}
    parser = parsed_bundle("boundary_loss", [], datalist, output_dir, **options)
    # Without the handler the weights stay those at the end of the training.
    parser["loss"]["weights"] = {"regional": 1.0, "boundary": 1.0 if maps else 0.0}
    trainer = parser.get_parsed_content("train#trainer")
    trainer.logger.setLevel(logging.WARNING)
    return trainer.run  # type: ignore[no-any-return]


def main() -> None:
    """Print and write the ratios."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--output", default="docs/results/benchmark_boundary_epoch.json")
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
        where = datalist, Path(folder)
        times = medians_ms(
            {
                "without": epoch(*where, maps=False),
                "boundary": epoch(*where, maps=True),
                "hausdorff": epoch(*where, maps=True, distance="hausdorff"),
            },
            runs=args.runs,
            warmup=1,
        )
    row = {
        "case": f"{args.volumes} volumes of {SHAPE}, 3 classes",
        "epoch_ms": times["without"],
        "ratio_boundary": times["boundary"] / times["without"],
        "ratio_hausdorff": times["hausdorff"] / times["without"],
    }
    sys.stdout.write(f"{row}\n")
    write(args.output, [row])


if __name__ == "__main__":
    main()
