"""Relations between classes: ratio of sizes, order of centroids, one class inside another's extent.

They answer the thesis's call for constraints between organs (Kervadec 2020, conclusion). Each returns (B, R, M): R
counts the pairs of classes, and a loss drops no background row of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medconstraints.statistics.arguments import checked_probs, chosen_pairs, relation, select_channels
from medconstraints.statistics.moments import soft_centroid
from medconstraints.statistics.size import soft_size

__all__ = ["soft_centroid_offset", "soft_outside_extent", "soft_size_ratio"]

_LEAST_MASS = 1e-2  # voxels


@relation
def soft_size_ratio(probs: Tensor, pairs: Sequence[Sequence[int]]) -> Tensor:
    """Size of the first class of each pair divided by the size of the second.

    Args:
        probs: probabilities, (B, C, *S), floating point.
        pairs: R pairs of class indices, background 0.

    Returns:
        (B, R, 1), float32 (float64 for float64 input); very large, but finite, when the second class has no mass.

    Raises:
        ValueError: a pair names a class that does not exist.

    Example:
        >>> probs = torch.cat([torch.full((1, 1, 4, 4), 0.8), torch.full((1, 1, 4, 4), 0.2)], 1)
        >>> round(soft_size_ratio(probs, [[1, 0]]).item(), 4)
        0.25
    """
    first, second = chosen_pairs(pairs, probs)
    size = soft_size(probs)
    return select_channels(size, first) / select_channels(size, second).clamp(min=_LEAST_MASS)


@relation
def soft_centroid_offset(
    probs: Tensor, pairs: Sequence[Sequence[int]], spacing_mm: Sequence[float] | Tensor | None = None
) -> Tensor:
    """Centroid of the second class of each pair minus the centroid of the first, along each axis.

    A lower bound of 0 along one axis, infinite bounds along the others, demands an order: "the second lies further".

    Args:
        probs: probabilities, (B, C, *S), floating point.
        pairs: R pairs of class indices, background 0.
        spacing_mm: voxel spacing in mm, (D,) or one row per sample, (B, D). None gives voxels.

    Returns:
        (B, R, D), float32 (float64 for float64 input), voxels or mm.

    Raises:
        ValueError: a pair names a class that does not exist, or `spacing_mm` does not fit.

    Example:
        >>> probs = torch.zeros(1, 2, 4, 4)
        >>> probs[0, 0, 0, 1], probs[0, 1, 3, 1] = 1, 1
        >>> soft_centroid_offset(probs, [[0, 1]]).round().tolist()
        [[[3.0, 0.0]]]
    """
    first, second = chosen_pairs(pairs, probs)
    centroid = soft_centroid(probs, spacing_mm)
    return select_channels(centroid, second) - select_channels(centroid, first)


@relation
def soft_outside_extent(probs: Tensor, pairs: Sequence[Sequence[int]], along_lines: bool = False) -> Tensor:
    """Share of the first class that lies outside the extent of the second, along each axis.

    A coordinate x is inside the extent of a class to the degree min(max_{u <= x} p(u), max_{u >= x} p(u)), where p(u)
    is the largest probability of the class in the plane at u: the class is there before and behind. An upper bound near
    0 keeps the first class within the second's range, along every axis; with `along_lines` it demands that the second
    class encloses the first ("the myocardium encloses the left ventricle").

    Args:
        probs: probabilities, (B, C, *S), floating point.
        pairs: R pairs (inner, outer) of class indices, background 0.
        along_lines: look along the line through each voxel instead of along the planes' maxima: every voxel of the
            first class must then have the second before and behind it on its own line.

    Returns:
        (B, R, D), float32 (float64 for float64 input), from 0 (inside) to 1; 0 when the first class has no mass.

    Raises:
        ValueError: a pair names a class that does not exist.

    Example:
        >>> probs = torch.zeros(1, 2, 1, 6)
        >>> probs[0, 0, 0, 2:5], probs[0, 1, 0, 1:4] = 1, 1       # inner 2..4, outer 1..3
        >>> [round(value, 3) for value in soft_outside_extent(probs, [[0, 1]])[0, 0].tolist()]
        [0.0, 0.333]
    """
    probs, dtype = checked_probs(probs)
    first, second = chosen_pairs(pairs, probs)
    inner, outer = select_channels(probs, first).to(dtype), select_channels(probs, second).to(dtype)
    mass = inner.flatten(2).sum(-1)
    shares = []
    for axis in range(2, probs.dim()):
        if not along_lines:
            others = [other for other in range(2, probs.dim()) if other != axis]
            amount, presence, along = inner.sum(others), outer.amax(others), -1
        else:
            amount, presence, along = inner, outer, axis
        before = presence.cummax(along).values
        behind = presence.flip(along).cummax(along).values.flip(along)
        outside = (amount * (1 - torch.minimum(before, behind))).flatten(2).sum(-1)
        shares.append(outside / mass.clamp(min=_LEAST_MASS))
    return torch.stack(shares, -1)
