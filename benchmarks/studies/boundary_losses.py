"""The boundary loss against other losses: lesions, tumours, its weight alpha, and several classes; trains and scores.

Run it in a folder of its own with a link `data` to a folder that has `ms_lesions.json`, `brain_tumour.json` and
`acdc.json`. Every training, inference and scoring is a command line of its own, written to `commands.txt`. Runs whose
scores are there already are left out, so a study that was stopped goes on; `--jobs` of them run at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel

BUNDLE = "bundles/boundary_loss"
LOSSES = {
    "GDL": "--schedule none",
    "GDL + boundary, 2D map": "--slice_axis 2",
    "GDL + boundary, 3D map": "",
    "GDL + boundary, 3D map up to 5 mm": "--clip_mm 5",
    "GDL + Hausdorff": "--slice_axis 2 --distance hausdorff",
    "GDL + 0.1 Hausdorff": "--slice_axis 2 --distance hausdorff --schedule constant --alpha 0.1",
    "Focal": "--regional focal --schedule none",
    "Focal + boundary, 3D map": "--regional focal",
    "Distance-weighted cross-entropy": "--regional distance_weighted --slice_axis 2 --schedule none",
}
ALPHAS = {
    "GDL alone": "--schedule none",
    "constant 0.01": "--schedule constant --alpha 0.01",
    "constant 0.1": "--schedule constant --alpha 0.1",
    "constant 1": "--schedule constant --alpha 1",
    "constant 2": "--schedule constant --alpha 2",
    "increase": "--schedule increase",
    "rebalance": "",
}
CLASSES = {
    "Cross-entropy": "--regional cross_entropy --schedule none",
    "GDL": "--schedule none",
    "GDL + boundary": "",
    "Boundary alone, foreground classes": "--schedule alone",
    "Boundary alone, all classes": "--schedule alone --boundary_background True",
}
TUMOUR = "--class_map [0,0,0,0,1] --patch_size [144,208]"
HALVES = "--patch_size [96,176]"
HEART = (
    "--slice_axis 2 --in_channels 1 --num_classes 4 --class_map [0,1,2,3] --patch_size [96,96] "
    "--spacing_mm [2,2,-1] --nonzero False"
)
LESION, ENHANCING = {"lesion": [1]}, {"enhancing": [4]}
ORGANS = {"right ventricle": [1], "myocardium": [2], "left ventricle": [3]}
# study: data sets, rows, seeds; data set: epochs, options of training, options of inference, structures
STUDIES: dict[str, tuple[list[str], dict[str, str], int]] = {
    "lesions": (["ms_07", "ms_19", "tumour", "halves"], LOSSES, 3),
    "alpha": (["tumour"], ALPHAS, 3),
    "classes": (["heart"], CLASSES, 1),
}
SETS: dict[str, tuple[int, str, str, dict[str, list[int]]]] = {
    "ms_07": (50, "", "", LESION),
    "ms_19": (50, "", "", LESION),
    "halves": (30, HALVES, HALVES, LESION),
    "tumour": (16, TUMOUR, "--class_values [0,4] --patch_size [144,208]", ENHANCING),
    "heart": (
        20,
        HEART,
        "--in_channels 1 --num_classes 4 --class_values [0,1,2,3] --patch_size [96,96] --spacing_mm [2,2,-1] "
        "--nonzero False",
        ORGANS,
    ),
}


def write_datalists(data: Path, folder: Path) -> None:
    """Lists of each data set: the two lesion patients both ways, three tumours against one, and the hearts.

    "halves" divides both lesion patients at the middle of the head: a network learns on the right side of one and the
    left side of the other, and is tested on the sides it has not seen.
    """

    def moved(entry: dict[str, Any]) -> dict[str, Any]:
        image = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
        paths = [os.path.relpath(data / path, folder) for path in [*image, entry["label"]]]
        return {"image": paths[:-1] if len(paths) > 2 else paths[0], "label": paths[-1]}

    first, second = [moved(entry) for entry in _read(data / "ms_lesions.json")["training"]]
    tumours, hearts = _read(data / "brain_tumour.json"), _read(data / "acdc.json")
    lists = {
        "ms_07": {"training": [first], "validation": [], "test": [second]},
        "ms_19": {"training": [second], "validation": [], "test": [first]},
        "tumour": {"training": tumours["training"], "validation": [], "test": tumours["validation"]},
        "heart": {section: hearts[section] for section in ("training", "validation", "test")},
    }
    folder.mkdir(parents=True, exist_ok=True)
    patients = _read(data / "ms_lesions.json")["training"]
    sides = {"right": slice(None, 91), "left": slice(91, None)}  # the first axis runs from right to left
    right, left = ([half(data, entry, folder, *side) for entry in patients] for side in sides.items())
    lists["halves"] = {"training": [right[0], left[1]], "validation": [], "test": [left[0], right[1]]}
    for name, content in lists.items():
        if name in ("tumour", "heart"):
            content = {section: [moved(entry) for entry in entries] for section, entries in content.items()}
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def half(data: Path, entry: dict[str, Any], folder: Path, side: str, where: slice) -> dict[str, Any]:
    """One side of a patient's volumes as files of their own."""
    found: dict[str, Any] = {}
    for key, paths in (("image", entry["image"]), ("label", [entry["label"]])):
        names = [f"{side}_{Path(path).parent.name}_{Path(path).name}" for path in paths]
        for path, name in zip(paths, names, strict=True):
            if not (folder / name).exists():
                nibabel.load(data / path).slicer[where].to_filename(folder / name)
        found[key] = names if key == "image" else names[0]
    return found


def commands(dataset: str, options: str, seed: int, name: str) -> list[list[str]]:
    """Training, inference and scoring of one run."""
    epochs, training, inference, structures = SETS[dataset]
    configs = f"{BUNDLE}/configs"
    run = ["python", "-m", "monai.bundle", "run", "--bundle_root", BUNDLE, "--config_file"]
    overlays = ",".join(f"'{configs}/{name}.json'" for name in ("train", "slices", "comparators"))
    train = [*run, f"[{overlays}]", "--datalist", f"lists/{dataset}.json"]
    train += ["--output_dir", f"runs/{name}", "--seed", str(seed), "--epochs", str(epochs)]
    train += shlex.split(training) + shlex.split(options)
    predict = [*run, f"['{configs}/inference.json','{configs}/inference_slices.json']"]
    predict += ["--dataset_dir", f"lists/{dataset}.json", "--ckpt_path", f"runs/{name}/model.pt"]
    predict += ["--output_dir", f"masks/{name}", "--overwrite", "True", *shlex.split(inference)]
    score = ["python", "-m", "medconstraints", "evaluation", "--datalist", f"lists/{dataset}.json"]
    score += ["--section", "test", "--predictions", f"masks/{name}", "--structures", json.dumps(structures)]
    return [train, predict, [*score, "--output", f"scores/{name}.json", "--overwrite"]]


def run_one(dataset: str, options: str, seed: int, name: str) -> None:
    """One run, unless its scores are there."""
    if Path(f"scores/{name}.json").exists():
        return
    shutil.rmtree(f"runs/{name}", ignore_errors=True)  # of a study that was stopped
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    seconds = []
    for command in commands(dataset, options, seed, name):
        with open("commands.txt", "a") as file:
            file.write(shlex.join(command) + "\n")
        start = time.perf_counter()
        with open(f"logs/{name}.txt", "a") as log:
            subprocess.run([sys.executable, *command[1:]], check=True, stdout=log, stderr=log, env=environment)
        seconds.append(time.perf_counter() - start)
    Path(f"seconds/{name}.txt").write_text(f"{seconds[0]:.1f}\n")
    sys.stdout.write(f"{name}: {seconds[0]:.0f} s\n")


def collect(study: str) -> dict[str, Any]:
    """Scores of all runs that are there: each seed's, and their mean and standard deviation."""
    sets, rows, seeds = STUDIES[study]
    found: dict[str, Any] = {}
    for dataset in sets:
        structures = list(SETS[dataset][3])
        for row in rows:
            runs = [(seed, Path(f"scores/{_name(dataset, row, seed)}.json")) for seed in range(seeds)]
            files = {seed: _read(path) for seed, path in runs if path.exists()}
            if not files:
                continue
            scores = {seed: file["summary"] for seed, file in files.items()}
            dice = [[score[name]["dice_mean"] for name in structures] for score in scores.values()]
            hd95 = [[score[name]["hd95_mm_mean"] for name in structures] for score in scores.values()]
            minutes = [
                float(path.read_text()) / 60
                for seed in scores
                if (path := Path(f"seconds/{_name(dataset, row, seed)}.txt")).exists()
            ]
            found.setdefault(dataset, {})[row] = {
                "seeds": sorted(scores),
                "structures": structures,
                "dice": dice,
                "hd95_mm": hd95,
                "dice_mean": _mean([value for values in dice for value in values]),
                "dice_sd": _sd([_mean(values) for values in dice]),
                "hd95_mm_mean": _mean([value for values in hd95 for value in values]),
                "hd95_mm_sd": _sd([_mean(values) for values in hd95]),
                # An empty prediction has no HD95: a mean over the others flatters, so that their number stands by.
                "hd95_undefined": sum(
                    score[name]["hd95_undefined"] for score in scores.values() for name in structures
                ),
                "hd95_cases": sum(score[name]["n"] for score in scores.values() for name in structures),
                "minutes": _mean(minutes),
                "settings": next(iter(files.values())).get("settings"),  # of the first seed
            }
    return {
        "study": study,
        "command": f"python benchmarks/studies/boundary_losses.py {study}",
        "date": time.strftime("%Y-%m-%d"),
        "epochs": {dataset: SETS[dataset][0] for dataset in sets},
        "processor": platform.machine(),
        "options": {row: shlex.split(options) for row, options in rows.items()},
        "options_of_data": {dataset: shlex.split(SETS[dataset][1]) for dataset in sets},
        "results": found,
    }


def _name(dataset: str, row: str, seed: int) -> str:
    # Two studies share the runs that they have in common.
    options = STUDIES["lesions"][1].get(row) if row in LOSSES else ALPHAS.get(row, CLASSES.get(row))
    words = "".join(letter if letter.isalnum() else "_" for letter in (options or "default").replace("--", ""))
    return f"{dataset}_{words}_seed{seed}"


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.fmean(known) if known else None


def _sd(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) > 1 else None


def main() -> None:
    """Run a study, or collect what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, help="fewer seeds than the study has")
    parser.add_argument("--collect", action="store_true", help="train nothing")
    parser.add_argument("--output", type=Path, help="default: boundary_loss_<study>.json")
    args = parser.parse_args()
    sets, rows, seeds = STUDIES[args.study]
    write_datalists(args.data, Path("lists"))
    for folder in ("logs", "scores", "seconds"):
        Path(folder).mkdir(exist_ok=True)
    if not args.collect:
        planned = [
            (dataset, options, seed, _name(dataset, row, seed))
            for seed in range(args.seeds or seeds)
            for dataset in sets
            for row, options in rows.items()
        ]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda one: run_one(*one), planned))
    output = args.output or Path(f"boundary_loss_{args.study}.json")
    output.write_text(json.dumps(collect(args.study), indent=1) + "\n")
    sys.stdout.write(f"written to {output}\n")


if __name__ == "__main__":
    main()
