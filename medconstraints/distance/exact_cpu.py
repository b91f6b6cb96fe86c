"""Signed distance maps on the CPU with the compiled passes: which part of the volume, and on which threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from medconstraints.distance import envelopes

__all__ = ["class_extents", "signed_maps"]

SMALL = 1 << 16  # voxels below which threads cost more than they save
PARTS_PER_THREAD = 4  # planes with and without the object take different time
LARGEST = float(np.finfo(np.float32).max)

Run = Callable[[Callable[[int, int], Any], int], list[Any]]


def class_extents(label: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """First and one past the last index of each class on each axis, (C, 3) each, and its number of voxels (C,).

    None when a value is no class number 0..num_classes - 1.
    """
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def count(begin: int, stop: int) -> bool:
        low = np.full((num_classes, 3), max(label.shape), np.int64)
        high, counts = np.zeros((num_classes, 3), np.int64), np.zeros(num_classes, np.int64)
        parts.append((low, high, counts))
        return bool(envelopes.label_extents(label, begin, stop, low, high, counts))

    with _threads(label.size) as pool:
        if not all(_runner(pool)(count, label.shape[0])):
            return None
    low, high, counts = (np.stack(values) for values in zip(*parts, strict=True))
    return low.min(0), high.max(0), counts.sum(0)


def signed_maps(
    label: np.ndarray,
    classes: Sequence[int],
    extents: tuple[np.ndarray, np.ndarray, np.ndarray],
    spacing_mm: Sequence[float],
    *,
    by_slice: bool,
    to_face: bool,
    shift_inside_mm: float,
    clip_mm: float | None,
) -> np.ndarray:
    """Maps (len(classes), X, Y, Z) of a label (X, Y, Z), uint8 and in C order.

    Args:
        label: class numbers.
        classes: of the maps.
        extents: of `class_extents`.
        spacing_mm: of the three axes.
        by_slice: distances within each plane of the first axis.
        to_face: to the faces between voxels, not to the centres.
        shift_inside_mm: taken from the distances inside.
        clip_mm: largest distance, or None.
    """
    out = np.empty((len(classes), *label.shape), np.float32)
    how = _How(tuple(float(step) for step in spacing_mm), by_slice, 0.5 if to_face else 0.0, shift_inside_mm, clip_mm)
    with _threads(label.size) as pool:
        for row, number in enumerate(classes):
            if 0 < extents[2][number] < label.size:
                _one_map(_runner(pool), label, number, extents[0][number], extents[1][number], how, out[row])
            else:
                out[row] = 0
    return out


@dataclass(frozen=True)
class _How:
    """What is measured: the arguments of `signed_maps`."""

    spacing_mm: tuple[float, ...]
    by_slice: bool
    half: float
    shift_inside_mm: float
    clip_mm: float | None


def _one_map(
    run: Run, label: np.ndarray, number: int, low: np.ndarray, high: np.ndarray, how: _How, out: np.ndarray
) -> None:
    """The map of a class that lies between low and high, into `out`."""
    clip_mm, by_slice, half = how.clip_mm, how.by_slice, how.half
    box = tuple(slice(0, size) for size in label.shape)
    if clip_mm is not None:
        box = _near(low, high, label.shape, how.spacing_mm, clip_mm, by_slice)
    part = label[box]
    whole = part.shape == label.shape
    if not whole:
        part = np.ascontiguousarray(part)
        out[:] = 0 if by_slice else clip_mm
        if by_slice:
            # A slice without the class has no boundary, and a map of zeros.
            out[(part == number).any(axis=(1, 2))] = clip_mm
    squared = out if whole else np.empty(part.shape, np.float32)
    target = out[box]
    first, middle, last = how.spacing_mm
    clip, far = (math.inf if clip_mm is None else clip_mm), (0.0 if by_slice else clip_mm or 0.0)
    finish, go_on = (1.0, how.shift_inside_mm, clip, far), (0.0, 0.0, 0.0, 0.0)
    if by_slice:
        # Candidates beyond the clip distance stay, to tell "far" from "no boundary".
        run(lambda a, b: envelopes.along_last(part, number, a, b, last, half, squared), len(part))
        run(lambda a, b: envelopes.along_middle(squared, a, b, middle, half, LARGEST, target, finish), len(part))
        return
    # Candidates farther than the clip distance decide nothing.
    limit2 = LARGEST if clip_mm is None else min((clip_mm + how.shift_inside_mm) ** 2 * 1.001, LARGEST)
    # Planes before and behind the class know nothing of it before the distance across planes is added.
    start = max(int(low[0]) - box[0].start - 1, 0)
    stop = min(int(high[0]) - box[0].start + 1, len(part))
    squared[:start] = math.inf
    squared[stop:] = math.inf
    inner, known = part[start:stop], squared[start:stop]
    run(lambda a, b: envelopes.along_last(inner, number, a, b, last, half, known), stop - start)
    run(lambda a, b: envelopes.along_middle(known, a, b, middle, half, limit2, known, go_on), stop - start)
    run(lambda a, b: envelopes.along_first(squared, a, b, first, half, limit2, target, finish), part.shape[1])


def _near(
    low: np.ndarray,
    high: np.ndarray,
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    clip_mm: float,
    by_slice: bool,
) -> tuple[slice, ...]:
    """The extent of a class and what is nearer to it than the clip distance; at least one voxel around it."""
    box = []
    for axis, (start, stop) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        steps = math.ceil(min(clip_mm / spacing_mm[axis], shape[axis])) + 1
        if by_slice and axis == 0:
            box.append(slice(0, shape[0]))
        else:
            box.append(slice(max(start - steps, 0), min(stop + steps, shape[axis])))
    return tuple(box)


def _threads(voxels: int) -> Any:
    """As many threads as torch uses here: one in the worker processes of a DataLoader."""
    number = torch.get_num_threads()
    return nullcontext() if number == 1 or voxels < SMALL else ThreadPoolExecutor(number)


def _runner(pool: ThreadPoolExecutor | None) -> Run:
    def run(work: Callable[[int, int], Any], length: int) -> list[Any]:
        if pool is None:
            return [work(0, length)]
        edges = np.linspace(0, length, min(PARTS_PER_THREAD * torch.get_num_threads(), length) + 1).astype(int).tolist()
        return list(pool.map(work, edges[:-1], edges[1:]))

    return run
