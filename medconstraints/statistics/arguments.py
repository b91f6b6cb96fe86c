"""Checks of the arguments that every statistic takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from medconstraints.checks import plain, readable

__all__ = [
    "arguments_of",
    "checked_probs",
    "chosen_pairs",
    "is_relation",
    "relation",
    "select_channels",
    "spacing_rows",
]

_Function = TypeVar("_Function", bound=Callable[..., Tensor])


def checked_probs(probs: Tensor) -> tuple[Tensor, torch.dtype]:
    """The probability map without MONAI's metadata, and the type to sum in: at least float32.

    Half precision overflows at 65504, which the sum over a 41^3 volume already exceeds.

    Raises:
        ValueError: `probs` has no spatial axis or is not floating point.
    """
    if probs.dim() < 3 or not probs.is_floating_point():
        raise ValueError(
            f"probs: expected a floating point tensor (B, C, *S), got {probs.dtype} of shape {tuple(probs.shape)}; "
            "add the batch and channel axes or apply softmax first."
        )
    return plain(probs), torch.float64 if probs.dtype == torch.float64 else torch.float32


def spacing_rows(spacing_mm: Sequence[float] | Tensor, probs: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing as (1, D) or (B, D) on the device of `probs`.

    Values are checked where that does not make the host wait for an accelerator.

    Raises:
        ValueError: the shape fits neither the axes nor the samples, or a value is not positive.
    """
    spacing = torch.as_tensor(spacing_mm, dtype=dtype)
    dims = probs.dim() - 2
    fits = spacing.shape in ((dims,), (probs.shape[0], dims))
    if not fits or (readable(spacing) and not bool((spacing > 0).all())):
        raise ValueError(
            f"spacing_mm: expected {dims} positive values, or one row of {dims} for each of the {probs.shape[0]} "
            f"samples, got shape {tuple(spacing.shape)}: {spacing.tolist()}."
        )
    return spacing.view(-1, dims).to(probs.device, non_blocking=True)


def chosen_pairs(pairs: Sequence[Sequence[int]], probs: Tensor) -> tuple[list[int], list[int]]:
    """First and second classes of the pairs of a relation.

    Raises:
        ValueError: no pairs, or a class that does not exist.
    """
    classes = probs.shape[1]
    rows = [[*pair] if isinstance(pair, Sequence) else [] for pair in pairs] if isinstance(pairs, Sequence) else []
    if not rows or any(len(row) != 2 or not all(isinstance(number, int) for number in row) for row in rows):
        raise ValueError(f"pairs: expected pairs of class indices, such as [[1, 2]], got {pairs!r}.")
    if not all(0 <= number < classes for row in rows for number in row):
        raise ValueError(
            f"pairs: expected class indices 0..{classes - 1}, got {pairs!r}: a class that does not exist; the "
            "background is class 0."
        )
    return [row[0] for row in rows], [row[1] for row in rows]


def select_channels(values: Tensor, numbers: Sequence[int]) -> Tensor:
    """Channels (axis 1) of these numbers; a view where they follow each other."""
    first, count = numbers[0], len(numbers)
    if [*numbers] == [*range(first, first + count)]:
        return values[:, first : first + count]
    # An index that is a list would make the host wait for an accelerator.
    return values.index_select(1, torch.tensor([*numbers]).to(values.device, non_blocking=True))


_RELATIONS: set[Callable[..., Tensor]] = set()


def relation(function: _Function) -> _Function:
    """Declare a statistic whose second axis counts pairs of classes, (B, R, M), and which looks at several channels."""
    _RELATIONS.add(function)
    return function


def is_relation(statistic: Callable[..., Tensor]) -> bool:
    """Whether a statistic, or the one inside a `functools.partial`, was declared a relation."""
    while isinstance(statistic, functools.partial):
        statistic = statistic.func
    return isinstance(statistic, Hashable) and statistic in _RELATIONS


def arguments_of(statistic: Callable[..., Tensor]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Arguments of a statistic besides the probabilities: those that it needs, and those with a default."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    rest = [one for one in [*inspect.signature(statistic).parameters.values()][1:] if one.kind in named]
    needed = tuple(one.name for one in rest if one.default is inspect.Parameter.empty)
    return needed, tuple(one.name for one in rest if one.name not in needed)
