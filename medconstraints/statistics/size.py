"""Soft size of each class: the differentiable voxel count of a probability map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["soft_size"]


def soft_size(probs: Tensor, spacing_mm: Sequence[float] | Tensor | None = None) -> Tensor:
    """Sum of the probabilities of each class (Kervadec 2020, eq. 2.2: V = sum_p s_p).

    Args:
        probs: probabilities, shape (B, C, *S), D = 2 or 3 spatial axes, floating point.
        spacing_mm: voxel spacing in mm, one value per spatial axis, shape (D,), or one row per sample, shape (B, D).
            None counts voxels.

    Returns:
        Shape (B, C, 1), float32 (float64 for float64 input): voxels, or mm^D when `spacing_mm` is given.

    Raises:
        ValueError: `probs` has no spatial axis or is not floating point, or `spacing_mm` does not fit its axes.

    Example:
        >>> soft_size(torch.full((1, 2, 4, 4), 0.5), spacing_mm=(2.0, 2.0)).flatten().tolist()
        [32.0, 32.0]
    """
    if probs.dim() < 3 or not probs.is_floating_point():
        raise ValueError(
            f"probs: expected a floating point tensor (B, C, *S), got {probs.dtype} of shape {tuple(probs.shape)}; "
            "add the batch and channel axes or apply softmax first."
        )
    # Half precision overflows at 65504, which a 41^3 volume already exceeds.
    dtype = torch.float64 if probs.dtype == torch.float64 else torch.float32
    size = probs.flatten(2).sum(-1, keepdim=True, dtype=dtype)
    if spacing_mm is None:
        return size
    spacing = torch.as_tensor(spacing_mm, dtype=dtype)
    dims = probs.dim() - 2
    if spacing.shape not in ((dims,), (probs.shape[0], dims)) or not bool((spacing > 0).all()):
        raise ValueError(
            f"spacing_mm: expected {dims} positive values, or one row of {dims} for each of the {probs.shape[0]} "
            f"samples, got shape {tuple(spacing.shape)}: {spacing.tolist()}."
        )
    voxel = spacing.prod(-1).to(probs.device)
    return size * (voxel.view(-1, 1, 1) if voxel.dim() else voxel)
