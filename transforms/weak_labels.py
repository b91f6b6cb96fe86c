"""Weak labels: a few annotated voxels of each object, made from a full label or read from scribbles."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type
from torch import Tensor

from medconstraints.transforms.check_volumes import VolumeError
from medconstraints.transforms.weak_label_maps import (
    as_array,
    check_ignore_index,
    class_map,
    eroded,
    pointed,
    shown_values,
    whole_number,
)

__all__ = [
    "ErodeLabeld",
    "RandomPointLabeld",
    "ScribbleToWeakLabeld",
    "is_fully_labelled",
    "label_name",
]


def is_fully_labelled(item: Mapping[Hashable, Any], full_key: str) -> bool:
    """Whether an item is one of the fully annotated ones of a hybrid training (Kervadec 2020, 2.4.3).

    Args:
        item: an entry of a datalist.
        full_key: its key that says so, true or false (or 1 or 0); an item without it is weakly labelled.

    Raises:
        ValueError: the value is none of these.
    """
    value = item.get(full_key, False)
    # "false" is a true string: only what cannot be misread is taken.
    if isinstance(value, str) or value not in (0, 1):
        raise ValueError(f"{full_key}: expected true or false, got {value!r}; correct this entry of the datalist.")
    return bool(value)


def label_name(label: Any, key: Hashable) -> str:
    """File name of a loaded label for messages; its key where it did not come from a file."""
    name = label.meta.get("filename_or_obj") if isinstance(label, MetaTensor) else None
    return Path(str(name)).name if name else str(key)


class _WeakLabeld(MapTransform):
    """Reads a map (1, *S), writes its weak label like it; subclasses say what is left of the annotation."""

    def __init__(
        self,
        keys: KeysCollection,
        weak_key: str,
        *,
        ignore_index: int,
        full_key: str,
        label_key: str | None,
        allow_empty: bool,
        allow_missing_keys: bool,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        check_ignore_index(ignore_index)
        self.weak_key = weak_key
        self.ignore_index = int(ignore_index)
        self.full_key = full_key
        self.label_key = label_key
        self.allow_empty = allow_empty

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the weak label to a copy of `data`."""
        item = dict(data)
        full = is_fully_labelled(item, self.full_key)
        for key in self.key_iterator(item):
            source = self.label_key if full and self.label_key is not None else key
            if source not in item:
                raise KeyError(
                    f"{source}: expected the full label under this key, because {self.full_key} is true, got "
                    f"{sorted(map(str, item))}; set label_key, or {self.full_key} to false."
                )
            label = item[source]
            name = label_name(label, source)
            if label.ndim not in (3, 4) or label.shape[0] != 1:
                raise ValueError(
                    f"{name}: expected a map (1, *S) with one channel, got shape {tuple(label.shape)}; use "
                    "EnsureChannelFirstd before, and class numbers rather than one-hot channels."
                )
            weak = class_map(label[0], self.ignore_index, name) if full else self._weaken(label[0], name)
            if not self.allow_empty and (weak == self.ignore_index).all():
                raise VolumeError(
                    f"{name}: no voxel of its weak label is annotated; leave this item out, or set allow_empty=True."
                )
            item[self.weak_key] = convert_to_dst_type(weak[None], label, dtype=torch.float32)[0]
        return item

    def _weaken(self, label: Tensor, name: str) -> np.ndarray:
        raise NotImplementedError


class ErodeLabeld(_WeakLabeld):
    """Weak label by erosion, for experiments that pretend that only the middle of each object was painted.

    Reads the label at `keys`, (1, *S), and writes `weak_key`, (1, *S) float32: the class on the annotated voxels,
    `ignore_index` elsewhere, with the meta data of the label. Put it before spatial augmentation, which would change
    what is left, and treat the weak label like a label from there on: mode "nearest" (which makes MONAI's resampling
    return float32 whatever it gets; hence the type). MONAI fills what comes into view with zeros, which would be
    annotated background: give the weak label `padding_mode="border"`, or pad it with `ignore_index`.

    Args:
        keys: key of the label.
        weak_key: key of the weak label.
        kernel_voxels: see `erode_label`.
        slice_axis: see `erode_label`.
        ignore_index: see `erode_label`.
        full_key: an item whose value here is true keeps its whole label as weak label, background included (hybrid
            training).
        allow_empty: accept an item without any annotated voxel (for erosion, one without foreground).
        allow_missing_keys: leave items without a label as they are.

    Raises:
        ValueError: an argument is outside its range, the label is not (1, *S) or has no class numbers, or (a
            `VolumeError`) nothing is annotated and `allow_empty` is False; the message names the file.
    """

    def __init__(
        self,
        keys: KeysCollection = "label",
        weak_key: str = "weak_label",
        *,
        kernel_voxels: int = 10,
        slice_axis: int | None = None,
        ignore_index: int = -1,
        full_key: str = "fully_labelled",
        allow_empty: bool = True,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(
            keys,
            weak_key,
            ignore_index=ignore_index,
            full_key=full_key,
            label_key=None,
            allow_empty=allow_empty,
            allow_missing_keys=allow_missing_keys,
        )
        self.kernel_voxels = whole_number("kernel_voxels", kernel_voxels, 1)
        self.slice_axis = slice_axis

    def _weaken(self, label: Tensor, name: str) -> np.ndarray:
        array = class_map(label, self.ignore_index, name)
        return eroded(array, self.kernel_voxels, self.slice_axis, self.ignore_index)


class RandomPointLabeld(_WeakLabeld):
    """Weak label of one random disc a class, for experiments that pretend that an annotator only clicked.

    Reads the label at `keys`, (1, *S), and writes `weak_key`, (1, *S) float32, with the meta data of the label; what
    `ErodeLabeld` says about its place and its augmentation holds here too. An annotator clicks once: the same label
    gets the same points at every call and in every process, and caching data sets may keep them.

    Args:
        keys: key of the label.
        weak_key: key of the weak label.
        radius_voxels: see `random_point_label`.
        slice_axis: see `random_point_label`.
        background: see `random_point_label`.
        ignore_index: see `random_point_label`.
        seed: see `random_point_label`.
        full_key: see `ErodeLabeld`.
        allow_empty: accept an item without any annotated voxel (without `background`, one without foreground).
        allow_missing_keys: leave items without a label as they are.

    Raises:
        ValueError: as for `ErodeLabeld`.
    """

    def __init__(
        self,
        keys: KeysCollection = "label",
        weak_key: str = "weak_label",
        *,
        radius_voxels: int = 4,
        slice_axis: int | None = None,
        background: bool = False,
        ignore_index: int = -1,
        seed: int = 0,
        full_key: str = "fully_labelled",
        allow_empty: bool = True,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(
            keys,
            weak_key,
            ignore_index=ignore_index,
            full_key=full_key,
            label_key=None,
            allow_empty=allow_empty,
            allow_missing_keys=allow_missing_keys,
        )
        self.radius_voxels = whole_number("radius_voxels", radius_voxels, 0)
        self.slice_axis = slice_axis
        self.background = background
        self.seed = int(seed)

    def _weaken(self, label: Tensor, name: str) -> np.ndarray:
        array = class_map(label, self.ignore_index, name)
        return pointed(array, self.radius_voxels, self.slice_axis, self.background, self.ignore_index, self.seed)


class ScribbleToWeakLabeld(_WeakLabeld):
    """Weak label of a scribble file: strokes keep their class, the rest is not annotated.

    Reads the scribbles at `keys`, (1, *S), and writes `weak_key`, (1, *S) float32, with their meta data; what
    `ErodeLabeld` says about augmentation holds here too. To train on some of the classes, map them before with MONAI's
    `MapLabelValued(["label", "scribble"], orig_labels=[1, 2, 3], target_labels=[0, 0, 1])`: the strokes on other
    structures then are strokes on the background.

    Args:
        keys: key of the scribbles.
        weak_key: key of the weak label.
        unlabelled: value of the voxels without a stroke (4 in the scribbles of ACDC). 0 for files in which nothing
            else marks them; such files have no strokes on the background.
        keep_background: use the strokes on the background (value 0); False takes them as not annotated.
        num_classes: strokes must be of the classes 0..num_classes - 1; None accepts any class number.
        ignore_index: value that is written where nothing is annotated; accepted in the file too.
        full_key: an item whose value here is true gets its whole label, read at `label_key`, as weak label (hybrid
            training).
        label_key: see `full_key`.
        allow_empty: accept scribbles without any stroke.
        allow_missing_keys: leave items without scribbles as they are.

    Raises:
        ValueError: the scribbles are not (1, *S), or (a `VolumeError`) have other values than class numbers and
            `unlabelled`, or no stroke where `allow_empty` is False; the message names the file.
        KeyError: `full_key` is true but there is no label.

    Example:
        >>> scribble = torch.tensor([[[0, 4, 4], [4, 3, 4]]])
        >>> ScribbleToWeakLabeld(num_classes=4)({"scribble": scribble})["weak_label"].int().tolist()
        [[[0, -1, -1], [-1, 3, -1]]]
    """

    def __init__(
        self,
        keys: KeysCollection = "scribble",
        weak_key: str = "weak_label",
        *,
        unlabelled: int = 4,
        keep_background: bool = True,
        num_classes: int | None = None,
        ignore_index: int = -1,
        full_key: str = "fully_labelled",
        label_key: str = "label",
        allow_empty: bool = True,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(
            keys,
            weak_key,
            ignore_index=ignore_index,
            full_key=full_key,
            label_key=label_key,
            allow_empty=allow_empty,
            allow_missing_keys=allow_missing_keys,
        )
        if num_classes is not None and not num_classes >= 2:
            raise ValueError(f"num_classes: expected at least 2, background included, got {num_classes}.")
        if num_classes is not None and 0 < unlabelled < num_classes:
            raise ValueError(
                f"unlabelled: expected a value that is none of the {num_classes} classes 0..{num_classes - 1}, got "
                f"{unlabelled}; look which value the files have where nothing is drawn."
            )
        self.unlabelled = unlabelled
        self.keep_background = keep_background
        self.num_classes = num_classes

    def _weaken(self, label: Tensor, name: str) -> np.ndarray:
        values = as_array(label)
        blank = (values == self.unlabelled) | (values == self.ignore_index)
        strokes = np.unique(values[~blank])
        top = np.inf if self.num_classes is None else self.num_classes - 1
        wrong = strokes[~((strokes >= 0) & (strokes <= top) & (strokes < np.inf) & (strokes == np.round(strokes)))]
        if len(wrong):
            last = "1, 2, ..." if self.num_classes is None else self.num_classes - 1
            raise VolumeError(
                f"{name}: has values that are neither a class number 0 to {last} nor unlabelled={self.unlabelled}: "
                f"{shown_values(wrong)}; set unlabelled or num_classes, or map them (MapLabelValued)."
            )
        if not self.keep_background:
            blank |= values == 0
        weak = np.full(values.shape, self.ignore_index, dtype=np.int32)
        weak[~blank] = values[~blank]
        return weak
