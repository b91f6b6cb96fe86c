"""Checks of arguments, each written once with its one wording: the name, what was expected, what came, what to do."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor

__all__ = [
    "affine_spacing",
    "bounds",
    "choice",
    "class_numbers",
    "flag",
    "fully_labelled",
    "label_array",
    "label_map",
    "label_name",
    "number",
    "one_key",
    "plain",
    "readable",
    "slice_axis",
    "spacing",
    "stray_values",
    "whole_number",
]

_Option = TypeVar("_Option", str, int)
_SHOWN_VALUES = 5


def plain(tensor: Tensor) -> Tensor:
    """The tensor without MONAI's metadata, which does not belong to a sum over the image."""
    return tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor


def readable(tensor: Tensor) -> bool:
    """Whether values can be looked at: an accelerator would make the host wait, a compiler would cut its graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def flag(name: str, value: Any) -> bool:
    """A truth value; the text "false", as a command line passes on what it does not know, would count as true.

    Raises:
        TypeError: it is anything but True or False.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}; on a command line write --{name} False.")
    return value


def whole_number(name: str, value: Any, least: int) -> int:
    """An integer of at least `least`; 2.0 is one, True is none.

    Raises:
        ValueError: it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not float(value).is_integer() or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}.")
    return int(float(value))


def number(name: str, value: Any, *, least: float = -math.inf, above: float = -math.inf) -> float:
    """A finite number, at least `least` and more than `above`.

    Raises:
        ValueError: it is anything else.
    """
    good = not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
    if not good or value < least or value <= above:
        limit = f" > {above:g}" if above > -math.inf else f" >= {least:g}" if least > -math.inf else ""
        raise ValueError(f"{name}: expected a finite number{limit}, got {value!r}.")
    return float(value)


def slice_axis(value: Any, dims: int = 3) -> int | None:
    """None, or the spatial axis 0..2 of a volume that is cut into slices.

    Raises:
        ValueError: it is anything else, or an axis of what has no three spatial axes.
    """
    if value is None:
        return None
    if isinstance(value, bool) or value not in (0, 1, 2) or dims != 3:
        raise ValueError(
            f"slice_axis: expected None, or the axis 0, 1 or 2 of a volume to be cut into slices, got {value!r} for "
            f"{dims} spatial axes; an image that is one slice needs None."
        )
    return int(value)


def spacing(values: Sequence[float] | Tensor | None, dims: int) -> tuple[float, ...]:
    """Voxel spacing in mm along each axis; None gives 1 each.

    Raises:
        ValueError: not one positive finite value for each axis.
    """
    if values is None:
        return (1.0,) * dims
    steps = tuple(float(step) for step in values)
    if len(steps) != dims or not all(0 < step < math.inf for step in steps):
        raise ValueError(f"spacing_mm: expected {dims} positive finite values, one per axis, got {list(steps)}.")
    return steps


def class_numbers(classes: Sequence[Any] | None, num_classes: int) -> list[int]:
    """Numbers of some of the classes 0..num_classes - 1, in this order; None gives all.

    Raises:
        ValueError: none, or one that is no such number.
    """
    if classes is None:
        return list(range(num_classes))
    numbers = list(classes)
    whole = all(isinstance(number, Integral) and not isinstance(number, bool) for number in numbers)
    if not numbers or not whole or not all(0 <= number < num_classes for number in numbers):
        raise ValueError(f"classes: expected class numbers 0..{num_classes - 1}, got {numbers!r}.")
    return [int(number) for number in numbers]


def one_key(keys: Hashable | Iterable[Hashable]) -> Hashable:
    """The one key of a transform that writes one target.

    Raises:
        ValueError: there are several or none.
    """
    names = [keys] if isinstance(keys, str) or not isinstance(keys, Iterable) else [*keys]
    if len(names) != 1:
        raise ValueError(f"keys: expected one key, got {names}; use one transform for each target.")
    return names[0]


def bounds(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Bounds (B, C, M, 2) with lower <= upper and no NaN, for values of this shape (B, C, M).

    Looked at where they are `readable`; elsewhere a wrong pair becomes NaN.

    Raises:
        ValueError: another shape (the message says which axis), or, on the CPU, wrong values.
    """
    expected = (*shape, 2)
    if values.dim() != len(expected):
        raise ValueError(
            f"target: expected bounds of shape {expected}, (samples, classes, components, 2), got "
            f"{tuple(values.shape)} with {values.dim()} axes."
        )
    for axis, (size, given) in enumerate(zip(expected, values.shape, strict=True)):
        if size != given:
            counted = ("samples", "classes, background included", "components of the statistic", "lower and upper")
            raise ValueError(
                f"target: axis {axis} of the bounds counts {counted[axis]}: expected {size}, got {given} (shape "
                f"{tuple(values.shape)}, expected {expected})."
            )
    if not values.is_floating_point():
        values = values.float()
    lower, upper = values.unbind(-1)
    good = (lower <= upper) & (lower < math.inf) & (upper > -math.inf)
    if not readable(values):
        return values.masked_fill(~good.unsqueeze(-1), math.nan)
    if not bool(good.all()):
        where = tuple((~good).nonzero()[0].tolist())
        raise ValueError(
            f"target: expected lower <= upper, -inf <= lower < inf and -inf < upper <= inf, got {float(lower[where])} "
            f"and {float(upper[where])} at (sample, class, component) {where}; a bound that is not known is -inf or "
            "inf, never NaN."
        )
    return values


def choice(name: str, value: _Option, options: Sequence[_Option]) -> _Option:
    """One of the values that an option may have.

    Raises:
        ValueError: it is none of them.
    """
    if value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, options))}, got {value!r}.")
    return value


def label_name(volume: Any, key: Hashable) -> str:
    """File name of a loaded volume for messages; its key where it did not come from a file."""
    name = volume.meta.get("filename_or_obj") if isinstance(volume, MetaTensor) else None
    return Path(str(name)).name if name else str(key)


def label_map(label: Any, name: str) -> None:
    """Refuse what is no map of class numbers (1, *S) in 2D or 3D.

    Raises:
        ValueError: it has another shape.
    """
    if label.ndim not in (3, 4) or label.shape[0] != 1:
        raise ValueError(
            f"{name}: expected a label map (1, *S) with one channel, got shape {tuple(label.shape)}; use "
            "EnsureChannelFirstd before, and class numbers rather than one-hot channels."
        )


def stray_values(values: Any, num_classes: int | None = None, ignored: Iterable[float | None] = ()) -> str:
    """The values of a label map that are no class number, as text; empty where there are none.

    Args:
        values: array or tensor of any shape.
        num_classes: class numbers are 0..num_classes - 1; None for any whole number >= 0.
        ignored: values that are accepted besides.
    """
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    wrong = (array < 0) | (array > (math.inf if num_classes is None else num_classes - 1))
    if array.dtype.kind == "f":
        wrong |= (array != np.rint(array)) | (array == math.inf)  # NaN equals nothing
    for value in ignored:
        wrong &= array != value
    found = np.unique(array[wrong]) if wrong.any() else array[:0].ravel()
    more = f" and {len(found) - _SHOWN_VALUES} more" if len(found) > _SHOWN_VALUES else ""
    return ", ".join(f"{value:g}" for value in found[:_SHOWN_VALUES]) + more


def label_array(
    label: Any, num_classes: int | None = None, *, ignore_index: int | None = None, name: str = "label"
) -> np.ndarray:
    """A label map (*S) as int32 in C order, so that equal labels have equal bytes.

    Args:
        label: array or tensor, 2D or 3D.
        num_classes: class numbers are 0..num_classes - 1; None for any whole number >= 0.
        ignore_index: value of voxels that belong to no class; None when all do.
        name: for messages.

    Raises:
        ValueError: it has another shape or other values.
    """
    array = np.asarray(label.detach().cpu() if isinstance(label, Tensor) else label)
    if array.ndim not in (2, 3):
        raise ValueError(f"{name}: expected a 2D or 3D map without channel axis, got shape {array.shape}.")
    if num_classes is not None:
        whole_number("num_classes", num_classes, 2)
    if stray := stray_values(array, num_classes, [] if ignore_index is None else [ignore_index]):
        top = "1, 2, ..." if num_classes is None else num_classes - 1
        known = "" if ignore_index is None else f" or ignore_index={ignore_index}"
        raise ValueError(
            f"{name}: expected class numbers 0 to {top}{known} on every voxel, got {stray}; correct num_classes or "
            "ignore_index, map them (MapLabelValued), or resample labels with mode='nearest'."
        )
    return np.ascontiguousarray(array, dtype=np.int32)


def affine_spacing(volume: Any, name: str) -> tuple[float, ...]:
    """Voxel spacing in mm along each axis of a loaded volume (C, *S).

    Raises:
        ValueError: it is a plain tensor, which has no affine.
    """
    if not isinstance(volume, MetaTensor):
        raise ValueError(
            f"{name}: expected a MetaTensor, whose affine tells the millimetres, got {type(volume).__name__}; put this "
            "transform after loading and before the conversion to a plain tensor."
        )
    affine = torch.as_tensor(volume.affine, dtype=torch.float64).cpu()
    return tuple(affine[:-1, : volume.ndim - 1].norm(dim=0).tolist())


def fully_labelled(item: Mapping[Hashable, Any], full_key: str) -> bool:
    """Whether an item is one of the fully annotated ones of a hybrid training (Kervadec 2020, 2.4.3).

    Args:
        item: an entry of a datalist.
        full_key: its key that says so, true or false (or 1 or 0); an item without it is weakly labelled.

    Raises:
        ValueError: the value is none of these.
    """
    value = item.get(full_key, False)
    # "false" is a true string: only what cannot be misread is taken.
    if isinstance(value, str) or value not in (0, 1):
        raise ValueError(f"{full_key}: expected true or false, got {value!r}; correct this entry of the datalist.")
    return bool(value)
