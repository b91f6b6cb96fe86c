"""Slow reference of the signed distance maps and the boundary loss: every pair of voxels, numpy float64.

Written from Kervadec 2020 (chapter 4) and from the documented conventions and units of the package. It shares no code
with the package and needs no distance transform. `mask` is an array (*S) of bool, `label` one of class numbers (*S),
`spacing` None (1 along each axis) or one number for each axis.
"""

import heapq
import itertools
import math

import numpy as np

# Geometry


def spacing_of(spacing, dims):
    """Spacing along each axis, 1 where none is given."""
    return np.ones(dims) if spacing is None else np.asarray(spacing, dtype=float)


def centres(shape):
    """Coordinates of the voxel centres in voxels, (N, D), in the order of `ravel`."""
    return np.array(list(itertools.product(*map(range, shape))), dtype=float).reshape(-1, len(shape))


def gaps(points, boxes, half_sides, spacing):
    """Distance (P, Q) in mm of points (P, D) to boxes with centres (Q, D) and half sides (D,) or (Q, D), in voxels."""
    beside = np.abs(points[:, None, :] - boxes[None, :, :])
    return np.sqrt((np.square(np.maximum(beside - half_sides, 0) * spacing)).sum(-1))


def faces(mask):
    """Faces between a voxel of the class and one that is not: centres (F, D) and half sides (F, D), in voxels.

    The edge of the image has no faces: what is beyond is neither.
    """
    mask = np.asarray(mask)
    where, half_sides = [], []
    for voxel in itertools.product(*map(range, mask.shape)):
        for axis in range(mask.ndim):
            beside = (*voxel[:axis], voxel[axis] + 1, *voxel[axis + 1 :])
            if beside[axis] < mask.shape[axis] and mask[voxel] != mask[beside]:
                centre, half = np.array(voxel, dtype=float), np.full(mask.ndim, 0.5)
                centre[axis], half[axis] = voxel[axis] + 0.5, 0.0
                where.append(centre)
                half_sides.append(half)
    return np.array(where).reshape(-1, mask.ndim), np.array(half_sides).reshape(-1, mask.ndim)


# Signed distance of one class


def unsigned(mask, spacing, half_side):
    """Distance of each voxel's centre to the nearest voxel of the other side, as a box of that half side."""
    points, inside = centres(mask.shape), np.asarray(mask).ravel()
    found = np.zeros(len(points))
    for side in (True, False):
        own, other = inside == side, inside != side
        found[own] = gaps(points[own], points[other], half_side, spacing).min(1)
    return found.reshape(mask.shape)


def signed(mask, spacing=None, *, convention="boundary", slice_axis=None, clip_mm=None):
    """Signed distance in mm: negative inside; a mask, or a slice of it, that is empty or full gives zeros."""
    mask = np.asarray(mask, dtype=bool)
    steps = spacing_of(spacing, mask.ndim)
    if slice_axis is not None:
        rest = np.delete(steps, slice_axis)
        parts = [
            signed(part, rest, convention=convention, clip_mm=clip_mm) for part in np.moveaxis(mask, slice_axis, 0)
        ]
        return np.stack(parts, slice_axis)
    if mask.all() or not mask.any():
        return np.zeros(mask.shape)
    if convention == "boundary":
        far = unsigned(mask, steps, 0.5)
        values = np.where(mask, -far, far)
    elif convention == "voxel":
        far = unsigned(mask, steps, 0.0)
        values = np.where(mask, -far, far)
    elif convention == "published":
        far = unsigned(mask, steps, 0.0)
        values = np.where(mask, -(far - steps.min()), far)
    else:
        raise ValueError(convention)
    return values if clip_mm is None else np.clip(values, -clip_mm, clip_mm)


def signed_to_faces(mask, spacing, points, found=None):
    """Convention "boundary" as it is defined, at voxels `points` (P, D) alone; `found`: the faces, if known."""
    where, half_sides = faces(mask) if found is None else found
    far = gaps(np.asarray(points, dtype=float), where, half_sides, spacing_of(spacing, np.ndim(mask))).min(1)
    inside = np.asarray(mask, dtype=bool)[tuple(np.asarray(points, dtype=int).T)]
    return np.where(inside, -far, far)


def maps(label, num_classes, spacing=None, *, classes=None, **options):
    """One map a class, (C, *S); zeros for the classes that are not asked for."""
    label = np.asarray(label)
    chosen = range(num_classes) if classes is None else classes
    found = np.zeros((num_classes, *label.shape))
    for number in chosen:
        found[number] = signed(label == number, spacing, **options)
    return found


# Paths along an image (*S) or (M, *S): one search for each voxel, until it arrives


def shortest(start, shape, image, spacing, weight, slice_axis, arrives):
    """Length of the shortest path from a voxel; `arrives(p, q)`: share of the edge p, q that ends it, or None."""
    steps = spacing_of(spacing, len(shape))
    channels = image[None] if image.ndim == len(shape) else image
    queue, done = [(0.0, False, start)], set()
    while queue:
        length, arrived, p = heapq.heappop(queue)
        if arrived:
            return length
        if p in done:
            continue
        done.add(p)
        for move in itertools.product((-1, 0, 1), repeat=len(shape)):
            q = tuple(a + b for a, b in zip(p, move, strict=True))
            inside = all(0 <= a < n for a, n in zip(q, shape, strict=True))
            if q in done or not inside or (slice_axis is not None and move[slice_axis]):
                continue
            squares = [(a * s) ** 2 for a, s in zip(move, steps, strict=True)]
            edge = math.sqrt(sum(squares) + sum((weight * (channel[p] - channel[q])) ** 2 for channel in channels))
            share = arrives(p, q)
            heapq.heappush(queue, (length + (1.0 if share is None else share) * edge, share is not None, q))
    return math.inf


def signed_geodesic(mask, image, spacing=None, *, image_weight, slice_axis=None):
    """To the boundary, which lies half way along an edge between both sides; 0 where there is none."""
    value = np.zeros(mask.shape)
    for p in np.ndindex(mask.shape):
        found = shortest(
            p, mask.shape, image, spacing, image_weight, slice_axis, lambda a, b: 0.5 if mask[a] != mask[b] else None
        )
        value[p] = 0.0 if math.isinf(found) else -found if mask[p] else found
    return value


def geodesic(seeds, image, num_classes, spacing=None, *, image_weight, slice_axis=None):
    """From the nearest seed of each class, (C, *S); infinite without one."""
    value = np.zeros((num_classes, *seeds.shape))
    for number, *place in np.ndindex(value.shape):
        p = tuple(place)
        if seeds[p] != number:
            value[(number, *p)] = shortest(
                p,
                seeds.shape,
                image,
                spacing,
                image_weight,
                slice_axis,
                lambda _, b, number=number: 1.0 if seeds[b] == number else None,
            )
    return value


# The loss


def boundary_loss(probs, phi, *, rows=None, weight=None, unit=1.0, batch=False, reduction="mean"):
    """Eq. 4.5 over the number of voxels; probs and phi (B, C, *S). `batch` averages over the samples first."""
    rows = list(range(probs.shape[1])) if rows is None else list(rows)
    costs = np.zeros((len(probs), len(rows)))
    for sample in range(len(probs)):
        for row, channel in enumerate(rows):
            total = 0.0
            for voxel in itertools.product(*map(range, probs.shape[2:])):
                total += float(phi[(sample, channel, *voxel)]) / unit * float(probs[(sample, channel, *voxel)])
            factor = 1.0 if weight is None else float(weight[row])
            costs[sample, row] = factor * total / math.prod(probs.shape[2:])
    if batch:
        costs = costs.mean(0)
    if reduction == "none":
        return costs
    return costs.sum() if reduction == "sum" else costs.mean()
