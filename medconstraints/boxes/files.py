"""Boxes drawn by people: read them from JSON, CSV or 3D Slicer files into voxel rows, and write them for a viewer.

Rows are ``[class, start_1..start_D, stop_1..stop_D]``: int64 voxel indices of one image grid, half-open, class >= 1.
Axis numbers in this module, its files and its messages count from 1, in the order of the image array's axes.

**JSON**::

    {"coordinate_system": "RAS", "classes": {"prostate": 1},
     "boxes": [{"class": "prostate", "start": [-12.5, 3.0, 40.0], "stop": [20.0, 31.0, 62.5]}]}

**CSV**, columns ``class,start_1,start_2,start_3,stop_1,stop_2,stop_3`` or ``class,x_min,y_min,z_min,x_max,y_max,z_max``
(the same numbers under other names: ``x_max`` is ``stop_1``, so in voxels it is the first index *after* the box); two
coordinates each for a 2D image. The coordinate system stands in a column ``coordinate_system`` or in a leading line
``# coordinate_system: RAS`` (also ``# CoordinateSystem = RAS`` and ``space``); without either it is ``voxel``. Commas,
semicolons and tabs separate columns. A column ``image`` lets one file hold many volumes: it has
the file name, extension or not, behind as many folders as tell the volumes apart (``p1/image.nii.gz``); all folders
that a row gives must be those of the volume. A row that has nothing but its image name says that this volume was looked
at and has no box.

**3D Slicer** markups ROI (``.mrk.json``, schema 1.0.x): type ``ROI``, roiType ``Box`` or ``BoundingBox``, LPS unless
the file says RAS. A class is known by its name, whatever the case and with a number behind it ("hippocampus-1").
Apply ("harden") a transform above the ROI before saving, Slicer does not write it into this file.

Coordinate systems: ``voxel`` are half-open integer indices. ``RAS`` and ``LPS`` are millimetres; ``start`` and ``stop``
are two opposite corners, in any order, and lie on edges: voxel i covers [i - 0.5, i + 0.5]. Each side goes to the
nearest voxel edge, and a box thinner than a voxel keeps the voxel at its centre. So a millimetre box or ROI with no
thickness in a direction, drawn flat on a slice, is one voxel thick there (one that is a single point is refused); in
voxels, equal ``start`` and ``stop`` hold no voxel and are refused. A millimetre box, or a rotated ROI, whose sides do
not run along the voxel axes becomes the bounding box of its corners in the voxel grid: it still holds the whole object
but is looser than the one that was drawn, and refused beyond a limit.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing as npt
import torch

from medconstraints import checks
from medconstraints.boxes.fields import CLASSES, Refusal, fit_schema
from medconstraints.boxes.geometry import AffineLike, Grid, checked_grid
from medconstraints.boxes.records import FORMATS, Record, read_records
from medconstraints.boxes.rows import box_row
from medconstraints.boxes.slicer import is_placed, slicer_document

__all__ = ["BoxFault", "BoxFileError", "read_boxes", "write_boxes"]

logger = logging.getLogger(__name__)

SHOWN_FAULTS = 10
MAX_LOOSENESS = 1.5


class BoxFault(NamedTuple):
    """One faulty row: its number (CSV: 1-based data row, JSON: 0-based index, None: the file), place and reason."""

    row: int | None
    where: str
    reason: str


class BoxFileError(ValueError):
    """A box file holds rows that cannot be used.

    Attributes:
        path: the file.
        faults: every faulty row.
        row: row number of the first fault; None when the file as a whole is at fault.
        reason: what is wrong in the first faulty row, and what to do.
    """

    def __init__(self, path: str | PathLike[str], faults: Sequence[BoxFault]) -> None:
        self.path = Path(path)
        self.faults = tuple(faults)
        self.row, _, self.reason = self.faults[0]
        lines = [f"{fault.where}: {fault.reason}" if fault.where else fault.reason for fault in self.faults]
        if len(lines) == 1:
            message = f"{self.path.name}{', ' if self.faults[0].where else ': '}{lines[0]}"
        else:
            rest = len(lines) - SHOWN_FAULTS
            more = [f"and {rest} more"] if rest > 0 else []
            message = "\n  ".join([f"{self.path.name}: {len(lines)} faulty rows", *lines[:SHOWN_FAULTS], *more])
        super().__init__(message)

    def __reduce__(self) -> tuple[type[BoxFileError], tuple[Path, tuple[BoxFault, ...]]]:
        # Worker processes pickle exceptions; the default would call the constructor with the message alone.
        return type(self), (self.path, self.faults)


def read_boxes(
    path: str | PathLike[str],
    *,
    affine: AffineLike,
    shape: Sequence[int],
    classes: Mapping[str, int] | None = None,
    num_classes: int | None = None,
    format: str | None = None,
    image: str | None = None,
    stored_affine: AffineLike | None = None,
    stored_shape: Sequence[int] | None = None,
    max_looseness: float = MAX_LOOSENESS,
    doubt: str = "",
) -> torch.Tensor:
    r"""Read a box file into rows ``[class, start_1..start_D, stop_1..stop_D]`` of one voxel grid.

    Formats and coordinates are described at the top of this module. All faulty rows of a file make one error.

    Args:
        path: the box file.
        affine: voxel index -> RAS mm of the grid in which the rows are wanted, (4, 4) as nibabel's; (3, 3) also for 2D.
        shape: spatial shape of that grid, two or three sizes.
        classes: class name -> number, besides those of the file. Where any are known, other numbers are refused.
        num_classes: classes of the network with the background; others are refused. None allows every number.
        format: "json", "csv" or "slicer"; None chooses by extension and, for JSON, by content.
        image: path of the volume, with or without extension: selects the rows of a CSV file that has a column
            ``image``. Files without that column belong to one volume and ignore it.
        stored_affine: affine of the grid to which ``voxel`` coordinates refer, where it is another.
        stored_shape: spatial shape of that grid.
        max_looseness: how many times as large as a turned millimetre box its bounding box in the grid may be.
        doubt: why it is not known where the image's millimetres are; refuses millimetre boxes. Empty: it is known.

    Returns:
        int64 tensor (N, 1 + 2 D), inside the volume, no padding rows; N = 0 for a file without boxes.

    Raises:
        FileNotFoundError: no such file.
        BoxFileError: a ``ValueError``; unusable rows or file, with the row and what to do.

    Example:
        >>> import numpy as np, tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "boxes.csv"
        >>> _ = path.write_text("# coordinate_system: LPS\nclass,x_min,y_min,x_max,y_max\n1,1.5,2.5,4.5,6.5\n")
        >>> read_boxes(path, affine=np.diag([-1.0, -1.0, 1.0, 1.0]), shape=(10, 10))
        tensor([[1, 2, 3, 5, 7]])
    """
    path = Path(path).expanduser()
    if format is not None and format not in FORMATS:
        raise ValueError(f"format must be one of {FORMATS} or None, got {format!r}.")
    target, stored = _grids(affine, shape, stored_affine, stored_shape)
    if num_classes is not None and num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, with the background, got {num_classes}.")
    if not path.is_file():
        raise FileNotFoundError(f"no box file at {path}")
    names = _checked_names(classes)
    rows, faults = [], []
    most = checks.number("max_looseness", max_looseness, least=1.0)
    for record in _named_records(path, format, target.ndim, image, names):
        if record.slicer and not is_placed(record.fields):
            logger.warning("%s, %s: is not placed in the volume (positionStatus), and no box", path.name, record.where)
            continue
        try:
            rows.append(box_row(record, names, target, stored, path.name, num_classes, max_looseness=most, doubt=doubt))
        except Refusal as fault:
            faults.append(BoxFault(record.row, record.where, str(fault)))
    if faults:
        raise BoxFileError(path, faults)
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 1 + 2 * target.ndim)


def _grids(
    affine: AffineLike, shape: Sequence[int], stored_affine: AffineLike | None, stored_shape: Sequence[int] | None
) -> tuple[Grid, Grid]:
    """The wanted grid and the stored one."""
    target = checked_grid(affine, shape, "affine", "shape")
    if stored_affine is None and stored_shape is None:
        return target, target
    if stored_affine is None or stored_shape is None:
        raise ValueError("give stored_affine and stored_shape together, or neither.")
    stored = checked_grid(stored_affine, stored_shape, "stored_affine", "stored_shape")
    if stored.ndim != target.ndim:
        raise ValueError(f"stored_shape has {stored.ndim} sizes and shape {target.ndim}: they must agree.")
    return target, stored


def _checked_names(classes: Mapping[str, int] | None) -> dict[str, int]:
    names = dict(classes or {})
    try:
        fit_schema(names, CLASSES)
    except Refusal as fault:
        raise ValueError(f"classes: {fault}.") from None
    return names


def _named_records(path: Path, format: str | None, ndim: int, image: str | None, names: dict[str, int]) -> list[Record]:
    """Records of a file; the class names that it defines are added to `names`."""
    try:
        records, file_names = read_records(path, format, ndim, image)
        for name, number in file_names.items():
            if names.setdefault(name, number) != number:
                raise Refusal(f"class {name!r} is {number} in this file but {names[name]} in classes=; use one number")
    except Refusal as fault:
        raise BoxFileError(path, [BoxFault(None, "", str(fault))]) from None
    return records


def write_boxes(
    path: str | PathLike[str],
    boxes: npt.ArrayLike | torch.Tensor,
    *,
    class_names: Mapping[int, str] | None = None,
    affine: AffineLike | None = None,
    overwrite: bool = False,
) -> None:
    """Write box rows as JSON in voxels, or as 3D Slicer ROIs (one markup per box) where the name ends in ``.mrk.json``.

    Args:
        path: the file to write: ``.json`` or ``.mrk.json``.
        boxes: (N, 1 + 2 D) integers; padding rows (class -1) are left out.
        class_names: class number -> name, for every class; None writes the numbers.
        affine: voxel index -> RAS mm, (4, 4); needed for ``.mrk.json``, unused for JSON.
        overwrite: replace an existing file.

    Raises:
        FileExistsError: the file exists and ``overwrite`` is False.
        ValueError: rows that are no boxes, another extension, or a sheared or missing affine for Slicer.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() != ".json":
        raise ValueError(f"path must end in .json or .mrk.json, got {path.name!r}.")
    rows = _checked_rows(boxes)
    class_names = dict(class_names or {})
    unnamed = sorted({row[0] for row in rows} - set(class_names)) if class_names else []
    if unnamed or len(set(class_names.values())) < len(class_names):
        raise ValueError(
            f"class_names must give each class a name of its own; without one: {unnamed}, got {class_names}."
        )
    document: dict[str, Any]
    if path.name.lower().endswith(".mrk.json"):
        if affine is None:
            raise ValueError("affine is needed for a .mrk.json file: Slicer's boxes are in millimetres.")
        document = slicer_document(rows, class_names, affine)
    else:
        entries = []
        for label, *sides in rows:
            half = len(sides) // 2
            entries.append({"class": class_names.get(label, label), "start": sides[:half], "stop": sides[half:]})
        document = {"coordinate_system": "voxel", "boxes": entries}
    if class_names:
        document["classes"] = {name: number for number, name in class_names.items()}
    with path.open("w" if overwrite else "x", encoding="utf-8") as file:
        json.dump(document, file, indent=1)
        file.write("\n")


def _checked_rows(boxes: npt.ArrayLike | torch.Tensor) -> list[list[int]]:
    tensor = torch.as_tensor(boxes)
    if tensor.ndim != 2 or tensor.shape[1] not in (5, 7):
        raise ValueError(f"boxes must have the shape (N, 1 + 2 D) with D = 2 or 3, got {tuple(tensor.shape)}.")
    if tensor.is_floating_point() and tensor.numel():
        raise ValueError(f"boxes must be integers, got {tensor.dtype}.")
    ndim = tensor.shape[1] // 2
    rows = [row for row in tensor.tolist() if row[0] != -1]
    for row in rows:
        start, stop = row[1 : 1 + ndim], row[1 + ndim :]
        if row[0] < 1 or min(start) < 0 or any(low >= high for low, high in zip(start, stop, strict=True)):
            raise ValueError(f"boxes has the row {row}: class must be >= 1 (or -1, padding) and 0 <= start < stop.")
    return rows
