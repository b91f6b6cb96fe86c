"""What every formulation promises: the protocol that losses and handlers rely on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Formulation"]


class Formulation(nn.Module, ABC):
    """Residual (`<= 0` when satisfied) to cost, elementwise; state that a checkpoint must keep is in buffers.

    Buffers stay at least float32, also under `half()`: a multiplier or a slope ends neither at 65504 nor at 3 digits.

    Attributes:
        needs_index: whether `forward` and `dual` need the samples' numbers in the data set.
        has_multipliers: whether it learns a multiplier of each constraint from the residuals it sees in training.
    """

    needs_index: bool = False
    has_multipliers: bool = False

    @abstractmethod
    def forward(self, residual: Tensor, index: Tensor | None = None) -> Tensor:
        """Cost of each residual.

        Args:
            residual: (B, ...), the constraints of each sample.
            index: number of each sample in the data set, (B,); only read with `needs_index`.

        Returns:
            The same shape, at least float32.
        """

    @abstractmethod
    def dual(self, residual: Tensor, index: Tensor | None = None) -> Tensor:
        """Multiplier of each constraint, explicit or implicit: the slope of its cost; same shape, no gradient."""

    def _apply(self, fn: Callable[[Tensor], Tensor], *arguments: Any, **options: Any) -> Formulation:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, *arguments, **options)
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, before[name].to(buffer.device))
        return self

    def step(self) -> None:
        """Move on after an epoch: raise a barrier, take a dual step. Nothing, unless a subclass says otherwise."""

    def forget(self) -> None:
        """Forget the residuals seen since the last step; only those with multipliers remember any."""

    def report(self) -> dict[str, Tensor]:
        """State worth a line in the log, 0-dim tensors by name, such as "t"."""
        return {}


def at_least_float32(residual: Tensor) -> Tensor:
    """Half precision raised to float32: squares and large slopes overflow in it."""
    return residual.float() if residual.dtype in (torch.float16, torch.bfloat16) else residual
