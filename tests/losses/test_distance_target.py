"""The check of the losses' distance maps: what passes unchanged, and what is refused with which words."""

import math
import warnings

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
}
# Labels that are floating point, and a map that might be one: one channel, clipped to 1 mm, far from the object.
LABELS = {
    "one-hot": ONE_HOT.float(),
    "one-hot, float16": ONE_HOT.half(),
    "0 and 2": 2 * ONE_HOT.float(),
    "0 and 255": 255 * ONE_HOT.float(),
    "class numbers": LABEL.float().expand(SHAPE),
    "soft": ONE_HOT.float() / 2 + 0.2,
    "ones": torch.ones(SHAPE),
}


@pytest.mark.parametrize(("target", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_map_is_refused(target, words):
    for given in (target, MetaTensor(target)):
        with pytest.raises(ValueError, match=rf"^distance_map: expected .*{words}"):
            DistanceMapCheck()(given, SHAPE)


def test_each_loss_refuses_other_targets(loss):
    for target in (MAP.to(torch.int8), ONE_HOT.byte(), MAP[:, 1:]):
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


@pytest.mark.parametrize("target", LABELS.values(), ids=LABELS)
def test_each_loss_warns_once_of_what_may_be_a_label(loss, target):
    with pytest.warns(UserWarning, match=r"^distance_map: no distance .* SignedDistanceMapd"):
        assert loss(target).isfinite()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loss(target).isfinite()


@pytest.mark.parametrize("target", LABELS.values(), ids=LABELS)
def test_a_map_that_says_what_it_is_gets_no_warning(loss, target):
    """Clipped maps of patches may hold zeros and ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loss(made(target)).isfinite()
        assert loss(MAP).isfinite()
        assert loss(target).isfinite()  # once a map was seen values are not looked at


def test_the_values_are_looked_at_until_they_tell(monkeypatch):
    looked, aminmax = [], torch.aminmax
    monkeypatch.setattr(torch, "aminmax", lambda values: looked.append(1) or aminmax(values))
    check = DistanceMapCheck()
    for number, maps in enumerate((0 * MAP, 0 * MAP, MAP, MAP, MAP.abs())):
        check(maps, SHAPE)
        assert len(looked) == min(number + 1, 3)
    loss = BoundaryLoss(softmax=True)
    loss(torch.zeros(SHAPE), made(MAP))
    assert not loss.state_dict() and len(looked) == 3


def test_repr_tells_the_settings():
    """Reports quote it."""
    shown = repr(HausdorffLoss(alpha=1.5, measure=Euclidean(slice_axis=2, clip_mm=7.0)))
    assert "alpha=1.5" in shown and "slice_axis=2" in shown and "clip_mm=7.0" in shown
    assert "unit_mm=2.5" in repr(BoundaryLoss(unit_mm=2.5))
    assert "sigma_mm=3, class_weight='balanced'" in repr(
        DistanceWeightedCrossEntropyLoss(sigma_mm=3.0, class_weight="balanced")
    )
