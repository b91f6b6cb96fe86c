"""Compiled shortest paths over a grid: Dijkstra with buckets, from many voxels at once.

A heap is not needed: a queued voxel lies in the bucket of its length (Dial 1969), a doubly linked list, so that it can
be moved when a shorter path is found. As long as a bucket is no wider than the shortest edge, a voxel is final when its
bucket is reached; wider buckets are emptied until nothing changes in them, which gives the same lengths.

Raster sweeps until nothing changes give the same lengths, but go over all voxels 10 to 30 times on real images; here
each voxel near the start is visited once.

The functions release the interpreter's lock and write only into arrays they are given. Arguments of both:

- side: (N,) int8, the voxels of a grid in a row: -1 and 1 on the two sides of a boundary that no path crosses, 0 in a
  margin all around.
- image: (N, M) float32; weight: mm per unit of intensity.
- steps: (K,) int64, from a voxel to its neighbours in the row; lengths: (K,) float64, their distance in mm, > 0.
- found: (N,) float64, lengths of paths, infinite where none is known yet.
"""

from __future__ import annotations

import math

import numpy as np

from medconstraints.distance.kernels import compiled, inlined

__all__ = ["extend_paths", "paths_to_boundary"]

_NONE = -1
_NOT_QUEUED = -2


@inlined
def _squared_difference(image, p, q):  # type: ignore[no-untyped-def]
    total = 0.0
    for channel in range(image.shape[1]):
        difference = np.float64(image[p, channel]) - np.float64(image[q, channel])
        total += difference * difference
    return total


@inlined
def _put(p, bucket, heads, after, before):  # type: ignore[no-untyped-def]
    head = heads[bucket]
    after[p], before[p] = head, _NONE
    if head != _NONE:
        before[head] = p
    heads[bucket] = p


@inlined
def _take(p, bucket, heads, after, before):  # type: ignore[no-untyped-def]
    if before[p] == _NONE:
        heads[bucket] = after[p]
    else:
        after[before[p]] = after[p]
    if after[p] != _NONE:
        before[after[p]] = before[p]
    before[p] = _NOT_QUEUED


@compiled
def paths_to_boundary(side, image, steps, lengths, weight, found):  # type: ignore[no-untyped-def]
    """Half the shortest edge across the boundary, for the voxels that have one; the boundary lies between its ends."""
    weight2 = weight * weight
    for p in range(len(side)):
        if side[p] == 0:
            continue
        shortest2 = math.inf
        for k in range(len(steps)):
            q = p + steps[k]
            if side[p] * side[q] < 0:
                shortest2 = min(shortest2, lengths[k] * lengths[k] + weight2 * _squared_difference(image, p, q))
        found[p] = math.sqrt(shortest2) / 2


@compiled
def extend_paths(  # type: ignore[no-untyped-def]
    side, image, steps, lengths, weight, limit, width, heads, after, before, found
):
    """Extend the paths that are known in `found` to the other voxels, each on its side, in place.

    Paths of `limit` and more are left out; it may be infinite. A bucket is `width` mm wide. heads: (buckets,) integers
    for the first voxel of each bucket, all -1, enough for the longest edge and the longest path in `found`; after:
    (N,) integers, a buffer; before: (N,) integers, a buffer, all -2.
    """
    weight2, buckets, queued = weight * weight, len(heads), 0
    for p in range(len(side)):
        if found[p] < limit:
            _put(p, int(found[p] / width) % buckets, heads, after, before)
            queued += 1
        else:
            found[p] = math.inf
    bucket = 0
    while queued > 0:
        p = heads[bucket]
        if p == _NONE:
            bucket = (bucket + 1) % buckets
            continue
        _take(p, bucket, heads, after, before)
        queued -= 1
        for k in range(len(steps)):
            q = p + steps[k]
            # The image can only make the edge longer: most neighbours are done with here, without looking at it.
            if side[q] != side[p] or found[q] <= found[p] + lengths[k]:
                continue
            edge2 = lengths[k] * lengths[k] + weight2 * _squared_difference(image, p, q)
            length = found[p] + math.sqrt(edge2)
            if length < found[q] and length < limit:
                if before[q] == _NOT_QUEUED:
                    queued += 1
                else:
                    _take(q, int(found[q] / width) % buckets, heads, after, before)
                found[q] = length
                _put(q, int(length / width) % buckets, heads, after, before)
