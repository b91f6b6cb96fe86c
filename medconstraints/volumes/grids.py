"""Voxel grids: what one is along the patient, and when two are one, for channels, labels and masks that are scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes

from medconstraints.volumes.errors import VolumeError

__all__ = ["GRID_TOLERANCE", "grid_difference", "grid_of", "require_one_grid"]

GRID_TOLERANCE = 1e-2  # largest difference between elements of the affines, as a share of the smallest voxel edge


def grid_difference(affine: Any, reference: Any, tolerance: float = GRID_TOLERANCE) -> str:
    """How two affines (D + 1, D + 1) differ, in words; empty for one grid.

    Example:
        >>> grid_difference(np.diag([1.0, 1.0, 2.0, 1.0]), np.diag([1.0, 1.0, 2.5, 1.0]))
        'the voxel size or direction differs by up to 0.5 mm'
    """
    given, wanted = (np.asarray(matrix, dtype=np.float64) for matrix in (affine, reference))
    difference = np.abs(given - wanted)
    near = difference <= tolerance * voxel_sizes(wanted).min()  # NaN is not
    if near.all():
        return ""
    what = "origin" if near[:-1, :-1].all() else "voxel size or direction"
    return f"the {what} differs by up to {difference.max():.4g} mm"


def require_one_grid(grids: Sequence[tuple[str, Sequence[int], Any]]) -> None:
    """Refuse channels, each with its file's name, shape and affine, that do not lie on the grid of the first.

    Raises:
        VolumeError: the first that does not, and how it differs.
    """
    first, shape, affine = grids[0]
    for name, other, moved in grids[1:]:
        if tuple(other) != tuple(shape):
            raise VolumeError(
                f"{name}: has the shape {tuple(other)}, {first} {tuple(shape)}; resample them to one grid."
            )
        if apart := grid_difference(moved, affine):
            raise VolumeError(f"{name}: has another affine than {first}: {apart}; resample them to one grid.")


def grid_of(shape: Sequence[int], affine: Any) -> dict[str, list[float]]:
    """Spacing and size of a volume in mm, along right, anterior and superior."""
    matrix = np.asarray(affine, dtype=np.float64)
    axes = nib.io_orientation(matrix)[:, 0].astype(int)
    spacing, size = np.empty(3), np.empty(3)
    spacing[axes] = voxel_sizes(matrix)
    size[axes] = voxel_sizes(matrix) * ([*shape, 1, 1][:3])
    return {"spacing_mm": spacing.round(4).tolist(), "size_mm": size.round(2).tolist()}
