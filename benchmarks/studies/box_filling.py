"""From which filling ratio on are 3D boxes enough? Phantoms of a given ratio; 3D boxes, flat boxes and labels.

For every ratio a cohort of phantoms whose organ fills that share of its box is made; the bundle's network is trained
on it three times with the same seed and number of epochs, and the Dice on the test volumes is written down.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.metrics import DiceMetric
from monai.networks.utils import one_hot

from medconstraints.boxes import fit_filling
from medconstraints.data import read_datalist
from medconstraints.synthetic import make_cohort

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from timing import write

BUNDLE = Path(__file__).resolve().parent.parent.parent / "bundles" / "box_prior"
SHAPE = (32, 32, 24)
FITTED_CASES = 3


def run_once(datalist: Path, supervision: str, epochs: int, seed: int, folder: Path) -> tuple[float, float]:
    """Mean test Dice and its standard deviation for "3d boxes", "slice boxes" or "labels"."""
    slice_axis = 2 if supervision == "slice boxes" else None
    names = ["train", "full_supervision"] if supervision == "labels" else ["train"]
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / "configs" / f"{name}.json") for name in names])
    labels = [np.asarray(item["label"]) for item in load_labels(datalist, "training")[:FITTED_CASES]]
    parser.update(
        {
            "bundle_root": str(BUNDLE),
            "datalist": str(datalist),
            "output_dir": str(folder),
            "num_classes": 2,
            "patch_size": list(SHAPE),
            "epochs": epochs,
            "seed": seed,
            "slice_axis": slice_axis,
            "filling": fit_filling(labels, num_classes=2, slice_axis=slice_axis),
            "train#trainer#train_handlers": [],
        }
    )
    torch.manual_seed(seed)
    trainer: Any = parser.get_parsed_content("train#trainer")
    scheduler = parser.get_parsed_content("lr_scheduler")
    formulation = parser.get_parsed_content("formulation")
    from ignite.engine import Events

    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda _: scheduler.step())
    if formulation is not None:
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda _: formulation.step())
    trainer.logger.disabled = True
    trainer.run()

    network = parser.get_parsed_content("network").eval()
    metric = DiceMetric(include_background=False)
    for item in load_labels(datalist, "test"):
        with torch.no_grad():
            predicted = network(item["image"].as_tensor()[None]).argmax(1, keepdim=True)
        metric(one_hot(predicted, 2), one_hot(item["label"].as_tensor()[None], 2))
    values = metric.get_buffer().flatten()
    return float(values.mean()), float(values.std())


def load_labels(datalist: Path, section: str) -> list[Any]:
    """Images and labels of a section, read as the bundle reads them."""
    from monai.transforms import Compose

    from medconstraints.transforms import reading_transforms

    return [Compose(reading_transforms(num_classes=2))(item) for item in read_datalist(datalist, section)]


def main() -> None:
    """Run the study and write the table's numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="docs/results/box_filling.json")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.8])
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-training", type=int, default=24)
    args = parser.parse_args()
    rows = []
    for ratio in args.ratios:
        row: dict[str, Any] = {"filling": ratio, "epochs": args.epochs, "seed": args.seed}
        with tempfile.TemporaryDirectory() as folder:
            datalist = make_cohort(
                Path(folder) / "cohort",
                num_training=args.num_training,
                num_validation=1,
                num_test=8,
                seed=args.seed,
                shape=SHAPE,
                filling=ratio,
            )
            for supervision in ("3d boxes", "slice boxes", "labels"):
                start = time.perf_counter()
                row[f"{supervision} dice"], row[f"{supervision} sd"] = run_once(
                    datalist, supervision, args.epochs, args.seed, Path(folder)
                )
                row[f"{supervision} seconds"] = round(time.perf_counter() - start, 1)
        rows.append(row)
        shown = "  ".join(f"{k} {row[f'{k} dice']:.3f}" for k in ("3d boxes", "slice boxes", "labels"))
        sys.stdout.write(f"filling {ratio:.2f}: {shown}\n")
        sys.stdout.flush()
        write(args.output, rows)


if __name__ == "__main__":
    main()
