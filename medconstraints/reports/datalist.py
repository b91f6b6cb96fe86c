"""Find the images, references and saved predictions that a data list names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from medconstraints.data.datalist_sections import read_datalist
from medconstraints.volumes.files import is_volume, volume_stem

__all__ = ["Entry", "find_predictions", "read_section"]


@dataclass(frozen=True)
class Entry:
    """One volume of a data list: its name, the image path without the folder of the list, and both files on disk."""

    name: str
    listed: str
    image: Path
    label: Path


def read_section(
    datalist: str | PathLike[str], section: str, *, base_dir: str | PathLike[str] | None = None
) -> list[Entry]:
    """Entries of one section of a Medical-Segmentation-Decathlon style list.

    Paths are relative to `base_dir`, or to the list's own folder. Where `image` lists several files (channels), the
    first one names the case, as it does for MONAI's SaveImage.

    Raises:
        FileNotFoundError: when there is no such list.
        ValueError: for an unknown or empty section, an entry without image or label, or two images of one name.
    """
    base = Path(datalist).parent if base_dir is None else Path(base_dir)
    entries = []
    for number, item in enumerate(read_datalist(datalist, section, base_dir=base)):
        image, label = item["image"], item.get("label")
        if not isinstance(label, str):
            raise ValueError(
                f"section: entry {number} of {section!r} in {datalist}: expected one path under 'label', got {label!r};"
                " scores need a reference for each image."
            )
        file = Path(image[0] if isinstance(image, list) else image)
        listed = file.relative_to(base).as_posix() if file.is_relative_to(base) else file.name
        # as MONAI's SaveImage names its files: `case.v1.nii.gz` -> `case.v1`
        entries.append(Entry(Path(file.name.removesuffix(".gz")).stem, listed, file, Path(label)))
    twice = [name for name, count in Counter(entry.name for entry in entries).items() if count > 1]
    if twice:
        raise ValueError(
            f"section: {section!r} in {datalist} has several images named {twice}; "
            "their predictions cannot be told apart. Give the files different names."
        )
    return entries


def find_predictions(
    entries: Iterable[Entry], predictions_dir: str | PathLike[str], *, suffix: str = "_seg"
) -> dict[str, Path | None]:
    """The volume `{name}{suffix}` of any format anywhere below `predictions_dir` for each entry; None = missing.

    Raises:
        FileNotFoundError: when the folder does not exist, or holds no prediction of any entry.
        ValueError: when several files fit one entry.
    """
    folder = Path(predictions_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"predictions: no folder {folder}.")
    files = sorted(path for path in folder.rglob("*") if is_volume(path) and path.is_file())
    predictions: dict[str, Path | None] = {}
    for entry in entries:
        matches = [path for path in files if volume_stem(path.name) == f"{entry.name}{suffix}"]
        if len(matches) > 1:
            found = [str(match.relative_to(folder)) for match in matches]
            raise ValueError(f"predictions: {len(matches)} files fit {entry.name}, {found}; keep one run per folder.")
        predictions[entry.name] = matches[0] if matches else None
    if not any(predictions.values()):
        raise FileNotFoundError(
            f"predictions: nothing below {folder} is named like {next(iter(predictions))}{suffix}.nii.gz; it holds "
            f"{[path.name for path in files[:3]] or 'no volumes'}. Check the folder and the suffix ({suffix!r})."
        )
    return predictions
