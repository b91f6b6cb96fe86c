"""From a box file (JSON, CSV, 3D Slicer) to records: one entry each, as written, with its place in the file."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medconstraints.boxes.fields import CLASSES, Refusal, fit_schema, system_key
from medconstraints.boxes.slicer import SLICER_SCHEMA

__all__ = ["FORMATS", "Record", "read_records", "read_text", "table_comments"]

FORMATS = ("json", "csv", "slicer")
EXTENSIONS = {".csv": "csv", ".mrk.json": "slicer", ".json": "json"}  # the first that fits
SCHEMA = {
    "description": "a JSON box file is an object with these",
    "type": "object",
    "required": ["coordinate_system", "boxes"],
    "properties": {"boxes": {"type": "array"}, "classes": CLASSES},
}
SHOWN_PARTS = 3  # of an image's path in a message


@dataclass(frozen=True)
class Record:
    """One row as written: not checked, place known; ``fault`` where it could not even be taken apart."""

    row: int
    where: str
    fields: Mapping[str, Any]
    slicer: bool = False
    fault: str = ""


def read_records(path: Path, format: str | None, ndim: int, image: str | None) -> tuple[list[Record], dict[str, int]]:
    """Rows of a file, and the class names that it defines; the arguments are those of `read_boxes`."""
    name = path.name.lower()
    kind = format or next((kind for end, kind in EXTENSIONS.items() if name.endswith(end)), None)
    if kind is None:
        raise Refusal("unknown kind of box file; use .json, .csv or .mrk.json, or say format=")
    text = read_text(path)
    if kind == "csv":
        return _csv_records(text, ndim, image), {}
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise Refusal(f"is not valid JSON ({error}); correct it or export it again") from None
    if kind == "slicer" or (format is None and isinstance(document, dict) and "markups" in document):
        fit_schema(document, SLICER_SCHEMA)
        entries, key, shared = document["markups"], "markups", {}
    else:
        document = _with_system(document) if isinstance(document, dict) else document
        fit_schema(document, SCHEMA)
        entries, key, shared = document["boxes"], "boxes", {"coordinate_system": document["coordinate_system"]}
        entries = [_with_system(entry) if isinstance(entry, dict) else entry for entry in entries]
    records = [
        Record(i, f"{key}[{i}]", {**shared, **entry}, slicer=key == "markups")
        if isinstance(entry, dict)
        else Record(i, f"{key}[{i}]", {}, fault=f"is no object, got {entry!r}; correct the entry")
        for i, entry in enumerate(entries)
    ]
    return records, document.get("classes", {})


def read_text(path: Path) -> str:
    """Text of a file in UTF-8 or, with a byte order mark, in UTF-16, as spreadsheets write it."""
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise Refusal(f"is not UTF-8 text ({error.reason}); save it as UTF-8") from None


def _with_system(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same with one name for the coordinate system."""
    return {"coordinate_system" if system_key(str(key)) else key: value for key, value in fields.items()}


def table_comments(lines: Sequence[str]) -> tuple[int, str, str]:
    """How many lines come before the table, the coordinate system that they tell, and the separator."""
    system, delimiter, count = "voxel", "", 0
    for line in lines:
        bare = line.strip()
        if (told := re.fullmatch(r"\s*sep=(.)\s*", line, re.I)) is not None:
            delimiter = told[1]
        elif bare.startswith("#") or not bare.strip(",;"):
            # A spreadsheet pads a comment line with separators.
            key, mark, value = re.fullmatch(r"#*([^:=]*)([:=]?)(.*)", bare.rstrip(",;\t")).groups()  # type: ignore[union-attr]
            if mark and system_key(key):
                system = value.strip()
        else:
            if not delimiter:
                delimiter = max(",;\t", key=line.count)
            break
        count += 1
    return count, system, delimiter or ","


def _csv_records(text: str, ndim: int, image: str | None) -> list[Record]:
    lines = text.splitlines()
    comments, system, delimiter = table_comments(lines)
    reader = csv.reader(lines[comments:], delimiter=delimiter, skipinitialspace=True)
    try:
        header = [cell.strip().lower() for cell in next(reader, [])]
        header = ["coordinate_system" if system_key(cell) else cell for cell in header]
        table = [(comments + reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise Refusal(f"is not readable as CSV ({error}); save it as comma-separated text") from None

    twice = sorted({cell for cell in header if cell and header.count(cell) > 1})
    if twice:
        raise Refusal(f"has the column {twice[0]!r} {header.count(twice[0])} times; keep one")
    start, stop = _csv_columns(header, ndim)
    records, images = [], set()
    wanted = None if image is None else _path_parts(image)
    for number, (line, cells) in enumerate(table, start=1):
        row = dict(zip(header, (cell.strip() for cell in cells), strict=False))
        if "image" in header:
            name = row.pop("image", "")
            images.add(name)
            if wanted is not None and not _same_image(_path_parts(name), wanted):
                continue
            if name and not any(row.values()):
                continue
        fields: dict[str, Any] = {
            "class": row.get("class", ""),
            "coordinate_system": row.get("coordinate_system") or system,
            "start": [row.get(column, "") for column in start],
            "stop": [row.get(column, "") for column in stop],
        }
        fault = f"has {len(cells)} cells, the header has {len(header)}; correct the row"
        fault = fault if len(cells) > len(header) else ""
        records.append(Record(number, f"row {number} (line {line})", fields, fault=fault))
    if "image" in header:
        _check_images(images, image)
    return records


def _csv_columns(header: Sequence[str], ndim: int) -> tuple[list[str], list[str]]:
    """Names of the columns of the start and of the stop."""
    axes = range(ndim)
    forms = [
        ([f"start_{i + 1}" for i in axes], [f"stop_{i + 1}" for i in axes], "start_3"),
        ([f"{'xyz'[i]}_min" for i in axes], [f"{'xyz'[i]}_max" for i in axes], "z_min"),
    ]
    for start, stop, third in forms:
        if "class" in header and set(start + stop) <= set(header):
            if ndim == 2 and third in header:
                raise Refusal(f"has three coordinates a corner (column {third}), the image is 2D; remove the third")
            return start, stop
    wanted = " or ".join(",".join(["class", *start, *stop]) for start, stop, _ in forms)
    found = ",".join(header)
    raise Refusal(f"needs the columns {wanted} for a {ndim}D image; found {found or 'none'}; add the missing columns")


def _check_images(images: set[str], image: str | None) -> None:
    """Refuse a file of many volumes unless ``image`` is one of them; a file of one needs no ``image``."""
    listed = ", ".join(sorted(images)[:5])
    if image is None:
        if len(images) > 1:
            raise Refusal(f"holds boxes of {len(images)} images ({listed}); say which with image=")
        return
    wanted, shown = _path_parts(image), "/".join(_split(image)[-SHOWN_PARTS:])
    # One volume may be written in several ways (with extension or without), but not with more folders and with fewer.
    matching = {parts: name for name in sorted(images) if _same_image(parts := _path_parts(name), wanted)}
    if not matching:
        raise Refusal(
            f"has no row for the image {shown!r} (it has: {listed}); a volume without boxes needs a row with its name "
            "alone, and folders in a row must be those of the volume"
        )
    if len(matching) > 1:
        short = min(matching, key=len)
        others = ", ".join(repr(name) for parts, name in matching.items() if parts != short)
        todo = f"write {matching[short]!r} with as many folders as tell the volumes apart"
        todo = "give image= its folders too" if len(wanted) < len(short) else todo
        raise Refusal(f"is ambiguous: {matching[short]!r} and {others} both fit the image {shown!r}; {todo}")


def _same_image(row: tuple[str, ...], image: tuple[str, ...]) -> bool:
    """Do two paths end in the same file name and folders, as far as the shorter one goes?"""
    shared = min(len(row), len(image))
    return shared > 0 and row[-shared:] == image[-shared:]


def _path_parts(name: str) -> tuple[str, ...]:
    """Folders and file name of a path, the name without extension (two-part ones too); nothing for an empty text."""
    *folders, last = _split(name) or [""]
    stem = re.sub(r"(\.nii)?\.(gz|nii|mha|mhd|nrrd|nhdr|png|jpe?g|bmp|tiff?|npy|npz|dcm)$", "", last, flags=re.I)
    return (*folders, stem) if stem else ()


def _split(name: str) -> list[str]:
    """Parts of a path with either kind of separator."""
    return [part for part in re.split(r"[\\/]", name.strip()) if part not in ("", ".")]
