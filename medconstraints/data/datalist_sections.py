"""Items of a datalist: paths that start at the list's folder, which have labels, which is labelled in full."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any

__all__ = [
    "PATH_KEYS",
    "choose_segmented",
    "file_sample",
    "fingerprints",
    "load_datalist",
    "number_items",
    "read_class_names",
    "read_datalist",
    "read_labelled",
]

logger = logging.getLogger(__name__)

# MONAI's load_decathlon_datalist completes "image" and "label" only.
PATH_KEYS = ("image", "label", "boxes", "points", "scribble")
_BLOCK_BYTES = 1 << 16


def load_datalist(path: str | PathLike[str]) -> dict[str, Any]:
    """The whole datalist: sections, class names, licence.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not JSON, or no object.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"datalist: no file {file}; set --datalist, or --dataset_dir to the folder that has it."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"datalist: {file.name} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"datalist: {file.name} holds a {type(content).__name__}; expected an object with sections.")
    return content


def read_datalist(
    path: str | PathLike[str],
    section: str,
    *,
    required: bool = True,
    base_dir: str | PathLike[str] | None = None,
) -> list[dict[str, Any]]:
    """One section of a datalist in the style of the Medical Segmentation Decathlon.

    Args:
        path: JSON file whose sections are lists of entries, dictionaries with an "image" or plain image paths.
        section: such as "training", "validation" or "test".
        required: False to get an empty list where the section is missing or empty.
        base_dir: folder that relative paths start from; None for the datalist's own.

    Returns:
        The entries; paths under `PATH_KEYS`, or lists of them, now start at the folder. Other values stay.

    Raises:
        FileNotFoundError: no such datalist.
        ValueError: it is not JSON, or has no such section, or the section is empty or has an entry without image.
    """
    file, content = Path(path), load_datalist(path)
    base = file.parent if base_dir is None else Path(base_dir)
    sections = sorted(key for key, value in content.items() if isinstance(value, list))
    if section not in sections and not required:
        return []
    if section not in sections:
        raise ValueError(f"datalist: {file.name} has no section {section!r}, it has {sections}.")
    entries = []
    for number, given in enumerate(content[section]):
        entry = dict(given) if isinstance(given, dict) else {"image": given}
        where = f"datalist: entry {number} of {section!r} in {file.name}"
        if "image" not in entry:
            raise ValueError(f"{where} has no image, only {sorted(entry)}.")
        for key in (key for key in PATH_KEYS if key in entry):
            value = entry[key]
            parts = value if isinstance(value, list) else [value]
            if not parts or not all(isinstance(part, str) for part in parts):
                raise ValueError(f"{where}: expected a path under {key!r}, or a list of paths, got {value!r}.")
            paths = [str(base / part) for part in parts]
            entry[key] = paths if isinstance(value, list) else paths[0]
        entries.append(entry)
    if not entries and required:
        raise ValueError(f"datalist: section {section!r} of {file.name} is empty.")
    return entries


def fingerprints(path: str | PathLike[str], section: str) -> list[str]:
    """For each entry of a section the name of its image, and a number that changes with the entry or its files.

    The folder of the datalist does not matter. Of a file its size and three blocks are read: the last one has the
    checksum of a .nii.gz file.

    Raises:
        FileNotFoundError: no such datalist.
        ValueError: it is not JSON.
    """
    found = []
    for given in load_datalist(path).get(section) or []:
        entry = given if isinstance(given, dict) else {"image": given}
        files = [entry[key] for key in (*PATH_KEYS, "npz") if key in entry]
        names = [str(name) for value in files for name in (value if isinstance(value, list) else [value])]
        digest = sha256(json.dumps(given, sort_keys=True).encode())
        for name in names:
            digest.update(file_sample(Path(path).parent / name))
        found.append(f"{Path(names[0]).name if names else 'entry'} {digest.hexdigest()[:16]}")
    return found


def file_sample(file: Path) -> bytes:
    """Size of a file, and blocks of its start, middle and end; nothing of one that is not there."""
    if not file.is_file():
        return b""
    size = file.stat().st_size
    parts = [str(size).encode()]
    with file.open("rb") as stream:
        for start in (0, size // 2, max(0, size - _BLOCK_BYTES)):
            stream.seek(start)
            parts.append(stream.read(_BLOCK_BYTES))
    return b"".join(parts)


def read_class_names(datalist: str | PathLike[str]) -> dict[int, str]:
    """Class names from the list's `labels` object (`{"1": "anterior"}`), without background; empty when it has none."""
    labels = load_datalist(datalist).get("labels")
    if not isinstance(labels, dict):
        return {}
    return {int(key): str(name) for key, name in labels.items() if str(key).isdecimal() and int(key) > 0}


def read_labelled(path: str | PathLike[str], section: str) -> list[dict[str, Any]]:
    """The entries of a section that have a label, which may be none: then nothing can be validated, only trained.

    Args:
        path: see `read_datalist`.
        section: may be missing or empty.

    Raises:
        FileNotFoundError: no such datalist.
        ValueError: it is not JSON, or the section has an entry without image.
    """
    entries = read_datalist(path, section, required=False)
    labelled = [entry for entry in entries if "label" in entry]
    if len(labelled) < len(entries):
        logger.warning(
            "%d of %d entries of %r have no label and are left out", len(entries) - len(labelled), len(entries), section
        )
    return labelled


def choose_segmented(
    path: str | PathLike[str], section: str, *, cases: int, patients: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """A few segmented entries, from which bounds are fitted: evenly spread over the section, or of some patients.

    Args:
        path: see `read_datalist`.
        section: entries without a label are passed over.
        cases: number of entries, or all labelled ones if there are fewer.
        patients: values of "patient" whose entries are taken instead.

    Raises:
        FileNotFoundError: no such datalist.
        ValueError: no entry has a label, `cases` is below 1, or a patient is not there.
    """
    items = [item for item in read_datalist(path, section) if "label" in item]
    if not items:
        raise ValueError(
            f"datalist: no entry of section {section!r} in {path} has a label; give a section (--section) or a list "
            "(--datalist) with a few segmented cases."
        )
    if patients is not None:
        chosen = [item for item in items if item.get("patient") in patients]
        missing = sorted(set(patients) - {str(item["patient"]) for item in chosen})
        if missing:
            raise ValueError(f"patients: no entry of section {section!r} has the patients {missing}.")
        return chosen
    if cases < 1:
        raise ValueError(f"cases: expected at least 1, got {cases}.")
    return items[:: max(1, len(items) // cases)][:cases]


def number_items(
    items: Sequence[dict[str, Any]], *, fully_labelled: int = 0, patient_key: str = "patient"
) -> list[dict[str, Any]]:
    """Items with their number under "index", and under "fully_labelled" whether their whole label may be used.

    Hybrid training (Kervadec 2020, section 2.4.3) replaces the weak labels of n patients by full ones: transforms that
    make weak labels keep the whole label of such an item, those that make bounds leave it free.

    Args:
        items: entries of a datalist.
        fully_labelled: n, patients that are labelled in full: the first n different values of `patient_key`, or the
            first n items where they do not name a patient.
        patient_key: key of the patient's name.

    Raises:
        ValueError: n is negative, or more than there are.

    Example:
        >>> [item["fully_labelled"] for item in number_items([{"image": "a"}, {"image": "b"}], fully_labelled=1)]
        [True, False]
    """
    names = [str(item.get(patient_key, f"item {number}")) for number, item in enumerate(items)]
    patients = list(dict.fromkeys(names))
    if fully_labelled != int(fully_labelled) or not 0 <= fully_labelled <= len(patients):
        raise ValueError(
            f"fully_labelled: expected an integer 0..{len(patients)}, the number of patients, got {fully_labelled!r}."
        )
    chosen = set(patients[: int(fully_labelled)])
    return [
        {**item, "index": number, "fully_labelled": name in chosen}
        for number, (item, name) in enumerate(zip(items, names, strict=True))
    ]
