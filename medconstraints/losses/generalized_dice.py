"""Generalised Dice: overlap of all classes, each weighted by its size."""

from __future__ import annotations

import torch
from torch import Tensor

from medconstraints.losses.class_label import checked_label, class_sizes, row_sums
from medconstraints.losses.old_base import ProbabilityLoss, plain

__all__ = ["GeneralizedDiceLoss"]

_POWERS = {"square": 2, "simple": 1, "uniform": 0}
# Up to this many classes products with a one-hot label are quicker than picking the voxels' own probabilities.
_FEW_CLASSES = 4


class GeneralizedDiceLoss(ProbabilityLoss):
    """Generalised Dice loss (Sudre 2017; Kervadec 2020, eq. 4.1 for any number of classes).

    `1 - 2 sum_c w_c I_c / sum_c w_c (P_c + G_c)` with, over the voxels p of a sample, I_c = sum_p g_c(p) s_c(p),
    P_c = sum_p s_c(p), G_c = sum_p g_c(p), and w_c = 1 / G_c^2 ("square"), 1 / G_c ("simple") or 1 ("uniform"). A
    common factor of the weights cancels, so the largest one is set to 1: there is no smoothing constant, and the loss
    depends on proportions alone, never on the number of voxels.

    A class that is absent (G_c = 0) has the largest weight of those present: its false positives cost as much as those
    of the rarest class. On an image of background alone that gives eq. 4.1 with equal weights, which is
    sum_{c > 0} P_c / N, the mean probability of a false positive (N voxels, softmax). If no class that counts is
    present, as on that image with `include_background=False`, the ratio is 1 whatever the prediction, and would train
    nothing; the loss is then sum_c P_c / N over the classes that count: for a softmax the same number and the same
    gradient, 1 / N for each false positive, as if the background counted.

    Args:
        include_background: let channel 0 count. A single channel, a foreground, always counts.
        sigmoid: apply a sigmoid to the input.
        softmax: apply a softmax over the channels of the input.
        weighting: "square", "simple" or "uniform".
        batch: take the sums over all samples of the batch, as if it were one image.
        reduction: "mean" over samples, "sum", or "none" for (B, 1), (1, 1) with `batch`.

    Raises:
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
        sigmoid: bool = False,
        softmax: bool = False,
        weighting: str = "square",
        batch: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__(sigmoid=sigmoid, softmax=softmax, reduction=reduction)
        if weighting not in _POWERS:
            raise ValueError(f"weighting: expected one of {sorted(_POWERS)}, got {weighting!r}.")
        self.include_background = include_background
        self.weighting = weighting
        self.batch = batch

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Loss of a batch.

        Args:
            input: (B, C, *S), D = 2 or 3: probabilities, or logits with `softmax` or `sigmoid`. Background first.
            target: label (B, 1, *S) of class numbers, or one-hot (B, C, *S), soft labels between 0 and 1 included. For
                a single channel, its mask (B, 1, *S). Values are looked at on the CPU only.

        Raises:
            ValueError: shapes do not fit, a label that is no class, or one-hot values that are not between 0 and 1.
        """
        with torch.autocast(plain(input).device.type, enabled=False):
            probs = self.probabilities(input)
            overlap, predicted, size = self._sums(probs, plain(target))
            voxels = probs[0, 0].numel()
            if self.batch:
                voxels *= len(probs)
                overlap, predicted, size = (values.sum(0, keepdim=True) for values in (overlap, predicted, size))
            if not self.include_background and probs.shape[1] > 1:
                overlap, predicted, size = overlap[:, 1:], predicted[:, 1:], size[:, 1:]
            loss = self._dice(overlap, predicted, size, voxels)
            if self.reduction == "none":
                return loss
            return loss.mean() if self.reduction == "mean" else loss.sum()

    def _sums(self, probs: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Overlap I, predicted size P and size G of every class: (B, C) each."""
        classes = probs.shape[1]
        predicted = probs.flatten(2).sum(-1)
        if classes > 1 and target.dim() == probs.dim() and target.shape[1] == 1:
            label = checked_label(target, probs)
            if classes > _FEW_CLASSES:
                label = label.to(torch.int64)
                own = probs.gather(1, label).flatten(1, -2)
                overlap = row_sums(own, label.flatten(1, -2), classes).sum(1)
                return overlap, predicted, class_sizes(label, classes, probs.dtype)
            channel = torch.arange(classes, dtype=label.dtype, device=label.device)
            one_hot = torch.empty(probs.shape, dtype=probs.dtype, device=probs.device)
            torch.eq(label, channel.view(1, -1, *[1] * (label.dim() - 2)), out=one_hot)
        else:
            one_hot = _checked_one_hot(target, probs)
        return (probs * one_hot).flatten(2).sum(-1), predicted, one_hot.flatten(2).sum(-1)

    def _dice(self, overlap: Tensor, predicted: Tensor, size: Tensor, voxels: int) -> Tensor:
        """The loss of each sample, (B, 1). Branches not taken stay finite: `where` multiplies their gradient by 0."""
        present = size > 0
        some = present.any(1, keepdim=True)
        smallest = torch.where(present, size, torch.inf).amin(1, keepdim=True).where(some, 1.0)
        # The smallest class has weight 1, and so has an absent one.
        weight = (smallest / size.where(present, smallest)) ** _POWERS[self.weighting]
        total = (weight * (predicted + size)).sum(1, keepdim=True).where(some, 1.0)
        dice = 1 - 2 * (weight * overlap).sum(1, keepdim=True) / total
        return torch.where(some, dice, predicted.sum(1, keepdim=True) / voxels)

    def extra_repr(self) -> str:
        """Settings shown by `repr`."""
        return (
            f"include_background={self.include_background}, weighting={self.weighting!r}, batch={self.batch}, "
            f"reduction={self.reduction!r}"
        )


def _checked_one_hot(target: Tensor, probs: Tensor) -> Tensor:
    """A one-hot or soft label of the same shape, type and device as the probabilities."""
    if target.shape != probs.shape or target.is_complex():
        raise ValueError(
            f"target: expected a label {(probs.shape[0], 1, *probs.shape[2:])} of class numbers, or one-hot "
            f"{tuple(probs.shape)}, got {target.dtype} of shape {tuple(target.shape)}."
        )
    if target.device.type == "cpu" and target.dtype != torch.bool and target.numel():
        low, high = (float(value) for value in target.detach().aminmax())
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"target: expected a one-hot label of values between 0 and 1, got {low:g}..{high:g}; for class numbers "
                "give a label with one channel, and for a network with one channel a mask."
            )
    return target.to(probs.device, probs.dtype, non_blocking=True)
