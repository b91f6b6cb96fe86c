"""What can be said of a mask without a reference: sizes, places, pieces."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy import ndimage

__all__ = ["facts_path", "mask_facts", "read_facts"]

MOST_VOXELS = 1 << 26  # of a bounding box in which pieces are counted


def facts_path(mask: Path) -> Path:
    """Where the facts of a mask stand: beside it, as JSON.

    Example:
        >>> facts_path(Path("masks/knee_seg.nii.gz")).name
        'knee_seg.nii.gz.json'
    """
    return mask.with_name(f"{mask.name}.json")  # with the ending: x.nii.gz and x.nrrd have a mask each


def read_facts(mask: Path) -> dict[str, Any]:
    """The facts beside a mask; empty where there are none."""
    file = facts_path(mask)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def mask_facts(
    mask: npt.NDArray[Any], affine: Any, *, classes: Mapping[int, str] | None = None
) -> dict[str, dict[str, Any]]:
    """For each class, by its name, what JSON can hold.

    Keys: "value" in the mask, "voxels" and "ml"; and where there are any, "centroid_mm" in RAS, "place", where that is
    as a share of the image's extent to the right, front and top, "start" and "stop" of the bounding box in voxels,
    half-open, "pieces" that touch nowhere (not even at a corner; not told of very large
    boxes), and "at_border": whether the first or last slice along an axis of more than one is reached, so that a part
    may lie outside the image.

    Args:
        mask: class numbers (X, Y, Z), 0 is the background.
        affine: voxel index to RAS mm, (4, 4).
        classes: value -> name of each class; None takes the values that are there, and calls them by their number.

    Example:
        >>> found = mask_facts(np.pad(np.ones((2, 2, 2), int), 1), np.diag([2.0, 2.0, 5.0, 1.0]), classes={1: "cyst"})
        >>> found["cyst"]["ml"], found["cyst"]["centroid_mm"], found["cyst"]["pieces"]
        (0.16, [3.0, 3.0, 7.5], 1)
    """
    matrix = np.asarray(affine, dtype=np.float64)
    ml = abs(float(np.linalg.det(matrix[:3, :3]))) / 1000
    boxes = ndimage.find_objects(mask.astype(np.uint8, copy=False))
    present = {value: str(value) for value, box in enumerate(boxes, start=1) if box is not None}
    facts = {}
    for value, name in (present if classes is None else classes).items():
        box = boxes[value - 1] if 0 < value <= len(boxes) else None
        facts[name] = {"value": int(value), **(_empty() if box is None else _of_part(mask, value, box, matrix, ml))}
    return facts


def _empty() -> dict[str, Any]:
    return {"voxels": 0, "ml": 0.0}


def _of_part(mask: npt.NDArray[Any], value: int, box: tuple[slice, ...], affine: Any, ml: float) -> dict[str, Any]:
    inside = mask[box] == value
    starts, stops = ([getattr(side, end) for side in box] for end in ("start", "stop"))
    voxels = int(np.count_nonzero(inside))
    centre = [float(np.dot(inside.sum(tuple({0, 1, 2} - {axis})), np.arange(inside.shape[axis]))) for axis in range(3)]
    middle = np.array(centre) / voxels + starts
    centroid, place = affine[:3, :3] @ middle + affine[:3, 3], np.empty(3)
    for axis, (along, way) in enumerate(nib.io_orientation(affine)):
        share = (middle[axis] + 0.5) / mask.shape[axis]
        place[int(along)] = share if way > 0 else 1 - share
    reached = [
        size > 1 and (low == 0 or high == size) for low, high, size in zip(starts, stops, mask.shape, strict=True)
    ]
    return {
        "voxels": voxels,
        "ml": round(voxels * ml, 6),
        "centroid_mm": centroid.round(3).tolist(),
        "place": place.round(4).tolist(),
        "start": starts,
        "stop": stops,
        **({"pieces": int(ndimage.label(inside, np.ones((3, 3, 3)))[1])} if inside.size <= MOST_VOXELS else {}),
        "at_border": any(reached),
    }
