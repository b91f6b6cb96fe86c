"""DeepCut against the box prior: Dice of each epoch on the hippocampus, with tight boxes and with a margin.

Run it in a folder of its own with links `data` (with `hippocampus.json`) and `bundles`. Every training is a command
line of its own, written to `commands.txt`; runs that are there already are left out, so a study that was stopped goes
on. Cut to a part of the training volumes, to two rounds of DeepCut, and to one seed. Boxes are of coronal slices.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from command_runs import finished, train

from medconstraints.reports.curves import read_curves

BUNDLE = "bundles/box_prior"
VOLUMES, EPOCHS, EVERY, LAST = 48, 20, 10, 5
SHARED = f"--datalist lists/hippocampus.json --epochs {EPOCHS} --val_interval 1 --seed 0"
# row: overlays, options
ROWS: dict[str, tuple[list[str], str]] = {
    "box prior": ([], ""),
    "DeepCut": (["deepcut"], f"--relabel_every {EVERY}"),
}
MARGINS = (0, 1)  # voxels on each side; the boxes are about 10 to 20 wide


def write_list(data: Path, folder: Path) -> None:
    """The first training volumes, and all to validate."""
    content = json.loads((data / "hippocampus.json").read_text())
    sections = {"training": content["training"][:VOLUMES], "validation": content["validation"]}
    for entry in (entry for entries in sections.values() for entry in entries):
        entry |= {key: os.path.relpath(data / entry[key], folder) for key in ("image", "label")}
    (folder / "hippocampus.json").write_text(json.dumps(sections, indent=1) + "\n")


def name_of(row: str, margin: int) -> str:
    """Folder of a run."""
    return f"{row.replace(' ', '_')}_margin{margin}"


def run_one(row: str, margin: int) -> None:
    """One training, unless it is there, and its curve."""
    overlays, options = ROWS[row]
    name = name_of(row, margin)
    told = train(BUNDLE, ["train", *overlays], f"{SHARED} --margin_voxels {margin} {options}", name)
    with open(f"curves/{name}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(
            [["epoch", "val_mean_dice"], *([epoch + 1, value] for epoch, value in enumerate(told["dice"]))]
        )


def collect(picture: Path) -> dict[str, Any]:
    """Curves and settings of all runs that are there."""
    runs, files = [], {}
    for margin in MARGINS:
        for row in ROWS:
            name = name_of(row, margin)
            if not Path(f"done/{name}.json").exists():
                continue
            runs.append({"row": row, "margin_voxels": margin, **finished(name)})
            files[f"{row}, margin {margin}"] = f"curves/{name}.csv"
    summary = read_curves(files, columns=["val_mean_dice"], last=LAST, picture=picture)["summary"] if files else {}
    return {
        "study": "deepcut",
        "command": "python benchmarks/studies/deepcut.py",
        "date": time.strftime("%Y-%m-%d"),
        "processor": platform.machine(),
        "volumes": VOLUMES,
        "epochs": EPOCHS,
        "every": EVERY,
        "last": LAST,
        "runs": runs,
        "summary": summary,
    }


def main() -> None:
    """Run the study, or collect what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--collect", action="store_true", help="train nothing")
    parser.add_argument("--output", type=Path, default=Path("deepcut.json"))
    parser.add_argument("--picture", type=Path, default=Path("deepcut.png"))
    args = parser.parse_args()
    for folder in ("lists", "logs", "done", "curves"):
        Path(folder).mkdir(exist_ok=True)
    if not args.collect:
        write_list(args.data, Path("lists"))
        for margin in MARGINS:
            for row in ROWS:
                run_one(row, margin)
    args.output.write_text(json.dumps(collect(args.picture), indent=1) + "\n")
    sys.stdout.write(f"written to {args.output}\n")


if __name__ == "__main__":
    main()
