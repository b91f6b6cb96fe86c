"""When two affines are one grid: the same for the channels of an image, its label, and masks that are scored."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["GRID_TOLERANCE", "grid_difference"]

GRID_TOLERANCE = 1e-2  # largest difference between elements of the affines, as a share of the smallest voxel edge


def grid_difference(affine: Any, reference: Any, tolerance: float = GRID_TOLERANCE) -> str:
    """How two affines (D + 1, D + 1) differ, in words; empty for one grid.

    Example:
        >>> grid_difference(np.diag([1.0, 1.0, 2.0, 1.0]), np.diag([1.0, 1.0, 2.5, 1.0]))
        'the voxel size or direction differs by up to 0.5 mm'
    """
    given, wanted = (np.asarray(matrix, dtype=np.float64) for matrix in (affine, reference))
    difference = np.abs(given - wanted)
    near = difference <= tolerance * np.linalg.norm(wanted[:-1, :-1], axis=0).min()  # NaN is not
    if near.all():
        return ""
    what = "origin" if near[:-1, :-1].all() else "voxel size or direction"
    return f"the {what} differs by up to {difference.max():.4g} mm"
