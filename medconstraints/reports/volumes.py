"""Read label volumes (NIfTI) and check that two of them lie on one voxel grid."""

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError

__all__ = ["Volume", "read_image", "read_labels", "read_labels_on", "require_same_grid"]

# A stored label may pass through a float file; anything further from an integer than this is no label map.
_INTEGER_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels `data` of 2 or 3 axes as stored, and the 4 x 4 `affine` from voxel to RAS millimetres."""

    path: Path
    data: np.ndarray
    affine: np.ndarray

    @property
    def spacing_mm(self) -> np.ndarray:
        """Edge lengths of a voxel along the stored axes, one for each axis of `data`."""
        return np.asarray(voxel_sizes(self.affine))[: self.data.ndim]

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres, exact for oblique and sheared grids."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0


def _load(path: Path, what: str) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"{what}: no file {path}; check the data list and its base folder.")
    try:
        image = nib.load(path)
    except ImageFileError as error:
        raise ValueError(f"{what}: {path} is not a NIfTI volume that nibabel can read ({error}).") from error
    data = np.asanyarray(image.dataobj)
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) == 0:
        raise ValueError(f"{what}: the affine of {path} is singular, so it has no voxel size; rewrite its header.")
    # A 2D image is stored as (X, Y) by some tools and as (X, Y, 1) by others; both mean the same grid.
    while data.ndim > 2 and data.shape[-1] == 1:
        data = data[..., 0]
    return data, affine


def _three_axes(data: np.ndarray) -> np.ndarray:
    return data if data.ndim == 3 else data[..., np.newaxis]


def read_image(path: Path) -> Volume:
    """Read an intensity volume as float32 with three axes; of several channels (a fourth axis) the first is taken.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no NIfTI volume of 2 to 4 axes.
    """
    data, affine = _load(path, "image")
    if data.ndim == 4:
        data = data[..., 0]
    if data.ndim not in (2, 3):
        raise ValueError(f"image: {path} has shape {data.shape}; expected 2 or 3 spatial axes and at most one more.")
    return Volume(path, np.nan_to_num(_three_axes(data).astype(np.float32)), affine)


def read_labels(path: Path, what: str = "labels") -> Volume:
    """Read a label map of 2 or 3 axes as integers; `what` names it in errors.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no NIfTI volume, has more axes (one-hot), or holds values that are no integers.
    """
    data, affine = _load(path, what)
    if data.ndim not in (2, 3):
        raise ValueError(
            f"{what}: {path} has shape {data.shape}; expected one label map of 2 or 3 axes. "
            "Save the argmax, not one-hot."
        )
    if data.dtype.kind == "f":
        rounded = np.rint(data)
        # Written so that a NaN fails too.
        if not (np.abs(data - rounded) <= _INTEGER_TOLERANCE).all():
            raise ValueError(
                f"{what}: {path} holds values that are no integers; expected a label map. "
                "Threshold or argmax before saving."
            )
        data = rounded.astype(np.int32)
    elif data.dtype.kind not in "iub":
        raise ValueError(f"{what}: {path} has voxel type {data.dtype}; expected integers.")
    return Volume(path, data, affine)


def require_same_grid(volume: Volume, reference: Volume, *, tolerance_voxels: float = 1e-3) -> None:
    """Check equal shape, and affines equal entry by entry within `tolerance_voxels` of the smallest voxel edge.

    Raises:
        ValueError: naming both files and what differs.
    """
    if volume.data.shape != reference.data.shape:
        raise ValueError(
            f"{volume.path} has shape {volume.data.shape} but {reference.path} has {reference.data.shape}; "
            "save the mask in the reference's own grid (MONAI: Invertd before SaveImaged)."
        )
    difference = np.abs(volume.affine - reference.affine).max()
    if difference > tolerance_voxels * reference.spacing_mm.min():
        raise ValueError(
            f"{volume.path} and {reference.path} have different affines (largest difference {difference:.4g}, "
            f"voxel {tuple(np.round(reference.spacing_mm, 4).tolist())} mm); save the mask in the reference's own grid "
            "(MONAI: Invertd before SaveImaged)."
        )


def read_labels_on(path: Path, image: Volume, what: str = "labels") -> Volume:
    """Read a label map and flip and permute its axes so that they run as those of `image` do.

    The result has three axes, as `read_image` gives. Only their order and direction change, nothing is resampled.
    Headers of public data differ a little between image and label, so affines may differ by half a voxel here; scores
    use the strict `require_same_grid`.
    """
    labels = read_labels(path, what)
    data = _three_axes(labels.data)
    turn = nib.orientations.ornt_transform(nib.io_orientation(labels.affine), nib.io_orientation(image.affine))
    affine = labels.affine @ nib.orientations.inv_ornt_aff(turn, data.shape)
    labels = Volume(path, nib.orientations.apply_orientation(data, turn), affine)
    require_same_grid(labels, image, tolerance_voxels=0.5)
    return labels
