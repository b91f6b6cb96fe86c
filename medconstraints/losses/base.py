"""What every loss shares: turning a network's output into probabilities, and the checks of that step."""

from __future__ import annotations

import math

import torch
from monai.utils import LossReduction
from torch import Tensor
from torch.nn.modules.loss import _Loss

from medconstraints.statistics.arguments import plain

__all__ = ["ProbabilityLoss", "plain"]


class ProbabilityLoss(_Loss):
    """Base of losses on class probabilities; MONAI's argument names.

    Args:
        sigmoid: apply a sigmoid to the input.
        softmax: apply a softmax over the channels of the input.
        logit_scale: factor of the input before the activation; above 1 it sharpens the probabilities.
        reduction: "mean", "sum" or "none".

    Raises:
        ValueError: both activations are asked for, a scale that is not positive or has no activation to act on, or an
            unknown reduction.
    """

    def __init__(
        self, *, sigmoid: bool = False, softmax: bool = False, logit_scale: float = 1.0, reduction: str = "mean"
    ) -> None:
        super().__init__(reduction=LossReduction(reduction).value)
        if sigmoid and softmax:
            raise ValueError("sigmoid, softmax: expected at most one of them to be True, got both; choose one.")
        if not (math.isfinite(logit_scale) and logit_scale > 0) or (logit_scale != 1 and not (sigmoid or softmax)):
            raise ValueError(
                f"logit_scale: expected a number > 0, and 1 without sigmoid or softmax, got {logit_scale!r}."
            )
        self.logit_scale = float(logit_scale)
        self.sigmoid = sigmoid
        self.softmax = softmax

    def probabilities(self, input: Tensor) -> Tensor:
        """Activated input, at least float32: half precision overflows in sums over volumes."""
        input = plain(input)
        if not input.is_floating_point() or input.dim() not in (4, 5):
            raise ValueError(
                f"input: expected a floating point tensor (B, C, H, W) or (B, C, H, W, D), got {input.dtype} of shape "
                f"{tuple(input.shape)}; add the batch and channel axes."
            )
        if self.softmax and input.shape[1] == 1:
            raise ValueError("input: softmax of a single channel is always 1; use sigmoid=True or two channels.")
        if input.dtype in (torch.float16, torch.bfloat16):
            input = input.float()
        if self.logit_scale != 1:
            input = input * self.logit_scale
        if self.softmax:
            return torch.softmax(input, dim=1)
        return torch.sigmoid(input) if self.sigmoid else input
