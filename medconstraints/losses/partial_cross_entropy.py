"""Cross-entropy of the few voxels that have a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from medconstraints.checks import choice, plain, readable
from medconstraints.formulations.base import at_least_float32
from medconstraints.losses.base import TargetLoss, one_entry

__all__ = ["PartialCrossEntropyLoss"]


class PartialCrossEntropyLoss(TargetLoss):
    """Cross-entropy over the labelled voxels alone (Kervadec 2020, section 2.4.3: H(S) = -sum_{Omega_L} log s).

    The mean of `-log s_y` over the labelled voxels of each image, then over the images that have some, so that every
    image weighs alike: five points keep their pull beside an image that is labelled in full. Voxels with `ignore_index`
    are not labelled and have no part in it. Without a labelled voxel the loss is 0, and so is its gradient. On the CPU
    only the labelled voxels are computed, which for points and scribbles is a small part of the image.

    Args:
        ignore_index: label of voxels without annotation.
        weight: weight of each class, (C,); the mean is then weighted, as in `torch.nn.CrossEntropyLoss`.
        reduction: "mean", "sum", or "none" for (B, 1, *S), 0 where there is no label.
        average: what the mean is over: "image" as above, or "batch", all labelled voxels of the batch alike, as
            published and in `torch.nn.CrossEntropyLoss`.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> weak = torch.full((1, 1, 4, 4), -1)
        >>> weak[0, 0, 1, 1] = 1
        >>> round(PartialCrossEntropyLoss()(torch.zeros(1, 2, 4, 4), weak).item(), 4)
        0.6931
    """

    target_keys = ("weak_label",)
    weight: Tensor | None

    def __init__(
        self,
        *,
        ignore_index: int = -1,
        weight: Sequence[float] | Tensor | None = None,
        reduction: str = "mean",
        average: str = "image",
    ) -> None:
        super().__init__(reduction=reduction)
        if ignore_index != int(ignore_index):
            raise ValueError(f"ignore_index: expected an integer, got {ignore_index!r}.")
        values = None if weight is None else torch.as_tensor(weight, dtype=torch.float32)
        if values is not None and (values.dim() != 1 or not bool((values.isfinite() & (values >= 0)).all())):
            raise ValueError(f"weight: expected one finite number >= 0 for each class, got {weight!r}.")
        self.ignore_index = int(ignore_index)
        self.average = choice("average", average, ("image", "batch"))
        self.register_buffer("weight", values)
        self._unlabelled: Tensor | None = None

    def forward(self, input: Tensor, target: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Loss of a batch.

        Args:
            input: logits (B, C, *S).
            target: weak label (B, 1, *S): class numbers, background 0, and `ignore_index`; or a mapping with
                "weak_label".

        Raises:
            ValueError: shapes do not fit, or a label that is no class (looked at on the CPU only).
        """
        input, target = plain(input), plain(one_entry(target, "weak_label"))
        if not input.is_floating_point() or input.dim() < 3:
            raise ValueError(
                f"input: expected floating point logits (B, C, *S), got {input.dtype} of shape {tuple(input.shape)}."
            )
        if target.shape != (input.shape[0], 1, *input.shape[2:]):
            raise ValueError(
                f"target: expected the weak label (B, 1, *S) = {(input.shape[0], 1, *input.shape[2:])}, got "
                f"{tuple(target.shape)}; give class numbers, not one-hot channels."
            )
        weight = self.weight
        if weight is not None and len(weight) != input.shape[1]:
            raise ValueError(f"weight: expected {input.shape[1]} values, one per class, got {len(weight)}.")
        with torch.autocast(input.device.type, enabled=False):
            input = at_least_float32(input)
            weight = None if weight is None else weight.to(input)
            label = target[:, 0]
            self._unlabelled = (label == self.ignore_index).flatten(1).all(1).float().mean()
            if self.reduction != "none" and readable(input):
                return self._labelled_only(input, label, weight)
            label = label.to(input.device, torch.int64)
            loss = F.cross_entropy(input, label, weight=weight, ignore_index=self.ignore_index, reduction="none")
            if self.reduction == "none":
                return loss.unsqueeze(1)
            if self.reduction == "sum":
                return loss.sum()
            labelled = label != self.ignore_index
            share = labelled.to(loss.dtype)
            if weight is not None:
                share = share * weight[label.masked_fill(~labelled, 0)]
            return self._mean(loss.flatten(1).sum(1), share.flatten(1).sum(1))

    def terms(self) -> dict[str, Tensor]:
        """Of the last forward pass: "unlabelled", the share of its images without a labelled voxel.

        They teach this loss nothing: a patch beside the annotation, or a point of one voxel that a rotation lost.
        """
        return {} if self._unlabelled is None else {"unlabelled": self._unlabelled}

    def left_out(self) -> None:
        """Nothing was looked at in this batch."""
        self._unlabelled = None

    def _labelled_only(self, input: Tensor, label: Tensor, weight: Tensor | None) -> Tensor:
        """The same from the labelled voxels alone. Elsewhere than on the CPU their number would make the host wait."""
        where = (label != self.ignore_index).nonzero(as_tuple=True)
        found = label[where]
        chosen = found.to(torch.int64)
        if not bool((found == chosen).all()):
            raise ValueError(
                f"target: expected whole class numbers, got {float(found[found != chosen][0]):g}; resample weak labels "
                'with mode "nearest".'
            )
        classes = input.shape[1]
        if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < classes:
            raise ValueError(
                f"target: expected class numbers 0..{classes - 1} or ignore_index = {self.ignore_index}, got "
                f"{int(chosen.min())}..{int(chosen.max())}; map the labels, or set ignore_index."
            )
        # Dense labels (hybrid training) are quicker in one piece; few voxels are quicker one by one.
        if len(chosen) * 8 > label.numel():
            dense = label.to(torch.int64)
            cost = F.cross_entropy(input, dense, weight=weight, ignore_index=self.ignore_index, reduction="none")
            totals = cost.flatten(1).sum(1)
        else:
            cost = F.cross_entropy(input.movedim(1, -1)[where], chosen, weight=weight, reduction="none")
            totals = cost.new_zeros(len(input)).index_add(0, where[0], cost)
        if self.reduction == "sum":
            return totals.sum()
        share = torch.ones(len(chosen), dtype=input.dtype) if weight is None else weight[chosen]
        return self._mean(totals, share.new_zeros(len(input)).index_add(0, where[0], share))

    def _mean(self, totals: Tensor, shares: Tensor) -> Tensor:
        """Of the costs and the labelled voxels, or their weights, of each image (B,)."""
        if self.average == "batch":
            return totals.sum() / _at_least(shares.sum())
        return (totals / _at_least(shares)).sum() / _at_least((shares > 0).to(shares).sum())

    def extra_repr(self) -> str:
        """Settings shown by `repr`."""
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, average={self.average!r}"


def _at_least(share: Tensor) -> Tensor:
    """No division by zero where nothing is labelled."""
    return torch.where(share > 0, share, torch.ones_like(share))
