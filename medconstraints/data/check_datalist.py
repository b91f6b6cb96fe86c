"""Everything that is wrong with the files of a datalist, found before a training finds the first of it."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.data import MetaTensor
from tqdm import tqdm  # type: ignore[import-untyped]

from medconstraints.boxes.files import BoxFileError
from medconstraints.data.datalist_sections import load_datalist, read_datalist
from medconstraints.transforms.check_volumes import CheckVolumesd
from medconstraints.transforms.load_boxes import LoadBoxesd
from medconstraints.transforms.load_volume import LoadVolumed
from medconstraints.volumes.grids import grid_of
from medconstraints.writing import write_text

__all__ = ["check_datalist"]


def check_datalist(
    *,
    datalist: str,
    num_classes: int | None = None,
    spatial_dims: int = 3,
    allow_channels: bool = False,
    classes: Mapping[str, Any] | None = None,
    workers: int = 2,
    output: str | None = None,
) -> list[str]:
    """Read every image, label and box file once, and list all faults of all of them.

    Args:
        datalist: JSON list with sections of entries.
        num_classes: of the labels, with the background; None accepts any numbers.
        spatial_dims: 3, or 2 for images.
        allow_channels: accept channels as a further axis of an image's file.
        classes: class name -> number, for box files.
        workers: files that are read at once.
        output: JSON file for all that was found, of each entry; None writes none.
    """
    content = load_datalist(datalist)
    sections = {
        name: read_datalist(datalist, name, required=False)
        for name, entries in content.items()
        if isinstance(entries, list) and name != "modality"
    }
    entries = [(name, entry) for name, found in sections.items() for entry in found]
    look = partial(
        _look, num_classes=num_classes, spatial_dims=spatial_dims, allow_channels=allow_channels, classes=classes
    )
    with ThreadPoolExecutor(workers) as pool:
        rows = list(tqdm(pool.map(look, entries), total=len(entries), desc="files", disable=not sys.stderr.isatty()))
    faults = [f"{row['section']}: {line}" for row in rows for line in row["faults"]]
    faults += _twice(rows) + _shared_patients(sections) + _never_seen(rows, num_classes)
    sys.stdout.write(_summary(rows))
    if output is not None:
        write_text(Path(output), json.dumps({"entries": rows, "faults": faults}, indent=1) + "\n")
    return faults


def _look(
    given: tuple[str, dict[str, Any]],
    *,
    num_classes: int | None,
    spatial_dims: int,
    allow_channels: bool,
    classes: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """One entry: what it is, and what is wrong with it."""
    section, entry = given
    image = entry["image"]
    name = Path(image[0] if isinstance(image, list) else image).name
    row: dict[str, Any] = {"section": section, "name": name, "faults": []}
    item: dict[Hashable, Any] = {}
    for key in (key for key in ("image", "label") if key in entry):
        load = LoadVolumed(key, spatial_dims=spatial_dims, allow_channels=allow_channels and key == "image")
        try:
            item[key] = load({key: entry[key]})[key]
        except (ValueError, OSError, RuntimeError, MemoryError, TypeError) as error:
            row["faults"].append(str(error).splitlines()[0])
    if "image" not in item:
        return row
    row |= {"shape": list(item["image"].shape[1:]), "voxels": sha256(item["image"].numpy().tobytes()).hexdigest()[:16]}
    if isinstance(item["image"], MetaTensor):
        affine = np.asarray(item["image"].affine)
        if spatial_dims == 3:
            row |= {**grid_of(row["shape"], affine), "orientation": "".join(nib.aff2axcodes(affine))}
        if notes := item["image"].meta.get("geometry_notes"):
            row["faults"].append(f"{name}: {notes}")
    label_key = "label" if "label" in item else None
    try:
        CheckVolumesd("image", label_key, num_classes=num_classes, spatial_dims=spatial_dims)(item)
    except ValueError as error:
        row["faults"] += str(error).splitlines()
    if label_key:
        row["values"] = np.unique(np.asarray(item["label"])).tolist()[:300]
    if "boxes" in entry:
        try:
            LoadBoxesd("boxes", classes=classes, num_classes=num_classes)({**item, "boxes": entry["boxes"]})
        except (BoxFileError, ValueError, OSError, TypeError) as error:
            row["faults"] += [line.strip() for line in str(error).splitlines()]
    return row


def _twice(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Images of the same voxels."""
    first: dict[str, Mapping[str, Any]] = {}
    found = []
    for row in rows:
        if "voxels" in row:
            other = first.setdefault(row["voxels"], row)
            if other is not row:
                where = f"{other['name']} of {other['section']}"
                found.append(f"{row['section']}: {row['name']}: has the same voxels as {where}; keep one.")
    return found


def _shared_patients(sections: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    owners: dict[str, set[str]] = {}
    for name, entries in sections.items():
        for entry in entries:
            if "patient" in entry:
                owners.setdefault(str(entry["patient"]), set()).add(name)
    return [
        f"patient {owner}: is in {' and in '.join(sorted(names))}; a patient belongs to one section."
        for owner, names in owners.items()
        if len(names) > 1
    ]


def _never_seen(rows: Sequence[Mapping[str, Any]], num_classes: int | None) -> list[str]:
    seen = {value for row in rows if row["section"] == "training" for value in row.get("values", ())}
    if num_classes is None or not seen:
        return []
    return [f"training: no label has class {number}." for number in range(1, num_classes) if number not in seen]


def _summary(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"{len(rows)} entries, {sum(not row['faults'] for row in rows)} without a fault of their own"]
    for key, what in (("orientation", "orientations"), ("spacing_mm", "spacings (mm)"), ("shape", "shapes")):
        counted = Counter(json.dumps(row[key]).strip('"') for row in rows if key in row).most_common(4)
        if counted:
            lines.append(f"{what}: " + ", ".join(f"{value} ({count})" for value, count in counted))
    return "\n".join(lines) + "\n"
