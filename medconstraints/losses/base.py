"""What every loss shares: the entries of the batch it reads, activation, choice of classes and reduction."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from monai.utils import LossReduction
from torch import Tensor
from torch.nn.modules.loss import _Loss

from medconstraints.checks import flag, plain
from medconstraints.formulations.base import Formulation, at_least_float32
from medconstraints.statistics.arguments import select_channels

__all__ = ["ConstrainedLoss", "Probabilities", "ProbabilityLoss", "Residuals", "TargetLoss"]

_ROUNDED = 0.01  # a probability of half precision, or one that was interpolated, may be a little outside 0..1


class TargetLoss(_Loss):
    """Base of the losses: which entries of a batch make its target.

    A loss of one entry takes its tensor as target, or a mapping that has it; a loss of several takes the mapping.
    `CombinedLoss`, `PrepareBatchTargets` and a bundle's selection of items read these attributes, so that no config
    repeats them.

    Attributes:
        target_keys: entries that must be there, the main one first.
        optional_keys: entries that are used if they are there.
        named_keys: entries that are used only if `CombinedLoss(keys=...)` names them, or a mapping has them.
        host_keys: those of all that stay on the CPU, where their values are checked without a wait for a device.
        reads_meta: whether a target keeps its meta data (affine).
    """

    target_keys: tuple[str, ...] = ("label",)
    optional_keys: tuple[str, ...] = ()
    named_keys: tuple[str, ...] = ()
    host_keys: frozenset[str] = frozenset()
    reads_meta: bool = False

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__(reduction=LossReduction(reduction).value)

    def terms(self) -> dict[str, Tensor]:
        """Parts of the last forward pass worth a line in the log, 0-dim tensors on its device by name."""
        return {}

    def left_out(self) -> None:
        """Called in place of the loss in a batch that it has no part in: what it remembers of the last one is gone."""

    def reduced(self, cost: Tensor) -> Tensor:
        """Mean, sum, or the cost itself for "none"."""
        if self.reduction == "none":
            return cost
        return cost.mean() if self.reduction == "mean" else cost.sum()


class Probabilities:
    """Activated output of a network, at least float32: made when first asked for, once for all losses that share it.

    Args:
        input: output of the network (B, C, *S).
        activation: "softmax", "sigmoid", a function that keeps the shape, or None for an input of probabilities.
        scale: factor of the input before the activation.
    """

    def __init__(self, input: Tensor, activation: str | Callable[[Tensor], Tensor] | None, scale: float = 1.0) -> None:
        self._input = at_least_float32(input)  # half precision overflows in sums over volumes
        self._activation = activation
        self._scale = scale
        self._all: Tensor | None = None
        self._chosen: dict[tuple[int, ...], Tensor] = {}

    def all(self) -> Tensor:
        """(B, C, *S)."""
        if self._all is None:
            self._all = self._activated(self._input)
        return self._all

    def channels(self, numbers: Sequence[int]) -> Tensor:
        """(B, K, *S): the channels of these numbers; a view where they follow each other and all are known."""
        key = tuple(numbers)
        if self._all is not None or key == tuple(range(self._input.shape[1])):
            return select_channels(self.all(), key)
        if key not in self._chosen:
            self._chosen[key] = self._some(key)
        return self._chosen[key]

    def covering(self, numbers: Sequence[int]) -> tuple[Tensor, Sequence[int]]:
        """Channels with these among them, and where they are: for statistics of each channel.

        These alone where that halves the work of the activation, else all: the gradient of a slice costs more than a
        sum over a channel that does not count.
        """
        if self._all is None and self._is_one_of_two(numbers):
            return self.channels(numbers), (0,)
        return self.all(), numbers

    def _is_one_of_two(self, numbers: Sequence[int]) -> bool:
        return self._activation == "softmax" and self._input.shape[1] == 2 and len(numbers) == 1

    def _some(self, numbers: tuple[int, ...]) -> Tensor:
        if self._is_one_of_two(numbers):
            # The softmax of two channels is a sigmoid of their difference, at half the work and memory. The gradient of
            # a split is one copy, that of two slices would be several.
            channels, (one,) = self._input.split(1, 1), numbers
            return torch.sigmoid(self._scaled(channels[one] - channels[1 - one]))
        if self._activation is None or self._activation == "sigmoid":
            return self._activated(select_channels(self._input, numbers))
        return select_channels(self.all(), numbers)  # a softmax or a function mixes channels

    def _activated(self, input: Tensor) -> Tensor:
        if self._activation is None:
            return input
        if self._activation == "softmax":
            return torch.softmax(self._scaled(input), dim=1)
        if self._activation == "sigmoid":
            return torch.sigmoid(self._scaled(input))
        activated = plain(self._activation(input))  # type: ignore[operator]
        if activated.shape != input.shape:
            raise ValueError(
                f"other_act: expected a function that keeps the shape, got {tuple(activated.shape)} for "
                f"{tuple(input.shape)}."
            )
        return activated

    def _scaled(self, input: Tensor) -> Tensor:
        return input if self._scale == 1 else input * self._scale


class ProbabilityLoss(TargetLoss):
    """Base of losses on class probabilities; MONAI's argument names.

    Args:
        include_background: whether channel 0 counts. A single channel, a foreground, always does.
        classes: channels that count, in this order; None for all, less the background.
        sigmoid: apply a sigmoid to the input.
        softmax: apply a softmax over the channels of the input.
        other_act: another activation, a function of the input that keeps its shape.
        logit_scale: factor of the input before sigmoid or softmax; above 1 it sharpens the probabilities.
        reduction: "mean", "sum" or "none".

    Raises:
        TypeError: `other_act` cannot be called, or a flag is neither True nor False.
        ValueError: more than one activation, a scale that is not positive or has no activation to act on, classes that
            are no different channel numbers, or an unknown reduction.
    """

    def __init__(
        self,
        *,
        include_background: bool = False,
        classes: Sequence[int] | None = None,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        logit_scale: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        if other_act is not None and not callable(other_act):
            raise TypeError(
                f"other_act: expected None or a function such as torch.tanh, got {type(other_act).__name__}."
            )
        self.include_background = flag("include_background", include_background)
        self.sigmoid = flag("sigmoid", sigmoid)
        self.softmax = flag("softmax", softmax)
        if sigmoid + softmax + (other_act is not None) > 1:
            raise ValueError("sigmoid, softmax, other_act: expected at most one activation, got several; choose one.")
        if not (math.isfinite(logit_scale) and logit_scale > 0) or (logit_scale != 1 and not (sigmoid or softmax)):
            raise ValueError(
                f"logit_scale: expected a number > 0, and 1 without sigmoid or softmax, got {logit_scale!r}."
            )
        if classes is not None and (
            not len(classes) or len(set(classes)) < len(classes) or any(int(n) != n or n < 0 for n in classes)
        ):
            raise ValueError(f"classes: expected different channel numbers >= 0, got {classes!r}.")
        self.classes = None if classes is None else [int(number) for number in classes]
        self.other_act = other_act
        self.logit_scale = float(logit_scale)
        self._looked = self.activation[0] is not None  # at the range of an input that gets no activation

    @property
    def activation(self) -> tuple[str | Callable[[Tensor], Tensor] | None, float]:
        """The activation and its scale: losses for which both are equal can share their probabilities."""
        name = "softmax" if self.softmax else "sigmoid" if self.sigmoid else self.other_act
        return name, self.logit_scale

    def probabilities(self, input: Tensor) -> Probabilities:
        """Of an output of the network, with or without MONAI's meta data.

        Raises:
            ValueError: the input is no floating point (B, C, *S) with D = 2 or 3, or a softmax of a single channel; or,
                looked at in the first batch, values outside 0..1 that get no activation.
        """
        input = plain(input)
        if not input.is_floating_point() or input.dim() not in (4, 5):
            raise ValueError(
                f"input: expected a floating point tensor (B, C, H, W) or (B, C, H, W, D), got {input.dtype} of shape "
                f"{tuple(input.shape)}; add the batch and channel axes."
            )
        if self.softmax and input.shape[1] == 1:
            raise ValueError("input: softmax of a single channel is always 1; use sigmoid=True or two channels.")
        if not (self._looked or torch.compiler.is_compiling()) and input.numel():
            low, high = (float(value) for value in torch.aminmax(input.detach()))
            # NaN is for those to find who stop a run.
            if low < -_ROUNDED or high > 1 + _ROUNDED:
                raise ValueError(
                    f"input: expected probabilities, 0 to 1, as no activation is asked for, got {low:.4g} to "
                    f"{high:.4g}; for logits give softmax=True, or sigmoid=True."
                )
            self._looked = True
        return Probabilities(input, *self.activation)

    def channel_numbers(self, count: int) -> list[int]:
        """Channels that count, of an input with `count` of them.

        Raises:
            ValueError: `classes` names a channel that does not exist.
        """
        if self.classes is None:
            # A network with one channel has no background channel to leave out.
            return list(range(0 if self.include_background or count == 1 else 1, count))
        if max(self.classes) >= count:
            raise ValueError(
                f"classes: expected channel numbers below {count}, the channels of input, got {self.classes}."
            )
        return self.classes


class Residuals(NamedTuple):
    """The constraints of a batch.

    Attributes:
        residual: lower - f and f - upper in the unit of the loss, <= 0 when satisfied; axis 0 counts the samples.
        free: bool, of the same shape, where a bound is infinite; the residual is 0 there.
        index: numbers of the samples in the data set, (B,), or None.
    """

    residual: Tensor
    free: Tensor
    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index, which nobody needs here


class ConstrainedLoss(ProbabilityLoss, ABC):
    """Base of losses whose cost is a formulation of constraints: what handlers measure and log.

    Attributes:
        formulation: turns residuals into the cost.
        per_class: whether the rows of a residual are classes, `classes` or all less the background; else relations.
        last: constraints of the last forward pass, detached; None if the loss had no part in the last batch.
    """

    formulation: Formulation
    per_class: bool = True
    last: Residuals | None = None

    @abstractmethod
    def residual(
        self, input: Tensor, target: Tensor | Mapping[str, Any], *, probabilities: Probabilities | None = None
    ) -> Residuals:
        """Constraints of a batch alone, with the gradient; nothing observes them. Arguments as for `forward`."""

    def constraint_names(self, shape: Sequence[int], class_names: Mapping[int, str]) -> list[str]:
        """Names of the constraints of one sample, in the order of the elements of a residual (B, *shape): for logs.

        Args:
            shape: of the residuals of one sample.
            class_names: class number -> what it is called; a class without a name is called by its number.
        """
        return [str(number) for number in range(math.prod(shape))]

    def left_out(self) -> None:
        """No constraint was computed in this batch."""
        self.last = None


def one_entry(target: Tensor | Mapping[str, Tensor], key: str) -> Tensor:
    """The tensor of a loss that reads one entry: the target itself, or that entry of a mapping.

    Raises:
        ValueError: the mapping has no such tensor.
    """
    if isinstance(target, Tensor):
        return target
    if not isinstance(target, Mapping) or not isinstance(target.get(key), Tensor):
        got = sorted(map(str, target)) if isinstance(target, Mapping) else type(target).__name__
        raise ValueError(f'target: expected a tensor, or a mapping with the tensor "{key}", got {got}.')
    return target[key]
