"""From a record of a box file to a row ``[class, start_1..start_D, stop_1..stop_D]`` of a voxel grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from medconstraints.boxes.fields import Refusal, class_number, coordinate_system, fit_schema, vector
from medconstraints.boxes.geometry import (
    SLACK_VOXELS,
    Array,
    Grid,
    Solid,
    fit_to_grid,
    hint_at_system,
    looseness,
    overhang,
    overhang_of,
    voxel_solid,
    with_thickness,
)
from medconstraints.boxes.records import Record
from medconstraints.boxes.slicer import roi_class, roi_solid

__all__ = ["box_row"]


def box_row(
    record: Record,
    names: Mapping[str, int],
    target: Grid,
    stored: Grid,
    file_name: str,
    num_classes: int | None = None,
    *,
    max_looseness: float,
    doubt: str,
) -> list[int]:
    """Row of ``target`` for a record whose voxel coordinates refer to ``stored``; Refusal says why there is none."""
    if record.fault:
        raise Refusal(record.fault)
    fields, ndim = record.fields, target.ndim
    if record.slicer:
        system, solid = roi_solid(fields, ndim)
        label = roi_class(fields, names, file_name)
        _check_class(label, num_classes)
    else:
        fit_schema(fields, _schema(ndim))
        label = class_number(fields["class"], names)
        _check_class(label, num_classes)
        system = coordinate_system(fields["coordinate_system"])
        start, stop = vector(fields["start"], "start"), vector(fields["stop"], "stop")
        if system == "voxel":
            _check_voxels(start, stop, stored)
            if target.same_as(stored):
                return [label, *(int(side) for side in (*start, *stop))]
            solid = voxel_solid(start, stop, stored.affine)
        else:
            solid = _millimetre_solid(start, stop, system)
    if system != "voxel":
        if doubt:
            raise Refusal(f"is in millimetres, but of its image it is not known where they are: {doubt}")
        loose = looseness(solid, stored)
        if loose > max_looseness:
            raise Refusal(
                f"is turned against the voxels: the box along their axes is {loose:.2f} times as large, and tells "
                f"little of where the object ends; draw it along the axes, or allow it with max_looseness={loose:.2f}"
            )
        problem = overhang_of(solid, stored, np.full(ndim, SLACK_VOXELS))
        if problem:
            raise Refusal(problem + hint_at_system(solid, stored, system))
    if not target.same_as(stored):
        # The edge of a resampled grid may stand half a voxel of either grid inside the stored one: no crop.
        steps = np.abs(np.linalg.solve(target.affine[:-1, :-1], stored.affine[:-1, :-1])).sum(axis=1)
        problem = overhang_of(solid, target, SLACK_VOXELS * (1 + steps))
        if problem:
            raise Refusal(f"{problem}, as the image is now: read boxes before any crop")
    return [label, *fit_to_grid(solid, target)]


def _schema(ndim: int) -> dict[str, Any]:
    """Of the fields of one box; CSV has numbers as texts."""
    corner = {"type": "array", "minItems": ndim, "maxItems": ndim, "items": {"type": ["number", "string"]}}
    corner["description"] = f"a corner is a list of {ndim} numbers"
    return {
        "description": "add it",
        "required": ["class", "start", "stop"],
        "properties": {"start": corner, "stop": corner},
    }


def _check_class(label: int, num_classes: int | None) -> None:
    """Refuse a class that the network does not have."""
    if num_classes is not None and label >= num_classes:
        raise Refusal(
            f"class {label} is none of the {num_classes - 1} classes to box (1 to {num_classes - 1}, as num_classes is "
            f"{num_classes} with the background); correct the class or num_classes"
        )


def _check_voxels(start: Array, stop: Array, grid: Grid) -> None:
    """Refuse corners that are no whole numbers, no box, or not inside the grid."""
    for name, corner in (("start", start), ("stop", stop)):
        fractions = np.flatnonzero(corner != np.round(corner))
        if fractions.size:
            axis = int(fractions[0])
            raise Refusal(
                f"{name}_{axis + 1} is {corner[axis]:g}, voxel coordinates are whole numbers; "
                "for millimetres set coordinate_system to RAS or LPS"
            )
    for axis, (low, high, size) in enumerate(zip(start, stop, grid.shape, strict=True), start=1):
        if low >= high:
            kind = "empty" if low == high else "inverted"
            raise Refusal(
                f"is {kind} along axis {axis} (start {low:g}, stop {high:g}); stop is the first index after it"
            )
        if low < 0 or high > size:
            raise Refusal(overhang(low, high, size, axis))


def _millimetre_solid(start: Array, stop: Array, system: str) -> Solid:
    """Box between two opposite corners, in any order."""
    sides = np.abs(stop - start)
    if not sides.any():
        raise Refusal("is empty: start and stop are the same point; a box may be flat, but not in every direction")
    solid = Solid((start + stop) / 2, np.diag(with_thickness(sides)))
    return solid.mirrored() if system == "LPS" else solid
