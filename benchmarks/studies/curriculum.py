"""Few segmented patients and many unsegmented ones: what regressed sizes add, against labels alone and a mean teacher.

Run it in a folder of its own with links `data` (with `acdc.json`) and `bundles`. Every training is a command line of
its own, written to `commands.txt`; runs that are there already are left out, so a study that was stopped goes on. One
volume of each patient, the end of diastole; the left ventricle in slices of 96 x 96. A regressor of n patients serves
all rows that need it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from command_runs import DICE, bundle_run, call

BUNDLE = "bundles/curriculum_size"
SHARED = "--datalist lists/acdc.json --network_def#channels [8,16,32,64] --ramp_epochs 5"
EPOCHS, LAST = 8, 4  # of each training; over the last the mean is taken, as the thesis does over its last 50
REGRESSOR_STEPS = 400
# row: overlays, options; {n} is the number of segmented patients
ROWS: dict[str, tuple[list[str], str]] = {
    "labelled": ([], "--supervision labelled"),
    "proposals": ([], "--supervision proposals --proposals_dir masks/{start}"),
    "mean teacher": (["mean_teacher"], ""),
    "curriculum": (["segmentation"], "--regressor_dir runs/{regressor}/regressor"),
    "curriculum, uncertainty": (
        ["segmentation"],
        "--regressor_dir runs/{regressor}/regressor --margin_from uncertainty",
    ),
    "oracle": ([], "--supervision oracle"),
}
ALL = "all labelled"  # with the first seed
COUNTS = {5: 3, 10: 1, 20: 1}  # segmented patients: seeds
ONCE = ("proposals", "oracle")  # with the fewest patients alone, the former with the first seed


def rows_of(count: int, seed: int) -> list[str]:
    """Rows of a number of patients and a seed, those first that others need."""
    few = count == min(COUNTS)
    left_out = {row for row in ONCE if not few or (row == "proposals" and seed)}
    return ["labelled", "regressor", *[row for row in ROWS if row != "labelled" and row not in left_out]]


def write_list(data: Path, folder: Path) -> None:
    """One volume of each patient."""
    content = json.loads((data / "acdc.json").read_text())
    sections = {}
    for section in ("training", "validation", "test"):
        entries = [entry for entry in content[section] if entry["phase"] == "ED"]
        paths = [{key: os.path.relpath(data / entry[key], folder) for key in ("image", "label")} for entry in entries]
        sections[section] = [{**path, "patient": entry["patient"]} for path, entry in zip(paths, entries, strict=True)]
    (folder / "acdc.json").write_text(json.dumps(sections, indent=1) + "\n")


def name_of(row: str, count: int | None, seed: int) -> str:
    """Folder of a run."""
    letters = "".join(letter if letter.isalnum() else "_" for letter in row)
    return f"{letters}_n{'all' if count is None else count}_seed{seed}"


def command(row: str, count: int | None, seed: int) -> list[str]:
    """Command line of a training."""
    if row == "regressor":
        slices = 10 * 10 * int(count or 0)  # about ten of each patient, ten times in an epoch
        overlays, options = ["regressor"], f"--regressor_epochs {max(1, round(REGRESSOR_STEPS * 16 / slices))}"
        options += " --regression#batch_size 16 --regression#val_interval 2"
    elif row == ALL:
        overlays, options = [], "--supervision labelled"
    else:
        overlays, options = ROWS[row]
        options = options.format(regressor=name_of("regressor", count, seed), start=name_of("labelled", count, seed))
    run = [*bundle_run(BUNDLE, [*["train", "slices"], *overlays]), *shlex.split(SHARED)]
    labelled = "$None" if count is None else str(count)
    run += ["--output_dir", f"runs/{name_of(row, count, seed)}", "--seed", str(seed), "--fully_labelled", labelled]
    run += shlex.split(options)
    return run if row == "regressor" else [*run, "--epochs", str(EPOCHS), "--val_interval", "1"]


def run_one(row: str, count: int | None, seed: int) -> None:
    """One training and the scores of its best weights on the test part, unless they are there."""
    name = name_of(row, count, seed)
    done = Path(f"done/{name}.json")
    if done.exists():
        return
    line, start = command(row, count, seed), time.perf_counter()
    call(line, name)
    result: dict[str, Any] = {"seconds": time.perf_counter() - start, "command": shlex.join(line)}
    if row != "regressor":
        result["validation"] = [float(value) for _, value in DICE.findall(Path(f"logs/{name}.txt").read_text())]
        shared = [*shlex.split(SHARED), "--ckpt_path", f"runs/{name}/model.pt"]
        evaluate = [*bundle_run(BUNDLE, ["train", "slices", "evaluate"]), *shared, "--section", "test"]
        call([*evaluate, "--output_dir", f"runs/{name}/test"], f"{name}_test")
        result["test"] = volume_scores(Path(f"runs/{name}/test"))
    done.write_text(json.dumps(result) + "\n")
    sys.stdout.write(
        f"{name}: {result['seconds']:.0f} s, {result.get('validation', [])[-LAST:]} {result.get('test')}\n"
    )
    sys.stdout.flush()
    if row == "labelled":  # its masks are the proposals of another row
        infer = [*bundle_run(BUNDLE, ["inference", "inference_slices"]), "--dataset_dir", "lists/acdc.json"]
        infer += ["--section", "training", "--ckpt_path", f"runs/{name}/model.pt", "--output_dir", f"masks/{name}"]
        call([*infer, *shlex.split("--network_def#channels [8,16,32,64]")], f"{name}_masks")


def volume_scores(folder: Path) -> float:
    """Mean Dice of the volumes of a part."""
    rows = (folder / "metrics" / "val_mean_dice_raw.csv").read_text().splitlines()
    return float(np.nanmean([float(row.split(",")[-1].split()[-1]) for row in rows[1:]]))


def collect() -> dict[str, Any]:
    """What all runs that are there came to."""
    runs = []
    for file in sorted(Path("done").glob("*.json")):
        found = json.loads(file.read_text())
        told = json.loads(Path(f"runs/{file.stem}/settings.json").read_text())
        matched = re.fullmatch(r"(.+)_n(\w+)_seed(\d+)", file.stem)
        assert matched is not None
        row, count, seed = matched.groups()
        names = {name_of(one, None, 0).removesuffix("_nall_seed0"): one for one in (*ROWS, ALL, "regressor")}
        entry: dict[str, Any] = {"row": names[row], "labelled": count, "seed": int(seed), **found}
        entry["settings"] = {key: told[key] for key in ("config_files", "options")}
        if names[row] == "regressor":
            entry["held_back"] = json.loads(Path(f"runs/{file.stem}/regressor/predictions.json").read_text())[
                "held_back"
            ]
        else:
            last = found["validation"][-LAST:]
            entry |= {
                "last_mean": float(np.mean(last)),
                "last_spread": float(np.std(last)),
                "best": max(found["validation"]),
            }
        runs.append(entry)
    return {
        "study": "curriculum",
        "command": "python benchmarks/studies/curriculum.py",
        "date": time.strftime("%Y-%m-%d"),
        "processor": platform.machine(),
        "epochs": EPOCHS,
        "last": LAST,
        "runs": runs,
    }


def main() -> None:
    """Run the study, or collect what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--collect", action="store_true", help="train nothing")
    parser.add_argument("--output", type=Path, default=Path("curriculum.json"))
    args = parser.parse_args()
    for folder in ("lists", "logs", "done"):
        Path(folder).mkdir(exist_ok=True)
    if not args.collect:
        write_list(args.data, Path("lists"))
        for seed in range(max(COUNTS.values())):
            for count, seeds in COUNTS.items():
                for row in rows_of(count, seed) if seed < seeds else ():
                    run_one(row, count, seed)
            if seed == 0:
                run_one(ALL, None, seed)
    args.output.write_text(json.dumps(collect(), indent=1) + "\n")
    sys.stdout.write(f"written to {args.output}\n")


if __name__ == "__main__":
    main()
