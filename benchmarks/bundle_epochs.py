"""A bundle's config as one epoch is timed with: without validation, logs and checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

BUNDLES = Path(__file__).resolve().parent.parent / "bundles"


def parsed_bundle(
    bundle: str, overlays: Sequence[str], datalist: Path, output_dir: Path, **options: Any
) -> ConfigParser:
    """The config of a training of one epoch; `train#trainer` of it has no handlers."""
    parser = ConfigParser()
    parser.read_config([str(BUNDLES / bundle / "configs" / f"{name}.json") for name in ["train", *overlays]])
    parser.update(
        {
            "bundle_root": str(BUNDLES / bundle),
            "dataset_dir": str(datalist.parent),
            "output_dir": str(output_dir),
            "epochs": 1,
            "train#trainer#train_handlers": [],
            **options,
        }
    )
    return parser
