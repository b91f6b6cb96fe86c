"""Bounds on the size or the centroid of each class, the small tensor that the constraint losses take."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from numbers import Real
from os import PathLike
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch import Tensor

from medconstraints.transforms.weak_labels import is_fully_labelled, label_name

__all__ = ["LabelToBoundsd", "label_to_centroid_bounds", "label_to_size_bounds"]

LEVELS = ("individual", "common", "tags", "none")
UNITS = ("voxel", "mm")


def label_to_size_bounds(
    label: np.ndarray | Tensor,
    num_classes: int,
    *,
    level: str = "individual",
    margin: float = 0.1,
    common: Sequence[Sequence[float]] | None = None,
    spacing_mm: Sequence[float] | None = None,
) -> Tensor:
    """Bounds on the size of each class at one of the levels of supervision of Kervadec 2020, 2.4.3.

    - "individual" (eq. 2.7): size * (1 - margin) to size * (1 + margin), not below 0.
    - "common" (eq. 2.6): the same given bounds in every image that has the class.
    - "tags" (eq. 2.5): 1 voxel to the whole image.
    - "none": free.

    At the first three levels a class that is absent gets 0 to 0. The background is always free.

    Args:
        label: (*S), 2D or 3D, class numbers 0..num_classes - 1 on every voxel.
        num_classes: classes of the network with the background, C.
        level: see above.
        margin: of "individual", a share of the size.
        common: of "common", one [lower, upper] per foreground class, voxels, or mm^D with `spacing_mm`.
        spacing_mm: voxel spacing, one value per axis, for bounds in mm^D; None for voxels.

    Returns:
        (C, 1, 2) float32, lower and upper; free is -inf and inf.

    Raises:
        ValueError: an argument is outside its range, or the label has other values.

    Example:
        >>> label_to_size_bounds(np.array([[0, 1, 1], [0, 1, 1]]), 2, margin=0.25).tolist()
        [[[-inf, inf]], [[3.0, 5.0]]]
    """
    _check_level(level)
    check_margin("margin", margin)
    array = _checked_label(label, num_classes, "label")
    bounds = free_bounds(num_classes, 1)
    if level == "none":
        return bounds
    voxel = 1.0 if spacing_mm is None else math.prod(_checked_spacing(spacing_mm, array.ndim))
    size = voxel * np.bincount(array.ravel(), minlength=num_classes)[1:].astype(np.float64)
    if level == "individual":
        lower, upper = np.maximum(size * (1 - margin), 0), size * (1 + margin)
    elif level == "common":
        if common is None:
            raise ValueError('common: expected one [lower, upper] per foreground class for level "common", got None.')
        lower, upper = np.array(_checked_common(common, num_classes, "common")).T
    else:
        lower, upper = np.full_like(size, voxel), np.full_like(size, voxel * array.size)
    present = size > 0
    bounds[1:, 0] = torch.from_numpy(np.stack([lower * present, upper * present], axis=1)).float()
    return bounds


def label_to_centroid_bounds(
    label: np.ndarray | Tensor,
    num_classes: int,
    *,
    margin_voxels: float = 20,
    spacing_mm: Sequence[float] | None = None,
) -> Tensor:
    """Bounds on the centroid of each class (Kervadec 2020, eq. 3.12): its true place -+ a margin, not below 0.

    An absent class has no centroid and is free, as the background is.

    Args:
        label: (*S), 2D or 3D, class numbers 0..num_classes - 1 on every voxel.
        num_classes: classes of the network with the background, C.
        margin_voxels: along each axis.
        spacing_mm: voxel spacing, one value per axis, for bounds in mm; None for voxels.

    Returns:
        (C, D, 2) float32, lower and upper, 0-based voxel coordinates or index * spacing, as `soft_centroid` has them.

    Raises:
        ValueError: an argument is outside its range, or the label has other values.

    Example:
        >>> label_to_centroid_bounds(np.array([[0, 1, 1], [0, 1, 1]]), 2, margin_voxels=1)[1].tolist()
        [[0.0, 1.5], [0.5, 2.5]]
    """
    check_margin("margin_voxels", margin_voxels)
    array = _checked_label(label, num_classes, "label")
    spacing = np.ones(array.ndim) if spacing_mm is None else np.array(_checked_spacing(spacing_mm, array.ndim))
    bounds = free_bounds(num_classes, array.ndim)
    voxels = np.nonzero(array)
    classes = array[voxels]
    count = np.bincount(classes, minlength=num_classes)
    sums = np.stack([np.bincount(classes, weights=axis, minlength=num_classes) for axis in voxels], axis=1)
    present = np.flatnonzero(count)
    centroid = sums[present] / count[present, None]
    lower, upper = np.maximum(centroid - margin_voxels, 0), centroid + margin_voxels
    bounds[present] = torch.from_numpy(np.stack([lower * spacing, upper * spacing], axis=-1)).float()
    return bounds


class LabelToBoundsd(MapTransform):
    """Bounds of a label, for experiments that pretend that only sizes or places of the objects are known.

    Reads the label at `keys`, (1, *S), and writes `bounds_key`, (C, M, 2) float32, lower and upper, background first;
    M = 1 for sizes, D for centroids. The bounds are those of the array at this place in the chain: put it after all
    spatial augmentation, because a crop, a zoom or a rotation changes sizes and places. To constrain the volume that
    all slices of a patient have together (Kervadec 2020, 2.4.4), put it before the slicing and give each slice the
    bounds of its volume.

    Args:
        keys: key of the label.
        bounds_key: key of the bounds.
        num_classes: classes of the network with the background, C.
        statistic: "size" or "centroid".
        level: "individual", "common", "tags" or "none", see `label_to_size_bounds`; for centroids "individual" or
            "none".
        margin: of individual sizes, a share.
        margin_voxels: of centroids.
        common_bounds: for level "common": one [lower, upper] per foreground class in `units`, or the path of the file
            that `medconstraints.transforms.common_bounds` writes.
        units: "voxel", or "mm" (mm^D for sizes), with the spacing of the label's affine. The statistic needs the same
            spacing: it is written to `spacing_key`, (D,), to be given to `ConstraintLoss` as "spacing_mm".
        spacing_key: key of the spacing, with `units` "mm".
        image_key: key of the image, which tells the number of axes when `level` is "none" and there is no label.
        full_key: an item whose value here is true gets free bounds, because its whole label trains it (hybrid
            training).
        allow_missing_keys: leave items without a label as they are.

    Raises:
        ValueError: an argument is outside its range, or the label is not (1, *S), has other values than
            0..num_classes - 1 or (for "mm") no affine; the message names the file.

    Example:
        >>> item = {"label": torch.tensor([[[0, 1, 1], [0, 1, 0]]])}
        >>> LabelToBoundsd(num_classes=2, level="tags")(item)["bounds"].tolist()
        [[[-inf, inf]], [[1.0, 6.0]]]
    """

    def __init__(
        self,
        keys: KeysCollection = "label",
        bounds_key: str = "bounds",
        *,
        num_classes: int,
        statistic: str = "size",
        level: str = "individual",
        margin: float = 0.1,
        margin_voxels: float = 20,
        common_bounds: Sequence[Sequence[float]] | str | PathLike[str] | None = None,
        units: str = "voxel",
        spacing_key: str = "spacing_mm",
        image_key: str = "image",
        full_key: str = "fully_labelled",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        check_num_classes(num_classes)
        _check_level(level)
        check_units(units)
        check_margin("margin", margin)
        check_margin("margin_voxels", margin_voxels)
        if statistic not in ("size", "centroid"):
            raise ValueError(f'statistic: expected "size" or "centroid", got {statistic!r}.')
        if statistic == "centroid" and level not in ("individual", "none"):
            raise ValueError(
                f'level: expected "individual" or "none" for centroids, got {level!r}: there is no common place.'
            )
        if (level == "common") != (common_bounds is not None):
            raise ValueError(
                'common_bounds: expected bounds, or the path of their file, exactly if level is "common", got '
                f"{common_bounds!r} with level {level!r}."
            )
        if isinstance(common_bounds, str | PathLike):
            # Not imported above: `python -m medconstraints.transforms.common_bounds` would find itself imported.
            from medconstraints.transforms.common_bounds import load_common_bounds

            if units != "voxel":
                raise ValueError(
                    f"common_bounds: expected a list of bounds in mm for units {units!r}, got {common_bounds}: the "
                    'file counts voxels; use units "voxel".'
                )
            common_bounds = load_common_bounds(common_bounds)
        self.common_bounds = (
            None if common_bounds is None else _checked_common(common_bounds, num_classes, "common_bounds")
        )
        self.bounds_key = bounds_key
        self.num_classes = num_classes
        self.statistic = statistic
        self.level = level
        self.spacing_key = spacing_key
        self.image_key = image_key
        self.margin = margin
        self.margin_voxels = margin_voxels
        self.units = units
        self.full_key = full_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the bounds to a copy of `data`."""
        item = dict(data)
        full = is_fully_labelled(item, self.full_key)
        if self.level == "none" and not set(self.keys) & set(item):
            # Nothing is looked up in the label; a centroid has as many components as the image has axes.
            components = 1 if self.statistic == "size" else item[self.image_key].ndim - 1
            item[self.bounds_key] = free_bounds(self.num_classes, components)
            return item
        for key in self.key_iterator(item):
            item[self.bounds_key] = self._bounds(item[key], key, free=full or self.level == "none")
            if self.units == "mm":
                spacing = spacing_of(item[key], label_name(item[key], key))
                item[self.spacing_key] = torch.tensor(spacing, dtype=torch.float32)
        return item

    def _bounds(self, label: Tensor, key: Hashable, *, free: bool) -> Tensor:
        name = label_name(label, key)
        if label.ndim not in (3, 4) or label.shape[0] != 1:
            raise ValueError(
                f"{name}: expected a label map (1, *S) with one channel, got shape {tuple(label.shape)}; use "
                "EnsureChannelFirstd before, and class numbers rather than one-hot channels."
            )
        dims = label.ndim - 1
        if free:
            return free_bounds(self.num_classes, 1 if self.statistic == "size" else dims)
        spacing = None if self.units == "voxel" else spacing_of(label, name)
        array = _checked_label(label[0], self.num_classes, name)
        if self.statistic == "centroid":
            return label_to_centroid_bounds(
                array, self.num_classes, margin_voxels=self.margin_voxels, spacing_mm=spacing
            )
        return label_to_size_bounds(
            array,
            self.num_classes,
            level=self.level,
            margin=self.margin,
            common=self.common_bounds,
            spacing_mm=spacing,
        )


def free_bounds(num_classes: int, components: int) -> Tensor:
    return torch.tensor([-math.inf, math.inf]).repeat(num_classes, components, 1)


def is_size(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and 0 <= float(value) < math.inf


def is_pair(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2


def spacing_of(volume: Tensor, name: str) -> list[float]:
    """Spacing in mm along each axis of a (C, *S) volume."""
    if not isinstance(volume, MetaTensor):
        raise ValueError(
            f'{name}: expected a MetaTensor for units "mm", got {type(volume).__name__}, which has no affine; use '
            'units "voxel", or put this transform before the conversion to a plain tensor.'
        )
    affine = torch.as_tensor(volume.affine, dtype=torch.float64).cpu()
    spacing: list[float] = affine[:-1, : volume.ndim - 1].norm(dim=0).tolist()
    return spacing


def _checked_label(label: np.ndarray | Tensor, num_classes: int, name: str) -> np.ndarray:
    check_num_classes(num_classes)
    array = np.asarray(label.detach().cpu() if isinstance(label, Tensor) else label)
    if array.ndim not in (2, 3):
        raise ValueError(f"{name}: expected a 2D or 3D map without channel axis, got shape {array.shape}.")
    with np.errstate(invalid="ignore"):  # NaN and infinity become some number, which they do not equal
        numbers = array.astype(np.int64, copy=False)
    whole = numbers is array or bool((numbers == array).all())
    if not whole or (array.size and not 0 <= numbers.min() <= numbers.max() < num_classes):
        raise ValueError(
            f"{name}: expected class numbers 0 to {num_classes - 1} on every voxel, got values such as "
            f"{np.unique(array)[[0, -1]].tolist()}; set num_classes, map them (MapLabelValued), and give the full "
            "label: a size needs all voxels."
        )
    return numbers


def _checked_spacing(spacing_mm: Sequence[float], dims: int) -> list[float]:
    spacing = [float(value) for value in spacing_mm]
    if len(spacing) != dims or not all(0 < value < math.inf for value in spacing):
        raise ValueError(f"spacing_mm: expected {dims} positive values, one per axis of the label, got {spacing}.")
    return spacing


def _checked_common(common: Sequence[Sequence[float]], num_classes: int, name: str) -> list[list[float]]:
    valid = len(common) == num_classes - 1 and all(
        is_pair(pair) and is_size(pair[0]) and is_size(pair[1]) and pair[0] <= pair[1] for pair in common
    )
    if not valid:
        raise ValueError(
            f"{name}: expected one [lower, upper] for each of the {num_classes - 1} foreground classes, 0 <= "
            f"lower <= upper, got {common!r}."
        )
    return [[float(lower), float(upper)] for lower, upper in common]


def check_num_classes(num_classes: int) -> None:
    if int(num_classes) != num_classes or num_classes < 2:
        raise ValueError(f"num_classes: expected an integer of at least 2, background included, got {num_classes}.")


def _check_level(level: str) -> None:
    if level not in LEVELS:
        raise ValueError(f"level: expected one of {', '.join(LEVELS)}, got {level!r}.")


def check_units(units: str) -> None:
    if units not in UNITS:
        raise ValueError(f'units: expected "voxel" or "mm", got {units!r}.')


def check_margin(name: str, margin: float) -> None:
    if not 0 <= margin < math.inf:
        raise ValueError(f"{name}: expected a number >= 0, got {margin!r}.")
