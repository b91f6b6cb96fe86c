"""How far regressed statistics are from those of the segmentations, alone or as a likelihood that asks for a spread."""

from __future__ import annotations

import torch
from torch import Tensor

from medconstraints import checks
from medconstraints.checks import plain
from medconstraints.losses.base import TargetLoss

__all__ = ["RegressionLoss"]


class RegressionLoss(TargetLoss):
    """Squared error of regressed values (Kervadec 2020, eq. 5.2), or their Gaussian likelihood.

    The likelihood is weighted by the variance to the power `beta` (Seitzer et al. 2022, "On the pitfalls of
    heteroscedastic uncertainty estimation", eq. 5), without which images that are hard at first are given up.

    Args:
        spread: learn the spread of the values too; False is the plain squared error.
        beta: 0 for the likelihood itself, 1 to fit the values as the squared error does.

    Raises:
        ValueError: `beta` is not from 0 to 1.

    Example:
        >>> output = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]])  # two values, and the logarithm of their variance
        >>> RegressionLoss(spread=False)(output, torch.tensor([[0.0, torch.nan]])).item()
        1.0
    """

    target_keys = ("statistics",)

    def __init__(self, *, spread: bool = True, beta: float = 0.5) -> None:
        super().__init__()
        self.spread = checks.flag("spread", spread)
        self.beta = checks.number("beta", beta, least=0)
        if self.beta > 1:
            raise ValueError(f"beta: expected 0 to 1, got {beta!r}.")

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Mean over the values that are known.

        Args:
            input: (B, K, 2), values and logarithm of their variance.
            target: (B, K), NaN where a value is not known.

        Raises:
            ValueError: the shapes do not fit.
        """
        input, target = plain(input), plain(target)
        if input.shape != (*target.shape, 2):
            raise ValueError(f"input: expected {(*target.shape, 2)}, got {tuple(input.shape)}.")
        with torch.autocast(input.device.type, enabled=False):
            value, log_variance = input.float().unbind(-1)
            known = ~target.isnan()
            cost = (value - target.nan_to_num()).square()
            if self.spread:
                cost = 0.5 * (log_variance + cost / log_variance.exp()) * log_variance.detach().exp().pow(self.beta)
            return cost.where(known, 0.0).sum() / known.sum().clamp(min=1)
