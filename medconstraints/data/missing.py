"""What stands for cases that are not there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

__all__ = ["MissingData"]


class MissingData(Sequence[Any]):
    """Stands for cases that are not there: it has the length 1, and raises its error at the first look.

    Tools look at a bundle's engines on machines without any data; training then stops with the error.
    """

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> NoReturn:
        raise self.error
