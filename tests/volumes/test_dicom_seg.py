"""A DICOM Segmentation has each voxel of the mask where the mask has it, and names its classes."""

import sys

import numpy as np
import pytest

from medconstraints.volumes import VolumeError, read_series
from medconstraints.volumes.dicom_seg import MAY_BE_EMPTY, require_highdicom, save_dicom_seg

from .test_dicom import write_series

pydicom = pytest.importorskip("pydicom", reason="needs pydicom")
highdicom = pytest.importorskip("highdicom", reason="needs highdicom")

PATIENT = {"0010|0020": "P1", "0020|0052": "1.2.9", "0008|0060": "MR", "0020|0011": "1", "0020|0010": "S"}
PATIENT |= {"0010|0030": "", "0010|0040": "", "0008|0020": "", "0008|0030": "", "0008|0050": "", "0008|0090": ""}


@pytest.fixture
def series(tmp_path, rng):
    """Files in another order than their places, an oblique stack."""
    voxels = rng.integers(0, 1000, (6, 5, 8)).astype(np.int16)
    return write_series(tmp_path / "series", voxels, **PATIENT)


def places_of(seg):
    """RAS mm of the voxels of each segment, from the file alone."""
    found = {}
    planes = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)  # one frame alone has no axis of its own
    for frame, plane in zip(seg.PerFrameFunctionalGroupsSequence, planes, strict=True):
        position = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float)
        shared = seg.SharedFunctionalGroupsSequence[0]
        named = frame if "SegmentIdentificationSequence" in frame else shared  # one segment alone is named once
        number = named.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        axes = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(2, 3)
        down, across = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
        rows, columns = np.nonzero(plane)
        places = position + columns[:, None] * across * axes[0] + rows[:, None] * down * axes[1]
        found.setdefault(int(number), []).append(places * [-1, -1, 1])
    return {number: np.concatenate(places) for number, places in found.items()}


def test_voxels_names_and_references(tmp_path, series):
    voxels, affine = read_series(series)
    mask = np.zeros(voxels.shape, np.uint8)
    mask[1:4, 2:3, 1:6], mask[5, 0, 7] = 1, 4
    stored = mask.astype(np.float32)  # as MONAI's MapLabelValued leaves it
    file = save_dicom_seg(stored, series, tmp_path / "a.dcm", affine=affine, classes={1: "knee", 4: "cyst"})
    seg = highdicom.seg.segread(file)
    assert [segment.SegmentLabel for segment in seg.SegmentSequence] == ["knee", "cyst"]
    found = places_of(seg)
    for number, value in ((1, 1), (2, 4)):
        expected = np.argwhere(mask == value) @ affine[:3, :3].T + affine[:3, 3]
        assert len(found[number]) == len(expected)
        apart = np.linalg.norm(found[number][:, None] - expected[None], axis=-1)
        assert apart.min(0).max() < 1e-3 and apart.min(1).max() < 1e-3
    # A library that reads volumes goes by the distance that the file names; the series says 1 mm.
    volume = seg.get_volume(combine_segments=True)
    np.testing.assert_allclose(volume.spacing, np.linalg.norm(affine[:3, [2, 1, 0]], axis=0), rtol=1e-5)
    assert (volume.array > 0).sum() == (mask > 0).sum()
    assert seg.StudyInstanceUID == "1.2" and seg.FrameOfReferenceUID == "1.2.9" and seg.PatientID == "P1"
    assert seg.SeriesInstanceUID != "1.2.3" and str(seg.PatientName) == "Secret^Name"
    assert not list(tmp_path.glob(".part*"))


def test_a_class_that_is_not_there_is_a_segment_without_frames(tmp_path, series):
    voxels, affine = read_series(series)
    mask = np.zeros(voxels.shape, np.uint8)
    mask[2, 2, 3] = 2
    file = save_dicom_seg(mask, series, tmp_path / "a.dcm", affine=affine, classes={1: "knee", 2: "cyst"})
    seg = highdicom.seg.segread(file)
    assert list(places_of(seg)) == [2] and len(seg.SegmentSequence) == 2
    file = save_dicom_seg(0 * mask, series, tmp_path / "b.dcm", affine=affine, classes={1: "knee"})
    assert not highdicom.seg.segread(file).pixel_array.any()


def test_a_series_without_names_and_dates(tmp_path, rng):
    folder = write_series(tmp_path / "series", rng.integers(0, 9, (6, 5, 8)).astype(np.int16), **{"0020|0052": "1.2.9"})
    for file in folder.iterdir():
        one = pydicom.dcmread(file)
        for name in MAY_BE_EMPTY:
            one.pop(name, None)
        one.save_as(file)
    voxels, affine = read_series(folder)
    file = save_dicom_seg((voxels > 4).astype(np.uint8), folder, tmp_path / "a.dcm", affine=affine, classes={1: "knee"})
    seg = highdicom.seg.segread(file)
    assert len(places_of(seg)[1]) == (voxels > 4).sum() and not seg.PatientName and not seg.StudyDate


def test_a_series_without_a_frame_of_reference_is_told(tmp_path, rng):
    folder = write_series(tmp_path / "series", rng.integers(0, 9, (6, 5, 8)).astype(np.int16))
    voxels, affine = read_series(folder)
    with pytest.raises(VolumeError, match=r"series: cannot be written as DICOM Segmentation \(.*Frame Of Reference"):
        save_dicom_seg(voxels * 0, folder, tmp_path / "a.dcm", affine=affine, classes={1: "knee"})
    assert not (tmp_path / "a.dcm").exists()


def test_without_the_library_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(ImportError, match=r"pip install medconstraints\[dicom\]"):
        require_highdicom()
