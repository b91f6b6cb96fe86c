"""Boxes follow their image from one voxel grid to another: crops, flips, pads and zooms."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["map_boxes"]


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

    Example:
        >>> flipped = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0]))
        >>> flipped[0, 3] = 9.0                                        # ten rows, counted from the other end
        >>> map_boxes(torch.tensor([[1, 0, 0, 2, 3]]), torch.eye(4), flipped).tolist()
        [[1, 8, 0, 10, 3]]
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
