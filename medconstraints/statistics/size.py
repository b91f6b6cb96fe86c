"""Soft size of each class: the differentiable voxel count of a probability map."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from medconstraints.checks import plain
from medconstraints.statistics.arguments import checked_probs, spacing_rows

__all__ = ["soft_size", "soft_volume_size"]


def soft_size(probs: Tensor, spacing_mm: Sequence[float] | Tensor | None = None) -> Tensor:
    """Sum of the probabilities of each class (Kervadec 2020, eq. 3.11: V = sum_p s_p).

    Args:
        probs: probabilities, shape (B, C, *S), D = 2 or 3 spatial axes, floating point.
        spacing_mm: voxel spacing in mm, one value per spatial axis, shape (D,), or one row per sample, shape (B, D).
            None counts voxels.

    Returns:
        Shape (B, C, 1), float32 (float64 for float64 input): voxels, or mm^D when `spacing_mm` is given.

    Raises:
        ValueError: `probs` has no spatial axis or is not floating point, or `spacing_mm` does not fit its axes.

    Example:
        >>> import torch
        >>> soft_size(torch.full((1, 2, 4, 4), 0.5), spacing_mm=(2.0, 2.0)).flatten().tolist()
        [32.0, 32.0]
    """
    probs, dtype = checked_probs(probs)
    size = probs.flatten(2).sum(-1, keepdim=True, dtype=dtype)
    if spacing_mm is None:
        return size
    return size * spacing_rows(spacing_mm, probs, dtype).prod(-1).view(-1, 1, 1)


def soft_volume_size(
    probs: Tensor, spacing_mm: Sequence[float] | Tensor | None = None, volume: Tensor | None = None
) -> Tensor:
    """Size of each class in whole volumes whose slices arrive as a batch (Kervadec 2020, section 2.4.4).

    Args:
        probs: probabilities of slices, (B, C, H, W).
        spacing_mm: in-plane spacing and distance of the slices in mm, (3,) or one row per slice, (B, 3); None counts
            voxels.
        volume: number of the volume each slice belongs to, (B,) int64. None: the batch is one volume.

    Returns:
        Shape (B, C, 1), float32 (float64 for float64 input): for each slice the size in all slices of its volume that
        are in the batch, voxels or mm^3. Every slice of a volume has the same value, so bounds and indices stay one
        for each slice; `ConstraintLoss` counts the slices of a volume as one sample in its mean or sum.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> import torch
        >>> soft_volume_size(torch.full((3, 1, 4, 4), 0.5), volume=torch.tensor([0, 0, 1])).flatten().tolist()
        [16.0, 16.0, 8.0]
    """
    size = soft_size(probs)
    if spacing_mm is not None:
        # The slices have one axis less than the spacing: the voxel of the volume is what counts.
        voxel = spacing_rows(spacing_mm, probs.unsqueeze(-1), size.dtype).prod(-1)
        size = size * voxel.view(-1, 1, 1)
    if volume is None:
        return size.sum(0, keepdim=True).expand_as(size)
    if volume.shape != probs.shape[:1] or volume.is_floating_point():
        raise ValueError(
            f"volume: expected one whole number for each of the {probs.shape[0]} slices, got {volume.dtype} of shape "
            f"{tuple(volume.shape)}."
        )
    volume = plain(volume).to(size.device, non_blocking=True)
    together = (volume[:, None] == volume).to(size.dtype)
    # A sum, not a matrix product: that would be rounded to half precision under autocast.
    return (together[:, :, None, None] * size).sum(1)
