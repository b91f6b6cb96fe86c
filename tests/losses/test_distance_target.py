"""The check of the losses' distance maps: what passes unchanged, and what is refused with which words."""

import math

import pytest
import torch
from monai.data import MetaTensor

from medconstraints.distance.provenance import RECORD, record
from medconstraints.losses.boundary import BoundaryLoss
from medconstraints.losses.distance_target import DistanceMapCheck
from medconstraints.losses.distance_weighted import DistanceWeightedCrossEntropyLoss
from medconstraints.losses.hausdorff import HausdorffLoss

SHAPE = torch.Size((2, 3, 6, 5))
LABEL = torch.arange(60).view(2, 1, 6, 5) % 3
ONE_HOT = torch.cat([number == LABEL for number in range(3)], 1)
MAP = torch.linspace(-3, 4, 180).view(SHAPE)

# Each loss with its own name of the map, as functions of the map.
LOSSES = {
    "BoundaryLoss": ("target", lambda: BoundaryLoss(softmax=True), False),
    "HausdorffLoss": ("distance_map", lambda: HausdorffLoss(softmax=True, spacing_mm=(1, 1)), True),
    "DistanceWeightedCrossEntropyLoss": ("distance_map", DistanceWeightedCrossEntropyLoss, True),
}
losses = pytest.mark.parametrize(("name", "make", "with_label"), LOSSES.values(), ids=LOSSES)


def calls(make, with_label):
    """The loss of zero logits as a function of the map; one loss for all calls."""
    loss = make()
    return lambda maps: loss(torch.zeros(SHAPE), {"label": LABEL, "distance_map": maps} if with_label else maps)


def made(maps, affine=None):
    """A batch of maps as `SignedDistanceMapd` and a collate make it."""
    kept = record(torch.eye(4), (1.0, 1.0), 1.0)
    kept = {"affine": kept["affine"].expand(2, 4, 4), "spacing_mm": kept["spacing_mm"].expand(2, 2), "scale_mm": 1.0}
    affine = torch.eye(4).expand(2, 4, 4) if affine is None else affine
    return MetaTensor(maps, affine=affine, meta={RECORD: kept})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [torch.clone, MetaTensor, made], ids=["tensor", "MetaTensor", "with a record"])
def test_maps_pass_without_their_meta_data(kind, dtype):
    maps = MAP.to(dtype)
    found = DistanceMapCheck()(kind(maps), SHAPE)
    assert type(found) is torch.Tensor
    assert found.dtype == dtype and torch.equal(found, maps)


def test_nothing_is_copied_and_gradients_pass():
    assert DistanceMapCheck()(MAP, SHAPE) is MAP
    leaf = MAP.clone().requires_grad_()
    assert DistanceMapCheck()(leaf, SHAPE).requires_grad


REFUSED = {
    "int8": (
        MAP.to(torch.int8),
        r"floating point, got torch\.int8; .* by SignedDistanceMapd.* DecodeDistanceMapd",
    ),
    "uint8": (ONE_HOT.byte(), r"floating point, got torch\.uint8; a label is turned into one by SignedDistanceMapd"),
    "bool": (ONE_HOT, r"floating point, got torch\.bool; a label is turned into one by SignedDistanceMapd"),
    "class numbers": (LABEL, r"floating point, got torch\.int64; a label is turned into one"),
    "channels": (MAP[:, 1:], r"each channel of the input, \(2, 3, 6, 5\), got \(2, 2, 6, 5\); .*num_classes=\.\.\."),
    "patch": (MAP[..., 1:], r"each channel of the input, \(2, 3, 6, 5\), got \(2, 3, 6, 4\); .* crop, flip and pad it"),
    "samples": (MAP[:1], r"each channel of the input, \(2, 3, 6, 5\), got \(1, 3, 6, 5\)"),
    "no batch": (MAP[0], r"each channel of the input, \(2, 3, 6, 5\), got \(3, 6, 5\)"),
    "class numbers, float": (LABEL.float(), r"each channel of the input, \(2, 3, 6, 5\), got \(2, 1, 6, 5\)"),
    "one-hot": (ONE_HOT.float(), r"in mm, got zeros and ones as of a label; make it with SignedDistanceMapd"),
    "one-hot, float16": (ONE_HOT.half(), r"in mm, got zeros and ones as of a label; .*PrepareBatchTargets"),
    "ones": (torch.ones(SHAPE), r"in mm, got zeros and ones as of a label"),
}


@pytest.mark.parametrize(("target", "words"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("name", ["distance_map", "target"])
def test_what_is_no_map_is_refused_by_name(target, words, name):
    for given in (target, MetaTensor(target)):
        with pytest.raises(ValueError, match=rf"^{name}: expected a distance map .*{words}"):
            DistanceMapCheck()(given, SHAPE, name)


@losses
@pytest.mark.parametrize(
    "target", [MAP.to(torch.int8), ONE_HOT.byte(), ONE_HOT.float()], ids=["int8", "uint8", "float"]
)
def test_each_loss_refuses_it(name, make, with_label, target):
    with pytest.raises(ValueError, match=rf"^{name}: expected a distance map in mm, .*SignedDistanceMapd"):
        calls(make, with_label)(target)


@losses
def test_each_loss_refuses_resampled_maps(name, make, with_label):
    """One bad map of a batch is enough; flips and quarter turns are none."""
    loss, affine = calls(make, with_label), torch.eye(4).repeat(2, 1, 1)
    affine[1] = torch.eye(4)[[1, 0, 2, 3]] * torch.tensor([-1.0, 1.0, 1.0, 1.0])
    assert loss(made(MAP, affine)).isfinite()
    for step, turn in ((1.1, 0.0), (1.0, 0.2)):
        affine[1, :2, :2] = step * torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        with pytest.raises(ValueError, match=rf"^{name}: this distance map was resampled .* put SignedDistanceMapd"):
            loss(made(MAP, affine))
        assert loss(MAP).isfinite()  # a plain tensor tells nothing


@losses
def test_after_a_map_with_negative_distances_values_are_not_looked_at(name, make, with_label):
    """Which makes the host wait for an accelerator; clipped maps of a patch may be zeros and ones."""
    loss = calls(make, with_label)
    for odd in (torch.zeros(SHAPE), MAP.abs() + 1, torch.full(SHAPE, 20.0), ONE_HOT.float() / 2):
        assert loss(odd).isfinite()  # maps without negative distances, which tell nothing
    with pytest.raises(ValueError, match=rf"^{name}: .*got zeros and ones as of a label"):
        loss(ONE_HOT.float())
    assert loss(MAP).isfinite()
    assert loss(ONE_HOT.float()).isfinite()
    for given, words in ((ONE_HOT.byte(), r"floating point, got torch\.uint8"), (MAP[..., 1:], "each channel")):
        with pytest.raises(ValueError, match=words):  # types and shapes are looked at all the time
            loss(given)


def test_each_check_remembers_for_itself():
    one, other = DistanceMapCheck(), DistanceMapCheck()
    assert not one.seen
    one(MAP.abs(), SHAPE)
    assert not one.seen
    one(MAP, SHAPE)
    assert one.seen and not other.seen
    assert torch.equal(one(ONE_HOT.float(), SHAPE), ONE_HOT.float())
    with pytest.raises(ValueError, match="zeros and ones"):
        other(ONE_HOT.float(), SHAPE)


def test_the_values_are_looked_at_until_then_only(monkeypatch):
    looked, aminmax = [], torch.aminmax
    monkeypatch.setattr(torch, "aminmax", lambda values: looked.append(1) or aminmax(values))
    check = DistanceMapCheck()
    for number, maps in enumerate((MAP.abs(), MAP.abs(), MAP, MAP, MAP.abs())):
        check(maps, SHAPE)
        assert len(looked) == min(number + 1, 3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_not_looked_for(value):
    maps = MAP.clone()
    maps[0, 1, 2, 3] = value
    assert torch.equal(DistanceMapCheck()(maps, SHAPE).isfinite(), maps.isfinite())


def test_the_memory_is_not_saved():
    loss = BoundaryLoss(softmax=True)
    loss(torch.zeros(SHAPE), MAP)
    assert not loss.state_dict()
    with pytest.raises(ValueError, match="zeros and ones"):
        BoundaryLoss(softmax=True)(torch.zeros(SHAPE), ONE_HOT.float())
