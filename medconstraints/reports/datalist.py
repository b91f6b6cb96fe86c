"""Find the images, references and saved predictions that a data list names."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from medconstraints.data.datalist_sections import load_datalist

__all__ = ["Entry", "find_predictions", "read_class_names", "read_section"]

_EXTENSIONS = (".nii.gz", ".nii")


@dataclass(frozen=True)
class Entry:
    """One volume of a data list: its name, the image path as listed, and both files on disk."""

    name: str
    listed: str
    image: Path
    label: Path


def _stem(path: str) -> str:
    # as MONAI's SaveImage names its files: `case.v1.nii.gz` -> `case.v1`
    return Path(Path(path).name.removesuffix(".gz")).stem


def read_section(
    datalist: str | os.PathLike[str], section: str, *, base_dir: str | os.PathLike[str] | None = None
) -> list[Entry]:
    """Entries of one section of a Medical-Segmentation-Decathlon style list.

    Paths are relative to `base_dir`, or to the list's own folder. Where `image` lists several files (channels), the
    first one names the case, as it does for MONAI's SaveImage.

    Raises:
        FileNotFoundError: when there is no such list.
        ValueError: for an unknown or empty section, an entry without image or label, or two images of one name.
    """
    path = Path(datalist)
    content = load_datalist(path)
    items = content.get(section)
    if not isinstance(items, list) or not items:
        lists = [key for key, value in content.items() if isinstance(value, list) and value]
        raise ValueError(f"section: {path} has no entries under {section!r}; it has {lists}.")
    base = path.parent if base_dir is None else Path(base_dir)
    entries = []
    for index, item in enumerate(items):
        image, label = (item.get("image"), item.get("label")) if isinstance(item, dict) else (item, None)
        image = image[0] if isinstance(image, list) and image else image
        if not isinstance(image, str) or not isinstance(label, str):
            raise ValueError(
                f"section: entry {index} of {section!r} in {path} is {item!r}; "
                'expected {"image": path, "label": path}. Scores need a reference for each image.'
            )
        listed = Path(image).name if os.path.isabs(image) else image
        entries.append(Entry(_stem(image), listed, base / image, base / label))
    twice = [name for name, count in Counter(entry.name for entry in entries).items() if count > 1]
    if twice:
        raise ValueError(
            f"section: {section!r} in {path} has several images named {twice}; "
            "their predictions cannot be told apart. Give the files different names."
        )
    return entries


def read_class_names(datalist: str | os.PathLike[str]) -> dict[int, str]:
    """Class names from the list's `labels` object (`{"1": "anterior"}`), without background; empty when it has none."""
    labels = load_datalist(datalist).get("labels")
    if not isinstance(labels, dict):
        return {}
    return {int(key): str(name) for key, name in labels.items() if str(key).isdecimal() and int(key) > 0}


def find_predictions(
    entries: Iterable[Entry], predictions_dir: str | os.PathLike[str], *, suffix: str = "_seg"
) -> dict[str, Path | None]:
    """The file `{name}{suffix}.nii.gz` (or `.nii`) anywhere below `predictions_dir` for each entry; None = missing.

    Raises:
        FileNotFoundError: when the folder does not exist, or holds no prediction of any entry.
        ValueError: when several files fit one entry.
    """
    folder = Path(predictions_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"predictions_dir: no folder {folder}.")
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.name.endswith(_EXTENSIONS) and path.is_file():
            found.setdefault(path.name.removesuffix(".gz").removesuffix(".nii"), []).append(path)
    predictions: dict[str, Path | None] = {}
    for entry in entries:
        matches = found.get(entry.name + suffix, [])
        if len(matches) > 1:
            raise ValueError(
                f"predictions_dir: {len(matches)} files below {folder} fit {entry.name}: "
                f"{[str(match.relative_to(folder)) for match in matches]}; keep one run per folder."
            )
        predictions[entry.name] = matches[0] if matches else None
    if predictions and not any(predictions.values()):
        some = [str(path.relative_to(folder)) for paths in list(found.values())[:3] for path in paths]
        raise FileNotFoundError(
            f"predictions_dir: nothing below {folder} is named like {next(iter(predictions))}{suffix}.nii.gz; "
            f"it holds {some or 'no NIfTI files'}. Check the folder and the suffix ({suffix!r})."
        )
    return predictions
