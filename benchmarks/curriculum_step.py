"""One epoch with regressed bounds, and with a mean teacher, against one with labels alone and as many images.

All include their data pipeline. The regressor is not trained: what it says is made before the first epoch and read from
then on.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bundle_epochs import parsed_bundle
from timing import medians_ms, steady_allocator, write

from medconstraints.synthetic import make_cohort

SHAPE = (48, 64, 48)


def epoch(overlays: list[str], datalist: Path, output_dir: Path, **options: Any) -> Any:
    """One epoch of the segmentation; spatial augmentation, which only segmented images have, is left out."""
    given = {"regressor_dir": str(output_dir), "fully_labelled": 4, "placement": [], "regression#augmentation": []}
    parser = parsed_bundle("curriculum_size", overlays, datalist, output_dir, **given, **options)
    if options.get("supervision", "curriculum") == "curriculum" and not overlays:
        predictions = parser.get_parsed_content("predictions")
        torch.save(predictions.regressor.state_dict(), output_dir / "model.pt")
        predictions.prepare()
    trainer = parser.get_parsed_content("train#trainer")
    trainer.logger.setLevel(logging.WARNING)
    return trainer.run


def main() -> None:
    """Print and write the ratios."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--output", default="docs/results/benchmark_curriculum_step.json")
    arguments.add_argument("--runs", type=int, default=7)
    arguments.add_argument("--threads", type=int, default=1)
    args = arguments.parse_args()
    steady_allocator()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        datalist = make_cohort(
            Path(folder) / "cohort",
            num_training=12,
            num_validation=2,
            num_test=1,
            num_classes=2,
            shape=SHAPE,
            spacing_mm=(1.0, 1.0, 1.0),
        )
        where = datalist, Path(folder)
        times = medians_ms(
            {
                "labels alone": epoch([], *where, supervision="labelled"),
                "curriculum": epoch([], *where),
                "mean teacher": epoch(["mean_teacher"], *where),
            },
            runs=args.runs,
            warmup=1,
        )
    rows = [{"case": name, "ratio": value / times["labels alone"]} for name, value in times.items()]
    for row in rows:
        sys.stdout.write(f"{row['case']:<14} {row['ratio']:.3f}x\n")
    write(args.output, rows)


if __name__ == "__main__":
    main()
