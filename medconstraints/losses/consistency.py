"""How far a network's probabilities are from those of its teacher."""

from __future__ import annotations

from torch import Tensor

from medconstraints.checks import plain
from medconstraints.losses.base import Probabilities, ProbabilityLoss

__all__ = ["ConsistencyLoss"]


class ConsistencyLoss(ProbabilityLoss):
    """Mean squared difference of probabilities (Tarvainen and Valpola 2017, "Mean teachers", eq. 1).

    Args: those of `ProbabilityLoss`; the background counts.

    Example:
        >>> import torch
        >>> ConsistencyLoss()(torch.ones(1, 2, 4, 4), torch.zeros(1, 2, 4, 4)).item()
        1.0
    """

    target_keys = ("teacher",)

    def __init__(self, *, sigmoid: bool = False, softmax: bool = False, reduction: str = "mean") -> None:
        super().__init__(include_background=True, sigmoid=sigmoid, softmax=softmax, reduction=reduction)

    def forward(self, input: Tensor, target: Tensor, *, probabilities: Probabilities | None = None) -> Tensor:
        """Loss of a batch.

        Args:
            input: (B, C, *S): probabilities, or logits with `softmax` or `sigmoid`.
            target: the teacher's probabilities, (B, C, *S).
            probabilities: of the input, when other losses need them too.

        Raises:
            ValueError: the shapes differ.
        """
        found = (self.probabilities(input) if probabilities is None else probabilities).all()
        target = plain(target)
        if target.shape != found.shape:
            raise ValueError(f"target: expected {tuple(found.shape)}, as the input, got {tuple(target.shape)}.")
        return self.reduced((found - target.to(found)).square())
