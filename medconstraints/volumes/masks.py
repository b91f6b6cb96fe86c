"""Write a mask on the grid of the file that it belongs to, in the format of that file's family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from medconstraints.volumes.files import NIFTI_ENDINGS, mask_ending
from medconstraints.volumes.itk_files import read_itk
from medconstraints.volumes.nifti import load_nifti
from medconstraints.writing import write_whole

__all__ = ["probabilities_path", "save_mask", "save_probabilities"]

# What places voxels in the scanner. Not the rest: display range, intent and extensions are those of a picture.
_GEOMETRY = (
    *("dim_info", "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


def save_mask(mask: Any, image: str | Path, path: str | Path, *, affine: Any = None) -> Path:
    """Write a mask with the shape and place of a volume; of NIfTI with its sform and qform, codes and units.

    Args:
        mask: class numbers (X, Y, Z), in the voxel order of the volume; 0 to 255.
        image: NIfTI, NRRD or MetaImage file, or DICOM file or folder. Axes of length one after the third, (X, Y, Z, 1),
            come back in the mask.
        path: file to write, with the ending that `mask_ending` tells. It is written under another name and renamed: a
            run that is killed leaves the former file whole.
        affine: voxel to RAS mm of a DICOM image, as it was read; its files are not read again. Not used for others.

    Raises:
        VolumeError: the image cannot be read.
        ValueError: the mask has another shape or values that do not fit uint8, `path` has another ending, or the affine
            of a DICOM image is missing.
        OSError: the disk is full, or the folder cannot be written to.
    """
    image, path = Path(image), Path(path)
    ending = mask_ending(image)
    if not path.name.endswith((ending, ".nii") if ending == ".nii.gz" else ending):
        raise ValueError(f"path: expected the ending {ending} for a mask of {image.name}, got {path.name}.")
    values = np.asarray(mask)
    voxels = values.astype(np.uint8)
    if not np.array_equal(voxels, values):
        raise ValueError(f"mask: expected class numbers 0 to 255, got {values.min()} to {values.max()}.")
    if image.name.lower().endswith(NIFTI_ENDINGS):
        result = _like_nifti(voxels, image)
        return write_whole(path, lambda name: nib.save(result, name))
    if ending == ".nii.gz":
        if affine is None:
            raise ValueError(f"affine: expected that of the DICOM image {image.name}, got None.")
        grid = nib.Nifti1Image(voxels, np.asarray(affine, dtype=np.float64))
        grid.header.set_xyzt_units("mm")
        return write_whole(path, lambda name: nib.save(grid, name))
    source = read_itk(image)
    _require_shape(voxels, source.GetSize(), image)
    copy = sitk.GetImageFromArray(voxels.transpose())
    copy.CopyInformation(source)
    return write_whole(path, lambda name: sitk.WriteImage(copy, str(name), useCompression=True))


def probabilities_path(mask: Path) -> Path:
    """Where the probabilities of the classes of a mask stand: beside it, as NIfTI.

    Example:
        >>> probabilities_path(Path("masks/knee_seg.nii.gz")).name
        'knee_seg_probabilities.nii.gz'
    """
    return mask.with_name(f"{mask.name.removesuffix('.nii.gz')}_probabilities.nii.gz")


def save_probabilities(shares: npt.NDArray[np.uint16], path: Path, *, affine: Any) -> Path:
    """Write the probabilities of all classes, in steps of 1/65535, which every reader of NIfTI turns into 0 to 1.

    NIfTI has no float16, and float32 takes twice the space and compresses badly. Of classes that are less than a step
    apart the mask tells which one was taken.

    Args:
        shares: (C, X, Y, Z), in the order of the network, the background first, whatever their values in the mask; the
            file has the classes along its fourth axis.
        path: file to write, see `probabilities_path`.
        affine: voxel index to RAS mm, (4, 4).

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    grid = nib.Nifti1Image(np.moveaxis(shares, 0, -1), np.asarray(affine, dtype=np.float64), dtype=np.uint16)
    grid.header.set_xyzt_units("mm")
    grid.header.set_slope_inter(1 / 65535, 0)
    return write_whole(path, lambda name: nib.save(grid, name))


def _like_nifti(voxels: np.ndarray, image: Path) -> Any:
    source = load_nifti(image)
    _require_shape(voxels, source.shape, image)
    kind = nib.Nifti2Image if source.header["sizeof_hdr"] == 540 else nib.Nifti1Image
    header = kind.header_class()
    for field in _GEOMETRY:
        header[field] = source.header[field]
    header.set_data_dtype(np.uint8)
    # The header's own affine, not MONAI's: with equal affines nibabel leaves the codes as they are.
    return kind(voxels.reshape(source.shape), source.affine, header)


def _require_shape(voxels: np.ndarray, shape: Any, image: Path) -> None:
    shape = tuple(shape)
    if voxels.shape != shape[:3] or any(size != 1 for size in shape[3:]):
        raise ValueError(
            f"mask: expected the shape {shape} of {image.name}, got {voxels.shape}; invert the preprocessing first."
        )
