"""What is left of a full label when only a few voxels of each object are annotated: erosion, and random points."""

from __future__ import annotations

import zlib

import numpy as np
from scipy import ndimage
from torch import Tensor

__all__ = ["erode_label", "random_point_label"]

Part = tuple[int | slice, ...]
SHOWN_VALUES = 5


def erode_label(
    label: np.ndarray | Tensor, *, kernel_voxels: int = 10, slice_axis: int | None = None, ignore_index: int = -1
) -> np.ndarray:
    """The inner part of every class, as if only the middle of each object had been painted (Kervadec 2020, 2.4.2).

    Binary erosion with a box of `kernel_voxels` along each axis. Where nothing is left of a class, again with a smaller
    box, 0.7 of the side (10, 7, 5, 4, 3, 2, 1), so that every class keeps at least one voxel. What lies outside the
    image counts as outside the class. A box with an even side has no middle voxel: the result then lies half a voxel
    off, towards the higher indices.

    Args:
        label: (*S), 2D or 3D, integer values; 0 is background. Voxels of value `ignore_index` belong to no class.
        kernel_voxels: side of the box.
        slice_axis: None erodes each class as a volume; with an axis each class is eroded slice by slice across it,
            and keeps a voxel in every slice that has it.
        ignore_index: value of the voxels without annotation; no class number.

    Returns:
        (*S) int32: the class on the annotated voxels, `ignore_index` elsewhere. Class 0 is never annotated, so a label
        without foreground has no annotated voxel.

    Raises:
        ValueError: an argument is outside its range, or the values are no class numbers.

    Example:
        >>> erode_label(np.array([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]]), kernel_voxels=3).tolist()
        [[-1, -1, -1, -1], [-1, 1, -1, -1], [-1, -1, -1, -1]]
    """
    kernel = whole_number("kernel_voxels", kernel_voxels, 1)
    return eroded(class_map(label, ignore_index), kernel, slice_axis, ignore_index)


def random_point_label(
    label: np.ndarray | Tensor,
    *,
    radius_voxels: int = 4,
    slice_axis: int | None = None,
    background: bool = False,
    ignore_index: int = -1,
    seed: int = 0,
) -> np.ndarray:
    """A random point of every class and a small disc around it, as if an annotator had clicked (Kervadec 2020, 2.4.2).

    The point is uniform over the voxels of the class. Around it the largest disc (a ball in a volume) of at most
    `radius_voxels` that lies wholly inside the class and the image is annotated. The points belong to the label: the
    same label gets the same ones at every call and in every process.

    Args:
        label: (*S), 2D or 3D, integer values; 0 is background. Voxels of value `ignore_index` belong to no class.
        radius_voxels: largest radius; 0 annotates the point alone.
        slice_axis: None for one ball a class in the volume; an axis for one disc in every slice across it that has the
            class.
        background: annotate a disc of class 0 by the same rule. It does not move the points of the other classes.
        ignore_index: value of the voxels without annotation; no class number.
        seed: of the points.

    Returns:
        (*S) int32: the class on the annotated voxels, `ignore_index` elsewhere. A class that is absent has none.

    Raises:
        ValueError: an argument is outside its range, or the values are no class numbers.

    Example:
        >>> random_point_label(np.array([[0, 0, 0], [0, 2, 0], [0, 0, 0]])).tolist()
        [[-1, -1, -1], [-1, 2, -1], [-1, -1, -1]]
    """
    radius = whole_number("radius_voxels", radius_voxels, 0)
    return pointed(class_map(label, ignore_index), radius, slice_axis, background, ignore_index, int(seed))


def eroded(array: np.ndarray, kernel: int, slice_axis: int | None, ignore_index: int) -> np.ndarray:
    weak = np.full_like(array, ignore_index)
    for cls, part in _classes_in_parts(array, slice_axis, ignore_index):
        # Nothing of the class lies outside its bounding box, and constant mode takes what lies outside for zero.
        mask = (array[part] == cls).astype(np.uint8)
        box = ndimage.find_objects(mask)[0]
        side = kernel
        while not (left := ndimage.minimum_filter(mask[box], size=side, mode="constant", cval=0)).any():
            side = (7 * side + 5) // 10  # round(0.7 side): 10, 7, 5, 4, 3, 2, 1; a side of 1 leaves the mask as it is
        weak[part][box][left > 0] = cls
    return weak


def pointed(
    array: np.ndarray, radius: int, slice_axis: int | None, background: bool, ignore_index: int, seed: int
) -> np.ndarray:
    weak = np.full_like(array, ignore_index)
    random = np.random.default_rng([seed, zlib.crc32(array.tobytes())])
    for cls, part in _classes_in_parts(array, slice_axis, ignore_index, background):
        mask = array[part] == cls
        voxels = np.flatnonzero(mask)
        centre = np.array(np.unravel_index(voxels[random.integers(len(voxels))], mask.shape))
        start, stop = np.maximum(centre - radius, 0), np.minimum(centre + radius + 1, mask.shape)
        window = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        offsets = np.ogrid[window]
        squared = sum(np.square(axis - c) for axis, c in zip(offsets, centre, strict=True))
        # Squared distances are whole numbers: the comparisons are exact. The first layer outside the image is outside.
        edge = int(np.minimum(centre + 1, mask.shape - centre).min()) ** 2
        edge = min(edge, int(np.min(squared, where=~mask[window], initial=edge)))
        weak[part][window][(squared <= radius**2) & (squared < edge)] = cls
    return weak


def _classes_in_parts(
    array: np.ndarray, slice_axis: int | None, ignore_index: int, background: bool = False
) -> list[tuple[int, Part]]:
    """Each class with the volume, or with every slice, that has it; the background last."""
    if slice_axis is not None and not 0 <= slice_axis < array.ndim:
        raise ValueError(f"slice_axis: expected None or an axis 0..{array.ndim - 1}, got {slice_axis}.")
    classes = [int(cls) for cls in np.unique(array) if cls > 0 and cls != ignore_index]
    if background and (array == 0).any():
        classes.append(0)
    if slice_axis is None:
        return [(cls, ()) for cls in classes]
    others = tuple(axis for axis in range(array.ndim) if axis != slice_axis)
    lead: Part = (slice(None),) * slice_axis
    return [(cls, (*lead, int(i))) for cls in classes for i in np.flatnonzero((array == cls).any(axis=others))]


def class_map(label: np.ndarray | Tensor, ignore_index: int, name: str = "label") -> np.ndarray:
    """The label as int32 in C order (equal labels have equal bytes), checked."""
    check_ignore_index(ignore_index)
    array = as_array(label)
    if array.ndim not in (2, 3):
        raise ValueError(f"{name}: expected a 2D or 3D map without channel axis, got shape {array.shape}.")
    found = np.unique(array)
    wrong = found[~(((found >= 0) & (found < np.inf) & (found == np.round(found))) | (found == ignore_index))]
    if len(wrong):
        raise ValueError(
            f"{name}: expected whole class numbers >= 0 or ignore_index={ignore_index}, got {shown_values(wrong)}; set "
            "ignore_index, map them (MapLabelValued), or resample labels with mode='nearest'."
        )
    return np.ascontiguousarray(array, dtype=np.int32)


def as_array(label: np.ndarray | Tensor) -> np.ndarray:
    return np.asarray(label.detach().cpu() if isinstance(label, Tensor) else label)


def shown_values(values: np.ndarray) -> str:
    more = f" and {len(values) - SHOWN_VALUES} more" if len(values) > SHOWN_VALUES else ""
    return ", ".join(f"{value:g}" for value in values[:SHOWN_VALUES]) + more


def check_ignore_index(ignore_index: int) -> None:
    if int(ignore_index) != ignore_index or ignore_index == 0:
        raise ValueError(
            f"ignore_index: expected an integer that is no class, such as -1 or 255, got {ignore_index}; 0 is the "
            "background."
        )


def whole_number(name: str, value: int, low: int) -> int:
    if int(value) != value or value < low:
        raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}.")
    return int(value)
