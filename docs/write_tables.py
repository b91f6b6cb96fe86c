"""Writes every table of the documentation from the files in docs/results; `--check` only says whether one is stale.

A row says which settings its run was to have. Where its file carries those of the run, they must be the same.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from medconstraints.reports.tables import markdown_table, results_table, update_markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
ORGAN = "hippocampus"


class Row(NamedTuple):
    """A row of a table: its results file, what it claims of its training's settings, and what the thesis reports."""

    file: str
    claims: dict[str, Any]
    paper: str = "-"


FULL = {"config_files": ["train.json", "full_supervision.json"], "seed": 0}
SLICES = {"slice_axis": 1, "filling": [0.5, 0.9], "seed": 0}
BOXES = {
    "Full labels": Row("box_prior_full.json", FULL),
    "A box per slice (shipped weights)": Row("box_prior_slice_published.json", SLICES),
    "A box per slice, fitted size bounds": Row(
        "box_prior_slice_fitted.json", {**SLICES, "filling": [[0.6052, 0.7062], [0.6441, 0.7037]]}
    ),
    "One 3D box, fitted size bounds": Row(
        "box_prior_box3d.json", {"slice_axis": None, "filling": [[0.2892, 0.403], [0.1384, 0.2218]], "seed": 0}
    ),
    "Full labels, seed 1": Row("box_prior_full_seed1.json", {**FULL, "seed": 1}),
    "A box per slice, seed 1": Row("box_prior_slice_seed1.json", {**SLICES, "seed": 1}),
}
EVERY_VOXEL = Row("size_constraint_hippocampus_full.json", FULL)
POINTS = Row("size_constraint_hippocampus.json", {"weak_source": "points", "level": "individual", "seed": 0})
SIZES = {
    "Full labels": EVERY_VOXEL,
    "Points and sizes (shipped weights)": POINTS,
    "Points alone": Row("size_constraint_hippocampus_points.json", {"weak_source": "points", "level": "none"}),
}
BARRIER = {
    "Full labels": EVERY_VOXEL,
    "Points, sizes and centroids, log-barrier (shipped weights)": Row(
        "log_barrier_hippocampus.json", {"weak_source": "points", "config_files": ["train.json"], "seed": 0}
    ),
    "Points and sizes, penalty (bundle `size_constraint`)": POINTS,
}
REBALANCED = {"config_files": ["train.json"], "schedule": "rebalance", "seed": 0}
BOUNDARY = {
    "Full labels, cross-entropy": EVERY_VOXEL,
    "Generalised Dice": Row(
        "boundary_loss_hippocampus_gdl.json", {"config_files": ["train.json"], "schedule": "none", "seed": 0}
    ),
    "Generalised Dice and boundary, alpha to 0.3 (shipped weights)": Row(
        "boundary_loss_hippocampus.json", {**REBALANCED, "alpha_increment": 0.01}
    ),
    "Generalised Dice and boundary, alpha to 1": Row(
        "boundary_loss_hippocampus_to_one.json", {**REBALANCED, "alpha_increment": None}
    ),
}
VOLUMES = {
    "Rotation, flip and translation": Row(
        "e2e_augmentation_hippocampus_combined.json",
        {"config_files": ["train.json", "baselines.json"], "augmentation": "combined", "epochs": 150, "seed": 0},
    ),
    "The same and generated pairs, levels 3 (shipped weights)": Row(
        "e2e_augmentation_hippocampus.json",
        {"config_files": ["train.json"], "levels": 3, "augmentation": "combined", "epochs": 150, "seed": 0},
    ),
}
FEW = {"config_files": ["train.json"], "fully_labelled": 10, "epochs": 10, "seed": 0}
FEW_SEGMENTED = {
    "Ten segmented, labels alone (shipped weights)": Row(
        "curriculum_size_hippocampus_labelled.json", {**FEW, "supervision": "labelled"}
    ),
    "Ten segmented, regressed sizes of the others": Row(
        "curriculum_size_hippocampus.json", {**FEW, "supervision": "curriculum", "size_weight": 0.001}
    ),
    "The same, weight 0.0001 and margins of each image": Row(
        "curriculum_size_hippocampus_weak.json",
        {
            **FEW,
            "config_files": ["train.json", "segmentation.json"],
            "supervision": "curriculum",
            "size_weight": 0.0001,
            "margin_from": "uncertainty",
        },
    ),
    "Five segmented, labels alone": Row(
        "curriculum_size_hippocampus_labelled5.json", {**FEW, "fully_labelled": 5, "supervision": "labelled"}
    ),
    "All 168 segmented": EVERY_VOXEL,
}
SHIPPED = {
    "box_prior": BOXES["A box per slice (shipped weights)"],
    "size_constraint": POINTS,
    "boundary_loss": BOUNDARY["Generalised Dice and boundary, alpha to 0.3 (shipped weights)"],
    "log_barrier": BARRIER["Points, sizes and centroids, log-barrier (shipped weights)"],
    "bilevel_augmentation": Row("bilevel_augmentation_hippocampus.json", {"config_files": ["train.json"], "seed": 0}),
    "curriculum_size": FEW_SEGMENTED["Ten segmented, labels alone (shipped weights)"],
    "e2e_augmentation": VOLUMES["The same and generated pairs, levels 3 (shipped weights)"],
    "lookahead_adversarial": BOUNDARY["Generalised Dice and boundary, alpha to 0.3 (shipped weights)"],
    "saflex": Row("saflex_hippocampus.json", {"config_files": ["train.json"], "upstream": "randaugment", "seed": 0}),
}
# Published Dice on the thesis's own validation sets: table 2.1 (left ventricle) and table 3.1 (discs).
PROPOSALS = {"config_files": ["train.json", "acdc.json", "proposals.json"]}
ACDC = {
    "Partial cross-entropy": Row("partial", {"level": "none", "weak_source": "erosion"}, "0.150"),
    "+ tags": Row("tags", {"level": "tags"}, "0.792"),
    "+ tags, Lagrangian proposals": Row("proposals_tags", {"level": "tags", **PROPOSALS}, "0.771"),
    "+ common size": Row("common", {"level": "common"}, "0.800"),
    "+ common size, Lagrangian proposals": Row("proposals_common", {"level": "common", **PROPOSALS}, "0.785"),
    "+ individual size": Row("individual", {"level": "individual"}, "0.871"),
    "+ individual size, Lagrangian proposals": Row(
        "proposals_individual", {"level": "individual", **PROPOSALS}, "0.790"
    ),
    "+ size of the volume": Row("volume", {"level": "volume"}, "0.858"),
    "Full labels": Row("full", {"level": "none", "weak_source": "label"}, "0.887"),
}
DISCS = {
    "Lagrangian": "0.005",
    "ReLU Lagrangian": "0.798",
    "Penalty": "0.712",
    "Augmented Lagrangian": "-",
    "Log-barrier": "0.945",
    "Full labels": "0.998",
}
# Table 4.1 of the thesis (Dice, HD95 in mm), ISLES and WMH; table 4.3, ISLES.
LESIONS = {
    "GDL": ("0.511, 5.32", "0.768, 3.63"),
    "GDL + boundary, 2D map": ("0.644, 4.80", "0.793, 2.04"),
    "GDL + boundary, 3D map": ("0.659, 2.73", "0.818, 1.70"),
    "GDL + Hausdorff": ("0.582, 4.13", "0.805, 2.15"),
    "Focal": ("0.631, 4.99", "0.808, 1.82"),
}
ALPHAS = {
    "GDL alone": "0.511, 5.32",
    "constant 0.01": "0.566, 5.05",
    "constant 0.1": "0.605, 5.76",
    "constant 1": "0.628, 2.46",
    "constant 2": "0.549, 20.28",
    "increase": "0.622, 4.95",
    "rebalance": "0.644, 4.80",
}


def load(name: str) -> dict[str, Any]:
    """A results file."""
    return dict(json.loads((RESULTS / name).read_text(encoding="utf-8")))


# Claims


def is_recorded(label: str, claims: Mapping[str, Any], settings: Mapping[str, Any] | None) -> bool:
    """Whether the settings of a row's training are there; they must be what the row claims.

    Raises:
        ValueError: they are others.
    """
    training = (settings or {}).get("training")
    if training is None:
        return False
    found = {"config_files": training.get("config_files"), **training["settings"]}
    wrong = [
        f"{key} {claimed!r}, and its run had {found[key]!r}" if key in found else f"{key}, which its run did not have"
        for key, claimed in claims.items()
        if key not in found or found[key] != claimed
    ]
    if wrong:
        raise ValueError(f"the row {label!r} claims {'; '.join(wrong)}")
    return True


def not_recorded(rows: Iterable[tuple[str, Mapping[str, Any], Mapping[str, Any] | None]]) -> str:
    """The line under a table that names the rows whose files do not tell how they were trained."""
    recorded = {label: is_recorded(label, claims, settings) for label, claims, settings in rows}
    silent = [label for label, told in recorded.items() if not told]
    return f"Settings not recorded: {'; '.join(silent) if any(recorded.values()) else 'all rows'}." if silent else ""


def paragraphs(*parts: str) -> str:
    """Parts that are not empty, with a blank line between them."""
    return "\n\n".join(part for part in parts if part)


# Tables of bundles


def scores(rows: Mapping[str, Row]) -> str:
    """Dice and HD95 of runs."""
    told = not_recorded((label, row.claims, load(row.file).get("settings")) for label, row in rows.items())
    return paragraphs(results_table({label: RESULTS / row.file for label, row in rows.items()}), told)


def goal(rows: Mapping[str, Row]) -> str:
    """Share of the Dice of full labels that weak labels reach."""
    dice = {label: load(row.file)["summary"][ORGAN]["dice_mean"] for label, row in rows.items()}
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


def acdc() -> dict[str, str]:
    """The left ventricle at each level of supervision, and how near the individual sizes come to full labels."""
    seconds = load("size_constraint_training_seconds.json")["seconds"]
    contents = {label: load(f"size_constraint_acdc_{row.file}.json") for label, row in ACDC.items()}
    rows, dice = [], {}
    for label, (name, _, paper) in ACDC.items():
        summary = contents[label]["summary"]["left ventricle"]
        dice[name] = summary["dice_mean"]
        cases = [case["left ventricle"] for case in contents[label]["cases"]]
        size = statistics.median(case["volume_ml_prediction"] / case["volume_ml_reference"] for case in cases)
        minutes = f"{seconds[f'acdc_{name}'] / 60:.1f}"
        rows.append([label, f"{summary['dice_mean']:.3f} ({summary['dice_sd']:.3f})", f"{size:.2f}", minutes, paper])
    share = 100 * dice["individual"] / dice["full"]
    text = f"Individual sizes reach {share:.1f} % of full labels (goal 98 %; the thesis: {100 * 0.871 / 0.887:.1f} %)."
    header = ["Supervision", "Dice, test", "Size / true size, median", "Minutes of training", "Dice, thesis"]
    told = not_recorded((label, ACDC[label].claims, content.get("settings")) for label, content in contents.items())
    return {"acdc": paragraphs(markdown_table(header, rows), told), "acdc_goal": text}


def tuned() -> dict[str, str]:
    """Setting of each formulation: the best of the short runs, by Dice, then by satisfied constraints."""
    summary = load("log_barrier_toy_tuning.json")["summary"]
    settings = {"Log-barrier": "t = 5, factor 1.1", "Penalty": "-", "Full labels": "-"}
    for label in ("Lagrangian", "ReLU Lagrangian", "Augmented Lagrangian"):
        runs = {name: row for name, row in summary.items() if name.split(",")[0] == label}
        best = max(runs, key=lambda name: (runs[name]["val_mean_dice_mean"], runs[name]["satisfied_mean"]))
        settings[label] = best.split(", ", 1)[1]
    return settings


def toy() -> dict[str, str]:
    """The discs with each formulation, and whether the log-barrier is ahead."""
    summary = load("log_barrier_toy.json")["summary"]
    seconds = load("log_barrier_training_seconds.json")["seconds"]
    settings = tuned()
    rows = []
    for label, paper in DISCS.items():
        row = summary[label]
        cells = [
            f"{row[f'{column}_mean']:.3f} ({row[f'{column}_sd']:.3f})" if row.get(f"{column}_mean") is not None else "-"
            for column in ("val_mean_dice", "satisfied", "stability")
        ]
        minutes = seconds[f"toy_{label.lower().replace('-', '_').replace(' ', '_')}"] / 60
        rows.append([label, settings[label], *cells, f"{minutes:.1f}", paper])
    dice = {label: summary[label]["val_mean_dice_mean"] for label in DISCS if label != "Full labels"}
    best = max(dice, key=lambda label: dice[label])
    others = load("log_barrier_toy_repeats.json")["summary"]
    repeats = "; ".join(f"{label}: {row['val_mean_dice_mean']:.3f}" for label, row in others.items())
    text = (
        f"Goal: the log-barrier at least 0.945 and ahead of every other formulation. In this table it reaches "
        f"{dice['Log-barrier']:.3f}, and the best formulation is: {best}. Repeated runs, Dice over the last 10 epochs: "
        f"{repeats}."
    )
    header = ["Formulation", "Setting", "Dice", "Satisfied", "Stability", "Minutes of training", "Dice, thesis"]
    return {"toy": markdown_table(header, rows), "toy_goal": text}


def filling() -> dict[str, str]:
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
    header = ["Filling ratio", "One 3D box", "A box per slice", "Full labels"]
    return {"filling": markdown_table(header, cells), "filling_conclusion": text}


# Tables of the studies of the boundary loss


def score(row: Mapping[str, Any] | None) -> str:
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


def claims_of(options: list[str]) -> dict[str, Any]:
    """What the options of a study's row claim, as `fire` reads them."""
    from fire.parser import DefaultParseValue

    names, values = options[::2], options[1::2]
    return {name.removeprefix("--"): DefaultParseValue(value) for name, value in zip(names, values, strict=True)}


def conditions(content: Mapping[str, Any]) -> str:
    """Command, date and cost of a study, and the rows whose settings are not recorded."""
    found = [(name, label, row) for name, rows in content["results"].items() for label, row in rows.items()]
    of_data = content.get("options_of_data", {})
    told = not_recorded(
        (f"{label} ({name})", claims_of([*of_data.get(name, []), *content["options"][label]]), row.get("settings"))
        for name, label, row in found
    )
    minutes = [row["minutes"] for _, _, row in found if row["minutes"] is not None]
    seeds = sorted({seed for _, _, row in found for seed in row["seeds"]})
    epochs = ", ".join(f"{name} {count}" for name, count in content["epochs"].items())
    text = (
        f"`{content['command']}`, {content['date']}; seeds {', '.join(map(str, seeds))}; epochs: {epochs}; "
        f"{min(minutes):.1f} to {max(minutes):.1f} minutes for each training on one core ({content['processor']}), the "
        "machine shared with other work."
    )
    return paragraphs(text, told)


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
        [row, *(score(results[name].get(row)) for name in names), *LESIONS.get(row, ("-", "-"))]
        for row in content["options"]
    ]
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
    header = ["Loss", *names.values(), "Thesis, ISLES", "Thesis, WMH"]
    return paragraphs(markdown_table(header, rows), goal_text, conditions(content))


def alphas() -> str:
    """Schedules and constants of alpha."""
    content = load("boundary_loss_alpha.json")
    results = content["results"]["tumour"]
    rows = [[row, score(results.get(row)), ALPHAS[row]] for row in content["options"]]
    return paragraphs(markdown_table(["alpha", "Enhancing tumour", "Thesis, ISLES"], rows), conditions(content))


def heart() -> str:
    """Several classes on ACDC."""
    content = load("boundary_loss_classes.json")
    results = content["results"]["heart"]
    rows = []
    for label, row in results.items():
        pairs = zip(zip(*row["dice"], strict=True), zip(*row["hd95_mm"], strict=True), strict=True)
        means = [(statistics.fmean(dice), "-" if None in hd else f"{statistics.fmean(hd):.1f}") for dice, hd in pairs]
        rows.append([label, *(f"{dice:.3f}, {hd95}" for dice, hd95 in means), score(row)])
    header = ["Loss", *next(iter(results.values()))["structures"], "mean"]
    return paragraphs(markdown_table(header, rows), conditions(content))


# Augmentation that learns

LEARNED = {
    "few": "X-rays, 400 images",
    "noisy": "X-rays, 400 images, 30 % of their labels wrong",
    "shifted": "X-rays, test images of contrast x 0.4 + 1.0",
    "hippocampus_10": "Hippocampus, ten volumes",
}
SCORES = {"auc": "AUC", "accuracy": "Accuracy", "cross_entropy": "Cross-entropy", "dice": "Dice"}


def signed(value: float) -> str:
    """A difference."""
    return f"{value:+.3f}"


def learned_rows(results: Mapping[str, Any], *, told: bool) -> list[list[str]]:
    """Rows of one data set: scores over the seeds, and with `told` the difference from the row's reference."""
    keys = [key for key in SCORES if key in next(iter(results.values()))]
    rows = []
    for label, row in results.items():
        cells = []
        for key in keys:
            deviation = row[key]["sd"]
            cells.append(f"{row[key]['mean']:.3f}" + ("" if deviation is None else f" ({deviation:.3f})"))
        if told:
            against = row.get("against", {})
            cells.append(against.get("row", "-"))
            for key in keys:
                found = against.get(key)
                interval = "" if found is None else ", ".join(map(signed, found["interval"]))
                cells.append("-" if found is None else f"{signed(found['mean'])} [{interval}]")
        rows.append([label, str(len(row["seeds"])), *cells])
    return rows


def learned(*, told: bool) -> str:
    """All rows of the study of augmentation that learns."""
    content, parts = load("learned_augmentation.json"), []
    for name, title in LEARNED.items():
        results = content["results"].get(name)
        if results is None:
            continue
        keys = [SCORES[key] for key in SCORES if key in next(iter(results.values()))]
        header = [title, "Seeds", *keys, *(["Against", *(f"{key}: difference" for key in keys)] if told else [])]
        parts.append(markdown_table(header, learned_rows(results, told=told)))
    epochs = ", ".join(f"{name} {count}" for name, count in content["epochs"].items())
    text = f"`{content['command']}`, {content['date']}; epochs: {epochs}. Mean and standard deviation over the seeds"
    intervals = "; in brackets 95 % intervals of a paired bootstrap over the test cases"
    return paragraphs(*parts, text + (intervals if told else "") + ".")


def learned_more() -> str:
    """What the augmenter found for the shifted images, and whether SAFLEX's weights are worth more than chance."""
    shifted = load("learned_augmentation.json")["results"].get("shifted", {})
    parts = []
    for label, row in shifted.items():
        for seed, found in zip(row["seeds"], row.get("augmenter") or (), strict=False):
            quantity = {one["name"]: one for one in found["quantities"]}
            factor, shift = math.exp(quantity["contrast"]["mean"]), quantity["brightness"]["mean"]
            parts.append(f"{label}, seed {seed}: contrast x {factor:.2f}, brightness {shift:+.2f}")
    weights = load("saflex_weights.json")
    rows = [
        [
            row["norm"],
            "centred" if row["centred"] else "not centred",
            f"{row['mean']:+.4f} ({row['standard_error']:.4f})",
            f"{row['in_standard_errors']:.1f}",
            f"{row['auc_of_wrong_labels']:.2f}",
        ]
        for row in weights["rows"]
    ]
    header = ["Network", "Gains", "Loss saved", "In standard errors", "AUC of wrong labels in a class"]
    return paragraphs(
        f"The shift to be found is x 0.4 + 1.0. {'; '.join(parts)}." if parts else "",
        markdown_table(header, rows),
        f"`{weights['command']}`, {weights['date']}, {weights['batches']} batches.",
    )


END_TO_END = {
    "skin_40": "Skin lesions",
    "skin_20": "Skin lesions",
    "skin_120": "Skin lesions",
    "skin_nevi": "Skin lesions, trained on common nevi alone, tested on other diagnoses",
    "breast": "Breast ultrasound",
    "retina": "Retina vessels",
    "hippocampus_slices": "Hippocampus, slices of ten volumes",
    "hippocampus": "Hippocampus, volumes",
}


def end_to_end(*, told: bool) -> str:
    """All rows of the study of end-to-end augmentation; with `told` the differences and what the generator learned."""
    content, parts = load("end_to_end.json"), []
    for name, title in END_TO_END.items():
        results = content["results"].get(name)
        if results is None:
            continue
        training, validation = content["images"][name]
        cases = next(iter(results.values()))["test_cases"]
        header = [f"{title}, {training} + {validation}; {cases} test cases", "Seeds", "Jaccard"]
        header += ["Differences", "Largest move of alpha"] if told else []
        rows = []
        for label, row in results.items():
            deviation = "" if row["sd"] is None else f" ({row['sd']:.3f})"
            cells = [label, str(len(row["seeds"])), f"{row['jaccard']:.3f}{deviation}"]
            if told:
                gaps = [
                    f"{signed(found['mean'])} [{', '.join(map(signed, found['interval']))}] to {other}"
                    for other, found in row.get("against", {}).items()
                ]
                alphas = [value for key, value in (row["generator"] or {}).items() if key.startswith("alpha/")]
                cells += ["; ".join(gaps) or "-", f"{max(abs(a - 0.5) for a in alphas):.2f}" if alphas else "-"]
            rows.append(cells)
        parts.append(markdown_table(header, rows))
    counts = ", ".join(f"{name} {count}" for name, count in content["iterations"].items())
    text = (
        f"`{content['command']}`, {content['date']}; iterations: {counts}. Mean and standard deviation over the seeds"
    )
    intervals = "; in brackets 95 % intervals of a paired bootstrap over the test cases"
    return paragraphs(*parts, text + (intervals if told else "") + ".")


# set: title, classes
LOOKAHEAD = {
    "acdc": ("Heart, slices", ["right ventricle", "myocardium", "left ventricle"]),
    "hippocampus": ("Hippocampus, volumes", ["anterior", "posterior"]),
}
STRUCTURE = {"pieces": "Pieces too many", "holes": "Holes", "implausible": "Not enclosed"}


def lookahead() -> str:
    """Of each run on the reported part: the change of mean IoU, IoU and HD95 of each class, and the structure."""
    content, parts = load("lookahead.json"), []
    for name, (title, classes) in LOOKAHEAD.items():
        runs = [(label, run) for label, runs in content["results"].get(name, {}).items() for run in runs]
        if not runs:
            continue
        header = [f"{title}, {runs[0][1]['patients']} patients", "Seed"]
        named = [f"{measure}, {cls}" for measure in ("IoU", "HD95") for cls in classes]
        changes = ["Start", "Change of mean IoU", "of the control", "Accepted peaks"]
        parts.append(markdown_table([*header, *changes], [_change_of_iou(*run) for run in runs]))
        moved = [(label, run) for label, run in runs if run["differences"]["after"]["val_mean_iou"]["all"]["mean"]]
        parts.append(markdown_table([*header, *named], [_of_classes(*run) for run in moved]))
        measured = [key for key in STRUCTURE if key in runs[0][1]["structure"]["label"]]
        table = [_structure(*run, measured) for run in moved]
        reference = [f"{runs[0][1]['structure']['label'][key]:.2f}" for key in measured]
        named = [STRUCTURE[key] for key in measured]
        parts.append(markdown_table([*header, *named], [["the references", "", *reference], *table]))
    told = "HD95 in voxels; start -> result, of the rows whose result is not the start itself."
    return paragraphs(*parts, f"`{content['command']}`, {content['date']}. {told}")


def _change_of_iou(label: str, run: Mapping[str, Any]) -> list[str]:
    cells = []
    for key in ("after", "control"):
        found = run["differences"].get(key, {}).get("val_mean_iou")
        ends = "" if found is None else ", ".join(map(signed, found["all"]["interval"]))
        cells.append("-" if found is None else f"{signed(found['all']['mean'])} [{ends}]")
    before = f"{run['scores']['before']['val_mean_iou']['mean']:.3f}"
    return [
        label,
        str(run["seed"]),
        before,
        *cells,
        "-" if "alter" in label else str(run["accepted_peaks"]["adversary"]),
    ]


def _of_classes(label: str, run: Mapping[str, Any]) -> list[str]:
    cells = []
    for metric, digits in (("val_mean_iou", 3), ("val_hd95_voxels", 1)):
        before, after = (run["scores"][when][metric]["of_classes"] for when in ("before", "after"))
        cells += [f"{one:.{digits}f} -> {other:.{digits}f}" for one, other in zip(before, after, strict=True)]
    return [label, str(run["seed"]), *cells]


def _structure(label: str, run: Mapping[str, Any], measured: Sequence[str]) -> list[str]:
    before, after = (run["structure"][when] for when in ("before", "after"))
    return [label, str(run["seed"]), *(f"{before[key]:.2f} -> {after[key]:.2f}" for key in measured)]


SEMI_SUPERVISED = [
    "labelled",
    "proposals",
    "mean teacher",
    "curriculum",
    "curriculum, uncertainty",
    "oracle",
    "all labelled",
]


def curriculum() -> str:
    """Dice of few segmented patients and many unsegmented ones, and how far the regressors are off."""
    content = load("curriculum.json")
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in content["runs"]:
        groups.setdefault((run["labelled"], run["row"]), []).append(run)
    rows, errors = [], []
    for (count, name), runs in sorted(groups.items(), key=lambda one: (int(one[0][0].replace("all", "99")), one[0][1])):
        if name == "regressor":
            for run in runs:
                found = run["held_back"]["size 1"]
                numbers = [f"{found['percent']:.0f} %", f"{found['relative_margin']:.2f}"]
                errors.append([count, str(run["seed"]), *numbers, f"{found['spread_factor']:.1f}"])
    for count in sorted({count for count, _ in groups}, key=lambda one: int(one.replace("all", "99"))):
        for name in SEMI_SUPERVISED:
            if runs := groups.get((count, name), []):
                cells = [_of_seeds([run[key] for run in runs]) for key in ("last_mean", "best", "test")]
                spread = f"{statistics.fmean(run['last_spread'] for run in runs):.3f}"
                rows.append([name, count, str(len(runs)), cells[0], spread, *cells[1:]])
    last = f"Last {content['last']} epochs"
    header = ["", "Segmented", "Seeds", last, "Spread over them", "Best epoch", "Test"]
    table = markdown_table(["Segmented", "Seed", "Mean error", "Margin that covers 90 %", "Spreads that do"], errors)
    told = f"{content['epochs']} epochs; `{content['command']}`, {content['date']}."
    return paragraphs(markdown_table(header, rows), table, told)


def deepcut() -> str:
    """Dice of DeepCut and of the box prior, tight boxes and wide ones."""
    content = load("deepcut.json")
    rows = [
        [
            run["row"],
            str(run["margin_voxels"]),
            f"{max(run['dice']):.3f}",
            *(f"{content['summary'][key][f'val_mean_dice_{what}']:.3f}" for what in ("mean", "sd")),
        ]
        for run in content["runs"]
        for key in [f"{run['row']}, margin {run['margin_voxels']}"]
    ]
    header = ["", "Margin (voxels)", "Best epoch", f"Last {content['last']} epochs", "Spread over them"]
    told = (
        f"{content['volumes']} training volumes, {content['epochs']} epochs, rounds of {content['every']}; "
        f"`{content['command']}`, {content['date']}."
    )
    return paragraphs(markdown_table(header, rows), told)


def partial_crf() -> str:
    """Dice of partial labels with and without the loss of the dense CRF."""
    content = load("partial_crf.json")
    rows = []
    for name in content["summary"]:
        runs = [run for run in content["runs"] if run["row"] == name]
        rows.append([name, str(len(runs)), *(_of_seeds([run[key] for run in runs]) for key in ("best", "test"))])
    told = f"{content['epochs']} epochs; `{content['command']}`, {content['date']}."
    return paragraphs(markdown_table(["", "Seeds", "Best epoch", "Test"], rows), told)


def _of_seeds(values: Sequence[float]) -> str:
    """Mean, and the lowest and highest of several."""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


# Benchmarks


def times(value: float, digits: int = 2) -> str:
    """A ratio."""
    return f"{value:.{digits}f}x"


def shape_of(row: Mapping[str, Any]) -> str:
    """Shape of an input."""
    return " x ".join(map(str, row["shape"]))


def measured_by(*results: Mapping[str, Any]) -> str:
    """Command, date and machine of each benchmark, as paragraphs."""
    return paragraphs(
        *(
            f"`{where['command']}`, {where['date']}, torch {where['torch']}, {where['threads']} threads, "
            f"{where['device']} ({where['processor']})."
            for where in (result["environment"] for result in results)
        )
    )


def boundary_benchmarks() -> str:
    """Distance maps, losses and an epoch."""
    maps, losses, epoch = (load(f"benchmark_boundary_{name}.json") for name in ("distance_maps", "loss", "epoch"))
    map_rows = [
        [
            f"{shape_of(row)}, {row['case']}",
            f"{row['scipy_ms'] / 1e3:.1f} s",
            f"{times(row['ratio_exact'], 3)} ({times(row['ratio_exact_one_thread'], 3)})",
            f"{times(row['ratio_clipped'], 3)} ({times(row['ratio_clipped_one_thread'], 3)})",
            f"{times(row['ratio_four_classes_to_whole'])} ({times(row['ratio_four_classes_to_one'])})",
            f"{row['largest_error_mm']:.0e} mm",
            f"{row['extra_memory_mb']:.0f} MB",
        ]
        for row in maps["rows"]
    ]
    map_header = ["Label, object", "scipy twice", "Exact", "Within 10 mm", "4 classes", "Error", "Extra memory"]
    ratios = {
        "Boundary / cross-entropy": "boundary",
        "from probabilities": "boundary_from_probabilities",
        "Boundary / MONAI's": "",
        "Hausdorff / MONAI's": "hausdorff_to_monai",
        "with the label's map": "hausdorff_with_map_to_monai",
        "GDL / MONAI's": "generalized_dice_to_monai",
    }
    loss_rows = [
        [
            f"{row['case']}, {shape_of(row)}",
            *(times(row[f"ratio_{k}"]) if k else f"1/{row['monai_boundary_over_ours']:.0f}" for k in ratios.values()),
        ]
        for row in losses["rows"]
    ]
    epochs = [
        f"One epoch of the bundle ({row['case']}) against the same without the boundary term and its maps: "
        f"{times(row['ratio_boundary'], 3)} (goal 1.01x); with the Hausdorff loss {times(row['ratio_hausdorff'])}."
        for row in epoch["rows"]
    ]
    return paragraphs(
        markdown_table(map_header, map_rows),
        "Goals: 197 x 233 x 189 exact at most 0.3x, within 10 mm at most 0.1x; 512 x 512 x 200 exact at most 0.15x, "
        "within 10 mm at most 0.05x; at most 350 MB beyond the result; four classes at most 2x one.",
        markdown_table(["Input", *ratios], loss_rows),
        "Goals, 3D with two classes: at most 0.6x of cross-entropy, 1/50 of MONAI's boundary loss, 1/3 of MONAI's "
        "Hausdorff loss.",
        "\n".join(epochs),
        measured_by(maps, losses, epoch),
    )


def constraint_benchmarks() -> str:
    """Time and memory of the constraint losses, of the formulations, and of an epoch."""
    loss, epoch = load("benchmark_constraint_loss.json"), load("benchmark_constraint_epoch.json")
    keys = ("ratio_from_probabilities", "ratio_from_logits", "ratio_size_alone", "peak_memory_over_probabilities")
    header = ["Constraints", "Input", "From probabilities", "From logits", "Size alone", "Peak memory"]
    rows = [[row["case"], shape_of(row), *(times(row[k]) for k in keys)] for row in loss["rows"] if "case" in row]
    costs = [row for row in loss["rows"] if "formulation" in row]
    counts = list(costs[0]["ms_by_constraints"])
    cells = [[row["formulation"], *(f"{1e3 * row['ms_by_constraints'][n]:.0f}" for n in counts)] for row in costs]
    return paragraphs(
        markdown_table(header, rows),
        "Goal: at most 0.6x from probabilities.",
        markdown_table(["Microseconds for so many constraints", *counts], cells),
        markdown_table(
            ["One epoch of the bundle", "Against cross-entropy on full labels"],
            [[row["case"], times(row["ratio"], 3)] for row in epoch["rows"]],
        ),
        "Goals: log-barrier at most 1.02x, Lagrangians at most 1.10x, proposals at most 1.5x.",
        measured_by(loss, epoch),
    )


def learned_benchmarks() -> str:
    """Steps of augmentation that learns, against plain ones."""
    steps, saflex = load("benchmark_hypergradient_step.json"), load("benchmark_saflex_step.json")
    rows = [[row["case"], times(row["ratio"]), times(row["memory_ratio"])] for row in steps["rows"]]
    return paragraphs(
        markdown_table(["A step with a hypergradient, against a plain one", "Time", "Memory"], rows),
        "Goals: exact at most 4.5x and 2.2x, differences at most 3.3x and 1.4x.",
        markdown_table(
            ["A step of SAFLEX, against the same batches as they are", "Time"],
            [[row["case"], times(row["ratio"])] for row in saflex["rows"]],
        ),
        "Goal: an epoch, loading and augmenting included, at most 1.4x.",
        measured_by(steps, saflex),
    )


def end_to_end_benchmarks() -> str:
    """A step with generated pairs, against plain ones."""
    steps = load("benchmark_end_to_end_step.json")
    rows = [
        [
            f"{shape_of(row)}, batch {row['batch']}, {row['case']}",
            times(row["ratio"]),
            times(row["memory_ratio"]),
            f"{row['seconds_per_1000']:.0f} s",
        ]
        for row in steps["rows"]
    ]
    return paragraphs(
        markdown_table(["A step, against one of the segmentation and one of the GAN", "Time", "Memory", "1000"], rows),
        "Goals: three levels at most 3x and 2x.",
        measured_by(steps),
    )


def lookahead_benchmarks() -> str:
    """An adversarial update, against a supervised step."""
    steps = load("benchmark_lookahead_step.json")
    rows = [
        [f"{shape_of(row)}, batch {row['batch']}", times(row["ratio"]), times(row["memory_ratio"])]
        for row in steps["rows"]
    ]
    return paragraphs(
        markdown_table(["An adversarial update, against a supervised step", "Time", "Memory"], rows),
        "Goals: at most 2.5x and 2x.",
        measured_by(steps),
    )


def curriculum_benchmarks() -> str:
    """An epoch with regressed bounds, against labels alone."""
    found = load("benchmark_curriculum_step.json")
    rows = [[row["case"], times(row["ratio"], 3)] for row in found["rows"]]
    goal = "Goal: regressed bounds at most 1.05x."
    return paragraphs(markdown_table(["An epoch with as many images", "Time"], rows), goal, measured_by(found))


def inference_benchmarks() -> str:
    """Peak memory and time of one large volume, against MONAI's stock chain."""
    found = load("benchmark_inference_memory.json")
    stock = {(row["spacing_mm"], row["classes"]): row for row in found["rows"] if row["chain"] == "stock"}
    rows = []
    for row in (row for row in found["rows"] if row["chain"] == "ours"):
        other = stock.get((row["spacing_mm"], row["classes"]))
        ratios = ["", ""] if other is None else [times(row[key] / other[key]) for key in ("peak_gb", "seconds")]
        voxels = f"{row['spacing_mm']:g} mm" if row["spacing_mm"] else "the file's"
        rows.append([shape_of(row), voxels, str(row["classes"]), f"{row['peak_gb']:.2f} GB", *ratios])
    goal = "Goals: 3 classes at most 3 GB, 20 at most 6 GB; at most 0.5x of the stock chain's peak, no slower."
    header = ["Volume", "Voxels of the network", "Classes", "Peak memory", "of the stock chain's", "Time"]
    return paragraphs(markdown_table(header, rows), goal, measured_by(found))


def crf_benchmarks() -> str:
    """The dense CRF against pydensecrf2, and its loss against a step."""
    found = load("benchmark_dense_crf_step.json")
    fields = [row for row in found["rows"] if row["case"] == "mean field"]
    rows = [
        [shape_of(row), times(row["ratio"]), f"{row['same_labels']:.4%}", f"{row['extra_gib']:.2f} GiB"]
        for row in fields
        if "ratio" in row
    ]
    [loss] = [row for row in found["rows"] if row["case"] == "loss"]
    return paragraphs(
        markdown_table(["Mean field, 5 iterations", "Time, of pydensecrf2", "Same labels", "Memory"], rows),
        f"`DenseCRFLoss`, {shape_of(loss)}, forward and backward, of a step of a U-Net: {times(loss['ratio'])}.",
        "Goals: at most 4x and 8x, 99.9 % of the labels, 2 GB, and 1x.",
        measured_by(found),
    )


def box_benchmarks() -> str:
    """Time and memory of the losses and of an epoch."""
    loss, epoch = load("benchmark_box_prior_loss.json"), load("benchmark_box_prior_epoch.json")
    keys = ("ratio_from_logits", "ratio_from_probabilities", "peak_memory_over_probabilities")
    header = ["Boxes", "Input", "Time, from logits", "Time, from probabilities", "Peak memory"]
    goals = {
        "1.2x in time from probabilities": ("ratio_from_probabilities", 1.2),
        "1.2x in time from logits": ("ratio_from_logits", 1.2),
        "2x in memory": ("peak_memory_over_probabilities", 2),
    }
    met = {name: sum(row[key] <= most for row in loss["rows"]) for name, (key, most) in goals.items()}
    counted = "; ".join(f"at most {name}: {count} of {len(loss['rows'])}" for name, count in met.items())
    epochs = [f"One epoch of the bundle ({row['case']}): {times(row['ratio'], 3)}" for row in epoch["rows"]]
    return paragraphs(
        markdown_table(header, [[row["case"], shape_of(row), *(times(row[k]) for k in keys)] for row in loss["rows"]]),
        f"Goals and how many of these cases meet them: {counted}.",
        "\n".join(f"{text} (goal 1.03x)." for text in epochs),
        measured_by(loss, epoch),
    )


def update_metadata(bundle: str, *, check: bool) -> bool:
    """Write the scores of the shipped weights on the test list into the bundle's metadata; whether it changes."""
    summary = load(SHIPPED[bundle].file)["summary"]
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


def all_tables() -> dict[str, dict[str, str]]:
    """Text of each table, by page and name."""
    pages = {
        "box_prior": {"results": scores(BOXES), "goal": goal(BOXES), **filling()},
        "size_constraint": {"results": scores(SIZES), "goal": goal(SIZES), **acdc()},
        "log_barrier": {"results": scores(BARRIER), "goal": goal(BARRIER), **toy()},
        "boundary_loss": {"results": scores(BOUNDARY), "lesions": lesions(), "alpha": alphas(), "acdc": heart()},
    }
    tables = {f"bundles/{name}/docs/README.md": page | {"training": training(name)} for name, page in pages.items()}
    for name in ("bilevel_augmentation", "saflex"):
        tables[f"bundles/{name}/docs/README.md"] = {"learned": learned(told=False)}
    tables["bundles/e2e_augmentation/docs/README.md"] = {
        "end_to_end": end_to_end(told=False),
        "volumes": scores(VOLUMES),
    }
    tables["bundles/box_prior/docs/README.md"]["deepcut"] = deepcut()
    tables["bundles/size_constraint/docs/README.md"]["partial_crf"] = partial_crf()
    tables["bundles/lookahead_adversarial/docs/README.md"] = {"lookahead": lookahead()}
    tables["bundles/curriculum_size/docs/README.md"] = {
        "curriculum": curriculum(),
        "volumes": scores(FEW_SEGMENTED),
    }
    tables["docs/augmentation.md"] = {
        "study": learned(told=True),
        "more": learned_more(),
        "end_to_end": end_to_end(told=True),
    }
    benchmarks = {"boundary": boundary_benchmarks(), "box_prior": box_benchmarks()}
    benchmarks |= {"constraints": constraint_benchmarks(), "learned": learned_benchmarks()}
    benchmarks |= {"end_to_end": end_to_end_benchmarks(), "lookahead": lookahead_benchmarks()}
    benchmarks |= {"dense_crf": crf_benchmarks(), "curriculum": curriculum_benchmarks()}
    benchmarks |= {"inference": inference_benchmarks()}
    return tables | {"docs/benchmarks.md": benchmarks}


def main() -> int:
    """Write or check all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a table would change")
    args = parser.parse_args()
    changed = [
        name
        for page, tables in all_tables().items()
        for name, text in tables.items()
        if update_markdown(ROOT / page, name, text, check=args.check)
    ]
    changed += [f"metadata of {bundle}" for bundle in SHIPPED if update_metadata(bundle, check=args.check)]
    sys.stdout.write(f"{'stale' if args.check else 'written'}: {', '.join(changed) or 'nothing'}\n")
    return int(args.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
