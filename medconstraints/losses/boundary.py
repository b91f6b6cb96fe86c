"""Boundary loss: the distance between two boundaries as a sum over a region."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from medconstraints.losses.distance_target import DistanceMapCheck
from medconstraints.losses.old_base import ProbabilityLoss, plain, softmax_is_shared

__all__ = ["BoundaryLoss"]


class BoundaryLoss(ProbabilityLoss):
    """Mean over the voxels of distance times probability (Kervadec 2020, eq. 4.5): `mean_p phi(p) s(p)`, in mm.

    phi is the signed distance to the boundary of a class, negative inside, which `SignedDistanceMapd` computes once.
    Up to a constant, that is half the squared distance between the boundaries of label and prediction (eq. 4.4). So
    the value is negative for good predictions, and smallest for the label itself; only differences mean something.

    An empty prediction is close to a saddle point: put a regional loss beside it, and raise its share with
    `AlphaSchedule`. Distances grow with the field of view; where that differs between images, limit them with the
    `clip_mm` of the transform.

    Args:
        include_background: whether the channel 0 counts too. Its map is minus that of the foreground, if there is one
            class only.
        to_onehot_y: taken for the sake of `monai.losses.BoundaryLoss`; maps have a channel for each class already.
        sigmoid: apply a sigmoid to the input.
        softmax: apply a softmax over the channels of the input.
        other_act: another activation, a function of the input.
        reduction: "mean" over samples and classes, "sum" of them, or "none" for (B, C').
        batch: with "none", give the mean over the samples, (C',); "sum" is then the sum over the classes.
        classes: channels that count, in this order; None for all, less the background.
        weight: of each class that counts; None for 1 each.
        unit_mm: values are divided by it. 1 gives mm; another unit makes the loss larger or smaller beside others.

    Raises:
        TypeError: `other_act` is no function.
        ValueError: an argument is outside its range.

    Example:
        >>> foreground = torch.tensor([[[[1.5, 0.5, -0.5, 0.5]]]])
        >>> distance_map = torch.cat([-foreground, foreground], 1)
        >>> label = (distance_map < 0).float()
        >>> BoundaryLoss()(label, distance_map).item(), BoundaryLoss()(0 * label, distance_map).item()
        (-0.125, 0.0)
    """

    def __init__(
        self,
        *,
        include_background: bool = False,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        reduction: str = "mean",
        batch: bool = False,
        classes: Sequence[int] | None = None,
        weight: Sequence[float] | Tensor | None = None,
        unit_mm: float = 1.0,
    ) -> None:
        super().__init__(sigmoid=sigmoid, softmax=softmax, reduction=reduction)
        if other_act is not None and not callable(other_act):
            raise TypeError(f"other_act: expected a function or None, got {type(other_act).__name__}.")
        if other_act is not None and (sigmoid or softmax):
            raise ValueError("other_act: expected None beside sigmoid or softmax; choose one activation.")
        if not 0 < unit_mm < math.inf:
            raise ValueError(f"unit_mm: expected a number of millimetres > 0, got {unit_mm!r}.")
        if classes is not None and (
            not len(classes) or len(set(classes)) < len(classes) or any(int(n) != n or n < 0 for n in classes)
        ):
            raise ValueError(f"classes: expected different channel numbers >= 0, got {classes!r}.")
        if weight is not None:
            weight = torch.as_tensor(weight, dtype=torch.float32)
            if weight.dim() != 1 or not bool((torch.isfinite(weight) & (weight >= 0)).all()):
                raise ValueError(f"weight: expected one finite number >= 0 for each class, got {weight.tolist()!r}.")
        self.include_background = include_background
        self.to_onehot_y = to_onehot_y
        self.other_act = other_act
        self.batch = batch
        self.classes = None if classes is None else [int(number) for number in classes]
        self.unit_mm = float(unit_mm)
        self.weight: Tensor | None
        self.register_buffer("weight", weight)
        self._checked_map = DistanceMapCheck()

    def forward(self, input: Tensor, target: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Loss of a batch.

        Args:
            input: output of the network, (B, C, *S).
            target: distance map of each class, (B, C, *S), mm, as `SignedDistanceMapd` makes it; or a mapping that has
                it as "distance_map", as `PrepareBatchTargets` gives it.

        Raises:
            ValueError: shapes do not fit, a label in place of a map, a stored map that was not decoded, or a map that
                was resampled.
        """
        input = plain(input)
        self._check(input)
        if isinstance(target, Mapping):
            if not isinstance(target.get("distance_map"), Tensor):
                raise ValueError(
                    f'target: expected a distance map, or a mapping with the tensor "distance_map", got '
                    f"{sorted(map(str, target))}; make it with SignedDistanceMapd and name its key in "
                    "PrepareBatchTargets(target_keys=...)."
                )
            target = target["distance_map"]
        target = self._checked_map(target, input.shape, "target")
        with torch.autocast(input.device.type, enabled=False):
            channels = self._channels(input.shape[1])
            probabilities = self._chosen(input, channels)
            target = _select(target, channels).to(probabilities.dtype)
            if self.reduction == "mean" and self.weight is None:
                return (probabilities * target).sum() / (probabilities.numel() * self.unit_mm)
            loss = (probabilities * target).flatten(2).mean(-1) / self.unit_mm
            if self.weight is not None:
                loss = loss * self.weight.to(loss)
            if self.batch:
                loss = loss.mean(0)
            if self.reduction == "none":
                return loss
            return loss.mean() if self.reduction == "mean" else loss.sum()

    def _chosen(self, input: Tensor, channels: list[int]) -> Tensor:
        """Probabilities of the channels that count."""
        if self.other_act is not None:
            return _select(self.other_act(input.float() if input.dtype.itemsize < 4 else input), channels)
        if self.softmax and input.shape[1] == 2 and len(channels) == 1 and not softmax_is_shared(input):
            # The softmax of two channels is a sigmoid of their difference, at half the memory.
            input = input.float() if input.dtype.itemsize < 4 else input
            one = channels[0]
            return torch.sigmoid(input[:, one : one + 1] - input[:, 1 - one : 2 - one])
        if self.softmax:
            return _select(self.probabilities(input), channels)
        return self.probabilities(_select(input, channels))

    def _channels(self, count: int) -> list[int]:
        if self.classes is not None:
            chosen = self.classes
        else:
            # A network with one channel has no background channel to leave out.
            chosen = list(range(0 if self.include_background or count == 1 else 1, count))
        if max(chosen) >= count:
            raise ValueError(f"classes: expected channel numbers below {count}, the channels of input, got {chosen}.")
        if self.weight is not None and len(self.weight) != len(chosen):
            raise ValueError(
                f"weight: expected {len(chosen)} values, one for each of {chosen}, got {len(self.weight)}."
            )
        return chosen

    @staticmethod
    def _check(input: Tensor) -> None:
        if not input.is_floating_point() or input.dim() not in (4, 5):
            raise ValueError(
                f"input: expected a floating point tensor (B, C, H, W) or (B, C, H, W, D), got {input.dtype} of shape "
                f"{tuple(input.shape)}; add the batch and channel axes."
            )

    def extra_repr(self) -> str:
        """Settings shown by `repr`."""
        weight = None if self.weight is None else self.weight.tolist()
        return (
            f"include_background={self.include_background}, classes={self.classes}, weight={weight}, "
            f"unit_mm={self.unit_mm}, reduction={self.reduction}"
        )


def _select(values: Tensor, channels: list[int]) -> Tensor:
    """Channels of (B, C, *S); a view where they follow each other."""
    first = channels[0]
    if channels == list(range(first, first + len(channels))):
        return values[:, first : first + len(channels)]
    return values[:, channels]
