"""What a file of weights says of itself: the settings that it needs, and what its training volumes were like.

The card is a record of the zip archive that `torch.save` writes: it goes where the file goes, and every reader of
weights leaves it alone.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["CARD", "class_names_of", "compare_with_card", "read_card", "write_card"]

RECORD = "medconstraints.json"
CARD = ("bundle", "settings", "cohort", "class_names")  # what of a run's settings.json the card has
NEEDED = ("num_classes", "patch_size", "spacing_mm", "nonzero")


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


def class_names_of(path: str | Path) -> dict[str, str] | None:
    """Value in a mask, as a text -> name of its class, where the card of these weights has them; else None."""
    return read_card(path).get("class_names") or None


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
