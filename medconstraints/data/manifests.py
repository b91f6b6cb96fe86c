"""Manifests of public data sets: read one, and compare a local copy of the data with it.

``python -m medconstraints.data.manifests check --manifest data_manifests/hippocampus.json --root DIR`` prints what is
wrong with a copy, and ``datalist`` writes its list, divided by patient; data_manifests/README.md explains the files.
"""

import argparse
import json
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import nibabel as nib
import numpy as np
import SimpleITK as sitk
from nibabel.filebasedimages import ImageFileError
from PIL import Image

from medconstraints.data.datalists import make_datalist
from medconstraints.data.layouts import Case, file_problems, find_cases

__all__ = ["check_dataset", "load_manifest", "make_datalist"]

Geometry = tuple[tuple[int, ...], tuple[float, ...] | None]  # shape, spacing in mm

DESCRIPTION = "Compare a local copy of a data set with its manifest, or make a datalist from it."
PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff")
NIFTI = (".nii", ".nii.gz")
METAIMAGES = (".mha", ".mhd")
UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, zlib.error, ImageFileError)
SPACING_TOLERANCE = 0.01  # relative, headers are rounded


def load_manifest(path: str | Path) -> dict[str, Any]:
    """Read a manifest and validate it against the schema that its `$schema` names, relative to the manifest.

    Raises:
        ValueError: if the manifest breaks the schema; the message lists every place.
    """
    path = Path(path)
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    schema = json.loads((path.parent / manifest.get("$schema", "schema.json")).read_text(encoding="utf-8"))
    errors = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    if messages := [f"{'.'.join(map(str, error.absolute_path)) or 'top level'}: {error.message}" for error in errors]:
        raise ValueError(f"{path} is no valid manifest:\n" + "\n".join(messages))
    return manifest


def check_dataset(manifest: Mapping[str, Any], root: str | Path, *, read_labels: bool = True) -> list[str]:
    """Compare the files below `root` with a manifest.

    Found are: missing files (an image without label, a label without image), several files where one belongs, wrong
    counts of cases, patients and array lengths, label values that the manifest does not name, labels whose shape or
    spacing is not the image's, and images whose shape or spacing is outside the manifest's ranges.

    Args:
        manifest: what `load_manifest` returns.
        root: the folder that the layout's patterns start from.
        read_labels: also read the voxels of every label; without it only names and headers are looked at.

    Returns:
        One sentence per problem; an empty list if the copy is as described.

    Raises:
        FileNotFoundError: if `root` is not a folder.
    """
    root = Path(root)
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


def _content_problems(manifest: Mapping[str, Any], case: Case, root: Path, read_labels: bool) -> Iterator[str]:
    """What is wrong inside the images and labels of a complete case."""
    named = None if manifest["labels"] is None else {int(value) for value in manifest["labels"]}
    reference: Geometry | None = None
    for entry, files in zip(manifest["layout"], case.files, strict=True):
        if entry["key"] not in ("image", "label"):
            continue
        for path in files:
            where = f"case {case.name}: {path.relative_to(root).as_posix()}"
            if geometry := _geometry(path):
                reference = reference or geometry
                if not _agree(geometry, reference):
                    yield f"{where} has shape and spacing {geometry}, the image {reference}"
                if entry["key"] == "image":
                    yield from _range_problems(where, manifest["checks"], *geometry)
            if not read_labels or named is None or entry["key"] != "label":
                continue
            if strange := sorted(set(np.unique(_voxels(path)).tolist()) - named):
                yield f"{where} has values {strange[:10]}, the manifest names {sorted(named)}"


def _agree(first: Geometry, second: Geometry) -> bool:
    if first[0] != second[0] or first[1] is None or second[1] is None:
        return first[0] == second[0]
    return bool(np.allclose(first[1], second[1], rtol=SPACING_TOLERANCE))


def _range_problems(
    where: str, checks: Mapping[str, Any], shape: tuple[int, ...], spacing_mm: tuple[float, ...] | None
) -> Iterator[str]:
    for what, values, slack in (("shape", shape, 0.0), ("spacing_mm", spacing_mm, SPACING_TOLERANCE)):
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if all is well, 1 if problems were found, 2 if it could not be run."""
    parser = argparse.ArgumentParser(prog="python -m medconstraints.data.manifests", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="compare a local copy with a manifest")
    check.add_argument("--headers-only", action="store_true", help="do not read the voxels of the labels")
    datalist = commands.add_parser("datalist", help="write a datalist, divided by patient")
    datalist.add_argument("--output", type=Path, required=True)
    datalist.add_argument("--overwrite", action="store_true", help="replace an existing output")
    datalist.add_argument("--seed", type=int, default=0)
    how = datalist.add_mutually_exclusive_group(required=True)
    how.add_argument("--fractions", type=float, nargs=3, metavar=("TRAINING", "VALIDATION", "TEST"))
    how.add_argument("--split", help="a split of the manifest")
    for command in (check, datalist):
        command.add_argument("--manifest", type=Path, required=True)
        command.add_argument(
            "--root", type=Path, required=True, help="the folder that the layout's patterns start from"
        )
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2


def _run(options: argparse.Namespace) -> int:
    if options.command == "datalist" and options.output.exists() and not options.overwrite:
        raise FileExistsError(f"--output: {options.output} exists; choose another name or add --overwrite.")
    manifest = load_manifest(options.manifest)
    if options.command == "datalist":
        lists = make_datalist(
            manifest, options.root, seed=options.seed, fractions=options.fractions, split=options.split
        )
        options.output.write_text(json.dumps(lists, indent=1) + "\n", encoding="utf-8")
        return 0
    problems = check_dataset(manifest, options.root, read_labels=not options.headers_only)
    sys.stdout.write("".join(f"{problem}\n" for problem in problems) or f"{manifest['name']}: as described\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
