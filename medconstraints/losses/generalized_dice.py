"""Generalised Dice: overlap of all classes, each weighted by its size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from monai.utils import Weight
from torch import Tensor

from medconstraints.checks import flag, number, plain, readable
from medconstraints.losses.base import Probabilities, ProbabilityLoss, one_entry
from medconstraints.losses.class_label import checked_label, class_sizes, row_sums
from medconstraints.statistics.arguments import select_channels

__all__ = ["GeneralizedDiceLoss"]

_POWERS = {Weight.SQUARE: 2, Weight.SIMPLE: 1, Weight.UNIFORM: 0}
# Up to this many classes products with a one-hot label are quicker than picking the voxels' own probabilities.
_FEW_CLASSES = 4


class GeneralizedDiceLoss(ProbabilityLoss):
    """Generalised Dice loss (Sudre 2017; Kervadec 2020, eq. 4.1 for any number of classes), with MONAI's arguments.

    `1 - 2 sum_c w_c I_c / sum_c w_c (P_c + G_c)` with, over the voxels p of a sample, I_c = sum_p g_c(p) s_c(p),
    P_c = sum_p s_c(p), G_c = sum_p g_c(p), and w_c = 1 / G_c^2 ("square"), 1 / G_c ("simple") or 1 ("uniform"). A
    common factor of the weights cancels, so the largest one is set to 1: no smoothing constant is needed, and without
    one the loss depends on proportions alone, never on the number of voxels.

    A class that is absent (G_c = 0) has the largest weight of those present: its false positives cost as much as those
    of the rarest class. On an image of background alone that gives eq. 4.1 with equal weights, which is
    sum_{c > 0} P_c / N, the mean probability of a false positive (N voxels, softmax). If no class that counts is
    present, as on that image with `include_background=False`, the ratio is 1 whatever the prediction, and would train
    nothing; the loss is then sum_c P_c / N over the classes that count: for a softmax the same number and the same
    gradient, 1 / N for each false positive, as if the background counted.

    Args:
        include_background: let channel 0 count. A single channel, a foreground, always counts.
        to_onehot_y: the target must be a label of class numbers; False takes one-hot targets too.
        sigmoid: apply a sigmoid to the input.
        softmax: apply a softmax over the channels of the input.
        other_act: another activation, a function of the input.
        w_type: "square", "simple" or "uniform".
        reduction: "mean" over samples, "sum", or "none" for (B, 1, 1, 1), in 3D (B, 1, 1, 1, 1); B = 1 with `batch`.
        smooth_nr: added to 2 sum_c w_c I_c. MONAI's 1e-5 makes the gradient fade on large images; 0 adds nothing.
        smooth_dr: added to sum_c w_c (P_c + G_c).
        batch: take the sums over all samples of the batch, as if it were one image.
        soft_label: I_c = (P_c + G_c - sum_p |s_c(p) - g_c(p)|) / 2, which for a soft target is largest at that target.

    Raises:
        TypeError: `other_act` is no function, or a flag is neither True nor False.
        ValueError: an argument is outside its range.

    Example:
        >>> label = torch.tensor([[[[0, 0], [0, 1]]]])
        >>> loss = GeneralizedDiceLoss()                                    # 1 - 2 (1/2 + 1/6) / (3 + 5/9)
        >>> round(loss(torch.full((1, 2, 2, 2), 0.5), label).item(), 4)
        0.625
    """

    def __init__(
        self,
        *,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        w_type: Weight | str = Weight.SQUARE,
        reduction: str = "mean",
        smooth_nr: float = 0.0,
        smooth_dr: float = 0.0,
        batch: bool = False,
        soft_label: bool = False,
    ) -> None:
        super().__init__(
            include_background=include_background,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            reduction=reduction,
        )
        if w_type not in [*_POWERS]:
            raise ValueError(f"w_type: expected one of {[str(each) for each in _POWERS]}, got {w_type!r}.")
        self.to_onehot_y = flag("to_onehot_y", to_onehot_y)
        self.w_type = Weight(w_type)
        self.smooth_nr = number("smooth_nr", smooth_nr, least=0)
        self.smooth_dr = number("smooth_dr", smooth_dr, least=0)
        self.batch = flag("batch", batch)
        self.soft_label = flag("soft_label", soft_label)

    def forward(
        self, input: Tensor, target: Tensor | Mapping[str, Tensor], *, probabilities: Probabilities | None = None
    ) -> Tensor:
        """Loss of a batch.

        Args:
            input: (B, C, *S), D = 2 or 3: probabilities, or logits with `softmax` or `sigmoid`. Background first.
            target: label (B, 1, *S) of class numbers, or one-hot (B, C, *S), soft labels between 0 and 1 included. For
                a single channel, its mask (B, 1, *S). Values are looked at on the CPU only. Or a mapping with "label".
            probabilities: of the input, when other losses need them too.

        Raises:
            ValueError: shapes do not fit, a label that is no class, or one-hot values that are not between 0 and 1.
        """
        input, target = plain(input), plain(one_entry(target, "label"))
        with torch.autocast(input.device.type, enabled=False):
            probabilities = self.probabilities(input) if probabilities is None else probabilities
            overlap, predicted, size = self._sums(probabilities, input, target)
            voxels = input[0, 0].numel()
            if self.batch:
                voxels *= len(input)
                overlap, predicted, size = (values.sum(0, keepdim=True) for values in (overlap, predicted, size))
            loss = self._dice(overlap, predicted, size, voxels)
            return self.reduced(loss.view(-1, *[1] * (input.dim() - 1)))

    def _sums(self, probabilities: Probabilities, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Overlap I, predicted size P and size G of every class that counts: (B, C') each."""
        classes = input.shape[1]
        numbers = self.channel_numbers(classes)
        if classes > 1 and (self.to_onehot_y or (target.dim() == input.dim() and target.shape[1] == 1)):
            label = checked_label(target, input)
            if classes > _FEW_CLASSES:
                return self._sums_of_own(probabilities.all(), label.to(torch.int64), numbers)
            probs = probabilities.channels(numbers)
            channel = torch.tensor(numbers, dtype=label.dtype).to(label.device, non_blocking=True)
            one_hot = torch.empty(probs.shape, dtype=probs.dtype, device=probs.device)
            torch.eq(label, channel.view(1, -1, *[1] * (label.dim() - 2)), out=one_hot)
        else:
            probs = probabilities.channels(numbers)
            one_hot = select_channels(_checked_one_hot(target, input), numbers).to(probs)
        predicted, size = probs.flatten(2).sum(-1), one_hot.flatten(2).sum(-1)
        if self.soft_label:
            return (predicted + size - (probs - one_hot).abs().flatten(2).sum(-1)) / 2, predicted, size
        return (probs * one_hot).flatten(2).sum(-1), predicted, size

    @staticmethod
    def _sums_of_own(probs: Tensor, label: Tensor, numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The same from the probability of each voxel's own class."""
        classes = probs.shape[1]
        overlap = row_sums(probs.gather(1, label).flatten(1, -2), label.flatten(1, -2), classes).sum(1)
        sums = overlap, probs.flatten(2).sum(-1), class_sizes(label, classes, probs.dtype)
        overlap, predicted, size = (select_channels(values, numbers) for values in sums)
        return overlap, predicted, size

    def _dice(self, overlap: Tensor, predicted: Tensor, size: Tensor, voxels: int) -> Tensor:
        """The loss of each sample, (B, 1). Branches not taken stay finite: `where` multiplies their gradient by 0."""
        power = _POWERS[self.w_type]
        present = size > 0
        some = present.any(1, keepdim=True)
        smallest = torch.where(present, size, torch.inf).amin(1, keepdim=True).where(some, 1.0)
        # The smallest class has weight 1, and so has an absent one.
        weight = (smallest / size.where(present, smallest)) ** power
        overlap, total = (
            (weight * sums).sum(1, keepdim=True) + smooth * smallest**power
            for sums, smooth in ((2 * overlap, self.smooth_nr), (predicted + size, self.smooth_dr))
        )
        return torch.where(some, 1 - overlap / total.where(some, 1.0), predicted.sum(1, keepdim=True) / voxels)

    def extra_repr(self) -> str:
        """Settings shown by `repr`."""
        return (
            f"include_background={self.include_background}, w_type={str(self.w_type)!r}, batch={self.batch}, "
            f"reduction={self.reduction!r}"
        )


def _checked_one_hot(target: Tensor, input: Tensor) -> Tensor:
    """A one-hot or soft label of the shape and on the device of the input."""
    if target.shape != input.shape or target.is_complex():
        raise ValueError(
            f"target: expected a label {(input.shape[0], 1, *input.shape[2:])} of class numbers, or one-hot "
            f"{tuple(input.shape)}, got {target.dtype} of shape {tuple(target.shape)}."
        )
    if readable(target) and target.dtype != torch.bool and target.numel():
        low, high = (float(value) for value in target.detach().aminmax())
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"target: expected a one-hot label of values between 0 and 1, got {low:g}..{high:g}; for class numbers "
                "give a label with one channel, and for a network with one channel a mask."
            )
    return target.to(input.device, non_blocking=True)
