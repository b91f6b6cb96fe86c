"""Markdown tables made from results files, and put between markers of a document so that nobody types a number.

`python -m medconstraints.reports.tables --markdown docs/results.md --name boxes --row "Boxes per slice=boxes.json"`
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["replace_table", "results_table", "update_markdown"]


def _summary(path: str | os.PathLike[str]) -> tuple[dict[str, Any], int]:
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"rows: no results file {file}; write it with medconstraints.reports.evaluation.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return dict(content["summary"]), len(content["cases"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"rows: {file} is not a results file of medconstraints.reports.evaluation "
            f"({type(error).__name__}: {error})."
        ) from error


def _mean_sd(row: Mapping[str, Any], key: str, digits: int) -> str:
    mean, sd = row[f"{key}_mean"], row[f"{key}_sd"]
    if mean is None:
        return "–"  # noqa: RUF001
    return f"{mean:.{digits}f}" if sd is None else f"{mean:.{digits}f} ({sd:.{digits}f})"


def _cells(row: Mapping[str, Any] | None) -> list[str]:
    if row is None:
        return ["–", "–"]  # noqa: RUF001
    distance = _mean_sd(row, "hd95_mm", 2)
    # A mean over fewer volumes than its neighbours is not comparable, so the cell itself says so.
    return [
        _mean_sd(row, "dice", 3),
        f"{distance}, {row['hd95_undefined']} undefined" if row["hd95_undefined"] else distance,
    ]


def _escape(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())


def results_table(rows: Mapping[str, str | os.PathLike[str]]) -> str:
    """A Markdown table: one row per run, and for each structure Dice and HD95 as mean (sample sd) over the volumes.

    The second column counts the volumes, as `19 of 20` where predictions were missing. Structures stand in the order in
    which the files name them; a run that did not score one has a dash.

    Args:
        rows: label of the row -> JSON file written by `medconstraints.reports.evaluation`.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: when there is no row, or a file holds no such results.
    """
    if not rows:
        raise ValueError("rows: expected at least one label and results file, got none.")
    runs = {label: _summary(path) for label, path in rows.items()}
    structures = list(dict.fromkeys(name for summary, _ in runs.values() for name in summary))
    table = [["Run", "Volumes"]]
    for name in structures:
        table[0] += [f"{_escape(name)}: Dice", f"{_escape(name)}: HD95 (mm)"]
    table.append(["---"] + ["---:"] * (len(table[0]) - 1))
    for label, (summary, total) in runs.items():
        scored = max((row["n"] for row in summary.values()), default=0)
        cells = [cell for name in structures for cell in _cells(summary.get(name))]
        table.append([_escape(label), str(total) if scored == total else f"{scored} of {total}", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


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


def update_markdown(path: str | os.PathLike[str], name: str, text: str, *, check: bool = False) -> bool:
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: write a table of results into a Markdown file, or check that it is up to date."""
    parser = argparse.ArgumentParser(
        prog="python -m medconstraints.reports.tables", description="Put a table of results into a Markdown file."
    )
    parser.add_argument(
        "--markdown", required=True, help="file with the markers <!-- table:NAME --> <!-- /table:NAME -->"
    )
    parser.add_argument("--name", required=True, help="NAME of the markers")
    parser.add_argument("--row", action="append", required=True, metavar="LABEL=PATH", help="one run; repeat for more")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the file would change")
    options = parser.parse_args(arguments)
    rows: dict[str, str] = {}
    for row in options.row:
        # the last "=": labels such as "w=3" are likelier than such file names
        label, separator, path = row.rpartition("=")
        if not separator or not label or not path or label in rows:
            parser.error(f"--row: expected LABEL=PATH with a new label, got {row!r}.")
        rows[label] = path
    try:
        changed = update_markdown(options.markdown, options.name, results_table(rows), check=options.check)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    state = ("would change" if options.check else "updated") if changed else "up to date"
    sys.stdout.write(f"{options.markdown}: table {options.name} {state}\n")
    if changed and options.check:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
