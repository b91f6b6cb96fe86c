"""Which volumes an inference run reads, and that nothing it would write is there already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medconstraints.data.datalist_sections import read_datalist
from medconstraints.data.output_folders import NIFTI_ENDINGS, check_output_dir, mask_path

__all__ = ["volumes_for_inference"]


def volumes_for_inference(
    source: str | Path,
    *,
    section: str = "test",
    output_dir: str | Path | None = None,
    postfix: str = "seg",
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Items `{"image": path}` for every NIfTI volume of a folder, a datalist or one file.

    An entry of a datalist whose image is a list of files, one for each channel, gives the list of their paths; the
    first one names its mask.

    Args:
        source: a folder (its .nii and .nii.gz files, not those of subfolders, sorted by name), a datalist in the style
            of the Medical Segmentation Decathlon (paths relative to it), or one NIfTI file.
        section: section of the datalist.
        output_dir: where the masks will be written; it is checked as `check_output_dir` does. None skips the check.
        postfix: the masks are called `<name>_<postfix>.nii.gz`.
        overwrite: accept masks that exist already. They stay until the new ones are written.

    Raises:
        FileNotFoundError: the source does not exist or holds no volume.
        ValueError: the datalist cannot be used (see `read_datalist`) or lists another kind of file, two volumes have
            one name, or masks would be written among the volumes of a folder or over one of the volumes.
        FileExistsError: a mask, or the report `inference.json`, exists already and `overwrite` is False.
        PermissionError: the output folder cannot be written to.
    """
    source = Path(source)
    if source.is_dir():
        names = sorted(p for p in source.iterdir() if p.name.endswith(NIFTI_ENDINGS) and not p.name.startswith("."))
        channels = [[path] for path in names]
    elif source.suffix == ".json" and source.is_file():
        entries = read_datalist(source, section)
        channels = [_nifti(entry["image"], number, source) for number, entry in enumerate(entries)]
    elif source.name.endswith(NIFTI_ENDINGS) and source.is_file():
        channels = [[source]]
    else:
        raise FileNotFoundError(
            f"source: expected a folder of NIfTI files, a datalist (.json) or a NIfTI file, got {source}, which "
            f"{'is none of them' if source.exists() else 'does not exist'}."
        )
    if not channels:
        raise FileNotFoundError(f"source: no .nii or .nii.gz file in {source}; convert DICOM series to NIfTI first.")
    images = [paths[0] for paths in channels]
    masks = [mask_path("", path, postfix=postfix).name for path in images]
    twice = sorted({mask.removesuffix(f"_{postfix}.nii.gz") for mask in masks if masks.count(mask) > 1})
    if twice:
        raise ValueError(f"source: several volumes are called {twice[:5]}, their masks would overwrite each other.")
    if output_dir is not None:
        _check_apart(source, [path for paths in channels for path in paths], masks, Path(output_dir))
        check_output_dir(output_dir, [*masks, "inference.json"], overwrite=overwrite)
    return [{"image": [str(path) for path in paths] if len(paths) > 1 else str(paths[0])} for paths in channels]


def _nifti(image: Any, number: int, source: Path) -> list[Path]:
    paths = list(image) if isinstance(image, Sequence) and not isinstance(image, str) else [image]
    if paths and all(isinstance(path, str) and path.endswith(NIFTI_ENDINGS) for path in paths):
        return [Path(path) for path in paths]
    raise ValueError(
        f"source: entry {number} of {source.name}: expected one .nii or .nii.gz file for each volume or channel, got "
        f"{image!r}; convert other formats first."
    )


def _check_apart(source: Path, images: list[Path], masks: list[str], output_dir: Path) -> None:
    """Masks must not land among the inputs: the next run would take them for volumes, or replace a volume."""
    folder = output_dir.resolve()
    if source.is_dir() and folder == source.resolve():
        raise ValueError(
            f"output_dir: {output_dir} is the folder of the volumes, the masks would be taken for volumes; choose "
            "another folder."
        )
    inputs = {path.resolve() for path in images}
    lost = [mask for mask in masks if (folder / mask).resolve() in inputs]
    if lost:
        raise ValueError(
            f"output_dir: the mask {lost[0]} would replace a volume of that name in {output_dir}; choose another "
            "folder."
        )
