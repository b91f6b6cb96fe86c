"""End-to-end augmentation against its baselines: skin lesions, breast, retina, hippocampus; trains and scores.

Run it in a folder of its own with links `data` (with `skin_lesion.json` and the other lists) and `bundles`. Every
training is a command line of its own, written to `commands.txt`; runs whose scores are there already are left out, so a
study that was stopped goes on. All rows of a set have the same images, iterations and network, and keep the epoch that
is best on the validation images, which are the guide images too; but the row "all images", which trains on them as well
and keeps its last epoch. GANs begin with the same pre-trained weights. Test: all images of the set that are not used.
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
import torch
from monai.bundle import ConfigParser
from PIL import Image

BUNDLE = "bundles/e2e_augmentation"
IMAGES = ["train", "images"]
# row: overlays, options; those without "baselines" train with generated images too
PLAIN: dict[str, tuple[list[str], str]] = {
    kind: (["baselines"], f"--augmentation {kind}") for kind in ("none", "rotate", "flip", "translate", "combined")
}
ALL = {"combined, all images": PLAIN["combined"]}
GENERATED = {f"levels {levels}": ([], f"--levels {levels}") for levels in (0, 2, 3)}
GENERATED_COMBINED = {
    f"combined, levels {levels}": ([], f"--levels {levels} --augmentation combined") for levels in (0, 3)
}
FEW: dict[str, tuple[list[str], str]] = {
    **{name: PLAIN[name] for name in ("none", "combined")},
    **{name: GENERATED[name] for name in ("levels 0", "levels 3")},
}
OTHER_NETWORK = {
    f"SegResNet, {name}": ([*FEW[name][0], "segresnet"], FEW[name][1]) for name in ("combined", "levels 0", "levels 3")
}
ROWS: dict[str, dict[str, tuple[list[str], str]]] = {
    "skin_40": {**PLAIN, **ALL, **GENERATED, **GENERATED_COMBINED, **OTHER_NETWORK},
    "skin_20": FEW,
    "skin_120": FEW,
    "skin_nevi": FEW,
    "breast": FEW,
    "retina": FEW,
    "hippocampus_slices": FEW,
    "hippocampus": {name: FEW[name] for name in ("combined", "levels 3")},
}
# set: (training images, validation images), seeds, iterations, base configs, options
SETS: dict[str, tuple[tuple[int, int], int, int, list[str], str]] = {
    "skin_40": ((32, 8), 3, 600, IMAGES, ""),
    "skin_20": ((16, 4), 1, 600, IMAGES, ""),
    "skin_120": ((96, 24), 1, 600, IMAGES, ""),
    "skin_nevi": ((32, 8), 1, 600, IMAGES, ""),
    "breast": ((16, 4), 1, 600, IMAGES, "--network_def#in_channels 1"),
    "retina": ((8, 4), 1, 600, IMAGES, ""),
    "hippocampus_slices": ((32, 8), 1, 600, IMAGES, "--network_def#in_channels 1 --num_classes 3"),
    "hippocampus": ((8, 2), 1, 240, ["train"], ""),
}
OTHER_SEEDS = ("skin_40", "SegResNet")  # rows of one seed in a set of three
PRETRAINING, BATCH, CHECKS = 1000, 4, 15


def write_data(data: Path, folder: Path) -> None:
    """PNG files of 64 x 64 (retina 128 x 128) with class numbers as masks, and a datalist for each set."""
    lists = {name: json.loads((data / f"{name}.json").read_text()) for name in ("skin_lesion", "breast_ultrasound")}
    lists["retina_vessels"] = json.loads((data / "retina_vessels.json").read_text())
    lists["hippocampus"] = json.loads((data / "hippocampus.json").read_text())
    skin = _images(data, folder, lists["skin_lesion"], 64, "RGB")
    random = np.random.default_rng(0)
    mixed = [skin[number] for number in random.permutation(len(skin))]
    nevi = [item for item in mixed if item["class"] == 0]
    others = [item for item in mixed if item["class"] != 0]
    for name, items in (("skin_20", mixed), ("skin_40", mixed), ("skin_120", mixed)):
        _write_list(folder, name, items)
    (first, second), *_ = SETS["skin_nevi"]
    _write_list(folder, "skin_nevi", [*nevi[: first + second], *others])
    for name, source, size, mode in (
        ("breast", "breast_ultrasound", 64, "L"),
        ("retina", "retina_vessels", 128, "RGB"),
    ):
        items = _images(data, folder, lists[source], size, mode)
        _write_list(folder, name, [items[number] for number in random.permutation(len(items))])
    volumes = [*lists["hippocampus"]["training"][:10], *lists["hippocampus"]["test"]]
    _write_list(folder, "hippocampus_slices", _slices(data, folder, volumes))
    for entry in volumes:
        for key in ("image", "label"):
            entry[key] = os.path.relpath(data / entry[key], folder)
    _write_list(folder, "hippocampus", volumes)


def _images(data: Path, folder: Path, content: dict[str, Any], size: int, mode: str) -> list[dict[str, Any]]:
    entries = [entry for section in ("training", "validation", "test") for entry in content[section]]
    items = []
    for entry in sorted(entries, key=lambda entry: str(entry["image"])):
        stem = f"{Path(entry['image']).stem}_{size}"
        image = Image.open(data / entry["image"]).convert(mode).resize((size, size), Image.Resampling.BILINEAR)
        # Thin vessels survive the mean of a box, not the nearest pixel.
        share = Image.open(data / entry["label"]).convert("L").resize((size, size), Image.Resampling.BOX)
        kind = {"class": entry["class"]} if "class" in entry else {}
        items.append({**_save(folder, stem, image, np.asarray(share) > 127), **kind})
    return items


def _slices(data: Path, folder: Path, volumes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Four slices with foreground of each volume, across the longest axis of the hippocampus; 64 x 64 with margins."""
    items = []
    for entry in volumes:
        image, label = (np.asanyarray(nib.load(data / entry[key]).dataobj) for key in ("image", "label"))
        low, high = np.percentile(image, [0.5, 99.5])
        bytes_ = (np.clip((image - low) / (high - low), 0, 1) * 255).astype(np.uint8)
        present = np.flatnonzero((label > 0).any((0, 1)))
        for number in np.unique(np.quantile(present, [0.2, 0.4, 0.6, 0.8]).round().astype(int)):
            grey, mask = (np.zeros((64, 64), np.uint8) for _ in range(2))
            rows, columns = (min(64, size) for size in label.shape[:2])
            grey[:rows, :columns] = bytes_[:rows, :columns, number]
            mask[:rows, :columns] = label[:rows, :columns, number]
            stem = f"{Path(entry['image']).name.split('.')[0]}_{number}"
            items.append(_save(folder, stem, Image.fromarray(grey), mask))
    return items


def _save(folder: Path, stem: str, image: Image.Image, mask: np.ndarray) -> dict[str, Any]:
    files = {"image": f"png/{stem}.png", "label": f"png/{stem}_mask.png"}
    (folder / "png").mkdir(exist_ok=True)
    image.save(folder / files["image"])
    Image.fromarray(mask.astype(np.uint8)).save(folder / files["label"])
    return files


def _write_list(folder: Path, name: str, items: list[dict[str, Any]]) -> None:
    (training, validation), *_ = SETS[name]
    used = training + validation
    sections = {"training": items[:training], "validation": items[training:used], "test": items[used:]}
    (folder / f"{name}.json").write_text(json.dumps(sections, indent=1) + "\n")
    (folder / f"{name}_all.json").write_text(json.dumps({**sections, "training": items[:used]}, indent=1) + "\n")


def write_overlay(folder: Path) -> None:
    """The second network."""
    network = {
        "_target_": "SegResNet",
        "spatial_dims": 2,
        "in_channels": 3,
        "out_channels": "@num_classes",
        "init_filters": 8,
        "act": "swish",
    }
    (folder / "segresnet.json").write_text(json.dumps({"network_def": network}, indent=1) + "\n")


def files_of(dataset: str, overlays: list[str]) -> list[str]:
    """Config files of a run."""
    names = [*SETS[dataset][3], *overlays]
    return [f"lists/{name}.json" if name == "segresnet" else f"{BUNDLE}/configs/{name}.json" for name in names]


def command(dataset: str, row: str, seed: int) -> list[str]:
    """Command line of a training; the row "pretrain" is the GAN that all others of the seed begin with."""
    (training, validation), _, iterations, _, options = SETS[dataset]
    everything = row.endswith("all images")
    if row == "pretrain":
        overlays, more, iterations = ["pretrain"], "", PRETRAINING if dataset != "hippocampus" else 240
    else:
        overlays, more = ROWS[dataset][row]
        if "baselines" not in overlays:
            more += f" --gan_checkpoint runs/{name_of(dataset, 'pretrain', seed)}/model.pt"
    batch = 2 if dataset == "hippocampus" else BATCH
    epochs = max(1, iterations // ((training + validation * everything) // batch))
    interval = epochs if everything or row == "pretrain" else max(1, epochs // CHECKS)
    files = ",".join(f"'{name}'" for name in files_of(dataset, overlays))
    run = ["python", "-m", "monai.bundle", "run", "--bundle_root", BUNDLE, "--config_file", f"[{files}]"]
    run += ["--datalist", f"lists/{dataset}{'_all' if everything else ''}.json"]
    run += ["--output_dir", f"runs/{name_of(dataset, row, seed)}", "--batch_size", str(batch)]
    run += ["--epochs", str(epochs), "--val_interval", str(interval), "--seed", str(seed)]
    return [*run, *shlex.split(options), *shlex.split(more)]


def name_of(dataset: str, row: str, seed: int) -> str:
    """Folder of a run."""
    return f"{dataset}_{''.join(letter if letter.isalnum() else '_' for letter in row)}_seed{seed}"


def run_one(dataset: str, row: str, seed: int) -> None:
    """One training and its scores, unless they are there."""
    name = name_of(dataset, row, seed)
    scores = Path(f"scores/{name}.json")
    if scores.exists():
        return
    shutil.rmtree(f"runs/{name}", ignore_errors=True)
    line, start = command(dataset, row, seed), time.perf_counter()
    with open("commands.txt", "a") as file:
        file.write(shlex.join(line) + "\n")
    with open(f"logs/{name}.txt", "w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *line[1:]], check=True, stdout=log, stderr=log, env=environment)
    seconds = time.perf_counter() - start
    found = {} if row == "pretrain" else {"jaccard": score(dataset, row, name)}
    scores.write_text(json.dumps({"seconds": seconds, "command": shlex.join(line), **found}) + "\n")
    mean = np.mean(found["jaccard"]) if found else float("nan")
    sys.stdout.write(f"{name}: {seconds:.0f} s, {mean:.4f}\n")
    sys.stdout.flush()


def score(dataset: str, row: str, name: str) -> list[float]:
    """Jaccard index of each test case, the mean over its classes but the background."""
    parser = ConfigParser()
    parser.read_config(files_of(dataset, [part for part in ROWS[dataset][row][0] if part == "segresnet"]))
    words = shlex.split(SETS[dataset][4])
    for key, value in zip(words[::2], words[1::2], strict=True):
        parser[key.removeprefix("--").replace("#", "::")] = int(value)
    parser["bundle_root"], parser["datalist"] = BUNDLE, f"lists/{dataset}.json"
    parser["validate"]["dataset"]["section"], parser["device"] = "test", torch.device("cpu")
    network = parser.get_parsed_content("network")
    network.load_state_dict(torch.load(f"runs/{name}/model.pt", weights_only=True))
    network.eval()
    inferer = parser.get_parsed_content("validate#inferer")
    classes, found = parser.get_parsed_content("num_classes"), []
    with torch.no_grad():
        for item in parser.get_parsed_content("validate#dataset"):
            guess, truth = inferer(item["image"][None], network)[0].argmax(0), item["label"][0]
            both = [(guess == number, truth == number) for number in range(1, classes)]
            pairs = [(one, two) for one, two in both if bool((one | two).any())]
            found.append(float(np.mean([float((one & two).sum() / (one | two).sum()) for one, two in pairs])))
    return found


def seeds_of(dataset: str, row: str) -> int:
    """Number of seeds of a row."""
    return 1 if dataset == OTHER_SEEDS[0] and row.startswith(OTHER_SEEDS[1]) else SETS[dataset][1]


def collect() -> dict[str, Any]:
    """Scores of all runs that are there; differences to the best baseline with intervals of a paired bootstrap."""
    results: dict[str, Any] = {}
    for dataset, rows in ROWS.items():
        for row in rows:
            found = read(dataset, row)
            if not found:
                continue
            means = [float(np.mean(one["jaccard"])) for one in found.values()]
            table = Path(f"runs/{name_of(dataset, row, min(found))}/generator.csv")
            results.setdefault(dataset, {})[row] = {
                "seeds": sorted(found),
                "test_cases": len(found[min(found)]["jaccard"]),
                "jaccard": np.mean(means),
                "sd": np.std(means, ddof=1) if len(means) > 1 else None,
                "of_seeds": means,
                "seconds": np.mean([one["seconds"] for one in found.values()]),
                "generator": last_row(table) if table.exists() else None,
                "command": found[min(found)]["command"],
                "settings": settings_of(dataset, row, min(found)),
            }
        for row, entry in results.get(dataset, {}).items():
            pairs = [(row, other) for other in rivals(row, results[dataset])]
            entry["against"] = {other: difference(dataset, row, other) for row, other in pairs}
    return {
        "study": "end_to_end",
        "command": "python benchmarks/studies/end_to_end.py",
        "date": time.strftime("%Y-%m-%d"),
        "processor": platform.machine(),
        "iterations": {name: iterations for name, (_, _, iterations, _, _) in SETS.items()},
        "images": {name: images for name, (images, *_) in SETS.items()},
        "results": results,
    }


def rivals(row: str, rows: dict[str, Any]) -> list[str]:
    """What a row is compared with: the best augmentation that does not generate, and fewer levels."""
    prefix = "SegResNet, " if row.startswith("SegResNet") else ""
    if "levels" not in row:
        return []
    fixed = [name for name in rows if "levels" not in name and name.startswith("SegResNet") == bool(prefix)]
    fixed = [name for name in fixed if name != "combined, all images"]
    found = [max(fixed, key=lambda name: rows[name]["jaccard"])] if fixed else []
    stem, level = row.rsplit(" ", 1)
    return [*found, *(f"{stem} {other}" for other in (0, 2) if other < int(level) and f"{stem} {other}" in rows)]


def read(dataset: str, row: str) -> dict[int, dict[str, Any]]:
    """Scores of a row by seed."""
    files = {seed: Path(f"scores/{name_of(dataset, row, seed)}.json") for seed in range(seeds_of(dataset, row))}
    return {seed: json.loads(file.read_text()) for seed, file in files.items() if file.exists()}


def last_row(table: Path) -> dict[str, float]:
    """Last epoch of a generator's table."""
    header, *_, last = table.read_text().splitlines()
    return {name: float(value) for name, value in zip(header.split(","), last.split(","), strict=True) if value}


def settings_of(dataset: str, row: str, seed: int) -> dict[str, Any]:
    """What the run was told, from the file that it wrote; it must be what the row claims.

    Raises:
        ValueError: it is not.
    """
    told = json.loads(Path(f"runs/{name_of(dataset, row, seed)}/settings.json").read_text())
    words = shlex.split(ROWS[dataset][row][1])
    for name, value in zip(words[::2], words[1::2], strict=True):
        found = told["settings"].get(name.removeprefix("--"))
        if str(found) != value:
            raise ValueError(f"the row {row!r} claims {name} {value}, its run had {found!r}")
    return {"config_files": told["config_files"], "options": told["options"]}


def difference(dataset: str, row: str, other: str, draws: int = 2000) -> dict[str, Any]:
    """Row minus other, mean over the seeds that both have, and its 95 % interval over draws of the test cases."""
    one, two = read(dataset, row), read(dataset, other)
    seeds = sorted(set(one) & set(two))
    gaps = np.mean([np.subtract(one[seed]["jaccard"], two[seed]["jaccard"]) for seed in seeds], 0)
    random = np.random.default_rng(0)
    means = [gaps[random.integers(len(gaps), size=len(gaps))].mean() for _ in range(draws)]
    return {"seeds": seeds, "mean": float(gaps.mean()), "interval": np.percentile(means, [2.5, 97.5]).tolist()}


def main() -> None:
    """Run the study, or collect what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--sets", nargs="*", choices=SETS, default=[*SETS])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--collect", action="store_true", help="train nothing")
    parser.add_argument("--output", type=Path, default=Path("end_to_end.json"))
    args = parser.parse_args()
    for folder in ("lists", "logs", "scores"):
        Path(folder).mkdir(exist_ok=True)
    if not args.collect:
        write_data(args.data, Path("lists"))
        write_overlay(Path("lists"))
        for seed in range(max(seeds for _, seeds, *_ in SETS.values())):
            sets = [dataset for dataset in args.sets if seed < SETS[dataset][1]]
            planned = [(dataset, row) for dataset in sets for row in ROWS[dataset] if seed < seeds_of(dataset, row)]
            with ThreadPoolExecutor(args.jobs) as pool:
                list(pool.map(lambda dataset, at=seed: run_one(dataset, "pretrain", at), sets))
                list(pool.map(lambda one, at=seed: run_one(*one, at), planned))
    args.output.write_text(json.dumps(collect(), indent=1) + "\n")
    sys.stdout.write(f"written to {args.output}\n")


if __name__ == "__main__":
    main()
