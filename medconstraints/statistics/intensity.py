"""Mean intensity of the image inside each class."""

from __future__ import annotations

from torch import Tensor

from medconstraints.statistics.arguments import checked_probs
from medconstraints.statistics.moments import soft_fraction

__all__ = ["soft_mean_intensity"]


def soft_mean_intensity(probs: Tensor, image: Tensor) -> Tensor:
    """Mean of each image channel over each class (Kervadec 2020, eq. 2.8 with f the intensity).

    Args:
        probs: probabilities, (B, C, *S), floating point.
        image: the image on the same grid, (B, M, *S); M channels.

    Returns:
        (B, C, M), float32 (float64 for float64 input), in the image's unit; 0 for a class without mass.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> import torch
        >>> soft_mean_intensity(torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 7.0)).round().tolist()
        [[[7.0]]]
    """
    probs, _ = checked_probs(probs)
    if image.shape[:1] + image.shape[2:] != probs.shape[:1] + probs.shape[2:]:
        raise ValueError(
            f"image: expected (B, M, *S) on the grid of the probabilities, B = {probs.shape[0]} and S = "
            f"{tuple(probs.shape[2:])}, got shape {tuple(image.shape)}."
        )
    return soft_fraction(probs, image)
