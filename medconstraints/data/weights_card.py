"""What a file of weights says of itself: the settings that it needs, and what its training volumes were like.

The card is a record of the zip archive that `torch.save` writes: it goes where the file goes, and every reader of
weights leaves it alone.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medconstraints.volumes.facts import mask_facts
from medconstraints.volumes.files import read_voxels
from medconstraints.volumes.grids import grid_of

__all__ = ["CARD", "cohort_of", "compare_with_card", "outside_of", "read_card", "write_card"]

RECORD = "medconstraints.json"
CARD = ("bundle", "settings", "cohort")  # what of a run's settings.json the card has
NEEDED = ("num_classes", "patch_size", "spacing_mm", "nonzero")
MOST_VOLUMES = 20
SLACK = 1.5  # by which a volume may lie outside of what was seen before it is told


def write_card(path: Path, card: Mapping[str, Any]) -> None:
    """Put a card into a file that `torch.save` wrote and that has none yet."""
    with zipfile.ZipFile(path, "a") as archive:
        top = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{top}/{RECORD}", json.dumps(card))


def read_card(path: str | Path) -> dict[str, Any]:
    """The card of a file of weights; empty where it has none, as files of other tools."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(f"/{RECORD}")]
            found: dict[str, Any] = json.loads(archive.read(names[0])) if names else {}
            return found
    except (OSError, zipfile.BadZipFile, ValueError):
        return {}


def compare_with_card(card: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """What an inference would do otherwise than the training of its weights did, each with what to write.

    Example:
        >>> compare_with_card({"settings": {"num_classes": 2}}, {"num_classes": 3})
        ['num_classes is 3, but the weights were trained with 2: write --num_classes "2"']
    """
    trained = card.get("settings", {})
    return [
        f"{name} is {settings[name]}, but the weights were trained with {trained[name]}: write --{name} "
        + ("'$None'" if trained[name] is None else f'"{trained[name]}"')
        for name in NEEDED
        if name in trained and name in settings and _plain(trained[name]) != _plain(settings[name])
    ]


def _plain(value: Any) -> Any:
    """As JSON has it; a spacing of -1 along each axis is none."""
    if not isinstance(value, list | tuple):
        return value
    return None if all(one == -1 for one in value) else list(value)


def cohort_of(items: Sequence[Mapping[str, Any]], num_classes: int | None = None) -> dict[str, Any]:
    """Least and largest spacing, size, and volume of each class, of at most 20 items of a datalist, evenly spread.

    Items whose files cannot be read here are left out: the training says what is wrong with them. Labels with more
    classes than the network (`num_classes`, with the background) tell of other classes, and no volumes.
    """
    grids: list[dict[str, list[float]]] = []
    volumes: dict[str, list[float]] = {}
    for item in items[:: max(1, -(-len(items) // MOST_VOLUMES))]:
        image = item.get("image")
        try:
            voxels, affine = read_voxels(Path(image[0] if isinstance(image, list) else str(image)))
            if voxels.ndim < 3:
                continue
            grids.append(grid_of(voxels.shape, affine))
            if isinstance(item.get("label"), str):
                label, affine = read_voxels(Path(item["label"]))
                for name, facts in mask_facts(label.reshape(label.shape[:3]), affine).items():
                    volumes.setdefault(name, []).append(facts["ml"])
        except (OSError, ValueError, MemoryError):
            continue
    if not grids:
        return {}
    ranges = {key: np.array([grid[key] for grid in grids]) for key in ("spacing_mm", "size_mm")}
    found = {key: [values.min(0).tolist(), values.max(0).tolist()] for key, values in ranges.items()}
    if num_classes is not None and any(int(name) >= num_classes for name in volumes):
        volumes = {}
    return {"volumes": len(grids), **found, "ml": {name: [min(all_), max(all_)] for name, all_ in volumes.items()}}


def outside_of(cohort: Mapping[str, Any], grid: Mapping[str, Any], sizes: Mapping[str, float]) -> list[str]:
    """In which ways a volume is not like those of the training, in words.

    Args:
        cohort: of `cohort_of`.
        grid: of `grid_of`.
        sizes: value of each class, as a text -> ml of its mask.
    """
    told = []
    for key, what in (("spacing_mm", "voxels of"), ("size_mm", "an image of")):
        if key in cohort and key in grid:
            low, high = cohort[key]
            if any(not a / SLACK <= x <= b * SLACK for a, x, b in zip(low, grid[key], high, strict=True)):
                span = " x ".join(f"{x:g}" for x in grid[key])
                told.append(f"{what} {span} mm, unlike the training's {_span(low)} to {_span(high)}")
    for name, ml in sizes.items():
        if name in cohort.get("ml", {}) and ml > 0:
            low, high = cohort["ml"][name]
            if not low / SLACK <= ml <= high * SLACK:
                told.append(f"class {name}: {ml:.3g} ml, where the training had {low:.3g} to {high:.3g}")
    return told


def _span(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)
