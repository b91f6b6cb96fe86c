"""A DICOM series is whole, even and alone, or refused with the files that are at fault."""

import shutil

import numpy as np
import pytest
import SimpleITK as sitk

from medconstraints.transforms import LoadVolumed, VolumeError
from medconstraints.volumes import read_series

SHAPE = (6, 5, 8)
TURN = np.array([[1.0, 0.0, 0.0], [0.0, 0.8, -0.6], [0.0, 0.6, 0.8]])  # columns: along a row, down, through the stack
SPACING, ORIGIN = np.array([0.7, 0.9, 6.5]), np.array([10.0, -20.0, 30.0])


@pytest.fixture
def voxels(rng):
    return rng.integers(0, 1000, SHAPE).astype(np.int16)


def write_slice(path, plane, position, *, uid="1.2.3", number=1, axes=TURN, spacing=SPACING):
    image = sitk.GetImageFromArray(plane.T[None])
    image.SetSpacing([*spacing[:2], 1.0])
    tags = {
        "0008|0060": "MR",
        "0010|0010": "Secret^Name",
        "0020|000d": "1.2",
        "0020|000e": uid,
        "0020|0013": str(number),
        "0020|0032": "\\".join(f"{value:.6f}" for value in position),
        "0020|0037": "\\".join(f"{value:.6f}" for value in axes[:, :2].T.ravel()),
        "0028|0030": f"{spacing[1]}\\{spacing[0]}",
    }
    for tag, value in tags.items():
        image.SetMetaData(tag, value)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetFileName(str(path))
    writer.Execute(image)


def write_series(folder, voxels, *, lean=(0.0, 0.0, 0.0), **options):
    folder.mkdir(exist_ok=True)
    start = len(list(folder.iterdir()))
    for k in range(voxels.shape[2]):
        position = ORIGIN + k * (SPACING[2] * TURN[:, 2] + np.asarray(lean))
        # names in another order than places
        write_slice(folder / f"{start + (k * 5) % 8:03d}.dcm", voxels[..., k], position, number=k + 1, **options)
    return folder


def test_voxels_and_affine_are_those_of_the_slices(tmp_path, voxels):
    found, affine = read_series(write_series(tmp_path / "series", voxels))
    np.testing.assert_array_equal(found, voxels)
    expected = np.eye(4)
    expected[:3, :3], expected[:3, 3] = TURN * SPACING, ORIGIN
    np.testing.assert_allclose(affine, np.diag([-1, -1, 1, 1]) @ expected, atol=1e-5)
    read = LoadVolumed("image")({"image": str(tmp_path / "series")})["image"]
    np.testing.assert_array_equal(read[0], voxels)
    np.testing.assert_allclose(read.affine, affine)
    assert "Secret" not in str(read.meta)


def without(folder, *names):
    for name in names:
        (folder / f"{name:03d}.dcm").unlink()


def truncate(folder):
    path = folder / "003.dcm"
    path.write_bytes(path.read_bytes()[:-20])


FAULTS = {
    "missing": (
        lambda folder, _: without(folder, 2, 7),
        r"slices are missing, or .*: 6.500 mm apart, but ",
    ),
    "truncated": (lambda folder, _: truncate(folder), r"1 of 8 DICOM files are truncated or damaged: 003.dcm"),
    "twice": (
        lambda folder, _: shutil.copy(folder / "003.dcm", folder / "again.dcm"),
        r"1 slices are at the place of another one: .*(003.dcm and again|again.dcm and 003)",
    ),
    "two series": (
        lambda folder, voxels: write_series(folder, voxels, uid="1.2.4"),
        r"holds 2 series: 1.2.3 \(8 files, such as .*1.2.4 \(8 files",
    ),
    "another size": (
        lambda folder, voxels: write_slice(folder / "x.dcm", voxels[:4, :4, 0], ORIGIN - 6.5 * TURN[:, 2], number=9),
        "1 of 9 slices have another size .*: x.dcm",
    ),
    "another orientation": (
        lambda folder, voxels: write_slice(
            folder / "x.dcm", voxels[..., 0], ORIGIN + 60 * TURN[:, 2], number=9, axes=np.eye(3)
        ),
        "1 of 9 slices have another orientation .*: x.dcm",
    ),
}


@pytest.mark.parametrize(("damage", "reason"), FAULTS.values(), ids=FAULTS)
def test_faults_name_the_files(tmp_path, voxels, damage, reason):
    folder = write_series(tmp_path / "series", voxels)
    damage(folder, voxels)
    with pytest.raises(VolumeError, match=f"^series: {reason}"):
        LoadVolumed("image")({"image": str(folder)})


def test_a_leaning_stack_is_refused_with_its_angle(tmp_path, voxels):
    folder = write_series(tmp_path / "series", voxels, lean=np.tan(np.radians(12)) * 6.5 * TURN[:, 1])
    with pytest.raises(VolumeError, match=r"shifted against each other by 12.0 degrees \(gantry tilt\)"):
        read_series(folder)


def test_a_series_can_be_named(tmp_path, voxels):
    folder = write_series(tmp_path / "series", voxels)
    write_series(folder, voxels + 1, uid="1.2.4")
    np.testing.assert_array_equal(LoadVolumed("image", series="1.2.4")({"image": str(folder)})["image"][0], voxels + 1)
    with pytest.raises(VolumeError, match=r"has no series 9; it has 1.2.3, 1.2.4"):
        read_series(folder, "9")


def test_a_folder_without_slices(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(VolumeError, match="is a folder without DICOM files"):
        read_series(tmp_path)


def test_a_real_series_is_what_simpleitk_reads(data_root):
    folder = data_root / "dicom_brain" / "T1post"
    voxels, affine = read_series(folder)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    expected = reader.Execute()
    np.testing.assert_array_equal(voxels, sitk.GetArrayFromImage(expected).transpose(2, 1, 0))
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), expected.GetSpacing(), rtol=1e-4)
    np.testing.assert_allclose(affine[:3, 3] * [-1, -1, 1], expected.GetOrigin(), atol=1e-3)
