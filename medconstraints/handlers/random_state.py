"""Draws of random numbers that leave no trace."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

__all__ = ["kept_random_state"]


@contextmanager
def kept_random_state(data_loader: Any, device: torch.device) -> Iterator[None]:
    """Context after which everything that draws random numbers goes on as if nothing had been drawn in it.

    That is: torch on the CPU and on `device`, numpy, Python, and the generators of the data loader, of its samplers and
    of its data set's transforms (MONAI gives each random transform its own). Persistent workers of a data loader keep
    their own state, which cannot be reached.

    Args:
        data_loader: what is iterated over in the context.
        device: where the network runs.

    Raises:
        ValueError: the data loader's workers are persistent.

    Example:
        >>> with kept_random_state([], torch.device("cpu")):
        ...     first = torch.rand(())
        >>> bool(torch.rand(()) == first)
        True
    """
    if isinstance(data_loader, DataLoader) and data_loader.persistent_workers:
        raise ValueError(
            "data_loader: the random states of persistent workers cannot be put back; give one without "
            "persistent_workers."
        )
    restore: list[Callable[[], Any]] = []
    _remember(data_loader, restore, set())
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 - transforms draw from it
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)
            for put_back in restore:
                put_back()


def _remember(obj: Any, restore: list[Callable[[], Any]], seen: set[int]) -> None:
    """Collect what puts back every generator below an object; looks where MONAI's `set_rnd` looks."""
    if isinstance(obj, str | np.ndarray | torch.Tensor | type | ModuleType) or id(obj) in seen:
        return
    seen.add(id(obj))
    if isinstance(obj, np.random.RandomState):
        state = obj.get_state()
        restore.append(lambda: obj.set_state(state))
    elif isinstance(obj, torch.Generator):
        torch_state = obj.get_state()
        restore.append(lambda: obj.set_state(torch_state))
    elif isinstance(obj, list | tuple):
        for item in obj:
            _remember(item, restore, seen)
    else:
        # A transform that nobody seeded draws from `R` of its class, which is not in its dictionary.
        for value in [*getattr(obj, "__dict__", {}).values(), getattr(obj, "R", None)]:
            _remember(value, restore, seen)
