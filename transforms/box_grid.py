"""Boxes follow their image through crops, flips, pads and zooms."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from medconstraints.boxes.grid import map_boxes

__all__ = ["BoxesToGridd"]


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
