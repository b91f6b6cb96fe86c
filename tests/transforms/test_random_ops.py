"""RandAugment and TrivialAugment: what each operation does, on image and label, and that draws repeat."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medconstraints.transforms import RandAugmentd, TrivialAugmentd
from medconstraints.transforms.random_ops import OPERATIONS

SHAPES = {"2D": (1, 20, 16), "3D": (1, 12, 10, 8)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def item(shape):
    """A blob of two classes, and an image that is bright where they are."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, size) for size in shape[1:]], indexing="ij"))
    label = (np.abs(grid).max(0) < 0.5).astype(np.float32) + (np.abs(grid).max(0) < 0.2)
    noise = np.random.default_rng(0).normal(size=label.shape) * 0.05
    return {
        "image": MetaTensor(torch.from_numpy(label + noise)[None].float(), affine=np.diag([2.0, 1.0, 1.0, 1.0])),
        "label": MetaTensor(torch.from_numpy(label)[None].float()),
        "case": "a",
    }


def augmented(shape, name, seed=0, magnitude=8):
    chain = RandAugmentd(["image", "label"], num_ops=1, magnitude=magnitude, operations=[name])
    return chain.set_random_state(seed)(item(shape))


@shapes
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation(name, shape):
    before, found = item(shape), augmented(shape, name)
    spatial = name in ("rotate", "translate", "scale", "shear")
    assert found["image"].shape == found["label"].shape == shape and found["case"] == "a"
    assert isinstance(found["image"], MetaTensor) and found["image"].dtype == torch.float32
    assert found["image"].isfinite().all()
    assert torch.equal(found["image"], before["image"]) == (name == "identity")
    assert torch.equal(found["label"], before["label"]) != spatial
    assert set(found["label"].unique().tolist()) <= {0.0, 1.0, 2.0}  # no class between two
    if spatial:  # the image went with its label
        inside = found["label"].as_tensor() > 0
        assert found["image"].as_tensor()[inside].mean() > 0.6 > 0.4 > found["image"].as_tensor()[~inside].mean()
    again = augmented(shape, name)
    assert all(torch.equal(found[key], again[key]) for key in ("image", "label"))


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "identity"])
def test_magnitude_0_changes_nothing_and_more_changes_more(name):
    before = item(SHAPES["2D"])["image"]
    change = [float((augmented(SHAPES["2D"], name, magnitude=m)["image"] - before).abs().mean()) for m in (0, 3, 9)]
    assert change[0] < 1e-5 < change[1] < change[2]


def test_signs_are_drawn():
    image = item(SHAPES["2D"])["image"]
    found = [augmented(SHAPES["2D"], "brightness", seed)["image"] for seed in range(20)]
    shift = {round(float((one - image).mean()), 3) for one in found}
    assert len(shift) == 2 and sum(shift) == pytest.approx(0, abs=2e-3)


def test_rand_augment_takes_several_and_trivial_augment_one():
    several = RandAugmentd("image", num_ops=3, magnitude=4).set_random_state(0)
    trivial, seen = TrivialAugmentd("image").set_random_state(0), []
    for _ in range(300):
        several.randomize()
        trivial.randomize()
        assert len(several._draws) == 3 and {abs(draw.level) for draw in several._draws} == {0.4}
        seen += trivial._draws
    assert len(seen) == 300 and {draw.name for draw in seen} == set(OPERATIONS)
    levels = np.abs([draw.level for draw in seen])
    assert abs(levels.mean() - 0.5) < 0.06 and levels.max() > 0.95 and levels.min() < 0.05


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandAugmentd("image", magnitude=11), "magnitude: expected a number 0 to 10, got 11"),
        (lambda: RandAugmentd("image", num_ops=0), "num_ops: expected an integer >= 1"),
        (lambda: TrivialAugmentd("image", operations=["flip"]), "operations: expected one of identity, .*got 'flip'"),
        (lambda: TrivialAugmentd("image", operations=[]), "operations: expected some of"),
        (lambda: TrivialAugmentd("image")({"image": torch.zeros(4, 4)}), r"image: expected an image .* got \(4, 4\)"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
