"""The boxes of a batch: checked against their images, and as one list of rows without padding."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from medconstraints import checks

__all__ = ["BoxRows", "checked_boxes"]


class BoxRows(NamedTuple):
    """The N boxes of a batch, one row each, on the host.

    An "image" is a volume (or 2D image) of the batch or, with `slice_axis`, one slice of it, and a box then has the
    axes of the slice. Images are counted sample first, slice second.

    Attributes:
        image: image of each box, (N,).
        label: class of each box, 1..K, (N,).
        start: first voxel, clipped to the image, (N, D).
        stop: one past the last voxel, clipped to the image, (N, D).
        cut: whether the box reaches beyond the image along an axis, (N, D) bool.
        thick: whether the box is longer than one voxel along an axis, (N, D) bool.
    """

    image: np.ndarray
    label: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    cut: np.ndarray
    thick: np.ndarray


def checked_boxes(
    boxes: Tensor, batch: int, spatial: tuple[int, ...], num_classes: int, slice_axis: int | None = None
) -> BoxRows:
    """Rows of a padded tensor of boxes.

    Args:
        boxes: (B, N, 1 + 2 D) integers, rows [class, start_1..start_D, stop_1..stop_D], half-open, in voxels; class -1
            marks padding. On another device than the CPU they are fetched, which waits for that device.
        batch: number of samples, B.
        spatial: spatial shape of a sample.
        num_classes: number of foreground classes, K.
        slice_axis: spatial axis across which every slice is an image of its own, or None.

    Raises:
        TypeError: `boxes` is not an integer tensor.
        ValueError: wrong shape, an unknown class, an empty or inverted box, a box outside the image, or a box thicker
            than a slice when `slice_axis` is set. The message names the sample and the row.

    Example:
        >>> boxes = torch.tensor([[[1, -1, 0, 2, 3], [-1, -1, -1, -1, -1]]])
        >>> rows = checked_boxes(boxes, 1, (4, 4), num_classes=1)
        >>> rows.start.tolist(), rows.stop.tolist(), rows.cut.tolist()
        ([[0, 0]], [[2, 3]], [[True, False]])
    """
    slice_axis = checks.slice_axis(slice_axis, len(spatial))
    table = _table(boxes, batch, len(spatial))
    sample, row = np.nonzero(table[:, :, 0] != -1)
    kept, size = table[sample, row], np.array(spatial)
    label, start, stop = kept[:, 0], kept[:, 1 : 1 + len(spatial)], kept[:, 1 + len(spatial) :]
    cut, thick = (start < 0) | (stop > size), stop - start > 1
    faults = (
        (
            (label < 1) | (label > num_classes),
            f"has a class outside 1..{num_classes}; class 0 is the background and -1 marks padding. Check the class "
            "numbers or the network's channels",
        ),
        ((stop <= start).any(1), "is empty or inverted; each stop must be above its start"),
        (
            ((stop <= 0) | (start >= size)).any(1),
            f"lies outside the image of shape {spatial}; are its coordinates those of this grid, in voxels? "
            "BoxesToGridd maps boxes to an augmented image",
        ),
        (
            thick[:, slice_axis] if slice_axis is not None else np.zeros(len(row), dtype=bool),
            f"is not one voxel thick along slice_axis {slice_axis}; draw a flat box per slice, or use slice_axis=None "
            "for 3D boxes",
        ),
    )
    for bad, why in faults if np.logical_or.reduce([bad for bad, _ in faults]).any() else ():
        if bad.any():
            first = int(np.argmax(bad))
            raise ValueError(f"boxes: row {row[first]} of sample {sample[first]}, {kept[first].tolist()}, {why}.")
    start, stop = np.maximum(start, 0), np.minimum(stop, size)
    if slice_axis is None:
        return BoxRows(sample, label, start, stop, cut, thick)
    image = sample * spatial[slice_axis] + start[:, slice_axis]
    flat = [axis for axis in range(3) if axis != slice_axis]
    return BoxRows(image, label, start[:, flat], stop[:, flat], cut[:, flat], thick[:, flat])


def _table(boxes: Tensor, batch: int, dims: int) -> np.ndarray:
    """The tensor as an array (B, N, 1 + 2 D) of int64."""
    if not isinstance(boxes, Tensor) or boxes.is_floating_point() or boxes.is_complex() or boxes.dtype == torch.bool:
        got = boxes.dtype if isinstance(boxes, Tensor) else type(boxes).__name__
        raise TypeError(f"boxes: expected an integer tensor (B, N, 1 + 2 D), got {got}; round voxel coordinates first.")
    if boxes.dim() != 3 or boxes.shape[0] != batch or boxes.shape[2] != 1 + 2 * dims:
        raise ValueError(
            f"boxes: expected shape ({batch}, N, {1 + 2 * dims}), rows [class, start_1..start_{dims}, "
            f"stop_1..stop_{dims}], for {dims}D images, got {tuple(boxes.shape)}; collate with pad_boxes_collate."
        )
    # Not `.numpy()`, which torch.func refuses, and no operation on boxes that are on the CPU already.
    return np.asarray(np.from_dlpack(boxes if boxes.device.type == "cpu" else boxes.cpu()), dtype=np.int64)
