"""Sums of probabilities over boxes and over bands of boxes, exact and without a loop over boxes or bands.

A box is separable: its indicator is an outer product of one indicator per axis. The sums over all lines of all boxes
are therefore two matrix products per class (lines along the last axis, planes across it), and their gradient is one
product of low rank. No mask of a band is ever made. The small numbers (coordinates) are planned on the host in numpy,
where they can be checked without waiting for the device; only index tensors are sent to the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medconstraints.statistics.box_plan import BoxPlan

__all__ = ["box_sums", "inside_mask"]


def _outer(factors: list[Tensor]) -> Tensor:
    """Outer product of per-axis factors (..., n_1), (..., n_2), flattened: (..., n_1 * n_2)."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product.unsqueeze(-1) * factor.unsqueeze(-2)).flatten(-2)
    return product


def _gather(probs: Tensor, plan: BoxPlan) -> tuple[Tensor, Tensor]:
    """Mass of every band and slot."""
    images = probs.unsqueeze(1) if plan.slice_axis is None else probs.movedim(2 + plan.slice_axis, 1)
    # float64: a float32 sum over 100,000 voxels is off by more than 1e-3 voxels.
    images = images[:, :, plan.first_channel :].to(torch.float64, memory_format=torch.contiguous_format)
    images = images.flatten(0, 1).flatten(2, -2)  # (I, K, R, last)
    weights = plan.indicators
    across = images @ weights[-1].transpose(-1, -2)  # (I, K, R, M)
    last = _outer(weights[:-1]) @ images  # (I, K, M, last)
    if len(plan.shape) == 2:
        profiles = [across.transpose(-1, -2), last]
    else:
        across = across.unflatten(2, plan.shape[:2])
        first = torch.einsum("ikxym,ikmy->ikmx", across, weights[1])
        second = torch.einsum("ikxym,ikmx->ikmy", across, weights[0])
        profiles = [first, second, last]
    lines = torch.cat([profile.reshape(-1) for profile in profiles])
    segments = lines.new_zeros(plan.num_segments).index_add_(0, plan.line_segment, lines[plan.line_index])
    return segments, (last * weights[-1]).sum(-1)


def _spread(segments: Tensor, slots: Tensor, plan: BoxPlan, dtype: torch.dtype) -> Tensor:
    """The transpose of `_gather`: every voxel gets the values of the bands and slots that hold it, (B, C, *S)."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    num_slots = slots.numel()
    lines = torch.zeros(num_slots * sum(plan.shape), dtype=work, device=slots.device)
    lines[plan.line_index] = segments.to(work)[plan.line_segment]
    profiles = [
        part.view(*slots.shape, size)
        for part, size in zip(lines.split([num_slots * n for n in plan.shape]), plan.shape, strict=True)
    ]
    weights = [weight.to(work) for weight in plan.indicators]
    profiles[-1] = profiles[-1] + slots.to(work).unsqueeze(-1) * weights[-1]
    rows = profiles[0]
    if len(plan.shape) == 3:
        rows = _outer([rows, weights[1]]) + _outer([weights[0], profiles[1]])
    left = torch.cat([rows, _outer(weights[:-1])], dim=-2).transpose(-1, -2)  # (I, K, R, 2 M)
    right = torch.cat([weights[-1], profiles[-1]], dim=-2)  # (I, K, 2 M, last)
    if plan.first_channel:
        # The background takes part with zero factors: one product then writes the whole gradient.
        left = torch.nn.functional.pad(left, (0, 0, 0, 0, 1, 0))
        right = torch.nn.functional.pad(right, (0, 0, 0, 0, 1, 0))
    grad = (left @ right).to(dtype)
    per_sample = 1 if plan.slice_axis is None else plan.num_slices
    grad = grad.view(-1, per_sample, grad.shape[1], *plan.shape)
    return grad.squeeze(1) if plan.slice_axis is None else grad.movedim(1, 2 + plan.slice_axis)


class _Gather(torch.autograd.Function):
    """`_gather` with its transpose as derivative; linear, so only the plan is kept."""

    @staticmethod
    def forward(probs: Tensor, plan: BoxPlan) -> tuple[Tensor, Tensor]:
        return _gather(probs, plan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.plan, ctx.dtype = inputs[1], inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # The products of a backward pass that is run under autocast would be made in half precision.
        with torch.autocast(grads[0].device.type, enabled=False):
            return _Spread.apply(*grads, ctx.plan, ctx.dtype), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> tuple[Tensor, Tensor]:
        return _gather(tangent, ctx.plan)


class _Spread(torch.autograd.Function):
    """`_spread` with `_gather` as derivative: second derivatives, as bilevel methods take them."""

    @staticmethod
    def forward(segments: Tensor, slots: Tensor, plan: BoxPlan, dtype: torch.dtype) -> Tensor:
        return _spread(segments, slots, plan, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.plan, ctx.dtype = inputs[2:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *_Gather.apply(grads[0], ctx.plan), None, None

    @staticmethod
    def jvp(ctx: Any, segments: Tensor, slots: Tensor, *_: Any) -> Tensor:
        return _spread(segments, slots, ctx.plan, ctx.dtype)


def box_sums(probs: Tensor, plan: BoxPlan) -> tuple[Tensor, Tensor]:
    """Probability mass of every band and of every slot of a plan.

    Args:
        probs: (B, C, *S) probabilities, any floating dtype, on the plan's device.
        plan: from `plan_boxes`, for this shape.

    Returns:
        `(segments, slots)` in voxels, float64: (S,) the mass of each band, left side of eq. 6.2 of Kervadec 2020, and
        (I, K, M) the mass of each slot: slot 0 the whole image, then the boxes. Exact to float64 rounding; gradients
        are computed in float32 (float64 for float64 input), second derivatives and `torch.func` work. Time and memory
        grow with the largest number of boxes that one image and class has (docs/benchmarks.md).

    Raises:
        ValueError: the probabilities do not have the shape that was planned.

    Example:
        >>> from medconstraints.statistics import plan_boxes
        >>> boxes = torch.tensor([[[1, 0, 0, 2, 3]]])
        >>> plan = plan_boxes(boxes, (1, 2, 4, 4), width=2)
        >>> segments, slots = box_sums(torch.full((1, 2, 4, 4), 0.5), plan)
        >>> segments.tolist(), slots.tolist()
        ([3.0, 2.0, 1.0], [[[8.0, 3.0]]])
    """
    spatial = list(plan.shape)
    if plan.slice_axis is not None:
        spatial.insert(plan.slice_axis, plan.num_slices)
    channels = plan.box_volume.shape[1] + plan.first_channel
    if list(probs.shape[1:]) != [channels, *spatial] or not probs.is_floating_point():
        raise ValueError(
            f"probs: expected floating point (B, {channels}, {', '.join(map(str, spatial))}) as planned, got "
            f"{probs.dtype} of shape {tuple(probs.shape)}; plan the boxes for this shape."
        )
    return _Gather.apply(probs, plan)


def inside_mask(plan: BoxPlan) -> Tensor:
    """True inside a box of the class, (I, K, *image shape) bool; only needed for overlapping boxes or voxel losses."""
    weights = [weight[:, :, 1:].float() for weight in plan.indicators]
    counts = _outer(weights[:-1]).transpose(-1, -2) @ weights[-1]
    return (counts > 0.5).view(*counts.shape[:2], *plan.shape)
