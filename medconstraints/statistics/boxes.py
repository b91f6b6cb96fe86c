"""Sums of probabilities over boxes and over bands of boxes, exact and without a loop over boxes or bands.

A box is separable: its indicator is an outer product of one indicator per axis. The sums over all lines of all boxes
are therefore matrix products with these indicators, and their gradient is one product of low rank. No mask of a band
is ever made. The small numbers (coordinates) are planned on the host in numpy, where they can be checked without
waiting for the device; only index tensors are sent to the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from medconstraints.statistics.box_plan import BoxPlan

__all__ = ["BoxSums", "box_sums", "inside_mask"]


class BoxSums(NamedTuple):
    """Probability mass in voxels, float64.

    Attributes:
        bands: of each band, (S,): left side of eq. 6.2 of Kervadec 2020.
        inside: in the union of the boxes of each image and class, (I, K).
        total: in each image, (I, K).
    """

    bands: Tensor
    inside: Tensor
    total: Tensor


def box_sums(probs: Tensor, plan: BoxPlan) -> BoxSums:
    """Probability mass of every band, inside the boxes, and of every image of a plan.

    Exact to float64 rounding; gradients are computed in float32 (float64 for float64 input), second derivatives and
    `torch.func` work. Time and memory grow with the largest number of boxes that one image and class has
    (docs/benchmarks.md).

    Args:
        probs: (B, K, *S) probabilities of the foreground classes, or (B, K + 1, *S) with the background, which is not
            read; any floating dtype, on the plan's device.
        plan: from `plan_boxes`, for this shape.

    Raises:
        ValueError: the probabilities do not have the shape that was planned.

    Example:
        >>> from medconstraints.statistics import plan_boxes
        >>> plan = plan_boxes(torch.tensor([[[1, 0, 0, 2, 3]]]), (1, 2, 4, 4), width=2)
        >>> sums = box_sums(torch.full((1, 2, 4, 4), 0.5), plan)
        >>> sums.bands.tolist(), sums.inside.tolist(), sums.total.tolist()
        ([3.0, 2.0, 1.0], [[3.0]], [[8.0]])
    """
    spatial, classes = list(plan.shape), plan.volume.shape[1]
    if plan.slice_axis is not None:
        spatial.insert(plan.slice_axis, plan.num_slices)
    if (
        probs.shape[1] not in (classes, classes + 1)
        or list(probs.shape[2:]) != spatial
        or not probs.is_floating_point()
    ):
        raise ValueError(
            f"probs: expected floating point (B, {classes + 1}, {', '.join(map(str, spatial))}) as planned, or without "
            f"the background, got {probs.dtype} of shape {tuple(probs.shape)}; plan the boxes for this shape."
        )
    return BoxSums(*_Gather.apply(probs, plan))


def inside_mask(plan: BoxPlan) -> Tensor:
    """True inside a box of the class, (I, K, *shape) bool; only needed for many overlapping boxes and voxel losses."""
    weights = [weight[:, :, 1:].float() for weight in plan.indicators]
    counts = _outer(weights[:-1]).transpose(-1, -2) @ weights[-1]
    return (counts > 0.5).view(*counts.shape[:2], *plan.shape)


def _outer(factors: list[Tensor]) -> Tensor:
    """Outer product of per-axis factors (..., n_1), (..., n_2), flattened: (..., n_1 * n_2)."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product.unsqueeze(-1) * factor.unsqueeze(-2)).flatten(-2)
    return product


def _gather(probs: Tensor, plan: BoxPlan) -> tuple[Tensor, Tensor, Tensor]:
    """Masses as `BoxSums` has them."""
    # float64: a float32 sum over 100,000 voxels is off by more than 1e-3 voxels.
    images = plan.images(probs).to(torch.float64, memory_format=torch.contiguous_format)
    flat, weights = images.flatten(2, -2), plan.indicators  # (I, K, rest, n_last)
    last = _outer(weights[:-1]) @ flat  # (I, K, M, n_last): for each slot a sum over the other axes
    profiles = [weights[-1] @ flat.transpose(-1, -2)]  # (I, K, M, rest)
    if len(plan.shape) == 3:
        planes = profiles[0].unflatten(-1, plan.shape[:2])
        profiles = [(planes @ weights[1].unsqueeze(-1)), (weights[0].unsqueeze(-2) @ planes)]
    profiles.append(last)
    lines = torch.cat([profile.reshape(-1) for profile in profiles])
    bands = lines.new_zeros(len(plan.bands.width)).index_add_(0, plan.bands.band, lines[plan.bands.line])
    slots = (last * weights[-1]).sum(-1)
    if plan.slots.sign is None:
        inside = (images * inside_mask(plan)).flatten(2).sum(-1)
    else:
        inside = (slots[..., 1:] * plan.slots.sign).sum(-1)
    return bands, inside, slots[..., 0]


def _spread(bands: Tensor, inside: Tensor, total: Tensor, plan: BoxPlan, channels: int, dtype: torch.dtype) -> Tensor:
    """The transpose of `_gather`: every voxel gets the values of the sums that hold it, (B, channels, *S)."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    weights = [weight.to(work) for weight in plan.indicators]
    sign = plan.slots.sign
    boxes = inside.new_zeros(weights[0][..., 1:, 0].shape) if sign is None else inside.unsqueeze(-1) * sign
    slots = torch.cat([total.unsqueeze(-1), boxes], -1).to(work)
    lines = torch.zeros(slots.numel() * sum(plan.shape), dtype=work, device=slots.device)
    lines[plan.bands.line] = bands.to(work)[plan.bands.band]
    sizes = [slots.numel() * size for size in plan.shape]
    profiles = [part.view(*slots.shape, -1) for part in lines.split(sizes)]
    profiles[-1] = profiles[-1] + slots.unsqueeze(-1) * weights[-1]
    rows = profiles[0]
    if len(plan.shape) == 3:
        rows = _outer([rows, weights[1]]) + _outer([weights[0], profiles[1]])
    # Slot 0, the image, has no bands: no rows.
    left = torch.cat([rows[:, :, 1:], _outer(weights[:-1])], dim=-2).transpose(-1, -2)  # (I, K, rest, 2 M - 1)
    right = torch.cat([weights[-1][:, :, 1:], profiles[-1]], dim=-2)  # (I, K, 2 M - 1, n_last)
    background = channels - left.shape[1]
    if background:
        # The background takes part with zero factors: one product then writes the whole gradient.
        left, right = (torch.nn.functional.pad(factor, (0, 0, 0, 0, background, 0)) for factor in (left, right))
    grad = (left @ right).unflatten(2, plan.shape[:-1])
    if sign is None:
        grad[:, background:] += inside.to(work)[..., *[None] * len(plan.shape)] * inside_mask(plan)
    return plan.samples(grad.to(dtype))


def _one_by_one(function: Any, info: Any, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]) -> Any:
    """Rule of `torch.func.vmap`: the plan has the layout of one batch, so the batches go one after the other."""
    found = [
        function.apply(*(a if dim is None else a.select(dim, n) for a, dim in zip(arguments, in_dims, strict=True)))
        for n in range(info.batch_size)
    ]
    if isinstance(found[0], Tensor):
        return torch.stack(found), 0
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True)), (0,) * len(found[0])


class _Gather(torch.autograd.Function):
    """`_gather` with its transpose as derivative; linear, so only the plan is kept."""

    @staticmethod
    def forward(probs: Tensor, plan: BoxPlan) -> tuple[Tensor, Tensor, Tensor]:
        return _gather(probs, plan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.plan, ctx.channels, ctx.dtype = inputs[1], inputs[0].shape[1], inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # The products of a backward pass that is run under autocast would be made in half precision.
        with torch.autocast(grads[0].device.type, enabled=False):
            return _Spread.apply(*grads, ctx.plan, ctx.channels, ctx.dtype), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _gather(tangent, ctx.plan)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return _one_by_one(_Gather, info, in_dims, arguments)


class _Spread(torch.autograd.Function):
    """`_spread` with `_gather` as derivative: second derivatives, as bilevel methods take them."""

    @staticmethod
    def forward(
        bands: Tensor, inside: Tensor, total: Tensor, plan: BoxPlan, channels: int, dtype: torch.dtype
    ) -> Tensor:
        return _spread(bands, inside, total, plan, channels, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.plan, ctx.channels, ctx.dtype = inputs[3:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_Gather.apply(grads[0], ctx.plan), None, None, None

    @staticmethod
    def jvp(ctx: Any, bands: Tensor, inside: Tensor, total: Tensor, *_: Any) -> Tensor:
        return _spread(bands, inside, total, ctx.plan, ctx.channels, ctx.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return _one_by_one(_Spread, info, in_dims, arguments)
