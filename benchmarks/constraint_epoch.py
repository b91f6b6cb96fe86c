"""One training epoch with constraints against the same epoch with cross-entropy on full labels.

All of them include their data pipeline and the step of the formulations. Lagrangians are timed as the bundle runs them,
with the residuals that the training sees anyway, and with the thesis's extra pass over the data.
"""

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

from medconstraints.handlers import DualPassHandler, StepFormulationHandler
from medconstraints.synthetic import make_cohort

SHAPE = (48, 64, 48)


def epoch(bundle: str, overlays: list[str], datalist: Path, output_dir: Path, **options: Any) -> Callable[[], Any]:
    """One epoch of a bundle's trainer, without validation, logs and checkpoints."""
    dual_pass = options.pop("dual_pass", False)
    trainer = parsed_bundle(bundle, overlays, datalist, output_dir, **options).get_parsed_content("train#trainer")
    for handler in [*([DualPassHandler()] if dual_pass else []), StepFormulationHandler()]:
        handler.attach(trainer)
    trainer.logger.setLevel(logging.WARNING)
    return trainer.run


def main() -> None:
    """Print and write the ratios."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--output", default="docs/results/benchmark_constraint_epoch.json")
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
                "partial cross-entropy": epoch("log_barrier", ["full_supervision"], *where, weak_source="points"),
                "cross-entropy on full labels": epoch("log_barrier", ["full_supervision"], *where),
                "log-barrier, size and centroid": epoch("log_barrier", [], *where),
                "penalty, size and centroid": epoch("log_barrier", ["baselines"], *where, baseline="penalty"),
                "Lagrangian": epoch("log_barrier", ["baselines"], *where, baseline="lagrangian"),
                "ReLU Lagrangian": epoch("log_barrier", ["baselines"], *where, baseline="relu_lagrangian"),
                "augmented Lagrangian": epoch("log_barrier", ["baselines"], *where, baseline="augmented_lagrangian"),
                "Lagrangian with the extra pass": epoch(
                    "log_barrier", ["baselines"], *where, baseline="lagrangian", dual_pass=True
                ),
                "Lagrangian with proposals": epoch("size_constraint", ["proposals"], *where),
            },
            runs=args.runs,
            warmup=1,
        )
    base = times["cross-entropy on full labels"]
    rows = [{"case": name, "epoch_s": value / 1e3, "ratio": value / base} for name, value in times.items()]
    for row in rows:
        sys.stdout.write(f"{row['case']:<34} {row['ratio']:.3f}x\n")
    write(args.output, rows)


if __name__ == "__main__":
    main()
