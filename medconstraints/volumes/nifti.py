"""NIfTI files: voxel to RAS in millimetres whatever the unit, and a word on headers that do not say one thing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from monai.data.image_reader import NibabelReader, is_supported_format
from monai.utils import ensure_tuple
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from medconstraints import checks
from medconstraints.volumes.errors import VolumeError
from medconstraints.volumes.grids import require_one_grid

__all__ = ["FORMS", "NiftiReader", "affine_mm", "geometry_notes", "load_nifti"]

logger = logging.getLogger(__name__)

FORMS = ("best", "sform", "qform")
MM = {"mm": 1.0, "unknown": 1.0, "meter": 1e3, "micron": 1e-3}
AGREEMENT_VOXELS = 0.25  # by which corners may differ between the two forms: one is of float32 quaternions
SUFFIXES = ("nii", "nii.gz", "img", "hdr")


def _lenient(kind: type[Any]) -> type[Any]:
    """The same class, for quaternions a hair longer than one, which other readers take; nibabel normalises them."""
    header = type(kind.header_class.__name__, (kind.header_class,), {"quaternion_threshold": 1e-4})
    return type(kind.__name__, (kind,), {"header_class": header})


_KINDS = [_lenient(kind) for kind in (nib.Nifti1Image, nib.Nifti1Pair, nib.Nifti2Image, nib.Nifti2Pair)]


def load_nifti(path: str | PathLike[str]) -> Any:
    """Nibabel's image of a NIfTI-1 or NIfTI-2 file, or of an .img/.hdr pair; voxels are read when they are asked for.

    Raises:
        VolumeError: no NIfTI file, or its header places the voxels nowhere: zeros, NaN, or axes in one plane.
    """
    path = Path(path)
    found, sniff = None, None
    try:
        for kind in _KINDS:
            fits, sniff = kind.path_maybe_image(str(path), sniff)
            if fits:
                found = kind.from_filename(str(path))
                break
    except (HeaderDataError, ImageFileError, ValueError, EOFError) as error:
        raise VolumeError(f"{path.name}: its NIfTI header is damaged ({_line(error)}); export it again.") from error
    if found is None:
        raise VolumeError(f"{path.name}: is not a NIfTI file, or its header is damaged; export it again.")
    affine = np.asarray(found.affine)
    scale = np.prod(voxel_sizes(affine))
    if not np.isfinite(affine).all() or not scale or abs(np.linalg.det(affine[:3, :3])) <= 1e-6 * scale:
        form = "sform" if found.header["sform_code"] > 0 else "qform or pixdim"
        raise VolumeError(
            f"{path.name}: its {form} gives no place to the voxels (zeros, NaN, or axes in one plane: "
            f"{affine[:3].round(4).tolist()}); write the header again."
        )
    return found


def affine_mm(image: Any, form: str = "best") -> npt.NDArray[np.float64]:
    """Voxel index to RAS in millimetres, (4, 4), of nibabel's NIfTI image.

    Args:
        image: see `load_nifti`.
        form: "sform" or "qform", for headers that have both; "best", and where the form has no code, is the sform where
            it has one, else the qform, else the voxel sizes.

    Raises:
        ValueError: the form is unknown.
    """
    checks.choice("form", form, FORMS)
    affine = None if form == "best" else getattr(image.header, f"get_{form}")(coded=True)[0]
    affine = image.affine if affine is None else affine
    unit = _unit(image.header)
    if unit == "unknown":
        _say_once("%s: its header names no unit; millimetres are taken, for it and all others like it", _name(image))
    scale = MM[unit]
    return np.diag([scale, scale, scale, 1.0]) @ np.asarray(affine, dtype=np.float64)


def geometry_notes(image: Any) -> dict[str, str]:
    """What a header leaves open, by kind; empty for one that says one thing.

    Kinds: "forms" where sform and qform place a corner of the volume more than a quarter of a voxel apart, so that
    tools disagree on where the voxels are; "orientation" where neither has a code.
    """
    header, notes = image.header, {}
    sform, qform = (getattr(header, f"get_{form}")(coded=True)[0] for form in ("sform", "qform"))
    if sform is None and qform is None:
        notes["orientation"] = "its header has neither sform nor qform: which side is left is not known"
    if sform is not None and qform is not None:
        shape = [*image.shape[:3], 1, 1][:3]
        corners = np.array([[*place, 1.0] for place in np.ndindex(2, 2, 2)]) * [
            *[max(size - 1, 1) for size in shape],
            1,
        ]
        apart = np.linalg.norm(corners @ (sform - qform).T, axis=1).max()
        if not apart <= AGREEMENT_VOXELS * voxel_sizes(sform).min():
            scale = MM[_unit(header)]
            origins = [np.round(scale * form[:3, 3], 3).tolist() for form in (sform, qform)]
            notes["forms"] = (
                f"its sform (origin {origins[0]} mm) and qform (origin {origins[1]} mm) place voxels up to "
                f"{scale * apart:.4g} mm apart; the sform is taken, other tools may take the qform"
            )
    return notes


class NiftiReader(NibabelReader):
    """MONAI's `NibabelReader` with affines in millimetres, for .img/.hdr pairs and endings in capitals too.

    The meta data get "geometry_notes", the lines of `geometry_notes` as one text, empty for most; and "forms_differ",
    whether "forms" is among them. Axes of one element behind the third do not count.

    Args:
        form: see `affine_mm`.
        options: of `NibabelReader`.

    Raises:
        VolumeError: see `load_nifti`; complex numbers and colours, which are no intensities; channels on several grids.
    """

    def __init__(self, form: str = "best", **options: Any) -> None:
        super().__init__(**options)
        self.form = checks.choice("form", form, FORMS)

    def verify_suffix(self, filename: Sequence[Any] | Any) -> bool:
        """Whether the names end like NIfTI files."""
        return is_supported_format([str(name).lower() for name in ensure_tuple(filename)], SUFFIXES)

    def read(self, data: Sequence[Any] | Any, **kwargs: Any) -> Any:
        """Open one file, or a list of files that become channels."""
        self.filenames = ensure_tuple(data)
        images = [_with_intensities(load_nifti(name)) for name in self.filenames]
        require_one_grid([(_name(image), image.shape, self._get_affine(image)) for image in images])
        return images if len(images) > 1 else images[0]

    def _get_meta_dict(self, img: Any) -> dict[str, Any]:
        notes = geometry_notes(img)
        if self.form != "best":
            notes.pop("forms", None)
        told = {"geometry_notes": "; ".join(notes.values()), "forms_differ": "forms" in notes}
        return {**super()._get_meta_dict(img), **told}

    def _get_affine(self, img: Any) -> npt.NDArray[np.float64]:
        return affine_mm(img, self.form)

    def _get_array_data(self, img: Any, filename: Any) -> Any:
        voxels = super()._get_array_data(img, filename)
        while voxels.ndim > 3 and voxels.shape[-1] == 1:
            voxels = voxels[..., 0]
        return voxels


def _unit(header: Any) -> str:
    """Name of the unit; a code that stands for none is as none."""
    try:
        return str(header.get_xyzt_units()[0])
    except KeyError:
        return "unknown"


def _say_once(text: str, name: str, said: set[str] = set()) -> None:  # noqa: B006, that is what it is for
    if text not in said:
        said.add(text)
        logger.info(text, name)


def _with_intensities(image: Any) -> Any:
    kind = image.get_data_dtype()
    if kind.kind == "c":
        raise VolumeError(f"{_name(image)}: holds complex numbers; save their magnitude, or the part that is meant.")
    if kind.names:
        raise VolumeError(f"{_name(image)}: holds colours ({'+'.join(kind.names)}), not intensities; save one channel.")
    return image


def _name(image: Any) -> str:
    return Path(image.get_filename() or "image").name


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(" .")
