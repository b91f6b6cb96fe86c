"""The augmentation that the bundles share."""

import torch
from monai.transforms import Compose

from medconstraints.transforms import intensity_transforms, patch_transforms


def test_maps_of_an_item_stay_together():
    place = torch.arange(1.0, 6 * 7 + 1).view(1, 6, 7)
    chain = Compose(patch_transforms((4, 4), flip_axis=0)).set_random_state(seed=3)
    seen = set()
    for _ in range(20):
        item = chain(
            {"image": place, "label": place.clone(), "weak_label": place.clone(), "distance_map": place.clone()}
        )
        assert all(torch.equal(item[key], item["image"]) for key in item)
        assert item["image"].shape == (1, 4, 4)
        seen.add(tuple(item["image"].flatten().tolist()))
    assert len(seen) > 5


def test_padding_of_a_weak_label_is_not_annotated():
    item = {key: torch.ones(1, 2, 2) for key in ("image", "weak_label")}
    padded = Compose(patch_transforms((4, 4)))(item)
    assert padded["image"].sum() == 4
    assert (padded["weak_label"] == -1).sum() == 12


def test_intensities_change_and_labels_do_not():
    item = {"image": torch.ones(1, 8, 8), "label": torch.ones(1, 8, 8)}
    chain = Compose(intensity_transforms(noise=0.1)).set_random_state(seed=0)
    images = [chain(item)["image"] for _ in range(10)]
    assert any(image.std() > 0 for image in images)
    assert all(abs(float(image.mean()) - 1) < 0.4 for image in images)
    assert torch.equal(chain(item)["label"], item["label"])
