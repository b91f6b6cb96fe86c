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
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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
DICE = re.compile(r"Epoch\[(\d+)\] Metrics -- val_mean_dice: ([\d.]+)")


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


def command(row: str, margin: int) -> list[str]:
    """Command line of a training."""
    overlays, options = ROWS[row]
    files = ",".join(f"'{BUNDLE}/configs/{name}.json'" for name in ["train", *overlays])
    run = ["python", "-m", "monai.bundle", "run", "--bundle_root", BUNDLE, "--config_file", f"[{files}]"]
    run += ["--output_dir", f"runs/{name_of(row, margin)}", "--margin_voxels", str(margin)]
    return [*run, *shlex.split(SHARED), *shlex.split(options)]


def run_one(row: str, margin: int) -> None:
    """One training, unless it is there."""
    name = name_of(row, margin)
    done = Path(f"done/{name}.json")
    if done.exists():
        return
    line, start = command(row, margin), time.perf_counter()
    with open("commands.txt", "a") as file:
        file.write(shlex.join(line) + "\n")
    with open(f"logs/{name}.txt", "w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *line[1:]], check=True, stdout=log, stderr=log, env=environment)
    seconds = time.perf_counter() - start
    dice = [float(value) for _, value in DICE.findall(Path(f"logs/{name}.txt").read_text())]
    with open(f"curves/{name}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["epoch", "val_mean_dice"], *([epoch + 1, value] for epoch, value in enumerate(dice))])
    done.write_text(json.dumps({"seconds": seconds, "command": shlex.join(line), "dice": dice}) + "\n")
    sys.stdout.write(f"{name}: {seconds:.0f} s, {dice[-LAST:]}\n")
    sys.stdout.flush()


def collect(picture: Path) -> dict[str, Any]:
    """Curves and settings of all runs that are there."""
    runs, files = [], {}
    for margin in MARGINS:
        for row in ROWS:
            name = name_of(row, margin)
            if not Path(f"done/{name}.json").exists():
                continue
            told = json.loads(Path(f"runs/{name}/settings.json").read_text())
            settings = {key: told[key] for key in ("config_files", "options")}
            found = json.loads(Path(f"done/{name}.json").read_text())
            runs.append({"row": row, "margin_voxels": margin, **found, "settings": settings})
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
