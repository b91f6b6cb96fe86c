"""DenseCRFd: the function, with millimetres from the affine, and files named."""

import pytest
import torch
from monai.data import MetaTensor

from medconstraints.crf import dense_crf
from medconstraints.transforms import DenseCRFd


@pytest.mark.parametrize(
    ("affine", "spacing"), [(None, None), (torch.diag(torch.tensor([2.0, 1.0, 0.5, 1.0])), (2.0, 1.0, 0.5))]
)
def test_as_the_function(affine, spacing):
    probabilities, image = torch.rand(2, 6, 7, 8).softmax(0), torch.rand(1, 6, 7, 8)
    given = image if affine is None else MetaTensor(image, affine=affine)
    item = {"pred": probabilities, "image": given}
    found = DenseCRFd("pred", sigma=4.0, iterations=2)(item)
    expected = dense_crf(probabilities[None], image[None], sigma=4.0, iterations=2, spacing_mm=spacing)[0]
    torch.testing.assert_close(found["pred"], expected)
    assert item["pred"] is probabilities


def test_logits_are_refused_and_the_file_is_named():
    image = MetaTensor(torch.rand(1, 6, 6, 6), meta={"filename_or_obj": "scans/a.nii.gz"})
    with pytest.raises(ValueError, match=r"a\.nii\.gz: expected probabilities"):
        DenseCRFd("pred")({"pred": 5 * torch.randn(2, 6, 6, 6), "image": image})
    with pytest.raises(ValueError, match=r"a\.nii\.gz: image: expected the shape"):
        DenseCRFd("pred")({"pred": torch.rand(2, 6, 6, 5).softmax(0), "image": image})
    for pred in (torch.rand(1, 6, 6, 6), torch.full((2, 6, 6, 6), 0.9)):
        with pytest.raises(ValueError, match=r"a\.nii\.gz: expected probabilities of two classes or more that sum"):
            DenseCRFd("pred")({"pred": pred, "image": image})
