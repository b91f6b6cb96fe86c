"""Any statistic of the prediction, kept within bounds by any formulation."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medconstraints import checks
from medconstraints.checks import plain
from medconstraints.formulations.base import Formulation
from medconstraints.losses.base import ConstrainedLoss, Probabilities, Residuals
from medconstraints.statistics.arguments import arguments_of, is_relation, select_channels

__all__ = ["ConstraintLoss"]


class ConstraintLoss(ConstrainedLoss):
    """Cost of the inequalities lower <= f(s) <= upper (Kervadec 2020, eq. 2.2, 3.1 and 3.8).

    The residuals z = (lower - f) / unit and (f - upper) / unit, <= 0 when satisfied, go through the formulation; the
    costs of both sides are added. An infinite bound is free, lower = upper is an equality.

    Args:
        statistic: function `probs (B, C, *S) -> (B, C, M)` of each class by itself, such as
            `medconstraints.statistics.soft_size`, that is asked for all classes or only those that count; or one that
            was declared a `relation` between classes, from all channels to (B, R, M). In a config:
            `{"_target_": "medconstraints.statistics.soft_size", "_mode_": "callable"}`, where more keys set its
            arguments. Its other arguments are entries of the target: those without a default must be there, the
            others are taken when they are named.
        formulation: residual -> cost, such as `LogBarrierExtension()` or `QuadraticPenalty()`. One with multipliers
            belongs to this loss alone.
        classes: channels that are constrained; None for all but the background. Relations choose their own.
        include_background: constrain channel 0 too.
        sigmoid: apply a sigmoid to the input.
        softmax: apply a softmax over the channels of the input.
        logit_scale: factor of the input before the activation; the thesis's "softmax temperature 5" is 5.
        unit: size of a residual that counts as 1, one number or one for each component: 1000 voxels for a size, say.
            It decides how a formulation that is not homogeneous, as the log-barrier, sees the constraint.
        normalization: "image_size" divides the cost by the number of voxels of one sample (the thesis, for sizes in
            voxels), "none" does not.
        reduction: "mean" over samples, classes and components, "sum", or "none" for (B, C', M). Slices of one volume,
            for a statistic of whole volumes, are one sample in a mean or sum.

    Raises:
        TypeError: the statistic cannot be called, or `formulation` is none.
        ValueError: an argument is outside its range.

    Example:
        >>> from medconstraints.formulations import QuadraticPenalty
        >>> from medconstraints.statistics import soft_size
        >>> loss = ConstraintLoss(soft_size, QuadraticPenalty(), normalization="none")
        >>> bounds = torch.tensor([[[[-torch.inf, torch.inf]], [[10.0, 12.0]]]])  # class 1: 10 to 12 voxels
        >>> loss(torch.full((1, 2, 4, 4), 0.5), bounds).item()                     # it has 8
        4.0
    """

    host_keys = frozenset({"bounds", "index", "volume"})

    def __init__(
        self,
        statistic: Callable[..., Tensor],
        formulation: Formulation,
        *,
        classes: Sequence[int] | None = None,
        include_background: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        logit_scale: float = 1.0,
        unit: float | Sequence[float] = 1.0,
        normalization: str = "image_size",
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            include_background=include_background,
            classes=classes,
            sigmoid=sigmoid,
            softmax=softmax,
            logit_scale=logit_scale,
            reduction=reduction,
        )
        if not callable(statistic):
            raise TypeError(f"statistic: expected a function such as soft_size, got {type(statistic).__name__}.")
        if not isinstance(formulation, Formulation):
            raise TypeError(
                f"formulation: expected one such as LogBarrierExtension(), got {type(formulation).__name__}."
            )
        if normalization not in ("image_size", "none"):
            raise ValueError(f'normalization: expected "image_size" or "none", got {normalization!r}.')
        units = np.atleast_1d(np.asarray(unit, dtype=np.float64))
        if units.ndim != 1 or not (np.isfinite(units) & (units > 0)).all():
            raise ValueError(f"unit: expected a number > 0, or one for each component of the statistic, got {unit!r}.")
        self.per_class = not is_relation(statistic)
        if classes is not None and not self.per_class:
            raise ValueError("classes: a relation between classes chooses its own in `pairs`; leave it None.")
        self.statistic = statistic
        self.formulation = formulation
        self.unit = units.tolist()
        self.normalization = normalization
        needed, self.named_keys = arguments_of(statistic)
        self._of_volumes = "volume" in {*needed, *self.named_keys}
        self.target_keys = ("bounds", *(["index"] if formulation.needs_index else []), *needed)
        self.optional_keys = () if formulation.needs_index else ("index",)

    def forward(
        self, input: Tensor, target: Tensor | Mapping[str, Any], *, probabilities: Probabilities | None = None
    ) -> Tensor:
        """Loss of a batch.

        Args:
            input: (B, C, *S), D = 2 or 3: probabilities, or logits with `softmax` or `sigmoid`. Background first.
            target: bounds (B, C, M, 2), lower and upper, in the statistic's unit, background included; (B, R, M, 2) for
                a relation. Best on the CPU, where their values are checked; on another device a bad value makes the
                loss NaN. Or a mapping with "bounds", and perhaps "index", the samples' numbers in the data set (B,),
                which Lagrangians need, and further arguments of the statistic: "image", "spacing_mm", "volume".
            probabilities: of the input, when other losses need them too.

        Raises:
            ValueError: shapes do not fit (the message says which axis), a bound is NaN, or lower > upper.
        """
        with torch.autocast(plain(input).device.type, enabled=False):
            residual, free, index = self._constraints(input, target, probabilities)
            cost = self.formulation(residual, index).masked_fill(free, 0.0).sum(-1)
            self.last = Residuals(residual.detach(), free, index)
            if self.normalization == "image_size":
                cost = cost / input[0, 0].numel()
            if not self._of_volumes or self.reduction == "none":
                return self.reduced(cost)
            # The slices of a volume all have its cost: together they are one sample.
            share = self._volume_share(target, cost)
            total = (cost * share.view(-1, 1, 1)).sum()
            return total if self.reduction == "sum" else total / (share.sum() * cost[0].numel())

    def residual(
        self, input: Tensor, target: Tensor | Mapping[str, Any], *, probabilities: Probabilities | None = None
    ) -> Residuals:
        """Residuals of a batch alone, (B, C', M, 2): arguments and errors as for `forward`, the gradient is kept."""
        with torch.autocast(plain(input).device.type, enabled=False):
            return self._constraints(input, target, probabilities)

    def constraint_names(self, shape: Sequence[int], class_names: Mapping[int, str]) -> list[str]:
        """`lower_<class>` and `upper_<class>`, with `_<component>` behind when the statistic has several.

        Shape (C', M, 2). The pairs of a relation are numbered from 0.
        """
        rows, components, _ = shape
        first = 1 if self.per_class and not self.include_background else 0
        numbers = self.classes or range(first, first + rows)
        labels = [class_names.get(number, str(number)) if self.per_class else str(number) for number in numbers]
        endings = [""] if components == 1 else [f"_{component}" for component in range(components)]
        return [f"{bound}_{label}{end}" for label in labels for end in endings for bound in ("lower", "upper")]

    def terms(self) -> dict[str, Tensor]:
        """Of the last forward pass, 0-dim tensors on its device: for logging; empty without one.

        Keys: "satisfied", the share of the constraints with a residual <= 0, 1 without any; "violation", the mean of
        max(residual, 0) over them, in `unit`.
        """
        if self.last is None:
            return {}
        residual, free, _ = self.last
        used = ~free
        count = used.sum()
        satisfied = ((residual <= 0) & used).sum() / count
        violation = (residual.clamp(min=0) * used).sum() / count.clamp(min=1)
        return {"satisfied": satisfied.nan_to_num(1.0), "violation": violation}

    def _constraints(
        self, input: Tensor, target: Tensor | Mapping[str, Any], probabilities: Probabilities | None
    ) -> Residuals:
        bounds, index, arguments = self._parts(target)
        probabilities = self.probabilities(input) if probabilities is None else probabilities
        numbers = self.channel_numbers(input.shape[1]) if self.per_class else None
        probs, places = (probabilities.all(), None) if numbers is None else probabilities.covering(numbers)
        value = self.statistic(probs, **arguments)
        if places is not None and value.shape[1] != probs.shape[1]:
            raise ValueError(
                f"statistic: expected one row for each of the {probs.shape[1]} channels, got {value.shape[1]}; a "
                "relation between classes is declared with @medconstraints.statistics.relation."
            )
        rows = value.shape[1] if numbers is None else input.shape[1]
        bounds = checks.bounds(bounds, (len(value), rows, value.shape[2]))
        bounds = bounds.to(value.device, value.dtype, non_blocking=True)
        if len(self.unit) not in (1, value.shape[-1]):
            raise ValueError(f"unit: expected one number or {value.shape[-1]}, one per component, got {self.unit}.")
        if numbers is not None and places is not None:
            value, bounds = select_channels(value, places), select_channels(bounds, numbers)
        free = torch.isinf(bounds)
        # f - bound with the sign of each side; a free bound must not put an infinity into the arithmetic.
        difference = value.unsqueeze(-1) - bounds.masked_fill(free, 0.0)
        residual = torch.stack([-difference[..., 0], difference[..., 1]], -1)
        if self.unit != [1.0]:
            unit = torch.tensor(self.unit, dtype=value.dtype).to(value.device, non_blocking=True)
            residual = residual / unit.unsqueeze(-1)
        if self._of_volumes and not self.formulation.needs_index:
            index = _volumes(arguments.get("volume"), index)  # what counts samples counts each volume once
        # 0 moves no multiplier of a Lagrangian.
        return Residuals(residual.masked_fill(free, 0.0), free, index)

    @staticmethod
    def _volume_share(target: Tensor | Mapping[str, Any], cost: Tensor) -> Tensor:
        """1 / slices of the same volume, for each slice of the batch (B,)."""
        volume = target.get("volume") if isinstance(target, Mapping) else None
        if volume is None:
            return cost.new_full((len(cost),), 1 / len(cost))
        volume = plain(torch.as_tensor(volume)).to(cost.device, non_blocking=True)
        return (volume[:, None] == volume).sum(1).to(cost).reciprocal()

    def _parts(self, target: Tensor | Mapping[str, Any]) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """Bounds, index, and the further arguments of the statistic."""
        if isinstance(target, Tensor):
            target = {"bounds": target}
        if not isinstance(target, Mapping) or "bounds" not in target:
            got = sorted(map(str, target)) if isinstance(target, Mapping) else type(target).__name__
            raise ValueError(f'target: expected bounds (B, C, M, 2), or a mapping with "bounds", got {got}.')
        given = {key: plain(value) if isinstance(value, Tensor) else value for key, value in target.items()}
        bounds, index = torch.as_tensor(given.pop("bounds")), given.pop("index", None)
        known = {*self.target_keys, *self.named_keys}
        missing = {*self.target_keys} - {"bounds", "index", *given}
        if missing or {*given} - known:
            raise ValueError(
                f"target: {sorted(given)} do not fit the arguments of the statistic, {sorted(known - {'bounds'})}; "
                'give a mapping with "bounds", perhaps "index", and what the statistic takes besides probabilities.'
            )
        return bounds, None if index is None else torch.as_tensor(index), given

    def extra_repr(self) -> str:
        """Settings shown by `repr`."""
        function = self.statistic.func if isinstance(self.statistic, functools.partial) else self.statistic
        name = function.__name__ if inspect.isfunction(function) else type(function).__name__
        return f"statistic={name}, classes={self.classes}, unit={self.unit}, normalization={self.normalization!r}"


def _volumes(volume: Any, index: Tensor | None) -> Tensor | None:
    """Number of the volume of each slice (B,); that of the first slice, where the batch is one volume."""
    if volume is not None:
        return plain(torch.as_tensor(volume))
    return None if index is None else plain(index).min().expand_as(index)
