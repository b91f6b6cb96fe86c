"""Distances along shortest paths for which edges of the image are obstacles: to a boundary, or from annotated voxels.

Voxels are the nodes of a graph, its edges lead to the 26 neighbours (8 in 2D and in slices), and an edge between voxels
p and q is

    |pq| = sqrt(|x_p - x_q|^2 + w^2 |I_p - I_q|^2)        x in mm, w = `image_weight`

long. So a voxel behind an edge of the image is farther away than one that looks alike: distances that use the content
of the image and serve weak annotations, the outlook of Kervadec 2020 (conclusion) for the boundary loss. With w = 0
this is a chamfer distance: never less than the Euclidean one, and with equal spacings at most 8.3 % more in 2D and
12.9 % more in 3D.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from medconstraints import checks
from medconstraints.distance.maps import host_array, mask_numbers

__all__ = ["geodesic_distance", "grow_label", "signed_geodesic_distance"]

Array = TypeVar("Array", np.ndarray, Tensor)

MAX_BUCKETS = 1 << 14  # more only make the search through empty ones longer


def signed_geodesic_distance(
    mask: Array,
    image: np.ndarray | Tensor,
    spacing_mm: Sequence[float] | Tensor | None = None,
    *,
    image_weight: float,
    slice_axis: int | None = None,
    clip_mm: float | None = None,
) -> Array:
    """Length of the shortest path to the boundary of a mask, see the module; negative inside.

    The path stays on the side where it starts; an edge that crosses the boundary counts half, since the boundary lies
    between its voxels. Beyond the edge of the image nothing is known: it is neither inside nor outside.

    Args:
        mask: (*S) the object, 2D or 3D: boolean or of zeros and ones.
        image: (*S), or (M, *S) with M channels, finite; the difference of two voxels is the Euclidean norm over the
            channels. It is read as float32.
        spacing_mm: voxel spacing in mm, D values; None for 1 each.
        image_weight: mm that a step gets longer per unit of intensity, >= 0. Scale it to the image: 0.1 suits
            intensities 0..255 about as well as 25 suits 0..1.
        slice_axis: None for paths through the volume, or the axis 0..2 across which every slice is an image of its own.
        clip_mm: values are limited to +-clip_mm, > 0; the work is then confined to the surroundings of the mask.

    Returns:
        (*S) float32 in mm, negative inside, of the kind of `mask` (numpy array, or tensor on its device). Zeros if the
        mask is empty or full; with `slice_axis` in each slice of which that is true.

    Raises:
        ValueError: an argument is outside its range, shapes do not fit, or the mask has other values than 0 and 1.

    Example:
        >>> mask = np.array([[1, 1, 0, 0, 0]])
        >>> image = np.array([[0.0, 0.0, 0.0, 0.0, 4.0]])
        >>> signed_geodesic_distance(mask, image, (1.0, 3.0), image_weight=1.0)
        array([[-4.5, -1.5,  1.5,  4.5,  9.5]], dtype=float32)
    """
    inside = mask_numbers(mask) == 1
    search = _Search.of(image, inside.shape, spacing_mm, image_weight, slice_axis, clip_mm)
    in_plane = tuple(axis for axis in range(inside.ndim) if axis != search.slice_axis)
    has_boundary = inside.any(in_plane, keepdims=True) & ~inside.all(in_plane, keepdims=True)
    distance = np.zeros(inside.shape, np.float32)
    if has_boundary.any():
        found = search.lengths(inside, from_boundary=True)
        distance = np.where(has_boundary, np.where(inside, -found, found), np.float32(0))
    return _like(mask, distance)


def geodesic_distance(
    seeds: Array,
    image: np.ndarray | Tensor,
    num_classes: int,
    spacing_mm: Sequence[float] | Tensor | None = None,
    *,
    image_weight: float,
    slice_axis: int | None = None,
    clip_mm: float | None = None,
    ignore_index: int = -1,
) -> Array:
    """Length of the shortest path from the nearest annotated voxel of each class: 0 there, and growing along the image.

    Args:
        seeds: (*S) a weak label, 2D or 3D: class numbers on points and scribbles, `ignore_index` elsewhere.
        image: see `signed_geodesic_distance`, as for the others.
        num_classes: classes with the background, C.
        spacing_mm: see there.
        image_weight: see there.
        slice_axis: see there.
        clip_mm: values are limited to it.
        ignore_index: of the voxels that are not annotated; no class number.

    Returns:
        (C, *S) float32 in mm, of the kind of `seeds`; infinite, or `clip_mm`, for a class without a seed (with
        `slice_axis`: in this slice).

    Raises:
        ValueError: an argument is outside its range, shapes do not fit, or the seeds are no class numbers.

    Example:
        >>> seeds = np.array([[0, -1, -1, -1, 1]])
        >>> image = np.array([[0.0, 0.0, 0.0, 5.0, 5.0]])
        >>> geodesic_distance(seeds, image, 2, image_weight=1.0)[:, 0].round(1)
        array([[0. , 1. , 2. , 7.1, 8.1],
               [8.1, 7.1, 6.1, 1. , 0. ]], dtype=float32)
    """
    numbers = _seed_numbers(seeds, num_classes, ignore_index)
    search = _Search.of(image, numbers.shape, spacing_mm, image_weight, slice_axis, clip_mm)
    return _like(seeds, _from_seeds(search, numbers, num_classes))


def grow_label(
    seeds: Array,
    image: np.ndarray | Tensor,
    num_classes: int,
    spacing_mm: Sequence[float] | Tensor | None = None,
    *,
    image_weight: float,
    slice_axis: int | None = None,
    reach_mm: float | None = None,
    ignore_index: int = -1,
) -> Array:
    """A whole label from a weak one: each voxel gets the class of the seed that is nearest along the image.

    Args:
        seeds: see `geodesic_distance`, as for the others.
        image: see there.
        num_classes: see there.
        spacing_mm: see there.
        image_weight: see there.
        slice_axis: see there.
        reach_mm: voxels farther than this from every seed are background: for labels whose background has no seeds.
            None: no limit.
        ignore_index: see there.

    Returns:
        (*S) class numbers, of the kind and type of `seeds`; background (in slices) without any seed.

    Raises:
        ValueError: see `geodesic_distance`.

    Example:
        >>> grow_label(np.array([[0, -1, -1, -1, 1]]), np.array([[0.0, 0.0, 0.0, 5.0, 5.0]]), 2, image_weight=1.0)
        array([[0, 0, 0, 1, 1]])
    """
    numbers = _seed_numbers(seeds, num_classes, ignore_index)
    unknown = numbers == ignore_index
    search = _Search.of(image, numbers.shape, spacing_mm, image_weight, slice_axis, reach_mm, "reach_mm")
    if unknown.any():
        distances = _from_seeds(search, numbers, num_classes)
        nearest = distances.argmin(0)
        far = distances.min(0) >= search.limit
        numbers = np.where(unknown, np.where(far, 0, nearest), numbers)
    grown = numbers.astype(host_array(seeds).dtype)
    return _like(seeds, grown)


def _seed_numbers(seeds: np.ndarray | Tensor, num_classes: int, ignore_index: int) -> np.ndarray:
    if 0 <= ignore_index < num_classes:
        raise ValueError(f"ignore_index: expected no class number 0..{num_classes - 1}, got {ignore_index}.")
    return checks.label_array(seeds, num_classes, ignore_index=ignore_index, name="seeds")


def _from_seeds(search: _Search, numbers: np.ndarray, num_classes: int) -> np.ndarray:
    """Lengths (C, *S), of the search's limit at most."""
    distances = np.full((num_classes, *numbers.shape), search.limit, np.float32)
    for number in range(num_classes):
        starts = numbers == number
        if starts.any():
            distances[number] = search.lengths(starts, from_boundary=False)
    return distances


class _Search(NamedTuple):
    """What paths are searched in: checked arguments, the image as (*S, M)."""

    image: np.ndarray
    spacing: tuple[float, ...]
    weight: float
    slice_axis: int | None
    limit: float

    @classmethod
    def of(
        cls,
        image: np.ndarray | Tensor,
        shape: tuple[int, ...],
        spacing_mm: Sequence[float] | Tensor | None,
        image_weight: float,
        slice_axis: int | None,
        limit: float | None,
        limit_name: str = "clip_mm",
    ) -> _Search:
        return cls(
            _checked_image(image, shape),
            checks.spacing(spacing_mm, len(shape)),
            checks.number("image_weight", image_weight, least=0.0),
            checks.slice_axis(slice_axis, len(shape)),
            math.inf if limit is None else checks.number(limit_name, limit, above=0.0),
        )

    def lengths(self, marked: np.ndarray, *, from_boundary: bool) -> np.ndarray:
        """Lengths (*S) float32 of the paths to the boundary of the marked voxels, or from them; the limit at most."""
        # Imported here: numba takes a second to start.
        from medconstraints.distance.paths import extend_paths, paths_to_boundary

        box = self._surroundings(marked)
        marked, image = marked[box], self.image[box]
        places, lengths = self._neighbours(marked.shape)
        longest = self._longest_edge(image, float(lengths.max()))
        # A margin of voxels on neither side saves a check of the coordinates for every neighbour.
        side = np.pad(np.where(marked & from_boundary, np.int8(-1), np.int8(1)), 1)
        rows = np.pad(image, [(1, 1)] * marked.ndim + [(0, 0)]).reshape(side.size, -1)
        found, inner = np.full(side.shape, np.inf), (slice(1, -1),) * side.ndim
        if from_boundary:
            paths_to_boundary(side.reshape(-1), rows, places, lengths, self.weight, found.reshape(-1))
        else:
            found[inner][marked] = 0.0
        index = np.int32 if side.size < 2**31 else np.int64
        # A bucket as wide as the shortest edge visits every voxel once; wider ones are as exact.
        reach = min(longest, self.limit)
        width = max(float(lengths.min()), reach / MAX_BUCKETS)
        heads = np.full(math.ceil(reach / width) + 3, -1, index)
        queue = heads, np.empty(side.size, index), np.full(side.size, -2, index)
        extend_paths(side.reshape(-1), rows, places, lengths, self.weight, self.limit, width, *queue, found.reshape(-1))
        # What lies outside the box is farther than the limit, as is what was not reached.
        result = np.full(self.image.shape[:-1], self.limit, np.float32)
        result[box] = np.minimum(found[inner], self.limit)
        return result

    def _surroundings(self, marked: np.ndarray) -> tuple[slice, ...]:
        """Box around the marked voxels that holds all paths within the limit: a straight line is the shortest."""
        if math.isinf(self.limit):
            return tuple(slice(0, size) for size in marked.shape)
        box = []
        for axis, size in enumerate(marked.shape):
            found = np.flatnonzero(marked.any(tuple(other for other in range(marked.ndim) if other != axis)))
            # The boundary is half a step nearer than the voxel to which a path leads.
            margin = math.floor(min(self.limit / self.spacing[axis] + 0.5, size))
            box.append(slice(max(int(found[0]) - margin, 0), int(found[-1]) + 1 + margin))
        return tuple(box)

    def _neighbours(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Steps to the neighbours of a voxel, as places in a row of all voxels with a margin around, and in mm."""
        reach = [(0,) if axis == self.slice_axis else (-1, 0, 1) for axis in range(len(shape))]
        moves = np.array([move for move in itertools.product(*reach) if any(move)])
        strides = np.array([math.prod(size + 2 for size in shape[axis + 1 :]) for axis in range(len(shape))])
        return moves @ strides, np.sqrt(((moves * self.spacing) ** 2).sum(1))

    def _longest_edge(self, image: np.ndarray, longest_step: float) -> float:
        """An upper bound in mm."""
        axes = tuple(range(image.ndim - 1))
        ranges = image.max(axes).astype(np.float64) - image.min(axes)
        with np.errstate(over="ignore"):
            longest = float(np.hypot(longest_step, self.weight * np.sqrt((ranges**2).sum())))
        if longest > 1e30:
            raise ValueError(
                f"image_weight: expected edges below 1e30 mm, got {self.weight:g} for an image that makes them "
                f"{longest:g} mm long; scale the image or choose a smaller weight."
            )
        return longest


def _checked_image(image: np.ndarray | Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """The image as float32 on the host, channels last: (*S, M)."""
    with np.errstate(over="ignore"):
        intensity = np.asarray(host_array(image), np.float32)
    if intensity.shape == shape:
        intensity = intensity[None]
    if intensity.shape[1:] != shape or not len(intensity):
        raise ValueError(
            f"image: expected the shape of the label or mask, {shape}, or (M, {', '.join(map(str, shape))}), got "
            f"{intensity.shape}."
        )
    if not np.isfinite(intensity).all():
        raise ValueError(
            f"image: expected finite values, got {int((~np.isfinite(intensity)).sum())} that are NaN or infinite in "
            "float32; replace them first, as in np.nan_to_num(image)."
        )
    return np.moveaxis(intensity, 0, -1)


def _like(given: Array, result: np.ndarray) -> Array:
    """The result as a tensor on the device of `given`, if that is one."""
    return torch.from_numpy(result).to(given.device) if isinstance(given, Tensor) else result
