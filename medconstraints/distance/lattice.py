"""Signed distances with the transforms of scipy or SimpleITK: slower than the compiled ones, and written by others.

The point of a face nearest to a voxel's centre lies, on each axis, either level with the centre or at the face's edge:
on the lattice of half voxel steps. So distances to faces are distances to the points of that lattice that lie on faces,
at eight times the voxels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import distance_transform_edt

__all__ = ["distance_scipy", "distance_simpleitk", "signed_map"]

Distance = Callable[[np.ndarray, Sequence[float]], np.ndarray]


def distance_scipy(points: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Distance of every position to the nearest True one."""
    result: np.ndarray = distance_transform_edt(~points, sampling=spacing_mm)
    return result


def distance_simpleitk(points: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """The same by Maurer's transform, whose values outside an object are exact."""
    image = sitk.GetImageFromArray(points.astype(np.uint8))
    image.SetSpacing([float(step) for step in reversed(spacing_mm)])
    distance = sitk.SignedMaurerDistanceMap(image, insideIsPositive=False, squaredDistance=False, useImageSpacing=True)
    result: np.ndarray = np.maximum(sitk.GetArrayFromImage(distance), 0)
    return result


def signed_map(
    mask: np.ndarray, spacing_mm: Sequence[float], distance: Distance, *, to_face: bool, shift_inside_mm: float
) -> np.ndarray:
    """Signed distance of a mask with voxels on both sides, 2D or 3D."""
    if to_face:
        points = _points_on_faces(mask)
        both = distance(points, [step / 2 for step in spacing_mm])[(slice(None, None, 2),) * mask.ndim]
        return np.where(mask, -both, both).astype(np.float32)
    signed = np.where(mask, shift_inside_mm - distance(~mask, spacing_mm), distance(mask, spacing_mm))
    return signed.astype(np.float32)


def _points_on_faces(mask: np.ndarray) -> np.ndarray:
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
