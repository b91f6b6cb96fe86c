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
from medconstraints.volumes.itk_files import ItkFileReader, named_errors, read_itk

__all__ = ["DICOM_ENDINGS", "DicomReader", "files_of", "is_dicom", "is_dicom_volume", "read_series", "series_of"]

DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
# Enhanced and converted CT, MR and PET: each of their frames has its place.
ENHANCED = frozenset(f"1.2.840.10008.5.1.4.1.1.{number}" for number in ("2.1", "2.2", "4.1", "4.4", "130", "128.1"))
UNEVEN = 0.02  # share of the slices' distance by which one of them may differ; positions are stored as texts
TILT_DEG = 0.5  # by which the stack may lean against its slices


@dataclass(frozen=True)
class _Slice:
    """What a file says of its slice, or of a frame; places are in LPS millimetres."""

    path: Path
    position: npt.NDArray[np.float64]
    axes: npt.NDArray[np.float64]  # along a row and down a column
    grid: tuple[Any, ...]  # rows, columns, pixel spacing
    step_mm: npt.NDArray[np.float64]
    thickness_mm: float
    frames: int
    values: tuple[str, ...]  # slope, intercept and sign of what is stored

    @property
    def name(self) -> str:
        return self.path.name


def is_dicom_volume(path: Path) -> bool:
    """Whether this is a folder, or a DICOM file by its ending."""
    return path.is_dir() or path.suffix.lower() in DICOM_ENDINGS


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
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    files = [path for path in files if path.name.upper() != "DICOMDIR"]
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


def files_of(path: Path, uid: str | None = None) -> list[Path]:
    """Files of the series of a folder, in no order, or the one file that is given.

    Raises:
        VolumeError: see `series_of`; several series and none is named, or the folder has no such series.
    """
    if path.is_file():
        return [path]
    series = series_of(path)
    if uid is None and len(series) > 1:
        told = ", ".join(
            f"{name} ({len(files)} files, such as {Path(files[0]).name})" for name, files in series.items()
        )
        raise VolumeError(f"{path.name}: holds {len(series)} series: {told}; set series to one of them.")
    chosen = series.get(uid or next(iter(series)))
    if chosen is None:
        raise VolumeError(f"{path.name}: has no series {uid}; it has {', '.join(series)}.")
    return [Path(name) for name in chosen]


def read_series(path: Path, uid: str | None = None) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """Voxels (X, Y, Z) of a DICOM series, and the affine to RAS in millimetres, from the positions of its slices.

    Args:
        path: folder of the series, or one file.
        uid: series instance UID, where there are several.

    Raises:
        VolumeError: see `files_of`; files that cannot be read, slices that are missing, twice there, uneven, of several
            sizes or orientations, without a place, or that lean (gantry tilt); colours; MONOCHROME1.
    """
    files = files_of(path, uid)
    slices = [_slice(file) for file in files]
    framed = len(files) == 1 and slices[0].frames > 1
    if framed:
        slices = _frames(files[0])
    order = sorted(range(len(slices)), key=lambda k: float(slices[k].position @ _normal(slices[k])))
    slices = [slices[k] for k in order]
    first, last = slices[0], slices[-1]
    if len(slices) > 1:
        _check_stack(path.name, slices)
    elif not first.thickness_mm:
        raise VolumeError(f"{path.name}: is one slice without a thickness: its voxels have no size; give the series.")
    scales = {one.values for one in slices}
    if framed:
        voxels = sitk.GetArrayFromImage(read_itk(files[0]))[order]
        if len(scales) > 1:
            voxels = _scaled(voxels, slices, order.index(0))
    else:
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames([str(one.path) for one in slices])
        if len(scales) > 1:  # the type of the first slice's would cut the others
            reader.SetOutputPixelType(sitk.sitkFloat64)
        with named_errors(path):
            voxels = sitk.GetArrayFromImage(reader.Execute())
    affine = np.eye(4)
    affine[:3, :2] = first.axes * first.step_mm
    affine[:3, 2] = _normal(first) * first.thickness_mm
    if len(slices) > 1:
        affine[:3, 2] = (last.position - first.position) / (len(slices) - 1)
    affine[:3, 3] = first.position
    return voxels.transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _frames(path: Path) -> list[_Slice]:
    """What an enhanced file says of each of its frames, in their order; SimpleITK takes them for a stack in any case.

    Raises:
        VolumeError: a frame has no place, or pydicom is not installed.
    """
    try:
        from pydicom import dcmread
    except ImportError:
        raise VolumeError(
            f"{path.name}: holds several frames, whose places pydicom reads; run `pip install medconstraints[dicom]`, "
            "or convert it to NIfTI."
        ) from None
    header = dcmread(path, stop_before_pixels=True)
    shared = header.SharedFunctionalGroupsSequence[0]
    frames = []
    for number, own in enumerate(header.PerFrameFunctionalGroupsSequence, start=1):
        place, turn, measures, scale = (
            (own.get(f"{name}Sequence") or shared.get(f"{name}Sequence") or [{}])[0]
            for name in ("PlanePosition", "PlaneOrientation", "PixelMeasures", "PixelValueTransformation")
        )
        given = [*place.get("ImagePositionPatient", ()), *turn.get("ImageOrientationPatient", ())]
        given += measures.get("PixelSpacing", ())
        if len(given) != 11:
            raise VolumeError(f"{path.name}: frame {number} has no place in the scanner; convert it to NIfTI.")
        position, axes, (down, across) = np.split(np.array(given, dtype=np.float64), (3, 9))
        values = (str(scale.get("RescaleSlope", 1)), str(scale.get("RescaleIntercept", 0)), "")
        grid = (header.Columns, header.Rows, round(across, 4), round(down, 4))
        axes, step_mm = axes.reshape(2, 3).T, np.array([across, down])
        frames.append(_Slice(Path(f"frame {number}"), position, axes, grid, step_mm, 0.0, 1, values))
    return frames


def _scaled(voxels: npt.NDArray[Any], frames: Sequence[_Slice], first: int) -> npt.NDArray[np.float64]:
    """Frames (Z, Y, X) by their own slopes and intercepts; SimpleITK takes those of the file's first one for all."""
    slope, intercept = np.array([one.values[:2] for one in frames], dtype=np.float64).T[..., None, None]
    return (voxels - intercept[first]) / slope[first] * slope + intercept


def _slice(path: Path) -> _Slice:
    """What a file says of itself.

    Raises:
        VolumeError: it cannot be read, holds colours or inverted intensities, or does not say where it is.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    with named_errors(path):
        reader.ReadImageInformation()

    def text(tag: str) -> str:
        return reader.GetMetaData(tag).strip() if reader.HasMetaDataKey(tag) else ""

    def numbers(tag: str, count: int) -> npt.NDArray[np.float64]:
        try:
            found = np.array([float(part) for part in text(tag).split("\\")])
        except ValueError:
            found = np.empty(0)
        if len(found) != count or not np.isfinite(found).all():
            raise VolumeError(f"{path.name}: has no place in the scanner (tag {tag}); export the series again.")
        return found

    if reader.GetNumberOfComponents() > 1:
        raise VolumeError(f"{path.name}: holds colours, not intensities; this may be a screen shot or a report.")
    if text("0028|0004") == "MONOCHROME1":
        raise VolumeError(f"{path.name}: stores what is dark as large numbers (MONOCHROME1); convert it.")
    frames = reader.GetSize()[2] if reader.GetDimension() > 2 else 1
    if frames > 1 and text("0008|0016") in ENHANCED:
        empty = np.zeros(3)
        return _Slice(path, empty, np.zeros((3, 2)), (), empty[:2], 0.0, frames, ())
    if frames > 1:
        raise VolumeError(f"{path.name}: holds {frames} frames that have no place each; convert it to NIfTI.")
    axes = numbers("0020|0037", 6).reshape(2, 3).T
    down, across = numbers("0028|0030", 2).tolist()
    thickness = float(text("0018|0050") or 0)
    values = (text("0028|1052"), text("0028|1053"), text("0028|0103"))
    grid = (*reader.GetSize()[:2], round(across, 4), round(down, 4))
    return _Slice(path, numbers("0020|0032", 3), axes, grid, np.array([across, down]), thickness, frames, values)


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
        return all(is_dicom_volume(Path(name)) for name in ensure_tuple(filename))

    def _volume(self, path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64], int, str]:
        voxels, affine = read_series(path, self.series)
        return voxels, affine, 3, ""
