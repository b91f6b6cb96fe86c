"""The values of one box as a file writes them: class, coordinate system, corner."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jsonschema
import numpy as np
import numpy.typing as npt

__all__ = ["CLASSES", "Refusal", "class_number", "coordinate_system", "fit_schema", "vector"]

SYSTEMS = {"voxel": "voxel", "ras": "RAS", "lps": "LPS"}
CLASSES = {
    "description": "map names to class numbers from 1 on",
    "type": "object",
    "additionalProperties": {"type": "integer", "minimum": 1, "description": "class numbers count from 1 on"},
}
LARGEST = 1e9  # coordinates beyond this are mistakes, and would overflow


class Refusal(Exception):
    """Why a row, or a whole file, cannot be used; `read_boxes` turns it into a BoxFileError."""


def fit_schema(content: Any, schema: Mapping[str, Any]) -> None:
    """Refuse what does not fit a JSON schema; the description of the part that is broken says what to do."""
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(content))
    if error is not None:
        # Positions count from 1, as everywhere in these files.
        where = "".join(f"_{part + 1}" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
        hint = error.schema.get("description")
        raise Refusal(f"{where and f'{where[1:]}: '}{error.message}{f'; {hint}' if hint else ''}")


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


def vector(values: Sequence[Any], name: str) -> npt.NDArray[np.float64]:
    """Finite numbers; texts of numbers too, as CSV has them."""
    out = []
    for i, value in enumerate(values, start=1):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise Refusal(f"{name}_{i} is {value!r}, which is no number; correct it") from None
        if not abs(number) < LARGEST:  # also NaN
            raise Refusal(f"{name}_{i} is {value!r}; every coordinate must be a finite number, below {LARGEST:g}")
        out.append(number)
    return np.array(out)
