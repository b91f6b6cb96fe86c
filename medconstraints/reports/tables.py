"""Markdown tables made from results files, and put between markers of a document so that nobody types a number.

The command is `tables`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

__all__ = ["markdown_table", "read_results", "replace_table", "results_table", "update_markdown", "update_table"]

DASH = "–"  # noqa: RUF001


def read_results(path: str | PathLike[str]) -> dict[str, Any]:
    """What the command `evaluation` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no results.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"results: no file {file}; write it with `python -m medconstraints evaluation`.")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"results: {file} is not valid JSON ({error}).") from error
    absent = [key for key in ("cases", "summary", "provenance") if not isinstance(results, dict) or key not in results]
    if absent:
        raise ValueError(f"results: {file} lacks {absent}; expected a file of `python -m medconstraints evaluation`.")
    return dict(results)


def results_table(rows: Mapping[str, str | PathLike[str]]) -> str:
    """A Markdown table: one row per run, and for each structure Dice and HD95 as mean (sample sd) over the volumes.

    The second column counts the volumes, as `19 of 20` where predictions were missing. Structures stand in the order in
    which the files name them; a run that did not score one has a dash.

    Args:
        rows: label of the row -> JSON file of the command `evaluation`.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: when there is no row, or a file holds no such results.
    """
    if not rows:
        raise ValueError("rows: expected at least one label and results file, got none.")
    runs = {label: read_results(path) for label, path in rows.items()}
    structures = list(dict.fromkeys(name for run in runs.values() for name in run["summary"]))
    header = ["Run", "Volumes", *(f"{name}: {score}" for name in structures for score in ("Dice", "HD95 (mm)"))]
    body = []
    for label, run in runs.items():
        scored, total = max((row["n"] for row in run["summary"].values()), default=0), len(run["cases"])
        cells = [cell for name in structures for cell in _cells(run["summary"].get(name))]
        body.append([label, str(total) if scored == total else f"{scored} of {total}", *cells])
    return markdown_table(header, body, align="---:")


def markdown_table(header: list[str], rows: list[list[str]], *, align: str = "---") -> str:
    """A Markdown table; `align` is that of all columns but the first."""
    escaped = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in [header, *rows]]
    escaped.insert(1, ["---", *[align] * (len(header) - 1)])
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


def replace_table(markdown: str, name: str, text: str) -> str:
    r"""`markdown` with what stands between `<!-- table:NAME -->` and `<!-- /table:NAME -->` replaced by `text`.

    Doing it twice changes nothing more.

    Raises:
        ValueError: when the two markers do not both stand there exactly once and in order, or `text` holds a marker.

    Example:
        >>> replace_table("<!-- table:a -->old<!-- /table:a -->", "a", "new")
        '<!-- table:a -->\n\nnew\n\n<!-- /table:a -->'
    """
    opening, closing = f"<!-- table:{name} -->", f"<!-- /table:{name} -->"
    if re.search(r"<!-- /?table:", text):
        raise ValueError("text: holds a table marker of its own, which would be found the next time; remove it.")
    counts = markdown.count(opening), markdown.count(closing)
    if counts != (1, 1) or markdown.index(opening) > markdown.index(closing):
        raise ValueError(
            f"name: expected {opening} once, and {closing} once after it; found {counts[0]} and {counts[1]}. "
            "Add the two comments where the table belongs."
        )
    head, tail = markdown.split(opening)[0], markdown.split(closing)[1]
    return f"{head}{opening}\n\n{text.strip()}\n\n{closing}{tail}"


def update_table(*, markdown: str, name: str, rows: Mapping[str, str], check: bool = False) -> str | list[str]:
    """Put a table of results between the comments `table:NAME` and `/table:NAME` of a Markdown file.

    Args:
        markdown: the file.
        name: NAME of the markers.
        rows: labels of the rows and JSON files of the command evaluation, such as '{"Full labels": "full.json"}'.
        check: write nothing, and return it as a problem if the file would change.
    """
    changed = update_markdown(markdown, name, results_table(rows), check=check)
    if check:
        return [f"{markdown}: table {name} would change"] * changed
    return f"{markdown}: table {name} {'updated' if changed else 'up to date'}"


def update_markdown(path: str | PathLike[str], name: str, text: str, *, check: bool = False) -> bool:
    """Replace the table `name` in a Markdown file; True when the file changes. `check` only tells, and writes nothing.

    Line ends stay as they are in the file.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: see `replace_table`.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"markdown: no file {file}.")
    before = file.read_bytes().decode("utf-8")
    after = replace_table(before.replace("\r\n", "\n"), name, text)
    if "\r\n" in before:
        after = after.replace("\n", "\r\n")
    if after != before and not check:
        file.write_bytes(after.encode("utf-8"))
    return after != before


def _cells(row: Mapping[str, Any] | None) -> list[str]:
    if row is None:
        return [DASH, DASH]
    distance = _mean_sd(row, "hd95_mm", 2)
    # A mean over fewer volumes than its neighbours is not comparable, so the cell itself says so.
    undefined = f", {row['hd95_undefined']} undefined" if row["hd95_undefined"] else ""
    return [_mean_sd(row, "dice", 3), distance + undefined]


def _mean_sd(row: Mapping[str, Any], key: str, digits: int) -> str:
    mean, sd = row[f"{key}_mean"], row[f"{key}_sd"]
    if mean is None:
        return DASH
    return f"{mean:.{digits}f}" if sd is None else f"{mean:.{digits}f} ({sd:.{digits}f})"
