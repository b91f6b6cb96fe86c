"""The main job without any data set: train on synthetic volumes with boxes only, segment held-out ones, report.

The command `demo` makes a cohort of phantoms as NIfTI files, trains the bundle `box_prior` on boxes, runs its inference
on the test volumes and writes a picture and an HTML page.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medconstraints.reports.evaluation import evaluate_predictions, format_summary
from medconstraints.reports.report import write_report
from medconstraints.synthetic.phantoms import make_cohort

__all__ = ["run_demo"]

SLICE_AXIS = 2
SHAPE = {"num_classes": 2, "patch_size": [48, 48, 32], "spacing_mm": [-1, -1, -1]}


def run_demo(
    *,
    output_dir: str | Path = "output/demo",
    bundle: str | Path = "bundles/box_prior",
    num_training: int = 40,
    num_test: int = 4,
    epochs: int = 45,
    seed: int = 0,
) -> Path:
    """Make the cohort, train, segment, report; returns the HTML page.

    Args:
        output_dir: folder of everything that is made; must not exist, or be empty.
        bundle: folder of the bundle `box_prior`.
        num_training: synthetic volumes to train on.
        num_test: held-out volumes.
        epochs: passes over the training volumes.
        seed: of the cohort and of the training.

    Raises:
        FileExistsError: `output_dir` holds something already.
        FileNotFoundError: there is no such bundle.
        PermissionError: `output_dir` cannot be written to.
        subprocess.CalledProcessError: training or inference failed; what it printed says why.
    """
    output, bundle = Path(output_dir), Path(bundle)
    if not (bundle / "configs" / "train.json").is_file():
        raise FileNotFoundError(f"bundle: no configs/train.json in {bundle}; give the folder bundles/box_prior.")
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"output_dir: {output} holds files already; remove the folder or choose another one.")
    started = time.perf_counter()
    datalist = make_cohort(output / "cohort", num_training=num_training, num_test=num_test, seed=seed)
    _say(f"Made {num_training} volumes to train on, {num_test} to test on and a few to validate, in {datalist.parent}")
    _say(f"Training with boxes only, {epochs} epochs ...")
    train = {"dataset_dir": str(datalist.parent), "output_dir": str(output / "run"), "slice_axis": SLICE_AXIS}
    train |= {"filling": [0.5, 0.9], "epochs": epochs, "val_interval": 5, "seed": seed}
    _run_bundle(bundle, "train", {**SHAPE, **train})
    masks, weights = output / "masks", output / "run" / "model.pt"
    infer = {"dataset_dir": str(datalist), "output_dir": str(masks), "ckpt_path": str(weights)}
    _run_bundle(bundle, "inference", infer)
    scored: dict[str, Any] = {"datalist": datalist, "section": "test", "predictions": masks}
    results = evaluate_predictions(**scored, structures={"organ": [1]})
    scores, page = output / "results.json", output / "report.html"
    scores.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    minutes = (time.perf_counter() - started) / 60
    write_report(
        **scored,
        results=scores,
        output=page,
        picture=output / "montage.png",
        boxes_axis=SLICE_AXIS,
        title="Segmentation learned from bounding boxes",
        notes=[
            f"{num_training} synthetic training volumes, labelled by one box per slice and nothing else.",
            f"Trained for {epochs} epochs, seed {seed}; the whole demo took {minutes:.1f} minutes.",
        ],
    )
    _say(f"\n{format_summary(results)}\n\nDone in {minutes:.1f} minutes; scores, picture, masks, the run with its")
    _say(f"weights and TensorBoard's scalars are in {output}, and the report is")
    return page


def _run_bundle(bundle: Path, config: str, options: Mapping[str, Any]) -> None:
    """Run a config of the bundle with the command that a user would type."""
    command = [sys.executable, "-m", "monai.bundle", "run"]
    command += ["--config_file", str(bundle / "configs" / f"{config}.json")]
    command += ["--meta_file", str(bundle / "configs" / "metadata.json")]
    command += ["--logging_file", str(bundle / "configs" / "logging.conf"), "--bundle_root", str(bundle)]
    for key, value in options.items():
        command += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    subprocess.run(command, check=True)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
