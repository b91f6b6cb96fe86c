"""Items of a datalist, with every path made relative to the list's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["PATH_KEYS", "read_datalist"]

# MONAI's load_decathlon_datalist completes "image" and "label" only.
PATH_KEYS = ("image", "label", "boxes", "scribble")


def read_datalist(path: str | Path, section: str) -> list[dict[str, Any]]:
    """One section of a datalist in the style of the Medical Segmentation Decathlon.

    Args:
        path: JSON file whose sections are lists of entries, dictionaries with an "image" or plain image paths.
        section: such as "training", "validation" or "test".

    Returns:
        The entries; paths under `PATH_KEYS`, or lists of them, now start at the datalist's folder. Other values stay.

    Raises:
        FileNotFoundError: no such datalist.
        ValueError: it is not JSON, or has no such section, or the section is empty or has an entry without image.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"datalist: no file {file}; set --datalist, or --dataset_dir to the folder that has it."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"datalist: {file.name} is not valid JSON ({error}).") from error
    sections = (
        sorted(key for key, value in content.items() if isinstance(value, list)) if isinstance(content, dict) else []
    )
    if section not in sections:
        raise ValueError(f"datalist: {file.name} has no section {section!r}, it has {sections}.")
    entries = []
    for number, given in enumerate(content[section]):
        entry = dict(given) if isinstance(given, dict) else {"image": given}
        if "image" not in entry:
            raise ValueError(
                f"datalist: entry {number} of {section!r} in {file.name} has no image, only {sorted(entry)}."
            )
        for key in PATH_KEYS:
            if key in entry:
                value = entry[key]
                parts = value if isinstance(value, list) else [value]
                if not parts or not all(isinstance(part, str) for part in parts):
                    raise ValueError(
                        f"datalist: entry {number} of {section!r} in {file.name}: expected a path under {key!r}, or a "
                        f"list of paths, got {value!r}."
                    )
                paths = [str(file.parent / part) for part in parts]
                entry[key] = paths if isinstance(value, list) else paths[0]
        entries.append(entry)
    if not entries:
        raise ValueError(f"datalist: section {section!r} of {file.name} is empty.")
    return entries
