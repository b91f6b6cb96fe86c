"""Bounding boxes of a label volume, as the small integer tensor that the box losses take."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy import ndimage
from torch import Tensor

__all__ = ["LabelToBoxesd", "label_to_boxes"]


def label_to_boxes(
    label: np.ndarray | Tensor, *, mode: str = "component", slice_axis: int | None = None, min_voxels: int = 1
) -> Tensor:
    """Tight bounding boxes of every class in a label map.

    Args:
        label: (*S), 2D or 3D, integer values; 0 is background.
        mode: "component" gives one box per connected component (diagonal neighbours connect), "class" one per class.
        slice_axis: None for boxes in the whole volume; an axis for one flat box per slice across it.
        min_voxels: components (or classes) smaller than this get no box.

    Returns:
        (N, 1 + 2 D) int64, rows [class, start_1..start_D, stop_1..stop_D], half-open, sorted by class, then position;
        N = 0 for an empty label.

    Raises:
        ValueError: an unknown mode, an axis that does not exist, or values that are no class numbers.

    Example:
        >>> label_to_boxes(np.array([[0, 1, 1], [0, 0, 1]])).tolist()
        [[1, 0, 1, 2, 3]]
    """
    array = np.asarray(label.cpu() if isinstance(label, Tensor) else label)
    dims = array.ndim
    if dims not in (2, 3):
        raise ValueError(f"label: expected a 2D or 3D map without channel axis, got shape {array.shape}.")
    if mode not in ("component", "class"):
        raise ValueError(f'mode: expected "component" or "class", got {mode!r}.')
    if slice_axis is not None and not 0 <= slice_axis < dims:
        raise ValueError(f"slice_axis: expected None or an axis 0..{dims - 1}, got {slice_axis}.")
    classes = np.unique(array)
    if (classes < 0).any() or (classes != np.round(classes)).any():
        raise ValueError(f"label: expected whole class numbers >= 0, got values such as {classes[:5].tolist()}.")

    structure = np.ones((3,) * dims, dtype=bool)
    if slice_axis is not None:  # neighbours in the same slice only
        structure &= np.arange(3).reshape([3 if a == slice_axis else 1 for a in range(dims)]) == 1
    rows = []
    for cls in classes[classes > 0]:
        mask = array == cls
        if mode == "component":
            regions, _ = ndimage.label(mask, structure)
        elif slice_axis is None:
            regions = mask.astype(np.int32)
        else:  # number the slices: each becomes a region of its own
            shape = [-1 if a == slice_axis else 1 for a in range(dims)]
            regions = mask * np.arange(1, array.shape[slice_axis] + 1).reshape(shape)
        counts = np.bincount(regions.ravel())
        for region, found in enumerate(ndimage.find_objects(regions), start=1):
            if found is not None and counts[region] >= min_voxels:
                rows.append([int(cls), *(s.start for s in found), *(s.stop for s in found)])
    rows.sort()
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 1 + 2 * dims)


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
        super().__init__(keys, allow_missing_keys)
        for name, value in (("margin_voxels", margin_voxels), ("jitter_voxels", jitter_voxels)):
            if int(value) != value or value < 0:
                raise ValueError(f"{name}: expected an integer >= 0, got {value!r}.")
        self.boxes_key = boxes_key
        self.mode = mode
        self.slice_axis = slice_axis
        self.margin_voxels = int(margin_voxels)
        self.jitter_voxels = int(jitter_voxels)
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
            boxes = label_to_boxes(
                label[0], mode=self.mode, slice_axis=self.slice_axis, min_voxels=self.min_voxels
            ).numpy()
            item[self.boxes_key] = torch.from_numpy(self._loosen(boxes, np.array(label.shape[1:])))
            if isinstance(label, MetaTensor):  # a plain tensor has no grid; BoxesToGridd then says so
                item[f"{self.boxes_key}_affine"] = torch.as_tensor(label.affine, dtype=torch.float64).clone()
        return item

    def _loosen(self, boxes: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Margin and jitter, clipped at the image."""
        if not (self.margin_voxels or self.jitter_voxels) or not len(boxes):
            return boxes
        dims = len(size)
        start, stop = boxes[:, 1 : 1 + dims] - self.margin_voxels, boxes[:, 1 + dims :] + self.margin_voxels
        if self.jitter_voxels:
            random = np.random.default_rng([self.seed, zlib.crc32(np.ascontiguousarray(boxes).tobytes())])
            low, high = -self.jitter_voxels, self.jitter_voxels + 1
            start = start + random.integers(low, high, start.shape)
            stop = stop + random.integers(low, high, stop.shape)
        start = np.clip(start, 0, size - 1)
        stop = np.clip(np.maximum(stop, start + 1), 1, size)
        if self.slice_axis is not None:
            flat = [self.slice_axis]
            start[:, flat], stop[:, flat] = boxes[:, 1 : 1 + dims][:, flat], boxes[:, 1 + dims :][:, flat]
        return np.concatenate([boxes[:, :1], start, stop], axis=1)
