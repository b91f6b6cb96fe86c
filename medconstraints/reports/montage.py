"""One picture of a few volumes: image, boxes, prediction and reference on the slice where the object is largest."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from medconstraints.boxes import map_boxes
from medconstraints.reports.planes import colour_of, window_of
from medconstraints.reports.volumes import Volume, read_image, read_labels, require_same_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["ReportCase", "montage"]

COLUMNS = ("Image", "Boxes", "Prediction", "Reference")
MAX_PNG_BYTES = 600_000

_LETTERS = (("L", "R"), ("P", "A"), ("I", "S"))
_PANEL_INCHES = 2.3
_TEXT_INCHES = 0.5


@dataclass(frozen=True, eq=False)
class ReportCase:
    """What is shown of one volume.

    Attributes:
        name: heading of its row.
        image: NIfTI file.
        prediction: label map on the image's grid, or None.
        reference: label map on the image's grid, or None.
        boxes: (N, 1 + 2 D) integers, rows [class, start_1..start_D, stop_1..stop_D], half-open, in voxels of the
            image as stored; rows of class -1 are padding. Or None.
        dice: name of a structure -> Dice, or None.
    """

    name: str
    image: Path
    prediction: Path | None = None
    reference: Path | None = None
    boxes: Any = None
    dice: Mapping[str, float] | None = None


def montage(
    cases: Sequence[ReportCase],
    output_png: str | os.PathLike[str],
    *,
    axis: int | None = None,
    max_cases: int = 4,
    class_names: Mapping[int, str] | None = None,
    radiological: bool = True,
    overwrite: bool = False,
) -> Path:
    """Draw one row per case: image, image with boxes, prediction and reference, on one slice.

    The slice is the one with the largest reference, else prediction, else the middle one. Anterior and superior are
    above or on the right; letters on the first panel name the directions. Grey values span the 1st to 99th percentile
    of the slice. The resolution is lowered until the file is below 600 kB.

    Args:
        cases: the first `max_cases` are drawn.
        output_png: the file to write.
        axis: axis of R, A, S to cut across: 0, 1, 2 for sagittal, coronal, axial slices; default the one of largest
            voxel spacing, of equals the one that runs closest to superior (then anterior).
        max_cases: number of rows at most.
        class_names: class number -> name in the legend; default `class 1` and so on.
        radiological: show the patient's right on the left.
        overwrite: replace an existing file.

    Returns:
        The path written.

    Raises:
        ImportError: without matplotlib.
        FileExistsError: when the file exists and `overwrite` is False.
        FileNotFoundError: for a missing volume.
        ValueError: for no case, an axis outside 0..2, or masks and boxes that do not lie on the image's grid.
    """
    output = Path(output_png)
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("montage needs matplotlib; run `pip install medconstraints[report]`.") from error
    if not cases or max_cases < 1:
        raise ValueError(f"cases: expected at least one case to draw, got {len(cases)} with max_cases={max_cases}.")
    if axis not in (None, 0, 1, 2):
        raise ValueError(f"axis: expected None, 0, 1 or 2 (of R, A, S), got {axis!r}.")
    if output.exists() and not overwrite:
        raise FileExistsError(f"output_png: {output} exists; choose another name, or set overwrite.")
    figure = _figure([_cut(case, axis) for case in cases[:max_cases]], class_names or {}, radiological)
    for dpi in (150, 120, 100, 80, 60, 40):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi, pil_kwargs={"optimize": True})
        if buffer.tell() < MAX_PNG_BYTES:
            break
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(buffer.getvalue())
    return output


@dataclass(frozen=True, eq=False)
class _Row:
    """One case, cut: planes (second by first of the other axes), rectangles [class, x, y, width, height].

    Voxel i covers [i - 0.5, i + 0.5], as in matplotlib's imshow, so a half-open box covers [start - 0.5, stop - 0.5].
    """

    case: ReportCase
    image: np.ndarray
    masks: dict[str, np.ndarray | None]
    rectangles: np.ndarray | None
    axis: int
    aspect: float

    @property
    def classes(self) -> set[int]:
        found = [mask.ravel() for mask in self.masks.values() if mask is not None]
        boxed = [] if self.rectangles is None else [self.rectangles[:, 0]]
        return {int(value) for values in [*found, *boxed] for value in np.unique(values) if value > 0}


def _cut(case: ReportCase, axis: int | None) -> _Row:
    stored = read_image(case.image)
    image = stored.canonical()
    volumes: dict[str, np.ndarray | None] = {}
    for what, path in (("reference", case.reference), ("prediction", case.prediction)):
        if path is not None:
            labels = read_labels(path, f"{what} of {case.name}").canonical()
            # Headers of public data differ a little between image and label; scores use the strict check.
            require_same_grid(labels, image, tolerance=0.5)
        volumes[what] = None if path is None else labels.data
    if axis is None:  # one voxel deep, else the thickest slices, else (within 1 %) the last such axis
        depths = [np.inf if size == 1 else step for size, step in zip(image.data.shape, image.spacing_mm, strict=True)]
        axis = max(a for a in range(3) if depths[a] >= 0.99 * max(depths))
    x, y = (other for other in range(3) if other != axis)
    index = image.data.shape[axis] // 2
    for mask in volumes.values():
        if mask is not None and mask.any():
            index = int((mask > 0).sum(axis=(x, y)).argmax())
            break
    return _Row(
        case=case,
        image=image.data.take(index, axis).T,
        masks={what: None if mask is None else mask.take(index, axis).T for what, mask in volumes.items()},
        rectangles=None if case.boxes is None else _rectangles(case.boxes, stored, image, axis, index),
        axis=axis,
        aspect=float(image.spacing_mm[y] / image.spacing_mm[x]),
    )


def _rectangles(boxes: Any, stored: Volume, image: Volume, axis: int, index: int) -> np.ndarray:
    """Where boxes of the stored image meet a slice of the canonical one; padding is dropped."""
    rows = np.asarray(boxes)
    if rows.ndim == 2 and rows.shape[1] == 5 and stored.data.ndim == 2:  # the third axis is one voxel
        rows = np.insert(rows, [3, 5], [0, 1], axis=1)
    if rows.ndim != 2 or rows.shape[1] != 7:
        raise ValueError(
            f"boxes: expected rows [class, starts, stops], 7 numbers for a volume of shape {stored.data.shape}, "
            f"got shape {rows.shape}."
        )
    rows = map_boxes(torch.as_tensor(rows[rows[:, 0] >= 0]), stored.affine, image.affine).numpy()
    met = rows[(rows[:, 1 + axis] <= index) & (index < rows[:, 4 + axis])]
    x, y = (other for other in range(3) if other != axis)
    start, stop = met[:, [1 + x, 1 + y]], met[:, [4 + x, 4 + y]]
    return np.concatenate([met[:, :1], start - 0.5, stop - start], axis=1)


def _figure(rows: Sequence[_Row], class_names: Mapping[int, str], radiological: bool) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    shapes = [row.image.shape[0] * row.aspect / row.image.shape[1] for row in rows]
    heights = [_PANEL_INCHES * min(max(shape, 0.3), 1.6) + _TEXT_INCHES for shape in shapes]
    size = len(COLUMNS) * _PANEL_INCHES, sum(heights) + _TEXT_INCHES
    figure = Figure(figsize=size, facecolor="white", layout=ConstrainedLayoutEngine(h_pad=0.08))
    parts: Any = figure.subfigures(len(rows) + 1, 1, height_ratios=[*heights, _TEXT_INCHES])
    for part, row in zip(parts, rows, strict=False):
        _draw_row(part, row, mirrored=radiological and row.axis != 0)
    if numbers := sorted(set().union(*(row.classes for row in rows))):
        handles = [
            Patch(color=colour_of(number), label=class_names.get(number, f"class {number}")) for number in numbers
        ]
        parts[-1].legend(handles=handles, loc="center", ncols=min(len(handles), 6), frameon=False, fontsize=8)
    return figure


def _draw_row(figure: SubFigure, row: _Row, *, mirrored: bool) -> None:
    from matplotlib.patches import Rectangle

    scores = ", ".join(f"{name} {value:.3f}" for name, value in (row.case.dice or {}).items())
    heading = f"{row.case.name}    Dice: {scores}" if scores else row.case.name
    # Names come from files; a "$" in one is no formula.
    figure.suptitle(heading.replace("$", r"\$"), x=0.01, ha="left", fontsize=9, fontweight="bold")
    panels = figure.subplots(1, len(COLUMNS))
    low, high = window_of(row.image)
    for panel, title in zip(panels, COLUMNS, strict=True):
        panel.imshow(row.image, cmap="gray", vmin=low, vmax=high, origin="lower")
        panel.set_title(title, fontsize=8)
        panel.set_axis_off()
    _letters(panels[0], row.axis, mirrored=mirrored)
    if row.rectangles is None:
        _write(panels[1], "no boxes", 0.5, 0.04)
    for number, x, y, width, height in [] if row.rectangles is None else row.rectangles:
        colour = colour_of(int(number))
        panels[1].add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=colour, linewidth=1.3))
    for panel, what in zip(panels[2:], ("prediction", "reference"), strict=True):
        _overlay(panel, row.masks[what], f"no {what}")
    for panel in panels:
        # Overlays drawn later would otherwise reset the aspect and the limits.
        ends = (row.image.shape[1] - 0.5, -0.5) if mirrored else (-0.5, row.image.shape[1] - 0.5)
        panel.set(aspect=row.aspect, xlim=ends, ylim=(-0.5, row.image.shape[0] - 0.5))


def _overlay(axes: Axes, mask: np.ndarray | None, missing: str) -> None:
    from matplotlib.colors import to_rgba

    if mask is None:
        _write(axes, missing, 0.5, 0.04)
        return
    for number in (int(value) for value in np.unique(mask) if value > 0):
        inside = mask == number
        tint = np.zeros((*inside.shape, 4))
        tint[inside] = to_rgba(colour_of(number), 0.35)
        axes.imshow(tint, origin="lower", interpolation="nearest", aspect="auto")
        # A rim of zeros closes the outline of what touches the border; its voxels are at -1 .. n.
        height, width = inside.shape
        grid = np.arange(-1, width + 1), np.arange(-1, height + 1)
        axes.contour(*grid, np.pad(inside.astype(float), 1), levels=[0.5], colors=[colour_of(number)], linewidths=1.0)


def _letters(axes: Axes, axis: int, *, mirrored: bool) -> None:
    (left, right), (bottom, top) = (_LETTERS[other] for other in range(3) if other != axis)
    left, right = (right, left) if mirrored else (left, right)
    for letter, x, y in ((left, 0.04, 0.5), (right, 0.96, 0.5), (bottom, 0.5, 0.04), (top, 0.5, 0.96)):
        _write(axes, letter, x, y)


def _write(axes: Axes, text: str, x: float, y: float) -> None:
    from matplotlib.patheffects import withStroke

    # the dark rim keeps white text readable on a bright image
    drawn = axes.text(x, y, text, transform=axes.transAxes, ha="center", va="center")
    drawn.set(color="white", fontsize=7, path_effects=[withStroke(linewidth=1.5, foreground="black")])
