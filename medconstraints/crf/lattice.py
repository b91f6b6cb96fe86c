"""Gaussian filtering in any number of dimensions, in time linear in the number of points."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from medconstraints import checks

__all__ = ["PermutohedralLattice"]


class PermutohedralLattice:
    """Sums over all points, weighted by a Gaussian of their distance.

    Adams et al. 2010, "Fast high-dimensional filtering using the permutohedral lattice": each point spreads its values
    to the d + 1 corners of the simplex that it lies in (splat), neighbouring corners mix along d + 1 directions (blur),
    and each point reads its corners again (slice). The matrix that this amounts to is nearly symmetric; its transpose,
    which gradients need, blurs in the reverse order.

    Args:
        features: position of each point in units of the Gaussian's standard deviation, (N, d); no gradient reaches it.

    Attributes:
        corners: number of corners that points touch.

    Raises:
        ValueError: another shape, values that are not finite, or so far apart that corners cannot be numbered.

    Example:
        >>> lattice = PermutohedralLattice(torch.zeros(3, 2))
        >>> lattice.filter(torch.tensor([[1.0], [2.0], [3.0]])).unique().numel()
        1
    """

    def __init__(self, features: Tensor) -> None:
        features = checks.plain(features).detach().float()
        if features.dim() != 2 or not features.numel():
            raise ValueError(f"features: expected (N, d), got shape {tuple(features.shape)}.")
        if not bool(torch.isfinite(features).all()):
            raise ValueError("features: expected finite positions; look for NaN in the image, or a width of 0.")
        dims = features.shape[1]
        remainder, rank, weights = _simplex(features)
        keys = _corner_keys(remainder, rank)
        numbers, steps = _numbered(keys)
        found, index = torch.unique(numbers, return_inverse=True)
        self.corners = len(found)
        index = index.int()
        self._index = index.view(len(features), dims + 1)
        self._weights = weights.contiguous()
        # The points of each corner, one corner after the other, for sums without collisions.
        order = index.argsort(stable=True)
        self._points, self._point_weights = (order // (dims + 1)).int(), self._weights.flatten()[order]
        here = torch.arange(self.corners, device=index.device, dtype=torch.int32)
        self._starts = torch.searchsorted(index[order], here, out_int32=True)
        # A missing neighbour is a row of zeros behind the others.
        self._neighbours = [
            torch.stack([here, *(_find(found, found + sign * step) for sign in (1, -1))], 1) for step in steps
        ]
        self._blur = weights.new_tensor([1.0, 0.5, 0.5]).expand(self.corners, 3).contiguous()
        self._scale = 1 / (1 + 2.0**-dims)

    def filter(self, values: Tensor) -> Tensor:
        """Weighted sums of the values (N, C) of all points, at each of them; differentiable."""
        if values.dim() != 2 or len(values) != len(self._index):
            raise ValueError(f"values: expected ({len(self._index)}, C), got shape {tuple(values.shape)}.")
        filtered: Tensor = _Filter.apply(values, self)
        return filtered

    def _apply(self, values: Tensor, *, reverse: bool) -> Tensor:
        values = values.float().contiguous()
        table = _sums(self._points, values, self._point_weights, self._starts)
        nothing = table.new_zeros(1, table.shape[1])
        for neighbours in reversed(self._neighbours) if reverse else self._neighbours:
            table = _sums(neighbours, torch.cat([table, nothing]), self._blur)
        return _sums(self._index, table, self._weights).mul_(self._scale)


def _sums(rows: Tensor, table: Tensor, weights: Tensor, starts: Tensor | None = None) -> Tensor:
    """Weighted sums of rows of a table, fused into one pass."""
    return F.embedding_bag(rows, table, starts, per_sample_weights=weights, mode="sum")


class _Filter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, lattice: PermutohedralLattice) -> Tensor:
        ctx.lattice = lattice
        return lattice._apply(values, reverse=False).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.lattice._apply(gradient, reverse=True).to(gradient.dtype), None


def _simplex(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each point the corner of remainder 0 (N, d + 1), the order of its coordinates, and its weights (N, d + 1)."""
    dims = features.shape[1]
    counts = torch.arange(1, dims + 1, dtype=features.dtype, device=features.device)
    # The blur has a standard deviation of sqrt(2/3) (d + 1) in the lattice's own units.
    scaled = features * (math.sqrt(2 / 3) * (dims + 1)) / (counts * (counts + 1)).sqrt()
    sums = scaled.flip(1).cumsum(1).flip(1)  # of this and the following
    zero = sums.new_zeros(len(sums), 1)
    elevated = torch.cat([sums, zero], 1) - torch.cat([zero, counts * scaled], 1)
    rounded = (elevated / (dims + 1)).round()
    remainder = rounded * (dims + 1)
    order = (elevated - remainder).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(dims + 1, device=order.device).expand_as(order))
    rank = rank + rounded.sum(1, keepdim=True).long()
    wrapped = (rank < 0).long() - (rank > dims).long()
    rank, remainder = rank + wrapped * (dims + 1), remainder + wrapped * (dims + 1)
    share = (elevated - remainder) / (dims + 1)
    weights = share.new_zeros(len(share), dims + 2)
    weights.scatter_add_(1, dims - rank, share)
    weights.scatter_add_(1, dims + 1 - rank, -share)
    weights[:, 0] += 1 + weights[:, dims + 1]
    return remainder.long(), rank, weights[:, : dims + 1]


def _corner_keys(remainder: Tensor, rank: Tensor) -> Tensor:
    """Coordinates of the corners of each point's simplex, (N, d + 1, d); the last one follows from the others."""
    dims = remainder.shape[1] - 1
    corner = torch.arange(dims + 1, device=remainder.device)[None, :, None]
    shift = corner - (dims + 1) * (rank[:, None, :dims] > dims - corner).long()
    return remainder[:, None, :dims] + shift


def _numbered(keys: Tensor) -> tuple[Tensor, list[int]]:
    """A number for each corner, and what is added to it to get to the next along each of the d + 1 directions."""
    dims = keys.shape[2]
    flat = keys.reshape(-1, dims)
    low = flat.amin(0) - (dims + 1)  # room for the neighbours
    sizes = (flat.amax(0) - low + dims + 2).tolist()
    if math.prod(sizes) >= 2**62:
        raise ValueError(
            f"features: span {[round(size / (dims + 1)) for size in sizes]} standard deviations, too many to number; "
            "take wider Gaussians."
        )
    places = [math.prod(sizes[axis + 1 :]) for axis in range(dims)]
    numbers = ((flat - low) * torch.tensor(places, device=flat.device)).sum(1)
    steps = [dims * places[axis] - sum(places[:axis] + places[axis + 1 :]) for axis in range(dims)]
    return numbers, [*steps, -sum(places)]


def _find(sorted_numbers: Tensor, wanted: Tensor) -> Tensor:
    """Where each number stands, or the row behind the last where it does not."""
    place = torch.searchsorted(sorted_numbers, wanted, out_int32=True).clamp_(max=len(sorted_numbers) - 1)
    return place.masked_fill_(sorted_numbers[place] != wanted, len(sorted_numbers))
