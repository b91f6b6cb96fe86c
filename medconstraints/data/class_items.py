"""Items of a classification: image files or rows of arrays in an npz file, each with the number of its class."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from medconstraints.data.datalist_sections import load_datalist
from medconstraints.data.missing import MissingData

__all__ = ["class_items"]


def class_items(datalist: str | PathLike[str], section: str, *, num_classes: int) -> Any:
    """Items `{"image": path or array, "label": class number, ...}` of a section; `MissingData` without a datalist.

    An entry is `{"image": path, "class": number}`, or names arrays of an npz file, as MedMNIST's are:
    `{"npz": path, "images": name, "labels": name}`, which gives an item for each row, with "case" for its name.

    Args:
        datalist: JSON file; paths start at its folder.
        section: such as "training".
        num_classes: classes are numbered 0..num_classes - 1.

    Raises:
        ValueError: the section is missing or empty, an entry has neither form, or a class number is out of range.
    """
    try:
        content = load_datalist(datalist)
    except FileNotFoundError as error:
        return MissingData(error)
    file = Path(datalist)
    entries = content.get(section)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"datalist: expected entries in section {section!r} of {file.name}, got {entries!r}.")
    items: list[dict[str, Any]] = []
    for number, entry in enumerate(entries):
        where = f"datalist: entry {number} of {section!r} in {file.name}"
        if {"npz", "images", "labels"} <= entry.keys():
            items += _rows(file.parent / entry["npz"], entry["images"], entry["labels"], where)
        elif {"image", "class"} <= entry.keys():
            items.append({**entry, "image": str(file.parent / entry["image"]), "label": entry["class"]})
        else:
            raise ValueError(f"{where}: expected image and class, or npz, images and labels, got {sorted(entry)}.")
        strange = {item["label"] for item in items if item["label"] not in range(num_classes)}
        if strange:
            raise ValueError(f"{where}: expected classes 0..{num_classes - 1}, got {sorted(strange, key=str)}.")
    return items


def _rows(path: Path, images: str, labels: str, where: str) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{where}: no file {path}.")
    with np.load(path) as arrays:
        if missing := [name for name in (images, labels) if name not in arrays]:
            raise ValueError(f"{where}: {path.name} has no arrays {missing}, it has {sorted(arrays)}.")
        pictures, classes = arrays[images], arrays[labels].reshape(-1)
    if len(pictures) != len(classes):
        raise ValueError(f"{where}: expected a label for each image, got {len(classes)} for {len(pictures)}.")
    return [
        {"image": picture, "label": int(label), "case": f"{images}[{row}]"}
        for row, (picture, label) in enumerate(zip(pictures, classes, strict=True))
    ]
