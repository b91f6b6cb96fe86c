"""Chains that the bundles share: how volumes are read and normalised."""

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import Compose

from medconstraints.transforms import reading_transforms

SHAPE = (9, 8, 7)


@pytest.fixture
def channels(tmp_path, rng):
    """Files of two channels: another scale each, and zeros around a brain in which one voxel is 0 too."""
    brain = np.zeros(SHAPE, bool)
    brain[2:7, 1:7, 1:6] = True
    brain[4, 4, 3] = False
    paths = []
    for number, (mean, sd) in enumerate([(500.0, 30.0), (-2.0, 0.1)]):
        values = np.where(brain, rng.normal(mean, sd, SHAPE), 0).astype(np.float32)
        paths.append(str(tmp_path / f"{number}.nii.gz"))
        nib.save(nib.Nifti1Image(values, np.eye(4)), paths[-1])
    return brain, paths


@pytest.mark.parametrize("nonzero", [False, True])
def test_normalisation(channels, nonzero):
    """Zero mean and unit variance, of all voxels or of those that are not 0, in each channel by itself."""
    brain, paths = channels
    image = np.asarray(Compose(reading_transforms(num_classes=2, nonzero=nonzero))({"image": paths})["image"])
    assert image.shape == (2, *SHAPE)
    assert image.dtype == np.float32
    for channel in image:
        counted = channel[brain] if nonzero else channel.ravel()
        assert counted.mean() == pytest.approx(0, abs=1e-4)
        assert counted.std() == pytest.approx(1, abs=1e-3)
        assert (channel[~brain] == 0).all() == nonzero  # what was 0 stays 0
    default = Compose(reading_transforms(num_classes=2))({"image": paths})["image"]
    assert np.array_equal(np.asarray(default), image) == (not nonzero)
