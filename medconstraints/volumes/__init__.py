"""Files of images and labels: read in millimetres, and refused by name when they cannot be read rightly."""

from medconstraints.volumes.dicom import DicomReader, read_series
from medconstraints.volumes.errors import VolumeError
from medconstraints.volumes.facts import mask_facts
from medconstraints.volumes.itk_files import ItkFileReader
from medconstraints.volumes.masks import save_mask
from medconstraints.volumes.nifti import NiftiReader, affine_mm, geometry_notes, load_nifti

__all__ = [
    "DicomReader",
    "ItkFileReader",
    "NiftiReader",
    "VolumeError",
    "affine_mm",
    "geometry_notes",
    "load_nifti",
    "mask_facts",
    "read_series",
    "save_mask",
]
