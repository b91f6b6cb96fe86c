"""Commands that read and write files around functions of the package; `python -m medconstraints` runs them.

Each imports what it needs when it runs: a table is not to wait for torch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "check_dataset",
    "curves",
    "evaluation",
    "fit_common_bounds",
    "fit_filling",
    "make_datalist",
    "report",
    "tables",
]


def check_dataset(*, manifest: str, root: str, headers_only: bool = False) -> int:
    """Compare a local copy of a data set with its manifest; one line per problem, exit status 1 if there are any.

    Args:
        manifest: file of data_manifests.
        root: the folder that the layout's patterns start from.
        headers_only: do not read the voxels of the labels.
    """
    from medconstraints.data import manifests

    described = manifests.load_manifest(manifest)
    problems = manifests.check_dataset(described, root, read_labels=not headers_only)
    sys.stdout.write("".join(f"{problem}\n" for problem in problems) or f"{described['name']}: as described\n")
    return int(bool(problems))


def make_datalist(
    *,
    manifest: str,
    root: str,
    output: str,
    fractions: Sequence[float] | None = None,
    split: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> str:
    """Write a datalist of a data set, divided by patient.

    Args:
        manifest: file of data_manifests.
        root: the folder that the layout's patterns start from.
        output: JSON file to write.
        fractions: shares of training, validation and test, such as "[0.8, 0.1, 0.1]".
        split: instead, a split of the manifest.
        seed: of the shuffle of the patients.
        overwrite: replace an existing output.
    """
    from medconstraints.data import manifests

    _check_absent(overwrite, output=output)
    lists = manifests.make_datalist(
        manifests.load_manifest(manifest), root, seed=seed, fractions=fractions, split=split
    )
    Path(output).write_text(json.dumps(lists, indent=1) + "\n", encoding="utf-8")
    return output


def fit_common_bounds(
    *,
    datalist: str,
    num_classes: int,
    output: str,
    section: str = "training",
    cases: int = 1,
    patients: Sequence[str] | None = None,
    classes: Sequence[int] | None = None,
    slice_axis: int | None = None,
    spacing_mm: Sequence[float] = (-1.0,),
    spatial_dims: int = 3,
    factors: Sequence[float] = (0.9, 1.1),
    overwrite: bool = False,
) -> str:
    """Fit one pair of size bounds for all images to a few labels, and write the file that `common_bounds` takes.

    Args:
        datalist: list with segmented cases; entries without label are passed over.
        num_classes: of the labels, with the background.
        output: JSON file to write.
        section: of the list.
        cases: labels to use, evenly spread over the section.
        patients: take all cases of these patients (entry "patient" of the list) instead.
        classes: classes of the training, where not all; in its order.
        slice_axis: count in slices across this axis (after orientation to RAS).
        spacing_mm: resample as the training does; -1 keeps an axis.
        spatial_dims: 2 for lists of 2D images.
        factors: the smallest size is multiplied by the first, the largest by the second.
        overwrite: replace an existing output.
    """
    from medconstraints.checks import label_name
    from medconstraints.transforms import common_bounds

    _check_absent(overwrite, output=output)
    if len(factors) != 2:
        raise ValueError(f"--factors: expected two numbers, got {list(factors)}")
    labels = _read_labels(
        datalist, section, cases, patients, num_classes=num_classes, spacing_mm=spacing_mm, spatial_dims=spatial_dims
    )
    widened = (factors[0], factors[1])
    bounds = common_bounds.fit_common_bounds(
        labels, num_classes=num_classes, slice_axis=slice_axis, factors=widened, classes=classes
    )
    names = [label_name(label, "label") for label in labels]
    common_bounds.save_common_bounds(output, bounds, cases=names, factors=widened, overwrite=overwrite)
    return json.dumps(bounds)


def fit_filling(
    *,
    datalist: str,
    num_classes: int,
    section: str = "training",
    cases: int = 10,
    slice_axis: int | None = None,
    mode: str = "class",
    quantiles: Sequence[float] = (0.05, 0.95),
) -> str:
    """Fit how much of its boxes an organ fills, as `--filling` of a bundle takes it.

    Args:
        datalist: list with segmented cases; entries without label are passed over.
        num_classes: with the background.
        section: of the list.
        cases: labels to use, evenly spread over the section.
        slice_axis: flat boxes across this axis (after orientation to RAS).
        mode: "class" or "component", the `box_mode` of the training.
        quantiles: lower and upper quantile over the boxes.
    """
    from medconstraints import boxes

    if len(quantiles) != 2:
        raise ValueError(f"--quantiles: expected two numbers, got {list(quantiles)}")
    labels = _read_labels(datalist, section, cases, None, num_classes=num_classes)
    filling = boxes.fit_filling(
        labels, num_classes=num_classes, mode=mode, slice_axis=slice_axis, quantiles=(quantiles[0], quantiles[1])
    )
    return json.dumps(filling)


def evaluation(
    *,
    datalist: str,
    section: str,
    predictions: str,
    structures: Mapping[str, Sequence[int]],
    output: str,
    base_dir: str | None = None,
    suffix: str = "_seg",
    overwrite: bool = False,
) -> str:
    """Score a folder of masks against their references: Dice, HD95 and volumes as JSON, with the settings of the run.

    Args:
        datalist: JSON list with {image, label} entries.
        section: of the list, such as test.
        predictions: folder with the saved masks.
        structures: names and the label values that are united, such as '{"organ": [1], "both": [1, 2]}'.
        output: JSON file to write.
        base_dir: folder the list's paths start from; None for the list's own.
        suffix: what was appended to the image's name.
        overwrite: replace an existing output.
    """
    from medconstraints.reports.evaluation import evaluate_predictions, format_summary, write_results

    _check_absent(overwrite, output=output)
    results = evaluate_predictions(
        datalist, section, predictions, structures=structures, base_dir=base_dir, suffix=suffix
    )
    write_results(results, output, overwrite=overwrite)
    return format_summary(results).rstrip("\n")


def report(
    *,
    datalist: str,
    section: str,
    predictions: str,
    results: str,
    output: str,
    montage: str,
    boxes_axis: int | None = None,
    title: str | None = None,
    notes: Sequence[str] = (),
    max_cases: int = 4,
    base_dir: str | None = None,
    suffix: str = "_seg",
    overwrite: bool = False,
) -> str:
    """Draw a few scored volumes and write a page about all of them.

    Args:
        datalist: JSON list with {image, label} entries.
        section: of the list, such as test.
        predictions: folder with the saved masks.
        results: JSON file of the command evaluation.
        output: HTML file to write.
        montage: PNG file to write and embed.
        boxes_axis: axis of R, A, S across which every slice has its boxes; None for one box per component.
        title: heading of the page; None for the names of the list and the section.
        notes: sentences for the page, one or '["...", "..."]'.
        max_cases: rows of the picture.
        base_dir: folder the list's paths start from; None for the list's own.
        suffix: what was appended to the image's name.
        overwrite: replace existing outputs.
    """
    from medconstraints.reports.datalist import read_class_names
    from medconstraints.reports.montage import montage as draw
    from medconstraints.reports.page import build_cases, write_report
    from medconstraints.reports.tables import read_results

    _check_absent(overwrite, output=output, montage=montage)
    scores = read_results(results)
    cases = build_cases(
        datalist,
        section,
        predictions,
        results=scores,
        base_dir=base_dir,
        suffix=suffix,
        slice_axis=boxes_axis,
        max_cases=max_cases,
    )
    names = read_class_names(datalist)
    picture = draw(cases, montage, axis=boxes_axis, max_cases=max_cases, class_names=names, overwrite=overwrite)
    page = write_report(
        cases,
        output,
        title=title or f"{Path(datalist).stem}, {section}",
        results=scores,
        notes=[*notes, "The pictures show volumes spread from the worst to the best mean Dice."],
        montage_png=picture,
        overwrite=overwrite,
    )
    return f"{picture}\n{page}"


def curves(*, runs: Mapping[str, str], output: str, picture: str | None = None, last: int = 10) -> str:
    """Summarise the last epochs of several runs, and draw all epochs.

    Args:
        runs: names and CSV files of ConstraintMetricsHandler, such as '{"Log-barrier": "runs/a/validation.csv"}'.
        output: JSON file to write.
        picture: PNG file to write.
        last: epochs of the summary.
    """
    from medconstraints.reports.curves import draw_curves, read_curves

    content = read_curves(runs, last=last)
    content["date"] = time.strftime("%Y-%m-%d")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if picture is not None:
        draw_curves(content, picture)
    lines = []
    for name, row in content["summary"].items():
        shown = {key: round(value, 4) for key, value in row.items() if isinstance(value, float)}
        lines.append(f"{name}: {shown}")
    return "\n".join(lines)


def tables(*, markdown: str, name: str, rows: Mapping[str, str], check: bool = False) -> int:
    """Put a table of results between the comments table:NAME and /table:NAME of a Markdown file.

    Args:
        markdown: the file.
        name: NAME of the markers.
        rows: labels of the rows and JSON files of the command evaluation, such as '{"Full labels": "full.json"}'.
        check: write nothing; exit status 1 if the file would change.
    """
    from medconstraints.reports.tables import results_table, update_markdown

    changed = update_markdown(markdown, name, results_table(rows), check=check)
    state = ("would change" if check else "updated") if changed else "up to date"
    sys.stdout.write(f"{markdown}: table {name} {state}\n")
    return int(changed and check)


def _check_absent(overwrite: bool, **files: str) -> None:
    """Refuse to replace a file, before the work and not after it."""
    for option, file in files.items():
        if Path(file).exists() and not overwrite:
            raise FileExistsError(f"--{option}: {file} exists; choose another name or add --overwrite")


def _read_labels(datalist: str, section: str, cases: int, patients: Sequence[str] | None, **how: Any) -> list[Any]:
    """Labels of a few segmented cases, as the training reads them."""
    from monai.transforms import Compose

    from medconstraints.data.datalist_sections import choose_segmented
    from medconstraints.transforms.chains import reading_transforms

    read = Compose(reading_transforms(**how))
    try:
        return [read(item)["label"] for item in choose_segmented(datalist, section, cases=cases, patients=patients)]
    except RuntimeError as error:  # names a transform; its cause names the file
        raise ValueError(error.__cause__ or error) from error
