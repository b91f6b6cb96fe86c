"""The main job without any data set: train on synthetic volumes with boxes only, segment held-out ones, report.

`python -m medconstraints.demo --output output/demo` makes a cohort of phantoms as NIfTI files, trains the bundle
`box_prior` on boxes, runs its inference on the test volumes and writes a picture and an HTML page.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from medconstraints.reports.evaluation import evaluate_predictions, format_summary, write_results
from medconstraints.reports.html import build_cases, write_report
from medconstraints.reports.montage import montage
from medconstraints.synthetic.phantoms import make_cohort

__all__ = ["main", "run_demo"]

_SLICE_AXIS = 2


def _bundle_command(bundle: Path, config: str, overrides: dict[str, object]) -> list[str]:
    """The command a user would type to run a config of the bundle."""
    command = [sys.executable, "-m", "monai.bundle", "run"]
    command += ["--config_file", str(bundle / "configs" / f"{config}.json")]
    command += ["--meta_file", str(bundle / "configs" / "metadata.json")]
    command += ["--logging_file", str(bundle / "configs" / "logging.conf")]
    command += ["--bundle_root", str(bundle)]
    for key, value in overrides.items():
        command += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return command


def run_demo(
    output: Path, *, bundle: Path, num_training: int = 40, num_test: int = 4, epochs: int = 45, seed: int = 0
) -> Path:
    """Make the cohort, train, segment, report; returns the HTML page.

    Args:
        output: folder of everything that is made; must not exist, or be empty.
        bundle: folder of the bundle `box_prior`.
        num_training: synthetic volumes to train on.
        num_test: held-out volumes.
        epochs: passes over the training volumes.
        seed: of the cohort and of the training.

    Raises:
        FileExistsError: `output` holds something already.
        FileNotFoundError: there is no such bundle.
        PermissionError: `output` cannot be written to.
        subprocess.CalledProcessError: training or inference failed; what it printed says why.
    """
    if not (bundle / "configs" / "train.json").is_file():
        raise FileNotFoundError(f"bundle: no configs/train.json in {bundle}; give the folder bundles/box_prior.")
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(
            f"output: {output} holds files already; remove the folder {output} or choose another one."
        )
    started = time.perf_counter()
    say = sys.stdout.write
    datalist = make_cohort(output / "cohort", num_training=num_training, num_test=num_test, seed=seed)
    say(f"Made {num_training} volumes to train on, {num_test} to test on and a few to validate, in {datalist.parent}\n")
    shared: dict[str, object] = {"num_classes": 2, "patch_size": [48, 48, 32], "spacing_mm": [-1, -1, -1]}
    train = {
        **shared,
        "dataset_dir": str(datalist.parent),
        "output_dir": str(output / "run"),
        "slice_axis": _SLICE_AXIS,
        "size_bounds": [0.5, 0.9],
        "epochs": epochs,
        "val_interval": 5,
        "seed": seed,
    }
    say(f"Training with boxes only, {epochs} epochs ...\n")
    sys.stdout.flush()
    subprocess.run(_bundle_command(bundle, "train", train), check=True)
    masks = output / "masks"
    infer = {
        **shared,
        "dataset_dir": str(datalist),
        "output_dir": str(masks),
        "ckpt_path": str(output / "run" / "model.pt"),
    }
    subprocess.run(_bundle_command(bundle, "inference", infer), check=True)

    results = evaluate_predictions(datalist, "test", masks, structures={"organ": [1]})
    write_results(results, output / "results.json")
    cases = build_cases(datalist, "test", masks, results=results, slice_axis=_SLICE_AXIS)
    picture = montage(cases, output / "montage.png", axis=_SLICE_AXIS, class_names={1: "organ"})
    minutes = (time.perf_counter() - started) / 60
    page = write_report(
        cases,
        output / "report.html",
        title="Segmentation learned from bounding boxes",
        results=results,
        notes=[
            f"{num_training} synthetic training volumes, labelled by one box per slice and nothing else.",
            f"Trained for {epochs} epochs, seed {seed}; the whole demo took {minutes:.1f} minutes.",
        ],
        montage_png=picture,
    )
    say("\n" + format_summary(results) + "\n")
    say(f"Done in {minutes:.1f} minutes.\n")
    for what, path in (
        ("report", page),
        ("picture", picture),
        ("masks", masks),
        ("weights", output / "run" / "model.pt"),
        ("TensorBoard", output / "run" / "tensorboard"),
        ("scores", output / "results.json"),
    ):
        say(f"  {what:<12} {path}\n")
    return page


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m medconstraints.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="folder to make")
    parser.add_argument("--bundle", type=Path, default=Path("bundles/box_prior"), help="folder of the bundle")
    parser.add_argument("--epochs", type=int, default=45)
    parser.add_argument("--num-training", type=int, default=40)
    parser.add_argument("--num-test", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        run_demo(
            args.output,
            bundle=args.bundle,
            num_training=args.num_training,
            num_test=args.num_test,
            epochs=args.epochs,
            seed=args.seed,
        )
    except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except subprocess.CalledProcessError as error:
        sys.stderr.write(f"a step failed with exit status {error.returncode}; its messages are above\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
