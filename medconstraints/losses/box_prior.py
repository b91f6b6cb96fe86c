"""Segmentation from bounding boxes: tightness, emptiness and size constraints."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medconstraints.losses.old_base import ProbabilityLoss, plain
from medconstraints.statistics.box_plan import BoxPlan, check_width, plan_boxes, to_device
from medconstraints.statistics.boxes import box_sums, inside_mask

__all__ = ["BoxPriorLoss"]

_TERMS = ("tightness", "size", "emptiness")


class BoxPriorLoss(ProbabilityLoss):
    """Box tightness prior with emptiness and size constraints (Kervadec 2020, chapter 6, eq. 6.6).

    For every image and class, with Omega_I the voxels inside its boxes, V_I and V_O the soft size inside and outside,
    and psi the formulation:

    - tightness: a band of w lines of a box holds at least w voxels of the class, psi(w - sum_band s) (eq. 6.2);
    - size: lower |Omega_I| <= V_I <= upper |Omega_I|, one psi for each side (eq. 6.3);
    - emptiness: nothing outside the boxes, psi(V_O) (eq. 6.1), or the cross-entropy -sum_outside log(1 - s) instead.

    `normalization="relative"` (default) divides each residual by its own scale: a band's by its width, a size by
    |Omega_I|, V_O by the mean |Omega_I| of the class in the batch. Tightness is averaged over the bands of an image,
    then tightness and size over the images of the class, each weighing as much as its boxes hold voxels; emptiness is
    summed over all images and divided by the number of images with boxes; then all over the classes that have boxes.
    In this way a voxel pulls alike inside a large box, inside the small box at the end of an organ, and outside, and a
    weight means the same whatever the image size and the number of boxes. An image without a box of a class has only
    the emptiness term for it.

    `normalization="paper"` is eq. 6.6 as published: residuals in voxels, the tightness a plain sum over bands, V the
    size in the whole image, size and emptiness divided by the number of voxels of the image, sums over classes, mean
    over images. The published weights are `tightness_weight=1e-4` and 1 for the others, `size_bounds=(0.5, 0.9)`.

    Args:
        formulation: module `residual -> cost`, elementwise, such as `LogBarrierExtension()` or `QuadraticPenalty()`.
        width: lines per band, w, in voxels.
        size_bounds: smallest and largest share of its boxes that an object fills, 0 <= lower <= upper <= 1, or one such
            pair for each foreground class. `fit_size_bounds` fits them to a few segmented cases.
        slice_axis: None when boxes span the volume; 0, 1 or 2 when every object has one flat box per slice across that
            spatial axis. Each slice is then an image of its own (the setting of the thesis).
        tightness_weight: weight of the tightness term.
        size_weight: weight of the size term.
        emptiness_weight: weight of the emptiness term.
        emptiness: "constraint" or "cross_entropy".
        normalization: "relative" or "paper".
        sigmoid: apply a sigmoid to the input.
        softmax: apply a softmax over the channels of the input.
        reduction: "mean" or "sum" over images (one and the same for "relative", which is an average already), or "none"
            for the part of each sample and foreground class in that sum, (B, K).

    Raises:
        TypeError: the formulation is not a module.
        ValueError: an argument is outside its range.

    Example:
        >>> from medconstraints.formulations import LogBarrierExtension
        >>> loss = BoxPriorLoss(LogBarrierExtension(), softmax=True)
        >>> boxes = torch.tensor([[[1, 2, 2, 12, 12]]])      # class 1 in rows 2..11 and columns 2..11
        >>> float(loss(torch.zeros(1, 2, 16, 16), boxes)) > 0
        True
    """

    def __init__(
        self,
        formulation: nn.Module,
        *,
        width: int = 5,
        size_bounds: Sequence[float] | Sequence[Sequence[float]] = (0.5, 0.9),
        slice_axis: int | None = None,
        tightness_weight: float = 1.0,
        size_weight: float = 1.0,
        emptiness_weight: float = 1.0,
        emptiness: str = "constraint",
        normalization: str = "relative",
        sigmoid: bool = False,
        softmax: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__(sigmoid=sigmoid, softmax=softmax, reduction=reduction)
        if not isinstance(formulation, nn.Module):
            raise TypeError(
                f"formulation: expected a module such as LogBarrierExtension(), got {type(formulation).__name__}."
            )
        check_width(width)
        try:
            bounds = np.asarray(size_bounds, dtype=np.float64).reshape(-1, 2)
        except (TypeError, ValueError):
            bounds = np.zeros((0, 2))
        if not len(bounds) or not ((bounds >= 0) & (bounds <= 1)).all() or (np.diff(bounds) < 0).any():
            raise ValueError(
                "size_bounds: expected (lower, upper) shares of the box with 0 <= lower <= upper <= 1, or one such "
                f"pair per foreground class, got {size_bounds!r}."
            )
        for name, weight in zip(_TERMS, (tightness_weight, size_weight, emptiness_weight), strict=True):
            if not (np.isfinite(weight) and weight >= 0):
                raise ValueError(f"{name}_weight: expected a finite number >= 0, got {weight!r}; 0 drops the term.")
        if emptiness not in ("constraint", "cross_entropy"):
            raise ValueError(f'emptiness: expected "constraint" or "cross_entropy", got {emptiness!r}.')
        if normalization not in ("relative", "paper"):
            raise ValueError(f'normalization: expected "relative" or "paper", got {normalization!r}.')
        self.formulation = formulation
        self.width = int(width)
        self.size_bounds = bounds
        self.slice_axis = slice_axis
        self.tightness_weight, self.size_weight = float(tightness_weight), float(size_weight)
        self.emptiness_weight = float(emptiness_weight)
        self.emptiness = emptiness
        self.normalization = normalization
        self._last: tuple[Tensor, Tensor, Tensor, list[int], int] | None = None

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Loss of a batch.

        Args:
            input: (B, C, *S), D = 2 or 3: probabilities, or logits with `softmax` or `sigmoid`. Background first; with
                C = 1 the channel is class 1.
            target: boxes (B, N, 1 + 2 D) int, rows [class, start_1..start_D, stop_1..stop_D], half-open, class -1 =
                padding. Best on the CPU, whatever the input's device (see `plan_boxes`).

        Raises:
            TypeError: the boxes are not integers.
            ValueError: shapes do not fit, or a box is not valid; the message names the sample and the row.
        """
        with torch.autocast(input.device.type, enabled=False):
            probs = self.probabilities(input)
            plan = plan_boxes(
                plain(target), probs.shape, width=self.width, slice_axis=self.slice_axis, device=probs.device
            )
            segments, slots = box_sums(probs, plan)
            total = slots[..., 0]
            outside_mask = None
            if plan.slot_sign is None or self.emptiness == "cross_entropy":
                outside_mask = ~inside_mask(plan)
            if plan.slot_sign is not None:
                inside = (slots * plan.slot_sign).sum(-1)
            else:
                assert outside_mask is not None
                inside = total - _images(probs, plan).mul(outside_mask).flatten(2).sum(-1, dtype=total.dtype)
            masses = [segments, *[(total if self.normalization == "paper" else inside).reshape(-1)] * 2]
            if self.emptiness == "constraint":
                masses.append((total - inside).reshape(-1))
            offset, scale, weight = to_device(self._scales(plan), probs.device)
            mass = torch.cat(masses)
            residual = torch.addcmul(offset[: len(mass)], scale[: len(mass)], mass)
            cost = self.formulation(residual)
            if self.emptiness == "cross_entropy":
                assert outside_mask is not None
                log_background = _images(self._log_complement(probs, plain(input)), plan)
                missed = -log_background.mul(outside_mask).flatten(2).sum(-1, dtype=cost.dtype)
                cost = torch.cat([cost, missed.reshape(-1)])
            # "relative" is a mean already.
            images = len(plan.box_volume) if self.normalization == "paper" and self.reduction == "mean" else 1
            lengths = [len(segments), 2 * total.numel(), total.numel()]
            self._last = residual.detach(), cost.detach(), weight, lengths, images
            return self._reduce(cost, weight, images, plan).to(probs.dtype)

    def terms(self) -> dict[str, Tensor]:
        """Parts of the last forward pass, detached 0-dim tensors on its device: for logging.

        Keys: "tightness", "size", "emptiness": weighted, they add up to the loss ("none" to the sum of its entries);
        "satisfied_tightness", "satisfied_size": share of the constraints with a residual <= 0, 1 in a batch without
        such a constraint. The share of a term whose weight is 0 is left out.
        """
        if self._last is None:
            raise ValueError("terms: no forward pass has been made yet; call the loss first.")
        residual, cost, weight, lengths, divisor = self._last
        parts = (cost * weight / divisor).split(lengths)
        terms = {name: part.sum().float() for name, part in zip(_TERMS, parts, strict=True)}
        start = 0
        for name, length, used_at_all in zip(
            _TERMS[:2], lengths[:2], (self.tightness_weight > 0, self.size_weight > 0), strict=True
        ):
            if used_at_all:
                met, used = residual[start : start + length] <= 0, weight[start : start + length] > 0
                terms[f"satisfied_{name}"] = ((met & used).sum() / used.sum()).nan_to_num(1.0)
            start += length
        return terms

    def _scales(self, plan: BoxPlan) -> np.ndarray:
        """Every residual is `offset + scale * mass`, every cost has a weight: (3, R) float64.

        R counts the bands, then the lower and upper size bounds and the emptiness of every image and class.
        """
        volume, width = plan.box_volume, plan.segment_width
        bounds = self.size_bounds
        if len(bounds) not in (1, volume.shape[1]):
            raise ValueError(
                f"size_bounds: expected one pair or {volume.shape[1]} pairs, one per foreground class, got "
                f"{len(bounds)}."
            )
        empty_scale: float | np.ndarray
        empty_weight: float | np.ndarray
        # A box that the image's border cuts says nothing about how much of its visible part is filled.
        sized = (volume > 0) & ~plan.box_cut
        if self.normalization == "paper":
            voxels = float(np.prod(plan.shape))
            tight = width, -np.ones_like(width), np.ones_like(width)
            object_scale = np.ones_like(volume)
            lower, upper = bounds[:, 0] * volume, bounds[:, 1] * volume
            size_weight, empty_scale, empty_weight = sized / voxels, 1.0, 1 / voxels
        else:
            share, mean_volume, images = _relative_scales(plan)
            bands = np.bincount(plan.segment_group, minlength=volume.size)
            tight = np.ones_like(width), -1 / width, (share.reshape(-1) / np.maximum(bands, 1))[plan.segment_group]
            object_scale = 1 / np.maximum(volume, 1)
            lower, upper = bounds[:, 0], bounds[:, 1]
            size_weight, empty_scale, empty_weight = sized * share, 1 / mean_volume, images
            if self.emptiness == "cross_entropy":
                empty_weight = empty_weight / mean_volume
        groups = np.empty((3, 3, *volume.shape))  # offset, scale, weight of lower bound, upper bound, emptiness
        groups[:, 0] = np.broadcast_to(lower, volume.shape), -object_scale, self.size_weight * size_weight
        groups[:, 1] = np.broadcast_to(-upper, volume.shape), object_scale, self.size_weight * size_weight
        for row, value in enumerate((0.0, empty_scale, self.emptiness_weight * empty_weight)):
            groups[row, 2] = value
        tight_rows = np.stack([tight[0], tight[1], self.tightness_weight * tight[2]])
        return np.concatenate([tight_rows, groups.reshape(3, -1)], axis=1)

    def _log_complement(self, probs: Tensor, input: Tensor) -> Tensor:
        """log(1 - s), (B, C, *S), with a slope also where s is rounded to 1."""
        if self.sigmoid:
            return F.logsigmoid(-input.to(probs.dtype))
        if self.softmax:
            # 1 - s_k as the sum of the other channels: those before k and those behind it, without a subtraction.
            before = F.pad(probs.movedim(1, -1).cumsum(-1)[..., :-1], (1, 0))
            behind = F.pad(probs.movedim(1, -1).flip(-1).cumsum(-1)[..., :-1], (1, 0)).flip(-1)
            return (before + behind).movedim(-1, 1).clamp(min=torch.finfo(probs.dtype).tiny).log()
        return torch.log1p(-probs.clamp(max=1 - torch.finfo(probs.dtype).eps))

    def _reduce(self, cost: Tensor, weight: Tensor, divisor: int, plan: BoxPlan) -> Tensor:
        if self.reduction != "none":
            return (cost * weight).sum() / divisor
        images, num_classes = plan.box_volume.shape
        groups = np.arange(images * num_classes)
        group = np.concatenate([plan.segment_group, groups, groups, groups])
        index = group // num_classes // plan.num_slices * num_classes + group % num_classes
        out = cost.new_zeros(images // plan.num_slices * num_classes)
        return out.index_add(0, to_device(index, cost.device), cost * weight).view(-1, num_classes)

    def extra_repr(self) -> str:
        """Settings shown by `repr`."""
        return (
            f"width={self.width}, size_bounds={self.size_bounds.tolist()}, slice_axis={self.slice_axis}, "
            f"weights=({self.tightness_weight:g}, {self.size_weight:g}, {self.emptiness_weight:g}), "
            f"emptiness={self.emptiness!r}, normalization={self.normalization!r}"
        )


def _relative_scales(plan: BoxPlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales of the "relative" normalisation.

    Returns:
        The weight of every image and class, (I, K), by the voxels of its boxes, adding up to 1; the mean box volume of
        every class, (K,); the weight of the emptiness of one image, (K,). A class without a box in the batch takes the
        means over the others; without any box the image is the scale.
    """
    count, volume = (plan.box_volume > 0).sum(0).astype(np.float64), plan.box_volume.sum(0)
    present = count > 0
    classes = max(int(present.sum()), 1)
    if present.any():
        images, voxels = count[present].mean(), volume[present].mean()
    else:
        images, voxels = float(len(plan.box_volume)), float(len(plan.box_volume) * np.prod(plan.shape))
    images, voxels = np.where(present, count, images), np.where(present, volume, voxels)
    return plan.box_volume / voxels / classes, voxels / images, 1 / (images * classes)


def _images(values: Tensor, plan: BoxPlan) -> Tensor:
    """(B, C, *S) -> (I, K, *image shape): foreground channels, slices as images when the plan has a slice axis."""
    foreground = values[:, plan.first_channel :]
    if plan.slice_axis is None:
        return foreground
    return foreground.movedim(2 + plan.slice_axis, 1).flatten(0, 1)
