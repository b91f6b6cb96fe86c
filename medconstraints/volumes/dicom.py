"""DICOM series: one folder, one series, every slice at its place, or an error that names the files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from monai.utils import ensure_tuple

from medconstraints.volumes.errors import VolumeError
from medconstraints.volumes.itk_files import ItkFileReader, itk_affine, named_errors, read_itk

__all__ = ["DICOM_ENDINGS", "DicomReader", "is_dicom", "read_series", "series_of"]

DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
UNEVEN = 0.02  # share of the slices' distance by which one of them may differ; positions are stored as texts
TILT_DEG = 0.5  # by which the stack may lean against its slices


@dataclass(frozen=True)
class _Slice:
    """What a file says of the place of its slice, in LPS millimetres."""

    name: str
    position: npt.NDArray[np.float64]
    axes: npt.NDArray[np.float64]
    grid: tuple[Any, ...]  # rows, columns, pixel spacing


def is_dicom(path: Path) -> bool:
    """Whether a file has DICOM's mark behind its preamble."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def series_of(folder: Path) -> Mapping[str, Sequence[str]]:
    """Files of each series of a folder, by its UID; a file that cannot be read is an error.

    Raises:
        VolumeError: no series, or DICOM files that are truncated or damaged.
    """
    uids = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    series = {uid: sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid) for uid in uids}
    read = {Path(name).name for names in series.values() for name in names}
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name.upper() != "DICOMDIR"]
    lost = [
        path.name
        for path in files
        if path.name not in read and (path.suffix.lower() in DICOM_ENDINGS or is_dicom(path))
    ]
    if lost:
        raise VolumeError(
            f"{folder.name}: {len(lost)} of {len(read) + len(lost)} DICOM files are truncated or damaged: "
            f"{_some(lost)}; copy them again, or take them away if they are no slices."
        )
    if not series:
        raise VolumeError(f"{folder.name}: is a folder without DICOM files; give a file, or a folder of one series.")
    return series


def read_series(folder: Path, uid: str | None = None) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """Voxels (X, Y, Z) of a DICOM series, and the affine to RAS in millimetres, from the positions of its slices.

    Args:
        folder: the files of the series.
        uid: series instance UID, where there are several.

    Raises:
        VolumeError: several series and none is named, files that cannot be read, slices that are missing, twice there,
            uneven, of several sizes or orientations, or that lean (gantry tilt); colours.
    """
    series = series_of(folder)
    if uid is None and len(series) > 1:
        told = ", ".join(
            f"{name} ({len(files)} files, such as {Path(files[0]).name})" for name, files in series.items()
        )
        raise VolumeError(f"{folder.name}: holds {len(series)} series: {told}; set series to one of them.")
    chosen = series.get(uid or next(iter(series)))
    if chosen is None:
        raise VolumeError(f"{folder.name}: has no series {uid}; it has {', '.join(series)}.")
    if len(chosen) == 1:  # several frames in one file have their geometry in it
        image = read_itk(Path(chosen[0]))
        _require_grey(folder, image)
        return sitk.GetArrayFromImage(image).transpose(2, 1, 0), itk_affine(image)
    slices = sorted((_slice(Path(name)) for name in chosen), key=lambda one: float(one.position @ _normal(one)))
    _check_stack(folder.name, slices)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(folder / one.name) for one in slices])
    with named_errors(folder):
        image = reader.Execute()
    _require_grey(folder, image)
    across, down = (float(step) for step in image.GetSpacing()[:2])
    affine = np.eye(4)
    affine[:3, :2] = slices[0].axes * [across, down]
    affine[:3, 2] = (slices[-1].position - slices[0].position) / (len(slices) - 1)
    affine[:3, 3] = slices[0].position
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _slice(path: Path) -> _Slice:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()

    def numbers(tag: str, count: int) -> npt.NDArray[np.float64]:
        try:
            found = np.array([float(part) for part in reader.GetMetaData(tag).split("\\")])
        except (RuntimeError, ValueError):
            found = np.empty(0)
        if len(found) != count or not np.isfinite(found).all():
            raise VolumeError(f"{path.name}: has no place in the scanner (tag {tag}); export the series again.")
        return found

    axes = numbers("0020|0037", 6).reshape(2, 3).T
    size, step = reader.GetSize()[:2], np.round(reader.GetSpacing()[:2], 4).tolist()
    return _Slice(path.name, numbers("0020|0032", 3), axes, (*size, *step))


def _normal(one: _Slice) -> npt.NDArray[np.float64]:
    return np.cross(one.axes[:, 0], one.axes[:, 1])


def _check_stack(folder: str, slices: Sequence[_Slice]) -> None:
    """Refuse what is no even stack of like slices."""
    count = len(slices)
    usual_grid, _ = Counter(one.grid for one in slices).most_common(1)[0]
    other = [one.name for one in slices if one.grid != usual_grid]
    if other:
        raise VolumeError(
            f"{folder}: {len(other)} of {count} slices have another size or pixel spacing than the others: "
            f"{_some(other)}; keep slices of one kind."
        )
    middle = slices[count // 2]
    turned = [one.name for one in slices if not np.allclose(one.axes, middle.axes, atol=1e-3)]
    if turned:
        raise VolumeError(
            f"{folder}: {len(turned)} of {count} slices have another orientation than {middle.name}: {_some(turned)}; "
            "localisers and oblique stacks do not belong into the series."
        )
    places = np.array([one.position for one in slices])
    along = places @ _normal(middle)
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    twice = [
        f"{slices[k].name} and {slices[k + 1].name}" for k in np.flatnonzero(gaps <= max(1e-3, UNEVEN * usual)).tolist()
    ]
    if twice:
        raise VolumeError(
            f"{folder}: {len(twice)} slices are at the place of another one: {_some(twice)}; remove the copies, or "
            "divide the time points or echoes into folders of their own."
        )
    lean = places[-1] - places[0] - (along[-1] - along[0]) * _normal(middle)
    tilt = float(np.degrees(np.arctan2(np.linalg.norm(lean), abs(along[-1] - along[0]))))
    if tilt > TILT_DEG:
        raise VolumeError(
            f"{folder}: its slices are shifted against each other by {tilt:.1f} degrees (gantry tilt); correct that "
            "when converting to NIfTI, dcm2niix does."
        )
    wide = [
        f"{gap:.3f} mm between {slices[k].name} and {slices[k + 1].name}"
        for k, gap in enumerate(gaps)
        if abs(gap - usual) > UNEVEN * usual
    ]
    if wide:
        raise VolumeError(
            f"{folder}: slices are missing, or unevenly spaced: {usual:.3f} mm apart, but {_some(wide)}; copy the "
            "whole series, or resample it to even slices."
        )


def _require_grey(folder: Path, image: Any) -> None:
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise VolumeError(f"{folder.name}: holds colours, not intensities; this may be a screen shot or a report.")


def _some(names: Sequence[str]) -> str:
    rest = len(names) - 5
    return ", ".join(names[:5]) + (f" and {rest} more" if rest > 0 else "")


class DicomReader(ItkFileReader):
    """Reader of MONAI's kind for folders of one DICOM series, see `read_series`, and for single DICOM files.

    No other header entry is kept: names and dates of patients do not travel on.

    Args:
        series: series instance UID, for folders of several.
    """

    def __init__(self, series: str | None = None) -> None:
        super().__init__()
        self.series = series

    def verify_suffix(self, filename: Sequence[Any] | Any) -> bool:
        """Whether these are folders, or DICOM files by their ending."""
        paths = [Path(name) for name in ensure_tuple(filename)]
        return all(path.is_dir() or path.suffix.lower() in DICOM_ENDINGS for path in paths)

    def _volume(self, path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64], int, str]:
        if path.is_dir():
            return *read_series(path, self.series), 3, ""
        _require_grey(path, read_itk(path))
        return super()._volume(path)
