"""A report of a run as one small HTML page: scores per volume, notes, a picture, and the command that made them.

The page stands in page.html. The command is `report`.
"""

from __future__ import annotations

import base64
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from medconstraints.boxes import label_to_boxes, map_boxes
from medconstraints.reports.datalist import find_predictions, read_section
from medconstraints.reports.montage import ReportCase
from medconstraints.reports.volumes import read_image, read_labels

__all__ = ["build_cases", "write_report"]

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


def write_report(
    cases: Sequence[ReportCase],
    output_html: str | os.PathLike[str],
    *,
    title: str,
    results: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    montage_png: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write one self-contained HTML page: no scripts, nothing loaded from elsewhere, the picture inside it.

    Args:
        cases: their Dice fill the table when there are no `results`.
        output_html: the file to write.
        title: heading of the page.
        results: what `evaluate_predictions` returned: a row per volume, a summary row, command, time and versions.
        notes: a sentence each, shown as a list.
        montage_png: picture to embed, e.g. of `montage`; None = none.
        overwrite: replace an existing file.

    Returns:
        The path written.

    Raises:
        FileExistsError: when the file exists and `overwrite` is False.
        FileNotFoundError: for a missing picture.
        ValueError: when there are neither cases nor results.
    """
    output = Path(output_html)
    if output.exists() and not overwrite:
        raise FileExistsError(f"output_html: {output} exists; choose another name, or set overwrite.")
    if not cases and results is None:
        raise ValueError("cases: expected at least one case, or results, to report; got neither.")
    if montage_png is not None and not Path(montage_png).is_file():
        raise FileNotFoundError(f"montage_png: no file {montage_png}; draw it with medconstraints.reports.montage.")
    table = _table_of_cases(cases) if results is None else _table_of_results(results)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    page = environment.get_template("page.html").render(
        title=title,
        notes=notes,
        picture=None if montage_png is None else base64.b64encode(Path(montage_png).read_bytes()).decode("ascii"),
        provenance=None if results is None else results["provenance"],
        command=None if results is None else shlex.join(results["provenance"]["command"]),
        settings=json.dumps(results["settings"], indent=1) if results and results.get("settings") else None,
        **table,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    return output


def build_cases(
    datalist: str | os.PathLike[str],
    section: str,
    predictions_dir: str | os.PathLike[str],
    *,
    results: Mapping[str, Any],
    base_dir: str | os.PathLike[str] | None = None,
    suffix: str = "_seg",
    slice_axis: int | None = None,
    max_cases: int = 4,
) -> list[ReportCase]:
    """Up to `max_cases` volumes of a section, spread evenly from the worst to the best mean Dice, unscored ones first.

    Boxes are those of the reference's connected components, or of every slice across `slice_axis`:
    0, 1, 2 for sagittal, coronal, axial slices, as in training after orientation to RAS.

    Raises:
        FileNotFoundError: see `evaluate_predictions`.
        ValueError: when `results` do not hold the volumes of this section.
    """
    entries = read_section(datalist, section, base_dir=base_dir)
    predictions = find_predictions(entries, predictions_dir, suffix=suffix)
    scored = {case["name"]: case for case in results["cases"]}
    if unknown := [entry.name for entry in entries if entry.name not in scored]:
        raise ValueError(
            f"results: no row for {unknown[:5]} of section {section!r}; score this section of this list first."
        )
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
            boxes=_boxes(entry.label, entry.image, slice_axis),
            dice=dice[entry.name] or None,
        )
        for entry in (ranked[position] for position in chosen)
    ]


def _table_of_results(results: Mapping[str, Any]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for case in results["cases"]:
        scores = [case.get(name, {}) for name in results["summary"]]
        cells = [_number(score.get(key), digits) for score in scores for _, key, digits in MEASURES]
        rows.append({"name": case["name"], "reason": case.get("reason"), "cells": cells})
    summary = []
    for row in results["summary"].values():
        undefined = f", {row['hd95_undefined']} undefined" if row["hd95_undefined"] else ""
        summary += [_mean_sd(row, "dice", 3), _mean_sd(row, "hd95_mm", 2) + undefined, "", ""]
    scored = sum(row["reason"] is None for row in rows)
    return {
        "caption": CAPTION.format(scored, len(rows)),
        "structures": list(results["summary"]),
        "measures": [measure for measure, _, _ in MEASURES],
        "rows": rows,
        "summary": summary,
    }


def _table_of_cases(cases: Sequence[ReportCase]) -> dict[str, Any]:
    structures = list(dict.fromkeys(name for case in cases for name in case.dice or {}))
    rows = []
    for case in cases:
        dice = case.dice or {}
        cells = [f"{dice[name]:.3f}" if name in dice else "-" for name in structures]
        rows.append({"name": case.name, "reason": None, "cells": cells})
    return {"caption": None, "structures": structures, "measures": ["Dice"], "rows": rows, "summary": None}


def _number(value: float | None, digits: int) -> str:
    return "undefined" if value is None else f"{value:.{digits}f}"


def _mean_sd(summary: Mapping[str, Any], key: str, digits: int) -> str:
    mean, sd = summary[f"{key}_mean"], summary[f"{key}_sd"]
    return _number(mean, digits) + ("" if mean is None or sd is None else f" ({sd:.{digits}f})")


def _boxes(reference: Path, image: Path, slice_axis: int | None) -> Any:
    """Boxes of a reference, drawn in RAS as the training does, in voxels of the image as it is stored."""
    labels = read_labels(reference, "reference").canonical()
    boxes = label_to_boxes(labels.data, slice_axis=slice_axis)
    return map_boxes(boxes, labels.affine, read_image(image).affine, tolerance=0.01)
