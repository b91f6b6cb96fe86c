"""A DICOM series is whole, even and alone, or refused with the files that are at fault."""

import locale
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


def write_slice(path, plane, position, *, uid="1.2.3", number=1, axes=TURN, spacing=SPACING, **more):
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
        "0018|0050": "5.0",
        **{tag.replace("_", "|"): value for tag, value in more.items()},
    }
    for tag, value in tags.items():
        image.SetMetaData(tag, value)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetFileName(str(path))
    before = locale.setlocale(locale.LC_ALL)
    writer.Execute(image)
    locale.setlocale(locale.LC_ALL, before)  # writing DICOM sets it to C, and what is opened later is ASCII


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


def test_one_slice_has_the_thickness_that_it_names(tmp_path, voxels):
    folder = tmp_path / "series"
    folder.mkdir()
    write_slice(folder / "a.dcm", voxels[..., 0], ORIGIN)
    for path in (folder, folder / "a.dcm"):
        read = LoadVolumed("image")({"image": str(path)})["image"]
        np.testing.assert_array_equal(read[0], voxels[..., :1])
        np.testing.assert_allclose(np.linalg.norm(read.affine[:3, :3], axis=0), [0.7, 0.9, 5.0], rtol=1e-5)
        np.testing.assert_allclose(read.affine[:3, 3] * np.array([-1, -1, 1]), ORIGIN, atol=1e-5)


@pytest.mark.parametrize(
    ("tag", "other", "reason"),
    [
        (b"\x20\x00\x32\x00", b"\x20\x00\x33\x00", r"has no place in the scanner \(tag 0020\|0032\)"),
        (b"\x28\x00\x30\x00", b"\x28\x00\x35\x00", r"has no place in the scanner \(tag 0028\|0030\)"),
        (b"MONOCHROME2", b"MONOCHROME1", "stores what is dark as large numbers"),
        (b"\x18\x00\x50\x00", b"\x18\x00\x53\x00", "is one slice without a thickness"),
    ],
)
def test_one_file_is_no_less_checked_than_many(tmp_path, voxels, tag, other, reason):
    """What the writer would put there by itself is taken out of the bytes."""
    path = tmp_path / "series" / "a.dcm"
    path.parent.mkdir()
    write_slice(path, voxels[..., 0], ORIGIN)
    assert path.read_bytes().count(tag) == 1
    path.write_bytes(path.read_bytes().replace(tag, other))
    for place in (path.parent, path):
        with pytest.raises(VolumeError, match=reason):
            LoadVolumed("image")({"image": str(place)})


def test_frames_without_places_are_refused(tmp_path, voxels):
    image = sitk.GetImageFromArray(np.abs(voxels).astype(np.uint8).transpose(2, 1, 0))
    sitk.WriteImage(image, str(tmp_path / "cine.dcm"))
    with pytest.raises(VolumeError, match=r"cine\.dcm: holds 8 frames that have no place each"):
        LoadVolumed("image")({"image": str(tmp_path / "cine.dcm")})


def test_slices_of_several_scales_keep_their_values(tmp_path):
    """The first one's values are never negative, and their type would wrap those of the others."""
    (tmp_path / "series").mkdir()
    planes = [np.arange(30).reshape(6, 5) - offset for offset in (0, 1000, 500)]
    for number, (plane, kind) in enumerate(zip(planes, [np.uint16, np.int16, np.int16], strict=True)):
        scale = {"0028_1052": "0" if number == 0 else "-1024", "0028_1053": "1"}
        place = ORIGIN + number * 6.5 * TURN[:, 2]
        write_slice(tmp_path / "series" / f"{number}.dcm", plane.astype(kind), place, number=number + 1, **scale)
    np.testing.assert_array_equal(read_series(tmp_path / "series")[0], np.stack(planes, -1))


def test_hidden_files_beside_a_series_are_none_of_it(tmp_path, voxels):
    folder = write_series(tmp_path / "series", voxels)
    (folder / "._000.dcm").write_bytes(b"a program's own")
    np.testing.assert_array_equal(read_series(folder)[0], voxels)


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
