"""The page of an evaluation: that of an inference with scores, a picture, and the command that made them.

The command is `report`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medconstraints.boxes import label_to_boxes, map_boxes
from medconstraints.data.datalist_sections import read_class_names
from medconstraints.reports.datalist import Entry, find_predictions, read_section
from medconstraints.reports.inference import flags_of
from medconstraints.reports.montage import ReportCase, montage
from medconstraints.reports.page import Row, pages_folder, write_page
from medconstraints.reports.tables import read_results
from medconstraints.reports.volumes import read_image, read_labels
from medconstraints.volumes.facts import read_facts

__all__ = ["choose_cases", "write_report"]

# Heading, key and digits of what is shown of each structure.
MEASURES = (
    ("Dice", "dice", 3),
    ("HD95 (mm)", "hd95_mm", 2),
    ("prediction (ml)", "volume_ml_prediction", 2),
    ("reference (ml)", "volume_ml_reference", 2),
)
HD95 = (
    "HD95 is the larger of the two directed 95th percentiles of the surface distance; it is undefined where a mask is "
    "empty. Last row: mean (sample standard deviation) over the volumes scored."
)
CHOICE = "The large picture shows volumes spread from the worst to the best mean Dice."


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
    radiological: bool = True,
    viewer: bool = True,
    overwrite: bool = False,
) -> str:
    """Write one page about all scored volumes, a viewer for each, and a picture of a few.

    Args:
        datalist: JSON list with {image, label} entries.
        section: of the list, such as test.
        predictions: folder with the saved masks.
        results: JSON file of the command evaluation.
        output: HTML file to write; the viewers get a folder beside it, see `pages_folder`.
        picture: PNG file to write and embed.
        boxes_axis: axis of R, A, S across which every slice has its boxes; None for one box per component.
        title: heading of the page; None for the names of the list and the section.
        notes: sentences for the page.
        max_cases: rows of the picture.
        base_dir: folder the list's paths start from; None for the list's own.
        suffix: what was appended to the image's name.
        radiological: show the patient's right on the left.
        viewer: write a viewer for each volume, of up to some 10 MB.
        overwrite: replace existing outputs.

    Returns:
        The paths of the picture and of the page.

    Raises:
        FileExistsError: an output exists and `overwrite` is False.
        FileNotFoundError: a file is missing.
        ValueError: `results` do not hold the volumes of this section, or see `montage`.
    """
    page = Path(output)
    for name, file in (("output", page), ("output", pages_folder(page)), ("picture", Path(picture))):
        if file.exists() and not overwrite:
            raise FileExistsError(f"--{name}: {file} exists; choose another name or add --overwrite")
    scores = read_results(results)
    entries = read_section(datalist, section, base_dir=base_dir)
    masks = find_predictions(entries, predictions, suffix=suffix)
    cases = choose_cases(entries, masks, scores, slice_axis=boxes_axis, max_cases=max_cases)
    names = read_class_names(datalist)
    drawn = montage(
        cases,
        picture,
        axis=boxes_axis,
        max_cases=max_cases,
        class_names=names,
        radiological=radiological,
        overwrite=overwrite,
    )
    structures = scores["summary"]
    write_page(
        page,
        [_row(entry, masks[entry.name], scores, names) for entry in entries],
        title=title or f"{Path(datalist).stem}, {section}",
        columns=[f"{structure} {measure}" for structure in structures for measure, _, _ in MEASURES],
        notes=[*notes, HD95, CHOICE],
        summary=[cell for row in structures.values() for cell in _summary(row)],
        measured={
            f"{structure} {measure}": [
                case[structure][key] for case in scores["cases"] if case.get(structure, {}).get(key) is not None
            ]
            for structure in structures
            for measure, key, _ in MEASURES[:3]
        },
        made=_made(scores),
        picture_png=drawn.read_bytes(),
        radiological=radiological,
        viewer=viewer,
    )
    return f"{picture}\n{output}"


def _row(entry: Entry, mask: Path | None, results: Mapping[str, Any], names: Mapping[int, str]) -> Row:
    case = next(case for case in results["cases"] if case["name"] == entry.name)
    scored = [case.get(structure, {}) for structure in results["summary"]]
    return Row(
        name=entry.name,
        state="failed" if "reason" in case else "scored",
        image=entry.image,
        mask=mask,
        reference=entry.label,
        place=entry.name,
        cells=[] if "reason" in case else [_number(row.get(key), n) for row in scored for _, key, n in MEASURES],
        reason=case.get("reason", ""),
        flags=(facts := read_facts(mask)).get("flags", flags_of(facts)) if mask else [],
        class_names=names,
    )


def _summary(row: Mapping[str, Any]) -> list[str]:
    undefined = f", {row['hd95_undefined']} undefined" if row["hd95_undefined"] else ""
    return [_mean_sd(row, "dice", 3), _mean_sd(row, "hd95_mm", 2) + undefined, "", ""]


def _made(results: Mapping[str, Any]) -> dict[str, str]:
    made = results["provenance"]
    settings = {"Settings of the run": json.dumps(results["settings"], indent=1)} if results.get("settings") else {}
    return {
        "Command": shlex.join(made["command"]),
        "Finished": f"{made['date']}, {made['seconds']:.1f} s of scoring",
        "Versions": ", ".join(f"{name} {number}" for name, number in made["versions"].items()),
        **settings,
    }


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
