"""Folders that runs write to: nothing that is there already is lost, and what cannot be written is known at once."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from medconstraints.checks import flag
from medconstraints.volumes.files import mask_ending, volume_stem

logger = logging.getLogger(__name__)

__all__ = ["check_output_dir", "check_run_dir", "lock_folder", "mask_path"]

_LOCKS: dict[Path, FileLock] = {}  # held until the process ends


def mask_path(output_dir: str | Path, image: str | Path, *, postfix: str = "seg") -> Path:
    """Where inference writes the mask of a volume: `<output_dir>/<name>_<postfix>`, and the ending of `mask_ending`.

    Args:
        output_dir: folder of the masks.
        image: file of the volume, or folder of a DICOM series; what it lies in does not matter.
        postfix: see above; an empty one leaves the name alone.

    Example:
        >>> mask_path("masks", "scans/knee.nii").name
        'knee_seg.nii.gz'
    """
    stem = volume_stem(Path(image).name)
    return Path(output_dir) / f"{stem}{f'_{postfix}' if postfix else ''}{mask_ending(image)}"


def check_output_dir(output_dir: str | Path, names: Sequence[str] | None = None, *, overwrite: bool = False) -> Path:
    """Make the output folder, before any work, and refuse what could not be written or would be lost.

    Args:
        output_dir: the folder; it is made when missing.
        names: files that will be written there; None stands for any file.
        overwrite: accept files that exist already. They are not touched here: a run that fails before it has anything
            to write must not have removed them.

    Raises:
        FileExistsError: one of the files exists already and `overwrite` is False; the message names the first.
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
    expected = sorted(path.name for path in folder.iterdir()) if names is None else names
    present = [name for name in expected if (folder / name).exists()]
    if present and not flag("overwrite", overwrite):
        raise FileExistsError(
            f"output_dir: {len(present)} of {len(expected)} outputs exist already in {folder}, such as {present[0]}; "
            "choose another folder, move them away, or set overwrite to true."
        )
    return folder


def check_run_dir(output_dir: str | Path) -> Path:
    """Make the folder of a training run; refuse one whose weights a new run would replace.

    A folder with `last.pt` is a run that goes on, see `ResumeHandler`. It is locked for as long as this process lives,
    however that ends; where the file system has no locks nothing is.

    Args:
        output_dir: the folder; it is made when missing.

    Raises:
        FileExistsError: there is a `model.pt` but no `last.pt`, or another process trains into the folder.
        PermissionError: the folder cannot be made or written to.
    """
    folder = check_output_dir(output_dir, [])
    if (folder / "model.pt").exists() and not (folder / "last.pt").exists():
        raise FileExistsError(
            f"output_dir: {folder} has a model.pt but no last.pt to go on from, and training would replace it; choose "
            "another output_dir, or move model.pt away."
        )
    lock_folder(folder)
    return folder


def lock_folder(folder: Path) -> None:
    """Keep other runs out of a folder until this process ends; the lock of a dead process is none.

    Of several processes that work together the first one holds the lock; a process may lock a folder again.

    Raises:
        FileExistsError: another run holds it.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    lock = _LOCKS.setdefault(folder.resolve(), FileLock(folder / ".lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise FileExistsError(
            f"output_dir: another run is writing to {folder}; wait until it ends, or choose another output_dir."
        ) from error
    except NotImplementedError:
        logger.warning("%s: its file system has no locks; do not start a second run into it", folder)
