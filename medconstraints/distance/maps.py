"""Signed distance to the boundary of a mask, or of each class of a label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from medconstraints import checks
from medconstraints.distance import torch_maps

__all__ = ["check_options", "host_array", "mask_numbers", "signed_distance", "signed_distance_map"]

CONVENTIONS = ("boundary", "voxel", "published")
BACKENDS = ("auto", "numba", "torch")

Array = TypeVar("Array", np.ndarray, Tensor)


def signed_distance(
    mask: Array,
    spacing_mm: Sequence[float] | Tensor | None = None,
    *,
    convention: str = "boundary",
    slice_axis: int | None = None,
    clip_mm: float | None = None,
    backend: str = "auto",
) -> Array:
    """Signed Euclidean distance to the boundary of a mask: level set function of Kervadec 2020, eq. 4.4.

    Args:
        mask: (*S), 2D or 3D, boolean or of zeros and ones.
        spacing_mm: see `signed_distance_map`, as for the others.
        convention: see there.
        slice_axis: see there.
        clip_mm: see there.
        backend: see there.

    Returns:
        (*S) float32 of the kind and on the device of the mask, mm, negative inside; zeros for a mask with one side.

    Raises:
        ValueError: an argument is outside its range, or the mask has other values than 0 and 1.

    Example:
        >>> signed_distance(np.array([[0, 0, 1, 1, 0]]), (1.0, 2.0))
        array([[ 3.,  1., -1., -1.,  1.]], dtype=float32)
    """
    check_options(convention, slice_axis, clip_mm, backend)
    return _maps(mask, 2, spacing_mm, [1], convention, slice_axis, clip_mm, backend, name="mask")[0]


def signed_distance_map(
    label: Array,
    num_classes: int,
    spacing_mm: Sequence[float] | Tensor | None = None,
    *,
    classes: Sequence[int] | None = None,
    convention: str = "boundary",
    slice_axis: int | None = None,
    clip_mm: float | None = None,
    backend: str = "auto",
) -> Array:
    """Signed Euclidean distance to the boundary of each class, exact: level set functions of Kervadec 2020, eq. 4.4.

    Args:
        label: (*S), 2D or 3D, class numbers 0..num_classes - 1.
        num_classes: classes with the background, C.
        spacing_mm: voxel spacing, one value per axis; None for 1 each.
        classes: those that get a map; None for all.
        convention: what is measured.
            "boundary": from the centre of a voxel to the faces between voxels of the class and others, so that the
            voxels next to a face are half a step from it. Nothing is known beyond the edge of the image, which is no
            boundary.
            "voxel": to the centre of the nearest voxel on the other side, as Euclidean distance transforms do.
            "published": the thesis's, "voxel" outside, and inside less the smallest step: rims inside are at 0.
        slice_axis: None for distances in the volume; an axis 0..2 for distances within each slice across it.
        clip_mm: values are limited to +-clip_mm, and the work with them. None: no limit.
        backend: "numba" (compiled, threads as many as torch has; the fastest on a CPU), "torch" (on the label's
            device), or "auto": "torch" for tensors on an accelerator, else "numba".

    Returns:
        (C, *S) float32 of the kind and on the device of the label, or (len(classes), *S), mm, negative inside. A class
        that is absent or fills the image (with `slice_axis`: the slice) has no boundary, and a map of zeros.

    Raises:
        ValueError: an argument is outside its range, or the label has values that are no class numbers.

    Example:
        >>> signed_distance_map(np.array([[0, 1, 1, 2]]), 3)[1]
        array([[ 0.5, -0.5, -0.5,  0.5]], dtype=float32)
    """
    check_options(convention, slice_axis, clip_mm, backend)
    chosen = checks.class_numbers(classes, checks.whole_number("num_classes", num_classes, least=2))
    return _maps(label, num_classes, spacing_mm, chosen, convention, slice_axis, clip_mm, backend, name="label")


def check_options(convention: str, slice_axis: int | None, clip_mm: float | None, backend: str) -> None:
    """The options that distances have wherever they are asked for.

    Raises:
        ValueError: one of them is unknown or outside its range.
    """
    checks.choice("convention", convention, CONVENTIONS)
    checks.choice("backend", backend, BACKENDS)
    checks.slice_axis(slice_axis)
    if clip_mm is not None:
        checks.number("clip_mm", clip_mm, above=0.0)


def mask_numbers(mask: np.ndarray | Tensor) -> np.ndarray:
    """A mask (*S) of booleans, or of zeros and ones, as uint8 on the host.

    Raises:
        ValueError: not 2 or 3 axes with voxels, or another value.
    """
    array = host_array(mask)
    _check_shape(array.shape, "mask")
    numbers = _whole_numbers(array, 2, "mask")
    if numbers.max() > 1:
        raise _no_class_number("mask", 2, f"values up to {numbers.max()}")
    return numbers


def host_array(values: np.ndarray | Tensor) -> np.ndarray:
    """A tensor, or what is one already, as a numpy array."""
    if not isinstance(values, Tensor):
        return np.asarray(values)
    if values.dtype == torch.bfloat16:  # which numpy does not know
        values = values.float()
    array: np.ndarray = checks.plain(values).detach().cpu().numpy()
    return array


def _maps(
    label: Array,
    num_classes: int,
    spacing_mm: Sequence[float] | Tensor | None,
    classes: Sequence[int],
    convention: str,
    slice_axis: int | None,
    clip_mm: float | None,
    backend: str,
    *,
    name: str,
) -> Array:
    """Maps of the chosen classes; the options are checked, the label and what depends on its shape are not."""
    shape = tuple(label.shape)
    _check_shape(shape, name)
    spacing = checks.spacing(spacing_mm, len(shape))
    axis = checks.slice_axis(slice_axis, len(shape))
    # The thesis takes 1 from the distances inside, which is a step only at a spacing of 1 mm.
    smallest = min(step for number, step in enumerate(spacing) if number != axis)
    how = torch_maps.How(
        to_face=convention == "boundary",
        shift_inside_mm=smallest if convention == "published" else 0.0,
        clip_mm=None if clip_mm is None else float(clip_mm),
    )
    if backend == "auto":
        backend = "torch" if isinstance(label, Tensor) and label.device.type != "cpu" else "numba"
    if backend == "torch":
        tensor = checks.plain(label) if isinstance(label, Tensor) else torch.from_numpy(_native(label))
        tensor = _checked_tensor(tensor, num_classes, name)
        axes = [number for number in range(len(shape)) if number != axis]
        maps = torch.stack([torch_maps.signed_map(tensor == number, spacing, axes, how) for number in classes])
        return maps if isinstance(label, Tensor) else maps.cpu().numpy()
    result = _numpy_maps(host_array(label), num_classes, classes, spacing, axis, how, name)
    return torch.from_numpy(result).to(label.device) if isinstance(label, Tensor) else result


def _numpy_maps(
    array: np.ndarray,
    num_classes: int,
    classes: Sequence[int],
    spacing: Sequence[float],
    axis: int | None,
    how: torch_maps.How,
    name: str,
) -> np.ndarray:
    # Imported here: numba takes a second to start.
    from medconstraints.distance.numba_maps import class_extents, signed_maps

    # Slices go in front: the distances are then within planes of the first axis. A 2D label is one such plane.
    first = axis or 0
    planes = array[None] if array.ndim == 2 else np.moveaxis(array, first, 0)
    steps = [1.0, *spacing] if array.ndim == 2 else [spacing[first], *spacing[:first], *spacing[first + 1 :]]
    numbers = _whole_numbers(planes, num_classes, name)
    extents = class_extents(numbers, num_classes)
    if extents is None:
        raise _no_class_number(name, num_classes, f"values from {numbers.min()} to {numbers.max()}")
    maps = signed_maps(numbers, classes, extents, steps, how, by_slice=array.ndim == 2 or axis is not None)
    return np.ascontiguousarray(maps[:, 0] if array.ndim == 2 else np.moveaxis(maps, 1, first + 1))


def _native(array: np.ndarray) -> np.ndarray:
    """Torch knows neither foreign byte orders nor negative strides, and warns of arrays it may not write to."""
    native = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    return native if native.flags.writeable else native.copy()


def _check_shape(shape: Sequence[int], name: str) -> None:
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(
            f"{name}: expected (X, Y) or (X, Y, Z) with at least one voxel, got shape {tuple(shape)}; drop the batch "
            "and channel axes."
        )


def _no_class_number(name: str, num_classes: int, found: str) -> ValueError:
    if name == "mask":
        return ValueError(
            f"mask: expected zeros and ones, got {found}; compare a label with its class number, and probabilities "
            "with a threshold."
        )
    return ValueError(
        f"{name}: expected whole class numbers 0..{num_classes - 1}, got {found}; set num_classes, map the values "
        '(MapLabelValued), or resample labels with the mode "nearest".'
    )


def _whole_numbers(label: np.ndarray, num_classes: int, name: str) -> np.ndarray:
    """The label as uint8 in C order (int64 beyond 255 classes), whole; uint8 values may still be no classes."""
    if label.dtype.kind not in "biuf":
        raise ValueError(f"{name}: expected numbers, got the type {label.dtype}.")
    kind = np.uint8 if num_classes <= 255 else np.int64
    if label.dtype == kind or label.dtype.kind == "b":
        return np.ascontiguousarray(label, dtype=kind)
    low, high = label.min(), label.max()
    if not (low >= 0 and high < num_classes):  # also NaN
        raise _no_class_number(name, num_classes, f"values from {low:g} to {high:g}")
    numbers = np.ascontiguousarray(label).astype(kind)
    if label.dtype.kind == "f" and not np.array_equal(numbers, label):
        raise _no_class_number(name, num_classes, f"{label[numbers != label].flat[0]:g}")
    return numbers


def _checked_tensor(label: Tensor, num_classes: int, name: str) -> Tensor:
    if label.dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch cannot compare them
        label = label.to(torch.int64)
    if label.dtype != torch.bool:
        low, high = (float(value) for value in torch.aminmax(label))
        if not (low >= 0 and high < num_classes):
            raise _no_class_number(name, num_classes, f"values from {low:g} to {high:g}")
        if label.is_floating_point() and bool((rest := label != label.floor()).any()):
            raise _no_class_number(name, num_classes, f"{float(label[rest][0]):g}")
    return label
