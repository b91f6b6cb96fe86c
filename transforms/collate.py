"""Collation of boxes: a padded tensor instead of a ragged list."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.data import list_data_collate

from medconstraints.checks import label_name

__all__ = ["pad_boxes_collate"]


def pad_boxes_collate(batch: Sequence[Any], keys: Sequence[Hashable] = ("boxes",)) -> Any:
    """MONAI's `list_data_collate`, after padding the boxes of every item to one count with rows of -1.

    Args:
        batch: items (or lists of items, as cropping several patches gives them) with boxes (N, 1 + 2 D) under `keys`.
        keys: keys of the boxes; items without any of them collate as usual.

    Returns:
        The collated batch; boxes have shape (B, max N, 1 + 2 D), class -1 marks padding.

    Raises:
        ValueError: some items have boxes under a key and others do not, or one lacks what the first one has.
    """
    flat: list[Mapping[Hashable, Any]] = [i for entry in batch for i in (entry if isinstance(entry, list) else [entry])]
    items = [dict(item) for item in flat]
    for key in keys:
        if not any(key in item for item in items):
            continue
        lacking = [number for number, item in enumerate(items) if key not in item]
        if lacking:
            has = sorted(map(str, items[lacking[0]]))
            raise ValueError(
                f"{key}: some items of the batch have it, but item {lacking[0]} has only {has}; "
                "give a volume without boxes an empty (0, 1 + 2 D) tensor."
            )
        most = max(len(item[key]) for item in items)
        for item in items:
            boxes = torch.as_tensor(item[key])
            item[key] = torch.nn.functional.pad(boxes, (0, 0, 0, most - len(boxes)), value=-1)
    for key in items[0] if items else ():
        for item in items:
            if key not in item:
                name = label_name(item.get("image"), "an item")
                raise ValueError(
                    f"{key}: some items of the batch have it, but {name} has only {sorted(map(str, item))}; add it to "
                    "its entry in the datalist, or leave the entry out."
                )
    return list_data_collate(items)
