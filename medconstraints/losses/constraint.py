"""Any statistic of the prediction, kept within bounds by any formulation."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from medconstraints.losses.old_base import ProbabilityLoss, plain
from medconstraints.statistics.arguments import channels

__all__ = ["ConstraintLoss", "Residuals"]

_AXES = ("samples", "classes, background included", "components of the statistic", "lower and upper bound")


class Residuals(NamedTuple):
    """What a forward pass of `ConstraintLoss` saw, detached.

    Attributes:
        residual: (B, C', M, 2) in `unit`: lower - f and f - upper, <= 0 when satisfied.
        free: (B, C', M, 2) bool, where the bound is infinite; the residual is 0 there.
        index: numbers of the samples in the data set, (B,), or None.
    """

    residual: Tensor
    free: Tensor
    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index, which nobody needs here


class ConstraintLoss(ProbabilityLoss):
    """Cost of the inequalities lower <= f(s) <= upper (Kervadec 2020, eq. 2.2, 3.1 and 3.8).

    The residuals z = (lower - f) / unit and (f - upper) / unit, <= 0 when satisfied, go through the formulation; the
    costs of both sides are added. An infinite bound is free, lower = upper is an equality.

    Args:
        statistic: function `probs (B, C, *S) -> (B, C, M)`, such as `medconstraints.statistics.soft_size`; or a
            relation between classes, (B, R, M). In a config: `{"_target_": "medconstraints.statistics.soft_size",
            "_mode_": "callable"}`, where more keys set its arguments.
        formulation: module `residual -> cost`, elementwise, such as `LogBarrierExtension()` or `QuadraticPenalty()`.
        classes: channels that are constrained; None for all but the background. Relations choose their own.
        include_background: constrain channel 0 too.
        sigmoid: apply a sigmoid to the input.
        softmax: apply a softmax over the channels of the input.
        logit_scale: factor of the input before the activation; the thesis's "softmax temperature 5" is 5.
        unit: size of a residual that counts as 1, one number or one for each component: 1000 voxels for a size, say.
            It decides how a formulation that is not homogeneous, as the log-barrier, sees the constraint.
        normalization: "image_size" divides the cost by the number of voxels of one sample (the thesis, for sizes in
            voxels), "none" does not.
        reduction: "mean" over samples, classes and components, "sum", or "none" for (B, C', M).
        check_probabilities: at the first forward pass look whether the probabilities add up to 1, and warn if not.

    Raises:
        TypeError: statistic or formulation cannot be called.
        ValueError: an argument is outside its range.

    Example:
        >>> from medconstraints.formulations import QuadraticPenalty
        >>> from medconstraints.statistics import soft_size
        >>> loss = ConstraintLoss(soft_size, QuadraticPenalty(), normalization="none")
        >>> bounds = torch.tensor([[[[-torch.inf, torch.inf]], [[10.0, 12.0]]]])  # class 1: 10 to 12 voxels
        >>> loss(torch.full((1, 2, 4, 4), 0.5), bounds).item()                     # it has 8
        4.0
    """

    def __init__(
        self,
        statistic: Callable[..., Tensor],
        formulation: nn.Module,
        *,
        classes: Sequence[int] | None = None,
        include_background: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        logit_scale: float = 1.0,
        unit: float | Sequence[float] = 1.0,
        normalization: str = "image_size",
        reduction: str = "mean",
        check_probabilities: bool = False,
    ) -> None:
        super().__init__(sigmoid=sigmoid, softmax=softmax, logit_scale=logit_scale, reduction=reduction)
        if not callable(statistic):
            raise TypeError(f"statistic: expected a function such as soft_size, got {type(statistic).__name__}.")
        if not isinstance(formulation, nn.Module):
            raise TypeError(
                f"formulation: expected a module such as LogBarrierExtension(), got {type(formulation).__name__}."
            )
        if normalization not in ("image_size", "none"):
            raise ValueError(f'normalization: expected "image_size" or "none", got {normalization!r}.')
        units = np.atleast_1d(np.asarray(unit, dtype=np.float64))
        if units.ndim != 1 or not (np.isfinite(units) & (units > 0)).all():
            raise ValueError(f"unit: expected a number > 0, or one for each component of the statistic, got {unit!r}.")
        # functools.partial, as a config makes it, hides the attributes of the function.
        self.per_class = bool(getattr(getattr(statistic, "func", statistic), "per_class", True))
        if classes is not None:
            if not self.per_class:
                raise ValueError("classes: a relation between classes chooses its own in `pairs`; leave it None.")
            if not len(classes) or any(cls != int(cls) or cls < 0 for cls in classes):
                raise ValueError(f"classes: expected channel numbers >= 0, got {classes!r}.")
        self.statistic = statistic
        self.formulation = formulation
        self.classes = None if classes is None else [int(cls) for cls in classes]
        self.include_background = include_background
        self.unit = units.tolist()
        self.normalization = normalization
        self.check_probabilities = check_probabilities
        self.last: Residuals | None = None

    def forward(self, input: Tensor, target: Tensor | Mapping[str, Any]) -> Tensor:
        """Loss of a batch.

        Args:
            input: (B, C, *S), D = 2 or 3: probabilities, or logits with `softmax` or `sigmoid`. Background first.
            target: bounds (B, C, M, 2), lower and upper, in the statistic's unit, background included; (B, R, M, 2) for
                a relation. Best on the CPU, where their values are checked; on another device a bad value makes the
                loss NaN. Or a mapping with "bounds", and perhaps "index", the samples' numbers in the data set (B,),
                which Lagrangians need, and further arguments of the statistic: "image", "spacing_mm", "volume".

        Raises:
            ValueError: shapes do not fit (the message says which axis), a bound is NaN, or lower > upper.
        """
        with torch.autocast(plain(input).device.type, enabled=False):
            residual, free, index, voxels = self._residual(input, target)
            needs_index = getattr(self.formulation, "needs_index", False)
            cost = self.formulation(residual, index) if needs_index else self.formulation(residual)
            cost = cost.masked_fill(free, 0.0).sum(-1)
            self.last = Residuals(residual.detach(), free, index)
            if self.normalization == "image_size":
                cost = cost / voxels
            if self.reduction == "none":
                return cost
            return cost.mean() if self.reduction == "mean" else cost.sum()

    def residual(self, input: Tensor, target: Tensor | Mapping[str, Any]) -> Residuals:
        """Residuals of a batch alone: arguments and errors as for `forward`, and the gradient is kept."""
        with torch.autocast(plain(input).device.type, enabled=False):
            return Residuals(*self._residual(input, target)[:3])

    def terms(self) -> dict[str, Tensor]:
        """Of the last forward pass, 0-dim tensors on its device: for logging.

        Keys: "satisfied", the share of the constraints with a residual <= 0, 1 without any; "violation", the mean of
        max(residual, 0) over them, in `unit`.

        Raises:
            ValueError: no forward pass has been made yet.
        """
        if self.last is None:
            raise ValueError("terms: no forward pass has been made yet; call the loss first.")
        residual, free, _ = self.last
        used = ~free
        count = used.sum()
        satisfied = ((residual <= 0) & used).sum() / count
        violation = (residual.clamp(min=0) * used).sum() / count.clamp(min=1)
        return {"satisfied": satisfied.nan_to_num(1.0), "violation": violation}

    def _residual(self, input: Tensor, target: Tensor | Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | None, int]:
        bounds, index, arguments = _parts(target)
        probs = self.probabilities(input)
        if self.check_probabilities:
            self._check_sum(probs, input.dtype)
        if arguments:
            self._check_arguments(arguments)
        value = self.statistic(probs, **arguments)
        _check_shape(bounds, value.shape)
        bounds = _checked_values(bounds).to(value.device, value.dtype, non_blocking=True)
        if len(self.unit) not in (1, value.shape[-1]):
            raise ValueError(f"unit: expected one number or {value.shape[-1]}, one per component, got {self.unit}.")
        if self.per_class:
            if value.shape[1] != probs.shape[1]:
                raise ValueError(
                    f"statistic: expected one row for each of the {probs.shape[1]} channels, got {value.shape[1]}; a "
                    "relation between classes needs the attribute per_class = False."
                )
            value, bounds = self._chosen(value), self._chosen(bounds)
        free = torch.isinf(bounds)
        # f - bound with the sign of each side; a free bound must not put an infinity into the arithmetic.
        difference = value.unsqueeze(-1) - bounds.masked_fill(free, 0.0)
        residual = torch.stack([-difference[..., 0], difference[..., 1]], -1)
        if self.unit != [1.0]:
            unit = torch.tensor(self.unit, dtype=value.dtype).to(value.device, non_blocking=True)
            residual = residual / unit.unsqueeze(-1)
        # 0 moves no multiplier of a Lagrangian.
        return residual.masked_fill(free, 0.0), free, index, probs[0, 0].numel()

    def _chosen(self, tensor: Tensor) -> Tensor:
        """The rows of the constrained classes."""
        count = tensor.shape[1]
        if self.classes is None:
            return tensor if count == 1 or self.include_background else tensor[:, 1:]
        if max(self.classes) >= count:
            raise ValueError(f"classes: {self.classes} names a class that does not exist; the input has {count}.")
        return channels(tensor, self.classes)

    def _check_arguments(self, arguments: Mapping[str, Any]) -> None:
        try:
            inspect.signature(self.statistic).bind(None, **arguments)
        except TypeError as error:
            raise ValueError(
                f"target: {[*arguments]} do not fit the arguments of the statistic ({error}); give a mapping with "
                '"bounds", perhaps "index", and what the statistic takes besides the probabilities.'
            ) from error

    def _check_sum(self, probs: Tensor, dtype: torch.dtype) -> None:
        """Look at a few voxels, once."""
        self.check_probabilities = False
        if probs.shape[1] == 1 or self.sigmoid:
            return
        flat = probs.detach().flatten(2)
        some = flat[..., :: (flat.shape[-1] // 64) | 1].sum(1)  # an odd step meets every column
        worst = float((some - 1).abs().max())
        # A softmax in half precision is as exact as its type.
        if worst > max(1e-3, 4 * torch.finfo(dtype).eps):
            warnings.warn(
                f"input: the probabilities of a voxel add up to 1 {'+' if float(some.max()) > 1 else '-'} {worst:.3g}; "
                "use softmax=True for logits. This is looked at once.",
                stacklevel=4,
            )

    def extra_repr(self) -> str:
        """Settings shown by `repr`."""
        function = getattr(self.statistic, "func", self.statistic)
        return (
            f"statistic={getattr(function, '__name__', type(function).__name__)}, classes={self.classes}, "
            f"unit={self.unit}, normalization={self.normalization!r}"
        )


def _parts(target: Tensor | Mapping[str, Any]) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """Bounds, index, and the further arguments of the statistic."""
    if isinstance(target, Tensor):
        return plain(target), None, {}
    if not isinstance(target, Mapping) or "bounds" not in target:
        got = sorted(map(str, target)) if isinstance(target, Mapping) else type(target).__name__
        raise ValueError(f'target: expected bounds (B, C, M, 2), or a mapping with "bounds", got {got}.')
    given = {key: plain(value) if isinstance(value, Tensor) else value for key, value in target.items()}
    bounds, index = torch.as_tensor(given.pop("bounds")), given.pop("index", None)
    return bounds, None if index is None else torch.as_tensor(index), given


def _check_shape(bounds: Tensor, value: torch.Size) -> None:
    expected = (*value, 2)
    if bounds.dim() != len(expected):
        raise ValueError(
            f"target: expected bounds of shape {expected}, (samples, classes, components, 2), got "
            f"{tuple(bounds.shape)} with {bounds.dim()} axes."
        )
    for axis, (size, given) in enumerate(zip(expected, bounds.shape, strict=True)):
        if size != given:
            raise ValueError(
                f"target: axis {axis} of the bounds counts {_AXES[axis]}: expected {size}, got {given} (shape "
                f"{tuple(bounds.shape)}, expected {expected})."
            )


def _checked_values(bounds: Tensor) -> Tensor:
    """Bounds with lower <= upper and no NaN; checked where the host has them, spoiled elsewhere."""
    if not bounds.is_floating_point():
        bounds = bounds.float()
    lower, upper = bounds[..., 0], bounds[..., 1]
    good = (lower <= upper) & (lower < torch.inf) & (upper > -torch.inf)
    if bounds.device.type != "cpu":
        return bounds.masked_fill(~good.unsqueeze(-1), torch.nan)
    if not bool(good.all()):
        where = tuple((~good).nonzero()[0].tolist())
        found = f"{float(lower[where])} and {float(upper[where])} at (sample, class, component) {where}"
        if bool(bounds.isnan().any()):
            raise ValueError(f"target: a bound is NaN ({found}); use -inf and inf for a bound that is not known.")
        raise ValueError(f"target: expected lower <= upper, -inf <= lower < inf and -inf < upper <= inf, got {found}.")
    return bounds
