"""Hausdorff loss: squared errors weighted by the distances to the label's and to the prediction's boundary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor

from medconstraints.checks import number, plain, readable
from medconstraints.distance.measures import Euclidean
from medconstraints.distance.provenance import spacing_now
from medconstraints.losses.base import Probabilities, ProbabilityLoss, one_entry
from medconstraints.losses.distance_target import DistanceMapCheck
from medconstraints.statistics.arguments import select_channels

__all__ = ["HausdorffLoss"]

_DEFAULT = Euclidean()


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

    The words are those of `monai.losses.HausdorffDTLoss`, and `measure=Euclidean(convention="voxel")` at a spacing of 1
    gives its values; reduction "none" gives them without axes of length 1. Unlike there, distances know the spacing.

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
        measure: how distances are measured; the same as those of a given map, whose values are limited to its `clip_mm`
            as well.

    Raises:
        TypeError: `other_act` cannot be called, or a `measure` that is not Euclidean: a prediction has no other.
        ValueError: an argument is outside its range, or more than one activation is asked for.

    Example:
        >>> label = torch.zeros(1, 1, 8, 8)
        >>> label[..., 2:6, 2:6] = 1
        >>> prediction = torch.zeros(1, 1, 8, 8)
        >>> prediction[..., 2:6, 2:7] = 1                      # one column too many, half a voxel from both boundaries
        >>> HausdorffLoss(spacing_mm=(1, 1))(prediction, label).item()     # 4 pixels of 64, 0.5^2 + 0.5^2 each
        0.03125
    """

    target_keys = ("label",)
    optional_keys = ("distance_map", "spacing_mm")
    reads_meta = True  # the affine of a label, and the spacing of a map

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
        measure: Euclidean = _DEFAULT,
    ) -> None:
        super().__init__(
            include_background=include_background,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            reduction=reduction,
        )
        if spacing_mm is not None and len(_rows(spacing_mm, 1)) != 1:
            raise ValueError(f"spacing_mm: expected 2 or 3 finite values > 0, one per axis, got {spacing_mm!r}.")
        if not isinstance(measure, Euclidean):
            raise TypeError(f"measure: expected Euclidean(...), got {type(measure).__name__}.")
        self.alpha = number("alpha", alpha, above=0.0)
        self.to_onehot_y = to_onehot_y
        self.batch = batch
        self.spacing_mm = spacing_mm
        self.measure = measure
        self._checked_map = DistanceMapCheck()

    # Distances of a prediction are measured on the host, or in loops over its extent: a break in a compiled graph.
    @torch.compiler.disable
    def forward(
        self, input: Tensor, target: Tensor | Mapping[str, Any], *, probabilities: Probabilities | None = None
    ) -> Tensor:
        """Loss of a batch.

        Args:
            input: (B, C, *S), D = 2 or 3: probabilities, or logits with an activation. Background first.
            target: the label: class numbers (B, 1, *S), background 0, or one mask per channel (B, C, *S) with values in
                0..1. Or a mapping with "label", and perhaps "distance_map", its signed distances in mm (B, C, *S), of
                the same measure and spacing as here, and "spacing_mm", (B, D) or (D,).
            probabilities: of this input, if they are shared with other losses.

        Raises:
            ValueError: shapes do not fit, a spacing that is not positive, a map that was resampled or not decoded, or
                (looked at on the CPU; on another device the loss is NaN) label values that are no classes.
        """
        with torch.autocast(input.device.type, enabled=False):
            probabilities = probabilities or self.probabilities(input)
            channels = self.channel_numbers(input.shape[1])
            label, signed, given_spacing = _parts(target)
            # What the map knows is right after flips and turns too, which a number beside it does not follow.
            known = None if signed is None else spacing_now(signed)
            spacing = self._spacing(label, given_spacing if known is None else known, input.shape)
            probs = probabilities.channels(channels)
            truth = self._truth(plain(label), input.shape, channels, probs)
            if signed is not None:
                signed = select_channels(self._checked_map(torch.as_tensor(signed), input.shape), channels)
            weight = self._weight(probs.detach(), truth, signed, spacing)
            cost = ((probs - truth).square() * weight).flatten(2).mean(-1)
            return self.reduced(cost.mean(0) if self.batch else cost)

    def _truth(self, label: Tensor, shape: torch.Size, channels: list[int], probs: Tensor) -> Tensor:
        """The label as one mask for each channel that counts, like the probabilities."""
        samples, classes, *spatial = shape
        numbers = classes > 1 and label.shape == (samples, 1, *spatial)
        if not numbers and (label.shape != shape or (self.to_onehot_y and classes > 1)):
            raise ValueError(
                f"label: expected class numbers (B, 1, *S) = {(samples, 1, *spatial)}, or without to_onehot_y one mask "
                f"per channel {tuple(shape)}, got {tuple(label.shape)}; add or remove axes."
            )
        label = label.to(probs.device, non_blocking=True)
        highest = classes - 1 if numbers else 1
        good = (label >= 0) & (label <= highest)
        if numbers and label.is_floating_point():
            good &= label == label.round()
        if readable(probs) and not bool(good.all()):
            expected = f"whole class numbers 0..{highest}" if numbers else "masks with values in 0..1"
            raise ValueError(
                f"label: expected {expected}, got {float(label[~good][0]):g}; map the labels, resample them with mode "
                '"nearest", or give class numbers as (B, 1, *S).'
            )
        if numbers:
            index = torch.tensor(channels).view(-1, *[1] * len(spatial))
            truth = (label == index.to(label.device, non_blocking=True)).to(probs.dtype)
        else:
            truth, good = select_channels(label, channels).to(probs.dtype), select_channels(good, channels)
        # Looking at the values would make the host wait for an accelerator: they spoil the loss instead.
        return truth if readable(probs) else truth.masked_fill(~good, torch.nan)

    def _spacing(self, label: Tensor, given: Any, shape: torch.Size) -> list[tuple[float, ...]]:
        """Spacing of each sample, in mm."""
        samples, dims = shape[0], len(shape) - 2
        if given is None:
            given = self.spacing_mm
        if given is None and isinstance(label, MetaTensor):
            # A step along axis d moves a point by column d; a 2D label may keep the affine of its volume.
            given = torch.as_tensor(label.affine, dtype=torch.float64)[..., :-1, :dims].norm(dim=-2)
        if given is None:
            raise ValueError(
                f'spacing_mm: expected the voxel spacing, got a plain label without one; give "spacing_mm" with the '
                f"target, as SignedDistanceMapd makes it, or spacing_mm={(1.0,) * dims} to count in voxels."
            )
        rows = _rows(given, samples)
        if len(rows) != samples or len(rows[0]) != dims:
            raise ValueError(
                f"spacing_mm: expected {dims} finite values > 0, or one row of {dims} for each of the {samples} "
                f"samples, got {given}; give the steps along the spatial axes, in mm."
            )
        return rows

    @torch.no_grad()
    def _weight(self, probs: Tensor, truth: Tensor, signed: Tensor | None, spacing: list[tuple[float, ...]]) -> Tensor:
        """D_G^alpha + D_S^alpha, (B, K, *S)."""
        predicted = probs > 0.5
        if signed is None:
            return self._distances(torch.stack([predicted, truth > 0.5]), spacing).to(probs).pow_(self.alpha).sum(0)
        weight = self._distances(predicted[None], spacing)[0].to(probs).pow_(self.alpha)
        distance = signed.to(probs.device, probs.dtype, non_blocking=True).abs()
        if self.measure.clip_mm is not None:
            distance = distance.clamp(max=self.measure.clip_mm)
        return weight.add_(distance.pow(self.alpha))

    def _distances(self, masks: Tensor, spacing: list[tuple[float, ...]]) -> Tensor:
        """Unsigned distances in mm of masks (N, B, K, *S), on the device on which they were computed."""
        return _Distances.apply(masks, self.measure, spacing)

    def extra_repr(self) -> str:
        """Settings shown by `repr`."""
        return (
            f"alpha={self.alpha:g}, include_background={self.include_background}, measure={self.measure}, "
            f"spacing_mm={self.spacing_mm}, reduction={self.reduction!r}"
        )


class _Distances(torch.autograd.Function):
    """Unsigned distances of masks: no gradient. A function, as `torch.func` hands those the tensors themselves."""

    @staticmethod
    def forward(masks: Tensor, measure: Euclidean, spacing: list[tuple[float, ...]]) -> Tensor:
        if measure.backend == "numba":
            masks = masks.cpu()  # all in one transfer
        if len(set(spacing)) == 1:
            return measure.of_masks(masks.flatten(0, 2), spacing[0]).abs_().view(masks.shape)
        parts = [measure.of_masks(masks[:, b].flatten(0, 1), row) for b, row in enumerate(spacing)]
        return torch.stack([part.abs_().view(len(masks), *masks.shape[2:]) for part in parts], 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        return None, None, None


def _parts(target: Tensor | Mapping[str, Any]) -> tuple[Tensor, Tensor | None, Any]:
    """The label, its signed distance map and the spacings, the last two None where they are not given."""
    label = one_entry(target, "label")
    if isinstance(target, Tensor):
        return label, None, None
    return label, target.get("distance_map"), target.get("spacing_mm")


def _rows(spacing_mm: Any, samples: int) -> list[tuple[float, ...]]:
    """The spacing of each sample; empty if they are not positive numbers, 2 or 3 for all or for each."""
    try:
        rows = torch.as_tensor(spacing_mm, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        return []
    if rows.dim() not in (1, 2) or rows.shape[-1] not in (2, 3) or not bool((rows.isfinite() & (rows > 0)).all()):
        return []
    return [tuple(row) for row in plain(rows.expand(samples, -1) if rows.dim() == 1 else rows).tolist()]
