"""Every kind of distance map with every loss that reads maps, against sums over voxels by hand."""

import itertools

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose

from medconstraints.distance import Euclidean, Geodesic
from medconstraints.losses import BoundaryLoss, CombinedLoss, DistanceWeightedCrossEntropyLoss, HausdorffLoss
from medconstraints.transforms import DecodeDistanceMapd, SignedDistanceMapd

SPACING = (1.0, 1.5, 2.0)
MEASURES = {
    "boundary": Euclidean(convention="boundary"),
    "voxel": Euclidean(convention="voxel"),
    "published": Euclidean(convention="published"),
    "slices": Euclidean(slice_axis=2),
    "clipped": Euclidean(clip_mm=1.5),
    "geodesic": Geodesic(image_weight=1.0),
}
STORAGES = {"float32": {}, "float16": {"storage": "float16"}, "int8": {"storage": "int8"}}
LABELS = {
    "all classes": [(1, (1, 1, 1), (4, 4, 3)), (2, (4, 1, 1), (6, 5, 3))],
    "an absent class": [(1, (2, 1, 0), (5, 4, 4))],
    "an empty slice": [(2, (1, 1, 0), (4, 4, 1))],
    "empty": [],
}


def item(name):
    """Image and label with corners that spoil no map."""
    label = np.zeros((7, 6, 4), np.float32)
    for number, start, stop in LABELS[name]:
        label[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = number
    affine = np.diag([*SPACING, 1.0])
    image = np.random.default_rng(0).normal(size=(1, 7, 6, 4)).astype(np.float32)
    return {"image": MetaTensor(image, affine=affine), "label": MetaTensor(label[None], affine=affine)}


def weights_by_hand(probs, label, maps):
    """Sum over voxels of distance times probability; cross-entropy with the weight of the boundary; both float64."""
    boundary, weighted = [], []
    for c in (1, 2):
        boundary.append(float((probs[c] * maps[c]).mean()))
    for p in itertools.product(*(range(n) for n in label.shape)):
        own = int(label[p])
        bounded = any(maps[(c, *p)] != 0 for c in range(3))
        weight = 10.0 * np.exp(-(maps[(own, *p)] ** 2) / 50.0) if bounded else 0.0
        weighted.append(-(weight + (label == own).mean()) * np.log(probs[(own, *p)]))
    return np.mean(boundary), np.mean(weighted)


@pytest.mark.parametrize("track_meta", [True, False])
@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize("name", LABELS)
def test_each_loss_with_each_map(name, measure, storage, track_meta):
    if storage.get("storage") == "int8" and measure.clip_mm is None:
        with pytest.raises(ValueError, match="clip_mm"):
            SignedDistanceMapd(num_classes=3, measure=measure, **storage)
        return
    chain = [SignedDistanceMapd(num_classes=3, measure=measure, **storage), DecodeDistanceMapd(track_meta=track_meta)]
    found = Compose(chain)(item(name))
    logits = torch.randn(1, 3, 7, 6, 4, generator=torch.Generator().manual_seed(1))
    probs = logits.double().softmax(1)[0].numpy()
    label, maps = found["label"].numpy()[0], torch.as_tensor(found["distance_map"]).numpy().astype(float)
    boundary, weighted = weights_by_hand(probs, label, maps)
    target = {"label": found["label"][None], "distance_map": found["distance_map"][None]}
    if isinstance(target["distance_map"], MetaTensor):
        target["distance_map"].meta = found["distance_map"].meta
    loss = CombinedLoss({"boundary": BoundaryLoss(softmax=True), "weighted": DistanceWeightedCrossEntropyLoss()})
    loss(logits, target)
    assert float(loss.terms()["boundary"]) == pytest.approx(boundary, abs=1e-5)
    assert float(loss.terms()["weighted"]) == pytest.approx(weighted, rel=1e-5)


@pytest.mark.parametrize("measure", [MEASURES["boundary"], MEASURES["voxel"], MEASURES["published"]])
def test_a_rim_has_the_weight_of_the_boundary_in_each_convention(measure):
    found = SignedDistanceMapd(num_classes=3, measure=measure)(item("all classes"))
    label, maps = found["label"][None], found["distance_map"][None].as_tensor()
    loss = DistanceWeightedCrossEntropyLoss(class_weight=None, sigma_mm=5.0, reduction="none")
    cost = loss(torch.zeros(1, 3, 7, 6, 4), {"label": label, "distance_map": maps})[0, 0] / np.log(3)
    rim = cost[1, 1, 1]  # of class 1, beside the background along all three axes
    assert 10.5 < float(rim) <= 11.0


EUCLIDEAN = {name: measure for name, measure in MEASURES.items() if isinstance(measure, Euclidean)}


@pytest.mark.parametrize("storage", [{}, {"storage": "float16"}], ids=["float32", "float16"])
@pytest.mark.parametrize("measure", EUCLIDEAN.values(), ids=EUCLIDEAN)
def test_the_hausdorff_loss_with_a_map_of_its_own_measure_is_that_without(measure, storage):
    chain = Compose([SignedDistanceMapd(num_classes=3, measure=measure, **storage), DecodeDistanceMapd()])
    found = chain(item("all classes"))
    logits = torch.randn(1, 3, 7, 6, 4, generator=torch.Generator().manual_seed(1))
    loss = HausdorffLoss(softmax=True, measure=measure)
    target = {"label": found["label"][None].as_tensor(), "spacing_mm": torch.tensor(SPACING)}
    with_map = loss(logits, {**target, "distance_map": found["distance_map"][None].as_tensor()})
    torch.testing.assert_close(with_map, loss(logits, target), rtol=2e-3, atol=0)


def test_the_hausdorff_loss_refuses_a_measure_that_a_prediction_has_not():
    with pytest.raises(TypeError, match="measure: expected Euclidean"):
        HausdorffLoss(measure=MEASURES["geodesic"])
