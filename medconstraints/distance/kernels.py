"""Compiled passes of exact signed distances: lower envelopes along one axis after the other, both sides at once.

After Felzenszwalb and Huttenlocher (2012) and Meijster et al. (2000), with two changes. A line is worked off in runs of
voxels of one side: the voxel beyond the end of a run is on the other side and therefore at distance 0, so no voxel
behind it can be nearer, and one pass gives the distances of both sides. And the cost of `n` steps is that of the
convention, which is convex in each, so that two candidates change places only once along a line.

The functions release the interpreter's lock and write into arrays they are given; `numba_maps` calls them from threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

__all__ = ["along_first", "along_last", "along_middle", "compiled", "inlined", "label_extents"]

INF = np.float32(np.inf)
TILE = 16  # lines at a time: their elements side by side fill one line of the cache


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The function, compiled at its first call; kept on disk, unless neither its folder nor the home can be written."""
    try:
        result: Callable[..., Any] = njit(cache=True, nogil=True, error_model="numpy", **options)(function)
    except RuntimeError:  # "no locator available": an installation for reading only, without a home
        result = njit(nogil=True, error_model="numpy", **options)(function)
    return result


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a small function that becomes a part of those that call it."""
    return compiled(function, inline="always")


@inlined
def _cost(steps: float, half: float, step2: float) -> float:
    """Squared distance over a number of steps; `half` is 0.5 where it is measured to the face, 0 to the centre."""
    steps = abs(steps) - half
    return steps * steps * step2 if steps > 0 else 0.0


@inlined
def _first_better(i: int, j: int, difference: float, half: float) -> float:
    """First x at which candidate j beats i < j, where difference = (g_j - g_i) / step^2; not rounded to the run."""
    gap = j - i
    if half == 0.0:
        return math.floor((difference / gap + i + j) / 2) + 1
    reach = (gap - 0.5) * (gap - 0.5)
    if difference >= reach:  # only right of both
        return math.floor((difference / gap + i + j + 1) / 2) + 1
    if difference < -reach:  # already left of both
        return min(math.floor((difference / gap + i + j - 1) / 2) + 1, i)
    if gap == 1:
        return j
    return min(max(math.floor((difference / (gap - 1) + i + j) / 2) + 1, i + 1), j)


@compiled
def _envelope(line, length, step, half, limit2, place, value, start):  # type: ignore[no-untyped-def]
    """Signed squared distances of one line: from those over the axes before to those over this axis too.

    line: (length,), > 0 outside and < 0 inside, infinite where nothing is known yet. place, value, start: buffers of
    length + 3. Candidates above `limit2` are left out.
    """
    step2 = step * step
    first = 0
    while first < length:
        inside = line[first] < 0
        last = first + 1
        while last < length and (line[last] < 0) == inside:
            last += 1
        sign = -1.0 if inside else 1.0
        count = 0
        if first > 0:
            place[0], value[0], start[0] = first - 1, 0.0, first
            count = 1
        closed = last < length
        for x in range(first, last + (1 if closed else 0)):
            g = abs(line[x]) if x < last else 0.0
            if g > limit2:
                continue
            begin = first
            while count > 0:
                # The candidate before is never best if the new one beats it where it starts to be best.
                at = start[count - 1]
                if g + _cost(x - at, half, step2) < value[count - 1] + _cost(place[count - 1] - at, half, step2):
                    count -= 1
                    continue
                begin = int(_first_better(place[count - 1], x, (g - value[count - 1]) / step2, half))
                if begin <= at:
                    begin = at + 1
                break
            if begin < last:
                place[count], value[count], start[count] = x, g, begin
                count += 1
        if count == 0:
            for x in range(first, last):
                line[x] = sign * INF
        for k in range(count):
            centre, base = place[k], value[k]
            stop = start[k + 1] if k + 1 < count else last
            for x in range(start[k], stop):
                steps = max(abs(float(x - centre)) - half, 0.0)
                line[x] = sign * (base + steps * steps * step2)
        first = last


@compiled
def along_last(label, number, begin, stop, step, half, out):  # type: ignore[no-untyped-def]
    """Signed squared distance along the last axis to the nearest change between `number` and the other values.

    label: (X, Y, Z); out: (X, Y, Z) float32, written for x in begin..stop - 1. Infinite, with the sign of its side, in
    lines of one side.
    """
    rows, length = label.shape[1], label.shape[2]
    for x in range(begin, stop):
        for y in range(rows):
            first = 0
            while first < length:
                inside = label[x, y, first] == number
                last = first + 1
                while last < length and (label[x, y, last] == number) == inside:
                    last += 1
                sign = -1.0 if inside else 1.0
                for z in range(first, last):
                    left = z - first + 1 - half if first > 0 else INF
                    right = last - z - half if last < length else INF
                    steps = min(left, right) * step
                    out[x, y, z] = sign * steps * steps
                first = last


@compiled
def along_middle(squared, begin, stop, step, half, limit2, out, finish):  # type: ignore[no-untyped-def]
    """The same with the distance along the middle axis added, for x in begin..stop - 1.

    Written to `out`, which may be `squared`. finish: (last, shift_inside, clip, far); if last is not 0, signed
    distances are written instead of squares: less shift_inside where they are inside, to +-clip at most, and +-far
    where nothing is known.
    """
    lines, buffers = _buffers(squared.shape[1])
    for x in range(begin, stop):
        for z in range(0, squared.shape[2], TILE):
            _tile(squared[x, :, z : z + TILE], step, half, limit2, out[x, :, z : z + TILE], finish, lines, buffers)


@compiled
def along_first(squared, begin, stop, step, half, limit2, out, finish):  # type: ignore[no-untyped-def]
    """The same with the distance along the first axis added, for y in begin..stop - 1."""
    lines, buffers = _buffers(squared.shape[0])
    for y in range(begin, stop):
        for z in range(0, squared.shape[2], TILE):
            _tile(squared[:, y, z : z + TILE], step, half, limit2, out[:, y, z : z + TILE], finish, lines, buffers)


@compiled
def _buffers(length):  # type: ignore[no-untyped-def]
    numbers = np.empty((2, length + 3), np.int64)
    return np.empty((TILE, length), np.float32), (numbers[0], np.empty(length + 3, np.float64), numbers[1])


@compiled
def _tile(squared, step, half, limit2, out, finish, lines, buffers):  # type: ignore[no-untyped-def]
    """Lines along the first axis of (length, up to TILE): turned, so that a line is in one piece, and back."""
    length, columns = squared.shape
    for x in range(length):
        for z in range(columns):
            lines[z, x] = squared[x, z]
    place, value, start = buffers
    last, shift_inside, clip, far = finish
    for z in range(columns):
        line = lines[z]
        _envelope(line, length, step, half, limit2, place, value, start)
        if last != 0:
            for x in range(length):
                square = line[x]
                distance = math.sqrt(abs(square))
                distance = distance - shift_inside if square < 0 else distance
                distance = min(distance, clip) if distance < INF else far
                line[x] = -distance if square < 0 else distance
    for x in range(length):
        for z in range(columns):
            out[x, z] = lines[z, x]


@compiled
def label_extents(label, begin, stop, low, high, counts):  # type: ignore[no-untyped-def]
    """Adds to the extent (C, 3) and the size (C,) of each class those of the planes begin..stop - 1.

    Returns False when a value is no class number 0..C - 1.
    """
    classes = counts.shape[0]
    for x in range(begin, stop):
        for y in range(label.shape[1]):
            first = 0
            length = label.shape[2]
            while first < length:
                number = label[x, y, first]
                last = first + 1
                while last < length and label[x, y, last] == number:
                    last += 1
                if not (0 <= number < classes):
                    return False
                counts[number] += last - first
                low[number, 0], high[number, 0] = min(low[number, 0], x), max(high[number, 0], x + 1)
                low[number, 1], high[number, 1] = min(low[number, 1], y), max(high[number, 1], y + 1)
                low[number, 2], high[number, 2] = min(low[number, 2], first), max(high[number, 2], last)
                first = last
    return True
