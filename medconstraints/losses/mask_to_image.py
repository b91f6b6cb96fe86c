"""Losses of a GAN that makes images of masks: adversarial, and a smooth distance to the real image."""

from __future__ import annotations

import torch
from monai.losses import PatchAdversarialLoss
from torch import Tensor, nn

from medconstraints import checks

__all__ = ["CharbonnierLoss", "MaskToImageLoss"]


class CharbonnierLoss(nn.Module):
    """Mean of `sqrt((a - b)^2 + delta^2) - delta`: the absolute difference without its kink (Charbonnier et al. 1994).

    A hypergradient through a step on the absolute difference is wrong, because its curvature at 0, all it has, is left
    out by automatic differentiation; here it is there.

    Args:
        delta: differences much larger than it count linearly; in units of the intensities.
    """

    def __init__(self, delta: float = 0.05) -> None:
        super().__init__()
        self.delta = checks.number("delta", delta, above=0)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Tensors of one shape -> scalar."""
        return (torch.sqrt((input - target) ** 2 + self.delta**2) - self.delta).mean()


class MaskToImageLoss(nn.Module):
    """The two losses of pix2pix (Isola et al. 2017, eq. 4): of its generator and of its discriminator.

    Args:
        adversarial: `(scores, is_real, for_discriminator) -> scalar`; None is MONAI's least squares without its leaky
            rectifier, which has a kink.
        reconstruction: `(image, real) -> scalar`; None is `CharbonnierLoss`.
        reconstruction_weight: of the latter against the former.
    """

    def __init__(
        self,
        adversarial: nn.Module | None = None,
        reconstruction: nn.Module | None = None,
        *,
        reconstruction_weight: float = 100.0,
    ) -> None:
        super().__init__()
        default = PatchAdversarialLoss(criterion="least_squares", no_activation_leastsq=True)
        self.adversarial = default if adversarial is None else adversarial
        self.reconstruction = CharbonnierLoss() if reconstruction is None else reconstruction
        self.reconstruction_weight = checks.number("reconstruction_weight", reconstruction_weight, least=0)

    def generator(self, scores: Tensor, made: Tensor, real: Tensor) -> Tensor:
        """Loss of the generator: scores of its images, the images (B, C, *S), and the real ones of their masks."""
        distance = self.reconstruction(made, real)
        fooled: Tensor = self.adversarial(scores, True, for_discriminator=False)
        return fooled + self.reconstruction_weight * distance

    def discriminator(self, scores_of_real: Tensor, scores_of_made: Tensor) -> Tensor:
        """Loss of the discriminator: mean of both kinds."""
        real: Tensor = self.adversarial(scores_of_real, True, for_discriminator=True)
        made: Tensor = self.adversarial(scores_of_made, False, for_discriminator=True)
        return (real + made) / 2
