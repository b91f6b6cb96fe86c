"""Class by class is the same as all classes at once."""

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Activationsd, AsDiscreted, Compose, Invertd, SpatialPadd

from medconstraints.transforms import InvertedClassesd, reading_transforms

AFFINES = {
    "mirrored": np.diag([-1.5, 2.0, -1.2, 1.0]),
    "turned": np.array([[0, 0, 1.2, 5], [-1.5, 0, 0, -3], [0, 2.0, 0, 1], [0, 0, 0, 1]]),
    "oblique": np.array([[1.4, -0.5, 0, 5], [0.5, 1.4, 0, -3], [0, 0, 1.2, 1], [0, 0, 0, 1]]),
}


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
@pytest.mark.parametrize("spacing_mm", [None, [1.0, 1.0, 1.0], [2.5, 0.7, -1]])
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("slab", [1, 1 << 23])
def test_as_monai_with_all_classes_at_once(tmp_path, rng, classes, spacing_mm, affine, slab, monkeypatch):
    monkeypatch.setattr("medconstraints.transforms.inverted_classes.SLAB_VALUES", slab)
    nib.save(nib.Nifti1Image(rng.random((9, 8, 10)).astype(np.float32), affine), tmp_path / "a.nii.gz")
    chain = Compose(reading_transforms(num_classes=classes, label_key=None, spacing_mm=spacing_mm))
    item = chain({"image": str(tmp_path / "a.nii.gz")})
    logits = torch.randn(classes, *item["image"].shape[1:])
    given = {"image": item["image"], "pred": item["image"].expand(classes, -1, -1, -1) * 0 + logits}
    probabilities = Activationsd("pred", softmax=True)(given)
    invert = Invertd("pred", transform=chain, orig_keys="image", nearest_interp=False, to_tensor=True)
    everything = invert(dict(probabilities))
    expected = AsDiscreted("pred", argmax=True)(dict(everything))["pred"]
    for other in {"_class_by_class", "_in_slabs", "_only_turned"} - {"_in_slabs" if spacing_mm else "_only_turned"}:
        monkeypatch.setattr(InvertedClassesd, other, lambda *_: pytest.fail("not the way that was meant"))
    found = InvertedClassesd("pred", preprocessing=chain)(probabilities)
    from_logits = InvertedClassesd("pred", preprocessing=chain, softmax=True)(given)
    torch.testing.assert_close(from_logits["pred"], found["pred"], rtol=0, atol=0)
    assert from_logits["confidence"] == pytest.approx(found["confidence"], abs=1e-3)
    if spacing_mm is None:
        assert torch.equal(found["pred"].as_tensor().float(), expected.as_tensor().float())
    else:  # but for rounding, where two classes are equally probable
        top = everything["pred"].as_tensor().sort(0, descending=True).values
        clear = (top[0] - top[1])[None] > 1e-4
        assert clear.float().mean() > 0.99
        assert torch.equal(found["pred"].as_tensor().float()[clear], expected.as_tensor().float()[clear])
    np.testing.assert_allclose(found["pred"].affine, affine, atol=1e-6)
    assert found["pred"].meta["filename_or_obj"] == str(tmp_path / "a.nii.gz")
    highest = everything["pred"].as_tensor().max(0).values
    assert found["confidence"] == pytest.approx(float(highest[expected[0] > 0].mean()), abs=1e-3)


def test_a_chain_that_pads_is_inverted_class_by_class(tmp_path, rng):
    nib.save(nib.Nifti1Image(rng.random((9, 8, 10)), AFFINES["turned"]), tmp_path / "a.nii.gz")
    chain = Compose([*reading_transforms(num_classes=3, label_key=None), SpatialPadd("image", (16, 16, 16))])
    item = chain({"image": str(tmp_path / "a.nii.gz")})
    logits = torch.randn(3, 16, 16, 16)
    given = {"image": item["image"], "pred": item["image"].expand(3, -1, -1, -1) * 0 + logits}
    invert = Invertd("pred", transform=chain, orig_keys="image", nearest_interp=False, to_tensor=True)
    expected = invert({**given, "pred": given["pred"].softmax(0)})["pred"].argmax(0, keepdim=True)
    found = InvertedClassesd("pred", preprocessing=chain, softmax=True)(given)["pred"]
    assert torch.equal(found.as_tensor(), expected.as_tensor().byte()) and found.shape == (1, 9, 8, 10)


def test_of_equal_probabilities_the_lower_class_and_no_confidence_of_nothing(tmp_path):
    nib.save(nib.Nifti1Image(np.arange(27.0).reshape(3, 3, 3), np.eye(4)), tmp_path / "a.nii")
    chain = Compose(reading_transforms(num_classes=2, label_key=None))
    item = chain({"image": str(tmp_path / "a.nii")})
    item["pred"] = item["image"].expand(2, -1, -1, -1) * 0 + 0.5
    found = InvertedClassesd("pred", preprocessing=chain)(item)
    assert not found["pred"].any() and "confidence" not in found
