"""Signed distance to the boundary of a mask, or of each class of a label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from medconstraints.distance import lattice, torch_maps

__all__ = ["check_options", "signed_distance", "signed_distance_map"]

CONVENTIONS = ("boundary", "voxel", "published")
BACKENDS = ("auto", "numba", "torch", "scipy", "simpleitk")

Array = TypeVar("Array", np.ndarray, Tensor)


def check_options(convention: str, clip_mm: float | None, backend: str) -> None:
    """The options that distances have wherever they are asked for.

    Raises:
        ValueError: one of them is unknown or outside its range.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention: expected one of {', '.join(CONVENTIONS)}, got {convention!r}.")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}.")
    if clip_mm is not None and not 0 < clip_mm < math.inf:
        raise ValueError(f"clip_mm: expected a number of millimetres > 0, or None, got {clip_mm!r}.")


class _LabelError(ValueError):
    """A label with values that are no class numbers."""

    def __init__(self, message: str, found: str) -> None:
        super().__init__(message)
        self.found = found


def signed_distance(
    mask: Array,
    spacing_mm: Sequence[float] | None = None,
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
    _checked_spacing(spacing_mm, tuple(mask.shape), "mask")
    try:
        maps = signed_distance_map(
            mask,
            2,
            spacing_mm,
            classes=(1,),
            convention=convention,
            slice_axis=slice_axis,
            clip_mm=clip_mm,
            backend=backend,
        )
    except _LabelError as error:
        raise ValueError(
            f"mask: expected zeros and ones, got {error.found}; compare a label with its class number, and "
            "probabilities with a threshold."
        ) from None
    return maps[0]


def signed_distance_map(
    label: Array,
    num_classes: int,
    spacing_mm: Sequence[float] | None = None,
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
        slice_axis: None for distances in the volume; an axis for distances within each slice across it.
        clip_mm: values are limited to +-clip_mm, and with "numba" and "torch" the work too. None: no limit.
        backend: "numba" (compiled, threads as many as torch has; the fastest on a CPU), "torch" (on the label's
            device), "scipy" or "simpleitk" (by others' transforms; slow and memory-hungry but for "voxel" and
            "published"). "auto" is "torch" for tensors on an accelerator, else "numba".

    Returns:
        (C, *S) float32 of the kind and on the device of the label, or (len(classes), *S), mm, negative inside. A class
        that is absent or fills the image (with `slice_axis`: the slice) has no boundary, and a map of zeros.

    Raises:
        ValueError: an argument is outside its range, or the label has values that are no class numbers.

    Example:
        >>> signed_distance_map(np.array([[0, 1, 1, 2]]), 3)[1]
        array([[ 0.5, -0.5, -0.5,  0.5]], dtype=float32)
    """
    shape = tuple(label.shape)
    spacing = _checked_spacing(spacing_mm, shape, "label")
    axis = _checked_slice_axis(slice_axis, shape)
    chosen = _checked_classes(classes, num_classes)
    check_options(convention, clip_mm, backend)
    on_accelerator = isinstance(label, Tensor) and label.device.type != "cpu"
    if backend == "auto":
        backend = "torch" if on_accelerator else "numba"
    # The thesis takes 1 from the distances inside, which is a step only at a spacing of 1 mm.
    measured = [step for number, step in enumerate(spacing) if number != axis]
    options: dict[str, Any] = {
        "to_face": convention == "boundary",
        "shift_inside_mm": min(measured) if convention == "published" else 0.0,
    }
    clip = None if clip_mm is None else float(clip_mm)
    if backend == "torch":
        # Torch knows neither foreign byte orders nor negative strides, and warns of arrays it may not write to.
        tensor = label if isinstance(label, Tensor) else torch.from_numpy(_native(label))
        tensor = tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor
        maps = _torch_maps(_checked_tensor(tensor, num_classes), chosen, spacing, axis, clip, options)
        return maps if isinstance(label, Tensor) else maps.cpu().numpy()
    array = _as_numpy(label) if isinstance(label, Tensor) else np.asarray(label)
    result = _numpy_maps(array, num_classes, chosen, spacing, axis, clip, options, backend)
    return torch.from_numpy(result).to(label.device) if isinstance(label, Tensor) else result


def _numpy_maps(
    array: np.ndarray,
    num_classes: int,
    classes: Sequence[int],
    spacing: Sequence[float],
    axis: int | None,
    clip: float | None,
    options: dict[str, Any],
    backend: str,
) -> np.ndarray:
    # Slices go in front: the distances are then within planes of the first axis. A 2D label is one such plane.
    planes = array[None] if array.ndim == 2 else np.moveaxis(array, axis or 0, 0)
    steps = [1.0, *spacing] if array.ndim == 2 else _first(spacing, axis or 0)
    by_slice = array.ndim == 2 or axis is not None
    numbers = _checked_numbers(planes, num_classes)
    if backend == "numba":
        # Imported here: numba takes a second to start, and the other backends do without it.
        from medconstraints.distance.exact_cpu import class_extents, signed_maps

        extents = class_extents(numbers, num_classes)
        if extents is None:
            raise _no_class_number(num_classes, int(numbers.min()), int(numbers.max()))
        maps = signed_maps(numbers, classes, extents, steps, by_slice=by_slice, clip_mm=clip, **options)
    else:
        if numbers.size and numbers.max() >= num_classes:
            raise _no_class_number(num_classes, int(numbers.min()), int(numbers.max()))
        maps = _reference_maps(numbers, classes, steps, by_slice, clip, options, backend)
    maps = maps[:, 0] if array.ndim == 2 else np.moveaxis(maps, 1, (axis or 0) + 1)
    return np.ascontiguousarray(maps)


def _reference_maps(
    numbers: np.ndarray,
    classes: Sequence[int],
    steps: Sequence[float],
    by_slice: bool,
    clip: float | None,
    options: dict[str, Any],
    backend: str,
) -> np.ndarray:
    distance = lattice.distance_scipy if backend == "scipy" else lattice.distance_simpleitk
    maps = np.zeros((len(classes), *numbers.shape), np.float32)
    for row, number in enumerate(classes):
        mask = numbers == number
        parts = [((row, plane), mask[plane], steps[1:]) for plane in range(len(mask))]
        for place, part, step in parts if by_slice else [((row,), mask, steps)]:
            if part.any() and not part.all():
                maps[place] = lattice.signed_map(part, step, distance, **options)
    return maps if clip is None else np.clip(maps, -clip, clip)


def _torch_maps(
    label: Tensor,
    classes: Sequence[int],
    spacing: Sequence[float],
    axis: int | None,
    clip: float | None,
    options: dict[str, Any],
) -> Tensor:
    axes = [number for number in range(label.dim()) if number != axis]
    maps = [torch_maps.signed_map(label == number, spacing, axes, clip_mm=clip, **options) for number in classes]
    return torch.stack(maps)


def _as_numpy(label: Tensor) -> np.ndarray:
    if label.dtype == torch.bfloat16:  # which numpy does not know
        label = label.float()
    array: np.ndarray = label.detach().cpu().numpy()
    return array


def _native(array: np.ndarray) -> np.ndarray:
    native = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    return native if native.flags.writeable else native.copy()


def _first(values: Sequence[float], axis: int) -> list[float]:
    return [values[axis], *[value for number, value in enumerate(values) if number != axis]]


def _checked_spacing(spacing_mm: Sequence[float] | None, shape: tuple[int, ...], name: str) -> list[float]:
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"{name}: expected (X, Y) or (X, Y, Z) with at least one voxel, got shape {shape}.")
    if spacing_mm is None:
        return [1.0] * len(shape)
    spacing = [float(step) for step in spacing_mm]
    if len(spacing) != len(shape) or not all(0 < step < math.inf for step in spacing):
        raise ValueError(
            f"spacing_mm: expected {len(shape)} positive finite values, one per axis of the {name}, got {spacing}."
        )
    return spacing


def _checked_slice_axis(slice_axis: int | None, shape: tuple[int, ...]) -> int | None:
    if slice_axis is None:
        return None
    if len(shape) != 3 or int(slice_axis) != slice_axis or not -3 <= slice_axis < 3:
        raise ValueError(
            f"slice_axis: expected None, or an axis 0..2 of a label (X, Y, Z) to be cut into slices, got "
            f"{slice_axis!r} for a label of shape {shape}; a label that is one slice needs None."
        )
    return int(slice_axis) % 3


def _checked_classes(classes: Sequence[int] | None, num_classes: int) -> list[int]:
    if int(num_classes) != num_classes or num_classes < 2:
        raise ValueError(f"num_classes: expected an integer of at least 2, background included, got {num_classes!r}.")
    if classes is None:
        return list(range(num_classes))
    chosen = [int(number) for number in classes]
    if not chosen or chosen != list(classes) or not 0 <= min(chosen) <= max(chosen) < num_classes:
        raise ValueError(f"classes: expected class numbers 0..{num_classes - 1}, got {list(classes)!r}.")
    return chosen


def _no_class_number(num_classes: int, low: float, high: float) -> _LabelError:
    found = f"values from {low:g} to {high:g}"
    return _LabelError(
        f"label: expected class numbers 0..{num_classes - 1}, got {found}; set num_classes, or map the values "
        "(MapLabelValued).",
        found,
    )


def _not_whole(value: float) -> _LabelError:
    return _LabelError(
        f"label: expected whole class numbers, got {value:g}; a label that was resampled needs the mode "
        '"nearest", and probabilities need a threshold.',
        f"{value:g}",
    )


def _checked_numbers(label: np.ndarray, num_classes: int) -> np.ndarray:
    """The label as uint8 in C order (int64 beyond 255 classes), whole; uint8 values may still be no classes."""
    if label.dtype.kind not in "biuf":
        raise ValueError(f"label: expected numbers, got the type {label.dtype}.")
    kind = np.uint8 if num_classes <= 255 else np.int64
    if label.dtype == kind or label.dtype.kind == "b":
        return np.ascontiguousarray(label, dtype=kind)
    low, high = label.min(), label.max()
    if not (low >= 0 and high < num_classes):  # also NaN
        raise _no_class_number(num_classes, low.item(), high.item())
    numbers = np.ascontiguousarray(label).astype(kind)
    if label.dtype.kind == "f" and not np.array_equal(numbers, label):
        raise _not_whole(float(label[numbers != label].flat[0]))
    return numbers


def _checked_tensor(label: Tensor, num_classes: int) -> Tensor:
    if label.dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch cannot compare them
        label = label.to(torch.int64)
    if label.dtype != torch.bool:
        low, high = (float(value) for value in torch.aminmax(label))
        if not (low >= 0 and high < num_classes):
            raise _no_class_number(num_classes, low, high)
        if label.is_floating_point() and bool((rest := label != label.floor()).any()):
            raise _not_whole(float(label[rest][0]))
    return label
