"""The network that draws augmentations: bounds, spread, families, gradients."""

import pytest
import torch

from medconstraints.augmentation import Augmenter, augment, quantities


@pytest.mark.parametrize(
    ("families", "dims", "names"),
    [
        (["translation"], 3, ["translation_0", "translation_1", "translation_2"]),
        (["affine"], 2, ["rotation_01", "translation_0", "translation_1", "scale_0", "scale_1", "shear_01"]),
        (["elastic", "colour"], 2, ["displacement", "saturation", "hue"]),
        (["intensity"], 3, ["contrast", "brightness", "gamma", "noise", "blur"]),
    ],
)
def test_quantities_of_families(families, dims, names):
    assert [quantity.name for quantity in quantities(families, dims)] == names
    assert len(quantities(["affine"], 3)) == 12


def test_limits_replace_the_defaults():
    found = quantities(["affine"], 2, {"translation": 7.0})
    assert {q.name: q.limit for q in found if "translation" in q.name} == {"translation_0": 7.0, "translation_1": 7.0}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"families": ["elastics"]}, "families: expected one of .*got 'elastics'"),
        ({"families": ["affine", "translation"]}, "families: .*each value once"),
        ({"families": []}, "families"),
        ({"limits": {"hue": 1.0}}, "limits: .*got hue"),
        ({"limits": {"rotation": 0.0}}, "limits: .*got rotation: 0.0"),
        ({"size": "tiny"}, "size: expected one of small, medium, large"),
        ({"spread_floor": -1.0}, "spread_floor"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Augmenter(2, **options)


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_values_are_bounded_and_start_around_zero(size):
    augmenter = Augmenter(3, families=["affine", "elastic", "intensity"], size=size)
    values = augmenter.draw(2000)
    assert (values.abs() <= augmenter.limits).all()
    share = values / augmenter.limits
    assert share.mean(0).abs().max() < 0.5
    assert (share.std(0) > 0.04).all()


def test_the_spread_has_a_floor_when_the_network_draws_a_point():
    for floor in (0.0, 0.1):
        augmenter = Augmenter(2, spread_floor=floor).eval()
        torch.nn.init.zeros_(augmenter.mlp[-1].weight)
        spread = (augmenter.draw(4000) / augmenter.limits).std(0)
        torch.testing.assert_close(spread, torch.full_like(spread, floor), rtol=0.1, atol=1e-9)


@pytest.mark.parametrize("dims", [2, 3])
def test_every_weight_of_the_last_layer_gets_a_gradient_from_image_and_label(dims):
    augmenter = Augmenter(dims, families=["affine", "elastic", "intensity"])
    image, label = torch.randn(4, 1, *[10] * dims), torch.rand(4, 2, *[10] * dims)
    changed, warped = augmenter(image, label, torch.full((4, dims), 0.5))
    (changed.square().sum() + (warped * torch.randn_like(warped)).sum()).backward()
    assert changed.shape == image.shape and warped.shape == label.shape
    assert (augmenter.mlp[-1].bias.grad.abs() > 0).all()


def test_class_numbers_stay_and_label_maps_move_with_their_image():
    image = torch.zeros(2, 1, 8, 8)
    image[:, :, 2:5, 3:6] = 1.0
    values = {"translation_0": torch.tensor([1.0, -2.0]), "rotation_01": torch.tensor([10.0, 0.0])}
    changed, warped = augment(image, image.clone(), values, torch.ones(2, 2))
    torch.testing.assert_close(changed, warped)
    _, nearest = augment(image, image.clone(), values, torch.ones(2, 2), label_mode="nearest")
    assert set(nearest.unique().tolist()) == {0.0, 1.0}
    classes = torch.tensor([1, 0])
    assert augment(image, classes, values, torch.ones(2, 2))[1] is classes


def test_the_same_generator_gives_the_same_noise():
    image, values = torch.zeros(2, 1, 8, 8), {"noise": torch.ones(2), "displacement": torch.ones(2)}
    first, second = (
        augment(image, None, values, torch.ones(2, 2), generator=torch.Generator().manual_seed(5))[0] for _ in range(2)
    )
    assert torch.equal(first, second) and first.std() > 0.9
