"""A box in millimetres and the voxel grid it goes into: does it lie inside, and which voxels does it cover.

Solids are in RAS mm. Edge coordinates count voxels from the first voxel's edge: voxel i covers [i, i + 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt
import torch

__all__ = [
    "SLACK_VOXELS",
    "AffineLike",
    "Array",
    "Grid",
    "Solid",
    "affine_matrix",
    "checked_grid",
    "fit_to_grid",
    "hint_at_system",
    "looseness",
    "overhang",
    "overhang_of",
    "voxel_solid",
    "with_thickness",
]

SLACK_VOXELS = 0.5  # a hand-drawn millimetre box may reach this far beyond the volume
FLAT_MM = 1e-6  # stands for no thickness, far below any voxel: keeps the edges of a solid invertible
ALIGNED = 1e-4  # share of a box side that may run along a second voxel axis: float32 affines are not exact

Array = npt.NDArray[np.float64]
AffineLike = npt.ArrayLike | torch.Tensor


@dataclass(frozen=True)
class Grid:
    """A voxel grid: affine (D + 1, D + 1) from voxel index to RAS mm, and shape."""

    affine: Array
    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """Two or three."""
        return len(self.shape)

    def same_as(self, other: Grid) -> bool:
        """Equal shape, and affine but for rounding."""
        return self.shape == other.shape and np.allclose(self.affine, other.affine, rtol=0, atol=1e-6)


@dataclass(frozen=True)
class Solid:
    """A box in RAS mm: centre (D,) and its edge vectors as the columns of a (D, D) matrix."""

    centre: Array
    edges: Array

    def mirrored(self) -> Solid:
        """Solid with its first two axes reversed: from LPS to RAS, or back."""
        sign = np.array([-1.0, -1.0, 1.0][: len(self.centre)])
        return Solid(sign * self.centre, sign[:, None] * self.edges)


def affine_matrix(affine: AffineLike, ndim: int, name: str) -> Array:
    """Affine of the first ``ndim`` axes, (ndim + 1, ndim + 1); ValueError, naming ``name``, if it is unusable."""
    full = np.asarray(affine.detach().cpu() if isinstance(affine, torch.Tensor) else affine, dtype=np.float64)
    if full.shape not in {(4, 4), (ndim + 1, ndim + 1)}:
        raise ValueError(f"{name} must be a (4, 4) matrix from voxel index to RAS mm, got shape {full.shape}.")
    out = np.eye(ndim + 1)
    out[:ndim, :ndim], out[:ndim, ndim] = full[:ndim, :ndim], full[:ndim, -1]
    scale = np.prod(np.linalg.norm(out[:ndim, :ndim], axis=0))
    if not np.isfinite(out).all() or abs(np.linalg.det(out[:ndim, :ndim])) <= 1e-9 * scale:
        raise ValueError(f"{name} must be finite and invertible in its first {ndim} axes; correct the image's header.")
    return out


def checked_grid(affine: AffineLike, shape: Sequence[int], affine_name: str, shape_name: str) -> Grid:
    """Grid of a user's arguments; ValueError, naming the faulty one."""
    sizes = tuple(int(size) for size in shape)
    if len(sizes) not in (2, 3) or min(sizes) < 1:
        raise ValueError(f"{shape_name} must be the spatial shape, two or three sizes of at least 1, got {sizes}.")
    return Grid(affine_matrix(affine, len(sizes), affine_name), sizes)


def voxel_solid(start: Array, stop: Array, affine: Array) -> Solid:
    """Solid of the voxels from ``start`` up to, without, ``stop``."""
    linear, origin = affine[:-1, :-1], affine[:-1, -1]
    return Solid(linear @ ((start + stop - 1) / 2) + origin, linear * (stop - start))


def with_thickness(sides: Array) -> Array:
    """Sides of a solid, mm, that a file gives as 0 replaced by next to nothing: `fit_to_grid` makes them one voxel."""
    return np.where(sides == 0, FLAT_MM, sides)


def fit_to_grid(solid: Solid, grid: Grid) -> list[int]:
    """Nearest voxel edges, start then stop, of a solid that overlaps the grid: cut to it, at least one voxel thick."""
    low, high, _ = _edge_range(solid, grid)
    start, stop = np.floor(low + 0.5), np.floor(high + 0.5)
    thin = stop <= start
    start[thin] = np.floor((low + high) / 2)[thin]
    sizes = np.array(grid.shape)
    start = np.clip(start, 0, sizes - 1)
    stop = np.clip(stop, start + 1, sizes)
    return [int(side) for side in (*start, *stop)]


def looseness(solid: Solid, grid: Grid) -> float:
    """Volume of a solid's bounding box in the voxel grid, as a multiple of the solid's own.

    Example:
        >>> turned = np.array([[0.6, -0.8], [0.8, 0.6]]) * 10
        >>> round(looseness(Solid(np.array([8.0, 8.0]), turned), Grid(np.eye(3), (16, 16))), 2)
        1.96
    """
    _, _, edges = _edge_range(solid, grid)
    return float(np.abs(edges).sum(axis=1).prod() / abs(np.linalg.det(edges)))


def overhang(low: float, high: float, size: int, axis: int) -> str:
    """Say how the range ``low`` to ``high`` of edge coordinates leaves 0 to ``size``; ``axis`` counts from 1."""
    span = f"{low:g} to {high:g}, the volume spans 0 to {size}"
    if high <= 0 or low >= size:
        return f"lies entirely outside the volume along axis {axis} ({span})"
    over, end = (-low, "start") if -low >= high - size else (high - size, "end")
    return f"reaches {over:g} voxels beyond the {end} of axis {axis} ({span})"


def overhang_of(solid: Solid, grid: Grid, slack: Array) -> str:
    """Say how a solid leaves the grid by more than ``slack`` (D,) voxels per axis; empty when it does not."""
    low, high, edges = _edge_range(solid, grid)
    share = np.abs(edges)
    aligned = bool((share.max(axis=0) >= (1 - ALIGNED) * share.sum(axis=0)).all())
    for axis, size in enumerate(grid.shape):
        gone = high[axis] <= 0 or low[axis] >= size
        if gone or (aligned and (low[axis] < -slack[axis] or high[axis] > size + slack[axis])):
            return overhang(float(low[axis]), float(high[axis]), size, axis + 1)
    return "" if aligned else _overhang_of_tilted(solid, grid, slack)


def hint_at_system(solid: Solid, grid: Grid, system: str) -> str:
    """What to look for when a box that was given in ``system`` ("RAS" or "LPS") lies outside the grid."""
    if overhang_of(solid.mirrored(), grid, np.full(grid.ndim, SLACK_VOXELS)):
        return "; check that it belongs to this image, and its coordinate system"
    return f"; it would lie inside as {'LPS' if system == 'RAS' else 'RAS'}: correct the coordinate system"


def _edge_range(solid: Solid, grid: Grid) -> tuple[Array, Array, Array]:
    """Bounding box of a solid in edge coordinates, and its edge vectors in voxels."""
    linear, origin = grid.affine[:-1, :-1], grid.affine[:-1, -1]
    centre = np.linalg.solve(linear, solid.centre - origin) + 0.5
    edges = np.asarray(np.linalg.solve(linear, solid.edges), dtype=np.float64)
    half = np.abs(edges).sum(axis=1) / 2
    # Far below any voxel edge; takes away the affine's rounding, so that edges hit exactly stay hit.
    low: Array = np.round(centre - half, 6)
    high: Array = np.round(centre + half, 6)
    return low, high, edges


def _overhang_of_tilted(solid: Solid, grid: Grid, slack: Array) -> str:
    # The bounding box of a tilted solid may leave the volume although the object does not; ask along the solid's
    # own axes instead: there it has to stay within the extent of the volume.
    linear, origin = grid.affine[:-1, :-1], grid.affine[:-1, -1:]
    corners = np.array(list(product(*((0.0, float(size)) for size in grid.shape)))).T - 0.5
    extent = np.linalg.solve(solid.edges, linear @ corners + origin - solid.centre[:, None])
    room = np.abs(np.linalg.solve(solid.edges, linear)) @ slack
    over = np.maximum(extent.min(axis=1) - room + 0.5, 0.5 - extent.max(axis=1) - room)
    if not (over > 0).any():
        return ""
    axis = int(over.argmax())
    length = float(over[axis] * np.linalg.norm(solid.edges[:, axis]))
    return f"reaches {length:.3g} mm beyond the volume along its own axis {axis + 1} (volume shape {grid.shape})"
