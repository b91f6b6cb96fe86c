"""Fixed augmentations: images and labels move together, within the ranges."""

import numpy as np
import pytest
import torch
from monai.transforms import Compose, RandomOrder

from medconstraints.transforms import affine_transforms, nnunet_transforms, placement_transforms
from medconstraints.transforms.augmentations import PLACEMENTS


def item(dims):
    volume = torch.zeros(1, *[24] * dims)
    volume[(0, *[slice(6, 15)] * dims)] = 1.0
    return {"image": volume + 0.01 * torch.randn(volume.shape), "label": volume.clone()}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("make", [affine_transforms, nnunet_transforms])
def test_labels_keep_their_classes_and_move_with_the_image(make, dims):
    transform = Compose(make(dims)).set_random_state(seed=1)
    changed = 0
    for _ in range(20):
        given = item(dims)
        found = transform(given)
        label = found["label"].as_tensor()
        assert set(label.unique().tolist()) <= {0.0, 1.0} and label.shape == given["label"].shape
        assert found["image"][label > 0].mean() > found["image"][label == 0].mean()
        changed += int((label != given["label"]).any())
    assert changed >= (15 if make is affine_transforms else 3)


def test_translation_stays_in_its_range_and_an_axis_is_mirrored_on_demand():
    transform = Compose(affine_transforms(2, keys=["label"], translation_voxels=3.0)).set_random_state(seed=0)
    centres = []
    for _ in range(60):
        label = transform({"label": item(2)["label"]})["label"].as_tensor()[0]
        centres.append(label.nonzero().float().mean(0) - 10)
    shifts = torch.stack(centres)
    assert 2.0 < shifts.abs().max() <= 3.5 and shifts.min() < -1 < 1 < shifts.max()
    mirrored = Compose(affine_transforms(2, keys=["label"], translation_voxels=0.0, flip_axis=0)).set_random_state(1)
    centres = [
        mirrored({"label": item(2)["label"]})["label"].as_tensor()[0].nonzero().float().mean(0) for _ in range(20)
    ]
    assert {round(float(centre[0])) for centre in centres} == {10, 13}
    assert {round(float(centre[1])) for centre in centres} == {10}


def test_a_share_of_the_cases_stays_as_it_is_and_zeros_come_in():
    chain = affine_transforms(2, keys=["label"], translation_voxels=20.0, prob=0.5, padding_mode="zeros")
    transform, given = Compose(chain).set_random_state(seed=0), {"label": torch.ones(1, 24, 24)}
    found = [transform(given)["label"] for _ in range(40)]
    moved = [one for one in found if (one != 1).any()]
    assert 10 <= len(moved) <= 30 and all(set(one.unique().tolist()) == {0.0, 1.0} for one in moved)


def test_classes_have_no_label_map():
    transform = Compose(nnunet_transforms(2, keys=["image"], mirror_axes=[1])).set_random_state(seed=1)
    images = [np.asarray(transform({"image": item(2)["image"], "label": 1})["image"]) for _ in range(5)]
    assert all(np.isfinite(image).all() for image in images)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", PLACEMENTS)
def test_placements_move_image_and_label_alike(kind, dims):
    transform = Compose(placement_transforms(kind, dims, translation_voxels=3.0)).set_random_state(seed=0)
    given = item(dims)
    given["image"] = given["label"].clone()
    changed = 0
    for _ in range(10):
        found = transform(given)
        image, label = (torch.as_tensor(found[key]) for key in ("image", "label"))
        assert ((image > 0.5) != (label > 0.5)).float().mean() < 0.05  # linear against nearest, twice
        changed += int((label != given["label"]).any())
    assert (changed > 0) == (kind != "none")


def test_placements_are_in_random_order_and_of_known_kinds():
    [combined] = placement_transforms("combined", 2)
    assert isinstance(combined, RandomOrder) and len(combined.transforms) == 3
    with pytest.raises(ValueError, match="kind: expected one of none, rotate, flip, translate, combined, got 'turn'"):
        placement_transforms("turn", 2)
