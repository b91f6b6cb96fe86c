"""Points that people set in 3D Slicer: read them from point lists into voxels of one grid.

Markups of type ``Fiducial`` (``.mrk.json``), LPS unless the file says RAS, and Slicer's older ``.fcsv`` tables. The
class of a point is its label, its markup's name, or the file's name, whatever the case and with a number behind it
("tumour-3"). Points that are not placed ("positionStatus") are none.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medconstraints.boxes.fields import Refusal, class_of_texts, coordinate_system, fit_schema, vector
from medconstraints.boxes.files import BoxFault, BoxFileError
from medconstraints.boxes.geometry import AffineLike, checked_grid
from medconstraints.boxes.records import read_text, table_comments
from medconstraints.boxes.slicer import SLICER_SCHEMA

__all__ = ["read_points"]

# Names that Slicer gives by itself: "F", "F_1", "MarkupsFiducial", then "-1" for the point.
DEFAULT_NAME = re.compile(r"(F|P|MarkupsFiducial|Point(List)?)?([ _-]\d+)*", re.I)
FCSV = ("id", "x", "y", "z", "ow", "ox", "oy", "oz", "vis", "sel", "lock", "label", "desc", "associatedNodeID")


def read_points(
    path: str | PathLike[str],
    *,
    affine: AffineLike,
    shape: Sequence[int],
    classes: Mapping[str, int] | None = None,
    num_classes: int | None = None,
) -> torch.Tensor:
    r"""Read a point list into rows ``[class, i, j, k]`` of one voxel grid.

    Args:
        path: ``.mrk.json`` or ``.fcsv``.
        affine: voxel index -> RAS mm of the grid, (4, 4).
        shape: spatial shape of that grid, three sizes.
        classes: class name -> number; without any, names must be numbers.
        num_classes: classes of the network with the background; others are refused.

    Returns:
        int64 tensor (N, 4) of voxels inside the grid.

    Raises:
        FileNotFoundError: no such file.
        BoxFileError: points that cannot be used, each with its reason: outside the volume, of no class.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "points.fcsv"
        >>> _ = path.write_text("# CoordinateSystem = RAS\n# columns = id,x,y,z,label\n1,2.2,3.4,1,1\n")
        >>> read_points(path, affine=np.eye(4), shape=(5, 5, 5))
        tensor([[1, 2, 3, 1]])
    """
    path, names = Path(path).expanduser(), dict(classes or {})
    stem = re.sub(r"(\.mrk)?\.json$|\.fcsv$", "", path.name, flags=re.I)
    grid = checked_grid(affine, shape, "affine", "shape")
    if grid.ndim != 3:
        raise ValueError(f"shape: expected three sizes, as Slicer's points have, got {grid.shape}.")
    if not path.is_file():
        raise FileNotFoundError(f"no point file at {path}")
    rows, faults = [], []
    try:
        points = list(_fcsv(path) if path.name.lower().endswith(".fcsv") else _markups(path))
    except Refusal as fault:
        raise BoxFileError(path, [BoxFault(None, "", str(fault))]) from None
    for number, (where, system, position, texts) in enumerate(points):
        try:
            named = [text for text in texts if not DEFAULT_NAME.fullmatch(text.strip())]
            label = class_of_texts(named or [stem], names, stem, DEFAULT_NAME)
            if num_classes is not None and label >= num_classes:
                raise Refusal(f"class {label} is none of the classes 1 to {num_classes - 1}")
            place = vector(position, "position") * ([-1, -1, 1] if coordinate_system(system) == "LPS" else [1, 1, 1])
            voxel = np.rint(np.linalg.solve(grid.affine, [*place, 1.0])[:3]).astype(int)
            if (voxel < 0).any() or (voxel >= grid.shape).any():
                raise Refusal(f"lies outside the volume, at voxel {voxel.tolist()} of {list(grid.shape)}")
            rows.append([label, *voxel.tolist()])
        except Refusal as fault:
            faults.append(BoxFault(number, where, str(fault)))
    if faults:
        raise BoxFileError(path, faults)
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)


# Place in the file, system, coordinates, and texts that may name a class.
_Point = tuple[str, Any, Sequence[Any], list[str]]


def _markups(path: Path) -> list[_Point]:
    try:
        document = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise Refusal(f"is not valid JSON ({error}); export it again") from None
    fit_schema(document, SLICER_SCHEMA)
    found: list[_Point] = []
    for number, markup in enumerate(document["markups"]):
        if not isinstance(markup, dict) or markup.get("type") != "Fiducial":
            raise Refusal(f"markups[{number}]: expected a point list, type 'Fiducial'; save boxes in other files")
        for place, point in enumerate(markup.get("controlPoints") or ()):
            if not isinstance(point, dict) or point.get("positionStatus", "defined") != "defined":
                continue
            texts = [str(point.get("label") or ""), str(markup.get("name") or ""), str(point.get("description") or "")]
            where = f"markups[{number}].controlPoints[{place}]"
            found.append((where, markup.get("coordinateSystem", "LPS"), point.get("position") or [], texts))
    return found


def _fcsv(path: Path) -> list[_Point]:
    lines = read_text(path).splitlines()
    count, system, _ = table_comments(lines)
    told = [re.fullmatch(r"#\s*columns\s*=\s*(.*)", line.strip()) for line in lines[:count]]
    columns = next((match[1].split(",") for match in told if match), list(FCSV))
    found: list[_Point] = []
    for line, cells in enumerate(csv.reader(lines[count:]), start=count + 1):
        row = dict(zip(columns, cells, strict=False))
        if cells:
            texts = [row.get("label", ""), row.get("desc", "")]
            found.append((f"line {line}", system, [row.get(axis, "") for axis in "xyz"], texts))
    return found
