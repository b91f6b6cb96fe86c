import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose

from medconstraints.boxes import label_to_boxes
from medconstraints.transforms import BoxesToGridd, LabelToBoxesd, RandCropToBoxd


def item(shape: tuple[int, ...] = (40, 30, 20)) -> dict:
    label = torch.zeros(1, *shape)
    label[0, 3:6, 20:25, 10:14] = 1
    affine = torch.diag(torch.tensor([-1.0, 2.0, 3.0, 1.0], dtype=torch.float64))
    image = MetaTensor(torch.arange(label.numel(), dtype=torch.float32).reshape(label.shape), affine=affine)
    return {"image": image, "label": MetaTensor(label, affine=affine)}


def chain(prob: float, roi: tuple[int, ...] = (12, 12, 12)) -> Compose:
    steps = [LabelToBoxesd(), RandCropToBoxd(["image", "label"], roi, prob=prob), BoxesToGridd()]
    return Compose(steps).set_random_state(0)


def test_patches_hold_the_box_and_it_moves_with_them() -> None:
    crop = chain(1.0)
    places = set()
    for _ in range(40):
        out = crop(item())
        assert out["image"].shape == out["label"].shape == (1, 12, 12, 12)
        assert out["label"].sum() > 0
        assert len(out["boxes"]) == 1
        row = out["boxes"][0]
        inside = torch.cat([row[:1], row[1:4].clamp(min=0), row[4:].clamp(max=12)])
        assert inside.tolist() == label_to_boxes(out["label"][0])[0].tolist()
        places.add(tuple(row[1:4].tolist()))
    assert len(places) > 10, "the object should fall on different places of the patch"


def test_without_the_probability_patches_lie_anywhere() -> None:
    crop = chain(0.0)
    found = [float(crop(item())["label"].sum()) > 0 for _ in range(60)]
    assert 0 < np.mean(found) < 0.6


def test_short_axes_and_empty_labels() -> None:
    out = chain(1.0, (12, 64, 12))(item())
    assert out["image"].shape == (1, 12, 30, 12)
    empty = item()
    empty["label"] = empty["label"] * 0
    out = chain(1.0)(empty)
    assert out["boxes"].shape == (0, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"prob": 1.5}, r"prob: expected a number in \[0, 1\]"), ({"roi_size": (0, 4, 4)}, "roi_size: expected positive")],
)
def test_refuses_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandCropToBoxd(**{"keys": "image", "roi_size": (4, 4, 4), **arguments})


def test_refuses_a_patch_of_other_dimension() -> None:
    with pytest.raises(ValueError, match="roi_size: expected 3 values"):
        RandCropToBoxd("image", (4, 4))(LabelToBoxesd()(item()))
