"""NRRD and MetaImage files have the voxels and the place that the NIfTI file of the same image has."""

import numpy as np
import pytest
import SimpleITK as sitk

from medconstraints.transforms import LoadVolumed, VolumeError
from medconstraints.volumes import save_mask
from medconstraints.volumes.itk_files import ITK_ENDINGS


@pytest.fixture
def image(rng):
    image = sitk.GetImageFromArray(rng.random((4, 5, 6)).astype(np.float32))
    image.SetSpacing([0.7, 0.9, 2.5])
    image.SetOrigin([1.0, -2.0, 3.0])
    image.SetDirection([0.0, 1.0, 0.0, 0.8, 0.0, -0.6, 0.6, 0.0, 0.8])
    return image


def load(path, **options):
    return LoadVolumed("image", **options)({"image": str(path)})["image"]


@pytest.mark.parametrize("ending", ITK_ENDINGS)
def test_as_the_nifti_file(tmp_path, image, ending):
    sitk.WriteImage(image, str(tmp_path / f"a{ending}"))
    sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
    found, expected = load(tmp_path / f"a{ending}"), load(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-5)


def test_channels_only_where_they_are_asked_for(tmp_path, image):
    sitk.WriteImage(sitk.Compose(image, image + 1), str(tmp_path / "a.nrrd"))
    with pytest.raises(VolumeError, match=r"a.nrrd: is 4D \(6, 5, 4, 2\), expected 3 spatial axes"):
        load(tmp_path / "a.nrrd")
    found = load(tmp_path / "a.nrrd", allow_channels=True)
    assert found.shape == (2, 6, 5, 4)
    np.testing.assert_allclose(found[1], found[0] + 1, rtol=1e-6)


def test_files_that_cannot_be_used(tmp_path, image):
    (tmp_path / "text.mha").write_text("no image")
    with pytest.raises(VolumeError, match=r"text.mha: SimpleITK cannot read it"):
        load(tmp_path / "text.mha")
    sitk.WriteImage(sitk.RealAndImaginaryToComplex(image, image), str(tmp_path / "c.nrrd"))
    with pytest.raises(VolumeError, match=r"c\.nrrd: holds complex numbers"):
        load(tmp_path / "c.nrrd")


@pytest.mark.parametrize(("unit", "scale"), [("um", 1e-3), ("cm", 10.0), ("mm", 1.0), ("", 1.0)])
def test_units_of_nrrd_files(tmp_path, image, unit, scale):
    """ITK does not look at them."""
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    expected = load(tmp_path / "a.nrrd").affine
    head, _, voxels = (tmp_path / "a.nrrd").read_bytes().partition(b"\n\n")
    line = b"\nspace units: " + b" ".join([f'"{unit}"'.encode()] * 3)
    (tmp_path / "b.nrrd").write_bytes(head + line + b"\n\n" + voxels)
    np.testing.assert_allclose(load(tmp_path / "b.nrrd").affine[:3], expected[:3] * scale, atol=1e-9)
    (tmp_path / "c.nrrd").write_bytes(head + b'\nspace units: "ft" "ft" "ft"\n\n' + voxels)
    with pytest.raises(VolumeError, match=r"c\.nrrd: has the space units \['ft'\]; expected one of mm"):
        load(tmp_path / "c.nrrd")


def test_a_header_without_a_space_is_told(tmp_path, image):
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    head, _, voxels = (tmp_path / "a.nrrd").read_bytes().partition(b"\n\n")
    lines = [line for line in head.split(b"\n") if not line.startswith(b"space")]
    (tmp_path / "b.nrrd").write_bytes(b"\n".join([*lines, b"spacings: 0.7 0.9 2.5"]) + b"\n\n" + voxels)
    assert "which side is left is not known" in load(tmp_path / "b.nrrd").meta["geometry_notes"]
    assert load(tmp_path / "a.nrrd").meta["geometry_notes"] == ""


@pytest.mark.parametrize("ending", [".mha", ".nrrd"])
def test_a_fourth_axis_of_one_element_does_not_count(tmp_path, image, ending):
    sitk.WriteImage(sitk.JoinSeries(image), str(tmp_path / f"a{ending}"))
    sitk.WriteImage(image, str(tmp_path / "b.nii.gz"))
    found, expected = load(tmp_path / f"a{ending}"), load(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-5)
    path = save_mask(np.ones(image.GetSize(), np.uint8), tmp_path / f"a{ending}", tmp_path / f"mask{ending}")
    assert sitk.ReadImage(str(path)).GetSize() == image.GetSize()


def test_channels_on_other_grids_are_told_how_they_differ(tmp_path, image):
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    image.SetOrigin([1.0, -2.0, 4.0])
    sitk.WriteImage(image, str(tmp_path / "b.nrrd"))
    with pytest.raises(
        VolumeError, match=r"^b\.nrrd: has another affine than a\.nrrd: the origin differs by up to 1 mm"
    ):
        LoadVolumed("image")({"image": [str(tmp_path / "a.nrrd"), str(tmp_path / "b.nrrd")]})
