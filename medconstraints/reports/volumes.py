"""Read volumes for a report, turn their axes to RAS, and check that two lie on one voxel grid."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes

from medconstraints.volumes import VolumeError
from medconstraints.volumes.files import read_voxels
from medconstraints.volumes.grids import GRID_TOLERANCE, grid_difference

__all__ = ["Volume", "read_image", "read_labels", "require_same_grid"]

# A stored label may pass through a float file; anything further from an integer than this is no label map.
_INTEGER_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels `data` of 2 or 3 axes, and the 4 x 4 `affine` from voxel to RAS millimetres."""

    path: Path
    data: np.ndarray
    affine: np.ndarray

    @property
    def spacing_mm(self) -> np.ndarray:
        """Edge lengths of a voxel along the axes, one for each axis of `data`."""
        return np.asarray(voxel_sizes(self.affine))[: self.data.ndim]

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres, exact for oblique and sheared grids."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    def canonical(self) -> Volume:
        """The same voxels with three axes, permuted and flipped to run to the right, anterior and superior."""
        data = self.data if self.data.ndim == 3 else self.data[..., np.newaxis]
        turn = nib.io_orientation(self.affine)
        affine = self.affine @ nib.orientations.inv_ornt_aff(turn, data.shape)
        return Volume(self.path, nib.orientations.apply_orientation(data, turn), affine)


def read_image(path: str | Path, *, series: str | None = None) -> Volume:
    """Read an intensity volume as float32; of several channels (a fourth axis) the first is taken.

    Args:
        path: file, or folder of DICOM slices.
        series: of a folder that holds several.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no volume of 2 to 4 axes.
    """
    volume = _load(Path(path), "image", series)
    data = volume.data[..., 0] if volume.data.ndim == 4 else volume.data
    if data.ndim not in (2, 3):
        raise ValueError(
            f"image: {volume.path.name} has shape {data.shape}; expected 2 or 3 spatial axes and at most one more."
        )
    return Volume(volume.path, np.nan_to_num(data.astype(np.float32, copy=False), copy=False), volume.affine)


def read_labels(path: str | Path, what: str = "labels") -> Volume:
    """Read a label map of 2 or 3 axes as integers; `what` names it in errors.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no volume, has more axes (one-hot), or holds values that are no integers.
    """
    volume = _load(Path(path), what)
    data, name = volume.data, volume.path.name
    if data.ndim not in (2, 3):
        raise ValueError(f"{what}: expected one label map of 2 or 3 axes, not one-hot, got {data.shape} in {name}.")
    if data.dtype.kind in "iub":
        return volume
    # Written so that a NaN fails too.
    if data.dtype.kind != "f" or not (np.abs(data - np.rint(data)) <= _INTEGER_TOLERANCE).all():
        raise ValueError(f"{what}: {name} holds values that are no integers; threshold or argmax before saving.")
    return Volume(volume.path, np.rint(data).astype(np.int32), volume.affine)


def require_same_grid(volume: Volume, reference: Volume, *, tolerance: float = GRID_TOLERANCE) -> None:
    """Check equal shape, and affines that are one grid (`grid_difference`).

    Raises:
        ValueError: naming both files and what differs.
    """
    advice = "save the mask in the reference's own grid (MONAI: Invertd before SaveImaged)."
    if volume.data.shape != reference.data.shape:
        raise ValueError(
            f"{volume.path.name} has shape {volume.data.shape} but {reference.path.name} has {reference.data.shape}; "
            f"{advice}"
        )
    if apart := grid_difference(volume.affine, reference.affine, tolerance):
        raise ValueError(f"{volume.path.name} and {reference.path.name} have different affines: {apart}; {advice}")


def _load(path: Path, what: str, series: str | None = None) -> Volume:
    try:
        data, affine = read_voxels(path, series)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{what}: no file {path}; check the data list and its base folder.") from error
    except VolumeError as error:
        raise ValueError(f"{what}: {error}") from error
    # A 2D image is stored as (X, Y) by some tools and as (X, Y, 1) by others; both mean the same grid.
    while data.ndim > 2 and data.shape[-1] == 1:
        data = data[..., 0]
    return Volume(path, data, affine)
