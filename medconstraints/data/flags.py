"""Truth values from a command line, where `--overwrite false` arrives as a text that Python takes for true."""

from __future__ import annotations

from typing import Any

__all__ = ["read_flag"]


def read_flag(name: str, value: Any) -> bool:
    """A truth value, or its text: True and False, "true" and "false" in any case.

    Args:
        name: of the argument, for the error.
        value: the value.

    Raises:
        ValueError: it is anything else.

    Example:
        >>> read_flag("overwrite", "false")
        False
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ValueError(f"{name}: expected true or false, got {value!r}.")
