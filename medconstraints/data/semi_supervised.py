"""Patients divided into segmented and unsegmented ones, and data sets that give both in every batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence, Sized
from os import PathLike
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from medconstraints import checks
from medconstraints.data.datalist_sections import load_datalist, read_datalist
from medconstraints.data.missing import MissingData
from medconstraints.data.output_folders import mask_path

__all__ = ["PairedDataset", "semi_supervised_items"]

SECTIONS = ("training", "unlabelled", "validation", "test")


def semi_supervised_items(
    datalist: str | PathLike[str],
    *,
    fully_labelled: int | None = None,
    supervision: str = "curriculum",
    proposals_dir: str | PathLike[str] | None = None,
    patient_key: str = "patient",
) -> dict[str, Sequence[dict[str, Any]]]:
    """The segmented and the unsegmented items of a datalist; `MissingData` for each if there is no datalist.

    Segmented are the first n patients of the section "training" whose entries all have a label. The others of that
    section and the entries of a section "unlabelled", which the datalist may have, are unsegmented.

    Args:
        datalist: see `read_datalist`.
        fully_labelled: n; None takes all who have labels.
        supervision: with "oracle" unsegmented items keep their labels, for their sizes; otherwise these are taken out,
            so that nothing can read them. With "proposals" they get the masks of `proposals_dir` as "proposal".
        proposals_dir: folder with the masks that inference wrote of the unsegmented images.
        patient_key: key of the patient's name; an entry without one is a patient of its own.

    Returns:
        "labelled", "unlabelled", and "held_back", the segmented entries of the section "validation", which may be none:
        entries with "fully_labelled", "index", their number in the datalist, and "case", the path of the image from the
        datalist's folder. `MissingData` where an unsegmented image has no mask.

    Raises:
        ValueError: n is below 1 or more than have labels, a patient is in two sections or, with all labels, has some
            for a part of the entries alone, or the datalist cannot be used.
    """
    try:
        content = load_datalist(datalist)
    except FileNotFoundError as error:
        return {part: MissingData(error) for part in ("labelled", "unlabelled", "held_back")}
    sections: dict[str, list[dict[str, Any]]] = {}
    for section in SECTIONS:
        entries = read_datalist(datalist, section, required=section == "training")
        names = [entry if isinstance(entry, str) else _first(entry["image"]) for entry in content.get(section) or ()]
        offset = sum(map(len, sections.values()))
        numbered = enumerate(zip(entries, names, strict=True), start=offset)
        sections[section] = [{**entry, "index": number, "case": name} for number, (entry, name) in numbered]
    owners = {name: [str(item.get(patient_key, item["case"])) for item in items] for name, items in sections.items()}
    for first, second in itertools.combinations(sections, 2):
        if both := sorted({*owners[first]} & {*owners[second]}):
            raise ValueError(
                f'datalist: {len(both)} patients, such as {both[0]}, are in "{first}" and in "{second}"; a patient '
                "belongs to one of them."
            )
    chosen = _chosen(owners["training"], ["label" in item for item in sections["training"]], fully_labelled)
    full: list[dict[str, Any]] = []
    bare: list[dict[str, Any]] = []
    for item, owner in zip(sections["training"], owners["training"], strict=True):
        (full if owner in chosen else bare).append(item)
    if supervision == "proposals":
        masks = [mask_path("", _first(item["image"])).name for item in [*bare, *sections["unlabelled"]]]
        if twice := sorted({mask for mask in masks if masks.count(mask) > 1}):
            raise ValueError(f"datalist: several images would have the mask {twice[0]}; give them different names.")
    unlabelled: Sequence[dict[str, Any]]
    try:
        unlabelled = [_unlabelled(item, supervision, proposals_dir) for item in [*bare, *sections["unlabelled"]]]
    except FileNotFoundError as error:
        unlabelled = MissingData(error)
    return {
        "labelled": [{**item, "fully_labelled": True} for item in full],
        "unlabelled": unlabelled,
        "held_back": [{**item, "fully_labelled": True} for item in sections["validation"] if "label" in item],
    }


def _unlabelled(item: dict[str, Any], supervision: str, proposals_dir: str | PathLike[str] | None) -> dict[str, Any]:
    entry = {**item, "fully_labelled": False}
    if supervision != "oracle":
        entry.pop("label", None)
    elif "label" not in item:
        raise ValueError(f"datalist: {item['case']} has no label, from which an oracle could know its size.")
    if supervision == "proposals" and proposals_dir is not None:
        mask = mask_path(Path(proposals_dir), _first(item["image"]))
        if not mask.is_file():
            raise FileNotFoundError(
                f"proposals_dir: no mask {mask}; run inference with the weights of a labelled run, --section training."
            )
        entry["proposal"] = str(mask)
    return entry


def _chosen(owners: list[str], labelled: list[bool], count: int | None) -> set[str]:
    """The patients whose labels train."""
    found: dict[str, set[bool]] = {}
    for owner, known in zip(owners, labelled, strict=True):
        found.setdefault(owner, set()).add(known)
    if count is None and (mixed := sorted(owner for owner, known in found.items() if len(known) > 1)):
        raise ValueError(
            f'datalist: of {len(mixed)} patients of "training", such as {mixed[0]}, some entries have a label and '
            "others none; a patient is segmented or not: add the labels, or leave these entries out."
        )
    able = [owner for owner, known in found.items() if known == {True}]
    number = len(able) if count is None else checks.whole_number("fully_labelled", count, 1)
    if not 1 <= number <= len(able):
        raise ValueError(
            f'fully_labelled: expected 1 to {len(able)}, the patients of "training" with a label for each entry, got '
            f"{number}."
        )
    return {*able[:number]}


def _first(value: Any) -> str:
    return str(value[0] if isinstance(value, list) else value)


class PairedDataset(Dataset[Any]):
    """A segmented and an unsegmented item in each place, so that no batch lacks either; collation lays them flat.

    An "index" of an item, by which what is remembered of it is found again, becomes 2 index for a segmented and
    2 index + 1 for an unsegmented one: both data sets may count from 0.

    An epoch has as many pairs as the larger part has items; the smaller part is gone through again and again. A run
    without the unsegmented items has as many, all segmented, so that runs with and without can be compared.

    Args:
        labelled: segmented items, one at least.
        unlabelled: unsegmented items; may be empty.
        use_unlabelled: False puts segmented ones in their place.

    Raises:
        ValueError: nothing is segmented.

    Example:
        >>> pairs = PairedDataset([{"image": 1}], [{"image": 2}, {"image": 3}])
        >>> [pairs[0], pairs[1]]
        [[{'image': 1}, {'image': 2}], [{'image': 1}, {'image': 3}]]
    """

    def __init__(self, labelled: Any, unlabelled: Any, *, use_unlabelled: bool = True) -> None:
        if not len(labelled):
            raise ValueError("labelled: expected at least one segmented item, got none.")
        self.labelled = labelled
        self.unlabelled = unlabelled
        self.use_unlabelled = checks.flag("use_unlabelled", use_unlabelled) and len(unlabelled) > 0
        others: Sized = unlabelled
        self.pairs = max(len(labelled), len(others))

    def __len__(self) -> int:
        return self.pairs

    def __getitem__(self, index: int) -> list[Any]:
        if index >= self.pairs:  # what ends a loop over a sequence
            raise IndexError(index)
        if self.use_unlabelled:
            pair = self.labelled[index % len(self.labelled)], self.unlabelled[index % len(self.unlabelled)]
            return [_numbered(item, place) for place, item in enumerate(pair)]
        return [_numbered(self.labelled[(2 * index + place) % len(self.labelled)], 0) for place in (0, 1)]


def _numbered(item: Any, place: int) -> Any:
    return {**item, "index": 2 * item["index"] + place} if "index" in item else item
