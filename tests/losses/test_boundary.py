"""Boundary loss: values against a loop and MONAI's, gradients, its minimum, precision, targets that are no maps."""

import importlib.util
import itertools
import math
import re
import warnings
from pathlib import Path

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


def _load_reference():
    path = Path(__file__).parents[1] / "reference" / "distance_reference.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = _load_reference()
SHAPES = {"2D": (6, 5), "3D": (4, 3, 5)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


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


def maps_of(labels, num_classes, spacing=None, **options):
    """(B, C, *S) float32, brute force."""
    maps = [reference.maps(one, num_classes, spacing, **options) for one in labels.numpy()]
    return torch.from_numpy(np.stack(maps)).float()


def logits_like(maps, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=tuple(maps.shape))).float()


def case(num_classes=3, shape=(6, 5), batch=2, **options):
    labels = random_labels(batch, num_classes, shape)
    maps = maps_of(labels, num_classes, (0.5, 1.5, 3.0)[: len(shape)], **options)
    return labels, maps, logits_like(maps)


# Values

ROWS = {
    "foreground": ({}, [1, 2, 3]),
    "all": ({"include_background": True}, [0, 1, 2, 3]),
    "classes": ({"classes": [1, 3]}, [1, 3]),
    "one class": ({"classes": [2]}, [2]),
    "classes with the background": ({"classes": (0, 2)}, [0, 2]),
    "classes, in another order": ({"classes": [3, 1]}, [3, 1]),
}


@pytest.mark.parametrize("batch", [False, True])
@reductions
@pytest.mark.parametrize(("options", "rows"), ROWS.values(), ids=ROWS)
@shapes
def test_equals_the_reference(shape, options, rows, reduction, batch):
    _, maps, logits = case(4, shape)
    probs = torch.softmax(logits, 1)
    expected = reference.boundary_loss(probs.numpy(), maps.numpy(), rows=rows, reduction=reduction, batch=batch)
    value = BoundaryLoss(reduction=reduction, batch=batch, **options)(probs, maps)
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
    "sigmoid": ({"sigmoid": True}, torch.sigmoid, 3),
    "sigmoid, one channel": ({"sigmoid": True}, torch.sigmoid, 1),
    "other": ({"other_act": lambda x: torch.softmax(2 * x, 1)}, lambda x: torch.softmax(2 * x, 1), 3),
    "none": ({}, lambda x: x, 3),
}


@pytest.mark.parametrize(("options", "activation", "channels"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activation(options, activation, channels):
    _, maps, logits = case(3)
    maps, logits = maps[:, -channels:], logits[:, -channels:]
    value = BoundaryLoss(include_background=True, **options)(logits, maps)
    expected = reference.boundary_loss(activation(logits).numpy(), maps.numpy())
    assert value.item() == pytest.approx(expected, rel=1e-4, abs=1e-6) and abs(expected) > 1e-3


def test_one_channel_is_a_foreground():
    _, maps, logits = case(2)
    maps, logits = maps[:, 1:], logits[:, 1:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = BoundaryLoss(sigmoid=True)(logits, maps)
    assert value.item() == pytest.approx(
        reference.boundary_loss(torch.sigmoid(logits).numpy(), maps.numpy()), rel=1e-4, abs=1e-6
    )


@pytest.mark.parametrize("batch", [False, True])
@reductions
@pytest.mark.parametrize("include_background", [False, True])
@pytest.mark.parametrize("num_classes", [2, 3, 4])
@shapes
def test_equals_monai(shape, num_classes, include_background, reduction, batch):
    """With the published recipe at unit spacing; a class that is absent or everywhere included."""
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
    assert torch.equal(BoundaryLoss(to_onehot_y=True, **options)(logits, maps), value)  # there is nothing to convert


@reductions
def test_equals_monai_with_a_sigmoid(reduction):
    mask = (random_labels(3, 2, (4, 3, 5)) == 1)[:, None]
    maps = torch.from_numpy(np.stack([[reference.signed(one[0], convention="published")] for one in mask.numpy()]))
    logits = logits_like(maps)
    options = {"include_background": True, "sigmoid": True, "reduction": reduction}
    expected = monai.losses.BoundaryLoss(**options)(logits, mask.float())
    torch.testing.assert_close(BoundaryLoss(**options)(logits, maps.float()), expected, rtol=1e-5, atol=1e-5)


def test_reductions():
    _, maps, logits = case(4)
    none, total, mean = (
        BoundaryLoss(softmax=True, reduction=reduction)(logits, maps) for reduction in ("none", "sum", "mean")
    )
    assert none.shape == (2, 3) and total.shape == mean.shape == ()
    torch.testing.assert_close(none.sum(), total)
    torch.testing.assert_close(total / 6, mean)


@reductions
@pytest.mark.parametrize("options", [{}, {"include_background": True}, {"classes": [1, 3]}], ids=str)
def test_weight(options, reduction):
    """One for each class that counts, in their order."""
    _, maps, logits = case(4)
    rows = options.get("classes", [0, 1, 2, 3] if options else [1, 2, 3])
    weight = [0.5, 2.0, 0.0, 3.0][: len(rows)]
    expected = reference.boundary_loss(
        torch.softmax(logits, 1).numpy(), maps.numpy(), rows=rows, weight=weight, reduction=reduction
    )
    for given in (weight, tuple(weight), torch.tensor(weight)):
        value = BoundaryLoss(softmax=True, weight=given, reduction=reduction, **options)(logits, maps)
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("unit", [0.5, 10.0])
def test_unit_of_length(unit):
    _, maps, logits = case(3)
    value = BoundaryLoss(softmax=True, unit_mm=unit)(logits, maps)
    torch.testing.assert_close(value, BoundaryLoss(softmax=True)(logits, maps) / unit)
    expected = reference.boundary_loss(torch.softmax(logits, 1).numpy(), maps.numpy(), rows=[1, 2], unit=unit)
    assert value.item() == pytest.approx(expected, rel=1e-4)


# What the thesis says of it


@pytest.mark.parametrize("convention", ["boundary", "voxel"])
@shapes
def test_the_label_is_the_minimum(shape, convention):
    labels, maps, _ = case(3, shape, convention=convention)
    best = one_hot(labels, 3).float()
    loss = BoundaryLoss(include_background=True)
    value = loss(best, maps)
    assert value < 0
    others = [torch.softmax(scale * logits_like(maps, seed), 1) for scale, seed in itertools.product((0.1, 5), (1, 2))]
    for sample, *voxel in itertools.product(range(2), *map(range, shape)):  # any single wrong voxel
        other = best.clone()
        place = (sample, slice(None), *voxel)
        other[place] = other[place].roll(1)
        others.append(other)
    others += [torch.zeros_like(best), torch.ones_like(best), best.roll(1, 1), 1 - best]
    assert all(loss(other, maps) > value for other in others)


@shapes
def test_eq_4_4(shape):
    """The sum over S minus the sum over G: the distances of the voxels in which they differ."""
    labels, maps, _ = case(2, shape)
    label = one_hot(labels, 2).float()
    loss = BoundaryLoss(reduction="none")
    voxels = math.prod(shape)
    for seed in range(5):
        other = (logits_like(maps, seed)[:, 1] > 0).long()
        prediction = one_hot(other, 2).float()
        difference = voxels * (loss(prediction, maps) - loss(label, maps))[:, 0]
        wrong = (maps[:, 1].abs() * (other != labels)).flatten(1).sum(1)
        assert (difference > 0).all()
        torch.testing.assert_close(difference, wrong, rtol=1e-4, atol=1e-4)


@shapes
def test_slope_at_a_voxel(shape):
    """phi over the number of voxels, samples and classes: probabilities grow inside and shrink outside."""
    labels, maps, logits = case(3, shape)
    probs = torch.softmax(logits, 1).requires_grad_()
    (slope,) = torch.autograd.grad(BoundaryLoss()(probs, maps), probs)
    assert (slope[:, 0] == 0).all()
    torch.testing.assert_close(slope[:, 1:], maps[:, 1:] / (math.prod(shape) * 2 * 2))
    inside = one_hot(labels, 3)[:, 1:].bool()
    assert (slope[:, 1:][inside] < 0).all() and (slope[:, 1:][~inside] > 0).all()


@reductions
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_zero_map_costs_nothing(reduction, dtype):
    """Classes that are absent, as in a slice without them."""
    logits = logits_like(torch.zeros(2, 3, 6, 5)).requires_grad_()
    value = BoundaryLoss(softmax=True, reduction=reduction)(logits, torch.zeros(2, 3, 6, 5, dtype=dtype))
    value.sum().backward()
    assert (value == 0).all() and (logits.grad == 0).all()


def test_descends_to_the_label():
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
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(channels, activation, reduction):
    _, maps, logits = case(channels, (4, 3))
    maps, logits = maps.double(), logits.double().requires_grad_()
    loss = BoundaryLoss(**{activation: True}, include_background=True, reduction=reduction, weight=[1, 2, 3][:channels])
    assert torch.autograd.gradcheck(lambda x: loss(x, maps), logits)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, maps), logits)


@pytest.mark.parametrize("map_dtype", [torch.float32, torch.float64, torch.float16])
def test_functional_derivatives(map_dtype):
    _, maps, logits = case(3)
    maps = maps.to(map_dtype)
    loss = BoundaryLoss(softmax=True)
    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, maps), leaf)
    assert (expected != 0).any()
    torch.testing.assert_close(torch.func.grad(loss)(logits, maps), expected)
    direction = logits_like(maps, 7)
    value, slope = torch.func.jvp(lambda x: loss(x, maps), (logits,), (direction,))
    torch.testing.assert_close(value, loss(logits, maps))
    # torch.func.jvp turns the slope of a 0-dim tensor that is multiplied by a Python number into float64.
    torch.testing.assert_close(slope.float(), (expected * direction).sum())


def test_no_gradient_to_the_target():
    _, maps, logits = case(3)
    before = maps.clone()
    logits.requires_grad_()
    BoundaryLoss(softmax=True)(logits, maps).backward()
    assert maps.grad is None and torch.equal(maps, before)


# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("map_dtype", [torch.float32, torch.float16])
def test_half_precision_at_the_size_of_a_volume(dtype, map_dtype):
    """The sum over 96^3 voxels is above what half precision can hold."""
    logits = torch.zeros(1, 2, 96, 96, 96, dtype=dtype)
    maps = torch.linspace(20, 120, 96).to(map_dtype).expand(1, 2, 96, 96, 96)
    exact = 0.5 * maps[0, 0, 0, 0].double().mean().item()
    for reduction in ("mean", "none"):
        value = BoundaryLoss(softmax=True, reduction=reduction)(logits, maps)
        assert value.dtype == torch.float32
        assert value.sum().item() == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_values(dtype):
    """As exact as the input: what is computed with it is float32."""
    _, maps, logits = case(3)
    half = logits.to(dtype).requires_grad_()
    value = BoundaryLoss(softmax=True)(half, maps)
    expected = BoundaryLoss(softmax=True)(half.detach().float(), maps)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)
    value.backward()
    assert half.grad.dtype == dtype and half.grad.isfinite().all() and (half.grad != 0).any()


def test_autocast_changes_nothing():
    _, maps, logits = case(3)
    loss = BoundaryLoss(softmax=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(logits, maps)
    assert value.dtype == torch.float32 and torch.equal(value, loss(logits, maps))


@pytest.mark.parametrize("map_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_of_maps(map_dtype):
    """A map stored in half precision counts as the same numbers in float32."""
    _, maps, logits = case(3)
    stored = maps.to(map_dtype)
    value = BoundaryLoss(softmax=True)(logits, stored)
    torch.testing.assert_close(value, BoundaryLoss(softmax=True)(logits, stored.float()), rtol=1e-5, atol=1e-6)


def test_meta_tensors():
    _, maps, logits = case(3)
    value = BoundaryLoss(softmax=True)(MetaTensor(logits), MetaTensor(maps))
    assert type(value) is torch.Tensor
    torch.testing.assert_close(value, BoundaryLoss(softmax=True)(logits, maps))


def test_layouts_in_memory():
    _, maps, logits = case(3, (4, 3, 5))
    expected = BoundaryLoss(softmax=True)(logits, maps)
    for turn in (
        lambda x: x.contiguous(memory_format=torch.channels_last_3d),
        lambda x: x.movedim(-1, 2).contiguous().movedim(2, -1),
    ):
        torch.testing.assert_close(BoundaryLoss(softmax=True)(turn(logits), turn(maps)), expected)
    # A patch of a volume is a view.
    patch = (slice(None), slice(None), slice(1, 4), slice(0, 2), slice(2, 5))
    torch.testing.assert_close(
        BoundaryLoss(softmax=True)(logits[patch], maps[patch]),
        BoundaryLoss(softmax=True)(logits[patch].clone(), maps[patch].clone()),
    )


# Invariances


@pytest.mark.parametrize("axes", [(2,), (3,), (4,), (2, 3, 4)])
def test_flips(axes):
    _, maps, logits = case(3, (4, 3, 5))
    loss = BoundaryLoss(softmax=True)
    torch.testing.assert_close(loss(logits.flip(axes), maps.flip(axes)), loss(logits, maps))


def test_permuted_classes():
    _, maps, logits = case(4)
    probs = torch.softmax(logits, 1)
    order = torch.tensor([2, 0, 3, 1])  # channel k of the new tensors is order[k] of the old
    for classes, weight in (([1, 2], [1.0, 2.0]), ([0, 1, 3], [1.0, 2.0, 0.5])):
        moved = [order.tolist().index(number) for number in classes]
        for reduction in ("mean", "none"):
            one = BoundaryLoss(classes=classes, weight=weight, reduction=reduction)(probs, maps)
            two = BoundaryLoss(classes=moved, weight=weight, reduction=reduction)(probs[:, order], maps[:, order])
            torch.testing.assert_close(two, one)


def test_samples_are_independent():
    _, maps, logits = case(3, batch=3)
    loss = BoundaryLoss(softmax=True, reduction="none")
    alone = torch.cat([loss(logits[i : i + 1], maps[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(loss(logits, maps), alone)


# Targets that are maps although they look odd

ODD_MAPS = {
    "a patch far from the class, clipped": torch.full((1, 2, 4, 5), 20.0) * torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1),
    "the same without a map of the background": torch.full((1, 2, 4, 5), 20.0)
    * torch.tensor([0.0, 1.0]).view(1, 2, 1, 1),
    "far from a straight edge, published": torch.arange(3.0, 8.0).expand(1, 2, 4, 5),
    "one voxel in a row, published": torch.tensor([2.0, 1.0, 0.0, 1.0, 2.0]).expand(1, 2, 4, 5),
    "one side of a clipped map": torch.tensor([0.5, 1.0, 1.0, 1.0, 1.0]).expand(1, 2, 4, 5),
    "inside alone": torch.full((1, 2, 4, 5), -20.0),
}


@pytest.mark.parametrize("maps", ODD_MAPS.values(), ids=ODD_MAPS)
def test_maps_that_look_odd(maps):
    """Patches do not have both signs, and clipped maps may be whole numbers."""
    probs = torch.softmax(logits_like(maps), 1)
    value = BoundaryLoss()(probs, maps)
    assert value.item() == pytest.approx(reference.boundary_loss(probs.numpy(), maps.numpy(), rows=[1]), rel=1e-5)


def test_nan_in_a_map_is_not_looked_for():
    """A look at every voxel of every batch would cost more than the loss."""
    _, maps, logits = case(3)
    maps[0, 1, 2, 3] = math.nan
    assert BoundaryLoss(softmax=True)(logits, maps).isnan()


# A mapping with the map


@pytest.mark.parametrize("kind", [torch.Tensor, MetaTensor])
def test_a_mapping_with_the_map(kind):
    """As PrepareBatchTargets gives it; other entries are not looked at."""
    _, maps, logits = case(3)
    target = {"image": None, "distance_map": maps.as_subclass(torch.Tensor) if kind is torch.Tensor else kind(maps)}
    for reduction in ("mean", "none"):
        loss = BoundaryLoss(softmax=True, reduction=reduction)
        assert torch.equal(loss(logits, target), loss(logits, maps))


def test_in_a_trainer_of_monai():
    """One epoch with the loss alone: weights move to the label."""
    labels, maps, _ = case(2, (6, 5), batch=4)
    images = (labels == 1)[:, None].float() - 0.5
    items = [{"image": image, "distance_map": MetaTensor(one)} for image, one in zip(images, maps, strict=True)]
    network = torch.nn.Conv2d(1, 2, 1)
    torch.nn.init.zeros_(network.weight)
    torch.nn.init.zeros_(network.bias)
    values = []
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=DataLoader(Dataset(items), batch_size=2),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
        loss_function=BoundaryLoss(softmax=True),
        prepare_batch=PrepareBatchTargets(("distance_map",)),
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: values.append(engine.state.output[0]["loss"]))
    trainer.run()
    assert len(values) == 2 and math.isfinite(values[0]) and math.isfinite(values[1])
    assert values[0] == pytest.approx(0.5 * maps[:2, 1].mean().item(), rel=1e-5)
    assert network.weight[1].item() > 0 > network.weight[0].item()
    with torch.no_grad():
        loss = BoundaryLoss(softmax=True)
        assert loss(network(images), maps) < loss(0 * network(images), maps)


# Errors

LABELS = random_labels(2, 3, (6, 5))
NO_MAPS = {
    "one-hot, integers": one_hot(LABELS, 3),
    "one-hot, uint8": one_hot(LABELS, 3).to(torch.uint8),
    "one-hot, bool": one_hot(LABELS, 3).bool(),
    "one-hot, float": one_hot(LABELS, 3).float(),
    "one-hot, float16": one_hot(LABELS, 3).half(),
    "one-hot, background alone": one_hot(torch.zeros_like(LABELS), 3).float(),
    "class numbers in one channel": LABELS[:, None],
    "class numbers in one channel, float": LABELS[:, None].float(),
    "class numbers without a channel": LABELS,
}


@pytest.mark.parametrize("target", NO_MAPS.values(), ids=NO_MAPS)
def test_a_label_is_no_map(target):
    for given in (target, {"distance_map": target}):
        with pytest.raises(ValueError, match=r"^target: expected a distance map .*SignedDistanceMapd"):
            BoundaryLoss(softmax=True)(torch.zeros(2, 3, 6, 5), given)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({}, r"got \[\]"),
        ({"label": LABELS}, r"got \['label'\]; make it with SignedDistanceMapd .* PrepareBatchTargets\(target_keys"),
        ({"distance_map": [1.0]}, r"got \['distance_map'\]"),
    ],
)
def test_a_mapping_without_a_map(target, words):
    with pytest.raises(ValueError, match=rf"^target: expected .* a mapping with the tensor \"distance_map\", {words}"):
        BoundaryLoss(softmax=True)(torch.zeros(2, 3, 6, 5), target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_mask_is_no_map(dtype):
    with pytest.raises(ValueError, match=r"target.*SignedDistanceMapd"):
        BoundaryLoss(sigmoid=True)(torch.zeros(2, 1, 6, 5), (LABELS == 1)[:, None].to(dtype))


def test_a_map_in_integers_has_to_be_decoded():
    """SignedDistanceMapd stores int8 at most; other integers with a sign are no map of ours."""
    _, maps, logits = case(3)
    for dtype in (torch.int8, torch.int16, torch.int64):
        with pytest.raises(ValueError, match=rf"^target: .* floating point, got {dtype}; .*DecodeDistanceMapd"):
            BoundaryLoss(softmax=True)(logits, (10 * maps).to(dtype))


SHAPES_THAT_DO_NOT_FIT = {
    "classes": (2, 2, 6, 5),
    "classes without the background": (2, 4, 6, 5),
    "samples": (1, 3, 6, 5),
    "height": (2, 3, 5, 5),
    "transposed": (2, 3, 5, 6),
    "one axis more": (2, 3, 6, 5, 1),
    "one axis less": (3, 6, 5),
    "one sample for all": (1, 1, 6, 5),
}


@pytest.mark.parametrize("shape", SHAPES_THAT_DO_NOT_FIT.values(), ids=SHAPES_THAT_DO_NOT_FIT)
def test_shapes_have_to_fit(shape):
    """Nothing is broadcast."""
    got = re.escape(str(tuple(shape)))
    words = rf"^target: expected a distance map for each channel of the input, \(2, 3, 6, 5\), got {got}; make it with"
    with pytest.raises(ValueError, match=words):
        BoundaryLoss(softmax=True)(torch.zeros(2, 3, 6, 5), torch.randn(shape))


def test_bad_inputs():
    with pytest.raises(ValueError, match="input"):
        BoundaryLoss(softmax=True)(torch.zeros(3, 6, 5), torch.randn(3, 6, 5))
    with pytest.raises(ValueError, match="input"):
        BoundaryLoss()(torch.zeros(2, 3, 6, 5, dtype=torch.int64), torch.randn(2, 3, 6, 5))
    with pytest.raises(ValueError, match="input"):
        BoundaryLoss(softmax=True)(torch.zeros(2, 1, 6, 5), torch.randn(2, 1, 6, 5))


BAD_ARGUMENTS = {
    "both activations": ({"sigmoid": True, "softmax": True}, ValueError, "sigmoid"),
    "softmax and another": ({"softmax": True, "other_act": torch.tanh}, ValueError, "other_act"),
    "sigmoid and another": ({"sigmoid": True, "other_act": torch.tanh}, ValueError, "other_act"),
    "no function": ({"other_act": "tanh"}, TypeError, "other_act"),
    "reduction": ({"reduction": "median"}, ValueError, "median"),
    "no classes": ({"classes": []}, ValueError, "classes"),
    "negative class": ({"classes": [-1]}, ValueError, "classes"),
    "half a class": ({"classes": [0.5]}, ValueError, "classes"),
    "negative weight": ({"weight": [1.0, -1.0]}, ValueError, "weight"),
    "NaN weight": ({"weight": [1.0, math.nan]}, ValueError, "weight"),
    "weights for other classes": ({"classes": [1, 2], "weight": [1.0]}, ValueError, "weight"),
    "zero unit": ({"unit_mm": 0.0}, ValueError, "unit_mm"),
    "negative unit": ({"unit_mm": -1.0}, ValueError, "unit_mm"),
    "NaN unit": ({"unit_mm": math.nan}, ValueError, "unit_mm"),
}


@pytest.mark.parametrize(("options", "error", "match"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(options, error, match):
    """At construction, or at the latest when the number of classes is known."""
    with pytest.raises(error, match=match):
        BoundaryLoss(**options)(torch.zeros(2, 3, 6, 5), torch.randn(2, 3, 6, 5))


def test_arguments_that_do_not_fit_the_input():
    for options, match in (({"classes": [1, 3]}, "classes"), ({"weight": [1.0, 2.0, 3.0]}, "weight")):
        with pytest.raises(ValueError, match=match):
            BoundaryLoss(**options)(torch.zeros(2, 3, 6, 5), torch.randn(2, 3, 6, 5))


def test_options_are_keywords():
    with pytest.raises(TypeError):
        BoundaryLoss(True)
