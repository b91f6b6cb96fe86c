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


def _indicator(plan: BoxPlan, axis: int, dtype: torch.dtype) -> Tensor:
    """1 where a slot covers a coordinate of `axis`: (I, K, M, size)."""
    grid = torch.arange(plan.shape[axis], device=plan.starts.device)
    return (grid >= plan.starts[..., axis, None]).logical_and_(grid < plan.stops[..., axis, None]).to(dtype)


def _outer(factors: list[Tensor]) -> Tensor:
    """Outer product of per-axis factors (..., n_1), (..., n_2), flattened: (..., n_1 * n_2)."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product.unsqueeze(-1) * factor.unsqueeze(-2)).flatten(-2)
    return product


def _as_images(probs: Tensor, plan: BoxPlan) -> Tensor:
    """(B, C, *S) -> (B, slices or 1, C, *image shape), a view."""
    return probs.unsqueeze(1) if plan.slice_axis is None else probs.movedim(2 + plan.slice_axis, 1)


class _BoxSums(torch.autograd.Function):
    """Sums over bands and slots; linear in the probabilities, so only the plan is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, probs: Tensor, plan: BoxPlan) -> tuple[Tensor, Tensor]:
        dims = len(plan.shape)
        ctx.plan, ctx.probs_shape, ctx.dtype = plan, probs.shape, probs.dtype
        # float64: a float32 sum over 100,000 voxels is off by more than 1e-3 voxels.
        images = _as_images(probs, plan)[:, :, plan.first_channel :].to(
            torch.float64, memory_format=torch.contiguous_format
        )
        images = images.flatten(0, 1).flatten(2, -2)  # (I, K, R, last)
        weights = [_indicator(plan, axis, torch.float64) for axis in range(dims)]
        across = images @ weights[-1].transpose(-1, -2)  # (I, K, R, M)
        last = _outer(weights[:-1]) @ images  # (I, K, M, last)
        if dims == 2:
            profiles = [across.transpose(-1, -2), last]
        else:
            across = across.unflatten(2, plan.shape[:2])
            first = torch.einsum("ikxym,ikmy->ikmx", across, weights[1])
            second = torch.einsum("ikxym,ikmx->ikmy", across, weights[0])
            profiles = [first, second, last]
        lines = torch.cat([p.reshape(-1) for p in profiles])
        segments = lines.new_zeros(plan.num_segments).index_add_(0, plan.line_segment, lines[plan.line_index])
        ctx.weights = weights
        return segments, (last * weights[-1]).sum(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        with torch.autocast(grads[0].device.type, enabled=False):
            return _BoxSums._gradient(ctx, *grads), None

    @staticmethod
    def _gradient(ctx: Any, grad_segments: Tensor, grad_slots: Tensor) -> Tensor:
        plan, dims = ctx.plan, len(ctx.plan.shape)
        work = torch.float64 if ctx.dtype == torch.float64 else torch.float32
        num_slots = grad_slots.numel()
        lines = torch.zeros(num_slots * sum(plan.shape), dtype=work, device=grad_slots.device)
        lines[plan.line_index] = grad_segments.to(work)[plan.line_segment]
        profiles = [
            part.view(*grad_slots.shape, size)
            for part, size in zip(lines.split([num_slots * n for n in plan.shape]), plan.shape, strict=True)
        ]
        weights = [weight.to(work) for weight in ctx.weights]
        profiles[-1] = profiles[-1] + grad_slots.to(work).unsqueeze(-1) * weights[-1]
        rows = profiles[0]
        if dims == 3:
            rows = _outer([rows, weights[1]]) + _outer([weights[0], profiles[1]])
        left = torch.cat([rows, _outer(weights[:-1])], dim=-2).transpose(-1, -2)  # (I, K, R, 2 M)
        right = torch.cat([weights[-1], profiles[-1]], dim=-2)  # (I, K, 2 M, last)
        if plan.first_channel:
            # The background takes part with zero factors: one product then writes the whole gradient.
            left = torch.nn.functional.pad(left, (0, 0, 0, 0, 1, 0))
            right = torch.nn.functional.pad(right, (0, 0, 0, 0, 1, 0))
        grad = (left @ right).to(ctx.dtype)
        if plan.slice_axis is None:
            return grad.view(ctx.probs_shape)
        batch, channels = ctx.probs_shape[:2]
        return grad.view(batch, -1, channels, *plan.shape).movedim(1, 2 + plan.slice_axis)


def box_sums(probs: Tensor, plan: BoxPlan) -> tuple[Tensor, Tensor]:
    """Probability mass of every band and of every slot of a plan.

    Args:
        probs: (B, C, *S) probabilities, any floating dtype, on the plan's device.
        plan: from `plan_boxes`, for this shape.

    Returns:
        `(segments, slots)` in voxels, float64: (S,) the mass of each band, left side of eq. 6.2 of Kervadec 2020, and
        (I, K, M) the mass of each slot: slot 0 the whole image, then the boxes. Exact to float64 rounding; gradients
        are computed in float32 (float64 for float64 input). First derivatives only.

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
        spatial.insert(plan.slice_axis, plan.box_volume.shape[0] // probs.shape[0])
    channels = plan.box_volume.shape[1] + plan.first_channel
    if list(probs.shape[1:]) != [channels, *spatial] or not probs.is_floating_point():
        raise ValueError(
            f"probs: expected floating point (B, {channels}, {', '.join(map(str, spatial))}) as planned, got "
            f"{probs.dtype} of shape {tuple(probs.shape)}; plan the boxes for this shape."
        )
    return _BoxSums.apply(probs, plan)


def inside_mask(plan: BoxPlan) -> Tensor:
    """True inside a box of the class, (I, K, *image shape) bool; only needed for overlapping boxes or voxel losses."""
    weights = [_indicator(plan, axis, torch.float32)[:, :, 1:] for axis in range(len(plan.shape))]
    counts = _outer(weights[:-1]).transpose(-1, -2) @ weights[-1]
    return (counts > 0.5).view(*counts.shape[:2], *plan.shape)
