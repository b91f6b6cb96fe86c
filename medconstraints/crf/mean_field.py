"""Mean field inference in a fully connected random field: labels that agree where the image looks alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from medconstraints import checks
from medconstraints.crf.lattice import PermutohedralLattice

__all__ = [
    "NormalizedKernel",
    "bilateral_features",
    "bilateral_kernel",
    "dense_crf",
    "spatial_features",
    "spatial_kernel",
]

_LEAST_PROBABILITY = 1e-5


def spatial_features(shape: Sequence[int], spacing_mm: Sequence[float] | None = None) -> Tensor:
    """Coordinates of all voxels, (N, D): voxels, or mm with a spacing.

    Example:
        >>> spatial_features((1, 3), (1.0, 2.0)).tolist()
        [[0.0, 0.0], [0.0, 2.0], [0.0, 4.0]]
    """
    spacing = checks.spacing(spacing_mm, len(shape))
    axes = [torch.arange(size, dtype=torch.float32) * step for size, step in zip(shape, spacing, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def bilateral_features(
    image: Tensor, *, sigma: float, intensity_sigma: float, spacing_mm: Sequence[float] | None = None
) -> Tensor:
    """Place and intensity of all voxels in units of two widths, (N, D + M).

    Args:
        image: (M, *S).
        sigma: of the place, in voxels, or mm with a spacing.
        intensity_sigma: as a share of the range of each channel; a constant channel tells nothing and has no part.
        spacing_mm: see `spatial_features`.

    Raises:
        ValueError: a width is not above 0, or an intensity is not finite.
    """
    places = spatial_features(image.shape[1:], spacing_mm).to(image.device) / checks.number("sigma", sigma, above=0)
    flat = checks.plain(image).float().flatten(1)
    if not bool(torch.isfinite(flat).all()):
        raise ValueError("image: expected finite intensities, got NaN or infinity.")
    spread = flat.amax(1) - flat.amin(1)
    varied = spread > 0
    tones = (flat - flat.amin(1, keepdim=True))[varied] / spread[varied, None]
    return torch.cat([places, tones.T / checks.number("intensity_sigma", intensity_sigma, above=0)], 1)


class NormalizedKernel:
    """A kernel K with symmetric normalisation, D^-1/2 K D^-1/2, D the sums of its rows.

    Args:
        apply: values (N, C) to K times the values, such as `PermutohedralLattice.filter`.
        count: N.
        device: of the values.
    """

    def __init__(self, apply: Callable[[Tensor], Tensor], count: int, device: str | torch.device | None = None) -> None:
        self.apply = apply
        self.root = (apply(torch.ones(count, 1, device=device)) + 1e-20).rsqrt()

    def __call__(self, values: Tensor) -> Tensor:
        """Filtered values (N, C)."""
        return self.root * self.apply(self.root * values)


def bilateral_kernel(features: Tensor) -> NormalizedKernel:
    """The kernel of `bilateral_features`, by a lattice."""
    return NormalizedKernel(PermutohedralLattice(features).filter, len(features), features.device)


def spatial_kernel(
    shape: Sequence[int],
    sigma: float,
    spacing_mm: Sequence[float] | None = None,
    device: str | torch.device | None = None,
) -> NormalizedKernel:
    """The kernel of distance alone: exact, one axis after the other, cut off at five standard deviations."""
    spacing = checks.spacing(spacing_mm, len(shape))
    taps = []
    for size, step in zip(shape, spacing, strict=True):
        reach = min(size - 1, math.ceil(5 * sigma / step))
        taps.append(torch.exp(-0.5 * (torch.arange(-reach, reach + 1) * step / sigma).square()))

    def blur(values: Tensor) -> Tensor:
        maps = values.T.reshape(-1, 1, *shape)
        convolve = F.conv2d if len(shape) == 2 else F.conv3d
        for axis, weights in enumerate(taps):
            size = [1] * len(shape)
            size[axis] = len(weights)
            maps = convolve(maps, weights.to(maps).view(1, 1, *size), padding=[length // 2 for length in size])
        return maps.flatten(1).T

    return NormalizedKernel(blur, math.prod(shape), device)


def dense_crf(
    probabilities: Tensor,
    image: Tensor,
    *,
    iterations: int = 5,
    spatial_sigma: float = 1.0,
    spatial_weight: float = 3.0,
    sigma: float = 10.0,
    intensity_sigma: float = 20 / 255,
    weight: float = 10.0,
    spacing_mm: Sequence[float] | None = None,
) -> Tensor:
    """Probabilities after mean field inference in a dense CRF (Kraehenbuehl and Koltun 2011, algorithm 1).

    Energy: -log p of each voxel, and for each pair of voxels with different labels two Gaussian kernels: one of their
    distance, one of distance and difference of intensity. The defaults are those of DeepCut in the thesis. The same
    answer as pydensecrf's with its symmetric normalisation.

    Args:
        probabilities: (B, C, *S), D = 2 or 3; differentiable.
        image: (B, M, *S).
        iterations: of the mean field, 0 for none.
        spatial_sigma: width of the first kernel in voxels, or mm with a spacing.
        spatial_weight: of the first kernel; 0 leaves it out.
        sigma: width of the second kernel.
        intensity_sigma: as a share of the range of each channel of each image, see `bilateral_features`.
        weight: of the second kernel; 0 leaves it out.
        spacing_mm: one value for each axis.

    Returns:
        (B, C, *S), float32.

    Raises:
        ValueError: the shapes do not fit, a width or a spacing is not above 0, or a value is not finite.

    Example:
        >>> image = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]).expand(1, 1, 6, 6)
        >>> guess = torch.full((1, 2, 6, 6), 0.5)
        >>> guess[0, :, 2, 1], guess[0, :, 2, 4] = torch.tensor([0.9, 0.1]), torch.tensor([0.1, 0.9])
        >>> dense_crf(guess, image)[0].argmax(0)[0].tolist()
        [0, 0, 0, 1, 1, 1]
    """
    probabilities, image = checks.plain(probabilities), checks.plain(image)
    if probabilities.dim() not in (4, 5) or len(image) != len(probabilities):
        raise ValueError(
            f"probabilities, image: expected (B, C, *S) and (B, M, *S), got {tuple(probabilities.shape)} and "
            f"{tuple(image.shape)}."
        )
    if probabilities.shape[2:] != image.shape[2:]:
        raise ValueError(
            f"image: expected the shape {tuple(probabilities.shape[2:])} of the probabilities, got "
            f"{tuple(image.shape[2:])}."
        )
    if not bool(torch.isfinite(probabilities).all()):
        raise ValueError("probabilities: expected finite values, got NaN or infinity.")
    checks.whole_number("iterations", iterations, 0)
    near = checks.number("spatial_sigma", spatial_sigma, above=0)
    kernels: list[tuple[float, NormalizedKernel]] = []
    if checks.number("spatial_weight", spatial_weight, least=0):  # one kernel for all images
        kernels.append((spatial_weight, spatial_kernel(image.shape[2:], near, spacing_mm, image.device)))
    checks.number("weight", weight, least=0)
    found = []
    with torch.autocast(image.device.type, enabled=False):  # half precision would round the features
        for one, picture in zip(probabilities, image, strict=True):
            own = list(kernels)
            if weight:
                features = bilateral_features(
                    picture, sigma=sigma, intensity_sigma=intensity_sigma, spacing_mm=spacing_mm
                )
                own.append((weight, bilateral_kernel(features)))
            found.append(_mean_field(one.float().flatten(1).T, own, iterations).T.reshape(one.shape))
    return torch.stack(found) if found else probabilities.float()


def _mean_field(probabilities: Tensor, kernels: Sequence[tuple[float, NormalizedKernel]], iterations: int) -> Tensor:
    """Probabilities (N, C)."""
    evidence = probabilities.clamp(min=_LEAST_PROBABILITY).log()
    beliefs = evidence.softmax(1)
    for _ in range(iterations):
        message = evidence
        for weight, kernel in kernels:
            message = message + weight * kernel(beliefs)
        beliefs = message.softmax(1)
    return beliefs
