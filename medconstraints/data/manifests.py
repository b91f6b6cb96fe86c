"""Manifests of public data sets: read one, compare a local copy of the data with it, list its cases by patient.

data_manifests/README.md explains the files; the commands are `check_dataset` and `make_datalist`.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import nibabel as nib
import numpy as np
import SimpleITK as sitk
from monai.data import partition_dataset
from nibabel.filebasedimages import ImageFileError
from PIL import Image

__all__ = ["Case", "check_dataset", "file_problems", "find_cases", "load_manifest", "make_datalist", "numbers_of"]

Geometry = tuple[tuple[int, ...], tuple[float, ...] | None]  # shape, spacing in mm

PARTS = ("training", "validation", "test")
PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff")
NIFTI = (".nii", ".nii.gz")
METAIMAGES = (".mha", ".mhd")
UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, zlib.error, ImageFileError)
SPACING_TOLERANCE = 0.01  # relative, headers are rounded


class Case(NamedTuple):
    """The files of one case: one list for each entry of the layout, in its order.

    `name` joins the values of the first pattern's placeholders; `patient` is the placeholder of that name, or the same.
    """

    name: str
    patient: str
    files: list[list[Path]]


def load_manifest(path: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """Read a manifest and validate it against the schema that its `$schema` names, relative to the manifest.

    One that was read before is returned as it is.

    Raises:
        ValueError: if the manifest breaks the schema; the message lists every place.
    """
    if isinstance(path, Mapping):
        return path
    path = Path(path)
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    schema = json.loads((path.parent / manifest.get("$schema", "schema.json")).read_text(encoding="utf-8"))
    errors = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    if messages := [f"{'.'.join(map(str, error.absolute_path)) or 'top level'}: {error.message}" for error in errors]:
        raise ValueError(f"{path} is no valid manifest:\n" + "\n".join(messages))
    return manifest


def find_cases(layout: Sequence[Mapping[str, Any]], root: str | Path) -> list[Case]:
    """Group the files below `root` by the placeholders of the first pattern, sorted by their values.

    In a pattern, `{name}` stands for letters, digits and hyphens, the same ones wherever the name stands again; `*` for
    anything within one folder name or file name; `**/` for any number of folders.

    Raises:
        FileNotFoundError: if `root` is not a folder.

    Example:
        >>> find_cases([{"key": "image", "pattern": "imagesTr/{case}.nii.gz"}], ".")
        []
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"root: expected the folder of the data set, {root} is none.")
    patterns = [_regex(entry["pattern"]) for entry in layout]
    identity = list(patterns[0].groupindex)
    found: dict[tuple[str, ...], list[list[Path]]] = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        for i, pattern in enumerate(patterns):
            if match := pattern.fullmatch(path.relative_to(root).as_posix()):
                key = tuple(match[name] for name in identity)
                found.setdefault(key, [[] for _ in layout])[i].append(path)
    patient = identity.index("patient") if "patient" in identity else None
    return [
        Case("/".join(key), "/".join(key) if patient is None else key[patient], found[key]) for key in sorted(found)
    ]


def file_problems(layout: Sequence[Mapping[str, Any]], case: Case) -> Iterator[str]:
    """Say which required files a case lacks, and where several match a pattern that names one."""
    placeholders = [set(_regex(entry["pattern"]).groupindex) for entry in layout]
    present = sorted({entry["key"] for entry, files in zip(layout, case.files, strict=True) if files})
    for entry, names, files in zip(layout, placeholders, case.files, strict=True):
        if not files and entry.get("required", True):
            yield f"case {case.name}: {' and '.join(present)} without {entry['key']}, expected {entry['pattern']}"
        # A placeholder that the first pattern does not have, such as {lesion}, announces several files.
        if len(files) > 1 and names <= placeholders[0]:
            yield f"case {case.name}: {len(files)} files match {entry['pattern']}, one belongs there"


def check_dataset(manifest: str | Path | Mapping[str, Any], root: str | Path, *, read_labels: bool = True) -> list[str]:
    """Compare the files below `root` with a manifest.

    Found are: missing files (an image without label, a label without image), several files where one belongs, wrong
    counts of cases, patients and array lengths, label values that the manifest does not name, labels whose shape or
    spacing is not the image's, and images whose shape or spacing is outside the manifest's ranges.

    Args:
        manifest: a file, or what `load_manifest` returns.
        root: the folder that the layout's patterns start from.
        read_labels: also read the voxels of every label; without it only names and headers are looked at.

    Returns:
        One sentence per problem; an empty list if the copy is as described.

    Raises:
        FileNotFoundError: if `root` is not a folder.
    """
    root, manifest = Path(root), load_manifest(manifest)
    layout, expected = manifest["layout"], manifest["checks"]
    problems, complete = [], []
    cases = find_cases(layout, root)
    if not cases:
        problems.append(f"no case found, expected files like {layout[0]['pattern']}")
    for case in cases:
        if faults := list(file_problems(layout, case)):
            problems += faults
            continue
        complete.append(case)
        try:
            problems += _content_problems(manifest, case, root, read_labels)
        except UNREADABLE as error:
            problems.append(f"case {case.name}: a file could not be read: {error}")
    found = {"cases": len(complete), "patients": len({case.patient for case in complete})}
    for what, number in found.items():
        if expected[what] not in (None, number):
            problems.append(f"expected {expected[what]} {what}, found {number} with all their files")
    return problems + list(_array_problems(expected.get("arrays", {}), root))


def make_datalist(
    manifest: str | Path | Mapping[str, Any],
    root: str | Path,
    *,
    seed: int = 0,
    fractions: Sequence[float] | None = None,
    split: str | None = None,
) -> dict[str, Any]:
    """Make a datalist of the cases below a folder; all cases of one patient fall into the same part.

    Args:
        manifest: a file, or what `load_manifest` returns.
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
    manifest = load_manifest(manifest)
    name, layout = manifest["name"], manifest["layout"]
    if (fractions is None) == (split is None):
        raise ValueError("fractions, split: expected one of the two, got both or none.")
    if {"image", "label"} - {entry["key"] for entry in layout}:
        raise ValueError(f"manifest: {name} has no images and labels to list, it is a {manifest['task']} set.")
    cases = find_cases(layout, root)
    if not cases:
        raise ValueError(f"root: no case of {name} in {root}; expected files like {layout[0]['pattern']}.")
    if faults := [fault for case in cases for fault in file_problems(layout, case)]:
        raise ValueError(f"root: {len(faults)} files are missing or ambiguous (see check_dataset): {faults[0]}.")
    patients = sorted({case.patient for case in cases})
    sizes = _sizes_of_split(manifest, split) if fractions is None else _sizes_of_fractions(fractions, len(patients))
    rest = len(patients) - sum(sizes)
    if rest < 0:
        raise ValueError(f"split: {split!r} needs {sum(sizes)} patients, here are {len(patients)}; give fractions.")
    groups = partition_dataset(patients, ratios=[*sizes, rest], shuffle=True, seed=seed)
    lists = {
        part: [_entry(layout, case, Path(root)) for case in cases if case.patient in set(group)]
        for part, group in zip(PARTS, groups, strict=False)  # the fourth group is the rest
    }
    return {
        "name": name,
        "description": manifest["title"],
        "reference": manifest["homepage"],
        "licence": manifest["licence"]["name"],
        "modality": {str(i): modality for i, modality in enumerate(manifest["modality"])},
        "labels": manifest["labels"],
        "tensorImageSize": f"{manifest['dimensions']}D",
        "division": {"seed": seed, "split": split, "fractions": None if fractions is None else list(fractions)},
        **{f"num{part.capitalize()}": len(entries) for part, entries in lists.items()},
        **lists,
    }


def numbers_of(datalist: Mapping[str, Any]) -> str:
    """How many cases a datalist has in each part."""
    return ", ".join(f"{len(datalist[part])} {part}" for part in PARTS)


def _regex(pattern: str) -> re.Pattern[str]:
    seen: set[str] = set()

    def piece(match: re.Match[str]) -> str:
        name = match["name"]
        if name is None:
            return {"**/": "(?:.*/)?", "*": "[^/]*"}.get(match[0], re.escape(match[0]))
        again = name in seen
        seen.add(name)
        return f"(?P={name})" if again else f"(?P<{name}>[A-Za-z0-9-]+)"

    return re.compile(re.sub(r"\{(?P<name>\w+)\}|\*\*/|\*|[^{*]+", piece, pattern))


def _content_problems(manifest: Mapping[str, Any], case: Case, root: Path, read_labels: bool) -> Iterator[str]:
    """What is wrong inside the images and labels of a complete case."""
    named = None if manifest["labels"] is None else {int(value) for value in manifest["labels"]}
    reference: Geometry | None = None
    kinds = [entry["key"] for entry in manifest["layout"]]
    for key, path in ((key, path) for key, paths in zip(kinds, case.files, strict=True) for path in paths):
        if key not in ("image", "label"):
            continue
        where = f"case {case.name}: {path.relative_to(root).as_posix()}"
        if geometry := _geometry(path):
            reference = reference or geometry
            if not _agree(geometry, reference):
                yield f"{where} has shape and spacing {geometry}, the image {reference}"
            if key == "image":
                yield from _range_problems(where, manifest["checks"], geometry)
        if key == "image" or not read_labels or named is None:
            continue
        if strange := sorted(set(np.unique(_voxels(path)).tolist()) - named):
            yield f"{where} has values {strange[:10]}, the manifest names {sorted(named)}"


def _agree(first: Geometry, second: Geometry) -> bool:
    if first[0] != second[0] or first[1] is None or second[1] is None:
        return first[0] == second[0]
    return bool(np.allclose(first[1], second[1], rtol=SPACING_TOLERANCE))


def _range_problems(where: str, checks: Mapping[str, Any], geometry: Geometry) -> Iterator[str]:
    for what, values, slack in zip(("shape", "spacing_mm"), geometry, (0.0, SPACING_TOLERANCE), strict=True):
        ranges = checks[what]
        if ranges is None or values is None:
            continue
        inside = [lo * (1 - slack) <= v <= hi * (1 + slack) for v, (lo, hi) in zip(values, ranges, strict=False)]
        if len(values) != len(ranges) or not all(inside):
            yield f"{where} has {what} {values}, expected within {ranges}"


def _array_problems(arrays: Mapping[str, Mapping[str, int]], root: Path) -> Iterator[str]:
    """Lengths in .npz archives; an archive that is not there is not asked for."""
    for file in sorted(name for name in arrays if (root / name).is_file()):
        with np.load(root / file) as archive:
            for name, length in arrays[file].items():
                if name not in archive:
                    yield f"{file} has no array {name}"
                elif len(archive[name]) != length:
                    yield f"{file}: {name} has {len(archive[name])} rows, expected {length}"


def _geometry(path: Path) -> Geometry | None:
    """Shape and spacing in mm from the header; no spacing for pictures, nothing for files without a known header."""
    name = path.name.lower()
    if name.endswith(NIFTI):
        header = nib.load(path).header
        return tuple(map(int, header.get_data_shape())), tuple(round(float(z), 4) for z in header.get_zooms()[:3])
    if name.endswith(METAIMAGES):
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        return tuple(map(int, reader.GetSize())), tuple(round(float(s), 4) for s in reader.GetSpacing())
    if name.endswith(PICTURES):
        with Image.open(path) as picture:
            return picture.size, None
    return None


def _voxels(path: Path) -> np.ndarray:
    name = path.name.lower()
    if name.endswith(NIFTI):
        return np.asarray(nib.load(path).dataobj)
    if name.endswith(PICTURES):
        with Image.open(path) as picture:
            return np.asarray(picture.convert("L"))  # masks come as 1 bit, palette or RGB as well
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def _sizes_of_split(manifest: Mapping[str, Any], split: str | None) -> list[int]:
    known = {s["name"]: [s[part] or 0 for part in PARTS] for s in manifest["splits"]}
    if split not in known:
        raise ValueError(f"split: {manifest['name']} has {sorted(known) or 'none, give fractions'}, got {split!r}.")
    return known[split]


def _sizes_of_fractions(fractions: Sequence[float], total: int) -> list[int]:
    if len(fractions) != len(PARTS) or min(fractions) < 0 or not np.isclose(sum(fractions), 1):
        raise ValueError(f"fractions: expected three shares that sum to one, for {PARTS}, got {list(fractions)}.")
    edges = np.rint(np.cumsum([0.0, *fractions]) * total).astype(int)
    sizes = [int(size) for size in np.diff(edges)]
    if any(share > 0 and size == 0 for share, size in zip(fractions, sizes, strict=True)):
        raise ValueError(f"fractions: {total} patients are too few for {list(fractions)}, which give {sizes}.")
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
