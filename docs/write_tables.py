"""Writes every table of the documentation from the files in docs/results; `--check` only says whether one is stale."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from medconstraints.reports.tables import results_table, update_markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
ORGAN = "hippocampus"
FULL = "box_prior_full.json"
RUNS = {
    "Full labels": FULL,
    "A box per slice (shipped weights)": "box_prior_slice_published.json",
    "A box per slice, fitted size bounds": "box_prior_slice_fitted.json",
    "One 3D box, fitted size bounds": "box_prior_box3d.json",
    "Full labels, seed 1": "box_prior_full_seed1.json",
    "A box per slice, seed 1": "box_prior_slice_seed1.json",
}


# Rows of the other bundles' tables.
SIZE_RUNS = {
    "Full labels": "size_constraint_hippocampus_full.json",
    "Points and sizes (shipped weights)": "size_constraint_hippocampus.json",
    "Points alone": "size_constraint_hippocampus_points.json",
}
BARRIER_RUNS = {
    "Full labels": "size_constraint_hippocampus_full.json",
    "Points, sizes and centroids, log-barrier (shipped weights)": "log_barrier_hippocampus.json",
    "Points and sizes, penalty (bundle `size_constraint`)": "size_constraint_hippocampus.json",
}
BOUNDARY_RUNS = {
    "Full labels, cross-entropy": "size_constraint_hippocampus_full.json",
    "Generalised Dice": "boundary_loss_hippocampus_gdl.json",
    "Generalised Dice and boundary, alpha to 0.3 (shipped weights)": "boundary_loss_hippocampus.json",
    "Generalised Dice and boundary, alpha to 1": "boundary_loss_hippocampus_to_one.json",
}
# Table 4.1 of the thesis (Dice, HD95 in mm), ISLES and WMH; table 4.3, ISLES.
LESION_PAPER = {
    "GDL": ("0.511, 5.32", "0.768, 3.63"),
    "GDL + boundary, 2D map": ("0.644, 4.80", "0.793, 2.04"),
    "GDL + boundary, 3D map": ("0.659, 2.73", "0.818, 1.70"),
    "GDL + Hausdorff": ("0.582, 4.13", "0.805, 2.15"),
    "Focal": ("0.631, 4.99", "0.808, 1.82"),
}
ALPHA_PAPER = {
    "GDL alone": "0.511, 5.32",
    "constant 0.01": "0.566, 5.05",
    "constant 0.1": "0.605, 5.76",
    "constant 1": "0.628, 2.46",
    "constant 2": "0.549, 20.28",
    "increase": "0.622, 4.95",
    "rebalance": "0.644, 4.80",
}
# Published Dice on the thesis's own validation sets: table 2.1 (left ventricle) and table 3.1 (discs).
ACDC_ROWS = {
    "Partial cross-entropy": ("partial", "0.150"),
    "+ tags": ("tags", "0.792"),
    "+ tags, Lagrangian proposals": ("proposals_tags", "0.771"),
    "+ common size": ("common", "0.800"),
    "+ common size, Lagrangian proposals": ("proposals_common", "0.785"),
    "+ individual size": ("individual", "0.871"),
    "+ individual size, Lagrangian proposals": ("proposals_individual", "0.790"),
    "+ size of the volume": ("volume", "0.858"),
    "Full labels": ("full", "0.887"),
}
TOY_ROWS = {
    "Lagrangian": "0.005",
    "ReLU Lagrangian": "0.798",
    "Penalty": "0.712",
    "Augmented Lagrangian": "-",
    "Log-barrier": "0.945",
    "Full labels": "0.998",
}


def load(name: str) -> dict[str, Any]:
    """A results file."""
    return dict(json.loads((RESULTS / name).read_text(encoding="utf-8")))


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines)


def goal(runs: dict[str, str]) -> str:
    """Share of the Dice of full labels that weak labels reach."""
    dice = {label: load(name)["summary"][ORGAN]["dice_mean"] for label, name in runs.items()}
    full = {label.removeprefix("Full labels").strip(", "): dice.pop(label) for label in list(dice) if "Full" in label}
    parts = [
        f"{label[0].lower() + label[1:]} {100 * value / full[seed]:.1f} %"
        for label, value in dice.items()
        if (seed := "seed 1" if "seed 1" in label and "seed 1" in full else "") in full
    ]
    return "Share of the Dice of full labels, whole hippocampus: " + "; ".join(parts) + "."


def training(bundle: str) -> str:
    """How long the trainings took."""
    content = load(f"{bundle}_training_seconds.json")
    # Those of the shipped weights' table; the others stand in tables of their own.
    seconds = [value for name, value in content["seconds"].items() if not name.startswith(("acdc_", "toy_"))]
    return (
        f"The trainings took {min(seconds) / 60:.1f} to {max(seconds) / 60:.1f} minutes each, {content['machine']}; "
        f"{content['date']}."
    )


def acdc() -> tuple[str, str]:
    """The left ventricle at each level of supervision, and how near the individual sizes come to full labels."""
    seconds = load("size_constraint_training_seconds.json")["seconds"]
    rows, dice = [], {}
    for label, (name, paper) in ACDC_ROWS.items():
        content = load(f"size_constraint_acdc_{name}.json")
        row = content["summary"]["left ventricle"]
        dice[name] = row["dice_mean"]
        cases = [case["left ventricle"] for case in content["cases"]]
        size = statistics.median(case["volume_ml_prediction"] / case["volume_ml_reference"] for case in cases)
        minutes = f"{seconds[f'acdc_{name}'] / 60:.1f}"
        rows.append([label, f"{row['dice_mean']:.3f} ({row['dice_sd']:.3f})", f"{size:.2f}", minutes, paper])
    share = 100 * dice["individual"] / dice["full"]
    text = f"Individual sizes reach {share:.1f} % of full labels (goal 98 %; the thesis: {100 * 0.871 / 0.887:.1f} %)."
    header = ["Supervision", "Dice, test", "Size / true size, median", "Minutes of training", "Dice, thesis"]
    return table(header, rows), text


def tuned() -> dict[str, str]:
    """Setting of each formulation: the best of the short runs, by Dice, then by satisfied constraints."""
    summary = load("log_barrier_toy_tuning.json")["summary"]
    settings = {"Log-barrier": "t = 5, factor 1.1", "Penalty": "-", "Full labels": "-"}
    for label in ("Lagrangian", "ReLU Lagrangian", "Augmented Lagrangian"):
        runs = {name: row for name, row in summary.items() if name.split(",")[0] == label}
        best = max(runs, key=lambda name: (runs[name]["val_mean_dice_mean"], runs[name]["satisfied_mean"]))
        settings[label] = best.split(", ", 1)[1]
    return settings


def toy() -> tuple[str, str]:
    """The discs with each formulation, and whether the log-barrier is ahead."""
    content = load("log_barrier_toy.json")
    seconds = load("log_barrier_training_seconds.json")["seconds"]
    settings = tuned()
    rows = []
    for label, paper in TOY_ROWS.items():
        row = content["summary"][label]
        cells = [
            f"{row[f'{column}_mean']:.3f} ({row[f'{column}_sd']:.3f})" if row.get(f"{column}_mean") is not None else "-"
            for column in ("val_mean_dice", "satisfied", "stability")
        ]
        minutes = seconds[f"toy_{label.lower().replace('-', '_').replace(' ', '_')}"] / 60
        rows.append([label, settings[label], *cells, f"{minutes:.1f}", paper])
    dice = {label: content["summary"][label]["val_mean_dice_mean"] for label in TOY_ROWS if label != "Full labels"}
    best = max(dice, key=lambda label: dice[label])
    others = load("log_barrier_toy_repeats.json")["summary"]
    repeats = "; ".join(f"{label}: {row['val_mean_dice_mean']:.3f}" for label, row in others.items())
    text = (
        f"Goal: the log-barrier at least 0.945 and ahead of every other formulation. In this table it reaches "
        f"{dice['Log-barrier']:.3f}, and the best formulation is: {best}. Repeated runs, Dice over the last 10 epochs: "
        f"{repeats}."
    )
    header = ["Formulation", "Setting", "Dice", "Satisfied", "Stability", "Minutes of training", "Dice, thesis"]
    return table(header, rows), text


def score(row: dict[str, Any] | None) -> str:
    """Dice and HD95 over the seeds."""
    if row is None:
        return "-"
    parts = []
    for name, digits in (("dice", 3), ("hd95_mm", 1)):
        mean, deviation = row[f"{name}_mean"], row[f"{name}_sd"]
        spread = "" if deviation is None else f" ({deviation:.{digits}f})"
        parts.append("-" if mean is None else f"{mean:.{digits}f}{spread}")
    if row["hd95_undefined"]:
        parts[-1] += f" [{row['hd95_undefined']} of {row['hd95_cases']} empty]"
    return ", ".join(parts)


def conditions(content: dict[str, Any]) -> str:
    """Command, date and cost of a study."""
    found = [row for rows in content["results"].values() for row in rows.values()]
    minutes = [row["minutes"] for row in found if row["minutes"] is not None]
    seeds = sorted({seed for row in found for seed in row["seeds"]})
    epochs = ", ".join(f"{name} {count}" for name, count in content["epochs"].items())
    return (
        f"`{content['command']}`, {content['date']}; seeds {', '.join(map(str, seeds))}; epochs: {epochs}; "
        f"{min(minutes):.1f} to {max(minutes):.1f} minutes for each training on one core ({content['processor']}), the "
        "machine shared with other work."
    )


def lesions() -> str:
    """Losses on lesions and tumours, and what the boundary term changes."""
    content = load("boundary_loss_lesions.json")
    results = content["results"]
    names = {
        "ms_19": "Lesions, many to few",
        "ms_07": "Lesions, few to many",
        "halves": "Lesions, other half of the brain",
        "tumour": "Enhancing tumour",
    }
    rows = [
        [row, *(score(results[name].get(row)) for name in names), *LESION_PAPER.get(row, ("-", "-"))]
        for row in content["options"]
    ]
    header = ["Loss", *names.values(), "Thesis, ISLES", "Thesis, WMH"]
    lines = []
    for name, label in names.items():
        base, ours = results[name]["GDL"], results[name]["GDL + boundary, 3D map"]
        others = [results[name][row]["dice_mean"] for row in ("GDL + Hausdorff", "GDL + 0.1 Hausdorff")]
        points = 100 * (ours["dice_mean"] - base["dice_mean"])
        against = 100 * (ours["dice_mean"] - max(others))
        hd95 = "no HD95 to compare, some predictions being empty"
        if not base["hd95_undefined"] and not ours["hd95_undefined"]:
            hd95 = f"{100 * ours['hd95_mm_mean'] / base['hd95_mm_mean']:.0f} % of its HD95"
        lines.append(
            f"{label}: {points:+.1f} Dice points and {hd95}; {against:+.1f} points against the better Hausdorff"
        )
    goal_text = (
        "GDL + boundary with 3D maps against GDL (goal: at least 5 Dice points more, at most 60 % of its HD95, and "
        f"ahead of the Hausdorff loss). {'. '.join(lines)}."
    )
    return "\n\n".join([table(header, rows), goal_text, conditions(content)])


def alphas() -> str:
    """Schedules and constants of alpha."""
    content = load("boundary_loss_alpha.json")
    results = content["results"]["tumour"]
    rows = [[row, score(results.get(row)), ALPHA_PAPER[row]] for row in content["options"]]
    return "\n\n".join([table(["alpha", "Enhancing tumour", "Thesis, ISLES"], rows), conditions(content)])


def heart() -> str:
    """Several classes on ACDC."""
    content = load("boundary_loss_classes.json")
    rows = []
    for label, row in content["results"]["heart"].items():
        cells = [
            f"{statistics.fmean(dice):.3f}, {statistics.fmean(hd95):.1f}"
            if None not in hd95
            else f"{statistics.fmean(dice):.3f}, -"
            for dice, hd95 in zip(zip(*row["dice"], strict=True), zip(*row["hd95_mm"], strict=True), strict=True)
        ]
        rows.append([label, *cells, score(row)])
    structures = next(iter(content["results"]["heart"].values()))["structures"]
    header = ["Loss", *structures, "mean"]
    return "\n\n".join([table(header, rows), conditions(content)])


def boundary_benchmarks() -> str:
    """Distance maps, losses and an epoch."""
    maps, losses, epoch = (load(f"benchmark_boundary_{name}.json") for name in ("distance_maps", "loss", "epoch"))
    rows = [
        [
            f"{' x '.join(map(str, row['shape']))}, {row['case']}",
            f"{row['scipy_ms'] / 1e3:.1f} s",
            f"{row['ratio_exact']:.3f}x ({row['ratio_exact_one_thread']:.3f}x)",
            f"{row['ratio_clipped']:.3f}x ({row['ratio_clipped_one_thread']:.3f}x)",
            f"{row['ratio_four_classes_to_whole']:.2f}x ({row['ratio_four_classes_to_one']:.2f}x)",
            f"{row['largest_error_mm']:.0e} mm",
            f"{row['extra_memory_mb']:.0f} MB",
        ]
        for row in maps["rows"]
    ]
    header = ["Label, object", "scipy twice", "Exact", "Within 10 mm", "4 classes", "Error", "Extra memory"]
    lines = [table(header, rows), ""]
    lines += [
        "Goals: 197 x 233 x 189 exact at most 0.3x, within 10 mm at most 0.1x; 512 x 512 x 200 exact at most 0.15x, "
        "within 10 mm at most 0.05x; at most 350 MB beyond the result; four classes at most 2x one.",
        "",
    ]
    rows = [
        [
            f"{row['case']}, {' x '.join(map(str, row['shape']))}",
            f"{row['ratio_boundary']:.2f}x",
            f"{row['ratio_boundary_from_probabilities']:.2f}x",
            f"1/{row['monai_boundary_over_ours']:.0f}",
            f"{row['ratio_hausdorff_to_monai']:.2f}x",
            f"{row['ratio_hausdorff_with_map_to_monai']:.2f}x",
            f"{row['ratio_generalized_dice_to_monai']:.2f}x",
        ]
        for row in losses["rows"]
    ]
    header = [
        "Input",
        "Boundary / cross-entropy",
        "from probabilities",
        "Boundary / MONAI's",
        "Hausdorff / MONAI's",
        "with the label's map",
        "GDL / MONAI's",
    ]
    lines += [table(header, rows), ""]
    lines += [
        "Goals, 3D with two classes: at most 0.6x of cross-entropy, 1/50 of MONAI's boundary loss, 1/3 of MONAI's "
        "Hausdorff loss.",
        "",
    ]
    lines += [
        f"One epoch of the bundle ({row['case']}) against the same without the boundary term and its maps: "
        f"{row['ratio_boundary']:.3f}x (goal 1.01x); with the Hausdorff loss {row['ratio_hausdorff']:.2f}x."
        for row in epoch["rows"]
    ]
    return "\n".join([*lines, *measured_by(maps, losses, epoch)])


def measured_by(*results: dict[str, Any]) -> list[str]:
    """Command, date and machine of each benchmark, as paragraphs."""
    lines = []
    for where in (result["environment"] for result in results):
        lines.append("")
        lines.append(
            f"`{where['command']}`, {where['date']}, torch {where['torch']}, {where['threads']} threads, "
            f"{where['device']} ({where['processor']})."
        )
    return lines


def constraint_benchmarks() -> str:
    """Time and memory of the constraint losses, of the formulations, and of an epoch."""
    loss, epoch = load("benchmark_constraint_loss.json"), load("benchmark_constraint_epoch.json")
    rows = [
        [
            row["case"],
            " x ".join(map(str, row["shape"])),
            f"{row['ratio_from_probabilities']:.2f}x",
            f"{row['ratio_from_logits']:.2f}x",
            f"{row['ratio_size_alone']:.2f}x",
            f"{row['peak_memory_over_probabilities']:.2f}x",
        ]
        for row in loss["rows"]
        if "case" in row
    ]
    header = ["Constraints", "Input", "From probabilities", "From logits", "Size alone", "Peak memory"]
    lines = [table(header, rows), ""]
    lines += ["Goal: at most 0.6x from probabilities.", ""]
    costs = [row for row in loss["rows"] if "formulation" in row]
    counts = list(costs[0]["ms_by_constraints"])
    cells = [[row["formulation"], *(f"{1e3 * row['ms_by_constraints'][n]:.0f}" for n in counts)] for row in costs]
    lines += [table(["Microseconds for so many constraints", *counts], cells), ""]
    cells = [[row["case"], f"{row['ratio']:.3f}x"] for row in epoch["rows"]]
    lines += [table(["One epoch of the bundle", "Against cross-entropy on full labels"], cells), ""]
    lines += ["Goals: log-barrier at most 1.02x, Lagrangians at most 1.10x, proposals at most 1.5x."]
    return "\n".join([*lines, *measured_by(loss, epoch)])


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
    return "\n".join([*lines, *measured_by(loss, epoch)])


SHIPPED = {
    "box_prior": RUNS["A box per slice (shipped weights)"],
    "size_constraint": SIZE_RUNS["Points and sizes (shipped weights)"],
    "boundary_loss": BOUNDARY_RUNS["Generalised Dice and boundary, alpha to 0.3 (shipped weights)"],
    "log_barrier": BARRIER_RUNS["Points, sizes and centroids, log-barrier (shipped weights)"],
}


def update_metadata(bundle: str, *, check: bool) -> bool:
    """Write the scores of the shipped weights on the test list into the bundle's metadata; whether it changes."""
    summary = load(SHIPPED[bundle])["summary"]
    path = ROOT / "bundles" / bundle / "configs" / "metadata.json"
    before = path.read_text(encoding="utf-8")
    content = json.loads(before)
    content["eval_metrics"] = {
        f"{name}_{metric}": round(summary[name][f"{metric}_mean"], 3)
        for name in summary
        for metric in ("dice", "hd95_mm")
    }
    after = json.dumps(content, indent=4) + "\n"
    if before != after and not check:
        path.write_text(after, encoding="utf-8")
    return before != after


def readme(bundle: str) -> Path:
    """The bundle's README."""
    return ROOT / "bundles" / bundle / "docs" / "README.md"


def files(runs: dict[str, str]) -> dict[str, Path]:
    """Results files of the rows of a table."""
    return {label: RESULTS / name for label, name in runs.items()}


def main() -> int:
    """Write or check all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a table would change")
    args = parser.parse_args()
    ratios, conclusion = filling()
    levels, level_goal = acdc()
    discs, disc_goal = toy()
    box, size, barrier = readme("box_prior"), readme("size_constraint"), readme("log_barrier")
    boundary = readme("boundary_loss")
    tables = [
        (box, "results", results_table(files(RUNS))),
        (box, "goal", goal(RUNS)),
        (box, "training", training("box_prior")),
        (box, "filling", ratios),
        (box, "filling_conclusion", conclusion),
        (size, "results", results_table(files(SIZE_RUNS))),
        (size, "goal", goal(SIZE_RUNS)),
        (size, "training", training("size_constraint")),
        (size, "acdc", levels),
        (size, "acdc_goal", level_goal),
        (barrier, "results", results_table(files(BARRIER_RUNS))),
        (barrier, "goal", goal(BARRIER_RUNS)),
        (barrier, "training", training("log_barrier")),
        (barrier, "toy", discs),
        (barrier, "toy_goal", disc_goal),
        (boundary, "results", results_table(files(BOUNDARY_RUNS))),
        (boundary, "training", training("boundary_loss")),
        (boundary, "lesions", lesions()),
        (boundary, "alpha", alphas()),
        (boundary, "acdc", heart()),
        (ROOT / "docs" / "benchmarks.md", "boundary", boundary_benchmarks()),
        (ROOT / "docs" / "benchmarks.md", "box_prior", benchmarks()),
        (ROOT / "docs" / "benchmarks.md", "constraints", constraint_benchmarks()),
    ]
    changed = [name for path, name, text in tables if update_markdown(path, name, text, check=args.check)]
    changed += [f"metadata of {bundle}" for bundle in SHIPPED if update_metadata(bundle, check=args.check)]
    sys.stdout.write(f"{'stale' if args.check else 'written'}: {', '.join(changed) or 'nothing'}\n")
    return int(args.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
