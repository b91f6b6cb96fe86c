"""Writes every table of the documentation from the files in docs/results; `--check` only says whether one is stale."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from medconstraints.reports.tables import results_table, update_markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
ORGAN = "hippocampus"
RUNS = {
    "Full labels": "box_prior_full.json",
    "A box per slice (shipped weights)": "box_prior_slice_published.json",
    "A box per slice, fitted size bounds": "box_prior_slice_fitted.json",
    "One 3D box, fitted size bounds": "box_prior_box3d.json",
    "Full labels, seed 1": "box_prior_full_seed1.json",
    "A box per slice, seed 1": "box_prior_slice_seed1.json",
}


def load(name: str) -> dict[str, Any]:
    """A results file."""
    return dict(json.loads((RESULTS / name).read_text(encoding="utf-8")))


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines)


def goal() -> str:
    """Share of the Dice of full labels that boxes reach."""
    dice = {label: load(name)["summary"][ORGAN]["dice_mean"] for label, name in RUNS.items()}
    full = {"seed 1": dice.pop("Full labels, seed 1"), "": dice.pop("Full labels")}
    parts = [
        f"{label[0].lower() + label[1:]} {100 * value / full['seed 1' if 'seed 1' in label else '']:.1f} %"
        for label, value in dice.items()
    ]
    return "Share of the Dice of full labels (same seed), whole hippocampus: " + "; ".join(parts) + "."


def training() -> str:
    """How long the trainings took."""
    content = load("box_prior_training_seconds.json")
    seconds = content["seconds"].values()
    return (
        f"The trainings took {min(seconds) / 60:.1f} to {max(seconds) / 60:.1f} minutes each, {content['machine']}; "
        f"{content['date']}."
    )


def filling() -> tuple[str, str]:
    """The study of filling ratios, and from where on 3D boxes reach 95 % of full labels."""
    rows = load("box_filling.json")["rows"]
    kinds = ["3d boxes", "slice boxes", "labels"]
    cells = [
        [f"{row['filling']:.2f}", *(f"{row[f'{kind} dice']:.3f} ({row[f'{kind} sd']:.3f})" for kind in kinds)]
        for row in rows
    ]
    share = {row["filling"]: row["3d boxes dice"] / row["labels dice"] for row in rows}
    enough = [ratio for ratio in sorted(share) if all(share[other] >= 0.95 for other in share if other >= ratio)]
    text = "3D boxes reach 95 % of the Dice of full labels at none of these ratios."
    if enough:
        text = f"3D boxes reach 95 % of the Dice of full labels from a filling ratio of {enough[0]:.2f} on."
    worst = min(share)
    text += f" At {worst:.2f} they reach {100 * share[worst]:.0f} %: there, draw a box in every slice."
    return table(["Filling ratio", "One 3D box", "A box per slice", "Full labels"], cells), text


def benchmarks() -> str:
    """Time and memory of the losses and of an epoch."""
    loss, epoch = load("benchmark_box_prior_loss.json"), load("benchmark_box_prior_epoch.json")
    rows = [
        [
            row["case"],
            " x ".join(map(str, row["shape"])),
            f"{row['ratio_from_logits']:.2f}x",
            f"{row['ratio_from_probabilities']:.2f}x",
            f"{row['peak_memory_over_probabilities']:.2f}x",
        ]
        for row in loss["rows"]
    ]
    header = ["Boxes", "Input", "Time, from logits", "Time, from probabilities", "Peak memory"]
    lines = [table(header, rows), ""]
    met = {
        "1.2x in time from probabilities": sum(row["ratio_from_probabilities"] <= 1.2 for row in loss["rows"]),
        "1.2x in time from logits": sum(row["ratio_from_logits"] <= 1.2 for row in loss["rows"]),
        "2x in memory": sum(row["peak_memory_over_probabilities"] <= 2 for row in loss["rows"]),
    }
    counted = "; ".join(f"at most {name}: {count} of {len(loss['rows'])}" for name, count in met.items())
    lines += [f"Goals and how many of these cases meet them: {counted}.", ""]
    lines += [f"One epoch of the bundle ({row['case']}): {row['ratio']:.3f}x (goal 1.03x)." for row in epoch["rows"]]
    for result in (loss, epoch):
        where = result["environment"]
        lines.append("")
        lines.append(
            f"`{where['command']}`, {where['date']}, torch {where['torch']}, {where['threads']} threads, "
            f"{where['device']} ({where['processor']})."
        )
    return "\n".join(lines)


def evaluation_metrics() -> dict[str, float]:
    """Scores of the shipped weights on the test list, for the bundle's metadata."""
    summary = load(RUNS["A box per slice (shipped weights)"])["summary"]
    return {
        f"{name}_{metric}": round(summary[name][f"{metric}_mean"], 3)
        for name in summary
        for metric in ("dice", "hd95_mm")
    }


def update_metadata(*, check: bool) -> bool:
    """Write the scores into the bundle's metadata.json; whether it changes."""
    path = ROOT / "bundles" / "box_prior" / "configs" / "metadata.json"
    before = path.read_text(encoding="utf-8")
    content = json.loads(before)
    content["eval_metrics"] = evaluation_metrics()
    after = json.dumps(content, indent=4) + "\n"
    if before != after and not check:
        path.write_text(after, encoding="utf-8")
    return before != after


def main() -> int:
    """Write or check all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a table would change")
    args = parser.parse_args()
    bundle = ROOT / "bundles" / "box_prior" / "docs" / "README.md"
    ratios, conclusion = filling()
    tables = [
        (bundle, "results", results_table({label: RESULTS / name for label, name in RUNS.items()})),
        (bundle, "goal", goal()),
        (bundle, "training", training()),
        (bundle, "filling", ratios),
        (bundle, "filling_conclusion", conclusion),
        (ROOT / "docs" / "benchmarks.md", "box_prior", benchmarks()),
    ]
    changed = [name for path, name, text in tables if update_markdown(path, name, text, check=args.check)]
    if update_metadata(check=args.check):
        changed.append("metadata")
    sys.stdout.write(f"{'stale' if args.check else 'written'}: {', '.join(changed) or 'nothing'}\n")
    return int(args.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
