"""The check of the losses' distance maps: what passes unchanged, and what is refused with which words."""

import math

import pytest
import torch
from monai.data import MetaTensor

from medconstraints.distance import Euclidean
from medconstraints.distance.provenance import RECORD, record
from medconstraints.losses.boundary import BoundaryLoss
from medconstraints.losses.distance_target import DistanceMapCheck
from medconstraints.losses.distance_weighted import DistanceWeightedCrossEntropyLoss
from medconstraints.losses.hausdorff import HausdorffLoss

SHAPE = torch.Size((2, 3, 6, 5))
LABEL = torch.arange(60).view(2, 1, 6, 5) % 3
ONE_HOT = torch.cat([number == LABEL for number in range(3)], 1)
MAP = torch.linspace(-3, 4, 180).view(SHAPE)

LOSSES = {
    "BoundaryLoss": lambda: BoundaryLoss(softmax=True),
    "HausdorffLoss": lambda: HausdorffLoss(softmax=True, spacing_mm=(1, 1)),
    "DistanceWeightedCrossEntropyLoss": DistanceWeightedCrossEntropyLoss,
}


@pytest.fixture(params=LOSSES.values(), ids=LOSSES)
def loss(request):
    """The loss of zero logits as a function of the map; one loss for all calls."""
    made = request.param()
    return lambda maps: made(torch.zeros(SHAPE), {"label": LABEL, "distance_map": maps})


def made(maps, affine=None):
    """A batch of maps as `SignedDistanceMapd` and a collate make it."""
    kept = record(torch.eye(4), (1.0, 1.0), 1.0)
    kept = {"affine": kept["affine"].expand(2, 4, 4), "spacing_mm": kept["spacing_mm"].expand(2, 2), "scale_mm": 1.0}
    affine = torch.eye(4).expand(2, 4, 4) if affine is None else affine
    return MetaTensor(maps, affine=affine, meta={RECORD: kept})


def test_maps_pass_without_their_meta_data():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        maps = MAP.to(dtype)
        for given in (maps, MetaTensor(maps), made(maps)):
            found = DistanceMapCheck()(given, SHAPE)
            assert type(found) is torch.Tensor and found.dtype == dtype and torch.equal(found, maps)
    leaf = MAP.clone().requires_grad_()
    assert DistanceMapCheck()(leaf, SHAPE) is leaf  # nothing is copied, and gradients pass
    spoilt = torch.where(MAP > 3, math.nan, MAP)
    assert torch.equal(DistanceMapCheck()(spoilt, SHAPE).isfinite(), spoilt.isfinite())  # not looked for


REFUSED = {
    "int8": (MAP.to(torch.int8), r"floating point, got torch\.int8; .* SignedDistanceMapd.* DecodeDistanceMapd"),
    "bool": (ONE_HOT, r"floating point, got torch\.bool; a label is turned into"),
    "class numbers": (LABEL, r"floating point, got torch\.int64; a label is turned into"),
    "channels": (MAP[:, 1:], r"\(2, 3, 6, 5\), got \(2, 2, 6, 5\); .*num_classes"),
    "patch": (MAP[..., 1:], r"\(2, 3, 6, 5\), got \(2, 3, 6, 4\); .* crop, flip and pad it"),
    "no batch": (MAP[0], r"\(2, 3, 6, 5\), got \(3, 6, 5\)"),
    "one-hot": (ONE_HOT.float(), "got zeros and ones as of a label; make it with SignedDistanceMapd"),
    "one-hot, float16": (ONE_HOT.half(), "got zeros and ones as of a label"),
    "ones": (torch.ones(SHAPE), "got zeros and ones as of a label"),
}


@pytest.mark.parametrize(("target", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_map_is_refused(target, words):
    for given in (target, MetaTensor(target)):
        with pytest.raises(ValueError, match=rf"^distance_map: expected .*{words}"):
            DistanceMapCheck()(given, SHAPE)


def test_each_loss_refuses_other_targets(loss):
    for target in (MAP.to(torch.int8), ONE_HOT.byte(), ONE_HOT.float(), MAP[:, 1:]):
        with pytest.raises(ValueError, match=r"^distance_map: expected .*SignedDistanceMapd"):
            loss(target)


def test_each_loss_refuses_resampled_maps(loss):
    """One bad map of a batch is enough; flips and quarter turns are none."""
    affine = torch.eye(4).repeat(2, 1, 1)
    affine[1] = torch.eye(4)[[1, 0, 2, 3]] * torch.tensor([-1.0, 1.0, 1.0, 1.0])
    assert loss(made(MAP, affine)).isfinite()
    for step, turn in ((1.1, 0.0), (1.0, 0.2)):
        affine[1, :2, :2] = step * torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        with pytest.raises(ValueError, match=r"^distance_map: this distance map was resampled .* SignedDistanceMapd"):
            loss(made(MAP, affine))
        assert loss(MAP).isfinite()  # a plain tensor tells nothing


def test_after_a_map_with_negative_distances_values_are_not_looked_at(loss):
    """Which makes the host wait for an accelerator; clipped maps of a patch may be zeros and ones."""
    for odd in (torch.zeros(SHAPE), MAP.abs() + 1, torch.full(SHAPE, 20.0), ONE_HOT.float() / 2):
        assert loss(odd).isfinite()  # maps without negative distances, which tell nothing
    with pytest.raises(ValueError, match="zeros and ones as of a label"):
        loss(ONE_HOT.float())
    assert loss(MAP).isfinite()
    assert loss(ONE_HOT.float()).isfinite()
    for given in (ONE_HOT.byte(), MAP[..., 1:]):  # types and shapes are looked at all the time
        with pytest.raises(ValueError, match="distance_map: expected"):
            loss(given)


def test_the_values_are_looked_at_until_then_only(monkeypatch):
    looked, aminmax = [], torch.aminmax
    monkeypatch.setattr(torch, "aminmax", lambda values: looked.append(1) or aminmax(values))
    check = DistanceMapCheck()
    for number, maps in enumerate((MAP.abs(), MAP.abs(), MAP, MAP, MAP.abs())):
        check(maps, SHAPE)
        assert len(looked) == min(number + 1, 3)
    with pytest.raises(ValueError, match="zeros and ones"):
        DistanceMapCheck()(ONE_HOT.float(), SHAPE)  # another check has not seen it
    loss = BoundaryLoss(softmax=True)
    loss(torch.zeros(SHAPE), MAP)
    assert not loss.state_dict()


def test_repr_tells_the_settings():
    """Reports quote it."""
    shown = repr(HausdorffLoss(alpha=1.5, measure=Euclidean(slice_axis=2, clip_mm=7.0)))
    assert "alpha=1.5" in shown and "slice_axis=2" in shown and "clip_mm=7.0" in shown
    assert "unit_mm=2.5" in repr(BoundaryLoss(unit_mm=2.5))
    assert "sigma_mm=3, class_weight='balanced'" in repr(
        DistanceWeightedCrossEntropyLoss(sigma_mm=3.0, class_weight="balanced")
    )
