"""NRRD and MetaImage files, by SimpleITK."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from monai.data.image_reader import ImageReader, _copy_compatible_dict, _stack_images

from medconstraints.volumes.errors import VolumeError

__all__ = ["ITK_ENDINGS", "ItkFileReader", "itk_affine", "read_itk", "voxels_of"]

ITK_ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")


def itk_affine(image: Any) -> npt.NDArray[np.float64]:
    """Voxel index to RAS in millimetres, (4, 4), of a SimpleITK image of 2 or 3 axes, whose space is LPS."""
    dims = image.GetDimension()
    affine = np.eye(4)
    affine[:dims, :dims] = np.reshape(image.GetDirection(), (dims, dims)) * np.asarray(image.GetSpacing())
    affine[:dims, 3] = image.GetOrigin()
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def voxels_of(image: Any) -> npt.NDArray[Any]:
    """Voxels (*S), or (*S, C), of a SimpleITK image, whose arrays have the last axis first, and channels behind."""
    voxels, dims = sitk.GetArrayFromImage(image), image.GetDimension()
    return np.asarray(voxels.transpose([*range(dims)[::-1], *range(dims, voxels.ndim)]))


def read_itk(path: Path) -> Any:
    """SimpleITK's image of a file.

    Raises:
        VolumeError: SimpleITK cannot read it, or it holds complex numbers.
    """
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise VolumeError(f"{path.name}: SimpleITK cannot read it ({reason}); export it again.") from error
    if image.GetPixelID() in (sitk.sitkComplexFloat32, sitk.sitkComplexFloat64):
        raise VolumeError(f"{path.name}: holds complex numbers; save their magnitude, or the part that is meant.")
    return image


class ItkFileReader(ImageReader):
    """Reader of MONAI's kind for .nrrd, .nhdr, .mha and .mhd; nothing of the header but the geometry is kept.

    Raises:
        VolumeError: see `read_itk`.
    """

    def verify_suffix(self, filename: Sequence[Any] | Any) -> bool:
        """Whether the names end like such files."""
        names = filename if isinstance(filename, list | tuple) else [filename]
        return all(str(name).lower().endswith(ITK_ENDINGS) for name in names)

    def read(self, data: Sequence[Any] | Any, **kwargs: Any) -> Any:
        """Read one file, or a list of files that become channels: voxels and affine of each."""
        return [self._volume(Path(name)) for name in (data if isinstance(data, list | tuple) else (data,))]

    def get_data(self, img: Any) -> tuple[Any, dict[str, Any]]:
        """Voxels with the axes as in the file, channels last, and the geometry."""
        shared: dict[str, Any] = {}
        for voxels, affine, dims in img:
            _copy_compatible_dict(
                {
                    "affine": affine,
                    "original_affine": affine.copy(),
                    "spatial_shape": np.asarray(voxels.shape[:dims]),
                    "space": "RAS",
                    "original_channel_dim": -1 if voxels.ndim > dims else float("nan"),
                    "geometry_notes": "",
                    "forms_differ": False,
                },
                shared,
            )
        return _stack_images([voxels for voxels, _, _ in img], shared), shared

    def _volume(self, path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64], int]:
        """Voxels (*S) or (*S, C), affine, and the number of spatial axes."""
        image = read_itk(path)
        return voxels_of(image), itk_affine(image), image.GetDimension()
