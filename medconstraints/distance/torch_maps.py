"""Signed distances in torch, on whatever device the label is: exact minima over shifted copies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["How", "signed_map"]

CHECK_EVERY = 16  # shifts between two looks at whether a farther one can still matter, which makes the host wait


class How(NamedTuple):
    """What is measured: to the faces between voxels or to centres, what is taken from distances inside, and a limit."""

    to_face: bool
    shift_inside_mm: float
    clip_mm: float | None


def signed_map(mask: Tensor, spacing_mm: Sequence[float], axes: Sequence[int], how: How) -> Tensor:
    """Signed distance (*S) of a boolean mask (*S) over some of its axes, 0 where a slice over them has one side only.

    Memory beyond the mask and the result: three volumes of float32.
    """
    to_face, shift_inside_mm, clip_mm = how
    reach = math.inf if clip_mm is None else clip_mm + shift_inside_mm
    out = _distance(mask, spacing_mm, axes, to_face, reach)
    inside = _distance(~mask, spacing_mm, axes, to_face, reach)
    signed = torch.where(mask, shift_inside_mm - inside, out)
    if clip_mm is not None:
        signed = signed.clamp_(-clip_mm, clip_mm)
    both_sides = mask.amax(tuple(axes), keepdim=True) & ~mask.amin(tuple(axes), keepdim=True)
    return signed.masked_fill_(~both_sides, 0.0)


def _distance(mask: Tensor, spacing_mm: Sequence[float], axes: Sequence[int], to_face: bool, reach: float) -> Tensor:
    """Distance of every voxel to the mask; too large, or infinite, where it is above `reach`."""
    half = 0.5 if to_face else 0.0
    squared = _along_one_axis(mask, axes[0], float(spacing_mm[axes[0]]), half)
    for axis in axes[1:]:
        squared = _minimum_over_shifts(squared, axis, float(spacing_mm[axis]), half, reach)
    return squared.sqrt_()


def _along_one_axis(mask: Tensor, axis: int, step: float, half: float) -> Tensor:
    """Squared distance to the nearest voxel of the mask on the same line: the last one before and the first after."""
    length = mask.shape[axis]
    shape = [1] * mask.dim()
    shape[axis] = length
    place = torch.arange(length, device=mask.device, dtype=torch.float32).view(shape)
    before = torch.where(mask, place, -math.inf).cummax(axis).values
    after = torch.where(mask, -place, -math.inf).flip(axis).cummax(axis).values.flip(axis).neg_()
    steps = torch.minimum(place - before, after - place)
    return ((steps - half).clamp_(min=0) * step).square_()


def _minimum_over_shifts(squared: Tensor, axis: int, step: float, half: float, reach: float) -> Tensor:
    """Minimum over n of squared(x + n) + cost(n) along an axis."""
    best = squared.clone()
    length = squared.shape[axis]
    for n in range(1, length):
        cost = ((n - half) * step) ** 2
        if cost > reach**2 * 1.001:
            break
        if n % CHECK_EVERY == 0:
            # Costs only grow: once no known value is above this one, no farther voxel is nearer.
            reachable = ~torch.isinf(squared).all(axis, keepdim=True)
            if not bool(((best > cost) & reachable).any()):
                break
        low, high = squared.narrow(axis, 0, length - n), squared.narrow(axis, n, length - n)
        target = best.narrow(axis, n, length - n)
        torch.minimum(target, low + cost, out=target)
        target = best.narrow(axis, 0, length - n)
        torch.minimum(target, high + cost, out=target)
    return best
