"""Boxes follow their image through crops, flips, pads and zooms."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from torch import Tensor

__all__ = ["BoxesToGridd", "map_boxes"]


def map_boxes(
    boxes: Tensor, source_affine: Tensor | np.ndarray, target_affine: Tensor | np.ndarray, *, tolerance: float = 1e-3
) -> Tensor:
    """Boxes in the voxels of one grid, given in the voxels of another.

    Args:
        boxes: (N, 1 + 2 D) integers, rows [class, start_1..start_D, stop_1..stop_D], half-open.
        source_affine: (4, 4) voxel-to-world affine of the grid they are given in.
        target_affine: (4, 4) affine of the wanted grid. Its axes must be those of the source in any order and
            direction (crop, pad, flip, 90-degree rotation, zoom), not rotated by another angle.
        tolerance: largest share of a foreign axis that still counts as aligned.

    Returns:
        (N, 1 + 2 D) int64. After a zoom sides are rounded to whole voxels and a box keeps at least one. Boxes may lie
        partly or wholly outside the target grid.

    Raises:
        ValueError: the axes of the two grids are not aligned.
    """
    dims = (boxes.shape[1] - 1) // 2
    source, target = (np.asarray(a, dtype=np.float64) for a in (source_affine, target_affine))
    matrix = np.linalg.solve(target, source)
    linear, shift = matrix[:dims, :dims], matrix[:dims, -1]
    axis = np.abs(linear).argmax(axis=1)  # source axis that runs along each target axis
    scale = linear[np.arange(dims), axis]
    foreign = np.abs(linear).sum(axis=1) - np.abs(scale)
    if len(set(axis.tolist())) < dims or (foreign > tolerance * np.abs(scale)).any():
        raise ValueError(
            "target_affine: expected a grid whose axes are those of the boxes' grid (crop, pad, flip, 90-degree "
            f"rotation, zoom), got a rotation or shear, voxel-to-voxel matrix {np.round(linear, 3).tolist()}; boxes "
            "cannot follow it: compute them from the transformed label, or remove that augmentation."
        )
    rows = np.asarray(torch.as_tensor(boxes).cpu(), dtype=np.int64)
    # Voxel i covers [i - 0.5, i + 0.5]: the edges, not the indices, are mapped.
    first = (rows[:, 1 : 1 + dims] - 0.5)[:, axis] * scale + shift + 0.5
    last = (rows[:, 1 + dims :] - 0.5)[:, axis] * scale + shift + 0.5
    start = np.round(np.minimum(first, last)).astype(np.int64)
    stop = np.maximum(np.round(np.maximum(first, last)).astype(np.int64), start + 1)
    return torch.from_numpy(np.concatenate([rows[:, :1], start, stop], axis=1))


class BoxesToGridd(MapTransform):
    """Bring boxes to the grid of their augmented image; the last transform before collation.

    Reads `keys`, (N, 1 + 2 D), the affine `key + "_affine"` that `LabelToBoxesd` or `LoadBoxesd` left beside them, and
    the image's present affine, which MONAI's spatial transforms keep up to date. Boxes that lie wholly outside the
    image (after a crop) are dropped; one that a crop cuts keeps its full extent, so that the loss can see the cut.
    The affine key is removed: the numbers now belong to the image. Pad before cropping: what is padded after a crop
    looks like image, and the cut is no longer seen. Transforms that move voxels without telling the affine (MONAI's
    `Transposed`) must not stand in between.

    Args:
        keys: keys of the boxes.
        image_key: key of the image, a MetaTensor (C, *S).
        allow_missing_keys: leave items without boxes as they are.

    Raises:
        ValueError: the image was rotated by another angle than 90 degrees, or the affine is missing.
    """

    def __init__(
        self, keys: KeysCollection = "boxes", image_key: str = "image", *, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Map the boxes in a copy of `data`."""
        item = dict(data)
        image = item[self.image_key]
        size = torch.tensor(image.shape[1:])
        dims = len(size)
        for key in self.key_iterator(item):
            affine = item.pop(f"{key}_affine", None)
            if affine is None or not hasattr(image, "affine"):
                raise ValueError(
                    f"{key}: no {key}_affine beside the boxes, or the image is no MetaTensor: they cannot be mapped; "
                    "make the boxes with LabelToBoxesd or LoadBoxesd, and map them once only."
                )
            boxes = map_boxes(item[key], affine, image.affine)
            visible = (boxes[:, 1 + dims :] > 0).all(1) & (boxes[:, 1 : 1 + dims] < size).all(1)
            item[key] = boxes[visible]
        return item
