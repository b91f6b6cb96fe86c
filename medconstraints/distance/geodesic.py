"""Signed distance to a mask along shortest paths for which edges of the image are obstacles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = ["signed_geodesic_distance"]

_Array = TypeVar("_Array", np.ndarray, Tensor)

# More buckets than this only make the search through empty ones longer.
_MAX_BUCKETS = 1 << 14


def signed_geodesic_distance(
    mask: _Array,
    image: np.ndarray | Tensor,
    spacing_mm: Sequence[float] | np.ndarray | Tensor | None = None,
    *,
    image_weight: float,
    slice_axis: int | None = None,
    clip_mm: float | None = None,
    backend: str = "auto",
) -> _Array:
    """Length of the shortest path to the boundary of a mask, where steps between unlike voxels are longer.

    A distance map that knows the image, as the outlook of Kervadec 2020, chapter 4, proposes for the boundary loss: a
    voxel behind an edge of the image is farther from the object than one that looks alike. Voxels are the nodes of a
    graph, its edges lead to the 26 neighbours (8 in 2D and in slices), and an edge between voxels p and q is

        |pq| = sqrt(|x_p - x_q|^2 + w^2 |I_p - I_q|^2)        x in mm, w = `image_weight`

    long. The distance of p is the length of the shortest path from p to the boundary that stays on the side of p; an
    edge that crosses the boundary counts half, since the boundary lies between its voxels. Beyond the edge of the image
    nothing is known: it is neither inside nor outside.

    With `image_weight=0` this is a chamfer distance: never less than the Euclidean one (convention "boundary" of
    `signed_distance`), and with equal spacings at most 8.3 % more in 2D and 12.9 % more in 3D.

    Args:
        mask: (*S) the object, 2D or 3D: bool, or numbers of which all are 0 or 1.
        image: (*S), or (M, *S) with M channels, finite; the difference of two voxels is the Euclidean norm over the
            channels. It is read as float32.
        spacing_mm: voxel spacing in mm, D values; None for 1 each.
        image_weight: mm that a step gets longer per unit of intensity, >= 0. Scale it to the image: 0.1 suits
            intensities 0..255 about as well as 25 suits 0..1.
        slice_axis: None for paths through the volume, or the axis of a volume across which every slice is an image of
            its own.
        clip_mm: values are limited to +-clip_mm, > 0; the work is then confined to the surroundings of the mask.
        backend: "numba", "scipy" (slow, takes about a kilobyte of memory per voxel), or "auto": numba.

    Returns:
        (*S) float32 in mm, negative inside, of the kind of `mask` (numpy array, or tensor on its device). Zeros if the
        mask is empty or full; with `slice_axis` in each slice of which that is true.

    Raises:
        ValueError: wrong shape, values that are not finite, a spacing or `clip_mm` that is not positive, a negative
            `image_weight`, a mask of other values than 0 and 1, an unknown axis or backend.

    Example:
        >>> mask = np.array([[1, 1, 0, 0, 0]])
        >>> image = np.array([[0.0, 0.0, 0.0, 0.0, 4.0]])
        >>> signed_geodesic_distance(mask, image, (1.0, 3.0), image_weight=1.0)
        array([[-4.5, -1.5,  1.5,  4.5,  9.5]], dtype=float32)
    """
    inside = _checked_mask(mask)
    intensity = _checked_image(image, inside.shape)
    spacing = _checked_spacing(spacing_mm, inside.ndim)
    weight = _checked_number("image_weight", image_weight, "a number >= 0 (mm per unit of intensity)", least=0.0)
    limit = math.inf
    if clip_mm is not None:
        limit = _checked_number("clip_mm", clip_mm, "a number > 0 (mm), or None", above=0.0)
    if slice_axis is not None and not (inside.ndim == 3 and slice_axis in (0, 1, 2)):
        raise ValueError(
            f"slice_axis: expected None, or 0, 1 or 2 for 3D volumes, got {slice_axis} for shape {inside.shape}."
        )
    if backend not in ("auto", "numba", "scipy"):
        raise ValueError(f'backend: expected "auto", "numba" or "scipy", got {backend!r}.')

    distance = np.zeros(inside.shape, np.float32)
    in_plane = tuple(axis for axis in range(inside.ndim) if axis != slice_axis)
    has_boundary = inside.any(in_plane, keepdims=True) & ~inside.all(in_plane, keepdims=True)
    if has_boundary.any():
        box = _surroundings(inside, spacing, limit)
        steps = _Steps.to_neighbours(inside[box].shape, spacing, slice_axis)
        near = intensity[box]
        longest = _longest_edge(near, steps, weight)
        # A margin of voxels on neither side saves a check of the coordinates for every neighbour.
        side = np.pad(np.where(inside[box], np.int8(-1), np.int8(1)), 1)
        rows = np.pad(near, [(1, 1)] * inside.ndim + [(0, 0)]).reshape(side.size, -1)
        lengths = _lengths_scipy if backend == "scipy" else _lengths_numba
        found = lengths(side.reshape(-1), rows, steps, weight, limit, longest).reshape(side.shape)
        found = found[(slice(1, -1),) * inside.ndim]
        if math.isfinite(limit):
            # What lies outside the box is farther than the limit, as is what was not reached.
            distance[...] = limit
            np.minimum(found, limit, out=found)
        distance[box] = np.where(inside[box], -found, found)
        if slice_axis is not None:
            distance = np.where(has_boundary, distance, np.float32(0))
    if isinstance(mask, Tensor):
        return torch.from_numpy(distance).to(mask.device)
    return distance


class _Steps(NamedTuple):
    """Steps to the neighbours of a voxel: places in a row of all voxels, and distance in mm."""

    places: np.ndarray
    lengths: np.ndarray

    @classmethod
    def to_neighbours(cls, shape: tuple[int, ...], spacing: np.ndarray, slice_axis: int | None) -> _Steps:
        """Those of a grid of this shape with a margin of one voxel all around, laid out in C order."""
        reach = [(0,) if axis == slice_axis else (-1, 0, 1) for axis in range(len(shape))]
        moves = np.array([move for move in itertools.product(*reach) if any(move)])
        strides = np.array([math.prod(size + 2 for size in shape[axis + 1 :]) for axis in range(len(shape))])
        return cls(moves @ strides, np.sqrt(((moves * spacing) ** 2).sum(1)))


def _surroundings(inside: np.ndarray, spacing: np.ndarray, limit: float) -> tuple[slice, ...]:
    """Box around the mask that holds all paths shorter than the limit: none is shorter than the straight line."""
    if math.isinf(limit):
        return tuple(slice(0, size) for size in inside.shape)
    box = []
    for axis, size in enumerate(inside.shape):
        found = np.flatnonzero(inside.any(tuple(other for other in range(inside.ndim) if other != axis)))
        # The boundary is half a step nearer than the voxel of the mask to which a path leads.
        margin = math.floor(min(limit / spacing[axis] + 0.5, size))
        box.append(slice(max(int(found[0]) - margin, 0), int(found[-1]) + 1 + margin))
    return tuple(box)


def _longest_edge(intensity: np.ndarray, steps: _Steps, weight: float) -> float:
    """An upper bound in mm."""
    axes = tuple(range(intensity.ndim - 1))
    ranges = intensity.max(axes).astype(np.float64) - intensity.min(axes)
    with np.errstate(over="ignore"):
        longest = float(np.hypot(steps.lengths.max(), weight * np.sqrt((ranges**2).sum())))
    if longest > 1e30:
        raise ValueError(
            f"image_weight: expected a weight that gives edges below 1e30 mm, got {weight:g} for an image that makes "
            f"them {longest:g} mm long; scale the image or choose a smaller weight."
        )
    return longest


def _lengths_numba(
    side: np.ndarray, rows: np.ndarray, steps: _Steps, weight: float, limit: float, longest: float
) -> np.ndarray:
    """Unsigned lengths of the paths of all voxels, (N,) float64; infinite where they reach the limit.

    side: (N,) -1 inside, 1 outside, 0 in the margin; rows: (N, M) the image.
    """
    # Imported here: numba takes a second to start, and the other backend does without it.
    from medconstraints.distance.paths import path_lengths

    index = np.int32 if len(side) < 2**31 else np.int64
    # A bucket as wide as the shortest edge visits every voxel once; wider ones are as exact.
    reach = min(longest, limit)
    width = max(float(steps.lengths.min()), reach / _MAX_BUCKETS)
    heads = np.full(math.ceil(reach / width) + 3, -1, index)
    after, before = np.empty(len(side), index), np.full(len(side), -2, index)
    found = np.full(len(side), np.inf)
    path_lengths(side, rows, steps.places, steps.lengths, weight, limit, width, heads, after, before, found)
    return found


def _lengths_scipy(
    side: np.ndarray, rows: np.ndarray, steps: _Steps, weight: float, limit: float, _: float
) -> np.ndarray:
    """The same by scipy's Dijkstra, from a node of its own that stands for the boundary."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import dijkstra

    count = len(side)
    (voxels,) = np.nonzero(side)
    nearest = np.full(count, np.inf)
    starts, ends, lengths = [], [], []
    for place, length in zip(steps.places, steps.lengths, strict=True):
        others = voxels + place
        # Into float64 before the difference, as the compiled code does.
        squared = ((rows[voxels].astype(np.float64) - rows[others]) ** 2).sum(1)
        edges = np.sqrt(length**2 + weight**2 * squared)
        crosses = side[voxels] * side[others] < 0
        nearest[voxels[crosses]] = np.minimum(nearest[voxels[crosses]], edges[crosses] / 2)
        same = side[voxels] == side[others]
        starts.append(voxels[same])
        ends.append(others[same])
        lengths.append(edges[same])
    (at_boundary,) = np.nonzero(np.isfinite(nearest))
    starts.append(np.full(len(at_boundary), count))
    ends.append(at_boundary)
    lengths.append(nearest[at_boundary])
    edges = np.concatenate(lengths), (np.concatenate(starts), np.concatenate(ends))
    graph = coo_array(edges, shape=(count + 1, count + 1)).tocsr()
    found: np.ndarray = dijkstra(graph, indices=count, limit=limit)[:count]
    return found


def _checked_mask(mask: np.ndarray | Tensor) -> np.ndarray:
    """The mask as bool on the host."""
    array = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if array.ndim not in (2, 3) or not array.size:
        raise ValueError(f"mask: expected (*S) with 2 or 3 axes, got shape {array.shape}; drop the channel axis.")
    if array.dtype == bool:
        return array
    inside = array == 1
    if not (inside | (array == 0)).all():
        raise ValueError(
            f"mask: expected bool, or only the values 0 and 1, got {array.dtype} with other values; compare a label "
            "with its class first, as in `label == 2`."
        )
    return inside


def _checked_image(image: np.ndarray | Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """The image as float32 on the host, channels last: (*S, M)."""
    array = image.detach().cpu() if isinstance(image, Tensor) else image
    with np.errstate(over="ignore"):
        intensity = np.asarray(array, np.float32)
    if intensity.shape == shape:
        intensity = intensity[None]
    if intensity.shape[1:] != shape or not len(intensity):
        raise ValueError(
            f"image: expected the shape of the mask, {shape}, or (M, {', '.join(map(str, shape))}), got "
            f"{intensity.shape}."
        )
    if not np.isfinite(intensity).all():
        raise ValueError(
            f"image: expected finite values, got {int((~np.isfinite(intensity)).sum())} that are NaN or infinite in "
            "float32; replace them first, as in np.nan_to_num(image)."
        )
    return np.moveaxis(intensity, 0, -1)


def _checked_spacing(spacing_mm: Sequence[float] | np.ndarray | Tensor | None, dims: int) -> np.ndarray:
    """The spacing as (D,) float64."""
    spacing = np.ones(dims) if spacing_mm is None else np.asarray(spacing_mm, np.float64)
    if spacing.shape != (dims,) or not (np.isfinite(spacing) & (spacing > 0)).all():
        raise ValueError(
            f"spacing_mm: expected {dims} positive values, one for each axis of the mask, got {spacing.tolist()}."
        )
    return spacing


def _checked_number(
    name: str, value: float, expected: str, *, least: float = -math.inf, above: float = -math.inf
) -> float:
    """A finite number within its bounds."""
    number = float(value)
    if not (math.isfinite(number) and number >= least and number > above):
        raise ValueError(f"{name}: expected {expected}, got {value!r}.")
    return number
