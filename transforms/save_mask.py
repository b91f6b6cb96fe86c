"""Save a mask as NIfTI on the grid of the file that it belongs to."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from medconstraints.data.output_folders import NIFTI_ENDINGS, mask_path

__all__ = ["SaveMaskd", "save_mask"]

# What places voxels in the scanner. Not the rest: display range, intent and extensions are those of a picture.
_GEOMETRY = (
    *("dim_info", "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


def save_mask(mask: Any, image: str | Path, path: str | Path) -> Path:
    """Write a mask with the shape, affine, sform and qform codes and units of a NIfTI file.

    Args:
        mask: class numbers (X, Y, Z), in the voxel order of the file; 0 to 255.
        image: the file, .nii or .nii.gz. Axes of length one after the third, (X, Y, Z, 1), come back in the mask.
        path: file to write, .nii or .nii.gz. It is written under another name and renamed: a run that is killed leaves
            the former file whole.

    Raises:
        ValueError: the image is no NIfTI file, or the mask has another shape or values that do not fit uint8.
    """
    image, path = Path(image), Path(path)
    if not image.name.endswith(NIFTI_ENDINGS):
        raise ValueError(f"image: expected a .nii or .nii.gz file, whose header the mask gets, got {image.name}.")
    source: Any = nib.load(image)
    shape = source.shape
    values = np.asarray(mask)
    if values.shape != shape[:3] or any(size != 1 for size in shape[3:]):
        raise ValueError(
            f"mask: expected the shape {shape} of {image.name}, got {values.shape}; invert the preprocessing first."
        )
    voxels = values.astype(np.uint8)
    if not np.array_equal(voxels, values):
        raise ValueError(f"mask: expected class numbers 0 to 255, got {values.min()} to {values.max()}.")
    header = type(source.header)()
    for field in _GEOMETRY:
        header[field] = source.header[field]
    header.set_data_dtype(np.uint8)
    # The header's own affine, not MONAI's: with equal affines nibabel leaves the codes as they are.
    result = type(source)(voxels.reshape(shape), source.affine, header)
    beside = path.with_name(f".part_{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        nib.save(result, beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


class SaveMaskd(MapTransform):
    """Save masks as `<output_dir>/<name>_<postfix>.nii.gz`, see `save_mask`; existing files are replaced.

    Args:
        keys: masks (1, X, Y, Z) with class numbers, in the voxel order of their file, which their meta data name as
            `filename_or_obj`.
        output_dir: folder of the masks; it is made when missing.
        postfix: see above.

    Raises:
        ValueError: at the call, for a mask without file name, with several channels, or that does not fit its file.
    """

    def __init__(self, keys: KeysCollection = "pred", *, output_dir: str | Path, postfix: str = "seg") -> None:
        super().__init__(keys)
        self.output_dir = Path(output_dir)
        self.postfix = postfix

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Save, and return the item as it is."""
        for key in self.key_iterator(dict(data)):
            mask = data[key]
            file = mask.meta.get("filename_or_obj") if isinstance(mask, MetaTensor) else None
            if not file:
                raise ValueError(f"{key}: no filename_or_obj in its meta data; load the image with LoadVolumed.")
            if mask.ndim != 4 or mask.shape[0] != 1:
                raise ValueError(
                    f"{key}: expected one channel (1, X, Y, Z) with class numbers, got {tuple(mask.shape)}."
                )
            values = mask.detach().cpu().numpy()[0]
            save_mask(values, file, mask_path(self.output_dir, file, postfix=self.postfix))
        return dict(data)
