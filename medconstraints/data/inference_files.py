"""Which volumes an inference run reads, and that nothing it would write is there already."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from medconstraints.data.datalist_sections import read_datalist

__all__ = ["check_output_dir", "volumes_for_inference"]

_ENDINGS = (".nii.gz", ".nii")


def volumes_for_inference(
    source: str | Path,
    *,
    section: str = "test",
    output_dir: str | Path | None = None,
    postfix: str = "seg",
    overwrite: bool = False,
) -> list[dict[str, str]]:
    """Items `{"image": path}` for every NIfTI volume of a folder, a datalist or one file.

    Args:
        source: a folder (its .nii and .nii.gz files, not those of subfolders, sorted by name), a datalist in the style
            of the Medical Segmentation Decathlon (paths relative to it), or one NIfTI file.
        section: section of the datalist.
        output_dir: where the masks will be written; it is checked as `check_output_dir` does. None skips the check.
        postfix: the masks are called `<name>_<postfix>.nii.gz`.
        overwrite: remove masks that exist already.

    Raises:
        FileNotFoundError: the source does not exist or holds no volume.
        ValueError: the datalist cannot be used (see `read_datalist`) or lists another kind of file, or two volumes have
            one name.
        FileExistsError: a mask, or the report `inference.json`, exists already and `overwrite` is False.
        PermissionError: the output folder cannot be written to.
    """
    source = Path(source)
    if source.is_dir():
        images = sorted(p for p in source.iterdir() if p.name.endswith(_ENDINGS) and not p.name.startswith("."))
    elif source.suffix == ".json" and source.is_file():
        images = [_nifti(entry["image"], number, source) for number, entry in enumerate(read_datalist(source, section))]
    elif source.name.endswith(_ENDINGS) and source.is_file():
        images = [source]
    else:
        raise FileNotFoundError(
            f"source: expected a folder of NIfTI files, a datalist (.json) or a NIfTI file, got {source}, which "
            f"{'is none of them' if source.exists() else 'does not exist'}."
        )
    if not images:
        raise FileNotFoundError(f"source: no .nii or .nii.gz file in {source}; convert DICOM series to NIfTI first.")
    stems = [_stem(path) for path in images]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise ValueError(f"source: several volumes are called {twice[:5]}, their masks would overwrite each other.")
    if output_dir is not None:
        check_output_dir(
            output_dir, [*(f"{stem}_{postfix}.nii.gz" for stem in stems), "inference.json"], overwrite=overwrite
        )
    return [{"image": str(path)} for path in images]


def check_output_dir(output_dir: str | Path, names: list[str], *, overwrite: bool = False) -> Path:
    """Make the output folder, before any work, and refuse what could not be written or would be lost.

    Args:
        output_dir: the folder; it is made when missing.
        names: files that will be written there.
        overwrite: remove those of the files that exist already: a volume that fails now must not seem to be done
            because of its old mask.

    Raises:
        FileExistsError: one of the files exists already; the message names the first.
        PermissionError: the folder cannot be made or written to.
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(
            f"output_dir: cannot write to {folder} ({error.strerror or error}); choose another folder."
        ) from error
    present = [name for name in names if (folder / name).exists()]
    if present and not overwrite:
        raise FileExistsError(
            f"output_dir: {len(present)} of {len(names)} outputs exist already in {folder}, such as {present[0]}; "
            "choose another folder, move them away, or set overwrite to true."
        )
    for name in present:
        (folder / name).unlink()
    return folder


def _nifti(image: Any, number: int, source: Path) -> Path:
    if isinstance(image, str) and image.endswith(_ENDINGS):
        return Path(image)
    raise ValueError(
        f"source: entry {number} of {source.name}: expected one .nii or .nii.gz file per volume, got {image!r}; "
        "convert other formats first."
    )


def _stem(path: Path) -> str:
    return next(path.name[: -len(ending)] for ending in _ENDINGS if path.name.endswith(ending))
