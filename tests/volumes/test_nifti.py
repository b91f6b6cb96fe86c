"""A NIfTI file is read in millimetres, and what its header leaves open is said."""

import re

import nibabel as nib
import numpy as np
import pytest

from medconstraints.transforms import LoadVolumed, VolumeError
from medconstraints.volumes import affine_mm, geometry_notes, load_nifti

SHAPE = (6, 5, 4)
AFFINE = np.array([[-0.5, 0.0, 0.0, 10.0], [0.0, 0.5, 0.0, -20.0], [0.0, 0.0, 2.0, 5.0], [0.0, 0.0, 0.0, 1.0]])


@pytest.fixture
def voxels(rng):
    return rng.random(SHAPE).astype(np.float32)


def write(path, voxels, affine=AFFINE, *, kind=nib.Nifti1Image, **header):
    image = kind(voxels, affine)
    for name, value in header.items():
        image.header[name] = value
    nib.save(image, path)
    return path


def load(path, **options):
    return LoadVolumed("image", **options)({"image": str(path)})["image"]


@pytest.mark.parametrize(("unit", "scale"), [("mm", 1.0), ("micron", 1e3), ("meter", 1e-3)])
def test_every_unit_becomes_millimetres(tmp_path, voxels, unit, scale):
    image = nib.Nifti1Image(voxels, np.diag([scale, scale, scale, 1]) @ AFFINE)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii.gz")
    read = load(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(read.affine, AFFINE, rtol=1e-6)
    np.testing.assert_allclose(read.meta["original_affine"], AFFINE, rtol=1e-6)
    assert read.meta["geometry_notes"] == ""


def test_a_unit_code_that_stands_for_none_is_as_none(tmp_path, voxels):
    path = write(tmp_path / "a.nii", voxels, xyzt_units=7)
    np.testing.assert_allclose(load(path).affine, AFFINE)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.nii", nib.Nifti1Image),
        ("A.NII.GZ", nib.Nifti1Image),
        ("a.img", nib.Nifti1Pair),
        ("a.hdr", nib.Nifti1Pair),
        ("b.nii.gz", nib.Nifti2Image),
    ],
)
def test_kinds_of_files(tmp_path, voxels, name, kind):
    read = load(write(tmp_path / name, voxels, kind=kind))
    np.testing.assert_array_equal(read[0], voxels)
    np.testing.assert_allclose(read.affine, AFFINE)


CASES = {
    "agree": (AFFINE, 1, 1, {}),
    "the sform alone": (np.eye(4), 0, 2, {}),
    "the qform alone": (AFFINE, 1, 0, {}),
    "rounding": (AFFINE + np.outer([1e-6, 0, 0, 0], [0, 0, 0, 1]), 1, 1, {}),
    "shift": (AFFINE + np.outer([3, 0, 0, 0], [0, 0, 0, 1]), 1, 4, {"forms": r"origin \[13.0, .*3 mm"}),
    "scale": (AFFINE @ np.diag([1, 1, 1.2, 1]), 2, 1, {"forms": "1.2 mm apart"}),
    "mirror": (AFFINE @ np.diag([-1, 1, 1, 1]), 1, 1, {"forms": "5 mm apart"}),
    "neither": (AFFINE, 0, 0, {"orientation": "neither"}),
}


@pytest.mark.parametrize(("qform", "qcode", "scode", "expected"), CASES.values(), ids=CASES)
def test_what_a_header_leaves_open(tmp_path, voxels, qform, qcode, scode, expected, caplog):
    image = nib.Nifti1Image(voxels, AFFINE)
    image.set_sform(AFFINE, scode)
    image.set_qform(qform, qcode)
    nib.save(image, tmp_path / "a.nii.gz")
    notes = geometry_notes(load_nifti(tmp_path / "a.nii.gz"))
    assert {*notes} == {*expected} and all(re.search(text, notes[kind]) for kind, text in expected.items())
    read = load(tmp_path / "a.nii.gz")
    assert read.meta["forms_differ"] == ("forms" in expected)
    logged = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert logged == [f"a.nii.gz: {text}" for text in notes.values()]


def test_a_form_can_be_chosen(tmp_path, voxels):
    image = nib.Nifti1Image(voxels, AFFINE)
    image.set_sform(AFFINE, 1)
    image.set_qform(AFFINE @ np.diag([-1, 1, 1, 1]), 1)
    nib.save(image, tmp_path / "a.nii")
    assert load(tmp_path / "a.nii", form="qform").affine[0, 0] == 0.5
    assert load(tmp_path / "a.nii", form="sform").affine[0, 0] == -0.5
    assert not load(tmp_path / "a.nii", form="qform").meta["forms_differ"]  # the user has decided
    image.set_qform(None, 0)
    nib.save(image, tmp_path / "b.nii")
    np.testing.assert_allclose(load(tmp_path / "b.nii", form="qform").affine, AFFINE)  # the only one it has


def test_a_quaternion_a_hair_too_long_is_normalised(tmp_path, voxels):
    path = write(tmp_path / "a.nii", voxels, sform_code=0, qform_code=1)
    header = bytearray(path.read_bytes())
    header[256:268] = np.array([0.0, 1.00000025, 0.0], "<f4").tobytes()
    path.write_bytes(header)
    with pytest.raises(ValueError, match="w2 should be positive"):
        nib.load(path)
    np.testing.assert_allclose(np.linalg.norm(load(path).affine[:3, :3], axis=0), [0.5, 0.5, 2.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("where", "value"),
    [(slice(280, 296), np.zeros(4, "<f4")), (slice(280, 296), np.full(4, np.nan, "<f4"))],
    ids=["zeros", "NaN"],
)
def test_headers_that_place_voxels_nowhere(tmp_path, voxels, where, value):
    path = write(tmp_path / "a.nii", voxels)
    content = bytearray(path.read_bytes())
    content[where] = value.tobytes()
    path.write_bytes(content)
    with pytest.raises(VolumeError, match=r"a.nii: its sform gives no place"):
        load(path)


def test_what_is_no_intensity_is_refused(tmp_path, voxels):
    write(tmp_path / "complex.nii", voxels.astype(np.complex64))
    colours = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    write(tmp_path / "colours.nii", colours)
    with pytest.raises(VolumeError, match=r"complex.nii: holds complex numbers"):
        load(tmp_path / "complex.nii")
    with pytest.raises(VolumeError, match=r"colours.nii: holds colours \(R\+G\+B\)"):
        load(tmp_path / "colours.nii")


def test_axes_of_one_element_do_not_count(tmp_path, voxels):
    write(tmp_path / "a.nii", voxels[..., None, None])
    assert load(tmp_path / "a.nii").shape == (1, *SHAPE)


def test_affine_of_an_unknown_form():
    with pytest.raises(ValueError, match="form: expected one of best, sform, qform, got 'pixdim'"):
        affine_mm(nib.Nifti1Image(np.zeros(SHAPE), AFFINE), "pixdim")
