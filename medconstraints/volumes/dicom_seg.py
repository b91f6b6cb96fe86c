"""A mask as DICOM Segmentation, for the archive that its series came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medconstraints.version import __version__
from medconstraints.volumes.dicom import files_of
from medconstraints.volumes.errors import VolumeError
from medconstraints.writing import write_whole

__all__ = ["dicom_seg_path", "require_highdicom", "save_dicom_seg"]


# What a file must have and may leave empty (type 2): studies without names often lack them.
MAY_BE_EMPTY = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"),
    *("AccessionNumber", "ReferringPhysicianName", "SliceThickness"),
)


def dicom_seg_path(mask: Path) -> Path:
    """Where the DICOM Segmentation of a mask stands: beside it.

    Example:
        >>> dicom_seg_path(Path("masks/knee_seg.nii.gz")).name
        'knee_seg.dcm'
    """
    return mask.with_name(f"{mask.name.removesuffix('.nii.gz')}.dcm")


def require_highdicom() -> Any:
    """The library highdicom.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import highdicom
    except ImportError:  # not the cause: of a command's error the innermost is told
        raise ImportError("dicom_seg: needs highdicom; run `pip install medconstraints[dicom]`.") from None
    return highdicom


def save_dicom_seg(
    mask: npt.NDArray[Any],
    image: str | Path,
    path: str | Path,
    *,
    affine: Any,
    classes: Mapping[int, str],
    series: str | None = None,
) -> Path:
    """Write a mask as DICOM Segmentation: a binary segment for each class, which refers to the slices of the series.

    The patient and the study are those of the series, names and dates included: an archive needs them.

    Args:
        mask: class numbers (X, Y, Z) on the voxels of the series, as `read_series` gives them.
        image: folder of the series, or one file.
        path: file to write.
        affine: voxel index to RAS mm, (4, 4).
        classes: class number -> its name.
        series: series instance UID, of folders of several.

    Raises:
        ImportError: highdicom is not installed.
        VolumeError: the series lacks what a segmentation must say of its patient, study or place.
        OSError: the disk is full, or the folder cannot be written to.
    """
    highdicom, image, path = require_highdicom(), Path(image), Path(path)
    from pydicom import dcmread
    from pydicom.sr.codedict import codes

    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="medconstraints", version=__version__, family=codes.DCM.ArtificialIntelligence
    )
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=codes.SCT.Organ,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, name in enumerate(classes.values(), start=1)
    ]
    numbers = np.zeros(256, np.uint8)
    numbers[list(classes)] = range(1, len(classes) + 1)
    try:
        slices = [dcmread(file, stop_before_pixels=True) for file in files_of(image, series)]
        for one in slices:
            for name in MAY_BE_EMPTY:
                one.setdefault(name, None)
        frames = [frame for one in slices for frame in one.get("PerFrameFunctionalGroupsSequence", ())]
        placed = [frame.PlanePositionSequence[0] for frame in frames] or slices
        places = np.array([[float(value) for value in one.ImagePositionPatient] for one in placed]) * [-1, -1, 1]
        matrix = np.asarray(affine, dtype=np.float64)
        planes = np.linalg.solve(matrix[:3, :3], (places - matrix[:3, 3]).T)[2].round().astype(int)
        content = highdicom.seg.Segmentation(
            source_images=slices,
            pixel_array=numbers[mask[..., planes].astype(np.uint8)].transpose(2, 1, 0),  # planes, rows, columns
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=segments,
            series_instance_uid=highdicom.UID(),
            series_number=900,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="medconstraints",
            manufacturer_model_name="medconstraints",
            software_versions=__version__,
            device_serial_number="0",
        )
        # highdicom copies them from the series, where they need not be the distance of the slices.
        [measures] = content.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
        measures.SliceThickness = measures.SpacingBetweenSlices = f"{np.linalg.norm(matrix[:3, 2]):.6g}"
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise VolumeError(f"{image.name}: cannot be written as DICOM Segmentation ({error}).") from error
    return write_whole(path, content.save_as)
