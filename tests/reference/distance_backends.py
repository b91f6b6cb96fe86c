"""Signed distances with the transforms of scipy or SimpleITK, and paths with scipy's Dijkstra: others' algorithms.

Slower than the package, and written by others. The point of a face nearest to a voxel's centre lies, on each axis,
either level with the centre or at the face's edge: on the lattice of half voxel steps. So distances to faces are
distances to the points of that lattice that lie on faces, at eight times the voxels.
"""

import itertools
import math

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import distance_transform_edt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import dijkstra


def distance_scipy(points, spacing_mm):
    """Distance of every position to the nearest True one."""
    return distance_transform_edt(~points, sampling=spacing_mm)


def distance_simpleitk(points, spacing_mm):
    """The same by Maurer's transform, whose values outside an object are exact."""
    image = sitk.GetImageFromArray(points.astype(np.uint8))
    image.SetSpacing([float(step) for step in reversed(spacing_mm)])
    distance = sitk.SignedMaurerDistanceMap(image, insideIsPositive=False, squaredDistance=False, useImageSpacing=True)
    return np.maximum(sitk.GetArrayFromImage(distance), 0)


def signed(mask, spacing_mm=None, *, convention="boundary", slice_axis=None, clip_mm=None, distance=distance_scipy):
    """Signed distance (*S) of a mask (*S), zeros where it, or a slice of it, has one side only."""
    mask = np.asarray(mask, dtype=bool)
    spacing_mm = [1.0] * mask.ndim if spacing_mm is None else [float(step) for step in spacing_mm]
    options = {"convention": convention, "clip_mm": clip_mm, "distance": distance}
    if slice_axis is not None:
        steps = spacing_mm[:slice_axis] + spacing_mm[slice_axis + 1 :]
        return np.stack([signed(part, steps, **options) for part in np.moveaxis(mask, slice_axis, 0)], slice_axis)
    if mask.all() or not mask.any():
        return np.zeros(mask.shape)
    if convention == "boundary":
        points = points_on_faces(mask)
        both = distance(points, [step / 2 for step in spacing_mm])[(slice(None, None, 2),) * mask.ndim]
        values = np.where(mask, -both, both)
    else:
        shift = min(spacing_mm) if convention == "published" else 0.0
        values = np.where(mask, shift - distance(~mask, spacing_mm), distance(mask, spacing_mm))
    return values if clip_mm is None else np.clip(values, -clip_mm, clip_mm)


def maps(label, num_classes, spacing_mm=None, **options):
    """One map for each class, (C, *S)."""
    return np.stack([signed(label == number, spacing_mm, **options) for number in range(num_classes)])


def points_on_faces(mask):
    """Points of the half-step lattice, (2 n - 1) on an axis, that lie on a face between the two sides."""
    points = np.zeros([2 * size - 1 for size in mask.shape], bool)
    for axis in range(mask.ndim):
        faces = np.zeros_like(points)
        centres = [slice(None, None, 2)] * mask.ndim
        centres[axis] = slice(1, None, 2)
        faces[tuple(centres)] = np.diff(mask, axis=axis)
        for other in range(mask.ndim):
            if other != axis:
                # A face reaches half a step to either side of its centre.
                forward = [slice(None)] * mask.ndim
                backward = [slice(None)] * mask.ndim
                forward[other], backward[other] = slice(1, None), slice(None, -1)
                wider = faces.copy()
                wider[tuple(forward)] |= faces[tuple(backward)]
                wider[tuple(backward)] |= faces[tuple(forward)]
                faces = wider
        points |= faces
    return points


def path_lengths(starts, sides, image, spacing_mm, image_weight, slice_axis=None):
    """Lengths (*S) of the shortest paths from `starts` (*S), lengths with which paths begin there, infinite elsewhere.

    Paths stay on one of the `sides` (*S). From a node of its own that stands for all starts.
    """
    shape, count = sides.shape, sides.size
    image = np.asarray(image, np.float64).reshape(-1, count)
    number, (begins,) = np.arange(count).reshape(shape), np.nonzero(np.isfinite(starts.ravel()))
    rows, columns, lengths = [np.full(len(begins), count)], [begins], [np.maximum(starts.ravel()[begins], 1e-12)]
    for move in itertools.product((-1, 0, 1), repeat=len(shape)):
        if not any(move) or (slice_axis is not None and move[slice_axis]):
            continue
        here = tuple(slice(max(-step, 0), size - max(step, 0)) for step, size in zip(move, shape, strict=True))
        there = tuple(slice(max(step, 0), size + min(step, 0)) for step, size in zip(move, shape, strict=True))
        p, q = number[here].ravel(), number[there].ravel()
        same = sides.ravel()[p] == sides.ravel()[q]
        p, q = p[same], q[same]
        squares = math.fsum((a * s) ** 2 for a, s in zip(move, spacing_mm, strict=True))
        rows.append(p)
        columns.append(q)
        lengths.append(np.sqrt(squares + image_weight**2 * ((image[:, p] - image[:, q]) ** 2).sum(0)))
    edges = np.concatenate(lengths), (np.concatenate(rows), np.concatenate(columns))
    graph = coo_array(edges, shape=(count + 1, count + 1)).tocsr()
    return dijkstra(graph, indices=count)[:count].reshape(shape)
