"""The energy of a dense CRF as a loss: neighbours that look alike should belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from medconstraints import checks
from medconstraints.checks import plain
from medconstraints.crf.mean_field import bilateral_features, bilateral_kernel
from medconstraints.losses.base import Probabilities, ProbabilityLoss, one_entry

__all__ = ["DenseCRFLoss"]


class DenseCRFLoss(ProbabilityLoss):
    """Relaxed energy of a dense CRF, sum_k s_k^T W (1 - s_k) / N, beside the cross-entropy of partial labels.

    Tang et al. 2018, "On regularized losses for weakly-supervised CNN segmentation", eq. 4.
    W is a Gaussian of place and intensity with symmetric normalisation, so that the loss is between 0 and about 1,
    whatever the number of voxels and the width of the kernel.

    Args:
        sigma: width in voxels, or mm with `spacing_mm`.
        intensity_sigma: as a share of the range of each channel of each image.
        spacing_mm: one value for each axis, of all images.
        downsample: means of as many voxels along each axis are what the loss looks at, as in the paper.
        sigmoid: see `ProbabilityLoss`, as for the next two.
        softmax: see there.
        reduction: see there; "none" is the loss of each image.

    Raises:
        ValueError: a width is not above 0.

    Example:
        >>> image = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(1, 1, 4, 4)
        >>> along = torch.stack([1 - image[:, 0], image[:, 0]], 1)
        >>> loss = DenseCRFLoss(sigma=2)
        >>> loss(along, image) < 0.1 < loss(along.transpose(2, 3), image)
        tensor(True)
    """

    target_keys = ("image",)

    def __init__(
        self,
        *,
        sigma: float = 10.0,
        intensity_sigma: float = 15 / 255,
        spacing_mm: Sequence[float] | None = None,
        downsample: int = 2,
        sigmoid: bool = False,
        softmax: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__(include_background=True, sigmoid=sigmoid, softmax=softmax, reduction=reduction)
        self.sigma = checks.number("sigma", sigma, above=0)
        self.intensity_sigma = checks.number("intensity_sigma", intensity_sigma, above=0)
        self.spacing_mm = spacing_mm
        self.downsample = checks.whole_number("downsample", downsample, 1)

    def forward(
        self, input: Tensor, target: Tensor | Mapping[str, Any], *, probabilities: Probabilities | None = None
    ) -> Tensor:
        """Loss of a batch.

        Args:
            input: (B, C, *S), D = 2 or 3: probabilities, or logits with `softmax` or `sigmoid`.
            target: the images (B, M, *S), or a mapping with "image".
            probabilities: of the input, when other losses need them too.

        Raises:
            ValueError: the shapes do not fit.
        """
        probs = (self.probabilities(input) if probabilities is None else probabilities).all()
        image = plain(one_entry(target, "image"))
        if image.shape[2:] != probs.shape[2:] or len(image) != len(probs):
            raise ValueError(f"target: expected images of {tuple(probs.shape[2:])}, got {tuple(image.shape)}.")
        with torch.autocast(probs.device.type, enabled=False):
            if self.downsample > 1:
                pool = F.avg_pool2d if probs.dim() == 4 else F.avg_pool3d
                sizes = [min(self.downsample, size) for size in probs.shape[2:]]
                # The last voxels along an axis make a mean of fewer.
                pooled = [pool(one, sizes, ceil_mode=True, count_include_pad=False) for one in (probs, image.float())]
                probs, image = pooled
            return self.reduced(
                torch.stack([self._energy(one, picture) for one, picture in zip(probs, image, strict=True)])
            )

    def _energy(self, probs: Tensor, image: Tensor) -> Tensor:
        features = bilateral_features(
            image,
            sigma=self.sigma / self.downsample,
            intensity_sigma=self.intensity_sigma,
            spacing_mm=self.spacing_mm,
        )
        kernel, values = bilateral_kernel(features), probs.flatten(1).T
        beside = kernel(torch.ones_like(values[:, :1])) - kernel(values)
        return (values * beside).sum() / len(values)
