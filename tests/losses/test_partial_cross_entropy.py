"""Partial cross-entropy: against PyTorch on the labelled voxels and the slow reference, no labels, refusals."""

import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch.nn import functional

from medconstraints.losses import PartialCrossEntropyLoss

SHAPES = {"2D": (2, 3, 6, 5), "3D": (2, 4, 3, 4, 5)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def weak_label(shape, rng, share=0.3, ignore_index=-1):
    """Class numbers on a share of the voxels, ignore_index elsewhere: (B, 1, *S)."""
    size = (shape[0], 1, *shape[2:])
    labels = rng.integers(0, shape[1], size)
    labels[rng.random(size) > share] = ignore_index
    labels.flat[:2] = [0, ignore_index]
    return torch.from_numpy(labels)


def random_logits(shape, rng):
    """Logits, double."""
    return torch.from_numpy(rng.normal(scale=2, size=shape))


# Values


@reductions
@pytest.mark.parametrize(("ignore_index", "weighted", "share"), [(-1, False, 0.05), (255, True, 0.3), (-1, True, 2.0)])
@pytest.mark.parametrize("average", ["image", "batch"])
@shapes
def test_equals_the_reference_and_pytorch(
    shape, average, ignore_index, weighted, share, reduction, rng, constraint_reference
):
    """Few labels, some, and almost all."""
    logits, label = random_logits(shape, rng), weak_label(shape, rng, share, ignore_index)
    weight = torch.from_numpy(rng.uniform(0.2, 3, shape[1])) if weighted else None
    loss = PartialCrossEntropyLoss(ignore_index=ignore_index, weight=weight, reduction=reduction, average=average)
    if weighted:
        loss = loss.double()
    value = loss(logits, label)
    expected = constraint_reference.partial_cross_entropy(
        logits.numpy(), label.numpy(), ignore_index=ignore_index, weight=weight, reduction=reduction, average=average
    )
    assert value.shape == (label.shape if reduction == "none" else ())
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-6, atol=1e-12)
    if average == "batch":
        official = functional.cross_entropy(
            logits, label[:, 0], weight=weight, ignore_index=ignore_index, reduction=reduction
        )
        torch.testing.assert_close(value.reshape(official.shape), official, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_points_keep_their_pull_beside_a_full_label(batch):
    """Five points of an image; the others are labelled in full: the gradient is that of each image alone."""
    label = torch.zeros(batch, 1, 64, 64, dtype=torch.int64)
    label[0] = -1
    label[0, 0, 30, 30:35] = 1
    logits = torch.zeros(batch, 2, 64, 64, requires_grad=True)
    PartialCrossEntropyLoss()(logits, label).backward()
    points = logits.grad[0, 1, 30, 30:35]
    torch.testing.assert_close(points, torch.full((5,), -0.5 / 5 / batch))
    alone = torch.zeros(1, 2, 64, 64, requires_grad=True)
    PartialCrossEntropyLoss()(alone, label[:1]).backward()
    torch.testing.assert_close(logits.grad[:1] * batch, alone.grad)


def test_an_image_without_labels_is_not_counted(rng):
    logits, label = random_logits((3, 3, 6, 5), rng), weak_label((3, 3, 6, 5), rng)
    label[1] = -1
    torch.testing.assert_close(
        PartialCrossEntropyLoss()(logits, label), PartialCrossEntropyLoss()(logits[[0, 2]], label[[0, 2]])
    )


def test_by_hand():
    """Two labelled pixels of four: -(log 1/2 + log 3/4) / 2."""
    logits = torch.tensor([[[[0.0, 0.0], [9.0, 1.0]], [[0.0, math.log(3.0)], [-9.0, 1.0]]]])
    label = torch.tensor([[[[0, 1], [-1, -1]]]])
    expected = -(math.log(0.5) + math.log(0.75)) / 2
    assert PartialCrossEntropyLoss()(logits, label).item() == pytest.approx(expected, rel=1e-6)


def test_weights_are_those_of_pytorch_as_a_sequence_too(rng):
    logits, label = random_logits((2, 3, 6, 5), rng).float(), weak_label((2, 3, 6, 5), rng)
    weight = [0.2, 1.0, 4.0]
    expected = functional.cross_entropy(logits, label[:, 0], weight=torch.tensor(weight), ignore_index=-1)
    for given in (weight, tuple(weight), torch.tensor(weight)):
        torch.testing.assert_close(PartialCrossEntropyLoss(weight=given, average="batch")(logits, label), expected)


# No labels


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 3.0])])
@reductions
def test_no_labelled_voxel_costs_nothing(reduction, weight, rng):
    logits = random_logits((2, 3, 6, 5), rng).half().requires_grad_()
    value = PartialCrossEntropyLoss(weight=weight, reduction=reduction)(logits, torch.full((2, 1, 6, 5), -1))
    value.sum().backward()
    assert (value == 0).all() and (logits.grad == 0).all()


def test_labels_of_weight_zero_cost_nothing(rng):
    logits = random_logits((1, 2, 6, 5), rng).float().requires_grad_()
    value = PartialCrossEntropyLoss(weight=torch.tensor([0.0, 1.0]))(logits, torch.zeros(1, 1, 6, 5).long())
    value.backward()
    assert value.item() == 0 and (logits.grad == 0).all()


# Gradients and precision


@shapes
@pytest.mark.parametrize("weight", [None, "classes"])
def test_gradcheck(shape, weight, rng):
    logits, label = random_logits(shape, rng).requires_grad_(), weak_label(shape, rng)
    weight = None if weight is None else torch.linspace(0.5, 2, shape[1], dtype=torch.float64)
    loss = PartialCrossEntropyLoss(weight=weight).double()
    assert torch.autograd.gradcheck(lambda x: loss(x, label), logits, fast_mode=True)


def test_unlabelled_voxels_have_no_gradient(rng):
    logits, label = random_logits((2, 3, 6, 5), rng).requires_grad_(), weak_label((2, 3, 6, 5), rng)
    PartialCrossEntropyLoss()(logits, label).backward()
    without = (label == -1).expand_as(logits)
    assert (logits.grad[without] == 0).all() and (logits.grad[~without] != 0).all()


def test_unlabelled_voxels_may_hold_anything(rng):
    logits, label = random_logits((2, 3, 6, 5), rng), weak_label((2, 3, 6, 5), rng)
    other = torch.where(label == -1, torch.full_like(logits, 1e4), logits)
    torch.testing.assert_close(PartialCrossEntropyLoss()(other, label), PartialCrossEntropyLoss()(logits, label))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_half_precision_does_not_overflow(reduction):
    """20,000 labelled pixels that cost log 2 each, and as many that cost 10."""
    logits = torch.zeros(1, 2, 200, 200, dtype=torch.float16)
    logits[:, 1, 100:] = 10
    logits.requires_grad_()
    value = PartialCrossEntropyLoss(reduction=reduction)(logits, torch.zeros(1, 1, 200, 200).long())
    value.backward()
    expected = 20_000 * (math.log(2) + 10 + math.log1p(math.exp(-10)))
    assert value.dtype == torch.float32 and logits.grad.dtype == torch.float16 and logits.grad.isfinite().all()
    assert value.item() == pytest.approx(expected / (40_000 if reduction == "mean" else 1), rel=1e-4)


@pytest.mark.slow
def test_half_precision_of_a_large_volume():
    logits = torch.zeros(1, 2, 512, 512, 200, dtype=torch.float16, requires_grad=True)
    value = PartialCrossEntropyLoss(reduction="sum")(logits, torch.zeros(1, 1, 512, 512, 200).long())
    value.backward()
    assert value.dtype == torch.float32 and logits.grad.isfinite().all()
    assert value.item() == pytest.approx(512 * 512 * 200 * math.log(2), rel=1e-4)


def test_autocast_changes_nothing(rng):
    logits, label = random_logits((2, 3, 6, 5), rng).float(), weak_label((2, 3, 6, 5), rng)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = PartialCrossEntropyLoss()(logits, label)
    assert inside.dtype == torch.float32 and torch.equal(inside, PartialCrossEntropyLoss()(logits, label))


# Invariances and drop-in


def test_flip_and_permutations(rng):
    logits, label = random_logits((2, 3, 6, 5), rng), weak_label((2, 3, 6, 5), rng)
    label[1] = -1  # a sample without labels
    loss, order = PartialCrossEntropyLoss(), [2, 0, 1]
    value = loss(logits, label)
    torch.testing.assert_close(loss(logits.flip(0, 2, 3), label.flip(0, 2, 3)), value)
    renamed = torch.tensor([order.index(0), order.index(1), order.index(2), -1])[label]
    torch.testing.assert_close(loss(logits[:, order], renamed), value)
    torch.testing.assert_close(loss(logits + 7, label), value)
    torch.testing.assert_close(loss(logits[:1], label[:1]), value)


def test_meta_tensors_give_a_plain_tensor(rng):
    logits, label = random_logits((2, 3, 6, 5), rng), weak_label((2, 3, 6, 5), rng)
    image = MetaTensor(logits.clone()).requires_grad_()
    value = PartialCrossEntropyLoss()(image, MetaTensor(label))
    assert type(value) is torch.Tensor and torch.equal(value, PartialCrossEntropyLoss()(logits, label))
    value.backward()
    assert image.grad.isfinite().all()


def test_unsigned_labels_with_their_own_mark(rng):
    logits, label = random_logits((2, 3, 6, 5), rng), weak_label((2, 3, 6, 5), rng, ignore_index=255)
    loss = PartialCrossEntropyLoss(ignore_index=255)
    assert torch.equal(loss(logits, label.to(torch.uint8)), loss(logits, label))
    assert torch.equal(loss(logits, {"weak_label": label.to(torch.int16)}), loss(logits, label))


def test_input_and_target_are_not_changed(rng):
    logits, label = random_logits((2, 3, 6, 5), rng), weak_label((2, 3, 6, 5), rng)
    before = logits.clone(), label.clone()
    PartialCrossEntropyLoss()(logits, label)
    assert torch.equal(logits, before[0]) and torch.equal(label, before[1])


# Refusals


@pytest.mark.parametrize("wrong", [3, -2])
def test_refuses_a_label_that_is_no_class(wrong, rng):
    label = weak_label((2, 3, 6, 5), rng)
    label[1, 0, 2, 3] = wrong
    with pytest.raises(ValueError, match=rf"target: expected .*-1.*got.*{wrong}"):
        PartialCrossEntropyLoss()(random_logits((2, 3, 6, 5), rng), label)


@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 3, 6, 5), (1, 1, 6, 5)])
def test_refuses_a_label_of_another_shape(shape, rng):
    with pytest.raises(ValueError, match=r"target: expected .*\(2, 1, 6, 5\).*got"):
        PartialCrossEntropyLoss()(random_logits((2, 3, 6, 5), rng), torch.zeros(shape).long())


@pytest.mark.parametrize("logits", [torch.ones(2, 3), torch.ones(2, 3, 6, 5, dtype=torch.int64)])
def test_refuses_what_are_no_logits(logits):
    with pytest.raises(ValueError, match=r"input: expected .*got"):
        PartialCrossEntropyLoss()(logits, torch.zeros(2, 1, 6, 5).long())


def test_refuses_weights_of_other_classes(rng):
    weight = [1.0, 2.0]
    with pytest.raises(ValueError, match=r"weight: expected .*3.*got"):
        PartialCrossEntropyLoss(weight=weight)(random_logits((2, 3, 6, 5), rng).float(), torch.zeros(2, 1, 6, 5).long())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight": [1.0, -1.0]}, r"weight: expected .*got"),
        ({"ignore_index": 0.5}, r"ignore_index: expected .*got 0\.5"),
        ({"reduction": "average"}, "average"),
    ],
)
def test_refuses_senseless_settings(options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        PartialCrossEntropyLoss(**options)


def test_labels_between_classes_are_refused():
    """Linear interpolation of a weak label makes background of the border of what is not annotated."""
    weak = torch.tensor([-0.4, 1.7, -1.0, -1.0]).view(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"target: expected whole class numbers, got -0\.4; .*nearest"):
        PartialCrossEntropyLoss()(torch.zeros(1, 3, 2, 2), weak)


def test_says_how_many_images_have_no_annotation():
    loss, weak = PartialCrossEntropyLoss(), torch.full((4, 1, 3, 3), -1)
    assert loss.terms() == {}
    weak[2, 0, 1, 1] = 1
    loss(torch.zeros(4, 2, 3, 3), weak)
    assert loss.terms()["unlabelled"] == 0.75
    loss.left_out()
    assert loss.terms() == {}
