"""Boxes drawn by people: read them from JSON, CSV or 3D Slicer files into voxel rows, and write them for a viewer.

Rows are ``[class, start_1..start_D, stop_1..stop_D]``: int64 voxel indices of one image grid, half-open, class >= 1.
Axis numbers in this module, its files and its messages count from 1, in the order of the image array's axes.

**JSON**::

    {"coordinate_system": "RAS", "classes": {"prostate": 1},
     "boxes": [{"class": "prostate", "start": [-12.5, 3.0, 40.0], "stop": [20.0, 31.0, 62.5]}]}

**CSV**, columns ``class,start_1,start_2,start_3,stop_1,stop_2,stop_3`` or ``class,x_min,y_min,z_min,x_max,y_max,z_max``
(the same numbers under other names: ``x_max`` is ``stop_1``, so in voxels it is the first index *after* the box); two
coordinates each for a 2D image. The coordinate system stands in a column ``coordinate_system`` or in a leading line
``# coordinate_system: RAS``; without either it is ``voxel``. A column ``image`` lets one file hold many volumes; a row
that has nothing but its image name says that this volume was looked at and has no box.

**3D Slicer** markups ROI (``.mrk.json``, schema 1.0.x): type ``ROI``, roiType ``Box``, LPS unless the file says RAS.
Apply ("harden") a transform above the ROI before saving, Slicer does not write it into this file.

Coordinate systems: ``voxel`` are half-open integer indices. ``RAS`` and ``LPS`` are millimetres; ``start`` and ``stop``
are two opposite corners, in any order, and lie on edges: voxel i covers [i - 0.5, i + 0.5]. Each side goes to the
nearest voxel edge, and a box thinner than a voxel keeps the voxel at its centre. A box flat in one direction is one
voxel thick there. A millimetre box, or a rotated ROI, whose sides do not run along the voxel axes becomes the bounding
box of its corners in the voxel grid: it still holds the whole object but is looser than the one that was drawn.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["BoxFault", "BoxFileError", "read_boxes", "write_boxes"]

FORMATS = ("json", "csv", "slicer")
SYSTEMS = {"voxel": "voxel", "ras": "RAS", "lps": "LPS"}
SLICER_SCHEMA = (
    "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
    "markups-schema-v1.0.3.json#"
)
# Names that Slicer gives by itself ("R", "R_1", "ROI", then "-1" for the point): they say nothing about the class.
SLICER_DEFAULT_NAME = re.compile(r"(R|ROI)?(_\d+)?(-\d+)?")
SHOWN_FAULTS = 10
LARGEST = 1e9  # coordinates beyond this are mistakes, and would overflow
SLACK_VOXELS = 0.5  # a hand-drawn millimetre box may reach this far beyond the volume
ALIGNED = 1e-4  # share of a box side that may run along a second voxel axis: float32 affines are not exact

Array = npt.NDArray[np.float64]
AffineLike = npt.ArrayLike | torch.Tensor


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


class _Fault(Exception):
    """Reason why one row cannot be used; collected, never shown to a user."""


@dataclass(frozen=True)
class _Record:
    """One row as written: not checked, place known; ``fault`` where it could not even be taken apart."""

    row: int
    where: str
    fields: Mapping[str, Any]
    slicer: bool = False
    fault: str = ""


@dataclass(frozen=True)
class _Grid:
    """A voxel grid: affine (D + 1, D + 1) from voxel index to RAS mm, and shape."""

    affine: Array
    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def same_as(self, other: _Grid) -> bool:
        return self.shape == other.shape and np.allclose(self.affine, other.affine, rtol=0, atol=1e-6)


@dataclass(frozen=True)
class _Solid:
    """A box in RAS mm: centre (D,) and its edge vectors as the columns of a (D, D) matrix."""

    centre: Array
    edges: Array


def read_boxes(
    path: str | PathLike[str],
    *,
    affine: AffineLike,
    shape: Sequence[int],
    classes: Mapping[str, int] | None = None,
    format: str | None = None,
    image: str | None = None,
    stored_affine: AffineLike | None = None,
    stored_shape: Sequence[int] | None = None,
) -> torch.Tensor:
    r"""Read a box file into rows ``[class, start_1..start_D, stop_1..stop_D]`` of one voxel grid.

    The formats and the meaning of the coordinates are described at the top of this module. A file without boxes gives a
    tensor of no rows. All faulty rows of a file are reported in one error.

    Args:
        path: the box file.
        affine: voxel index -> RAS mm of the grid in which the rows are wanted, (4, 4) as nibabel's; (3, 3) also for 2D.
        shape: spatial shape of that grid, two or three sizes.
        classes: class name -> number; adds to the names that the file defines. Where any names are known, numbers other
            than theirs are refused.
        format: "json", "csv" or "slicer"; None chooses by extension and, for JSON, by content.
        image: file name of the volume, with or without folder and extension: selects the rows of a CSV file that has a
            column ``image``. Files without that column belong to one volume and ignore it.
        stored_affine: affine of the grid to which ``voxel`` coordinates refer, when the image was re-oriented or
            resampled after loading; default: ``affine``.
        stored_shape: spatial shape of that grid; default: ``shape``.

    Returns:
        int64 tensor (N, 1 + 2 D), inside the volume, no padding rows.

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
    target = _grid(affine, shape, "affine", "shape")
    if (stored_affine is None) != (stored_shape is None):
        raise ValueError("give stored_affine and stored_shape together, or neither.")
    stored = target
    if stored_affine is not None and stored_shape is not None:
        stored = _grid(stored_affine, stored_shape, "stored_affine", "stored_shape")
        if stored.ndim != target.ndim:
            raise ValueError(f"stored_shape has {stored.ndim} sizes and shape {target.ndim}: they must agree.")
    names = _checked_classes(classes or {}, "classes")
    if not path.is_file():
        raise FileNotFoundError(f"no box file at {path}")

    try:
        records, file_names = _records(path, format, target.ndim, image)
        for name, number in file_names.items():
            if names.setdefault(name, number) != number:
                raise _Fault(f"class {name!r} is {number} in this file but {names[name]} in classes=; use one number")
    except _Fault as fault:
        raise BoxFileError(path, [BoxFault(None, "", str(fault))]) from None

    rows, faults = [], []
    for record in records:
        try:
            rows.append(_row(record, names, target, stored, path))
        except _Fault as fault:
            faults.append(BoxFault(record.row, record.where, str(fault)))
    if faults:
        raise BoxFileError(path, faults)
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 1 + 2 * target.ndim)


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
    slicer = path.name.lower().endswith(".mrk.json")
    if path.suffix.lower() != ".json":
        raise ValueError(f"path must end in .json or .mrk.json, got {path.name!r}.")
    rows = _checked_rows(boxes)
    class_names = dict(class_names or {})
    unnamed = sorted({row[0] for row in rows} - set(class_names)) if class_names else []
    if unnamed or len(set(class_names.values())) < len(class_names):
        raise ValueError(
            f"class_names must give each class a name of its own; without one: {unnamed}, got {class_names}."
        )
    names = {number: class_names.get(number, str(number)) for number in sorted({row[0] for row in rows})}
    document: dict[str, Any]
    if slicer:
        if affine is None:
            raise ValueError("affine is needed for a .mrk.json file: Slicer's boxes are in millimetres.")
        document = {"@schema": SLICER_SCHEMA, "markups": _markups(rows, names, affine)}
    else:
        boxes_out = []
        for label, *sides in rows:
            half = len(sides) // 2
            shown = class_names.get(label, label)
            boxes_out.append({"class": shown, "start": sides[:half], "stop": sides[half:]})
        document = {"coordinate_system": "voxel", "boxes": boxes_out}
    if class_names:
        document["classes"] = {name: number for number, name in class_names.items()}
    with path.open("w" if overwrite else "x", encoding="utf-8") as file:
        json.dump(document, file, indent=1)
        file.write("\n")


# From file to records


def _records(path: Path, format: str | None, ndim: int, image: str | None) -> tuple[list[_Record], dict[str, int]]:
    """Rows of a file, and the class names that it defines."""
    name = path.name.lower()
    if format is None and not name.endswith((".json", ".csv")):
        raise _Fault("unknown kind of box file; use .json, .csv or .mrk.json, or say format=")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Fault(f"is not UTF-8 text ({error.reason}); save it as UTF-8") from None
    if format == "csv" or (format is None and name.endswith(".csv")):
        return _csv_records(text, ndim, image), {}
    try:
        document = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _Fault(f"is not valid JSON ({error}); correct it or export it again") from None
    if not isinstance(document, dict):
        raise _Fault(f"holds a JSON {type(document).__name__}; expected an object with a list 'boxes' or 'markups'")
    slicer = format == "slicer" or (format is None and (name.endswith(".mrk.json") or "markups" in document))
    key = "markups" if slicer else "boxes"
    entries = document.get(key)
    if not isinstance(entries, list):
        raise _Fault(f"has no list {key!r}; a {'Slicer' if slicer else 'JSON'} box file needs one")
    shared: dict[str, Any] = {}
    if slicer:
        schema = str(document.get("@schema", SLICER_SCHEMA))
        if not re.search(r"markups-schema-v1\.\d+\.\d+\.json", schema.lower()):
            raise _Fault(f"has the schema {schema!r}; expected Slicer's markups-schema-v1.x, save it with Slicer 4.11+")
    else:
        if "coordinate_system" not in document:
            raise _Fault('has no \'coordinate_system\'; add "voxel", "RAS" or "LPS"')
        shared = {"coordinate_system": document["coordinate_system"]}
    names = document.get("classes", {})
    if not isinstance(names, Mapping):
        raise _Fault("'classes' must be an object from class name to number")
    try:
        names = _checked_classes(names, "'classes'")
    except ValueError as error:
        raise _Fault(str(error)) from None
    needed = "an ROI" if slicer else "class, start and stop"
    records = [
        _Record(i, f"{key}[{i}]", {**shared, **entry}, slicer)
        if isinstance(entry, dict)
        else _Record(i, f"{key}[{i}]", {}, slicer, fault=f"is not an object with {needed}; correct the entry")
        for i, entry in enumerate(entries)
    ]
    return records, names


def _csv_records(text: str, ndim: int, image: str | None) -> list[_Record]:
    lines = text.splitlines()
    system, comments = "voxel", 0
    while comments < len(lines) and (not lines[comments].strip() or lines[comments].lstrip().startswith("#")):
        key, _, value = lines[comments].strip().lstrip("#").partition(":")
        if key.strip().lower() == "coordinate_system":
            system = value.strip().rstrip(",")  # a spreadsheet pads a comment line with commas
        comments += 1
    reader = csv.reader(lines[comments:], skipinitialspace=True)
    try:
        header = [cell.strip().lower() for cell in next(reader, [])]
        table = [(comments + reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise _Fault(f"is not readable as CSV ({error}); save it as comma-separated text") from None

    start, stop = _csv_columns(header, ndim)
    records, images = [], set()
    for number, (line, cells) in enumerate(table, start=1):
        where = f"row {number} (line {line})"
        row = dict(zip(header, (cell.strip() for cell in cells), strict=False))
        if "image" in header:
            name = row.pop("image", "")
            images.add(name)
            if image is not None and _stem(name) != _stem(image):
                continue
            if name and not any(row.values()):
                continue
        fields: dict[str, Any] = {
            "class": row.get("class", ""),
            "coordinate_system": row.get("coordinate_system") or system,
            "start": [row.get(column, "") for column in start],
            "stop": [row.get(column, "") for column in stop],
        }
        fault = f"has {len(cells)} cells, the header has {len(header)}; correct the row"
        records.append(_Record(number, where, fields, fault=fault if len(cells) > len(header) else ""))
    listed = ", ".join(sorted(images)[:5])
    if "image" in header and image is None and len(images) > 1:
        raise _Fault(f"holds boxes of {len(images)} images ({listed}); say which with image=")
    if "image" in header and image is not None and _stem(image) not in {_stem(name) for name in images}:
        raise _Fault(
            f"has no row for the image {Path(image).name!r} (it has: {listed}); "
            "a volume without boxes needs a row with its name alone"
        )
    return records


def _csv_columns(header: Sequence[str], ndim: int) -> tuple[list[str], list[str]]:
    axes = range(ndim)
    forms = [
        ([f"start_{i + 1}" for i in axes], [f"stop_{i + 1}" for i in axes], "start_3"),
        ([f"{'xyz'[i]}_min" for i in axes], [f"{'xyz'[i]}_max" for i in axes], "z_min"),
    ]
    for start, stop, third in forms:
        if "class" in header and set(start + stop) <= set(header):
            if ndim == 2 and third in header:
                raise _Fault(f"has three coordinates a corner (column {third}), the image is 2D; remove the third")
            return start, stop
    wanted = " or ".join(",".join(["class", *start, *stop]) for start, stop, _ in forms)
    found = ",".join(header)
    hint = "separate columns with commas" if ";" in found or "\t" in found else "add the missing columns"
    raise _Fault(f"needs the columns {wanted} for a {ndim}D image; found {found or 'none'}; {hint}")


def _stem(name: str) -> str:
    """File name without folder and without extension (two-part ones too)."""
    name = re.split(r"[\\/]", name.strip())[-1]
    return re.sub(r"(\.nii)?\.(gz|nii|mha|mhd|nrrd|nhdr|png|jpe?g|bmp|tiff?|npy|npz|dcm)$", "", name, flags=re.I)


# From a record to a row


def _row(record: _Record, names: Mapping[str, int], target: _Grid, stored: _Grid, path: Path) -> list[int]:
    if record.fault:
        raise _Fault(record.fault)
    fields = record.fields
    if record.slicer:
        system, solid = _slicer_solid(fields, target.ndim)
        label = _slicer_class(fields, names, path)
    else:
        for key in ("class", "start", "stop"):
            if key not in fields:
                raise _Fault(f"has no {key!r}; add it")
        label = _class_number(fields["class"], names)
        system = _system(fields["coordinate_system"])
        start = _vector(fields["start"], "start", target.ndim)
        stop = _vector(fields["stop"], "stop", target.ndim)
        if system == "voxel":
            sides = _voxel_sides(start, stop, stored)
            if target.same_as(stored):
                return [label, *sides]
            solid = _voxel_solid(start, stop, stored)
        else:
            if (start == stop).any():
                axis = int(np.flatnonzero(start == stop)[0]) + 1
                raise _Fault(f"is empty: start and stop are equal along axis {axis}; give it at least one voxel")
            sign = np.array([-1.0, -1.0, 1.0][: target.ndim]) if system == "LPS" else np.ones(target.ndim)
            solid = _Solid(sign * (start + stop) / 2, np.diag(np.abs(stop - start)))
    if system != "voxel":
        problem = _outside(solid, stored, np.full(target.ndim, SLACK_VOXELS))
        if problem:
            raise _Fault(problem + _sign_hint(solid, stored, system))
    if not target.same_as(stored):
        # The edge of a resampled grid may stand half a voxel of either grid inside the stored one: no crop.
        steps = np.abs(np.linalg.solve(target.affine[:-1, :-1], stored.affine[:-1, :-1])).sum(axis=1)
        problem = _outside(solid, target, SLACK_VOXELS * (1 + steps))
        if problem:
            raise _Fault(f"{problem}, as the image is now: read boxes before any crop")
    return [label, *_fit(solid, target)]


def _class_number(value: Any, names: Mapping[str, int]) -> int:
    known = f"known: {', '.join(f'{name} = {number}' for name, number in names.items()) or 'none'}"
    if isinstance(value, str):
        value = value.strip()
        if value in names:
            return names[value]
        if not re.fullmatch(r"[+-]?\d{1,9}", value):
            shown = f"unknown class {value!r}" if value else "has no class"
            raise _Fault(f"{shown} ({known}); use one of these or add it to classes=")
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0 or value >= 10**9:
        raise _Fault(f"class must be a name or a whole number, got {value!r}")
    if value < 1:
        raise _Fault(f"class {int(value)} is no class to box: numbers start at 1, 0 is the background")
    if names and value not in names.values():
        raise _Fault(f"unknown class {int(value)} ({known}); use one of these or add it to classes=")
    return int(value)


def _system(value: Any) -> str:
    system = SYSTEMS.get(str(value).strip().lower())
    if system is None:
        raise _Fault(f"unknown coordinate system {value!r}; use voxel, RAS or LPS")
    return system


def _vector(values: Any, name: str, size: int) -> Array:
    if not isinstance(values, list):
        raise _Fault(f"{name!r} must be a list of {size} numbers, got {values!r}")
    if len(values) != size:
        raise _Fault(f"{name!r} has {len(values)} numbers, expected {size}")
    out = []
    for i, value in enumerate(values, start=1):
        if value == "":
            raise _Fault(f"{name}_{i} is empty; fill it in")
        try:
            number = math.nan if value is None or isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            raise _Fault(f"{name}_{i} is {value!r}, which is no number") from None
        if not abs(number) < LARGEST:  # also NaN
            raise _Fault(f"{name}_{i} is {value!r}; every coordinate must be a finite number, below {LARGEST:g}")
        out.append(number)
    return np.array(out, dtype=np.float64)


def _voxel_sides(start: Array, stop: Array, grid: _Grid) -> list[int]:
    for name, corner in (("start", start), ("stop", stop)):
        fractions = np.flatnonzero(corner != np.round(corner))
        if fractions.size:
            axis = int(fractions[0])
            raise _Fault(
                f"{name}_{axis + 1} is {corner[axis]:g}, voxel coordinates are whole numbers; "
                "for millimetres set coordinate_system to RAS or LPS"
            )
    for axis, (low, high, size) in enumerate(zip(start, stop, grid.shape, strict=True), start=1):
        if low >= high:
            kind = "empty" if low == high else "inverted"
            raise _Fault(
                f"is {kind} along axis {axis} (start {low:g}, stop {high:g}); stop is the first index after it"
            )
        if low < 0 or high > size:
            raise _Fault(_beyond(low, high, size, axis))
    return [int(side) for side in (*start, *stop)]


def _voxel_solid(start: Array, stop: Array, grid: _Grid) -> _Solid:
    linear, origin = grid.affine[:-1, :-1], grid.affine[:-1, -1]
    return _Solid(linear @ ((start + stop - 1) / 2) + origin, linear * (stop - start))


# Slicer


def _slicer_solid(fields: Mapping[str, Any], ndim: int) -> tuple[str, _Solid]:
    if ndim != 3:
        raise _Fault("is a Slicer ROI, which is three-dimensional, but the image is 2D; use a JSON or CSV box file")
    kind = fields.get("type")
    if kind != "ROI":
        raise _Fault(f"is a {kind!r} markup, not an ROI; keep only ROI boxes in the file")
    if fields.get("roiType", "Box") != "Box":
        raise _Fault(f"has the roiType {fields['roiType']!r}; only 'Box' can be read, draw it as a box ROI in Slicer")
    if fields.get("insideOut"):
        raise _Fault("is marked 'inside out': it would exclude the object; switch that off in Slicer and save again")
    units = fields.get("coordinateUnits", "mm")
    if (units[0] if isinstance(units, list) and units else units) != "mm":
        raise _Fault(f"is in {units!r}; save it in millimetres")
    system = _system(fields.get("coordinateSystem", "LPS"))
    if system == "voxel":
        raise _Fault("unknown coordinate system 'voxel' for a Slicer ROI; use LPS or RAS")
    centre_field = fields.get("center")
    if centre_field is None:  # hand-written files leave it to the only control point, as Slicer accepts
        points = _control_points(fields)
        centre_field = points[0].get("position") if points else None
    for key, value in (("center", centre_field), ("size", fields.get("size"))):
        if value is None:
            raise _Fault(f"has no {key!r}; place the ROI in Slicer and save it again")
    centre, size = _vector(centre_field, "center", 3), _vector(fields["size"], "size", 3)
    axes = np.eye(3)
    if fields.get("orientation") is not None:
        axes = _vector(fields["orientation"], "orientation", 9).reshape(3, 3)
    if not np.allclose(axes.T @ axes, np.eye(3), rtol=0, atol=1e-3):
        raise _Fault("'orientation' is not a rotation: its columns must be orthogonal unit vectors")
    if (size <= 0).any():
        axis = int(np.flatnonzero(size <= 0)[0]) + 1
        raise _Fault(f"is empty: its size along ROI axis {axis} is {size[axis - 1]:g} mm; give it some thickness")
    sign = np.array([-1.0, -1.0, 1.0]) if system == "LPS" else np.ones(3)
    return system, _Solid(sign * centre, sign[:, None] * axes * size)


def _control_points(fields: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    points = fields.get("controlPoints")
    return [point for point in points if isinstance(point, dict)] if isinstance(points, list) else []


def _slicer_class(fields: Mapping[str, Any], names: Mapping[str, int], path: Path) -> int:
    """Class of a markup: its label, else its name, its point's label or description, else the file's name.

    Slicer itself writes no node name: it takes the file's name for one, and the point's label keeps the name that the
    node had when it was drawn ("prostate-1"). MONAI's detection bundles write ``"label": {"value": 0}``.
    """
    label = fields.get("label")
    label = label.get("value") if isinstance(label, dict) else label
    if label not in (None, ""):
        return _class_number(label, names)
    point = next(iter(_control_points(fields)), {})
    point_label = str(point.get("label") or "")
    texts = [str(fields.get("name") or ""), point_label, re.sub(r"-\d+$", "", point_label)]
    texts = [text for text in [*texts, str(point.get("description") or "")] if text.strip()]
    for text in texts:
        if text.strip() in names or text.strip().isdecimal():
            return _class_number(text, names)
    stem = re.sub(r"(\.mrk)?\.json$", "", path.name, flags=re.I)
    named = [text for text in texts if not SLICER_DEFAULT_NAME.fullmatch(text)]
    if not named and stem in names:
        return names[stem]
    return _class_number((named or texts or [""])[0], names)


def _markups(rows: Sequence[Sequence[int]], names: Mapping[int, str], affine: AffineLike) -> list[dict[str, Any]]:
    if any(len(row) != 7 for row in rows):
        raise ValueError("a .mrk.json file holds three-dimensional boxes; write 2D boxes as .json.")
    matrix = _affine(affine, 3, "affine")
    linear = matrix[:3, :3]
    spacing = np.linalg.norm(linear, axis=0)
    axes = linear / spacing
    if not np.allclose(axes.T @ axes, np.eye(3), rtol=0, atol=1e-3):
        raise ValueError("affine is sheared: Slicer's ROI boxes are rectangular; write the boxes as .json.")
    sign = np.array([-1.0, -1.0, 1.0])  # RAS -> LPS, the system of the files that Slicer saves
    markups = []
    for label, *sides in rows:
        start, stop = np.array(sides[:3]), np.array(sides[3:])
        centre = (sign * (linear @ ((start + stop - 1) / 2) + matrix[:3, 3])).tolist()
        orientation = (sign[:, None] * axes).ravel().tolist()
        point = {"id": "1", "label": names[label], "description": "", "position": centre, "orientation": orientation}
        markups.append(
            {
                "name": names[label],
                "type": "ROI",
                "coordinateSystem": "LPS",
                "coordinateUnits": "mm",
                "locked": False,
                "roiType": "Box",
                "center": centre,
                "orientation": orientation,
                "size": (spacing * (stop - start)).tolist(),
                "insideOut": False,
                "controlPoints": [{**point, "positionStatus": "defined"}],
            }
        )
    return markups


# Geometry


def _affine(affine: AffineLike, ndim: int, name: str) -> Array:
    full = np.asarray(affine.detach().cpu() if isinstance(affine, torch.Tensor) else affine, dtype=np.float64)
    if full.shape not in {(4, 4), (ndim + 1, ndim + 1)}:
        raise ValueError(f"{name} must be a (4, 4) matrix from voxel index to RAS mm, got shape {full.shape}.")
    out = np.eye(ndim + 1)
    out[:ndim, :ndim], out[:ndim, ndim] = full[:ndim, :ndim], full[:ndim, -1]
    scale = np.prod(np.linalg.norm(out[:ndim, :ndim], axis=0))
    if not np.isfinite(out).all() or abs(np.linalg.det(out[:ndim, :ndim])) <= 1e-9 * scale:
        raise ValueError(f"{name} must be finite and invertible in its first {ndim} axes; correct the image's header.")
    return out


def _grid(affine: AffineLike, shape: Sequence[int], affine_name: str, shape_name: str) -> _Grid:
    sizes = tuple(int(size) for size in shape)
    if len(sizes) not in (2, 3) or min(sizes) < 1:
        raise ValueError(f"{shape_name} must be the spatial shape, two or three sizes of at least 1, got {sizes}.")
    return _Grid(_affine(affine, len(sizes), affine_name), sizes)


def _edge_range(solid: _Solid, grid: _Grid) -> tuple[Array, Array, Array]:
    """Bounding box of a solid in edge coordinates (0 is the first voxel's edge), and its edge vectors in voxels."""
    linear, origin = grid.affine[:-1, :-1], grid.affine[:-1, -1]
    centre = np.linalg.solve(linear, solid.centre - origin) + 0.5
    edges = np.asarray(np.linalg.solve(linear, solid.edges), dtype=np.float64)
    half = np.abs(edges).sum(axis=1) / 2
    # Far below any voxel edge; takes away the affine's rounding, so that edges hit exactly stay hit.
    low: Array = np.round(centre - half, 6)
    high: Array = np.round(centre + half, 6)
    return low, high, edges


def _beyond(low: float, high: float, size: int, axis: int) -> str:
    span = f"{low:g} to {high:g}, the volume spans 0 to {size}"
    if high <= 0 or low >= size:
        return f"lies entirely outside the volume along axis {axis} ({span})"
    over, end = (-low, "start") if -low >= high - size else (high - size, "end")
    return f"reaches {over:g} voxels beyond the {end} of axis {axis} ({span})"


def _outside(solid: _Solid, grid: _Grid, slack: Array) -> str:
    """Say how a solid leaves the grid by more than ``slack`` voxels per axis; empty when it does not."""
    low, high, edges = _edge_range(solid, grid)
    sizes = np.array(grid.shape)
    share = np.abs(edges)
    aligned = bool((share.max(axis=0) >= (1 - ALIGNED) * share.sum(axis=0)).all())
    for axis, size in enumerate(grid.shape):
        gone = high[axis] <= 0 or low[axis] >= size
        if gone or (aligned and (low[axis] < -slack[axis] or high[axis] > size + slack[axis])):
            return _beyond(float(low[axis]), float(high[axis]), size, axis + 1)
    if not aligned:
        # The bounding box of a tilted solid may leave the volume although the object does not; ask along the solid's
        # own axes instead: there it has to stay within the extent of the volume.
        corners = np.array(list(product(*((0.0, float(size)) for size in sizes)))).T - 0.5
        world = grid.affine[:-1, :-1] @ corners + grid.affine[:-1, -1:] - solid.centre[:, None]
        extent = np.linalg.solve(solid.edges, world)
        room = np.abs(np.linalg.solve(solid.edges, grid.affine[:-1, :-1])) @ slack
        over = np.maximum(extent.min(axis=1) - room + 0.5, 0.5 - extent.max(axis=1) - room)
        if (over > 0).any():
            axis = int(over.argmax())
            length = float(over[axis] * np.linalg.norm(solid.edges[:, axis]))
            return (
                f"reaches {length:.3g} mm beyond the volume along its own axis {axis + 1} (volume shape {grid.shape})"
            )
    return ""


def _sign_hint(solid: _Solid, grid: _Grid, system: str) -> str:
    sign = np.array([-1.0, -1.0, 1.0][: grid.ndim])
    mirrored = _Solid(sign * solid.centre, sign[:, None] * solid.edges)
    if _outside(mirrored, grid, np.full(grid.ndim, SLACK_VOXELS)):
        return "; check that it belongs to this image, and its coordinate system"
    return f"; it would lie inside as {'LPS' if system == 'RAS' else 'RAS'}: correct the coordinate system"


def _fit(solid: _Solid, grid: _Grid) -> list[int]:
    """Nearest voxel edges of a solid that overlaps the grid, cut to the grid, at least one voxel thick."""
    low, high, _ = _edge_range(solid, grid)
    start, stop = np.floor(low + 0.5), np.floor(high + 0.5)
    thin = stop <= start
    start[thin] = np.floor((low + high) / 2)[thin]
    sizes = np.array(grid.shape)
    start = np.clip(start, 0, sizes - 1)
    stop = np.clip(stop, start + 1, sizes)
    return [int(side) for side in (*start, *stop)]


# Checks of arguments


def _checked_classes(classes: Mapping[str, int], name: str) -> dict[str, int]:
    for label, number in classes.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must map names to class numbers from 1 on, got {label!r}: {number!r}.")
    return dict(classes)


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
