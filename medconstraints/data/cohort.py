"""The cases of a datalist as a data set, which a config can describe before they are there."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from monai.data import CacheDataset

from medconstraints import checks
from medconstraints.data.class_items import class_items
from medconstraints.data.datalist_sections import number_items, read_datalist, read_labelled
from medconstraints.data.inference_files import volumes_for_inference
from medconstraints.data.missing import MissingData

__all__ = [
    "CohortDataset",
    "ItemDataset",
    "MissingData",
    "TransformSteps",
    "cohort_items",
    "in_order",
    "inference_items",
    "missing_entry",
]

# MONAI's words, and ours.
_MISSING_KEY = re.compile(r"Key `(\w+)` of transform|(\w+): (?:expected this key|the item of)")
# A transform, a list of transforms, or name -> one of these: steps that an overlay of a config can replace by name.
TransformSteps = Callable[..., Any] | Sequence[Any] | Mapping[str, Any]

# Spatial transforms of MONAI that change no affine.
UNTRACED = frozenset(
    {"GridDistortiond", "Rand2DElasticd", "Rand3DElasticd", "RandGridDistortiond", "RandSimulateLowResolutiond"}
    | {"RandSmoothDeformd", "Transposed"}
)


def cohort_items(
    datalist: str | PathLike[str], section: str, *, labelled: bool = False, fully_labelled: int = 0
) -> Sequence[dict[str, Any]]:
    """Items of a section, numbered (see `number_items`); `MissingData` if there is no datalist.

    Args:
        datalist: see `read_datalist`.
        section: such as "training".
        labelled: the entries with a label alone, which may be none, see `read_labelled`.
        fully_labelled: patients whose whole label may be used, see `number_items`.

    Raises:
        ValueError: the datalist cannot be used.
    """
    try:
        items = read_labelled(datalist, section) if labelled else read_datalist(datalist, section)
    except FileNotFoundError as error:
        return MissingData(error)
    return number_items(items, fully_labelled=fully_labelled)


def inference_items(source: str | PathLike[str], **options: Any) -> Sequence[dict[str, Any]]:
    """What `volumes_for_inference` lists; `MissingData` if there are no volumes, or their masks exist already.

    Raises:
        ValueError: see `volumes_for_inference`.
    """
    try:
        return volumes_for_inference(Path(source), **options)
    except OSError as error:
        return MissingData(error)


def in_order(steps: TransformSteps | None) -> list[Callable[..., Any]]:
    """Transforms of named steps, one after the other.

    Raises:
        ValueError: a deformation that leaves no trace moves a distance map after it was made.

    Example:
        >>> len(in_order({"reading": [abs, abs], "flips": [], "noise": abs}))
        3
    """
    if steps is None:
        return []
    if isinstance(steps, Mapping):
        chain = [transform for step in steps.values() for transform in in_order(step)]
    else:
        chain = list(steps) if isinstance(steps, Sequence) else [steps]
    _refuse_untraced(chain)
    return chain


def _refuse_untraced(chain: Sequence[Callable[..., Any]]) -> None:
    """A map that was deformed tells no distances, and nothing in its meta data says so afterwards."""
    maps: set[Any] = set()
    for transform in chain:
        keys = {*getattr(transform, "keys", ())}
        if type(transform).__name__ in UNTRACED and maps & keys:
            raise ValueError(
                f"{type(transform).__name__}: moves {sorted(maps & keys)} after the distance map was made, and leaves "
                "no trace by which that could be noticed; put it before SignedDistanceMapd."
            )
        if (map_key := getattr(transform, "map_key", None)) is not None:
            maps |= {map_key, *keys}


class ItemDataset(CacheDataset):
    """Cached data set of items, which tells of an entry that lacks what the transforms read.

    Args:
        items: such as `cohort_items` gives them; may be `MissingData`.
        volume_transform: named steps, see `in_order`; the deterministic transforms at the beginning are cached.
        transform: further steps after these, as `SliceDataset` has them for its slices.
        cache_rate: share of the cases that is kept in memory.
        num_workers: threads that fill the cache.

    Raises:
        FileNotFoundError: at the first look at an item, when there is no datalist.
        ValueError: an entry lacks a key that the transforms read, or `cache_rate` is no share.
    """

    def __init__(
        self,
        items: Sequence[dict[str, Any]],
        volume_transform: TransformSteps | None,
        transform: TransformSteps | None = None,
        *,
        cache_rate: float = 1.0,
        num_workers: int = 2,
    ) -> None:
        if not 0 <= checks.number("cache_rate", cache_rate) <= 1:
            raise ValueError(f"cache_rate: expected a share of the cases, 0 to 1, got {cache_rate!r}.")
        there = not isinstance(items, MissingData)
        steps = in_order(volume_transform) + in_order(transform)
        super().__init__(items, steps, cache_rate=cache_rate if there else 0.0, num_workers=num_workers)

    def _fill_cache(self, indices: Any = None) -> list[Any]:
        self._failed: Exception | None = None
        items: list[Any] = super()._fill_cache(indices)
        if self._failed is not None:
            raise self._failed
        return items

    def _load_cache_item(self, idx: int) -> Any:
        # An error is kept until all threads are done: one that still works while the process ends would abort it.
        if self._failed is None:
            try:
                return super()._load_cache_item(idx)
            except Exception as error:
                self._failed = missing_entry(error, self.data[idx]) or error
        return None

    def _transform(self, index: int) -> Any:
        try:
            return super()._transform(index)
        except Exception as error:
            if (missing := missing_entry(error, self.data[index])) is None:
                raise
            raise missing from None


class CohortDataset(ItemDataset):
    """Cached data set of a datalist's section.

    Args:
        datalist: see `cohort_items`, as for the next three.
        section: see there.
        transform: `volume_transform` of `ItemDataset`, which has `cache_rate` and `num_workers` too.
        labelled: see `cohort_items`.
        fully_labelled: see there.
        num_classes: of a classification, whose entries name a class, see `class_items`; None for segmentation.
        cache_rate: see `transform`.
        num_workers: see `transform`.

    Raises:
        FileNotFoundError: at the first look at an item, when there is no datalist.
        ValueError: the datalist cannot be used; or see `ItemDataset`.
    """

    def __init__(
        self,
        datalist: str | PathLike[str],
        section: str,
        transform: TransformSteps,
        *,
        labelled: bool = False,
        fully_labelled: int = 0,
        num_classes: int | None = None,
        cache_rate: float = 1.0,
        num_workers: int = 2,
    ) -> None:
        if num_classes is None:
            items = cohort_items(datalist, section, labelled=labelled, fully_labelled=fully_labelled)
        else:
            items = class_items(datalist, section, num_classes=num_classes)
        super().__init__(items, transform, cache_rate=cache_rate, num_workers=num_workers)


def missing_entry(error: BaseException, item: Any) -> ValueError | None:
    """What to say when a transform asked for a key that the item does not have; None for another error."""
    while error.__cause__ is not None:
        error = error.__cause__
    found = _MISSING_KEY.search(str(error)) if isinstance(error, KeyError) else None
    key = None if found is None else found[1] or found[2]
    if key is None or key in item:
        return None
    image = item.get("image", "volume")
    name = Path(str(image[0] if isinstance(image, list) else image)).name
    keys = sorted({*item} - {"index", "fully_labelled"})
    return ValueError(
        f"{name}: its entry of the datalist has no {key!r}, only {keys}; add it, leave the entry "
        "out, or choose where annotation comes from (box_source, weak_source or size_source)."
    )
