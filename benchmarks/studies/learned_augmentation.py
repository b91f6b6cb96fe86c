"""Augmentation that learns against augmentation that does not: chest X-rays and hippocampi; trains and scores.

Run it in a folder of its own with a link `data` to a folder that has `medmnist.json` and `hippocampus.json`. Every
training is a command line of its own, written to `commands.txt`. Runs whose scores are there already are left out, so a
study that was stopped goes on. Baselines train on all images, those that guide included; "control" rows train on the
very batches of the SAFLEX row, without its weights and labels. No epoch is chosen: the last one counts.
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

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.metrics import compute_roc_auc

BILEVEL, SAFLEX = "bilevel_augmentation", "saflex"
MEAN, STD = 147.0, 42.0  # of the training images, as in classification.json
SHIFT = (0.4, 1.0)  # contrast and brightness of the shifted images, in standard deviations
# row: bundle, overlays, options
NONE = (BILEVEL, ["baselines"], "--baseline none")
RANDAUGMENT = (SAFLEX, [], "--rules none")
ROWS: dict[str, dict[str, tuple[str, list[str], str]]] = {
    "few": {
        "none": NONE,
        "TrivialAugment": (BILEVEL, ["baselines"], "--baseline trivial"),
        "RandAugment, control": RANDAUGMENT,
        "RandAugment, magnitude 2, control": (SAFLEX, [], "--rules none --magnitude 2"),
        "RandAugment, magnitude 8, control": (SAFLEX, [], "--rules none --magnitude 8"),
        "RandAugment, SAFLEX": (SAFLEX, [], ""),
        "RandAugment, SAFLEX as published": (SAFLEX, [], "--rules paper"),
        "mixup, control": (SAFLEX, [], "--rules none --upstream mixup"),
        "mixup, SAFLEX": (SAFLEX, [], "--upstream mixup"),
        "bilevel, affine": (BILEVEL, [], "--augmenter_def#families \"['affine']\""),
        "bilevel, affine and intensity": (BILEVEL, [], ""),
    },
    "noisy": {
        "none": NONE,
        "RandAugment, control": RANDAUGMENT,
        "RandAugment, SAFLEX": (SAFLEX, [], ""),
        "RandAugment, SAFLEX as published": (SAFLEX, [], "--rules paper"),
    },
    "shifted": {
        "none": NONE,
        "none, without the guide images": (BILEVEL, ["baselines"], "--baseline none"),
        "predefined": (BILEVEL, ["baselines"], "--baseline predefined"),
        "TrivialAugment": (BILEVEL, ["baselines"], "--baseline trivial"),
        "bilevel, intensity": (BILEVEL, ["guide"], "--augmenter_def#families \"['intensity']\""),
    },
    "hippocampus_10": {
        "none": NONE,
        "predefined": (BILEVEL, ["baselines"], "--baseline predefined"),
        "nnU-Net": (BILEVEL, ["baselines"], "--baseline nnunet"),
        "RandAugment, control": RANDAUGMENT,
        "RandAugment, SAFLEX": (SAFLEX, [], ""),
        "bilevel, affine and intensity": (BILEVEL, [], ""),
    },
}
# data set: epochs, seeds
SETS = {"few": (25, 3), "noisy": (25, 3), "shifted": (25, 3), "hippocampus_10": (120, 1)}
GUIDED = "bilevel, intensity"


def write_data(data: Path, folder: Path) -> None:
    """Datalists, and for the X-rays their arrays: 400 images, 30 % of their labels turned, or shifted in contrast."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads((data / "medmnist.json").read_text())
    with np.load(data / content["training"][0]["npz"]) as arrays:
        found = {name: arrays[name] for name in arrays}
    random = np.random.default_rng(0)
    few = random.choice(len(found["train_images"]), 400, replace=False)
    labels = found["train_labels"].reshape(-1)[few]
    wrong = random.random(400) < 0.3
    guide = random.choice(len(found["val_images"]), 100, replace=False)

    def shifted(images: np.ndarray) -> np.ndarray:
        return (MEAN + SHIFT[0] * (images.astype(np.float32) - MEAN) + SHIFT[1] * STD).astype(np.float32)

    np.savez(
        folder / "xray.npz",
        train_images=found["train_images"][few],
        train_labels=labels,
        noisy_labels=np.where(wrong, 1 - labels, labels),
        guide_images=shifted(found["val_images"][guide]),
        guide_labels=found["val_labels"].reshape(-1)[guide],
        test_images=found["test_images"],
        test_labels=found["test_labels"].reshape(-1),
        shifted_images=shifted(found["test_images"]),
    )

    def rows(images: str, labels: str) -> dict[str, str]:
        return {"npz": "xray.npz", "images": images, "labels": labels}

    test, guides = rows("test_images", "test_labels"), rows("guide_images", "guide_labels")
    train, other = rows("train_images", "train_labels"), rows("shifted_images", "test_labels")
    lists = {
        "few": {"training": [train], "validation": [test], "test": [test]},
        "noisy": {"training": [rows("train_images", "noisy_labels")], "validation": [test], "test": [test]},
        "shifted": {"training": [train, guides], "validation": [other], "test": [other]},
        "shifted_alone": {"training": [train], "validation": [other], "guide": [guides], "test": [other]},
    }
    hippocampus = json.loads((data / "hippocampus.json").read_text())
    for entry in [*hippocampus["training"], *hippocampus["test"]]:
        for key in ("image", "label"):
            entry[key] = os.path.relpath(data / entry[key], folder)
    chosen = hippocampus["training"][:10]
    lists["hippocampus_10"] = {"training": chosen, "validation": [], "test": hippocampus["test"]}
    for name, sections in lists.items():
        (folder / f"{name}.json").write_text(json.dumps(sections, indent=1) + "\n")


def command(dataset: str, row: str, seed: int) -> list[str]:
    """Command line of a training."""
    bundle, overlays, options = ROWS[dataset][row]
    alone = dataset == "shifted" and (row == GUIDED or row.endswith("without the guide images"))
    files = ["train", *(["classification"] if not dataset.startswith("hippocampus") else []), *overlays]
    names = ",".join(f"'bundles/{bundle}/configs/{name}.json'" for name in files)
    run = ["python", "-m", "monai.bundle", "run", "--bundle_root", f"bundles/{bundle}", "--config_file", f"[{names}]"]
    epochs = SETS[dataset][0]
    run += [
        "--datalist",
        f"lists/{dataset}{'_alone' if alone else ''}.json",
        "--output_dir",
        f"runs/{name_of(dataset, row, seed)}",
    ]
    return [*run, "--epochs", str(epochs), "--val_interval", str(epochs), "--seed", str(seed), *shlex.split(options)]


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
    found = (
        score_classes(dataset, row, name) if dataset in ("few", "noisy", "shifted") else score_masks(dataset, row, name)
    )
    augmenter = Path(f"runs/{name}/augmenter.json")
    if augmenter.exists():
        found["augmenter"] = {key: value for key, value in json.loads(augmenter.read_text()).items() if key != "draws"}
    scores.write_text(json.dumps({"seconds": seconds, "command": shlex.join(line), **found}) + "\n")
    sys.stdout.write(f"{name}: {seconds:.0f} s\n")
    sys.stdout.flush()


def network_of(row: str, dataset: str, name: str) -> torch.nn.Module:
    """The network of a run, with its last weights."""
    bundle = ROWS[dataset][row][0]
    parser = ConfigParser()
    files = ["train"] + ([] if dataset.startswith("hippocampus") else ["classification"])
    parser.read_config([f"bundles/{bundle}/configs/{file}.json" for file in files])
    network: torch.nn.Module = parser.get_parsed_content("network_def")
    state = torch.load(f"runs/{name}/last.pt", weights_only=True)
    network.load_state_dict(state["objects"]["network"])
    return network.eval()


def score_classes(dataset: str, row: str, name: str) -> dict[str, Any]:
    """Probability of pneumonia of each test image, and the scores of all."""
    with np.load("lists/xray.npz") as arrays:
        images = arrays["shifted_images" if dataset == "shifted" else "test_images"]
        labels = torch.from_numpy(arrays["test_labels"]).long()
    values = torch.from_numpy((images.astype(np.float32) - MEAN) / STD)[:, None]
    with torch.no_grad():
        logits = network_of(row, dataset, name)(values)
    probs = torch.softmax(logits, 1)[:, 1]
    return {"probabilities": [round(float(p), 5) for p in probs], **scores_of(probs.numpy(), labels.numpy())}


def scores_of(probs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """AUC, accuracy and cross-entropy."""
    own = np.clip(np.where(labels == 1, probs, 1 - probs), 1e-6, 1)
    return {
        "auc": float(compute_roc_auc(torch.from_numpy(probs.copy()), torch.from_numpy(labels.copy()))),
        "accuracy": float(np.mean((probs > 0.5) == labels)),
        "cross_entropy": float(-np.log(own).mean()),
    }


def score_masks(dataset: str, row: str, name: str) -> dict[str, Any]:
    """Mean Dice of both parts over the test volumes."""
    bundle = ROWS[dataset][row][0]
    run = ["-m", "monai.bundle", "run", "--bundle_root", f"bundles/{bundle}", "--dataset_dir", f"lists/{dataset}.json"]
    run += ["--config_file", f"bundles/{bundle}/configs/inference.json", "--output_dir", f"masks/{name}"]
    run += ["--ckpt_path", f"runs/{name}/model.pt", "--overwrite", "True"]
    score = ["-m", "medconstraints", "evaluation", "--datalist", f"lists/{dataset}.json", "--section", "test"]
    score += ["--predictions", f"masks/{name}", "--structures", '{"anterior": [1], "posterior": [2]}']
    score += ["--output", f"masks/{name}.json", "--overwrite"]
    with open(f"logs/{name}.txt", "a") as log:
        for line in (run, score):
            subprocess.run([sys.executable, *line], check=True, stdout=log, stderr=log)
    summary = json.loads(Path(f"masks/{name}.json").read_text())
    dice = [[case[part]["dice"] for part in ("anterior", "posterior")] for case in summary["cases"]]
    return {"dice_of_cases": dice, "dice": float(np.mean(dice))}


def collect() -> dict[str, Any]:
    """Scores of all runs that are there; differences to a reference row with intervals of a paired bootstrap."""
    results: dict[str, Any] = {}
    with np.load("lists/xray.npz") as arrays:
        labels = arrays["test_labels"]
    for dataset, rows in ROWS.items():
        for row in rows:
            files = [Path(f"scores/{name_of(dataset, row, seed)}.json") for seed in range(SETS[dataset][1])]
            found = {seed: json.loads(file.read_text()) for seed, file in enumerate(files) if file.exists()}
            if not found:
                continue
            keys = ("auc", "accuracy", "cross_entropy") if "auc" in found[min(found)] else ("dice",)
            entry: dict[str, Any] = {
                "seeds": sorted(found),
                "seconds": np.mean([one["seconds"] for one in found.values()]),
            }
            for key in keys:
                values = [one[key] for one in found.values()]
                entry[key] = {
                    "mean": np.mean(values),
                    "sd": np.std(values, ddof=1) if len(values) > 1 else None,
                    "of_seeds": values,
                }
            entry["augmenter"] = [one["augmenter"] for one in found.values() if "augmenter" in one] or None
            entry["command"] = found[min(found)]["command"]
            entry["settings"] = settings_of(dataset, row, min(found))
            results.setdefault(dataset, {})[row] = entry
            reference = "RandAugment, control" if "SAFLEX" in row and "mixup" not in row else "none"
            reference = "mixup, control" if row == "mixup, SAFLEX" else reference
            if row != reference:
                entry["against"] = {"row": reference, **difference(dataset, row, reference, labels)}
    return {
        "study": "learned_augmentation",
        "command": "python benchmarks/studies/learned_augmentation.py",
        "date": time.strftime("%Y-%m-%d"),
        "processor": platform.machine(),
        "epochs": {name: epochs for name, (epochs, _) in SETS.items()},
        "results": results,
    }


def settings_of(dataset: str, row: str, seed: int) -> dict[str, Any]:
    """What the run was told, from the file that it wrote; it must be what the row claims.

    Raises:
        ValueError: it is not.
    """
    told = json.loads(Path(f"runs/{name_of(dataset, row, seed)}/settings.json").read_text())
    words = shlex.split(ROWS[dataset][row][2])
    for name, value in zip(words[::2], words[1::2], strict=True):
        found = told["options"].get(name.removeprefix("--").replace("#", "::"), told["options"].get(name[2:]))
        if str(found) != value:
            raise ValueError(f"the row {row!r} claims {name} {value}, its run had {found!r}")
    return {"config_files": told["config_files"], "options": told["options"]}


def difference(dataset: str, row: str, reference: str, labels: np.ndarray, draws: int = 1000) -> dict[str, Any]:
    """Row minus reference, mean over the seeds that both have, and its 95 % interval over draws of the test cases."""
    pairs = []
    for seed in range(SETS[dataset][1]):
        files = [Path(f"scores/{name_of(dataset, one, seed)}.json") for one in (row, reference)]
        if all(file.exists() for file in files):
            pairs.append([json.loads(file.read_text()) for file in files])
    if not pairs:
        return {}
    random, found = np.random.default_rng(0), {}
    if "dice" in pairs[0][0]:
        gaps = np.mean([np.mean(one["dice_of_cases"], 1) - np.mean(two["dice_of_cases"], 1) for one, two in pairs], 0)
        means = [gaps[random.integers(len(gaps), size=len(gaps))].mean() for _ in range(draws)]
        return {"dice": {"mean": gaps.mean(), "interval": np.percentile(means, [2.5, 97.5]).tolist()}}
    probs = np.array([[one["probabilities"] for one in pair] for pair in pairs])
    samples: dict[str, list[float]] = {}
    for draw in range(draws + 1):
        chosen = np.arange(len(labels)) if draw == 0 else random.integers(len(labels), size=len(labels))
        scores = [[scores_of(one[chosen], labels[chosen]) for one in pair] for pair in probs]
        for key in scores[0][0]:
            samples.setdefault(key, []).append(float(np.mean([one[key] - two[key] for one, two in scores])))
    for key, values in samples.items():
        found[key] = {"mean": values[0], "interval": np.percentile(values[1:], [2.5, 97.5]).tolist()}
    return found


def main() -> None:
    """Run the study, or collect what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--sets", nargs="*", choices=SETS, default=[*SETS])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--collect", action="store_true", help="train nothing")
    parser.add_argument("--output", type=Path, default=Path("learned_augmentation.json"))
    args = parser.parse_args()
    write_data(args.data, Path("lists"))
    for folder in ("logs", "scores", "masks"):
        Path(folder).mkdir(exist_ok=True)
    if not args.collect:
        planned = [
            (dataset, row, seed)
            for seed in range(max(seeds for _, seeds in SETS.values()))
            for dataset in args.sets
            for row in ROWS[dataset]
            if seed < SETS[dataset][1]
        ]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda one: run_one(*one), planned))
    args.output.write_text(json.dumps(collect(), indent=1) + "\n")
    sys.stdout.write(f"written to {args.output}\n")


if __name__ == "__main__":
    main()
