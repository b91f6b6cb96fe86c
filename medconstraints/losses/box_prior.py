"""Segmentation from bounding boxes: tightness, emptiness and size constraints."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from medconstraints.losses.base import ProbabilityLoss, plain
from medconstraints.statistics.box_plan import BoxPlan, plan_boxes
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
    |Omega_I|, V_O by the mean |Omega_I| of the class in the batch. The costs of a class are averaged over its images,
    each weighing as much as its boxes hold voxels (so that a voxel pulls alike in a large box and in the small box at
    the end of an organ), the tightness over the bands of an image first; then over the classes that have boxes. A
    weight and t then mean the same whatever the image size, the number of boxes, w and the dimension. An image without
    a box of a class has only the emptiness term for it.

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
        if int(width) != width or width < 1:
            raise ValueError(f"width: expected an integer >= 1 (lines per band), got {width!r}.")
        bounds = np.asarray(size_bounds, dtype=np.float64).reshape(-1, 2) if np.size(size_bounds) % 2 == 0 else None
        if (
            bounds is None
            or not len(bounds)
            or not ((bounds >= 0) & (bounds <= 1)).all()
            or (np.diff(bounds) < 0).any()
        ):
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
        self._last: tuple[Tensor, Tensor, Tensor, list[int]] | None = None

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
            outside: Tensor | None = None
            volume = torch.from_numpy(plan.box_volume).to(probs.device, non_blocking=True)
            if plan.slot_sign is None or self.emptiness == "cross_entropy":
                inside_box = inside_mask(plan)
                outside = _foreground_images(probs, plan).masked_fill(inside_box, 0)
                volume = inside_box.flatten(2).sum(-1).to(volume.dtype)
            if plan.slot_sign is not None:
                inside = (slots * plan.slot_sign).sum(-1)
            else:
                assert outside is not None
                inside = total - outside.flatten(2).sum(-1, dtype=total.dtype)
            empty = total - inside
            residual, weight, group = self._residuals(plan, segments, total, inside, empty, volume)
            cost = self.formulation(residual)
            if self.emptiness == "cross_entropy":
                assert outside is not None
                cost = torch.cat([cost, self._cross_entropy(outside)])
            self._last = residual.detach(), (cost * weight).detach(), weight, [plan.num_segments, 2 * volume.numel()]
            return self._reduce(cost * weight, group, plan, probs)

    def terms(self) -> dict[str, Tensor]:
        """Parts of the last forward pass, detached 0-dim tensors on its device: for logging.

        Keys: "tightness", "size", "emptiness" (weighted, they add up to the sum-reduced loss times its normalisation),
        and "satisfied_tightness", "satisfied_size": the share of the constraints with a residual <= 0.
        """
        if self._last is None:
            raise ValueError("terms: no forward pass has been made yet; call the loss first.")
        residual, weighted, weight, lengths = self._last
        split = [*lengths, weighted.numel() - sum(lengths)]
        terms = {name: part.sum().float() for name, part in zip(_TERMS, weighted.split(split), strict=True)}
        for name, part, used in zip(_TERMS[:2], residual.split(split)[:2], weight.split(split)[:2], strict=True):
            satisfied = ((part <= 0) & (used > 0)).sum() / (used > 0).sum()
            terms[f"satisfied_{name}"] = satisfied.nan_to_num(1.0)  # no constraint: none is violated
        return terms

    def _residuals(
        self, plan: BoxPlan, segments: Tensor, total: Tensor, inside: Tensor, empty: Tensor, volume: Tensor
    ) -> tuple[Tensor, Tensor, np.ndarray]:
        """All residuals in one vector (one call of the formulation), their weights and their image-and-class group."""
        device, num_groups = segments.device, volume.numel()
        num_classes = volume.shape[1]
        bounds = self.size_bounds
        if len(bounds) not in (1, num_classes):
            raise ValueError(
                f"size_bounds: expected one pair or {num_classes} pairs, one per foreground class, got {len(bounds)}."
            )
        has_box, groups = plan.box_volume > 0, np.arange(num_groups)
        widths = torch.from_numpy(plan.segment_width).to(device, non_blocking=True)
        # A box that the image's border cuts says nothing about how much of its visible part is filled.
        sized = (has_box & ~plan.box_cut).astype(np.float64).reshape(-1)
        lower, upper = (torch.from_numpy(np.ascontiguousarray(b)).to(device, non_blocking=True) for b in bounds.T)
        if self.normalization == "paper":
            voxels = float(np.prod(plan.shape))
            tight, size = widths - segments, torch.stack([lower * volume - total, total - upper * volume])
            tight_weight = np.full(plan.num_segments, self.tightness_weight)
            size_weight = np.tile(sized * self.size_weight / voxels, 2)
            empty_weight = np.full(num_groups, self.emptiness_weight / voxels)
        else:
            share, mean_volume = self._shares(plan)
            scale = volume.clamp(min=1)
            tight = 1 - segments / widths
            size = torch.stack([lower - inside / scale, inside / scale - upper])
            bands = np.bincount(plan.segment_group, minlength=num_groups)
            tight_weight = self.tightness_weight * (share / np.maximum(bands, 1))[plan.segment_group]
            size_weight = np.tile(sized * share * self.size_weight, 2)
            # The image count is that of the images with boxes: then a voxel outside pulls as one inside does.
            images = max(int(has_box.any(1).sum()), 1)
            empty_weight = np.full(num_groups, self.emptiness_weight / images / mean_volume.size)
            per_class = torch.from_numpy(mean_volume).to(device, non_blocking=True)
            if self.emptiness == "constraint":
                empty = empty / per_class
            else:
                empty_weight = (empty_weight.reshape(has_box.shape) / mean_volume).reshape(-1)
        weights = [tight_weight, size_weight, empty_weight]
        residuals = [tight, size.reshape(-1)]
        if self.emptiness == "constraint":
            residuals.append(empty.reshape(-1))
        weight = torch.from_numpy(np.concatenate(weights)).to(device, non_blocking=True)
        return torch.cat(residuals), weight, np.concatenate([plan.segment_group, groups, groups, groups])

    @staticmethod
    def _shares(plan: BoxPlan) -> tuple[np.ndarray, np.ndarray]:
        """Weight of every image and class, (I * K,), and the mean box volume of every class, (K,).

        Within a class an image weighs as much as its boxes, so that every voxel pulls alike: with equal weights a box
        of four voxels at the end of an organ would outweigh a large one. Classes weigh alike.
        """
        has_box = plan.box_volume > 0
        count, summed = has_box.sum(0), plan.box_volume.sum(0)
        share = plan.box_volume / np.maximum(summed, 1) / max(int((count > 0).sum()), 1)
        overall = summed.sum() / count.sum() if count.sum() else float(np.prod(plan.shape))
        return share.reshape(-1), np.where(count > 0, summed / np.maximum(count, 1), overall)

    @staticmethod
    def _cross_entropy(outside: Tensor) -> Tensor:
        """-sum log(1 - s) outside the boxes, one value per image and class."""
        # A probability of exactly 1 would give an infinite loss and a NaN gradient.
        largest = 1 - torch.finfo(outside.dtype).eps
        return -torch.log1p(-outside.clamp(max=largest)).flatten(2).sum(-1, dtype=torch.float64).reshape(-1)

    def _reduce(self, weighted: Tensor, group: np.ndarray, plan: BoxPlan, probs: Tensor) -> Tensor:
        if self.reduction == "none":
            num_classes = plan.box_volume.shape[1]
            per_sample = plan.box_volume.shape[0] // probs.shape[0]
            index = group // num_classes // per_sample * num_classes + group % num_classes
            out = weighted.new_zeros(probs.shape[0] * num_classes)
            index_dev = torch.from_numpy(index).to(probs.device, non_blocking=True)
            return out.index_add(0, index_dev, weighted).view(-1, num_classes).to(probs.dtype)
        loss = weighted.sum()
        if self.reduction == "mean" and self.normalization == "paper":
            loss = loss / plan.box_volume.shape[0]
        return loss.to(probs.dtype)

    def extra_repr(self) -> str:
        """Settings shown by `repr`."""
        return (
            f"width={self.width}, size_bounds={self.size_bounds.tolist()}, slice_axis={self.slice_axis}, "
            f"weights=({self.tightness_weight:g}, {self.size_weight:g}, {self.emptiness_weight:g}), "
            f"emptiness={self.emptiness!r}, normalization={self.normalization!r}"
        )


def _foreground_images(probs: Tensor, plan: BoxPlan) -> Tensor:
    """(B, C, *S) -> (I, K, *image shape): foreground channels, slices as images when the plan has a slice axis."""
    foreground = probs[:, plan.first_channel :]
    if plan.slice_axis is None:
        return foreground
    return foreground.movedim(2 + plan.slice_axis, 1).flatten(0, 1)
