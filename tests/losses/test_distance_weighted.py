"""Distance-weighted cross-entropy: against a slow reference and PyTorch, no boundary, half precision, refusals."""

import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch.nn import functional

from medconstraints.losses import CombinedLoss
from medconstraints.losses.distance_weighted import DistanceWeightedCrossEntropyLoss

SHAPES = {"2D": (2, 3, 6, 5), "3D": (2, 2, 3, 4, 5), "one sample": (1, 6, 4, 3)}
CLASS_WEIGHTS = ("frequency", "balanced", "values", None)
LABELS = ["all classes", "class 1 is absent", "no foreground", "full foreground", "one voxel"]
labels = pytest.mark.parametrize("case", LABELS)


def distances(label, classes, spacing=1.0):
    """Signed distances in mm to the nearest voxel of the other side, zeros where there is none: (B, C, *S)."""
    maps = np.zeros((len(label), classes, *label.shape[2:]))
    where = spacing * np.argwhere(np.ones(label.shape[2:]))
    apart = np.linalg.norm(where[:, None] - where, axis=-1)
    for b, c in np.ndindex(len(label), classes):
        inside = label[b, 0].numpy().ravel() == c
        if inside.any() and not inside.all():
            nearest = np.where(inside[:, None] != inside, apart, np.inf).min(1)
            maps[b, c] = np.where(inside, -nearest, nearest).reshape(maps.shape[2:])
    return torch.from_numpy(maps)


def make_target(case, shape, rng):
    """Class numbers (B, 1, *S) and their distance map."""
    classes, size = shape[1], (shape[0], 1, *shape[2:])
    label = {
        "all classes": rng.integers(0, classes, size),
        "class 1 is absent": rng.choice([c for c in range(classes) if c != 1], size),
        "no foreground": np.zeros(size, int),
        "full foreground": np.full(size, classes - 1),
        "one voxel": np.zeros(size, int),
    }[case]
    if case == "one voxel":
        label.reshape(shape[0], -1)[:, 7] = classes - 1
    if case == "class 1 is absent" and shape[0] > 1:
        label[0] = rng.integers(0, classes, size[1:])  # in the other samples, not in this one
    label = torch.from_numpy(label)
    return {"label": label, "distance_map": distances(label, classes)}


def random_logits(shape, rng):
    """Logits, double."""
    return torch.from_numpy(rng.normal(scale=2, size=shape))


def reference(logits, target, *, boundary_weight=10.0, sigma_mm=5.0, class_weight="frequency"):
    """Thesis, section 4.3.2, voxel by voxel and class by class: (B, 1, *S)."""
    logits, label, maps = logits.detach().double().numpy(), target["label"].numpy(), target["distance_map"].numpy()
    values = np.zeros(label.shape)
    for b in range(len(logits)):
        share = [np.mean(label[b] == c) for c in range(logits.shape[1])]
        present = sum(s > 0 for s in share)
        for where in np.ndindex(*label.shape[2:]):
            scores = logits[(b, slice(None), *where)]
            log_probs = scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())
            for c in range(logits.shape[1]):
                if label[(b, 0, *where)] != c:
                    continue
                if class_weight == "frequency":
                    w = share[c]
                elif class_weight == "balanced":
                    w = 1 / (share[c] * present)
                else:
                    w = 1.0 if class_weight is None else class_weight[c]
                distance = maps[(b, c, *where)]
                if any(maps[(b, k, *where)] != 0 for k in range(maps.shape[1])):  # all 0: there is no boundary
                    w += boundary_weight * math.exp(-(distance**2) / (2 * sigma_mm**2))
                values[(b, 0, *where)] -= w * log_probs[c]
    return values


# Values


@labels
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_reference(shape, case, rng):
    logits, target = random_logits(shape, rng), make_target(case, shape, rng)
    for class_weight in CLASS_WEIGHTS:
        class_weight = [0.25 * (c + 1) for c in range(shape[1])] if class_weight == "values" else class_weight
        options = {"boundary_weight": 4.0, "sigma_mm": 1.5, "class_weight": class_weight}
        each = reference(logits, target, **options)
        for reduction, expected in (("mean", each.mean()), ("sum", each.sum()), ("none", each)):
            value = DistanceWeightedCrossEntropyLoss(reduction=reduction, **options)(logits, target)
            assert value.shape == expected.shape
            np.testing.assert_allclose(value.numpy(), expected, rtol=1e-9)
    value = DistanceWeightedCrossEntropyLoss()(logits, target)  # the defaults are those of the thesis
    assert value.item() == pytest.approx(reference(logits, target).mean(), rel=1e-9)


def test_by_hand():
    """Four voxels in a row, the last of class 1; undecided, so that each costs log 2."""
    label = torch.tensor([0, 0, 0, 1]).view(1, 1, 1, 4)
    outside = torch.tensor([2.5, 1.5, 0.5, -0.5]).view(1, 1, 1, 4)
    target = {"label": label, "distance_map": torch.cat([-outside, outside], 1)}
    value = DistanceWeightedCrossEntropyLoss(sigma_mm=2.0, reduction="none")(torch.zeros(1, 2, 1, 4), target)
    weight = [w + 10 * math.exp(-(d**2) / 8) for w, d in ((0.75, 2.5), (0.75, 1.5), (0.75, 0.5), (0.25, 0.5))]
    np.testing.assert_allclose(value.numpy().ravel(), math.log(2) * np.array(weight), rtol=1e-6)


def test_without_boundary_weight_it_is_the_cross_entropy_of_pytorch(rng):
    logits, target = random_logits((2, 3, 6, 5), rng), make_target("all classes", (2, 3, 6, 5), rng)
    for reduction in ("mean", "sum", "none"):
        loss = DistanceWeightedCrossEntropyLoss(boundary_weight=0, class_weight=None, reduction=reduction)
        expected = functional.cross_entropy(logits, target["label"][:, 0], reduction=reduction)
        torch.testing.assert_close(loss(logits, target).reshape(expected.shape), expected)
    values = [0.25, 1.0, 4.0]
    weight = torch.tensor(values, dtype=torch.float64)
    expected = functional.cross_entropy(logits, target["label"][:, 0], weight=weight, reduction="sum")
    for given in (values, tuple(values), torch.tensor(values)):
        loss = DistanceWeightedCrossEntropyLoss(boundary_weight=0, class_weight=given, reduction="sum")
        torch.testing.assert_close(loss(logits, target), expected)


@labels
def test_balanced_weights_have_mean_one_and_give_each_class_the_same(case, rng):
    """Undecided, so that a voxel costs its weight times log C."""
    shape = (3, 4, 6, 5)
    target = make_target(case, shape, rng)
    loss = DistanceWeightedCrossEntropyLoss(boundary_weight=0, class_weight="balanced", reduction="none")
    weight = loss(torch.zeros(shape), target).double() / math.log(4)
    np.testing.assert_allclose(weight.mean((1, 2, 3)).numpy(), 1, rtol=1e-6)
    for own, label in zip(weight, target["label"], strict=True):
        parts = [own[label == c].sum().item() for c in label.unique()]
        np.testing.assert_allclose(parts, parts[0], rtol=1e-6)


# Boundaries


def test_the_weight_falls_with_the_distance_on_both_sides():
    target = {"label": torch.zeros(1, 1, 1, 16).long()}
    target["label"][..., 8:] = 1
    target["distance_map"] = distances(target["label"], 2)
    loss = DistanceWeightedCrossEntropyLoss(class_weight=None, sigma_mm=2.0, reduction="none")
    weight = loss(torch.zeros(1, 2, 1, 16), target).ravel()
    assert (weight[:8].diff() > 0).all() and (weight[8:].diff() < 0).all()
    torch.testing.assert_close(weight, weight.flip(0))


@pytest.mark.parametrize("case", ["no foreground", "full foreground"])
def test_without_a_boundary_there_is_no_boundary_weight(case, rng):
    """One class fills the image: its share is 1, and balanced weights are 1 too."""
    shape = (2, 3, 6, 5)
    logits, target = random_logits(shape, rng), make_target(case, shape, rng)
    assert (target["distance_map"] == 0).all()
    for class_weight, value in (("frequency", 1.0), ("balanced", 1.0), (None, 1.0), ([2.0] * 3, 2.0)):
        loss = DistanceWeightedCrossEntropyLoss(class_weight=class_weight)
        expected = value * functional.cross_entropy(logits, target["label"][:, 0])
        torch.testing.assert_close(loss(logits, target), expected)


def test_the_boundary_is_looked_for_in_each_sample(rng):
    """A batch of an image with an object and one without is the mean of both."""
    logits, target = random_logits((2, 3, 6, 5), rng), make_target("one voxel", (2, 3, 6, 5), rng)
    target["label"][1] = 0
    target["distance_map"] = distances(target["label"], 3)
    loss = DistanceWeightedCrossEntropyLoss()
    single = [loss(logits[b : b + 1], {key: value[b : b + 1] for key, value in target.items()}) for b in range(2)]
    torch.testing.assert_close(loss(logits, target), (single[0] + single[1]) / 2)
    assert single[0] > 5 * functional.cross_entropy(logits[:1], target["label"][:1, 0])


@pytest.mark.parametrize("class_weight", CLASS_WEIGHTS)
def test_padding_adds_the_weight_of_its_class_alone(class_weight, rng):
    """The image and its boundary keep their weights; class weights are those of the padded image."""
    shape, wide = (2, 3, 6, 5), (2, 3, 9, 7)
    target = make_target("all classes", shape, rng)
    pad = [0, 2, 3, 0]  # columns behind, rows in front
    padded = {key: functional.pad(each, pad) for key, each in target.items()}
    inside = functional.pad(torch.ones(2, 1, 6, 5), pad).bool()
    options = {"class_weight": [0.5, 2.0, 3.0] if class_weight == "values" else class_weight, "sigma_mm": 2.0}
    logits = torch.zeros(wide, dtype=torch.float64)  # undecided, so that a voxel costs its weight times log 3
    both, alone = (
        DistanceWeightedCrossEntropyLoss(boundary_weight=w0, reduction="none", **options)(logits, padded)
        for w0 in (4.0, 0.0)
    )
    assert torch.equal(both[~inside], alone[~inside]) and (alone[~inside] > 0).all()
    own = target["distance_map"].gather(1, target["label"])
    near = 4 * torch.exp(-own.square() / 8) * math.log(3)
    torch.testing.assert_close((both - alone)[inside].view_as(near), near)


def test_slices_without_a_boundary_have_no_boundary_weight(rng):
    """Distances within slices: a slice that one class fills has zeros, the others of the same volume have not."""
    label = torch.from_numpy(rng.integers(0, 2, (1, 1, 5, 4, 3)))
    label[..., 1] = 1
    planes = [distances(label[..., k], 2) for k in range(3)]
    target = {"label": label, "distance_map": torch.stack(planes, -1)}
    loss = DistanceWeightedCrossEntropyLoss(class_weight=None, reduction="none")
    weight = loss(torch.zeros(1, 2, 5, 4, 3), target) / math.log(2)
    assert (weight[..., 1] - 1).abs().max() < 1e-6
    assert (weight[..., ::2] > 2).all()


def test_near_and_far(rng):
    """Next to the boundary the weight is full. Far off it is that of the class."""
    loss = DistanceWeightedCrossEntropyLoss(class_weight=None)
    for size in (1e-3, -1e-3):
        target = {"label": torch.zeros(1, 1, 2, 2), "distance_map": torch.full((1, 2, 2, 2), size)}
        assert loss(torch.zeros(1, 2, 2, 2), target).item() == pytest.approx(11 * math.log(2), rel=1e-5)
    logits, label = random_logits((1, 2, 4, 4), rng), torch.from_numpy(rng.integers(0, 2, (1, 1, 4, 4)))
    for far in (1e4, torch.inf):
        value = loss(logits, {"label": label, "distance_map": torch.full((1, 2, 4, 4), far)})
        torch.testing.assert_close(value, functional.cross_entropy(logits, label[:, 0]))


def test_millimetres_scale_with_sigma(rng):
    logits, target = random_logits((2, 3, 6, 5), rng), make_target("all classes", (2, 3, 6, 5), rng)
    finer = {"label": target["label"], "distance_map": distances(target["label"], 3, spacing=0.3)}
    value = DistanceWeightedCrossEntropyLoss(sigma_mm=2.0)(logits, target)
    torch.testing.assert_close(DistanceWeightedCrossEntropyLoss(sigma_mm=0.6)(logits, finer), value)
    assert DistanceWeightedCrossEntropyLoss(sigma_mm=2.0)(logits, finer) > value


# Gradients and precision


@pytest.mark.parametrize("case", ["all classes", "no foreground"])
def test_gradients(case, rng):
    shape = (2, 3, 3, 4)
    logits, target = random_logits(shape, rng).requires_grad_(), make_target(case, shape, rng)
    loss = DistanceWeightedCrossEntropyLoss(sigma_mm=1.0)
    assert torch.autograd.gradcheck(lambda x: loss(x, target), logits, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, target), logits, fast_mode=True)


def test_a_few_steps_on_an_empty_image_lower_the_false_positives():
    target = {"label": torch.zeros(1, 1, 16, 16).long(), "distance_map": torch.zeros(1, 2, 16, 16)}
    for class_weight in ("frequency", "balanced", None):
        bias = torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1).requires_grad_()
        loss = DistanceWeightedCrossEntropyLoss(class_weight=class_weight)
        for _ in range(20):
            (slope,) = torch.autograd.grad(loss(bias.expand(-1, -1, 16, 16), target), bias)
            bias = (bias - slope).detach().requires_grad_()
        assert torch.softmax(bias, 1)[0, 1].item() < 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype):
    """Distances whose square is above 65504, and a sum over 40,000 voxels that cost 10 each."""
    logits = torch.zeros(1, 2, 200, 200, dtype=dtype)
    logits[:, 1] = 10
    logits.requires_grad_()
    target = {"label": torch.zeros(1, 1, 200, 200), "distance_map": torch.full((1, 2, 200, 200), -400, dtype=dtype)}
    loss = DistanceWeightedCrossEntropyLoss(sigma_mm=400.0, class_weight=None, reduction="sum")
    value = loss(logits, target)
    value.backward()
    expected = 40_000 * (10 + math.log1p(math.exp(-10))) * (1 + 10 * math.exp(-0.5))
    assert value.dtype == torch.float32 and value.item() == pytest.approx(expected, rel=1e-4)
    assert logits.grad.dtype == dtype and logits.grad.isfinite().all()


def test_kinds_of_tensors(rng):
    """Maps and labels of other types, autocast, large logits, meta data; nothing is written to."""
    logits, target = random_logits((2, 3, 6, 5), rng).float(), make_target("all classes", (2, 3, 6, 5), rng)
    before = logits.clone(), {key: each.clone() for key, each in target.items()}
    loss = DistanceWeightedCrossEntropyLoss()
    expected = loss(logits, target)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        value = loss(logits, target | {"distance_map": target["distance_map"].to(dtype)})
        assert value.dtype == torch.float32 and value.item() == pytest.approx(expected.item(), rel=2e-3)
    for dtype in (torch.uint8, torch.int16, torch.float32):
        assert torch.equal(loss(logits, target | {"label": target["label"].to(dtype)}), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(logits, target), expected)
    value = loss(MetaTensor(logits), {key: MetaTensor(each) for key, each in target.items()})
    assert type(value) is torch.Tensor and torch.equal(value, expected)
    large = (1e4 * logits).requires_grad_()
    loss(large, target).backward()
    assert large.grad.isfinite().all()
    assert torch.equal(logits, before[0]) and all(torch.equal(target[key], before[1][key]) for key in target)


# Invariances and drop-in


@labels
def test_flip_and_permutations(case, rng):
    logits, target = random_logits((3, 4, 6, 5), rng), make_target(case, (3, 4, 6, 5), rng)
    label, maps = target["label"], target["distance_map"]
    order = torch.from_numpy(rng.permutation(4))
    for class_weight in ("frequency", "balanced", None):
        loss = DistanceWeightedCrossEntropyLoss(class_weight=class_weight)
        value = loss(logits, target)
        flipped = {key: each.flip(0, 2, 3) for key, each in target.items()}
        torch.testing.assert_close(loss(logits.flip(0, 2, 3), flipped), value)
        renamed = {"label": torch.argsort(order)[label], "distance_map": maps[:, order]}
        torch.testing.assert_close(loss(logits[:, order], renamed), value)
        torch.testing.assert_close(loss(logits + 7, {"label": label, "distance_map": -maps}), value)


def test_with_combined_loss(rng):
    logits, target = random_logits((2, 3, 6, 5), rng), make_target("all classes", (2, 3, 6, 5), rng)
    loss = DistanceWeightedCrossEntropyLoss()
    assert loss.target_keys == ("label", "distance_map")
    combined = CombinedLoss({"unet": loss}, weights={"unet": 0.5})
    torch.testing.assert_close(combined(logits, target), 0.5 * loss(logits, target))
    batch = {"seg": target["label"], "distance": target["distance_map"], "other": torch.zeros(2)}
    keys = {"unet": {"label": "seg", "distance_map": "distance"}}
    combined = CombinedLoss({"unet": loss}, keys=keys, weights={"unet": 0.5})
    torch.testing.assert_close(combined(logits, batch), 0.5 * loss(logits, target))


# Refusals

LABEL, MAP = torch.zeros(2, 1, 6, 5).long(), torch.zeros(2, 3, 6, 5)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (LABEL, r'target: expected a mapping .*"distance_map", got a Tensor; .*SignedDistanceMapd'),
        ({"label": LABEL}, r"target: expected a mapping .*got \['label'\]; .*SignedDistanceMapd"),
        ({"label": LABEL, "distance_map": MAP.char()}, r"^distance_map: .*got torch\.int8; .*DecodeDistanceMapd"),
        ({"label": LABEL, "distance_map": MAP[:, 1:]}, r"^distance_map: .*\(2, 3, 6, 5\), got \(2, 2, 6, 5\)"),
        ({"label": LABEL[0], "distance_map": MAP}, r"target: expected a label .*\(2, 1, 6, 5\) .*got .*\(1, 6, 5\)"),
        ({"label": LABEL + 3, "distance_map": MAP}, r"target: expected class numbers 0\.\.2 .*got 3\.\.3"),
        ({"label": LABEL + 0.5, "distance_map": MAP}, r"target: expected whole class numbers, got 0\.5; .*nearest"),
    ],
)
def test_refuses_targets(target, words):
    with pytest.raises(ValueError, match=words):
        DistanceWeightedCrossEntropyLoss()(torch.zeros(2, 3, 6, 5), target)


def test_refuses_what_does_not_fit():
    target = {"label": LABEL, "distance_map": MAP}
    for logits in (torch.ones(2, 3), torch.ones(2, 3, 6, 5).long(), torch.ones(2, 1, 6, 5)):
        with pytest.raises(ValueError, match=r"input: expected .*got"):
            DistanceWeightedCrossEntropyLoss()(logits, target)
    for values in ([1.0, 2.0], [1.0, 2.0, 3.0, 4.0]):
        with pytest.raises(ValueError, match=r"class_weight: expected 3 values.*got"):
            DistanceWeightedCrossEntropyLoss(class_weight=values)(MAP, target)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"boundary_weight": -1.0}, r"boundary_weight: expected .*got -1\.0"),
        ({"boundary_weight": math.inf}, r"boundary_weight: expected .*got inf"),
        ({"sigma_mm": 0.0}, r"sigma_mm: expected .*got 0\.0"),
        ({"class_weight": "inverse"}, r"class_weight: expected one of frequency, balanced, got 'inverse'"),
        ({"class_weight": [1.0, -1.0]}, r"class_weight: expected one finite number >= 0"),
        ({"class_weight": 2.0}, r"class_weight: expected one finite number >= 0"),
        ({"reduction": "average"}, "average"),
    ],
)
def test_refuses_senseless_settings(options, words):
    with pytest.raises(ValueError, match=words):
        DistanceWeightedCrossEntropyLoss(**options)
