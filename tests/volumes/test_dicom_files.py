"""Several slices in one file, and compressed ones: read as the plain series is, or refused by name."""

import copy
import sys

import numpy as np
import pytest

from medconstraints.volumes import VolumeError, read_series
from medconstraints.volumes.dicom_seg import save_dicom_seg

from .test_dicom import ORIGIN, write_series
from .test_dicom_seg import PATIENT, places_of

highdicom = pytest.importorskip("highdicom", reason="needs highdicom")
pydicom = pytest.importorskip("pydicom", reason="needs pydicom")


@pytest.fixture
def series(tmp_path, rng):
    return write_series(tmp_path / "series", rng.integers(0, 1000, (16, 16, 8)).astype(np.int16), **PATIENT)


def enhanced(series, frames=range(8), slopes=None, **tags):
    """The series in one file of an enhanced class, or of another one, with these of its frames, in this order."""
    slices = [pydicom.dcmread(file) for file in series.iterdir()]
    for one in slices:
        one.ImageType, one.StudyID = ["ORIGINAL", "PRIMARY", "M"], "1"
        one.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    file = highdicom.legacy.LegacyConvertedEnhancedMRImage(
        slices, series_instance_uid="1.2.3.9", series_number=1, sop_instance_uid=highdicom.UID(), instance_number=1
    )
    file.PixelData, file.NumberOfFrames = file.pixel_array[list(frames)].tobytes(), len(frames)
    groups = [copy.deepcopy(file.PerFrameFunctionalGroupsSequence[number]) for number in frames]
    for group, slope in zip(groups, slopes or [], strict=bool(slopes)):
        scale = pydicom.Dataset()
        scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = slope, 10 * slope, "US"
        group.PixelValueTransformationSequence = [scale]
    if slopes:
        del file.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
    file.PerFrameFunctionalGroupsSequence = groups
    for name, value in tags.items():
        setattr(file, name, value)
    return file


ORDERS = [range(8), range(7, -1, -1), [3, 0, 7, 1, 2, 6, 5, 4]]


@pytest.mark.parametrize("order", ORDERS)
def test_frames_of_an_enhanced_file_are_the_slices(tmp_path, series, order):
    expected, affine = read_series(series)
    enhanced(series, order).save_as(tmp_path / "all.dcm")
    voxels, found = read_series(tmp_path / "all.dcm")
    np.testing.assert_array_equal(voxels, expected)
    np.testing.assert_allclose(found, affine, atol=1e-6)
    file = save_dicom_seg(expected > 500, tmp_path / "all.dcm", tmp_path / "a.dcm", affine=affine, classes={1: "knee"})
    places = np.argwhere(expected > 500) @ affine[:3, :3].T + affine[:3, 3]
    found = places_of(highdicom.seg.segread(file))[1]
    np.testing.assert_allclose(*(np.unique(one.round(3), axis=0) for one in (found, places)), atol=2e-3)


def test_frames_have_scales_of_their_own(tmp_path, series):
    expected, _ = read_series(series)
    slopes = [3, 1, 2, 1, 1, 1, 1, 0.5]
    file = enhanced(series, slopes=slopes)
    file.save_as(tmp_path / "all.dcm")
    voxels, _ = read_series(tmp_path / "all.dcm")
    first = file.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient
    slopes = np.array(slopes if np.allclose(first, ORIGIN) else slopes[::-1])
    np.testing.assert_allclose(voxels, expected * slopes + 10 * slopes)


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([0, 1, 2, 5, 6], "slices are missing, or unevenly spaced: 6.500 mm apart, but 19.500 mm between frame"),
        ([0, 1, 2, 0, 1, 2], "3 slices are at the place of another one: .*frame 1 and frame 4"),
    ],
)
def test_frames_that_are_no_even_stack_are_refused(tmp_path, series, frames, reason):
    enhanced(series, frames).save_as(tmp_path / "all.dcm")
    with pytest.raises(VolumeError, match=f"^all.dcm: {reason}"):
        read_series(tmp_path / "all.dcm")


def test_frames_without_places_or_without_pydicom_are_refused(tmp_path, series, monkeypatch):
    file = enhanced(series)
    file.save_as(tmp_path / "all.dcm")
    del file.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence
    file.save_as(tmp_path / "none.dcm")
    with pytest.raises(VolumeError, match=r"^none\.dcm: frame 3 has no place in the scanner"):
        read_series(tmp_path / "none.dcm")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(VolumeError, match=r"^all.dcm: .*pip install medconstraints\[dicom\]"):
        read_series(tmp_path / "all.dcm")


def test_frames_of_another_class_are_refused(tmp_path, series):
    file = enhanced(series)
    file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7.3"
    file.save_as(tmp_path / "capture.dcm")
    with pytest.raises(VolumeError, match=r"capture.dcm: holds 8 frames that have no place each"):
        read_series(tmp_path / "capture.dcm")


@pytest.mark.parametrize("syntax", ["RLELossless", "JPEGLSLossless"])
def test_compressed_slices_are_read_as_the_others(series, syntax):
    expected, affine = read_series(series)
    for file in series.iterdir():
        one = pydicom.dcmread(file)
        one.compress(getattr(pydicom.uid, syntax))
        one.save_as(file)
    voxels, found = read_series(series)
    np.testing.assert_array_equal(voxels, expected)
    np.testing.assert_allclose(found, affine)
