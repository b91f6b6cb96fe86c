"""NRRD and MetaImage files have the voxels and the place that the NIfTI file of the same image has."""

import numpy as np
import pytest
import SimpleITK as sitk

from medconstraints.transforms import LoadVolumed, VolumeError
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
