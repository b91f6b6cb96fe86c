"""Soft centroid and spread of each class: fractional moments of a probability map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medconstraints.checks import plain
from medconstraints.statistics.arguments import checked_probs, spacing_rows

__all__ = ["soft_centroid", "soft_fraction", "soft_moments", "soft_spread"]

# A class with less mass than a hundredth of a voxel has no centroid worth the name: it moves towards the middle of the
# image as its mass goes to 0, and its gradient stays finite.
_LEAST_MASS = 1e-2


def soft_centroid(probs: Tensor, spacing_mm: Sequence[float] | Tensor | None = None) -> Tensor:
    """Centre of mass of each class along each axis (Kervadec 2020, eq. 3.12: C = sum_p s_p c_p / sum_p s_p).

    Args:
        probs: probabilities, (B, C, *S), D = 2 or 3 spatial axes, floating point.
        spacing_mm: voxel spacing in mm, (D,) or one row per sample, (B, D). None gives voxels.

    Returns:
        (B, C, D), float32 (float64 for float64 input): 0-based voxel coordinates, or these times the spacing. A class
        without any mass gets the middle of the image, one of less than 0.01 voxels something in between.

    Raises:
        ValueError: `probs` has no spatial axis or is not floating point, or `spacing_mm` does not fit its axes.

    Example:
        >>> probs = torch.zeros(1, 1, 4, 4)
        >>> probs[0, 0, 1, 2:] = 1
        >>> soft_centroid(probs).tolist()
        [[[1.0, 2.5]]]
    """
    return soft_moments(probs, spacing_mm)[..., 1:]


def soft_moments(probs: Tensor, spacing_mm: Sequence[float] | Tensor | None = None) -> Tensor:
    """Size and centroid of each class together, for the price of one.

    Args:
        probs: probabilities, (B, C, *S), D = 2 or 3 spatial axes, floating point.
        spacing_mm: voxel spacing in mm, (D,) or one row per sample, (B, D). None gives voxels.

    Returns:
        (B, C, 1 + D): `soft_size`, then `soft_centroid`.

    Raises:
        ValueError: as for `soft_centroid`.

    Example:
        >>> soft_moments(torch.ones(1, 1, 4, 6)).tolist()
        [[[24.0, 1.5, 2.5]]]
    """
    probs, dtype = checked_probs(probs)
    profiles = _profiles(probs, dtype)
    mass = profiles[0].sum(-1, keepdim=True)
    centroid = torch.cat([_mean(profile, mass) for profile in profiles], -1)
    if spacing_mm is not None:
        spacing = spacing_rows(spacing_mm, probs, centroid.dtype)[:, None]
        mass, centroid = mass * spacing.prod(-1, keepdim=True), centroid * spacing
    return torch.cat([mass, centroid], -1).to(dtype)


def soft_spread(probs: Tensor, spacing_mm: Sequence[float] | Tensor | None = None) -> Tensor:
    """Standard deviation of each class's mass along each axis (second central moment of eq. 2.8, square root).

    Args:
        probs: probabilities, (B, C, *S), D = 2 or 3 spatial axes, floating point.
        spacing_mm: voxel spacing in mm, (D,) or one row per sample, (B, D). None gives voxels.

    Returns:
        (B, C, D), float32 (float64 for float64 input), voxels or mm. 0, without a slope, for a class in one line and
        for one without mass.

    Raises:
        ValueError: as for `soft_centroid`.

    Example:
        >>> soft_spread(torch.ones(1, 1, 2, 4))[0, 0].pow(2).tolist()
        [0.25, 1.25]
    """
    probs, dtype = checked_probs(probs)
    profiles = _profiles(probs, dtype)
    mass = profiles[0].sum(-1, keepdim=True)
    parts = []
    for profile in profiles:
        # About the centroid, not as a difference of raw moments, which would cancel in large images.
        offset = _coordinates(profile) - _mean(profile, mass)
        parts.append((profile * offset.square()).sum(-1, keepdim=True) / mass.clamp(min=_LEAST_MASS))
    variance = torch.cat(parts, -1)
    # The square root has no slope at 0.
    positive = variance > 1e-12
    spread = torch.where(positive, torch.where(positive, variance, 1.0).sqrt(), 0.0)
    if spacing_mm is not None:
        spread = spread * spacing_rows(spacing_mm, probs, spread.dtype)[:, None]
    return spread.to(dtype)


def soft_fraction(probs: Tensor, potential: Tensor) -> Tensor:
    """General fractional statistic of each class (Kervadec 2020, eq. 2.8: F = sum_p f_p s_p / sum_p s_p).

    Args:
        probs: probabilities, (B, C, *S), floating point.
        potential: M values f at every voxel, (B, M, *S), or (1, M, *S) for all samples.

    Returns:
        (B, C, M), float32 (float64 for float64 input), in the potential's unit; 0 for a class without mass.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> soft_fraction(torch.ones(1, 2, 2, 2), torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])).flatten().tolist()
        [1.5, 1.5]
    """
    probs, dtype = checked_probs(probs)
    fits = potential.dim() == probs.dim() and potential.shape[2:] == probs.shape[2:]
    if not fits or potential.shape[0] not in (1, probs.shape[0]):
        raise ValueError(
            f"potential: expected (B or 1, M, *S) with B = {probs.shape[0]} and S = {tuple(probs.shape[2:])}, got "
            f"shape {tuple(potential.shape)}."
        )
    with torch.autocast(probs.device.type, enabled=False):
        # In float64: accelerators may round the factors of a float32 product.
        flat = probs.flatten(2).double()
        values = plain(potential).flatten(2).double().expand(len(flat), -1, -1)
        weighted = torch.bmm(flat, values.transpose(1, 2))
        return (weighted / flat.sum(-1, keepdim=True).clamp(min=_LEAST_MASS)).to(dtype)


def _profiles(probs: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Mass of each class in every line or plane across each axis: D tensors (B, C, S_d), float64.

    Two passes over the image: everything but the last axis's profile comes from the sums along the last axis.
    """
    along_last = probs.sum(-1, dtype=dtype)
    last = probs.flatten(2, -2).sum(2, dtype=dtype)
    dims = probs.dim() - 2
    rest = [along_last.sum([2 + other for other in range(dims - 1) if other != axis]) for axis in range(dims - 1)]
    return [profile.double() for profile in [*(rest if dims > 2 else [along_last]), last]]


def _coordinates(profile: Tensor) -> Tensor:
    return torch.arange(profile.shape[-1], dtype=profile.dtype, device=profile.device)


def _mean(profile: Tensor, mass: Tensor) -> Tensor:
    """Mean coordinate of a profile, (B, C, 1)."""
    middle = (profile.shape[-1] - 1) / 2
    moment = (profile * (_coordinates(profile) - middle)).sum(-1, keepdim=True)
    return middle + moment / mass.clamp(min=_LEAST_MASS)
