"""A report of a run as one small HTML page: scores per volume, notes, a picture, and the command that made them.

The page stands in page.html. The command is `report`.
"""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medconstraints.boxes import label_to_boxes, map_boxes
from medconstraints.reports.datalist import Entry, find_predictions, read_class_names, read_section
from medconstraints.reports.montage import ReportCase, montage
from medconstraints.reports.render import render
from medconstraints.reports.tables import read_results
from medconstraints.reports.volumes import read_image, read_labels

__all__ = ["choose_cases", "render_page", "write_report"]

# Heading, key and digits of what is shown of each structure.
MEASURES = (
    ("Dice", "dice", 3),
    ("HD95 (mm)", "hd95_mm", 2),
    ("Prediction (ml)", "volume_ml_prediction", 2),
    ("Reference (ml)", "volume_ml_reference", 2),
)
CAPTION = (
    "{} of {} volumes scored. HD95 is the larger of the two directed 95th percentiles of the surface distance; it is "
    "undefined where a mask is empty. Last row: mean (sample standard deviation) over the volumes."
)
CHOICE = "The pictures show volumes spread from the worst to the best mean Dice."


def write_report(
    *,
    datalist: str | Path,
    section: str,
    predictions: str | Path,
    results: str | Path,
    output: str | Path,
    picture: str | Path,
    boxes_axis: int | None = None,
    title: str | None = None,
    notes: Sequence[str] = (),
    max_cases: int = 4,
    base_dir: str | Path | None = None,
    suffix: str = "_seg",
    overwrite: bool = False,
) -> str:
    """Draw a few scored volumes, and write one page about all of them, self-contained and without scripts.

    Args:
        datalist: JSON list with {image, label} entries.
        section: of the list, such as test.
        predictions: folder with the saved masks.
        results: JSON file of the command evaluation.
        output: HTML file to write.
        picture: PNG file to write and embed.
        boxes_axis: axis of R, A, S across which every slice has its boxes; None for one box per component.
        title: heading of the page; None for the names of the list and the section.
        notes: sentences for the page.
        max_cases: rows of the picture.
        base_dir: folder the list's paths start from; None for the list's own.
        suffix: what was appended to the image's name.
        overwrite: replace existing outputs.

    Returns:
        The paths of the picture and of the page.

    Raises:
        FileExistsError: an output exists and `overwrite` is False.
        FileNotFoundError: a file is missing.
        ValueError: `results` do not hold the volumes of this section, or see `montage`.
    """
    for name, file in (("output", output), ("picture", picture)):
        if Path(file).exists() and not overwrite:
            raise FileExistsError(f"--{name}: {file} exists; choose another name or add --overwrite")
    scores = read_results(results)
    entries = read_section(datalist, section, base_dir=base_dir)
    masks = find_predictions(entries, predictions, suffix=suffix)
    cases = choose_cases(entries, masks, scores, slice_axis=boxes_axis, max_cases=max_cases)
    names = read_class_names(datalist)
    drawn = montage(cases, picture, axis=boxes_axis, max_cases=max_cases, class_names=names, overwrite=overwrite)
    title = title or f"{Path(datalist).stem}, {section}"
    page = render_page(scores, title=title, notes=[*notes, CHOICE], picture_png=drawn.read_bytes())
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(page, encoding="utf-8")
    return f"{picture}\n{output}"


def render_page(
    results: Mapping[str, Any], *, title: str, notes: Sequence[str] = (), picture_png: bytes | None = None
) -> str:
    """The page of what `evaluate_predictions` returned: a row per volume, a summary row, command, time and versions."""
    rows: list[dict[str, Any]] = []
    for case in results["cases"]:
        scores = [case.get(name, {}) for name in results["summary"]]
        cells = [_number(score.get(key), digits) for score in scores for _, key, digits in MEASURES]
        rows.append({"name": case["name"], "reason": case.get("reason"), "cells": cells})
    summary = []
    for row in results["summary"].values():
        undefined = f", {row['hd95_undefined']} undefined" if row["hd95_undefined"] else ""
        summary += [_mean_sd(row, "dice", 3), _mean_sd(row, "hd95_mm", 2) + undefined, "", ""]
    return render(
        "page.html",
        title=title,
        notes=notes,
        caption=CAPTION.format(sum(row["reason"] is None for row in rows), len(rows)),
        structures=list(results["summary"]),
        measures=[measure for measure, _, _ in MEASURES],
        rows=rows,
        summary=summary,
        picture=None if picture_png is None else base64.b64encode(picture_png).decode("ascii"),
        command=shlex.join(results["provenance"]["command"]),
        provenance=results["provenance"],
        settings=json.dumps(results["settings"], indent=1) if results.get("settings") else None,
    )


def choose_cases(
    entries: Sequence[Entry],
    predictions: Mapping[str, Path | None],
    results: Mapping[str, Any],
    *,
    slice_axis: int | None = None,
    max_cases: int = 4,
) -> list[ReportCase]:
    """Up to `max_cases` volumes, spread evenly from the worst to the best mean Dice, unscored ones first.

    Boxes are those of the reference's connected components, or of every slice across `slice_axis`:
    0, 1, 2 for sagittal, coronal, axial slices, as in training after orientation to RAS.

    Raises:
        ValueError: when `results` do not hold the volumes.
    """
    scored = {case["name"]: case for case in results["cases"]}
    if unknown := [entry.name for entry in entries if entry.name not in scored]:
        raise ValueError(f"results: no row for {unknown[:5]}; score this section of this list first.")
    dice = {
        name: {structure: case[structure]["dice"] for structure in results["summary"] if structure in case}
        for name, case in scored.items()
    }
    ranked = sorted(entries, key=lambda entry: np.mean(list(dice[entry.name].values()) or [-1.0]))
    chosen = np.unique(np.linspace(0, len(ranked) - 1, min(max_cases, len(ranked))).round().astype(int))
    return [
        ReportCase(
            name=entry.name,
            image=entry.image,
            prediction=predictions[entry.name],
            reference=entry.label,
            boxes=_boxes(entry, slice_axis),
            dice=dice[entry.name] or None,
        )
        for entry in (ranked[position] for position in chosen)
    ]


def _boxes(entry: Entry, slice_axis: int | None) -> Any:
    """Boxes of a reference, drawn in RAS as the training does, in voxels of the image as it is stored."""
    labels = read_labels(entry.label, "reference").canonical()
    boxes = label_to_boxes(labels.data, slice_axis=slice_axis)
    return map_boxes(boxes, labels.affine, read_image(entry.image).affine, tolerance=0.01)


def _number(value: float | None, digits: int) -> str:
    return "undefined" if value is None else f"{value:.{digits}f}"


def _mean_sd(summary: Mapping[str, Any], key: str, digits: int) -> str:
    mean, sd = summary[f"{key}_mean"], summary[f"{key}_sd"]
    return _number(mean, digits) + ("" if mean is None or sd is None else f" ({sd:.{digits}f})")
