"""Changes of intensity and colour, one value for each sample, differentiable with respect to it; 0 changes nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["blurred", "gamma_corrected", "recoloured", "shifted"]

# Luminance and two axes of colour: the rotation about the first changes the hue.
_TO_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


def shifted(image: Tensor, log_contrast: Tensor, brightness: Tensor) -> Tensor:
    """`image * exp(log_contrast) + brightness`; images (B, C, *S) with zero mean and unit variance are expected."""
    return image * _wide(log_contrast, image).exp() + _wide(brightness, image)


def gamma_corrected(image: Tensor, log_gamma: Tensor) -> Tensor:
    """Intensities between each sample's smallest and largest, as a share, to the power of `exp(log_gamma)`."""
    flat = image.flatten(1)
    low, high = (_wide(value, image) for value in (flat.amin(1), flat.amax(1)))
    extent = (high - low).clamp(min=1e-6)
    share = ((image - low) / extent).clamp(min=1e-4)  # the logarithm of 0 has no slope
    return low + extent * share ** _wide(log_gamma, image).exp()


def blurred(image: Tensor, sigma_mm: Tensor, spacing_mm: Tensor, *, largest_mm: float) -> Tensor:
    """Gaussian blur with a standard deviation of |sigma| (B).

    Args:
        image: (B, C, *S).
        sigma_mm: (B).
        spacing_mm: (B, D).
        largest_mm: of all sigmas; sets the size of the kernel.
    """
    dims = image.dim() - 2
    for axis in range(dims):
        step, length = spacing_mm[:, axis], image.shape[axis + 2]
        radius = min(max(1, math.ceil(2.5 * largest_mm / float(step.min()))), length - 1)
        offset = torch.arange(radius + 1, device=image.device, dtype=image.dtype)
        variance = (sigma_mm / step) ** 2
        taps = torch.exp(-(offset**2) / (2 * variance[:, None] + 1e-6))  # a single 1 without any sigma
        taps = taps / (2 * taps.sum(1, keepdim=True) - taps[:, :1])
        border = [0, 0] * dims
        border[2 * (dims - 1 - axis) : 2 * (dims - axis)] = [radius, radius]
        padded = F.pad(image, border, mode="replicate")
        image = image * _wide(taps[:, 0], image)
        for k in range(1, radius + 1):
            both = padded.narrow(axis + 2, radius - k, length) + padded.narrow(axis + 2, radius + k, length)
            image = image + both * _wide(taps[:, k], image)
    return image


def recoloured(image: Tensor, log_saturation: Tensor, hue_deg: Tensor) -> Tensor:
    """Saturation times `exp(log_saturation)`, hue turned by an angle, of images (B, 3, *S); grey ones stay."""
    to = torch.tensor(_TO_YIQ, dtype=image.dtype, device=image.device)
    turn, scale = torch.deg2rad(hue_deg), log_saturation.exp()
    zero, one = torch.zeros_like(turn), torch.ones_like(turn)
    cos, sin = scale * turn.cos(), scale * turn.sin()
    colours = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], 1).reshape(-1, 3, 3).to(image.dtype)
    return torch.einsum("bij,bj...->bi...", torch.linalg.inv(to) @ colours @ to, image)


def _wide(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))
