"""Boxes of a label volume, as the small integer tensor that the box losses take."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from medconstraints import checks

__all__ = ["label_to_boxes", "loosened_boxes"]


def label_to_boxes(
    label: np.ndarray | Tensor, *, mode: str = "component", slice_axis: int | None = None, min_voxels: int = 1
) -> Tensor:
    """Tight bounding boxes of every class in a label map.

    Args:
        label: (*S), 2D or 3D, integer values; 0 is background.
        mode: "component" gives one box per connected component (diagonal neighbours connect), "class" one per class.
        slice_axis: None for boxes in the whole volume; an axis of a volume for one flat box per slice across it.
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
    slice_axis = checks.slice_axis(slice_axis, dims)
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


def loosened_boxes(
    boxes: Tensor,
    shape: Sequence[int],
    *,
    margin_voxels: int = 0,
    jitter_voxels: int = 0,
    seed: int = 0,
    slice_axis: int | None = None,
) -> Tensor:
    """Boxes with a margin and an error of their sides, clipped at the image; a box keeps at least one voxel.

    Args:
        boxes: (N, 1 + 2 D) int64 rows.
        shape: spatial shape of the image.
        margin_voxels: grows every side by this many voxels (Kervadec 2020, table 6.2 uses 10).
        jitter_voxels: moves every side by a random whole number of voxels in [-jitter, jitter], which depends on the
            seed and the boxes alone.
        seed: of the jitter.
        slice_axis: axis along which boxes stay as they are.

    Example:
        >>> loosened_boxes(torch.tensor([[1, 2, 1, 4, 3]]), (9, 4), margin_voxels=2).tolist()
        [[1, 0, 0, 6, 4]]
    """
    rows, size, dims = boxes.numpy(), np.array(shape), len(shape)
    start, stop = rows[:, 1 : 1 + dims] - margin_voxels, rows[:, 1 + dims :] + margin_voxels
    if jitter_voxels:
        random = np.random.default_rng([seed, zlib.crc32(np.ascontiguousarray(rows).tobytes())])
        start = start + random.integers(-jitter_voxels, jitter_voxels + 1, start.shape)
        stop = stop + random.integers(-jitter_voxels, jitter_voxels + 1, stop.shape)
    start = np.clip(start, 0, size - 1)
    stop = np.clip(np.maximum(stop, start + 1), 1, size)
    if slice_axis is not None:
        start[:, slice_axis], stop[:, slice_axis] = rows[:, 1 + slice_axis], rows[:, 1 + dims + slice_axis]
    return torch.from_numpy(np.concatenate([rows[:, :1], start, stop], axis=1))
