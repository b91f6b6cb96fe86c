"""The cases of a datalist as a data set, which a config can describe before they are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, NoReturn

from monai.data import CacheDataset

from medconstraints.data.datalist_sections import read_datalist, read_labelled
from medconstraints.data.supervision import number_items

__all__ = ["CohortDataset", "MissingData", "cohort_items"]


class MissingData(Sequence[Any]):
    """Stands for cases that are not there: it has the length 1, and raises its error at the first look.

    Tools look at a bundle's engines on machines without any data; training then stops with the error.
    """

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> NoReturn:
        raise self.error


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


class CohortDataset(CacheDataset):
    """Cached data set of a datalist's section.

    Args:
        datalist: see `cohort_items`, as for the next three.
        section: see there.
        transform: a transform or a list of transforms; the deterministic ones at its beginning are cached.
        labelled: see there.
        fully_labelled: see there.
        cache_rate: share of the cases that is kept in memory.
        num_workers: threads that fill the cache.

    Raises:
        FileNotFoundError: at the first look at an item, when there is no datalist.
        ValueError: the datalist cannot be used.
    """

    def __init__(
        self,
        datalist: str | PathLike[str],
        section: str,
        transform: Sequence[Callable[..., Any]] | Callable[..., Any],
        *,
        labelled: bool = False,
        fully_labelled: int = 0,
        cache_rate: float = 1.0,
        num_workers: int = 2,
    ) -> None:
        items = cohort_items(datalist, section, labelled=labelled, fully_labelled=fully_labelled)
        there = not isinstance(items, MissingData)
        super().__init__(items, transform, cache_rate=cache_rate if there else 0.0, num_workers=num_workers)
