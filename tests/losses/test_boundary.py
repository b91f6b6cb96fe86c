"""Boundary loss: values against a loop and MONAI's, gradients, its minimum, precision, targets that are no maps."""

import itertools
import math
import re
import warnings

import monai.losses
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedTrainer
from scipy import ndimage

from medconstraints.engines.prepare_batch import PrepareBatchTargets
from medconstraints.losses.boundary import BoundaryLoss

SHAPES = {"2D": (6, 5), "3D": (4, 3, 5)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
REDUCTIONS = ("mean", "sum", "none")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Two threads wait for each other longer than they need for tensors of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_labels(batch, num_classes, shape, seed=0):
    """(B, *S) class numbers in blobs."""
    rng = np.random.default_rng(seed)
    noise = rng.random((batch, num_classes, *shape))
    smooth = np.stack([[ndimage.gaussian_filter(one, 0.8) for one in sample] for sample in noise])
    return torch.from_numpy(smooth.argmax(1))


def one_hot(labels, num_classes):
    return torch.nn.functional.one_hot(labels, num_classes).movedim(-1, 1)


def logits_like(maps, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=tuple(maps.shape))).float()


@pytest.fixture(scope="module")
def maps_of(distance_reference):
    """(B, *S) class numbers -> maps (B, C, *S) float32, brute force."""

    def make(labels, num_classes, spacing=None, **options):
        maps = [distance_reference.maps(one, num_classes, spacing, **options) for one in labels.numpy()]
        return torch.from_numpy(np.stack(maps)).float()

    return make


@pytest.fixture(scope="module")
def case(maps_of):
    """Labels, maps and logits."""

    def make(num_classes=3, shape=(6, 5), batch=2, **options):
        labels = random_labels(batch, num_classes, shape)
        maps = maps_of(labels, num_classes, (0.5, 1.5, 3.0)[: len(shape)], **options)
        return labels, maps, logits_like(maps)

    return make


# Values

ROWS = {
    "foreground": ({}, [1, 2, 3]),
    "all": ({"include_background": True}, [0, 1, 2, 3]),
    "one class": ({"classes": [2]}, [2]),
    "classes, in another order": ({"classes": [3, 0]}, [3, 0]),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("options", "rows"), ROWS.values(), ids=ROWS)
def test_equals_the_reference(options, rows, reduction, case, distance_reference):
    """With and without a weight for each class, a unit, and a mean over the batch first."""
    for shape, batch, weighted in itertools.product(SHAPES.values(), (False, True), (False, True)):
        _, maps, logits = case(4, shape)
        probs = torch.softmax(logits, 1)
        weight, unit = ([0.5, 2.0, 0.0, 3.0][: len(rows)], 2.5) if weighted else (None, 1.0)
        expected = distance_reference.boundary_loss(
            probs.numpy(), maps.numpy(), rows=rows, reduction=reduction, batch=batch, weight=weight, unit=unit
        )
        loss = BoundaryLoss(reduction=reduction, batch=batch, weight=weight, unit_mm=unit, **options)
        value = loss(probs, maps)
        assert value.dtype == torch.float32
        assert value.shape == (() if reduction != "none" else (len(rows),) if batch else (2, len(rows)))
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_by_hand():
    """A strip of four pixels, the class in the last one: phi = 2.5, 1.5, 0.5, -0.5."""
    phi = torch.tensor([2.5, 1.5, 0.5, -0.5]).view(1, 1, 1, 4)
    loss = BoundaryLoss(include_background=True)
    for probs, expected in (([0, 0, 0, 1], -0.5), ([0, 0, 1, 1], 0.0), ([1, 1, 1, 1], 4.0), ([0, 0, 0, 0], 0.0)):
        value = loss(torch.tensor(probs, dtype=torch.float32).view(1, 1, 1, 4), phi)
        assert value.item() == pytest.approx(expected / 4, abs=1e-7)


ACTIVATIONS = {
    "softmax": ({"softmax": True}, lambda x: torch.softmax(x, 1), 3),
    "softmax, two channels": ({"softmax": True}, lambda x: torch.softmax(x, 1), 2),
    "sigmoid": ({"sigmoid": True}, torch.sigmoid, 3),
    "sigmoid, one channel": ({"sigmoid": True}, torch.sigmoid, 1),
    "other": ({"other_act": lambda x: torch.softmax(2 * x, 1)}, lambda x: torch.softmax(2 * x, 1), 3),
    "none": ({}, lambda x: x, 3),
}


@pytest.mark.parametrize(("options", "activation", "channels"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activation(options, activation, channels, case, distance_reference):
    """A single channel is a foreground; probabilities that are given are those of the input."""
    _, maps, logits = case(3)
    maps, logits = maps[:, -channels:], logits[:, -channels:]
    if not options:
        logits = torch.softmax(logits, 1)
    for include_background in (False, True):
        loss = BoundaryLoss(include_background=include_background, **options)
        rows = range(0 if include_background or channels == 1 else 1, channels)
        expected = distance_reference.boundary_loss(activation(logits).numpy(), maps.numpy(), rows=rows)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            value = loss(logits, maps)
        assert value.item() == pytest.approx(expected, rel=1e-4, abs=1e-6) and abs(expected) > 1e-3
        assert torch.allclose(loss(logits, maps, probabilities=loss.probabilities(logits)), value)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("num_classes", [2, 4])
def test_equals_monai(num_classes, reduction, maps_of):
    """With the published recipe at unit spacing; a class that is absent or everywhere included."""
    for shape, include_background, batch in itertools.product(SHAPES.values(), (False, True), (False, True)):
        labels = random_labels(4, num_classes, shape)
        labels[1][labels[1] == 1] = 0
        labels[2] = num_classes - 1
        maps = maps_of(labels, num_classes, convention="published")
        logits = logits_like(maps)
        options = {"include_background": include_background, "softmax": True, "reduction": reduction, "batch": batch}
        value = BoundaryLoss(**options)(logits, maps)
        expected = monai.losses.BoundaryLoss(**options)(logits, one_hot(labels, num_classes).float())
        assert (expected != 0).any()
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(
            BoundaryLoss(to_onehot_y=True, **options)(logits, maps), value
        )  # there is nothing to convert


def test_equals_monai_with_a_sigmoid(distance_reference):
    mask = (random_labels(3, 2, (4, 3, 5)) == 1)[:, None]
    maps = [[distance_reference.signed(one[0], convention="published")] for one in mask.numpy()]
    maps = torch.from_numpy(np.stack(maps)).float()
    for reduction in REDUCTIONS:
        options = {"include_background": True, "sigmoid": True, "reduction": reduction}
        expected = monai.losses.BoundaryLoss(**options)(logits_like(maps), mask.float())
        torch.testing.assert_close(BoundaryLoss(**options)(logits_like(maps), maps), expected, rtol=1e-5, atol=1e-5)


# What the thesis says of it


@shapes
def test_the_label_is_the_minimum(shape, case):
    for convention in ("boundary", "voxel"):
        labels, maps, _ = case(3, shape, convention=convention)
        best = one_hot(labels, 3).float()
        loss = BoundaryLoss(include_background=True)
        value = loss(best, maps)
        assert value < 0
        others = [torch.softmax(scale * logits_like(maps, seed), 1) for scale in (0.1, 5) for seed in (1, 2)]
        for sample, *voxel in itertools.product(range(2), *map(range, shape)):  # any single wrong voxel
            other = best.clone()
            place = (sample, slice(None), *voxel)
            other[place] = other[place].roll(1)
            others.append(other)
        others += [torch.zeros_like(best), torch.ones_like(best), best.roll(1, 1), 1 - best]
        assert all(loss(other, maps) > value for other in others)


@shapes
def test_eq_4_4(shape, case):
    """The sum over S minus the sum over G: the distances of the voxels in which they differ."""
    labels, maps, _ = case(2, shape)
    loss = BoundaryLoss(reduction="none")
    for seed in range(5):
        other = (logits_like(maps, seed)[:, 1] > 0).long()
        prediction, label = one_hot(other, 2).float(), one_hot(labels, 2).float()
        difference = math.prod(shape) * (loss(prediction, maps) - loss(label, maps))[:, 0]
        wrong = (maps[:, 1].abs() * (other != labels)).flatten(1).sum(1)
        assert (difference > 0).all()
        torch.testing.assert_close(difference, wrong, rtol=1e-4, atol=1e-4)


@shapes
def test_slope_at_a_voxel(shape, case):
    """phi over the number of voxels, samples and classes: probabilities grow inside and shrink outside."""
    labels, maps, logits = case(3, shape)
    probs, before = torch.softmax(logits, 1).requires_grad_(), maps.clone()
    (slope,) = torch.autograd.grad(BoundaryLoss()(probs, maps), probs)
    assert (slope[:, 0] == 0).all() and torch.equal(maps, before)
    torch.testing.assert_close(slope[:, 1:], maps[:, 1:] / (math.prod(shape) * 2 * 2))
    inside = one_hot(labels, 3)[:, 1:].bool()
    assert (slope[:, 1:][inside] < 0).all() and (slope[:, 1:][~inside] > 0).all()


def test_a_zero_map_costs_nothing():
    """Classes that are absent, as in a slice without them."""
    for reduction, dtype in itertools.product(REDUCTIONS, (torch.float32, torch.float16)):
        maps = torch.zeros(2, 3, 6, 5, dtype=dtype)
        logits = logits_like(maps).requires_grad_()
        value = BoundaryLoss(softmax=True, reduction=reduction)(logits, maps)
        value.sum().backward()
        assert (value == 0).all() and (logits.grad == 0).all()


def test_descends_to_the_label(case):
    """Alone it reaches the label from any start that is not empty."""
    labels, maps, logits = case(3, (6, 5))
    logits.requires_grad_()
    loss = BoundaryLoss(softmax=True, include_background=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(80):
        optimizer.zero_grad()
        loss(logits, maps).backward()
        optimizer.step()
    assert (logits.argmax(1) == labels).all()


# Derivatives

GRADCHECKS = {"softmax, 2": (2, "softmax"), "softmax, 3": (3, "softmax"), "sigmoid": (3, "sigmoid")}


@pytest.mark.parametrize(("channels", "activation"), GRADCHECKS.values(), ids=GRADCHECKS)
@pytest.mark.parametrize("include_background", [False, True])
def test_gradcheck(channels, activation, include_background, case):
    _, maps, logits = case(channels, (4, 3))
    maps, logits = maps.double(), logits.double().requires_grad_()
    loss = BoundaryLoss(**{activation: True}, include_background=include_background, reduction="none")
    assert torch.autograd.gradcheck(lambda x: loss(x, maps), logits)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, maps), logits)


def test_functional_derivatives(case):
    _, maps, logits = case(3)
    loss = BoundaryLoss(softmax=True)
    for dtype in (torch.float32, torch.float64, torch.float16):
        maps = maps.to(dtype)
        leaf = logits.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf, maps), leaf)
        assert (expected != 0).any()
        torch.testing.assert_close(torch.func.grad(loss)(logits, maps), expected)
        direction = logits_like(maps, 7)
        value, slope = torch.func.jvp(lambda x, maps=maps: loss(x, maps), (logits,), (direction,))
        torch.testing.assert_close(value, loss(logits, maps))
        # torch.func.jvp turns the slope of a 0-dim tensor that is multiplied by a Python number into float64.
        torch.testing.assert_close(slope.float(), (expected * direction).sum())


# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, case):
    """As exact as the input; the sum over 96^3 voxels is above what half precision can hold."""
    logits = torch.zeros(1, 2, 96, 96, 96, dtype=dtype)
    maps = torch.linspace(20, 120, 96).half().expand(1, 2, 96, 96, 96)
    exact = 0.5 * maps[0, 0, 0, 0].double().mean().item()
    for reduction in ("mean", "none"):
        value = BoundaryLoss(softmax=True, reduction=reduction)(logits, maps)
        assert value.dtype == torch.float32
        assert value.sum().item() == pytest.approx(exact, rel=1e-4)
    _, maps, logits = case(3)
    half, loss = logits.to(dtype).requires_grad_(), BoundaryLoss(softmax=True)
    value = loss(half, maps)
    torch.testing.assert_close(value, loss(half.detach().float(), maps))
    value.backward()
    assert half.grad.dtype == dtype and half.grad.isfinite().all() and (half.grad != 0).any()
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(loss(logits, maps), loss(logits.clone(), maps))


def test_types_of_maps_and_tensors(case):
    """A map stored in half precision counts as the same numbers in float32; meta data have no part in the result."""
    _, maps, logits = case(3)
    loss = BoundaryLoss(softmax=True)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        stored = maps.to(dtype)
        torch.testing.assert_close(loss(logits, stored), loss(logits, stored.float()), rtol=1e-5, atol=1e-6)
    value = loss(MetaTensor(logits), MetaTensor(maps))
    assert type(value) is torch.Tensor and torch.equal(value, loss(logits, maps))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(logits, maps)
    assert inside.dtype == torch.float32 and torch.equal(inside, loss(logits, maps))


def test_layouts_in_memory(case):
    _, maps, logits = case(3, (4, 3, 5))
    loss = BoundaryLoss(softmax=True)
    expected = loss(logits, maps)
    for turn in (
        lambda x: x.contiguous(memory_format=torch.channels_last_3d),
        lambda x: x.movedim(-1, 2).contiguous().movedim(2, -1),
    ):
        torch.testing.assert_close(loss(turn(logits), turn(maps)), expected)
    # A patch of a volume is a view.
    patch = (slice(None), slice(None), slice(1, 4), slice(0, 2), slice(2, 5))
    torch.testing.assert_close(loss(logits[patch], maps[patch]), loss(logits[patch].clone(), maps[patch].clone()))


# Invariances


def test_flips_permuted_classes_and_samples(case):
    _, maps, logits = case(4, (4, 3, 5), batch=3)
    loss = BoundaryLoss(softmax=True, reduction="none")
    for axes in ((2,), (3,), (4,), (2, 3, 4)):
        torch.testing.assert_close(loss(logits.flip(axes), maps.flip(axes)), loss(logits, maps))
    alone = torch.cat([loss(logits[i : i + 1], maps[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(loss(logits, maps), alone)
    probs = torch.softmax(logits, 1)
    order = torch.tensor([2, 0, 3, 1])  # channel k of the new tensors is order[k] of the old
    for classes, weight in (([1, 2], [1.0, 2.0]), ([0, 1, 3], [1.0, 2.0, 0.5])):
        moved = [order.tolist().index(number) for number in classes]
        for reduction in ("mean", "none"):
            one = BoundaryLoss(classes=classes, weight=weight, reduction=reduction)(probs, maps)
            two = BoundaryLoss(classes=moved, weight=weight, reduction=reduction)(probs[:, order], maps[:, order])
            torch.testing.assert_close(two, one)


# Targets that are maps although they look odd

ODD_MAPS = {
    "a patch far from the class, clipped": torch.full((1, 2, 4, 5), 20.0) * torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1),
    "the same without a map of the background": torch.full((1, 2, 4, 5), 20.0)
    * torch.tensor([0.0, 1.0]).view(1, 2, 1, 1),
    "one voxel in a row, published": torch.tensor([2.0, 1.0, 0.0, 1.0, 2.0]).expand(1, 2, 4, 5),
    "one side of a clipped map": torch.tensor([0.5, 1.0, 1.0, 1.0, 1.0]).expand(1, 2, 4, 5),
}


def test_maps_that_look_odd(distance_reference):
    """Patches do not have both signs, and clipped maps may be whole numbers. NaN is not looked for: that would cost."""
    for maps in ODD_MAPS.values():
        probs = torch.softmax(logits_like(maps), 1)
        expected = distance_reference.boundary_loss(probs.numpy(), maps.numpy(), rows=[1])
        assert BoundaryLoss()(probs, maps).item() == pytest.approx(expected, rel=1e-5)
    assert BoundaryLoss()(probs, maps * math.nan).isnan()


# In a batch


def test_a_mapping_with_the_map(case):
    """As PrepareBatchTargets gives it; other entries are not looked at."""
    _, maps, logits = case(3)
    loss = BoundaryLoss(softmax=True)
    assert loss.target_keys == ("distance_map",)
    for given in (maps, MetaTensor(maps)):
        assert torch.equal(loss(logits, {"image": None, "distance_map": given}), loss(logits, maps))
    for target, got in (({}, r"\[\]"), ({"label": maps}, r"\['label'\]"), ({"distance_map": [1.0]}, "distance_map")):
        with pytest.raises(ValueError, match=rf"^target: expected .*\"distance_map\", got .*{got}"):
            loss(logits, target)


def test_in_a_trainer_of_monai(case):
    """One epoch with the loss alone: weights move to the label."""
    labels, maps, _ = case(2, (6, 5), batch=4)
    images = (labels == 1)[:, None].float() - 0.5
    items = [{"image": image, "distance_map": MetaTensor(one)} for image, one in zip(images, maps, strict=True)]
    network, loss = torch.nn.Conv2d(1, 2, 1), BoundaryLoss(softmax=True)
    torch.nn.init.zeros_(network.weight)
    torch.nn.init.zeros_(network.bias)
    values = []
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=DataLoader(Dataset(items), batch_size=2),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
        loss_function=loss,
        prepare_batch=PrepareBatchTargets(loss),
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: values.append(engine.state.output[0]["loss"]))
    trainer.run()
    assert len(values) == 2 and math.isfinite(values[0]) and math.isfinite(values[1])
    assert values[0] == pytest.approx(0.5 * maps[:2, 1].mean().item(), rel=1e-5)
    assert network.weight[1].item() > 0 > network.weight[0].item()
    with torch.no_grad():
        assert loss(network(images), maps) < loss(0 * network(images), maps)


# Errors

LABELS = random_labels(2, 3, (6, 5))


def test_a_label_is_no_map():
    """Integers, class numbers in one channel or in none; those in floating point are warned of."""
    hot = one_hot(LABELS, 3)
    targets = [hot, hot.bool(), LABELS[:, None], LABELS]
    for target in targets:
        for given in (target, {"distance_map": target}):
            with pytest.raises(ValueError, match=r"^distance_map: expected .*SignedDistanceMapd"):
                BoundaryLoss(softmax=True)(torch.zeros(2, 3, 6, 5), given)
    with pytest.warns(UserWarning, match=r"^distance_map: .*as if a label had been given"):
        BoundaryLoss(sigmoid=True)(torch.zeros(2, 1, 6, 5), (LABELS == 1)[:, None].float())


@pytest.mark.parametrize("shape", [(2, 2, 6, 5), (1, 3, 6, 5), (2, 3, 5, 6), (2, 3, 6, 5, 1), (3, 6, 5), (1, 1, 6, 5)])
def test_shapes_have_to_fit(shape):
    """Nothing is broadcast."""
    words = rf"^distance_map: expected one map for each channel .*\(2, 3, 6, 5\), got {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=words):
        BoundaryLoss(softmax=True)(torch.zeros(2, 3, 6, 5), torch.randn(shape))


BAD = {
    "three axes": ({"softmax": True}, (3, 6, 5), ValueError, "input"),
    "softmax of one channel": ({"softmax": True}, (2, 1, 6, 5), ValueError, "input"),
    "two activations": ({"softmax": True, "other_act": torch.tanh}, (2, 3, 6, 5), ValueError, "other_act"),
    "no function": ({"other_act": "tanh"}, (2, 3, 6, 5), TypeError, "other_act"),
    "reduction": ({"reduction": "median"}, (2, 3, 6, 5), ValueError, "median"),
    "no classes": ({"classes": []}, (2, 3, 6, 5), ValueError, "classes"),
    "a class that is not there": ({"classes": [1, 3]}, (2, 3, 6, 5), ValueError, "classes"),
    "NaN weight": ({"weight": [1.0, math.nan]}, (2, 3, 6, 5), ValueError, "weight"),
    "weights for other classes": ({"weight": [1.0, 2.0, 3.0]}, (2, 3, 6, 5), ValueError, "weight"),
    "zero unit": ({"unit_mm": 0.0}, (2, 3, 6, 5), ValueError, "unit_mm"),
    "NaN unit": ({"unit_mm": math.nan}, (2, 3, 6, 5), ValueError, "unit_mm"),
}


@pytest.mark.parametrize(("options", "shape", "error", "match"), BAD.values(), ids=BAD)
def test_bad_arguments(options, shape, error, match):
    """At construction, or at the latest when the number of classes is known."""
    with pytest.raises(error, match=match):
        BoundaryLoss(**options)(torch.zeros(shape), torch.randn(shape))


def test_either_class_of_two_alone():
    """The shortcut of two channels, for the background and for the foreground."""
    logits, maps = torch.randn(2, 2, 4, 5), torch.randn(2, 2, 4, 5)
    for cls in (0, 1):
        expected = (logits.softmax(1) * maps)[:, cls].mean()
        torch.testing.assert_close(BoundaryLoss(softmax=True, classes=[cls])(logits, maps), expected)
