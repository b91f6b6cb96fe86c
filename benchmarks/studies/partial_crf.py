"""Partial labels of the left ventricle, with and without `DenseCRFLoss`, alone and beside size constraints.

Run it in a folder of its own with links `data` (with `acdc.json`) and `bundles`; runs that are there are left out, so a
study that was stopped goes on. One volume of each patient, the end of diastole.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from command_runs import bundle_run, call, finished, train
from curriculum import volume_scores, write_list

BUNDLE = "bundles/size_constraint"
EPOCHS, SEEDS = 10, (0,)
SHARED = f"--datalist lists/acdc.json --epochs {EPOCHS} --val_interval 1"
ROWS = {
    "partial labels": (["train", "acdc"], "--level none"),
    "partial labels, DenseCRFLoss": (["train", "acdc", "crf"], "--level none"),
    "partial labels, sizes": (["train", "acdc"], "--level individual"),
    "partial labels, sizes, DenseCRFLoss": (["train", "acdc", "crf"], "--level individual"),
}


def main() -> None:
    """Run the study, or collect what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--output", type=Path, default=Path("partial_crf.json"))
    args = parser.parse_args()
    Path("lists").mkdir(exist_ok=True)
    write_list(args.data, Path("lists"))
    runs = []
    for seed in SEEDS:
        for row, (configs, options) in ROWS.items():
            name = f"{row.replace(', ', '_').replace(' ', '_')}_seed{seed}"
            train(BUNDLE, configs, f"{SHARED} {options} --seed {seed}", name)
            folder = Path(f"runs/{name}/test")
            if not folder.exists():
                line = [*bundle_run(BUNDLE, [*configs, "evaluate"]), "--datalist", "lists/acdc.json"]
                options_of_test = ["--ckpt_path", f"runs/{name}/model.pt", "--section", "test"]
                call([*line, *options_of_test, "--output_dir", str(folder)], f"{name}_test")
            told = finished(name)
            runs.append({"row": row, "seed": seed, **told, "best": max(told["dice"]), "test": volume_scores(folder)})
    content = {
        "study": "partial_crf",
        "command": "python benchmarks/studies/partial_crf.py",
        "date": time.strftime("%Y-%m-%d"),
        "epochs": EPOCHS,
        "summary": {
            row: {key: float(np.mean([run[key] for run in runs if run["row"] == row])) for key in ("best", "test")}
            for row in ROWS
        },
        "runs": runs,
    }
    args.output.write_text(json.dumps(content, indent=1) + "\n")
    sys.stdout.write(json.dumps(content["summary"], indent=1) + "\n")


if __name__ == "__main__":
    main()
