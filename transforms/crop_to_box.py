"""Random patches that hold a box, for volumes larger than the network's patch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform, Randomizable, SpatialCrop

from medconstraints.boxes.grid import map_boxes

__all__ = ["RandCropToBoxd"]


class RandCropToBoxd(Randomizable, MapTransform):
    """Crop a patch of fixed size: with probability `prob` around a random point of a random box, else anywhere.

    In a large volume nearly every random patch would lie outside all boxes. Put it after `LabelToBoxesd` or
    `LoadBoxesd`, and before `BoxesToGridd`, which maps the boxes to the patch. Axes shorter than the patch are kept.

    Args:
        keys: keys of the image, and of the label if it is used; all get the same crop. MetaTensors (C, *S).
        roi_size: size of the patch in voxels, one value per axis.
        boxes_key: key of the boxes, (N, 1 + 2 D), with their affine under `boxes_key + "_affine"`.
        prob: probability of a patch around a box, when there is a box.
        allow_missing_keys: crop only the keys that are there.

    Raises:
        ValueError: `prob` is not in [0, 1], or a patch size is not positive.
    """

    def __init__(
        self,
        keys: KeysCollection,
        roi_size: Sequence[int],
        *,
        boxes_key: str = "boxes",
        prob: float = 0.8,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if not 0 <= prob <= 1:
            raise ValueError(f"prob: expected a number in [0, 1], got {prob!r}.")
        if not all(size > 0 for size in roi_size):
            raise ValueError(f"roi_size: expected positive sizes, got {tuple(roi_size)}.")
        self.roi_size = np.array(roi_size, dtype=np.int64)
        self.boxes_key = boxes_key
        self.prob = prob

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Crop the keys of a copy of `data`."""
        item = dict(data)
        image = item[self.first_key(item)]
        size = np.array(image.shape[1:])
        dims = len(size)
        if len(self.roi_size) != dims:
            raise ValueError(
                f"roi_size: expected {dims} values for an image {tuple(size)}, got {tuple(self.roi_size)}."
            )
        room = np.maximum(size - self.roi_size, 0)
        start = np.array([self.R.randint(0, most + 1) for most in room])
        boxes = map_boxes(item[self.boxes_key], item[f"{self.boxes_key}_affine"], image.affine).numpy()
        if len(boxes) and self.R.random_sample() < self.prob:
            row = boxes[self.R.randint(len(boxes))]
            point = np.array(
                [self.R.randint(low, high) for low, high in zip(row[1 : 1 + dims], row[1 + dims :], strict=True)]
            )
            # The point may fall anywhere in the patch, so that the network does not learn that objects are central.
            offset = np.array([self.R.randint(0, length) for length in self.roi_size])
            start = np.clip(point - offset, 0, room)
        crop = SpatialCrop(roi_start=start.tolist(), roi_end=np.minimum(start + self.roi_size, size).tolist())
        for key in self.key_iterator(item):
            item[key] = crop(item[key])
        return item
