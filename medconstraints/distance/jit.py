"""How functions are compiled: without the interpreter's lock, and once for all runs where that can be written down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

__all__ = ["compiled", "inlined"]


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The function, compiled at its first call; kept on disk, unless neither its folder nor the home can be written."""
    try:
        result: Callable[..., Any] = njit(cache=True, nogil=True, error_model="numpy", **options)(function)
    except RuntimeError:  # "no locator available": an installation for reading only, without a home
        result = njit(nogil=True, error_model="numpy", **options)(function)
    return result


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a small function that becomes a part of those that call it."""
    return compiled(function, inline="always")
