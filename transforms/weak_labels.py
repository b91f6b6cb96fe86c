"""Weak labels: a few annotated voxels of each object, made from a full label or read from scribbles."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type

from medconstraints import checks
from medconstraints.volumes import VolumeError

__all__ = ["WeakLabeld"]


class WeakLabeld(MapTransform):
    """What a rule leaves of the annotation: for experiments that pretend that no more was annotated, and for scribbles.

    Reads the map at `keys`, (1, *S), and writes `weak_key`, (1, *S) float32: the class on the annotated voxels,
    `ignore_index` elsewhere, with the meta data of the map. Put it before spatial augmentation, which would change what
    is left, and treat the weak label like a label from there on: mode "nearest" (which makes MONAI's resampling return
    float32 whatever it gets; hence the type). MONAI fills what comes into view with zeros, which would be annotated
    background: give the weak label `padding_mode="border"`, or pad it with `ignore_index`.

    Args:
        keys: key of the label, or of the scribbles.
        weak_key: key of the weak label.
        rule: function `(map (*S), ignore_index) -> weak label (*S)`: `Erosion(...)`, `Points(...)`, `Scribble(...)`, or
            yours.
        ignore_index: value where nothing is annotated, no class; in the map too: such voxels belong to no class.
        full_key: an item whose value here is true gets its whole label, read at `label_key`, as weak label, background
            included (hybrid training).
        label_key: see `full_key`.
        allow_empty: accept an item without any annotated voxel, such as a label without foreground.
        allow_missing_keys: leave items without the map as they are.

    Raises:
        ValueError: an argument is outside its range; or, as a `VolumeError` that names the file: the map is not (1,
            *S), has other values than the rule knows, or nothing is annotated and `allow_empty` is False.
        KeyError: the map is missing, or `full_key` is true but there is no label.

    Example:
        >>> from medconstraints.transforms import Scribble
        >>> item = {"scribble": torch.tensor([[[0, 4, 4], [4, 3, 4]]])}
        >>> WeakLabeld("scribble", rule=Scribble(unlabelled=4))(item)["weak_label"].int().tolist()
        [[[0, -1, -1], [-1, 3, -1]]]
    """

    def __init__(
        self,
        keys: KeysCollection = "label",
        weak_key: str = "weak_label",
        *,
        rule: Callable[[Any, int], np.ndarray],
        ignore_index: int = -1,
        full_key: str = "fully_labelled",
        label_key: str = "label",
        allow_empty: bool = True,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.key = checks.one_key(keys)
        if not callable(rule):
            raise TypeError(f"rule: expected a rule such as Points(radius_voxels=4), got {rule!r}.")
        if int(ignore_index) != ignore_index or ignore_index == 0:
            raise ValueError(
                f"ignore_index: expected an integer that is no class, such as -1 or 255, got {ignore_index}; 0 is the "
                "background."
            )
        self.weak_key = weak_key
        self.rule = rule
        self.ignore_index = int(ignore_index)
        self.full_key = full_key
        self.label_key = label_key
        self.allow_empty = allow_empty

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the weak label to a copy of `data`."""
        item = dict(data)
        full = checks.fully_labelled(item, self.full_key)
        if self.key not in item and self.allow_missing_keys:
            return item
        key = self.label_key if full else self.key
        if key not in item:
            why = f", because {self.full_key} is true" if full else ""
            raise KeyError(f"{key}: expected this key in the item{why}, got {sorted(map(str, item))}.")
        label, name = item[key], checks.label_name(item[key], key)
        try:
            checks.label_map(label, "label")
            if full:
                weak = checks.label_array(label[0], ignore_index=self.ignore_index)
            else:
                weak = self.rule(label[0], self.ignore_index)
        except ValueError as error:
            raise VolumeError(f"{name}: {str(error).removeprefix('label: ')}") from error
        if not self.allow_empty and (weak == self.ignore_index).all():
            raise VolumeError(
                f"{name}: no voxel of its weak label is annotated; leave this item out, or set allow_empty=True."
            )
        item[self.weak_key] = convert_to_dst_type(weak[None], label, dtype=torch.float32)[0]
        return item
