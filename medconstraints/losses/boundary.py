"""Boundary loss: the distance between two boundaries as a sum over a region."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from medconstraints.checks import number
from medconstraints.losses.base import Probabilities, ProbabilityLoss, one_entry
from medconstraints.losses.distance_target import DistanceMapCheck
from medconstraints.statistics.arguments import select_channels

__all__ = ["BoundaryLoss"]


class BoundaryLoss(ProbabilityLoss):
    """Mean over the voxels of distance times probability (Kervadec 2020, eq. 4.5): `mean_p phi(p) s(p)`, in mm.

    phi is the signed distance to the boundary of a class, negative inside, which `SignedDistanceMapd` computes once.
    Up to a constant, that is half the squared distance between the boundaries of label and prediction (eq. 4.4). So
    the value is negative for good predictions, and smallest for the label itself; only differences mean something.

    An empty prediction is close to a saddle point: put a regional loss beside it, and raise its share with
    `AlphaSchedule`. Distances grow with the field of view; where that differs between images, limit them with the
    `clip_mm` of the map.

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

    target_keys = ("distance_map",)
    reads_meta = True  # which tell a map from a label
    weight: Tensor | None

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
        super().__init__(
            include_background=include_background,
            classes=classes,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            reduction=reduction,
        )
        if weight is not None:
            weight = torch.as_tensor(weight, dtype=torch.float32)
            if weight.dim() != 1 or not bool((torch.isfinite(weight) & (weight >= 0)).all()):
                raise ValueError(f"weight: expected one finite number >= 0 for each class, got {weight.tolist()!r}.")
        self.to_onehot_y = to_onehot_y
        self.batch = batch
        self.unit_mm = number("unit_mm", unit_mm, above=0.0)
        self.register_buffer("weight", weight)
        self._checked_map = DistanceMapCheck()

    def forward(
        self, input: Tensor, target: Tensor | Mapping[str, Tensor], *, probabilities: Probabilities | None = None
    ) -> Tensor:
        """Loss of a batch.

        Args:
            input: output of the network, (B, C, *S).
            target: distance map of each class, (B, C, *S), mm, as `SignedDistanceMapd` makes it; or a mapping that has
                it as "distance_map", as `PrepareBatchTargets` gives it.
            probabilities: of this input, if they are shared with other losses.

        Raises:
            ValueError: shapes do not fit, a stored map that was not decoded, or a map that
                was resampled.
        """
        with torch.autocast(input.device.type, enabled=False):
            probabilities = probabilities or self.probabilities(input)
            channels = self.channel_numbers(input.shape[1])
            if self.weight is not None and len(self.weight) != len(channels):
                raise ValueError(
                    f"weight: expected {len(channels)} values, one for each of {channels}, got {len(self.weight)}."
                )
            distance = self._checked_map(one_entry(target, "distance_map"), input.shape)
            chosen = probabilities.channels(channels)
            products = chosen * select_channels(distance, channels).to(chosen.dtype)
            if self.reduction == "mean" and self.weight is None:
                return products.sum() / (products.numel() * self.unit_mm)
            cost = products.flatten(2).mean(-1) / self.unit_mm
            if self.weight is not None:
                cost = cost * self.weight.to(cost)
            return self.reduced(cost.mean(0) if self.batch else cost)

    def extra_repr(self) -> str:
        """Settings shown by `repr`."""
        weight = None if self.weight is None else self.weight.tolist()
        return (
            f"include_background={self.include_background}, classes={self.classes}, weight={weight}, "
            f"unit_mm={self.unit_mm:g}, reduction={self.reduction!r}"
        )
