"""A report of a run as one small HTML page: scores per volume, notes, a picture, and the command that made them.

`python -m medconstraints.reports.html --datalist D --section test --predictions DIR --results results.json
--output DIR/report.html --montage DIR/montage.png`
"""

import argparse
import base64
import html
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.orientations import io_orientation

from medconstraints.reports.datalist import find_predictions, read_class_names, read_section
from medconstraints.reports.montage import ReportCase, montage
from medconstraints.reports.volumes import read_image, read_labels_on

__all__ = ["build_cases", "write_report"]

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --page: #ffffff; --line: #c9d1d9; --quiet: #57606a; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --page: #0d1117; --line: #3d444d; --quiet: #9198a1; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption, figcaption { text-align: left; color: var(--quiet); padding: .3rem 0; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th[scope=row], thead tr:first-child th:first-child { text-align: left; }
tfoot th, tfoot td { border-top: 2px solid var(--line); font-weight: bold; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
code { overflow-wrap: anywhere; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_MEASURES = (
    ("Dice", "dice", 3),
    ("HD95 (mm)", "hd95_mm", 2),
    ("Prediction (ml)", "volume_ml_prediction", 2),
    ("Reference (ml)", "volume_ml_reference", 2),
)


def _number(value: float | None, digits: int) -> str:
    return "undefined" if value is None else f"{value:.{digits}f}"


def _mean_sd(summary: Mapping[str, Any], key: str, digits: int) -> str:
    mean, sd = summary[f"{key}_mean"], summary[f"{key}_sd"]
    return _number(mean, digits) + ("" if mean is None or sd is None else f" ({sd:.{digits}f})")


def _head(structures: Sequence[str], measures: Sequence[str]) -> str:
    groups = "".join(f'<th scope="colgroup" colspan="{len(measures)}">{html.escape(name)}</th>' for name in structures)
    columns = "".join(f'<th scope="col">{html.escape(measure)}</th>' for measure in measures) * len(structures)
    if not structures:
        return '<thead>\n<tr><th scope="col">Volume</th></tr>\n</thead>'
    spans = "<colgroup><col></colgroup>" + f'<colgroup span="{len(measures)}"></colgroup>' * len(structures)
    rows = f'<tr><th scope="col" rowspan="2">Volume</th>{groups}</tr>\n<tr>{columns}</tr>'
    return f"{spans}\n<thead>\n{rows}\n</thead>"


def _row(name: str, cells: Sequence[str]) -> str:
    return (
        f'<tr><th scope="row">{html.escape(name)}</th>{"".join(f"<td>{html.escape(cell)}</td>" for cell in cells)}</tr>'
    )


def _results_table(results: Mapping[str, Any]) -> str:
    structures = list(results["summary"])
    rows = []
    for case in results["cases"]:
        if "reason" in case:
            name, reason = html.escape(case["name"]), html.escape(case["reason"])
            columns = len(structures) * len(_MEASURES)
            rows.append(f'<tr><th scope="row">{name}</th><td colspan="{columns}">{reason}</td></tr>')
        else:
            values = [_number(case[name][key], digits) for name in structures for _, key, digits in _MEASURES]
            rows.append(_row(case["name"], values))
    summary = []
    for name in structures:
        row = results["summary"][name]
        undefined = f", {row['hd95_undefined']} undefined" if row["hd95_undefined"] else ""
        summary += [_mean_sd(row, "dice", 3), _mean_sd(row, "hd95_mm", 2) + undefined, "", ""]
    scored = sum("reason" not in case for case in results["cases"])
    caption = (
        f"{scored} of {len(rows)} volumes scored. HD95 is the larger of the two directed 95th percentiles of the "
        "surface distance; it is undefined where a mask is empty. Last row: mean (sample standard deviation) over the "
        "volumes."
    )
    return "\n".join(
        [
            '<div class="wide">\n<table>',
            f"<caption>{html.escape(caption)}</caption>",
            _head(structures, [measure for measure, _, _ in _MEASURES]),
            "<tbody>",
            *rows,
            "</tbody>",
            f"<tfoot>\n{_row('Mean (sd)', summary)}\n</tfoot>",
            "</table>\n</div>",
        ]
    )


def _cases_table(cases: Sequence[ReportCase]) -> str:
    structures = list(dict.fromkeys(name for case in cases for name in case.dice or {}))
    rows = [
        _row(case.name, [f"{case.dice[name]:.3f}" if case.dice and name in case.dice else "–" for name in structures])  # noqa: RUF001
        for case in cases
    ]
    head = _head(structures, ["Dice"])
    return "\n".join(['<div class="wide">\n<table>', head, "<tbody>", *rows, "</tbody>", "</table>\n</div>"])


def _picture(montage_png: Path) -> str:
    if not montage_png.is_file():
        raise FileNotFoundError(
            f"montage_png: no file {montage_png}; draw it first with medconstraints.reports.montage."
        )
    data = base64.b64encode(montage_png.read_bytes()).decode("ascii")
    text = (
        "Slices of some volumes, one row each. Columns: the image, the image with its boxes, the predicted mask, and "
        "the reference mask, in one colour per class."
    )
    return "\n".join(
        [
            "<h2>Pictures</h2>\n<figure>",
            f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">',
            f"<figcaption>{html.escape(text)} Letters give the patient's directions.</figcaption>",
            "</figure>",
        ]
    )


def _how(provenance: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in provenance["versions"].items())
    return "\n".join(
        [
            "<h2>How it was made</h2>\n<dl>",
            f"<dt>Command</dt><dd><code>{html.escape(shlex.join(provenance['command']))}</code></dd>",
            f"<dt>Finished</dt><dd>{html.escape(provenance['date'])}, {provenance['seconds']:.1f} s of scoring</dd>",
            f"<dt>Versions</dt><dd>{html.escape(versions)}</dd>",
            "</dl>",
        ]
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
        raise FileExistsError(f"output_html: {output} exists; choose another name, or pass overwrite=True.")
    if not cases and results is None:
        raise ValueError("cases: expected at least one case, or results, to report; got neither.")
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    if notes:
        parts += ["<ul>", *(f"<li>{html.escape(note)}</li>" for note in notes), "</ul>"]
    parts += ["<h2>Scores</h2>", _cases_table(cases) if results is None else _results_table(results)]
    if montage_png is not None:
        parts.append(_picture(Path(montage_png)))
    if results is not None:
        parts.append(_how(results["provenance"]))
    parts.append("</main>\n</body>\n</html>\n")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(parts), encoding="utf-8")
    return output


def _boxes(reference: Path, image: Path, slice_axis: int | None) -> np.ndarray:
    from medconstraints.transforms.boxes import label_to_boxes

    volume = read_image(image)
    labels = read_labels_on(reference, volume, "reference").data.astype(np.int64)
    if slice_axis is not None:  # the stored axis that runs closest to this one of R, A, S
        slice_axis = io_orientation(volume.affine)[:, 0].tolist().index(slice_axis)
    return np.asarray(label_to_boxes(labels, slice_axis=slice_axis))


def _dice(case: Mapping[str, Any], structures: Sequence[str]) -> dict[str, float]:
    return {name: case[name]["dice"] for name in structures if name in case}


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
    unknown = [entry.name for entry in entries if entry.name not in scored]
    if unknown:
        raise ValueError(
            f"results: no row for {unknown[:5]} of section {section!r}; score this section of this list first."
        )
    structures = list(results["summary"])

    def rank(name: str) -> float:
        values = list(_dice(scored[name], structures).values())
        return sum(values) / len(values) if values else -1.0

    ranked = sorted(entries, key=lambda entry: rank(entry.name))
    chosen = np.unique(np.linspace(0, len(ranked) - 1, min(max_cases, len(ranked))).round().astype(int))
    return [
        ReportCase(
            name=entry.name,
            image=entry.image,
            prediction=predictions[entry.name],
            reference=entry.label,
            boxes=_boxes(entry.label, entry.image, slice_axis),
            dice=_dice(scored[entry.name], structures) or None,
        )
        for entry in (ranked[position] for position in chosen)
    ]


def _read_results(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"results: no file {path}; write it with medconstraints.reports.evaluation.")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"results: {path} is not valid JSON ({error}).") from error
    absent = [key for key in ("cases", "summary", "provenance") if key not in results]
    if absent:
        raise ValueError(f"results: {path} lacks {absent}; expected a file of medconstraints.reports.evaluation.")
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: draw the montage of a section and write the report."""
    parser = argparse.ArgumentParser(
        prog="python -m medconstraints.reports.html", description="Write a report with a picture of scored predictions."
    )
    parser.add_argument("--datalist", required=True, help="JSON list with {image, label} entries")
    parser.add_argument("--section", required=True, help="key of the list, e.g. test")
    parser.add_argument("--predictions", required=True, help="folder with the saved masks")
    parser.add_argument("--results", required=True, help="JSON file of medconstraints.reports.evaluation")
    parser.add_argument("--output", required=True, help="HTML file to write")
    parser.add_argument("--montage", required=True, help="PNG file to write and embed")
    parser.add_argument(
        "--boxes-axis",
        choices=["none", "0", "1", "2"],
        default="none",
        help="axis of R, A, S across which every slice has its boxes; none (default): one box per component",
    )
    parser.add_argument("--title", help="heading of the page (default: names of the list and the section)")
    parser.add_argument("--note", action="append", default=[], help="a sentence for the page; repeat for more")
    parser.add_argument("--max-cases", type=int, default=4, help="rows of the picture (default: 4)")
    parser.add_argument("--base-dir", help="folder the list's paths start from (default: the list's own)")
    parser.add_argument("--suffix", default="_seg", help="what was appended to the image's name (default: _seg)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    options = parser.parse_args(arguments)
    for flag, path in (("--output", options.output), ("--montage", options.montage)):
        if Path(path).exists() and not options.overwrite:
            parser.error(f"{flag}: {path} exists; choose another name or add --overwrite.")
    axis = None if options.boxes_axis == "none" else int(options.boxes_axis)
    try:
        results = _read_results(Path(options.results))
        cases = build_cases(
            options.datalist,
            options.section,
            options.predictions,
            results=results,
            base_dir=options.base_dir,
            suffix=options.suffix,
            slice_axis=axis,
            max_cases=options.max_cases,
        )
        names = read_class_names(options.datalist)
        picture = montage(
            cases,
            options.montage,
            axis=axis,
            max_cases=options.max_cases,
            class_names=names,
            overwrite=options.overwrite,
        )
        report = write_report(
            cases,
            options.output,
            title=options.title or f"{Path(options.datalist).stem}, {options.section}",
            results=results,
            notes=[*options.note, "The pictures show volumes spread from the worst to the best mean Dice."],
            montage_png=picture,
            overwrite=options.overwrite,
        )
    except (ImportError, ValueError, OSError) as error:
        parser.error(str(error))
    sys.stdout.write(f"{picture}\n{report}\n")


if __name__ == "__main__":
    main()
