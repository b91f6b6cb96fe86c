"""Exact signed distances on the CPU: which part of the volume the compiled passes see, and on which threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from medconstraints.distance import kernels
from medconstraints.distance.torch_maps import How

__all__ = ["class_extents", "signed_maps"]

SMALL = 1 << 16  # voxels below which threads cost more than they save
PARTS_PER_THREAD = 4  # planes with and without the object take different time
LARGEST = float(np.finfo(np.float32).max)

Box = tuple[slice, ...]
Extent = tuple[np.ndarray, np.ndarray]  # first and one past the last index on each axis
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
        return bool(kernels.label_extents(label, begin, stop, low, high, counts))

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
    how: How,
    *,
    by_slice: bool,
) -> np.ndarray:
    """Maps (len(classes), X, Y, Z) of a label (X, Y, Z) of class numbers, in C order.

    Args:
        label: uint8 or int64.
        classes: of the maps.
        extents: of `class_extents`.
        spacing_mm: of the three axes.
        how: what is measured.
        by_slice: distances within each plane of the first axis.
    """
    out = np.empty((len(classes), *label.shape), np.float32)
    with _threads(label.size) as pool:
        for row, number in enumerate(classes):
            low, high, count = (values[number] for values in extents)
            if 0 < count < label.size:
                measure = _within_planes if by_slice else _in_the_volume
                measure(_runner(pool), label, number, (low, high), spacing_mm, how, out[row])
            else:
                out[row] = 0
    return out


def _within_planes(
    run: Run, label: np.ndarray, number: int, extent: Extent, spacing_mm: Sequence[float], how: How, out: np.ndarray
) -> None:
    """Distances of one class within each plane of the first axis, into `out`."""
    # Slices know nothing of each other: no margin is needed across them.
    box = _near(extent, label.shape, spacing_mm, how.clip_mm, by_slice=True)
    part, squared = _parts(label, box, out)
    if squared is not out:
        # A slice without the class has no boundary, and a map of zeros.
        out[:] = 0
        out[box[0]][(part == number).any(axis=(1, 2))] = how.clip_mm
    clip = math.inf if how.clip_mm is None else how.clip_mm
    finish, half, (_, middle, last) = (1.0, how.shift_inside_mm, clip, 0.0), 0.5 * how.to_face, spacing_mm
    # Candidates beyond the clip distance stay, to tell "far" from "no boundary".
    run(lambda a, b: kernels.along_last(part, number, a, b, last, half, squared), len(part))
    run(lambda a, b: kernels.along_middle(squared, a, b, middle, half, LARGEST, out[box], finish), len(part))


def _in_the_volume(
    run: Run, label: np.ndarray, number: int, extent: Extent, spacing_mm: Sequence[float], how: How, out: np.ndarray
) -> None:
    """Distances of one class in the volume, into `out`."""
    box = _near(extent, label.shape, spacing_mm, how.clip_mm, by_slice=False)
    part, squared = _parts(label, box, out)
    clip, limit2 = math.inf, LARGEST
    if how.clip_mm is not None:
        # Candidates farther than the clip distance decide nothing.
        clip, limit2 = how.clip_mm, min((how.clip_mm + how.shift_inside_mm) ** 2 * 1.001, LARGEST)
    if squared is not out:
        out[:] = clip
    finish, go_on = (1.0, how.shift_inside_mm, clip, clip), (0.0, 0.0, 0.0, 0.0)
    half, (first, middle, last) = 0.5 * how.to_face, spacing_mm
    # Planes before and behind the class know nothing of it before the distance across planes is added.
    start, stop = max(int(extent[0][0]) - box[0].start - 1, 0), int(extent[1][0]) - box[0].start + 1
    squared[:start] = math.inf
    squared[stop:] = math.inf
    inner, known = part[start:stop], squared[start:stop]
    run(lambda a, b: kernels.along_last(inner, number, a, b, last, half, known), len(inner))
    run(lambda a, b: kernels.along_middle(known, a, b, middle, half, limit2, known, go_on), len(inner))
    run(lambda a, b: kernels.along_first(squared, a, b, first, half, limit2, out[box], finish), part.shape[1])


def _parts(label: np.ndarray, box: Box, out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The label in the box, and where its squared distances go: `out` itself if the box is everything."""
    part = label[box]
    if part.shape == label.shape:
        return part, out
    return np.ascontiguousarray(part), np.empty(part.shape, np.float32)


def _near(
    extent: Extent, shape: Sequence[int], spacing_mm: Sequence[float], clip_mm: float | None, *, by_slice: bool
) -> Box:
    """The extent of a class and what is nearer to it than the clip distance; at least one voxel around it."""
    if clip_mm is None:
        return tuple(slice(0, size) for size in shape)
    box = []
    for axis, (start, stop) in enumerate(zip(*(values.tolist() for values in extent), strict=True)):
        margin = math.ceil(min(clip_mm / spacing_mm[axis], shape[axis])) + 1
        margin = 0 if by_slice and axis == 0 else margin
        box.append(slice(max(start - margin, 0), min(stop + margin, shape[axis])))
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
