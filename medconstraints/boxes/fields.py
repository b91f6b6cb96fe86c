"""The values of one box as a file writes them: class, coordinate system, corner."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jsonschema
import numpy as np
import numpy.typing as npt

__all__ = [
    "CLASSES",
    "Refusal",
    "class_number",
    "class_of_texts",
    "coordinate_system",
    "fit_schema",
    "named_class",
    "system_key",
    "vector",
]

# Slicer's old point lists number the two: 0 is RAS, 1 is LPS. Long names are those of NRRD.
SYSTEMS = {"voxel": "voxel", "ijk": "voxel", "ras": "RAS", "0": "RAS", "lps": "LPS", "1": "LPS"}
SYSTEMS |= {"right-anterior-superior": "RAS", "left-posterior-superior": "LPS"}
SYSTEM_KEYS = ("coordinatesystem", "space")  # without case, spaces and underscores
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


def named_class(text: str, names: Mapping[str, int]) -> int | None:
    """Number of a class whose name a text is, but for case, or for a number that a program put behind it.

    Example:
        >>> named_class("hippocampus-1", {"Hippocampus": 2}), named_class("liver", {"Hippocampus": 2})
        (2, None)
    """
    plain = {name.strip().casefold(): number for name, number in names.items()}
    bare = text.strip().casefold()
    found = plain.get(bare)
    return plain.get(_unnumbered(bare)) if found is None else found


def class_of_texts(texts: Sequence[str], names: Mapping[str, int], stem: str, default: re.Pattern[str]) -> int:
    """Class of what a program saved: the first text that names one, else, where all were given by itself, the file.

    Args:
        texts: such as a label, a name, a description; may be empty.
        names: class name -> number.
        stem: name of the file without its ending.
        default: names that the program gives by itself, which say nothing.
    """
    given = [text.strip() for text in texts if text.strip()]
    named = [text for text in given if not default.fullmatch(text)]
    for text in given:
        if text.isdecimal() or named_class(text, names) is not None:
            return class_number(text, names)
    if not named and (found := named_class(stem, names)) is not None:
        return found
    # Of a name with a number behind it the hint had better tell the name.
    return class_number(_unnumbered((named or given or [""])[0]), names)


def _unnumbered(text: str) -> str:
    return re.sub(r"([-_ ]\d+)+$", "", text)


def class_number(value: Any, names: Mapping[str, int]) -> int:
    """Class number of a name or a number; where any names are known, only their numbers. A name may be "1"."""
    if not isinstance(value, bool) and str(value).strip() in names:
        return names[str(value).strip()]
    known = f"known: {', '.join(f'{name} = {number}' for name, number in names.items()) or 'none'}"
    if isinstance(value, str):
        value = value.strip()
        if (found := named_class(value, names)) is not None:
            return found
        if not re.fullmatch(r"[+-]?\d{1,9}", value):
            if not value:
                raise Refusal(f"has no class ({known}); give it one of these, or a class number")
            raise Refusal(f"unknown class {value!r} ({known}); {_how_to_add(value, None, names)}")
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0 or value >= 10**9:
        raise Refusal(f"class must be a name or a whole number, got {_short(value)}")
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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} characters)"


def coordinate_system(value: Any) -> str:
    """Name of the system: "voxel", "RAS" or "LPS", whichever way the file capitalises it."""
    system = SYSTEMS.get(str(value).strip().lower())
    if system is None:
        raise Refusal(f"unknown coordinate system {value!r}; use voxel, RAS or LPS")
    return system


def system_key(text: str) -> bool:
    """Whether a word is the name of the setting that tells a coordinate system.

    Raises:
        Refusal: it looks like one, and is not known.

    Example:
        >>> system_key("coordinate_system"), system_key("CoordinateSystem"), system_key("class")
        (True, True, False)
    """
    plain = re.sub(r"[\s_-]", "", text.lower())
    if plain in SYSTEM_KEYS:
        return True
    if ("coord" in plain and "unit" not in plain) or plain in ("system", "frame", "referenceframe", "orientation"):
        raise Refusal(f"{text.strip()!r} looks like a coordinate system; call it coordinate_system: voxel, RAS or LPS")
    return False


def vector(values: Sequence[Any], name: str) -> npt.NDArray[np.float64]:
    """Finite numbers; texts of numbers too, as CSV has them."""
    out = []
    for i, value in enumerate(values, start=1):
        try:
            number = float("_" if "_" in str(value) else value)  # Python reads 1_0 as 10
        except (ValueError, OverflowError):
            raise Refusal(f"{name}_{i} is {_short(value)}, which is no number; correct it") from None
        if not abs(number) < LARGEST:  # also NaN
            raise Refusal(f"{name}_{i} is {_short(value)}; every coordinate must be a finite number, below {LARGEST:g}")
        out.append(number)
    return np.array(out)
