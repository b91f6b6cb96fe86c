"""One picture of a few volumes: image, boxes, prediction and reference on the slice where the object is largest."""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes

from medconstraints.reports.volumes import read_image, read_labels_on

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ReportCase", "canonical_boxes", "canonical_volume", "montage", "slice_rectangles"]

COLUMNS = ("Image", "Boxes", "Prediction", "Reference")
MAX_PNG_BYTES = 600_000

# Okabe and Ito's palette: told apart with every common colour vision, and on grey; class k takes colour k - 1, cyclic.
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2", "#999999")
_LETTERS = (("L", "R"), ("P", "A"), ("I", "S"))
_PANEL_INCHES = 2.3
_GAP_INCHES = 0.08
_TEXT_INCHES = 0.32


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
    boxes: np.ndarray | None = None
    dice: Mapping[str, float] | None = None


def canonical_volume(data: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """`data` (three axes, as stored) with its axes permuted and flipped to run to the right, anterior and superior."""
    return nib.orientations.apply_orientation(data, nib.io_orientation(affine))


def canonical_boxes(boxes: np.ndarray, shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
    """Boxes of a volume of `shape` (three axes, as stored), in voxels of its `canonical_volume`.

    Rows of 2D boxes, `[class, 2 starts, 2 stops]`, get the third axis `[0, 1)`; padding (class -1) is dropped.

    Raises:
        ValueError: when `boxes` is not (N, 7), or (N, 5) for a volume of one slice.

    Example:
        >>> canonical_boxes(np.array([[1, 0, 0, 0, 2, 3, 4]]), (10, 10, 10), np.diag([-1, 1, 1, 1]))
        array([[ 1,  8,  0,  0, 10,  3,  4]])
    """
    boxes = np.asarray(boxes)
    if boxes.ndim == 2 and boxes.shape[1] == 5 and shape[2] == 1:
        zeros = np.zeros_like(boxes[:, :1])
        boxes = np.concatenate([boxes[:, :3], zeros, boxes[:, 3:], zeros + 1], axis=1)
    if boxes.ndim != 2 or boxes.shape[1] != 7:
        raise ValueError(
            f"boxes: expected rows [class, starts, stops], 7 numbers for a volume of shape {tuple(shape)}, "
            f"got shape {boxes.shape}."
        )
    boxes = boxes[boxes[:, 0] >= 0]
    result = boxes.copy()
    for stored, (canonical, direction) in enumerate(nib.io_orientation(affine).astype(int)):
        start, stop = boxes[:, 1 + stored], boxes[:, 4 + stored]
        if direction < 0:
            # voxel i becomes n - 1 - i, so the half-open [start, stop) becomes [n - stop, n - start)
            start, stop = shape[stored] - stop, shape[stored] - start
        result[:, 1 + canonical], result[:, 4 + canonical] = start, stop
    return result


def slice_rectangles(boxes: np.ndarray, axis: int, index: int) -> list[tuple[int, float, float, float, float]]:
    """Rectangles `(class, x, y, width, height)` in which boxes (N, 7) meet slice `index` along `axis`.

    The slice is displayed as `plane` gives it: x is the first of the other two axes, y the second. Voxel i covers
    [i - 0.5, i + 0.5], as in matplotlib's imshow, so a half-open box [start, stop) covers [start - 0.5, stop - 0.5].
    """
    x, y = (other for other in range(3) if other != axis)
    met = boxes[(boxes[:, 1 + axis] <= index) & (index < boxes[:, 4 + axis])]
    return [
        (
            int(row[0]),
            row[1 + x] - 0.5,
            row[1 + y] - 0.5,
            float(row[4 + x] - row[1 + x]),
            float(row[4 + y] - row[1 + y]),
        )
        for row in met
    ]


def plane(volume: np.ndarray, axis: int, index: int) -> np.ndarray:
    """Slice `index` along `axis` of a volume of three axes, as (rows = second other axis, columns = first)."""
    return volume.take(index, axis=axis).T


def default_axis(spacing_mm: Sequence[float], shape: Sequence[int]) -> int:
    """The axis to cut along: one voxel deep, else the thickest slices, else (within 1 %) the last such axis."""
    if 1 in shape:
        return max(axis for axis in range(3) if shape[axis] == 1)
    return max(axis for axis in range(3) if spacing_mm[axis] >= 0.99 * max(spacing_mm))


@dataclass(frozen=True, eq=False)
class _Row:
    """One case, cut: everything in display coordinates."""

    case: ReportCase
    image: np.ndarray
    prediction: np.ndarray | None
    reference: np.ndarray | None
    rectangles: list[tuple[int, float, float, float, float]] | None
    axis: int
    aspect: float

    @property
    def classes(self) -> set[int]:
        masks = [mask for mask in (self.prediction, self.reference) if mask is not None]
        return {int(value) for mask in masks for value in np.unique(mask) if value > 0} | {
            rectangle[0] for rectangle in self.rectangles or []
        }

    @property
    def height_to_width(self) -> float:
        return self.image.shape[0] * self.aspect / self.image.shape[1]


def _cut(case: ReportCase, axis: int | None) -> _Row:
    image = read_image(Path(case.image))
    orientation = nib.io_orientation(image.affine)

    def labels(path: Path | None, what: str) -> np.ndarray | None:
        if path is None:
            return None
        return canonical_volume(read_labels_on(Path(path), image, f"{what} of {case.name}").data, image.affine)

    data = canonical_volume(image.data, image.affine)
    spacing = voxel_sizes(image.affine)[np.argsort(orientation[:, 0])]
    cut = default_axis(spacing.tolist(), data.shape) if axis is None else axis
    prediction, reference = labels(case.prediction, "prediction"), labels(case.reference, "reference")
    boxes = None if case.boxes is None else canonical_boxes(case.boxes, image.data.shape, image.affine)
    index = data.shape[cut] // 2
    for mask in (reference, prediction):
        if mask is not None and mask.any():
            index = int((mask > 0).sum(axis=tuple(other for other in range(3) if other != cut)).argmax())
            break
    x, y = (other for other in range(3) if other != cut)
    return _Row(
        case=case,
        image=plane(data, cut, index),
        prediction=None if prediction is None else plane(prediction, cut, index),
        reference=None if reference is None else plane(reference, cut, index),
        rectangles=None if boxes is None else slice_rectangles(boxes, cut, index),
        axis=cut,
        aspect=float(spacing[y] / spacing[x]),
    )


def _colour(number: int) -> str:
    return _COLOURS[(number - 1) % len(_COLOURS)]


def _write(axes: "Axes", text: str, x: float, y: float, horizontal: str, vertical: str) -> None:
    from matplotlib.patheffects import withStroke

    # the dark rim keeps white text readable on a bright image
    rim = [withStroke(linewidth=1.5, foreground="black")]
    drawn = axes.text(x, y, text, transform=axes.transAxes, ha=horizontal, va=vertical)
    drawn.set(color="white", fontsize=7, path_effects=rim)


def _note(axes: "Axes", text: str) -> None:
    _write(axes, text, 0.5, 0.04, "center", "bottom")


def _letters(axes: "Axes", axis: int) -> None:
    (left, right), (bottom, top) = (_LETTERS[other] for other in range(3) if other != axis)
    _write(axes, left, 0.02, 0.5, "left", "center")
    _write(axes, right, 0.98, 0.5, "right", "center")
    _write(axes, bottom, 0.5, 0.02, "center", "bottom")
    _write(axes, top, 0.5, 0.98, "center", "top")


def _overlay(axes: "Axes", mask: np.ndarray | None, missing: str) -> None:
    from matplotlib.colors import to_rgba

    if mask is None:
        _note(axes, missing)
        return
    for number in (int(value) for value in np.unique(mask) if value > 0):
        inside = mask == number
        tint = np.zeros((*inside.shape, 4))
        tint[inside] = to_rgba(_colour(number), 0.35)
        axes.imshow(tint, origin="lower", interpolation="nearest", aspect="auto")
        # A rim of zeros closes the outline of what touches the border; its voxels are at -1 .. n.
        height, width = inside.shape
        grid = np.arange(-1, width + 1), np.arange(-1, height + 1)
        axes.contour(*grid, np.pad(inside.astype(float), 1), levels=[0.5], colors=[_colour(number)], linewidths=1.0)


def _draw_row(panels: Sequence["Axes"], row: _Row) -> None:
    from matplotlib.patches import Rectangle

    low, high = np.percentile(row.image, (1, 99))
    for panel in panels:
        panel.imshow(
            row.image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), origin="lower", interpolation="nearest"
        )
        panel.set_xticks([])
        panel.set_yticks([])
        for spine in panel.spines.values():
            spine.set_visible(False)
    _letters(panels[0], row.axis)
    if row.rectangles is None:
        _note(panels[1], "no boxes")
    for number, x, y, width, height in row.rectangles or []:
        panels[1].add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=_colour(number), linewidth=1.3))
    _overlay(panels[2], row.prediction, "no prediction")
    _overlay(panels[3], row.reference, "no reference")
    for panel in panels:
        # Overlays drawn later would otherwise reset the aspect and the limits.
        panel.set(aspect=row.aspect, xlim=(-0.5, row.image.shape[1] - 0.5), ylim=(-0.5, row.image.shape[0] - 0.5))


def _figure(rows: Sequence[_Row], class_names: Mapping[int, str]) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    # Laid out in inches: titles, then for each row its heading and panels, then the legend.
    heights = [_PANEL_INCHES * min(max(row.height_to_width, 0.3), 1.6) for row in rows]
    width = len(COLUMNS) * (_PANEL_INCHES + _GAP_INCHES) + _GAP_INCHES
    height = _TEXT_INCHES * (len(rows) + 2) + sum(heights) + _GAP_INCHES
    lefts = [_GAP_INCHES + column * (_PANEL_INCHES + _GAP_INCHES) for column in range(len(COLUMNS))]
    figure = Figure(figsize=(width, height), facecolor="white")
    top = height - _TEXT_INCHES
    for left, title in zip(lefts, COLUMNS, strict=True):
        figure.text(
            (left + _PANEL_INCHES / 2) / width, (top + 0.05) / height, title, ha="center", va="bottom", fontsize=9
        )
    for row, panel_height in zip(rows, heights, strict=True):
        scores = ", ".join(f"{name} {value:.3f}" for name, value in (row.case.dice or {}).items())
        heading = f"{row.case.name}    Dice: {scores}" if scores else row.case.name
        # Names come from files; a "$" in one is no formula.
        heading = heading.replace("$", r"\$")
        top -= _TEXT_INCHES
        figure.text(lefts[0] / width, (top + 0.06) / height, heading, va="bottom", fontsize=9, fontweight="bold")
        top -= panel_height
        sizes = top / height, _PANEL_INCHES / width, panel_height / height
        _draw_row([figure.add_axes((left / width, *sizes)) for left in lefts], row)
    numbers = sorted(set().union(*(row.classes for row in rows)))
    if numbers:
        handles = [Patch(color=_colour(number), label=class_names.get(number, f"class {number}")) for number in numbers]
        columns = min(len(handles), 6)
        figure.legend(handles=handles, loc="lower center", borderaxespad=0.2, ncols=columns, frameon=False, fontsize=8)
    return figure


def montage(
    cases: Sequence[ReportCase],
    output_png: str | os.PathLike[str],
    *,
    axis: int | None = None,
    max_cases: int = 4,
    class_names: Mapping[int, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Draw one row per case: image, image with boxes, prediction and reference, on one slice.

    The slice is the one with the largest reference, else prediction, else the middle one. Everything is shown in RAS
    orientation, x and y growing to the right and upwards; letters on the first panel name the directions. Grey values
    span the 1st to 99th percentile of the slice. The resolution is lowered until the file is below 600 kB.

    Args:
        cases: the first `max_cases` are drawn.
        output_png: the file to write.
        axis: axis of R, A, S to cut across: 0, 1, 2 for sagittal, coronal, axial slices; default the one of largest
            voxel spacing, of equals the one that runs closest to superior (then anterior).
        max_cases: number of rows at most.
        class_names: class number -> name in the legend; default `class 1` and so on.
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
        raise FileExistsError(f"output_png: {output} exists; choose another name, or pass overwrite=True.")
    figure = _figure([_cut(case, axis) for case in cases[:max_cases]], class_names or {})
    for dpi in (150, 120, 100, 80, 60, 40):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi, pil_kwargs={"optimize": True})
        if buffer.tell() < MAX_PNG_BYTES:
            break
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(buffer.getvalue())
    return output
