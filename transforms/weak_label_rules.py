"""What is left of a full annotation: the middle of each object, a few points, or the strokes in a scribble file."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from torch import Tensor

from medconstraints import checks

__all__ = ["Erosion", "Points", "Scribble"]

Part = tuple[int | slice, ...]


@dataclass(frozen=True)
class Erosion:
    """The inner part of every class, as if only the middle of each object had been painted (Kervadec 2020, 2.4.2).

    Binary erosion with a box of `kernel_voxels` along each axis. Where nothing is left of a class, again with a smaller
    box, 0.7 of the side (10, 7, 5, 4, 3, 2, 1), so that every class keeps at least one voxel. What lies outside the
    image counts as outside the class. A box with an even side has no middle voxel: the result then lies half a voxel
    off, towards the higher indices. Class 0 is never annotated, so a label without foreground has no annotated voxel.

    Args:
        kernel_voxels: side of the box, >= 1.
        slice_axis: None erodes each class as a volume; with an axis each class is eroded slice by slice across it,
            and keeps a voxel in every slice that has it.

    Example:
        >>> Erosion(kernel_voxels=3)(np.array([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]])).tolist()
        [[-1, -1, -1, -1], [-1, 1, -1, -1], [-1, -1, -1, -1]]
    """

    kernel_voxels: int = 10
    slice_axis: int | None = None

    def __post_init__(self) -> None:
        checks.whole_number("kernel_voxels", self.kernel_voxels, 1)
        checks.slice_axis(self.slice_axis)

    def __call__(self, label: np.ndarray | Tensor, ignore_index: int = -1) -> np.ndarray:
        """The weak label (*S), int32, of a label (*S): the class where it is annotated, else `ignore_index`."""
        array = checks.label_array(label, ignore_index=ignore_index)
        weak = np.full_like(array, ignore_index)
        for cls, part in _classes_in_parts(array, self.slice_axis, ignore_index):
            # Nothing of the class lies outside its bounding box, and constant mode takes what lies outside for zero.
            mask = (array[part] == cls).astype(np.uint8)
            box = ndimage.find_objects(mask)[0]
            side = int(self.kernel_voxels)
            while not (left := ndimage.minimum_filter(mask[box], size=side, mode="constant", cval=0)).any():
                side = (7 * side + 5) // 10  # round(0.7 side): 10, 7, 5, 4, 3, 2, 1; a side of 1 leaves the mask
            weak[part][box][left > 0] = cls
        return weak


@dataclass(frozen=True)
class Points:
    """A random point of every class and a small disc around it, as if an annotator had clicked (Kervadec 2020, 2.4.2).

    The point is uniform over the voxels of the class. Around it the largest disc (a ball in a volume) of at most
    `radius_voxels` that lies wholly inside the class and the image is annotated. An annotator clicks once: the same
    label gets the same points at every call and in every process, and caching data sets may keep them.

    Args:
        radius_voxels: largest radius; 0 annotates the point alone.
        slice_axis: None for one ball a class in the volume; an axis for one disc in every slice across it that has the
            class.
        background: annotate a disc of class 0 by the same rule. It does not move the points of the other classes.
        seed: of the points.

    Example:
        >>> Points()(np.array([[0, 0, 0], [0, 2, 0], [0, 0, 0]])).tolist()
        [[-1, -1, -1], [-1, 2, -1], [-1, -1, -1]]
    """

    radius_voxels: int = 4
    slice_axis: int | None = None
    background: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        checks.whole_number("radius_voxels", self.radius_voxels, 0)
        checks.slice_axis(self.slice_axis)
        checks.flag("background", self.background)

    def __call__(self, label: np.ndarray | Tensor, ignore_index: int = -1) -> np.ndarray:
        """The weak label (*S), int32, of a label (*S): the class where it is annotated, else `ignore_index`."""
        array = checks.label_array(label, ignore_index=ignore_index)
        weak = np.full_like(array, ignore_index)
        random = np.random.default_rng([self.seed, zlib.crc32(array.tobytes())])
        for cls, part in _classes_in_parts(array, self.slice_axis, ignore_index, self.background):
            mask = array[part] == cls
            voxels = np.flatnonzero(mask)
            centre = np.array(np.unravel_index(voxels[random.integers(len(voxels))], mask.shape))
            window, inside = _disc(mask, centre, int(self.radius_voxels))
            weak[part][window][inside] = cls
        return weak


@dataclass(frozen=True)
class Scribble:
    """The strokes of a scribble file: they keep their class, the rest is not annotated.

    To train on some of the classes, map them before with MONAI's `MapLabelValued(["label", "scribble"],
    orig_labels=[1, 2, 3], target_labels=[0, 0, 1])`: the strokes on other structures then are strokes on the
    background.

    Args:
        unlabelled: value of the voxels without a stroke (4 in the scribbles of ACDC). 0 for files in which nothing
            else marks them; such files have no strokes on the background.
        background: use the strokes on the background (value 0); False takes them as not annotated.
        num_classes: strokes must be of the classes 0..num_classes - 1; None accepts any class number.

    Example:
        >>> Scribble(num_classes=4)(np.array([[0, 4, 4], [4, 3, 4]])).tolist()
        [[0, -1, -1], [-1, 3, -1]]
    """

    unlabelled: int = 4
    background: bool = True
    num_classes: int | None = None

    def __post_init__(self) -> None:
        checks.flag("background", self.background)
        if self.num_classes is None:
            return
        checks.whole_number("num_classes", self.num_classes, 2)
        if 0 < self.unlabelled < self.num_classes:
            raise ValueError(
                f"unlabelled: expected a value that is none of the {self.num_classes} classes 0.."
                f"{self.num_classes - 1}, got {self.unlabelled}; look what the files have where nothing is drawn."
            )

    def __call__(self, label: np.ndarray | Tensor, ignore_index: int = -1) -> np.ndarray:
        """The weak label (*S), int32, of scribbles (*S), which may have `ignore_index` as well as `unlabelled`."""
        values = np.asarray(label.detach().cpu() if isinstance(label, Tensor) else label)
        if stray := checks.stray_values(values, self.num_classes, (self.unlabelled, ignore_index)):
            last = "1, 2, ..." if self.num_classes is None else self.num_classes - 1
            raise ValueError(
                f"label: has values that are neither a class number 0 to {last} nor unlabelled={self.unlabelled}: "
                f"{stray}; set unlabelled or num_classes, or map them (MapLabelValued)."
            )
        blank = (values == self.unlabelled) | (values == ignore_index) | ((values == 0) & (not self.background))
        weak = np.full(values.shape, ignore_index, dtype=np.int32)
        weak[~blank] = values[~blank]
        return weak


def _disc(mask: np.ndarray, centre: np.ndarray, radius: int) -> tuple[Part, np.ndarray]:
    """A window of the mask, and in it the largest disc around a centre that lies inside the mask and the image."""
    start, stop = np.maximum(centre - radius, 0), np.minimum(centre + radius + 1, mask.shape)
    window = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    squared = sum(np.square(axis - c) for axis, c in zip(np.ogrid[window], centre, strict=True))
    # Squared distances are whole numbers: the comparisons are exact. The first layer outside the image is outside.
    edge = int(np.minimum(centre + 1, mask.shape - centre).min()) ** 2
    edge = min(edge, int(np.min(squared, where=~mask[window], initial=edge)))
    return window, (squared <= radius**2) & (squared < edge)


def _classes_in_parts(
    array: np.ndarray, slice_axis: int | None, ignore_index: int, background: bool = False
) -> list[tuple[int, Part]]:
    """Each class with the volume, or with every slice, that has it; the background last."""
    axis = checks.slice_axis(slice_axis, array.ndim)
    classes = [int(cls) for cls in np.unique(array) if cls > 0 and cls != ignore_index]
    if background and (array == 0).any():
        classes.append(0)
    if axis is None:
        return [(cls, ()) for cls in classes]
    others = tuple(other for other in range(array.ndim) if other != axis)
    lead: Part = (slice(None),) * axis
    return [(cls, (*lead, int(i))) for cls in classes for i in np.flatnonzero((array == cls).any(axis=others))]
