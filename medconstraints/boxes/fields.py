"""The values of one box as a file writes them: class, coordinate system, corner."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Refusal", "checked_classes", "class_number", "coordinate_system", "vector"]

SYSTEMS = {"voxel": "voxel", "ras": "RAS", "lps": "LPS"}
LARGEST = 1e9  # coordinates beyond this are mistakes, and would overflow


class Refusal(Exception):
    """Why a row, or a whole file, cannot be used; `read_boxes` turns it into a BoxFileError."""


def checked_classes(classes: Mapping[str, int], name: str) -> dict[str, int]:
    """Copy class name -> number; ValueError, in which ``name`` names the mapping, unless the numbers start at 1."""
    for label, number in classes.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must map names to class numbers from 1 on, got {label!r}: {number!r}.")
    return dict(classes)


def class_number(value: Any, names: Mapping[str, int]) -> int:
    """Class number of a name or a number; where any names are known, only their numbers."""
    known = f"known: {', '.join(f'{name} = {number}' for name, number in names.items()) or 'none'}"
    if isinstance(value, str):
        value = value.strip()
        if value in names:
            return names[value]
        if not re.fullmatch(r"[+-]?\d{1,9}", value):
            if not value:
                raise Refusal(f"has no class ({known}); give it one of these, or a class number")
            raise Refusal(f"unknown class {value!r} ({known}); {_how_to_add(value, None, names)}")
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0 or value >= 10**9:
        raise Refusal(f"class must be a name or a whole number, got {value!r}")
    if value < 1:
        raise Refusal(f"class {int(value)} is no class to box: numbers start at 1, 0 is the background")
    if names and value not in names.values():
        raise Refusal(f"unknown class {int(value)} ({known}); {_how_to_add('name', int(value), names)}")
    return int(value)


def _how_to_add(name: str, number: int | None, names: Mapping[str, int]) -> str:
    """What to do about an unknown class, in Python and on the command line of a bundle."""
    number = max(names.values(), default=0) + 1 if number is None else number
    option = f'--classes "{{{"..., " if names else ""}{name!r}: {number}}}"'
    return f"use {'one of these' if names else 'a class number'} or add it to classes= (bundle: {option})"


def coordinate_system(value: Any) -> str:
    """Name of the system: "voxel", "RAS" or "LPS", whichever way the file capitalises it."""
    system = SYSTEMS.get(str(value).strip().lower())
    if system is None:
        raise Refusal(f"unknown coordinate system {value!r}; use voxel, RAS or LPS")
    return system


def vector(values: Any, name: str, size: int) -> npt.NDArray[np.float64]:
    """``size`` finite numbers; texts of numbers too, as CSV has them."""
    if not isinstance(values, list):
        raise Refusal(f"{name!r} must be a list of {size} numbers, got {values!r}")
    if len(values) != size:
        raise Refusal(f"{name!r} has {len(values)} numbers, expected {size}")
    out = []
    for i, value in enumerate(values, start=1):
        if value == "":
            raise Refusal(f"{name}_{i} is empty; fill it in")
        try:
            number = math.nan if value is None or isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            raise Refusal(f"{name}_{i} is {value!r}, which is no number") from None
        if not abs(number) < LARGEST:  # also NaN
            raise Refusal(f"{name}_{i} is {value!r}; every coordinate must be a finite number, below {LARGEST:g}")
        out.append(number)
    return np.array(out, dtype=np.float64)
