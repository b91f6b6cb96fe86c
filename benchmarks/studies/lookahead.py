"""Lookahead adversarial learning against its rivals and its noise control: heart slices and hippocampus volumes.

Run it in a folder of its own with links `data` (with `acdc.json` and `hippocampus.json`) and `bundles`. Every training
is a command line of its own, written to `commands.txt`; runs that are there already are left out, so a study that was
stopped goes on. All rows of a seed begin with the same network. Parts are disjoint by patient: one trains, one steers,
one confirms, and the results are of a fourth.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image

BUNDLE = "bundles/lookahead_adversarial"
# row: overlays, options
ROWS: dict[str, tuple[list[str], str]] = {
    "lookahead": ([], ""),
    "alternating": (["alternating"], ""),
    "alternating, with cross-entropy": (["alternating", "hybrid"], ""),
    "lookahead, with cross-entropy": (["hybrid"], ""),
    "lookahead, with constraints": (["constraints"], ""),
    "constraints in place of the adversary": (["constraints"], "--train#trainer#adversarial_weight 0.0"),
    "constraints in its place, ten times the rate": (
        ["constraints"],
        "--train#trainer#adversarial_weight 0.0 --learning_rate 0.002",
    ),
}
START, SHIPPED = "start", {"hippocampus": "bundles/boundary_loss/models/model.pt"}  # a start that is there already
# set: base configs, options of all, epochs of the start, evaluations, seeds
SETS: dict[str, tuple[list[str], str, int, int, int]] = {
    "acdc": (["train", "images"], "--patch_size [96,96]", 40, 100, 3),
    "hippocampus": (["train"], "--train#trainer#discriminator_steps 60", 0, 16, 1),
}
SEARCHES = {"acdc": "--enclosed [[3,2]]"}  # of all rows but the start
ONLY = {"hippocampus": ["lookahead", "alternating"]}  # rows of a set, where not all
SLICES, SIDE, CROP = 4, 96, 160


def write_data(data: Path, folder: Path) -> None:
    """PNG slices of hearts, and datalists with the four parts."""
    folder.mkdir(parents=True, exist_ok=True)
    heart = json.loads((data / "acdc.json").read_text())
    patients = sorted({entry["patient"] for entry in heart["training"]})
    parts = {"training": patients[:39], "validation": patients[39:49], "confirm": patients[49:59]}
    sections: dict[str, list[dict[str, str]]] = {}
    for name, chosen in parts.items():
        entries = [entry for entry in heart["training"] if entry["patient"] in chosen]
        sections[name] = _slices(data, folder, entries, SLICES if name == "training" else 1)
    sections["test"] = _slices(data, folder, [*heart["validation"], *heart["test"]], 1)
    (folder / "acdc.json").write_text(json.dumps(sections, indent=1) + "\n")
    content = json.loads((data / "hippocampus.json").read_text())
    for entry in [entry for section in ("training", "validation", "test") for entry in content[section]]:
        for key in ("image", "label"):
            entry[key] = os.path.relpath(data / entry[key], folder)
    # The start was trained on all training volumes, and chosen on the validation volumes.
    steering = content["validation"]
    volumes = {**content, "validation": steering[:10], "confirm": steering[10:]}
    (folder / "hippocampus.json").write_text(json.dumps(volumes, indent=1) + "\n")


def _slices(data: Path, folder: Path, entries: list[dict[str, Any]], count: int) -> list[dict[str, str]]:
    """Slices of the middle half of each volume, the centre cropped to 160 pixels and made smaller."""
    items = []
    (folder / "png").mkdir(exist_ok=True)
    for entry in entries:
        image, label = (np.asanyarray(nib.load(data / entry[key]).dataobj) for key in ("image", "label"))
        shares = np.linspace(0.25, 0.75, count) if count > 1 else [0.5]
        for number in sorted({round(share * (image.shape[2] - 1)) for share in shares}):
            stem = f"{Path(entry['image']).name.split('.')[0]}_{number}"
            files = {"image": f"png/{stem}.png", "label": f"png/{stem}_mask.png"}
            grey = (np.clip(image[..., number] / image.max(), 0, 1) * 255).astype(np.uint8)
            bilinear, nearest = Image.Resampling.BILINEAR, Image.Resampling.NEAREST
            Image.fromarray(_centre(grey)).resize((SIDE, SIDE), bilinear).save(folder / files["image"])
            mask = label[..., number].astype(np.uint8)
            Image.fromarray(_centre(mask)).resize((SIDE, SIDE), nearest).save(folder / files["label"])
            items.append({**files, "patient": entry["patient"]})
    return items


def _centre(image: np.ndarray) -> np.ndarray:
    padded = np.pad(image, [(max(0, (CROP - size + 1) // 2),) * 2 for size in image.shape])
    starts = [(size - CROP) // 2 for size in padded.shape]
    return padded[starts[0] : starts[0] + CROP, starts[1] : starts[1] + CROP]


def command(dataset: str, row: str, seed: int) -> list[str]:
    """Command line of a training; the row "start" is what all others of the seed begin with."""
    base, options, epochs, evaluations, _ = SETS[dataset]
    overlays, more = (["pretrain"], "") if row == START else ROWS[row]
    budget = epochs if row == START else evaluations // (2 if "alternating" in overlays else 1)
    files = ",".join(f"'{BUNDLE}/configs/{name}.json'" for name in [*base, *overlays])
    run = ["python", "-m", "monai.bundle", "run", "--bundle_root", BUNDLE, "--config_file", f"[{files}]"]
    run += ["--datalist", f"lists/{dataset}.json", "--output_dir", f"runs/{name_of(dataset, row, seed)}"]
    run += ["--epochs", str(budget), "--seed", str(seed), *shlex.split(options), *shlex.split(more)]
    if row == START:
        return [*run, "--val_interval", "2"]
    run += shlex.split(SEARCHES.get(dataset, ""))
    return [*run, "--start_checkpoint", SHIPPED.get(dataset, f"runs/{name_of(dataset, START, seed)}/model.pt")]


def name_of(dataset: str, row: str, seed: int) -> str:
    """Folder of a run."""
    return f"{dataset}_{''.join(letter if letter.isalnum() else '_' for letter in row)}_seed{seed}"


def run_one(dataset: str, row: str, seed: int) -> None:
    """One training, unless it is there."""
    name = name_of(dataset, row, seed)
    done = Path(f"done/{name}.json")
    if done.exists():
        return
    shutil.rmtree(f"runs/{name}", ignore_errors=True)
    line, start = command(dataset, row, seed), time.perf_counter()
    with open("commands.txt", "a") as file:
        file.write(shlex.join(line) + "\n")
    with open(f"logs/{name}.txt", "w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *line[1:]], check=True, stdout=log, stderr=log, env=environment)
    seconds = time.perf_counter() - start
    done.write_text(json.dumps({"seconds": seconds, "command": shlex.join(line)}) + "\n")
    text = "" if row == START else json.loads(Path(f"runs/{name}/report.json").read_text())["verdict"]
    sys.stdout.write(f"{name}: {seconds:.0f} s {text}\n")
    sys.stdout.flush()


def collect() -> dict[str, Any]:
    """Reports of all runs that are there."""
    results: dict[str, Any] = {}
    for dataset, (*_, seeds) in SETS.items():
        for row in ROWS:
            runs = []
            for seed in range(seeds):
                name = name_of(dataset, row, seed)
                if Path(f"done/{name}.json").exists():
                    report = json.loads(Path(f"runs/{name}/report.json").read_text())
                    told = json.loads(Path(f"runs/{name}/settings.json").read_text())
                    done = json.loads(Path(f"done/{name}.json").read_text())
                    settings = {"config_files": told["config_files"], "options": told["options"]}
                    runs.append({"seed": seed, **done, "settings": settings, **report})
            if runs:
                results.setdefault(dataset, {})[row] = runs
    return {
        "study": "lookahead",
        "command": "python benchmarks/studies/lookahead.py",
        "date": time.strftime("%Y-%m-%d"),
        "processor": platform.machine(),
        "results": results,
    }


def main() -> None:
    """Run the study, or collect what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--sets", nargs="*", choices=SETS, default=[*SETS])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--collect", action="store_true", help="train nothing")
    parser.add_argument("--output", type=Path, default=Path("lookahead.json"))
    args = parser.parse_args()
    for folder in ("lists", "logs", "done"):
        Path(folder).mkdir(exist_ok=True)
    if not args.collect:
        write_data(args.data, Path("lists"))
        for seed in range(max(seeds for *_, seeds in SETS.values())):
            sets = [dataset for dataset in args.sets if seed < SETS[dataset][4]]
            with ThreadPoolExecutor(args.jobs) as pool:
                list(
                    pool.map(lambda one, at=seed: run_one(one, START, at), [one for one in sets if one not in SHIPPED])
                )
                rows = [(dataset, row) for dataset in sets for row in ONLY.get(dataset, ROWS)]
                list(pool.map(lambda one, at=seed: run_one(*one, at), rows))
    args.output.write_text(json.dumps(collect(), indent=1) + "\n")
    sys.stdout.write(f"written to {args.output}\n")


if __name__ == "__main__":
    main()
