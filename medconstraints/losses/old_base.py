"""What every loss shares: turning a network's output into probabilities, and the checks of that step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from medconstraints.checks import plain
from medconstraints.losses.base import TargetLoss

__all__ = ["ProbabilityLoss", "plain", "shared_softmax", "softmax_is_shared"]

# Softmax of one tensor by its scale, while several losses are computed on that tensor.
_SHARED: ContextVar[tuple[Tensor, dict[float, Tensor]] | None] = ContextVar("shared_softmax", default=None)


@contextmanager
def shared_softmax(input: Tensor) -> Iterator[None]:
    """Within it, losses with `softmax=True` compute the softmax of this very tensor once for all of them."""
    token = _SHARED.set((input, {}))
    try:
        yield
    finally:
        _SHARED.reset(token)


def softmax_is_shared(input: Tensor) -> bool:
    """Whether other losses may need the softmax of this tensor too."""
    shared = _SHARED.get()
    return shared is not None and shared[0] is input


class ProbabilityLoss(TargetLoss):
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

    # Until each of them says it itself.
    def __init_subclass__(cls) -> None:
        if cls.__name__ == "BoxPriorLoss":
            cls.target_keys = ("boxes",)

    def __init__(
        self, *, sigmoid: bool = False, softmax: bool = False, logit_scale: float = 1.0, reduction: str = "mean"
    ) -> None:
        super().__init__(reduction=reduction)
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
        given = input = plain(input)
        if not input.is_floating_point() or input.dim() not in (4, 5):
            raise ValueError(
                f"input: expected a floating point tensor (B, C, H, W) or (B, C, H, W, D), got {input.dtype} of shape "
                f"{tuple(input.shape)}; add the batch and channel axes."
            )
        if self.softmax and input.shape[1] == 1:
            raise ValueError("input: softmax of a single channel is always 1; use sigmoid=True or two channels.")
        if input.dtype in (torch.float16, torch.bfloat16):
            input = input.float()
        if self.softmax:
            shared = _SHARED.get()
            if shared is None or shared[0] is not given:
                return torch.softmax(self._scaled(input), dim=1)
            if self.logit_scale not in shared[1]:
                shared[1][self.logit_scale] = torch.softmax(self._scaled(input), dim=1)
            return shared[1][self.logit_scale]
        return torch.sigmoid(self._scaled(input)) if self.sigmoid else input

    def _scaled(self, input: Tensor) -> Tensor:
        return input if self.logit_scale == 1 else input * self.logit_scale
