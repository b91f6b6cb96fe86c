"""Class by class is the same as all classes at once."""

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Activationsd, AsDiscreted, Compose, Invertd

from medconstraints.transforms import InvertedClassesd, reading_transforms


@pytest.mark.parametrize("spacing_mm", [None, [1.0, 1.0, 1.0]])
@pytest.mark.parametrize("classes", [2, 5])
def test_as_monai_with_all_classes_at_once(tmp_path, rng, classes, spacing_mm):
    affine = np.diag([-1.5, 2.0, -1.2, 1.0])
    nib.save(nib.Nifti1Image(rng.random((9, 8, 10)).astype(np.float32), affine), tmp_path / "a.nii.gz")
    chain = Compose(reading_transforms(num_classes=classes, label_key=None, spacing_mm=spacing_mm))
    item = chain({"image": str(tmp_path / "a.nii.gz")})
    logits = torch.randn(classes, *item["image"].shape[1:])
    given = {"image": item["image"], "pred": item["image"].expand(classes, -1, -1, -1) * 0 + logits}
    probabilities = Activationsd("pred", softmax=True)(given)
    invert = Invertd("pred", transform=chain, orig_keys="image", nearest_interp=False, to_tensor=True)
    everything = invert(dict(probabilities))
    expected = AsDiscreted("pred", argmax=True)(dict(everything))["pred"]
    found = InvertedClassesd("pred", preprocessing=chain)(probabilities)
    assert torch.equal(found["pred"].as_tensor().float(), expected.as_tensor().float())
    np.testing.assert_allclose(found["pred"].affine, affine)
    assert found["pred"].meta["filename_or_obj"] == str(tmp_path / "a.nii.gz")
    highest = everything["pred"].as_tensor().max(0).values
    assert found["confidence"] == pytest.approx(float(highest[expected[0] > 0].mean()), abs=1e-3)


def test_of_equal_probabilities_the_lower_class_and_no_confidence_of_nothing(tmp_path):
    nib.save(nib.Nifti1Image(np.arange(27.0).reshape(3, 3, 3), np.eye(4)), tmp_path / "a.nii")
    chain = Compose(reading_transforms(num_classes=2, label_key=None))
    item = chain({"image": str(tmp_path / "a.nii")})
    item["pred"] = item["image"].expand(2, -1, -1, -1) * 0 + 0.5
    found = InvertedClassesd("pred", preprocessing=chain)(item)
    assert not found["pred"].any() and "confidence" not in found
