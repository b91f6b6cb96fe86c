"""Boxes as label maps: order, overlap, padding and what covers all."""

import pytest
import torch
from monai.data import MetaTensor

from medconstraints.transforms import FilledBoxesd, fill_boxes


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        pytest.param([], [[0, 0, 0], [0, 0, 0]], id="none"),
        pytest.param([[-1, -1, -1, -1, -1]], [[0, 0, 0], [0, 0, 0]], id="padding"),
        pytest.param([[2, 0, 0, 2, 3]], [[2, 2, 2], [2, 2, 2]], id="all of the image"),
        pytest.param([[1, 0, 0, 2, 3], [2, 0, 1, 1, 2]], [[1, 2, 1], [1, 1, 1]], id="the smaller one counts"),
        pytest.param([[2, 0, 1, 1, 2], [1, 0, 0, 2, 3]], [[1, 2, 1], [1, 1, 1]], id="in any order"),
        pytest.param([[1, -2, 2, 1, 9]], [[0, 0, 1], [0, 0, 0]], id="beyond the image"),
    ],
)
def test_filled(boxes, expected):
    rows = torch.tensor(boxes, dtype=torch.int64).reshape(-1, 5)
    assert fill_boxes(rows, (2, 3)).tolist() == expected
    item = FilledBoxesd()({"image": torch.zeros(1, 2, 3), "boxes": rows})
    assert item["filled"][0].tolist() == expected and "boxes" not in item


def test_three_axes_and_meta_data():
    image = MetaTensor(torch.zeros(1, 4, 5, 6), affine=2 * torch.eye(4))
    item = FilledBoxesd()({"image": image, "boxes": torch.tensor([[1, 1, 1, 1, 3, 3, 4]])})
    assert item["filled"].sum() == 12 and torch.equal(item["filled"].affine, image.affine)


def test_boxes_of_other_axes_name_the_file():
    image = MetaTensor(torch.zeros(1, 4, 5, 6), meta={"filename_or_obj": "x/a.nii"})
    with pytest.raises(ValueError, match=r"a\.nii: boxes: expected rows of 7 numbers"):
        FilledBoxesd()({"image": image, "boxes": torch.zeros(1, 5, dtype=torch.int64)})
