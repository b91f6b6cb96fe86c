"""Curves of a study: constraints satisfied, their stability and the Dice of each epoch, one panel for each run.

The command is `curves`.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

__all__ = ["draw_curves", "format_curves", "read_curves"]

COLUMNS = ("satisfied", "stability", "val_mean_dice")


def read_curves(
    runs: Mapping[str, str | PathLike[str]],
    *,
    columns: Sequence[str] = COLUMNS,
    last: int = 10,
    picture: str | PathLike[str] | None = None,
) -> dict[str, Any]:
    """What the CSV files of `ConstraintMetricsHandler` say of several runs, as JSON can hold it.

    Args:
        runs: name of a run -> its CSV file.
        columns: columns to keep; one that a file does not have is left out.
        picture: PNG file to draw them into, see `draw_curves`.
        last: epochs whose mean and standard deviation are the summary (the thesis, table 3.1, takes 10).

    Returns:
        `runs`: for each run `epochs`, and for each column its values, None in an empty cell; `summary`: for each run
        and column the mean and the sample standard deviation of the last epochs, `<column>_mean` and `<column>_sd`,
        and `n`, the number of epochs they are taken over; `date`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file has no epoch or no column that is asked for.
    """
    curves: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    for name, path in runs.items():
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(
                f"runs: no file {file} for {name!r}; give the csv_path of ConstraintMetricsHandler."
            )
        with file.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        kept = [column for column in columns if rows and column in rows[0]]
        if not kept:
            found = sorted(rows[0]) if rows else "no row"
            raise ValueError(f"runs: expected columns such as {list(columns)} in {file.name}, got {found}.")
        values = {column: [float(row[column]) if row[column] else None for row in rows] for column in kept}
        curves[name] = {"epochs": [int(row["epoch"]) for row in rows], **values}
        summary[name] = {"n": min(last, len(rows))}
        for column in kept:
            end = [value for value in values[column][-last:] if value is not None]
            summary[name][f"{column}_mean"] = statistics.fmean(end) if end else None
            summary[name][f"{column}_sd"] = statistics.stdev(end) if len(end) > 1 else None
    content = {"runs": curves, "summary": summary, "date": time.strftime("%Y-%m-%d")}
    if picture is not None:
        draw_curves(content, picture)
    return content


def format_curves(curves: Mapping[str, Any]) -> str:
    """The summary of `read_curves`, a line for each run."""
    rounded = {
        name: {key: round(value, 4) for key, value in row.items() if isinstance(value, float)}
        for name, row in curves["summary"].items()
    }
    return "\n".join(f"{name}: {row}" for name, row in rounded.items())


def draw_curves(curves: Mapping[str, Any], path: str | PathLike[str]) -> Path:
    """Draw the runs of `read_curves`, a panel for each, with the same axes; needs matplotlib.

    Args:
        curves: result of `read_curves`.
        path: picture to write.
    """
    from matplotlib.figure import Figure

    runs = curves["runs"]
    wide = min(3, len(runs))
    tall = -(-len(runs) // wide)
    figure = Figure(figsize=(3.6 * wide, 2.6 * tall), layout="constrained")
    axes = figure.subplots(tall, wide, sharex=True, sharey=True, squeeze=False)
    labels = {"satisfied": "satisfied", "stability": "stability", "val_mean_dice": "Dice"}
    for axis, (name, run) in zip(axes.flat, runs.items(), strict=False):
        for column, values in run.items():
            points = [(epoch, value) for epoch, value in zip(run["epochs"], values, strict=True) if value is not None]
            if column != "epochs" and points:
                axis.plot(*zip(*points, strict=True), label=labels.get(column, column))
        axis.set_title(name, fontsize=10)
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(runs) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
    axes.flat[0].legend(fontsize=8, loc="lower right")
    output = Path(path)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    return output
