"""Generalised Dice: against a slow reference and MONAI, absent classes, empty images, image size, refusals."""

import itertools
import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.losses import GeneralizedDiceLoss as MonaiGeneralizedDiceLoss
from monai.utils import Weight

from medconstraints.losses.generalized_dice import GeneralizedDiceLoss

SHAPES = {"2D": (2, 2, 6, 5), "3D": (2, 3, 3, 4, 5), "many classes": (3, 7, 6, 5)}
POWERS = {"square": 2, "simple": 1, "uniform": 0}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
w_types = pytest.mark.parametrize("w_type", POWERS)
backgrounds = pytest.mark.parametrize("include_background", [True, False])
few_and_many_classes = pytest.mark.parametrize("classes", [3, 7])


def random_logits(shape, rng):
    """Logits, double."""
    return torch.from_numpy(rng.normal(scale=2, size=shape))


def random_probs(shape, rng):
    """Probabilities that add up to 1, double."""
    return torch.from_numpy(np.moveaxis(rng.dirichlet(np.ones(shape[1]), (shape[0], *shape[2:])), -1, 1).copy())


def make_label(case, shape, rng):
    """Class numbers (B, 1, *S)."""
    classes, size = shape[1], (shape[0], 1, *shape[2:])
    label = {
        "all classes": rng.integers(0, classes, size),
        "class 1 is absent": rng.choice([c for c in range(classes) if c != 1], size),
        "no foreground": np.zeros(size, int),
        "full foreground": np.full(size, classes - 1),
        "one voxel": np.zeros(size, int),
    }[case]
    if case == "one voxel":
        label[:, 0, -1, 2] = 0
        label.reshape(shape[0], -1)[:, 7] = classes - 1
    if case == "class 1 is absent":
        label[0] = rng.integers(0, classes, size[1:])  # in the other samples, not in this one
    return torch.from_numpy(label)


LABELS = ["class 1 is absent", "no foreground", "full foreground", "one voxel"]
labels = pytest.mark.parametrize("case", LABELS)


def one_hot(label, classes):
    """(B, C, *S), double."""
    return torch.cat([(label == c).double() for c in range(classes)], 1)


def reference(probs, label, *, w_type="square", include_background=True, batch=False):
    """Sums class by class, (B, 1): eq. 4.1 for any number of classes."""
    probs, label = probs.detach().double().numpy(), label.numpy()
    classes = range(0 if include_background or probs.shape[1] == 1 else 1, probs.shape[1])
    values = []
    for group in [slice(None)] if batch else [slice(b, b + 1) for b in range(len(probs))]:
        s = {c: probs[group, c] for c in classes}
        g = {c: (label[group, 0] == c).astype(float) for c in classes}
        weight = {c: g[c].sum() ** -POWERS[w_type] for c in classes if g[c].any()}
        if weight:
            weight = {c: weight.get(c, max(weight.values())) for c in classes}
            overlap = sum(weight[c] * (g[c] * s[c]).sum() for c in classes)
            values.append(1 - 2 * overlap / sum(weight[c] * (s[c] + g[c]).sum() for c in classes))
        else:
            values.append(sum(s[c].sum() for c in classes) / s[classes[0]].size)
    return np.array(values)[:, None]


def gradient(loss, logits, label):
    logits = logits.clone().requires_grad_()
    loss(logits, label).backward()
    return logits.grad


# Values


@w_types
@labels
@shapes
def test_equals_the_reference(shape, case, w_type, rng):
    probs, label = random_probs(shape, rng), make_label(case, shape, rng)
    for include_background, batch in itertools.product([True, False], repeat=2):
        options = {"w_type": w_type, "include_background": include_background, "batch": batch}
        value = GeneralizedDiceLoss(reduction="none", **options)(probs, label)
        assert value.shape == (1 if batch else shape[0], *[1] * (len(shape) - 1))
        np.testing.assert_allclose(value.flatten(1).numpy(), reference(probs, label, **options), rtol=1e-10)


@pytest.mark.parametrize(
    ("reduction", "reduce", "activation"), [("mean", np.mean, "softmax"), ("sum", np.sum, "sigmoid")]
)
@shapes
def test_reductions_and_activations(shape, activation, reduction, reduce, rng):
    logits, label = random_logits(shape, rng), make_label("all classes", shape, rng)
    probs = torch.softmax(logits, 1) if activation == "softmax" else torch.sigmoid(logits)
    value = GeneralizedDiceLoss(reduction=reduction, **{activation: True})(logits, label)
    assert value.item() == pytest.approx(reduce(reference(probs, label)), rel=1e-10)


@w_types
@pytest.mark.parametrize("smooth", [0.0, 1e-3])
@pytest.mark.parametrize("case", ["class 1 is absent", "one voxel"])
@pytest.mark.parametrize("shape", [SHAPES["3D"], SHAPES["many classes"]])
def test_monais_arguments_mean_what_they_mean_in_monai(shape, case, smooth, w_type, rng):
    logits, label = random_logits(shape, rng), make_label(case, shape, rng)
    activations = [{"softmax": True}, {"sigmoid": True}, {"other_act": torch.nn.functional.softplus}]
    for number, (include_background, batch) in enumerate(itertools.product([True, False], repeat=2)):
        options = {"include_background": include_background, "batch": batch, "w_type": w_type, "reduction": "none"}
        options |= {"smooth_nr": smooth, "smooth_dr": 2 * smooth, **activations[number % 3]}
        monai = MonaiGeneralizedDiceLoss(**options, to_onehot_y=True)(logits, label)
        value = GeneralizedDiceLoss(**options, to_onehot_y=True)(logits, label)
        torch.testing.assert_close(value.flatten(), monai.flatten(), rtol=1e-5, atol=1e-6)
        if not batch:
            assert value.shape == monai.shape
        one = one_hot(label, shape[1])
        torch.testing.assert_close(GeneralizedDiceLoss(**options)(logits, one), value)
        soft = 0.8 * one + 0.2 / shape[1]
        monai = MonaiGeneralizedDiceLoss(**options, soft_label=True)(logits, soft)
        value = GeneralizedDiceLoss(**options, soft_label=True)(logits, soft)
        torch.testing.assert_close(value.flatten(), monai.flatten(), rtol=1e-5, atol=1e-6)


def test_a_weight_of_monai_is_taken():
    assert GeneralizedDiceLoss(w_type=Weight.SIMPLE).w_type == "simple"


def test_by_hand_two_regions():
    """Equation 4.1: one voxel of foreground of four, probability 1/2: w_G = 1, w_B = 1/9."""
    label = torch.tensor([[[[0, 0], [0, 1]]]])
    value = GeneralizedDiceLoss()(torch.full((1, 2, 2, 2), 0.5), label)
    assert value.item() == pytest.approx(1 - 2 * (1 * 0.5 + 1.5 / 9) / (1 * (2 + 1) + (2 + 3) / 9), rel=1e-6)


@backgrounds
@labels
@shapes
def test_perfect_is_zero_and_all_wrong_is_one(shape, case, include_background, rng):
    label = make_label(case, shape, rng)
    loss = GeneralizedDiceLoss(include_background=include_background)
    assert loss(one_hot(label, shape[1]), label).item() == pytest.approx(0, abs=1e-12)
    wrong = one_hot((label + 1) % shape[1], shape[1])
    assert loss(wrong, label).item() == pytest.approx(1)


@few_and_many_classes
def test_one_hot_and_every_type_of_label_give_the_same(classes, rng):
    case = "class 1 is absent"
    shape = (2, classes, 6, 5)
    logits, label = random_logits(shape, rng), make_label(case, shape, rng)
    loss = GeneralizedDiceLoss(softmax=True)
    value = loss(logits, label)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.float16, torch.float32, torch.float64):
        torch.testing.assert_close(loss(logits, label.to(dtype)), value)
        torch.testing.assert_close(loss(logits, one_hot(label, classes).to(dtype)), value)
    torch.testing.assert_close(loss(logits, one_hot(label, classes).bool()), value)
    torch.testing.assert_close(loss(logits, {"label": label}), value)
    torch.testing.assert_close(loss(logits, label, probabilities=loss.probabilities(logits)), value)


def test_soft_labels(rng):
    probs, soft = (torch.softmax(random_logits((1, 3, 6, 5), rng), 1) for _ in range(2))
    weight = soft.sum((2, 3)) ** -2
    overlap, total = (probs * soft).sum((2, 3)), (probs + soft).sum((2, 3))
    expected = 1 - 2 * (weight * overlap).sum() / (weight * total).sum()
    torch.testing.assert_close(GeneralizedDiceLoss()(probs, soft), expected)


def test_a_single_channel_is_a_foreground(rng):
    logits, mask = random_logits((2, 1, 6, 5), rng), torch.from_numpy(rng.integers(0, 2, (2, 1, 6, 5)))
    probs = torch.sigmoid(logits)
    expected = 1 - 2 * (probs * mask).sum((1, 2, 3)) / (probs + mask).sum((1, 2, 3))
    for include_background in (True, False):
        loss = GeneralizedDiceLoss(sigmoid=True, include_background=include_background)
        torch.testing.assert_close(loss(logits, mask), expected.mean())
        torch.testing.assert_close(loss(logits, torch.zeros_like(mask)), probs.mean())


# Images without foreground, absent classes


@w_types
@few_and_many_classes
def test_an_empty_image_costs_its_false_positives(classes, w_type, rng):
    """With and without background: the mean false positive, and the same gradient."""
    shape = (2, classes, 6, 5)
    logits, label = random_logits(shape, rng), torch.zeros(2, 1, 6, 5).long()
    probs = torch.softmax(logits, 1)
    expected = gradient(lambda x, _: torch.softmax(x, 1)[:, 1:].sum(1).mean(), logits, label)
    for include_background in (True, False):
        loss = GeneralizedDiceLoss(softmax=True, w_type=w_type, include_background=include_background)
        torch.testing.assert_close(loss(logits, label), (1 - probs[:, 0]).mean())
        torch.testing.assert_close(gradient(loss, logits, label), expected)


def test_monai_does_not_train_on_an_empty_image_without_background(rng):
    logits, label = random_logits((1, 2, 16, 16), rng), torch.zeros(1, 1, 16, 16).long()
    options = {"softmax": True, "include_background": False}
    monai = MonaiGeneralizedDiceLoss(to_onehot_y=True, **options)
    assert (gradient(monai, logits, label) == 0).all()
    assert (gradient(GeneralizedDiceLoss(**options), logits, label)[:, 1] > 0).all()


@backgrounds
@pytest.mark.parametrize(("case", "classes"), [("no foreground", 2), ("absent", 3), ("absent", 7)])
def test_absent_classes_have_a_gradient_like_that_of_uniform_dice(case, classes, include_background):
    """All voxels undecided; a quarter of the image has class 1 and the further ones are absent, or nothing but 0."""
    label = torch.zeros(1, 1, 16, 16).long()
    if case == "absent":
        label[..., :8, :8] = 1
    probs = torch.full((1, classes, 16, 16), 1 / classes, dtype=torch.float64)
    loss = GeneralizedDiceLoss(softmax=True, include_background=include_background)
    uniform = MonaiGeneralizedDiceLoss(softmax=True, w_type="uniform", to_onehot_y=True, smooth_nr=0, smooth_dr=0)
    absent = slice(1 if case == "no foreground" else 2, None)
    ours, theirs = (gradient(each, probs.log(), label)[:, absent] for each in (loss, uniform))
    assert (ours.sum((2, 3)) > 0).all() and (theirs.sum((2, 3)) > 0).all()
    assert 1 / 3 < (ours.sum() / theirs.sum()).item() < 3


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@backgrounds
def test_a_few_steps_on_an_empty_image_lower_the_false_positives(include_background, activation):
    """A network that has only its last bias, which starts on the side of the foreground."""
    bias = torch.tensor([-1.0, 1.0, 0.5] if activation == "softmax" else [1.0]).view(1, -1, 1, 1).requires_grad_()
    loss = GeneralizedDiceLoss(include_background=include_background, **{activation: True})
    label = torch.zeros(1, 1, 16, 16).long()

    def false_positives(bias):
        return 1 - torch.softmax(bias, 1)[0, 0].item() if activation == "softmax" else torch.sigmoid(bias).item()

    before = false_positives(bias)
    for _ in range(20):
        (slope,) = torch.autograd.grad(loss(bias.expand(-1, -1, 16, 16), label), bias)
        bias = (bias - 3 * slope).detach().requires_grad_()
    assert before > 0.7 and false_positives(bias) < 0.1


# Any number of voxels


@pytest.mark.parametrize("case", ["no foreground", "one voxel"])
@backgrounds
@few_and_many_classes
def test_the_number_of_voxels_does_not_matter(classes, include_background, case, rng):
    """An image of sixteen times the voxels, each class in proportion: the same loss and the same total gradient."""
    shape = (2, classes, 6, 5)
    logits, label = random_logits(shape, rng), make_label(case, shape, rng)
    loss = GeneralizedDiceLoss(softmax=True, include_background=include_background)
    torch.testing.assert_close(loss(logits.repeat(1, 1, 4, 4), label.repeat(1, 1, 4, 4)), loss(logits, label))
    large = gradient(loss, logits.repeat(1, 1, 4, 4), label.repeat(1, 1, 4, 4))
    parts = large.unflatten(3, (4, 5)).unflatten(2, (4, 6)).sum((2, 4))
    torch.testing.assert_close(parts, gradient(loss, logits, label))


@few_and_many_classes
def test_large_images_in_half_precision(classes):
    """A million voxels, one of them of class 1: sums above 65504 and a ratio of the weights of 1e-12."""
    label = torch.zeros(1, 1, 1024, 1024, dtype=torch.uint8)
    label[..., 500, 500] = 1
    logits = torch.zeros(1, classes, 1024, 1024, dtype=torch.float16)
    logits[:, 0] = 9
    logits[0, :2, 500, 500] = logits.new_tensor([0.0, 9.0])
    logits.requires_grad_()
    value = GeneralizedDiceLoss(softmax=True, include_background=False)(logits, label)
    value.backward()
    rest = 1 / (math.exp(9) + classes - 1)
    false_positives = (classes - 1) * (2**20 - 1) * rest + (classes - 2) * rest
    expected = 1 - 2 * (1 - (classes - 1) * rest) / (1 - (classes - 1) * rest + 1 + false_positives)
    assert value.dtype == torch.float32 and value.item() == pytest.approx(expected, rel=1e-4)
    assert logits.grad.dtype == torch.float16 and logits.grad.isfinite().all()


# Gradients


@backgrounds
@labels
@shapes
def test_gradcheck(shape, case, include_background, rng):
    logits, label = random_logits(shape, rng).requires_grad_(), make_label(case, shape, rng)
    loss = GeneralizedDiceLoss(softmax=True, include_background=include_background, batch=case == "one voxel")
    assert torch.autograd.gradcheck(lambda x: loss(x, label), logits, fast_mode=True)


def test_gradient_of_a_soft_label(rng):
    """Labels that are learned: an absent class in the other sample must not spoil the gradient."""
    probs, soft = (torch.softmax(random_logits((2, 3, 3, 4), rng), 1) for _ in range(2))
    soft[1, 2] = 0
    soft.requires_grad_()
    GeneralizedDiceLoss()(probs, soft).backward()
    assert soft.grad.isfinite().all() and (soft.grad[0] != 0).any()


def test_no_probability_at_all_is_finite():
    """A sigmoid that is exactly 0 on an empty image: 0 / 0 nowhere, in the gradient neither."""
    logits = torch.full((1, 1, 4, 4), -200.0, requires_grad=True)
    value = GeneralizedDiceLoss(sigmoid=True)(logits, torch.zeros(1, 1, 4, 4))
    value.backward()
    assert value.item() == 0 and logits.grad.isfinite().all()


# Invariances and drop-in


@few_and_many_classes
def test_flip_and_permutations(classes, rng):
    case = "class 1 is absent"
    shape = (3, classes, 6, 5)
    logits, label = random_logits(shape, rng), make_label(case, shape, rng)
    loss, order = GeneralizedDiceLoss(softmax=True), torch.from_numpy(rng.permutation(classes))
    value = loss(logits, label)
    torch.testing.assert_close(loss(logits.flip(0, 2, 3), label.flip(0, 2, 3)), value)
    torch.testing.assert_close(loss(logits.transpose(2, 3), label.transpose(2, 3)), value)
    torch.testing.assert_close(loss(logits[:, order], torch.argsort(order)[label]), value)


def test_batch_is_one_long_image(rng):
    logits, label = random_logits((3, 3, 6, 5), rng), make_label("class 1 is absent", (3, 3, 6, 5), rng)
    for include_background in (True, False):
        options = {"softmax": True, "include_background": include_background}
        for each in (label, torch.zeros_like(label)):
            together = GeneralizedDiceLoss(**options)(torch.cat([*logits], 1)[None], torch.cat([*each], 1)[None])
            torch.testing.assert_close(GeneralizedDiceLoss(batch=True, **options)(logits, each), together)


def test_autocast_changes_nothing(rng):
    logits, label = random_logits((2, 3, 6, 5), rng).float(), make_label("all classes", (2, 3, 6, 5), rng)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = GeneralizedDiceLoss(softmax=True)(logits, label)
    assert inside.dtype == torch.float32 and torch.equal(inside, GeneralizedDiceLoss(softmax=True)(logits, label))


def test_meta_tensors_give_a_plain_tensor(rng):
    logits, label = random_logits((2, 3, 6, 5), rng), make_label("all classes", (2, 3, 6, 5), rng)
    loss = GeneralizedDiceLoss(softmax=True)
    image = MetaTensor(logits.clone()).requires_grad_()
    value = loss(image, MetaTensor(label))
    assert type(value) is torch.Tensor and torch.equal(value, loss(logits, label))
    value.backward()
    assert image.grad.isfinite().all()


def test_input_and_target_are_not_changed(rng):
    logits, label = random_logits((2, 3, 6, 5), rng), make_label("all classes", (2, 3, 6, 5), rng)
    before = logits.clone(), label.clone()
    GeneralizedDiceLoss(softmax=True)(logits, label)
    assert torch.equal(logits, before[0]) and torch.equal(label, before[1])


# Refusals


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (torch.full((2, 1, 6, 5), 3), r"target: expected class numbers 0\.\.2 .*got 3\.\.3; map"),
        (torch.full((2, 1, 6, 5), 255, dtype=torch.uint8), r"target: expected class numbers .*got 255"),
        (torch.full((2, 1, 6, 5), 0.5), r"target: expected whole class numbers, got 0\.5; .*nearest"),
        (torch.full((2, 3, 6, 5), -0.1), r"target: expected a one-hot label of values between 0 and 1, got -0\.1"),
        (torch.zeros(2, 6, 5), r"target: expected a label \(2, 1, 6, 5\) .*one-hot \(2, 3, 6, 5\), got .*\(2, 6, 5\)"),
        (torch.zeros(2, 2, 6, 5), r"target: expected a label .*got torch\.float32 of shape \(2, 2, 6, 5\)"),
        (torch.zeros(2, 1, 6, 6), r"target: expected a label .*\(2, 1, 6, 5\) .*got .*\(2, 1, 6, 6\)"),
    ],
)
def test_refuses_targets(target, words):
    with pytest.raises(ValueError, match=words):
        GeneralizedDiceLoss(softmax=True)(torch.zeros(2, 3, 6, 5), target)


def test_refuses_class_numbers_for_a_single_channel():
    with pytest.raises(ValueError, match=r"target: .*between 0 and 1, got 2\.\.2; .*one channel a mask"):
        GeneralizedDiceLoss(sigmoid=True)(torch.zeros(2, 1, 6, 5), torch.full((2, 1, 6, 5), 2))


@pytest.mark.parametrize("input", [torch.zeros(2, 3), torch.zeros(2, 3, 6, 5).long(), torch.zeros(2, 1, 6, 5)])
def test_refuses_what_are_no_logits_of_a_softmax(input):
    with pytest.raises(ValueError, match="input: "):
        GeneralizedDiceLoss(softmax=True)(input, torch.zeros(2, 1, 6, 5))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"w_type": "inverse"}, r"w_type: expected one of \['square', 'simple', 'uniform'\], got 'inverse'"),
        ({"smooth_nr": -1.0}, "smooth_nr: expected a finite number >= 0"),
        ({"reduction": "average"}, "average"),
    ],
)
def test_refuses_senseless_settings(options, words):
    with pytest.raises(ValueError, match=words):
        GeneralizedDiceLoss(**options)


def test_a_one_hot_target_that_is_to_be_made_one_hot_is_refused():
    with pytest.raises(ValueError, match=r"target: expected a label \(B, 1, \*S\)"):
        GeneralizedDiceLoss(softmax=True, to_onehot_y=True)(torch.zeros(2, 3, 6, 5), torch.zeros(2, 3, 6, 5))
