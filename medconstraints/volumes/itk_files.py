"""NRRD and MetaImage files, by SimpleITK."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from monai.data.image_reader import ImageReader, _copy_compatible_dict, _stack_images
from monai.utils import ensure_tuple

from medconstraints.volumes.errors import VolumeError
from medconstraints.volumes.grids import require_one_grid

__all__ = ["ITK_ENDINGS", "ItkFileReader", "itk_affine", "named_errors", "read_itk", "voxels_of"]

NRRD_ENDINGS = (".nrrd", ".nhdr")
ITK_ENDINGS = (*NRRD_ENDINGS, ".mha", ".mhd")
UNITS_MM = {"mm": 1.0, "millimeter": 1.0, "um": 1e-3, "micron": 1e-3, "cm": 10.0, "m": 1e3, "meter": 1e3}
MM_KEY = "medconstraints_mm"  # of an image: millimetres of one unit of its file


def itk_affine(image: Any) -> npt.NDArray[np.float64]:
    """Voxel index to RAS in millimetres, (4, 4), of a SimpleITK image of 2 or 3 axes, whose space is LPS."""
    dims = image.GetDimension()
    scale = float(image.GetMetaData(MM_KEY)) if image.HasMetaDataKey(MM_KEY) else 1.0
    affine = np.eye(4)
    affine[:dims, :dims] = np.reshape(image.GetDirection(), (dims, dims)) * np.asarray(image.GetSpacing())
    affine[:dims, 3] = image.GetOrigin()
    return np.diag([-scale, -scale, scale, 1.0]) @ affine


def voxels_of(image: Any) -> npt.NDArray[Any]:
    """Voxels (*S), or (*S, C), of a SimpleITK image, whose arrays have the last axis first, and channels behind."""
    voxels, dims = sitk.GetArrayFromImage(image), image.GetDimension()
    return np.asarray(voxels.transpose([*range(dims)[::-1], *range(dims, voxels.ndim)]))


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """SimpleITK's errors as a `VolumeError` of a file, with the last of their many lines."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise VolumeError(f"{path.name}: SimpleITK cannot read it ({reason}); export it again.") from error


def read_itk(path: Path) -> Any:
    """SimpleITK's image of a file; a fourth axis of one element goes, and `itk_affine` knows the unit of an NRRD file.

    Raises:
        VolumeError: SimpleITK cannot read it, it holds complex numbers, or its unit is not known.
    """
    with named_errors(path):
        image = sitk.ReadImage(str(path))
    if image.GetPixelID() in (sitk.sitkComplexFloat32, sitk.sitkComplexFloat64):
        raise VolumeError(f"{path.name}: holds complex numbers; save their magnitude, or the part that is meant.")
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        notes = {key: image.GetMetaData(key) for key in image.GetMetaDataKeys() if key.startswith("NRRD_space")}
        image = sitk.Extract(image, [*image.GetSize()[:3], 0], [0] * 4)
        for key, value in notes.items():
            image.SetMetaData(key, value)
    if path.name.lower().endswith(NRRD_ENDINGS):
        image.SetMetaData(MM_KEY, str(_nrrd_mm(path)))
    return image


def _nrrd_mm(path: Path) -> float:
    """Millimetres of the unit that the text header of an NRRD file names; ITK does not look at it."""
    with path.open("rb") as file:
        header = file.read(1 << 16).split(b"\n\n")[0].replace(b"\r", b"").decode("latin-1")
    told = re.search(r"^space units:(.*)$", header, re.M)
    units = {unit.strip().lower() for unit in re.findall(r'"([^"]*)"', told[1])} - {"", "???"} if told else set()
    if len(units) > 1 or not units <= {*UNITS_MM}:
        raise VolumeError(f"{path.name}: has the space units {sorted(units)}; expected one of {', '.join(UNITS_MM)}.")
    return UNITS_MM[units.pop()] if units else 1.0


class ItkFileReader(ImageReader):
    """Reader of MONAI's kind for .nrrd, .nhdr, .mha and .mhd; nothing of the header but the geometry is kept.

    Raises:
        VolumeError: see `read_itk`; channels on several grids.
    """

    def verify_suffix(self, filename: Sequence[Any] | Any) -> bool:
        """Whether the names end like such files."""
        return all(str(name).lower().endswith(ITK_ENDINGS) for name in ensure_tuple(filename))

    def read(self, data: Sequence[Any] | Any, **kwargs: Any) -> Any:
        """Read one file, or a list of files that become channels: voxels, affine and the rest of each."""
        paths = [Path(name) for name in ensure_tuple(data)]
        found = [self._volume(path) for path in paths]
        require_one_grid(
            [(path.name, voxels.shape, affine) for path, (voxels, affine, *_) in zip(paths, found, strict=True)]
        )
        return found

    def get_data(self, img: Any) -> tuple[Any, dict[str, Any]]:
        """Voxels with the axes as in the file, channels last, and the geometry."""
        shared: dict[str, Any] = {}
        for voxels, affine, dims, notes in img:
            _copy_compatible_dict(
                {
                    "affine": affine,
                    "original_affine": affine.copy(),
                    "spatial_shape": np.asarray(voxels.shape[:dims]),
                    "space": "RAS",
                    "original_channel_dim": -1 if voxels.ndim > dims else float("nan"),
                    "geometry_notes": notes,
                    "forms_differ": False,
                },
                shared,
            )
        return _stack_images([voxels for voxels, *_ in img], shared), shared

    def _volume(self, path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64], int, str]:
        """Voxels (*S) or (*S, C), affine, the number of spatial axes, and what the header leaves open."""
        image = read_itk(path)
        unplaced = path.name.lower().endswith(NRRD_ENDINGS) and not image.HasMetaDataKey("NRRD_space")
        notes = "its header names no space: which side is left is not known" if unplaced else ""
        return voxels_of(image), itk_affine(image), image.GetDimension(), notes
