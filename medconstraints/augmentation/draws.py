"""What an augmenter learned, as a file of draws: readable, and enough to draw from without its network."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from medconstraints.augmentation.augmenter import Augmenter

__all__ = ["Draws", "read_draws", "write_draws"]

_KEYS = ("spatial_dims", "nodes", "quantities", "draws")


class Draws(NamedTuple):
    """Values that an augmenter drew.

    Attributes:
        spatial_dims: 2 or 3.
        nodes: of the elastic grid.
        names: of the quantities, as `augment` takes them.
        table: (N, Q) in their units.
    """

    spatial_dims: int
    nodes: int
    names: tuple[str, ...]
    table: np.ndarray


def write_draws(
    augmenter: Augmenter, path: str | os.PathLike[str], *, count: int = 512, note: Mapping[str, Any] | None = None
) -> np.ndarray:
    """Write `count` draws of an augmenter, with mean, spread and percentiles of each quantity, as JSON.

    Torch's random numbers go on as if nothing had been drawn. The former file stays until the new one is whole.

    Args:
        augmenter: as it trains, with its dropout.
        path: such as `output/augmenter.json`.
        count: number of draws.
        note: further entries, such as the epoch.

    Returns:
        The draws (count, Q).
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        table = augmenter.draw(count).double().cpu().numpy()
    summaries = [
        {
            "name": quantity.name,
            "unit": quantity.unit,
            "limit": quantity.limit,
            "mean": float(column.mean()),
            "spread": float(column.std()),
            "percentiles_5_50_95": np.percentile(column, [5, 50, 95]).tolist(),
        }
        for quantity, column in zip(augmenter.quantities, table.T, strict=True)
    ]
    content = {
        **(note or {}),
        "spatial_dims": augmenter.spatial_dims,
        "nodes": augmenter.nodes,
        "quantities": summaries,
        "draws": [[float(f"{value:.5g}") for value in row] for row in table],
    }
    file = Path(path)
    beside = file.with_name(file.name + ".part")
    beside.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(beside, file)
    return table


def read_draws(path: str | os.PathLike[str]) -> Draws:
    """The draws in a file of `write_draws`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no such file.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"path: no file {file}; training with an augmenter writes augmenter.json.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        missing = [key for key in _KEYS if key not in content]
        table = np.array(content.get("draws", []), dtype=np.float64)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"path: {file.name} is no file of draws ({error}).") from error
    names = tuple(entry["name"] for entry in content.get("quantities", []))
    if missing or table.ndim != 2 or table.shape[1] != len(names) or not np.isfinite(table).all():
        raise ValueError(
            f"path: expected a file of draws with {list(_KEYS)}, a finite number for each quantity in each draw, got "
            f"{file.name} without {missing or 'that'}; training with an augmenter writes augmenter.json."
        )
    return Draws(content["spatial_dims"], content["nodes"], names, table)
