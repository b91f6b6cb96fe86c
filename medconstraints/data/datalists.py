"""Divide the cases of a data set by patient, and list them as the Medical Segmentation Decathlon does."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import partition_dataset

from medconstraints.data.layouts import Case, file_problems, find_cases

__all__ = ["make_datalist"]

PARTS = ("training", "validation", "test")


def make_datalist(
    manifest: Mapping[str, Any],
    root: str | Path,
    *,
    seed: int = 0,
    fractions: Sequence[float] | None = None,
    split: str | None = None,
) -> dict[str, Any]:
    """Make a datalist of the cases below a folder; all cases of one patient fall into the same part.

    Args:
        manifest: what `load_manifest` returns.
        root: the folder that the layout's patterns start from; paths in the datalist are relative to it.
        seed: of the shuffle of the patients.
        fractions: shares of the patients for training, validation and test; they sum to one.
        split: instead of fractions, the name of one of the manifest's splits, which gives numbers of patients. Patients
            beyond their sum are left out. Which patient falls where is drawn with the seed: most papers do not say.

    Returns:
        `training`, `validation` and `test` hold `{image, label, patient, ...}`; several channels are a list. MONAI's
        `load_decathlon_datalist(..., base_dir=root)` reads it once it is written as JSON.

    Raises:
        FileNotFoundError: if `root` is not a folder.
        ValueError: if cases are missing or incomplete, patients too few, or the arguments do not fit.
    """
    if (fractions is None) == (split is None):
        raise ValueError("give either `fractions` or `split`, and not both")
    layout = manifest["layout"]
    if {"image", "label"} - {entry["key"] for entry in layout}:
        raise ValueError(
            f"{manifest['name']} has no files of images and labels to list: it is a {manifest['task']} set"
        )
    cases = find_cases(layout, root)
    if not cases:
        raise ValueError(f"no case of {manifest['name']} in {root}: expected files like {layout[0]['pattern']}")
    if faults := [fault for case in cases for fault in file_problems(layout, case)]:
        raise ValueError(f"{len(faults)} files are missing or ambiguous (check_dataset lists them): {faults[0]}")

    patients = sorted({case.patient for case in cases})
    sizes = _sizes_of_split(manifest, split) if fractions is None else _sizes_of_fractions(fractions, len(patients))
    rest = len(patients) - sum(sizes)
    if rest < 0:
        raise ValueError(f"`split` {split!r} needs {sum(sizes)} patients, here are {len(patients)}: use `fractions`")
    groups = partition_dataset(patients, ratios=[*sizes, rest], shuffle=True, seed=seed)
    lists = {
        part: [_entry(layout, case, Path(root)) for case in cases if case.patient in set(group)]
        for part, group in zip(PARTS, groups, strict=False)  # the fourth group is the rest
    }
    return {
        "name": manifest["name"],
        "description": manifest["title"],
        "reference": manifest["homepage"],
        "licence": manifest["licence"]["name"],
        "modality": {str(i): name for i, name in enumerate(manifest["modality"])},
        "labels": manifest["labels"],
        "tensorImageSize": f"{manifest['dimensions']}D",
        "division": {"seed": seed, "split": split, "fractions": None if fractions is None else list(fractions)},
        **{f"num{part.capitalize()}": len(entries) for part, entries in lists.items()},
        **lists,
    }


def _sizes_of_split(manifest: Mapping[str, Any], split: str | None) -> list[int]:
    known = {s["name"]: [s[part] or 0 for part in PARTS] for s in manifest["splits"]}
    if split not in known:
        raise ValueError(f"`split` is {split!r}, {manifest['name']} has {sorted(known) or 'none: use `fractions`'}")
    return known[split]


def _sizes_of_fractions(fractions: Sequence[float], total: int) -> list[int]:
    if len(fractions) != len(PARTS) or min(fractions) < 0 or not np.isclose(sum(fractions), 1):
        raise ValueError(f"`fractions` must be three shares that sum to one, for {PARTS}: got {list(fractions)}")
    edges = np.rint(np.cumsum([0.0, *fractions]) * total).astype(int)
    sizes = [int(size) for size in np.diff(edges)]
    if any(share > 0 and size == 0 for share, size in zip(fractions, sizes, strict=True)):
        raise ValueError(f"{total} patients are too few for `fractions` {list(fractions)}: they give {sizes}")
    return sizes


def _entry(layout: Sequence[Mapping[str, Any]], case: Case, root: Path) -> dict[str, Any]:
    """One row: a path for a key with one file, a list in channel order for a key with several layout entries."""
    paths: dict[str, list[tuple[int, str]]] = {}
    for entry, files in zip(layout, case.files, strict=True):
        listed = [(entry.get("channel", 0), path.relative_to(root).as_posix()) for path in files]
        paths.setdefault(entry["key"], []).extend(listed)
    several = {entry["key"] for entry in layout if entry.get("channel")} | {k for k, v in paths.items() if len(v) > 1}
    row = {k: [p for _, p in sorted(v)] if k in several else v[0][1] for k, v in paths.items() if v}
    return {**row, "patient": case.patient}
