"""Hausdorff loss: squared errors weighted by the distances to the label's and to the prediction's boundary."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medconstraints.distance.maps import check_options, signed_distance
from medconstraints.distance.provenance import spacing_now
from medconstraints.losses.distance_target import DistanceMapCheck
from medconstraints.losses.old_base import ProbabilityLoss, plain

__all__ = ["HausdorffLoss"]


class HausdorffLoss(ProbabilityLoss):
    """Hausdorff loss from distance transforms (Karimi 2019; Kervadec 2020, section 4.3.2).

    `L_HD = mean over voxels of (g - s)^2 (D_G^alpha + D_S^alpha)`, for each sample and class, then their mean. D_G and
    D_S are the unsigned distances in mm, |signed distance|, to the boundary of the label g > 1/2 and of the prediction
    s > 1/2 (each channel by itself, no argmax). They are constants: the gradient flows through (g - s)^2 alone. A mask
    that is empty or fills the image (or the slice) has no boundary: its distance is 0. Where both have none, nothing
    pulls; a regional loss beside this one does.

    D_S changes with every prediction and is computed in every forward pass. D_G does not: give it as "distance_map",
    made once by `SignedDistanceMapd`. With a plain label it is computed anew each time, which doubles the work. Nothing
    is cached here, since a batch has no identity that survives shuffling, augmentation and workers.

    The words are those of `monai.losses.HausdorffDTLoss`, and `convention="voxel"` at a spacing of 1 gives its values;
    reduction "none" gives them without axes of length 1. Unlike there, distances know the spacing.

    Args:
        alpha: exponent of the distances, > 0; 2 in the paper. The loss is in mm^alpha.
        include_background: whether channel 0 counts. A single channel always does.
        to_onehot_y: refuse labels other than class numbers (B, 1, *S). They need not be announced: with more than one
            channel the shape of the label says what it is.
        sigmoid: apply a sigmoid to the input.
        softmax: apply a softmax over the channels of the input.
        other_act: another activation, such as `functools.partial(torch.softmax, dim=1)`; keeps the shape.
        reduction: "mean" or "sum" over samples and classes, or "none" for (B, K), K the classes that count.
        batch: mean over the samples of a class first: "sum" is then over classes, and "none" gives (K,).
        spacing_mm: spacing of every sample, D numbers; (1, 1, 1) counts in voxels. It comes after what a map with meta
            data or the target's "spacing_mm" tell; None: from the affine of a label that is a MetaTensor.
        slice_axis: None for distances in the volume; k for 2D distances in every slice across spatial axis k.
        convention: "boundary", "voxel" or "published", see `signed_distance`.
        clip_mm: largest distance; None for no limit. Values of a given map are limited as well.
        backend: of `signed_distance`. "auto" computes on the device of CUDA tensors.

    Raises:
        TypeError: `other_act` cannot be called.
        ValueError: an argument is outside its range, or more than one activation is asked for.

    Example:
        >>> label = torch.zeros(1, 1, 8, 8)
        >>> label[..., 2:6, 2:6] = 1
        >>> prediction = torch.zeros(1, 1, 8, 8)
        >>> prediction[..., 2:6, 2:7] = 1                      # one column too many, half a voxel from both boundaries
        >>> HausdorffLoss()(prediction, label).item()          # 4 pixels of 64, 0.5^2 + 0.5^2 each
        0.03125
    """

    reads_meta = True  # the affine of a label: `CombinedLoss` leaves it its meta data

    def __init__(
        self,
        *,
        alpha: float = 2.0,
        include_background: bool = False,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        reduction: str = "mean",
        batch: bool = False,
        spacing_mm: Sequence[float] | None = None,
        slice_axis: int | None = None,
        convention: str = "boundary",
        clip_mm: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(sigmoid=sigmoid, softmax=softmax, reduction=reduction)
        if other_act is not None and not callable(other_act):
            raise TypeError(
                f"other_act: expected None or a function such as torch.tanh, got {type(other_act).__name__}."
            )
        if other_act is not None and (sigmoid or softmax):
            raise ValueError("sigmoid, softmax, other_act: expected at most one activation, got two; choose one.")
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"alpha: expected a finite number > 0, got {alpha!r}; the paper uses 2.")
        if spacing_mm is not None and _rows(spacing_mm).shape not in ((2,), (3,)):
            raise ValueError(
                f"spacing_mm: expected 2 or 3 finite values > 0, one per axis, got {spacing_mm!r}; the spacing of each "
                'sample is given with the target, as "spacing_mm".'
            )
        if slice_axis is not None and (isinstance(slice_axis, bool) or slice_axis not in range(-3, 3)):
            raise ValueError(f"slice_axis: expected None, or a spatial axis 0..2 of a volume, got {slice_axis!r}.")
        check_options(convention, clip_mm, backend)
        self.alpha = float(alpha)
        self.include_background = include_background
        self.to_onehot_y = to_onehot_y
        self.other_act = other_act
        self.batch = batch
        self.spacing_mm = spacing_mm
        self.slice_axis = None if slice_axis is None else slice_axis % 3
        self.convention = convention
        self.clip_mm = clip_mm
        self.backend = backend
        self._checked_map = DistanceMapCheck()

    def forward(self, input: Tensor, target: Tensor | Mapping[str, Any]) -> Tensor:
        """Loss of a batch.

        Args:
            input: (B, C, *S), D = 2 or 3: probabilities, or logits with an activation. Background first.
            target: the label: class numbers (B, 1, *S), background 0, or one mask per channel (B, C, *S) with values in
                0..1. Or a mapping with "label", and perhaps "distance_map", its signed distances in mm (B, C, *S), of
                the same convention, spacing and slices as here, and "spacing_mm", (B, D) or (D,).

        Raises:
            ValueError: shapes do not fit, a spacing that is not positive, a map that was resampled or not decoded, or
                (looked at on the CPU; on another device the loss is NaN) label values that are no classes.
        """
        with torch.autocast(plain(input).device.type, enabled=False):
            probs = self.probabilities(input)
            if self.slice_axis is not None and probs.dim() == 4:
                raise ValueError("slice_axis: expected None for 2D images, which are slices already.")
            label, signed, given_spacing = _parts(target)
            # What the map knows is right after flips and turns too, which a number beside it does not follow.
            known = None if signed is None else spacing_now(signed)
            spacing = self._spacing(label, given_spacing if known is None else known, probs.shape)
            first = 0 if self.include_background or probs.shape[1] == 1 else 1
            truth = self._truth(plain(label), probs, first)
            if signed is not None:
                signed = self._checked_map(torch.as_tensor(signed), probs.shape)[:, first:]
            probs = probs[:, first:]
            weight = self._weight(probs.detach(), truth, signed, spacing)
            loss = ((probs - truth).square() * weight).flatten(2).mean(-1)
            if self.batch:
                loss = loss.mean(0)
            if self.reduction == "none":
                return loss
            return loss.mean() if self.reduction == "mean" else loss.sum()

    def probabilities(self, input: Tensor) -> Tensor:
        """Activated input, at least float32.

        Raises:
            ValueError: the input is no (B, C, *S), or `other_act` changes its shape.
        """
        probs = super().probabilities(input)
        if self.other_act is None:
            return probs
        activated = plain(self.other_act(probs))
        if activated.shape != probs.shape:
            raise ValueError(
                f"other_act: expected a function that keeps the shape, got {tuple(activated.shape)} for "
                f"{tuple(probs.shape)}."
            )
        return activated

    def _truth(self, label: Tensor, probs: Tensor, first: int) -> Tensor:
        """The label as one mask for each class from `first` on, in the type and on the device of the input."""
        samples, classes, *spatial = probs.shape
        if classes > 1 and label.shape == (samples, 1, *spatial):
            numbers = True
        elif label.shape == probs.shape and not (self.to_onehot_y and classes > 1):
            numbers = False
        else:
            raise ValueError(
                f"label: expected class numbers (B, 1, *S) = {(samples, 1, *spatial)}"
                f"{'' if self.to_onehot_y else f' or one mask per channel {tuple(probs.shape)}'}, got "
                f"{tuple(label.shape)}; add or remove axes"
                f"{', or set to_onehot_y=False for masks.' if self.to_onehot_y else '.'}"
            )
        label = label.to(probs.device, non_blocking=True)
        highest = classes - 1 if numbers else 1
        good = (label >= 0) & (label <= highest)
        if numbers and label.is_floating_point():
            good &= label == label.round()
        if probs.device.type == "cpu" and not bool(good.all()):
            found = f"got {float(label[~good][0]):g}"
            if numbers:
                raise ValueError(
                    f"label: expected whole class numbers 0..{highest}, {found}; map the labels, or resample them "
                    'with mode "nearest".'
                )
            raise ValueError(f"label: expected masks with values in 0..1, {found}; give class numbers as (B, 1, *S).")
        if numbers:
            index = torch.arange(first, classes, device=label.device).view(-1, *[1] * len(spatial))
            truth = (label == index).to(probs.dtype)
        else:
            truth, good = label[:, first:].to(probs.dtype), good[:, first:]
        # Looking at the values would make the host wait for an accelerator: they spoil the loss instead.
        return truth if probs.device.type == "cpu" else truth.masked_fill(~good, torch.nan)

    def _spacing(self, label: Tensor, given: Any, shape: torch.Size) -> list[tuple[float, ...]]:
        """Spacing of each sample, in mm."""
        if given is None:
            given = self.spacing_mm
        samples, dims = shape[0], len(shape) - 2
        affine = getattr(label, "affine", None)
        if given is None and affine is not None:
            # A step along axis d moves a point by column d; a 2D label may keep the affine of its volume.
            given = torch.as_tensor(affine, dtype=torch.float64)[..., :-1, :dims].norm(dim=-2)
        if given is None:
            raise ValueError(
                f'spacing_mm: expected the voxel spacing, got a plain label without one; give "spacing_mm" with the '
                f"target, as SignedDistanceMapd makes it, or spacing_mm={(1.0,) * dims} to count in voxels."
            )
        rows = _rows(given)
        if rows.shape not in ((dims,), (samples, dims)):
            raise ValueError(
                f"spacing_mm: expected {dims} finite values > 0, or one row of {dims} for each of the {samples} "
                f"samples, got {given}; give the steps along the spatial axes, in mm."
            )
        return [tuple(row) for row in np.broadcast_to(rows, (samples, dims)).tolist()]

    @torch.no_grad()
    def _weight(self, probs: Tensor, truth: Tensor, signed: Tensor | None, spacing: list[tuple[float, ...]]) -> Tensor:
        """D_G^alpha + D_S^alpha, (B, K, *S)."""
        predicted = probs > 0.5
        if signed is None:
            return self._distances(torch.stack([predicted, truth > 0.5]), spacing).to(probs).pow_(self.alpha).sum(0)
        weight = self._distances(predicted[None], spacing)[0].to(probs).pow_(self.alpha)
        distance = signed.to(probs.device, probs.dtype, non_blocking=True).abs()
        if self.clip_mm is not None:
            distance = distance.clamp(max=self.clip_mm)
        return weight.add_(distance.pow(self.alpha))

    def _distances(self, masks: Tensor, spacing: list[tuple[float, ...]]) -> Tensor:
        """Unsigned distances in mm of masks (N, B, K, *S), on the device on which they were computed."""
        if self.backend not in ("auto", "torch"):
            masks = masks.cpu()  # all in one transfer
        if len(set(spacing)) == 1:
            return self._same_spacing(masks.flatten(0, 2), spacing[0]).view(masks.shape)
        parts = [self._same_spacing(masks[:, b].flatten(0, 1), row) for b, row in enumerate(spacing)]
        return torch.stack([part.view(len(masks), *masks.shape[2:]) for part in parts], 1)

    def _same_spacing(self, masks: Tensor, spacing: tuple[float, ...]) -> Tensor:
        """The same for masks (N, *S) of one spacing."""
        distance = functools.partial(
            signed_distance, convention=self.convention, clip_mm=self.clip_mm, backend=self.backend
        )
        axis = self.slice_axis
        if masks.dim() == 3:
            return distance(masks, (1.0, *spacing), slice_axis=0).abs_()  # all images in one call
        if axis is None:
            return torch.stack([distance(mask, spacing) for mask in masks]).abs_()
        slices = masks.movedim(axis + 1, 1)
        step = (1.0, *spacing[:axis], *spacing[axis + 1 :])
        return distance(slices.flatten(0, 1), step, slice_axis=0).abs_().view(slices.shape).movedim(1, axis + 1)

    def extra_repr(self) -> str:
        """Settings shown by `repr`."""
        return (
            f"alpha={self.alpha:g}, include_background={self.include_background}, convention={self.convention!r}, "
            f"spacing_mm={self.spacing_mm}, slice_axis={self.slice_axis}, reduction={self.reduction!r}"
        )


def _parts(target: Tensor | Mapping[str, Any]) -> tuple[Tensor, Tensor | None, Any]:
    """The label, its signed distance map and the spacings, the last two None where they are not given."""
    if isinstance(target, Tensor):
        return target, None, None
    if not isinstance(target, Mapping) or not isinstance(target.get("label"), Tensor):
        got = sorted(map(str, target)) if isinstance(target, Mapping) else type(target).__name__
        raise ValueError(
            f'target: expected a label, or a mapping with the tensor "label" and perhaps "distance_map" and '
            f'"spacing_mm", got {got}; name the label\'s key in the keys of CombinedLoss.'
        )
    return target["label"], target.get("distance_map"), target.get("spacing_mm")


def _rows(spacing_mm: Any) -> np.ndarray:
    """The spacings as an array, empty if they are not positive numbers."""
    try:
        values = plain(spacing_mm).tolist() if isinstance(spacing_mm, Tensor) else spacing_mm
        rows = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        return np.empty(0)
    return rows if bool((np.isfinite(rows) & (rows > 0)).all()) else np.empty(0)
