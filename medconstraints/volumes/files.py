"""Which files of a folder are volumes, what their masks are called, and reading either kind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medconstraints.volumes.dicom import DICOM_ENDINGS, DicomReader, is_dicom
from medconstraints.volumes.errors import VolumeError
from medconstraints.volumes.itk_files import ITK_ENDINGS, ItkFileReader
from medconstraints.volumes.nifti import NiftiReader

__all__ = ["VOLUME_ENDINGS", "find_volumes", "is_volume", "mask_ending", "read_voxels", "readers", "volume_stem"]

NIFTI_ENDINGS = (".nii.gz", ".nii", ".img", ".hdr")
VOLUME_ENDINGS = (*NIFTI_ENDINGS, *ITK_ENDINGS, *DICOM_ENDINGS)
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")
PICKLES = (".pkl", ".pickle", ".npy", ".npz", ".pt", ".pth")


def volume_stem(name: str) -> str:
    """Name of a file without the ending of its format.

    Example:
        >>> volume_stem("knee.1.NII.GZ")
        'knee.1'
    """
    return next((name[: -len(ending)] for ending in VOLUME_ENDINGS if name.lower().endswith(ending)), name)


def mask_ending(image: str | Path) -> str:
    """Ending of the mask of a volume: that of the same family; of DICOM NIfTI's.

    Example:
        >>> mask_ending("knee.mhd"), mask_ending("series/")
        ('.mha', '.nii.gz')
    """
    name = Path(image).name.lower()
    return ".nrrd" if name.endswith((".nrrd", ".nhdr")) else ".mha" if name.endswith((".mha", ".mhd")) else ".nii.gz"


def is_volume(path: Path) -> bool:
    """Whether a file is a volume by its name."""
    return path.name.lower().endswith(VOLUME_ENDINGS)


def find_volumes(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every file below a folder, by name, with the reason why it is no volume to segment, or "" for one that is.

    A folder with DICOM files is one volume, whatever other volumes lie in it. Links to folders are not followed.
    """
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in folders:
            if os.path.islink(os.path.join(place, name)):
                yield Path(place) / name, "is a link to a folder, which is not followed"
            elif not os.access(os.path.join(place, name), os.R_OK | os.X_OK):
                yield Path(place) / name, "is a folder that may not be read"
        here, shown = Path(place), sorted(name for name in names if not name.startswith("."))
        series = [name for name in shown if _is_slice(here / name)]
        if series:
            yield here, ""
        present = {name.lower() for name in names}
        for name in shown:
            if name not in series:
                yield here / name, _left_out(here / name, present, in_series=bool(series))
        for name in sorted(set(names) - set(shown)):
            yield here / name, "is a hidden file"


def _is_slice(path: Path) -> bool:
    """DICOM by its ending; or by its content, where the name has no ending of a format, as 1.2.840.113 has not."""
    suffix = path.suffix.lower()
    if path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    try:
        return suffix in DICOM_ENDINGS or (not suffix.lstrip(".").strip("0123456789") and is_dicom(path))
    except OSError:  # it may not be read
        return False


def _left_out(path: Path, present: set[str], *, in_series: bool) -> str:
    name = path.name.lower()
    stem = volume_stem(name)
    if in_series and not name.endswith(VOLUME_ENDINGS):
        return "lies in the folder of a DICOM series"
    if name.endswith(".hdr") and f"{stem}.img" in present:
        return "is the header of the .img file"
    if name.endswith(VOLUME_ENDINGS):
        return ""
    if not os.access(path, os.R_OK):
        return "may not be read"
    base = name.split(".")[0]
    if name.endswith((".raw", ".zraw", ".raw.gz")) and present & {f"{base}.mhd", f"{base}.nhdr"}:
        return "holds the voxels of the header beside it"
    if name.endswith(ARCHIVES):
        return "is an archive, which is not opened; unpack it"
    if name.endswith(PICKLES):
        return "may run code when it is opened; save it as NIfTI"
    return "is no NIfTI, NRRD, MetaImage or DICOM file by its name"


def read_voxels(path: Path, series: str | None = None) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """Voxels with the axes as in the file, and the affine to RAS in millimetres, by the readers of `LoadVolumed`.

    Raises:
        FileNotFoundError: there is no such file.
        VolumeError: it cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    for reader in readers(series=series):
        if reader.verify_suffix(str(path)):
            try:
                voxels, meta = reader.get_data(reader.read(str(path)))
            except (OSError, EOFError) as error:  # nibabel reads when it is asked for voxels
                raise VolumeError(f"{path.name}: is truncated or damaged ({error}); copy it again.") from error
            return voxels, meta["affine"]
    raise VolumeError(f"{path.name}: expected one of the endings {', '.join(VOLUME_ENDINGS)}; convert it first.")


def readers(form: str = "best", series: str | None = None) -> tuple[Any, ...]:
    """Readers of MONAI's kind for all formats that are volumes here; see `NiftiReader` and `DicomReader`."""
    return NiftiReader(form), ItkFileReader(), DicomReader(series)
