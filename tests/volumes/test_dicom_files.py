"""Several slices in one file, and compressed ones: read as the plain series is, or refused by name."""

import numpy as np
import pytest

from medconstraints.volumes import VolumeError, read_series

from .test_dicom import write_series
from .test_dicom_seg import PATIENT

highdicom = pytest.importorskip("highdicom", reason="needs highdicom")
pydicom = pytest.importorskip("pydicom", reason="needs pydicom")


@pytest.fixture
def series(tmp_path, rng):
    return write_series(tmp_path / "series", rng.integers(0, 1000, (16, 16, 8)).astype(np.int16), **PATIENT)


def enhanced(series, order=1, **tags):
    """The series in one file of an enhanced class, frames upwards or downwards, or of another class."""
    slices = [pydicom.dcmread(file) for file in series.iterdir()]
    slices.sort(key=lambda one: order * int(one.InstanceNumber))
    for one in slices:
        one.ImageType, one.StudyID = ["ORIGINAL", "PRIMARY", "M"], "1"
        one.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    file = highdicom.legacy.LegacyConvertedEnhancedMRImage(
        slices, series_instance_uid="1.2.3.9", series_number=1, sop_instance_uid=highdicom.UID(), instance_number=1
    )
    for name, value in tags.items():
        setattr(file, name, value)
    return file


@pytest.mark.parametrize("order", [1, -1])
def test_frames_of_an_enhanced_file_are_the_slices(tmp_path, series, order):
    expected, affine = read_series(series)
    enhanced(series, order).save_as(tmp_path / "all.dcm")
    voxels, found = read_series(tmp_path / "all.dcm")
    # The frames may come the other way round, if the affine says so.
    index = np.linalg.solve(affine, found)
    flipped = index[2, 2] < 0
    np.testing.assert_array_equal(voxels, expected[..., ::-1] if flipped else expected)
    turn = np.diag([1.0, 1, -1, 1]) + np.array([[0.0] * 4] * 2 + [[0, 0, 0, 7.0]] + [[0] * 4]) if flipped else np.eye(4)
    np.testing.assert_allclose(index, turn, atol=1e-4)


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
