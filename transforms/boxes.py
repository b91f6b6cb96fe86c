"""Boxes of a label, for a data set without drawn ones, and boxes that follow their image."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from medconstraints import checks
from medconstraints.boxes.from_label import label_to_boxes, loosened_boxes
from medconstraints.boxes.grid import map_boxes

__all__ = ["BoxesToGridd", "LabelToBoxesd"]


class LabelToBoxesd(MapTransform):
    """Boxes of a label, for experiments that pretend that only boxes were drawn.

    Reads the label at `keys`, (1, *S), and writes `boxes_key`, (N, 1 + 2 D) int64 as `label_to_boxes` returns it, and
    `boxes_key + "_affine"`, the (4, 4) affine of the grid the numbers belong to. Put it before cropping and flipping
    and finish with `BoxesToGridd`: a crop of the label would make a cut object look like a small one.

    Args:
        keys: key of the label.
        boxes_key: key of the boxes.
        mode: "component" or "class", see `label_to_boxes`.
        slice_axis: None for boxes in the volume, an axis for a flat box per slice.
        margin_voxels: grows every side by this many voxels, clipped at the image (Kervadec 2020, table 6.2 uses 10);
            flat boxes stay flat.
        jitter_voxels: moves every side by a random whole number of voxels in [-jitter, jitter]; a box keeps at least
            one voxel. Like the error of a person who drew the box, it is drawn once: the same label gets the same
            boxes at every call and in every process, and caching data sets may keep them.
        seed: of the jitter.
        min_voxels: components smaller than this get no box.
        allow_missing_keys: leave items without a label as they are.

    Raises:
        ValueError: an argument is outside its range, or the label is not (1, *S).
    """

    def __init__(
        self,
        keys: KeysCollection = "label",
        boxes_key: str = "boxes",
        *,
        mode: str = "component",
        slice_axis: int | None = None,
        margin_voxels: int = 0,
        jitter_voxels: int = 0,
        min_voxels: int = 1,
        seed: int = 0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(checks.one_key(keys), allow_missing_keys)
        self.boxes_key = boxes_key
        self.mode = mode
        self.slice_axis = slice_axis
        self.margin_voxels = checks.whole_number("margin_voxels", margin_voxels, 0)
        self.jitter_voxels = checks.whole_number("jitter_voxels", jitter_voxels, 0)
        self.min_voxels = min_voxels
        self.seed = int(seed)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the boxes to a copy of `data`."""
        item = dict(data)
        for key in self.key_iterator(item):
            label = item[key]
            if label.ndim not in (3, 4) or label.shape[0] != 1:
                raise ValueError(
                    f"{key}: expected a label map (1, *S) with one channel, got shape {tuple(label.shape)}; use "
                    "EnsureChannelFirstd before, and class numbers rather than one-hot channels."
                )
            boxes = label_to_boxes(label[0], mode=self.mode, slice_axis=self.slice_axis, min_voxels=self.min_voxels)
            item[self.boxes_key] = loosened_boxes(
                boxes,
                label.shape[1:],
                margin_voxels=self.margin_voxels,
                jitter_voxels=self.jitter_voxels,
                seed=self.seed,
                slice_axis=self.slice_axis,
            )
            if isinstance(label, MetaTensor):  # a plain tensor has no grid; BoxesToGridd then says so
                item[f"{self.boxes_key}_affine"] = torch.as_tensor(label.affine, dtype=torch.float64).clone()
        return item


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
