"""Box prior loss: against the slow reference, symmetries, precision, and what its minimum looks like."""

import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from medconstraints.formulations import (
    AugmentedLagrangian,
    Lagrangian,
    LogBarrierExtension,
    QuadraticPenalty,
    ReLULagrangian,
)
from medconstraints.losses import BoxPriorLoss, CombinedLoss

PAD2 = [-1] * 5

# name: shape of the probabilities, rows of each sample, options of the loss
CASES = {
    "2D, one channel": ((2, 1, 12, 10), [[[1, 2, 3, 9, 8]], [[1, 0, 0, 5, 5]]], {"width": 2}),
    "2D, width above the box": ((1, 2, 12, 10), [[[1, 2, 3, 9, 8]]], {"width": 40}),
    "2D, several and overlapping": (
        (2, 2, 14, 14),
        [[[1, 0, 0, 6, 6], [1, 3, 3, 9, 9], [1, 10, 10, 14, 14]], [[1, 2, 2, 5, 12], PAD2, PAD2]],
        {"width": 3},
    ),
    "2D, many on top of each other, and a small one": (
        (2, 2, 24, 24),
        [[[1, k, k, 24 - k, 23 - k] for k in range(10)], [[1, 3, 3, 9, 8]]],
        {"width": 4},
    ),
    "2D, classes": (
        (2, 4, 11, 12),
        [[[1, 1, 1, 8, 8], [2, 3, 3, 10, 11], [3, 0, 0, 4, 9]], [PAD2, [3, 2, 2, 3, 9], PAD2]],
        {"width": 2, "filling": [(0.5, 0.9), (0.2, 0.4), (0.0, 1.0)]},
    ),
    "2D, a class and a sample without boxes": ((2, 3, 9, 9), [[[2, 1, 1, 6, 6]], []], {"width": 3}),
    "2D, no boxes": ((2, 3, 9, 9), [[], []], {}),
    "2D, cut beside a whole one": ((2, 2, 12, 12), [[[1, -2, 1, 4, 6], [1, 6, 6, 11, 11]], []], {"width": 2}),
    "2D, cut": ((2, 2, 9, 9), [[[1, -2, 1, 6, 6]], [[1, 2, 2, 8, 7]]], {"width": 2}),
    "2D, one voxel, one line": ((2, 2, 6, 8), [[[1, 2, 3, 3, 4]], [[1, 2, 1, 3, 7]]], {"width": 2}),
    "3D, classes": (
        (2, 3, 9, 8, 7),
        [
            [[1, 0, 0, 0, 6, 6, 6], [1, 3, 3, 3, 9, 8, 7], [2, 1, 1, 1, 5, 7, 6]],
            [[2, 0, 0, 0, 5, 5, 5], [2, -1, 2, 2, 7, 7, 7]],
        ],
        {"width": 2, "filling": [(0.3, 0.6), (0.4, 0.7)]},
    ),
    "slices 0": (
        (2, 3, 4, 7, 8),
        [[[1, 0, 1, 1, 1, 6, 7], [1, 0, 3, 3, 1, 7, 8], [2, 3, 0, 0, 4, 7, 8]], [[2, 1, 2, 2, 2, 3, 3]]],
        {"width": 2, "slice_axis": 0, "filling": [(0.3, 0.6), (0.4, 0.7)]},
    ),
    "slices 1": ((1, 2, 9, 4, 8), [[[1, 1, 0, 1, 6, 1, 7], [1, -2, 3, 2, 4, 4, 7]]], {"width": 3, "slice_axis": 1}),
    "slices 2": ((2, 1, 7, 8, 3), [[[1, 1, 1, 0, 6, 7, 1]], [[1, 0, 0, 2, 7, 8, 3]]], {"width": 3, "slice_axis": 2}),
}
table = pytest.mark.parametrize(("shape", "rows", "options"), CASES.values(), ids=CASES)
normalizations = pytest.mark.parametrize("normalization", ["relative", "paper"])
emptinesses = pytest.mark.parametrize("emptiness", ["constraint", "cross_entropy"])
NAMES = ("tightness", "size", "emptiness")
WEIGHTS = dict(zip(NAMES, (0.7, 1.3, 0.4), strict=True))


def tensor_of(rows, dims):
    """Padded boxes (B, N, 1 + 2 D)."""
    boxes = torch.full((len(rows), max(map(len, rows)), 1 + 2 * dims), -1)
    for sample, own in enumerate(rows):
        if own:
            boxes[sample, : len(own)] = torch.tensor(own)
    return boxes


def weighted(formulation, **options):
    """A loss with three different weights."""
    return BoxPriorLoss(formulation, weights=WEIGHTS, **options)


def only(name):
    """Weights of one term."""
    return {other: float(other == name) for other in NAMES}


def random_probs(shape, rng):
    """Softmax probabilities (a sigmoid for one channel), double."""
    logits = torch.from_numpy(rng.normal(size=shape))
    return torch.sigmoid(logits) if shape[1] == 1 else torch.softmax(logits, 1)


def psi(z, t=5.0):
    return -math.log(-z) / t if z <= -1 / t**2 else t * z - math.log(1 / t**2) / t + 1 / t


# Against the reference


@emptinesses
@normalizations
@table
def test_equals_the_reference(shape, rows, options, normalization, emptiness, rng, box_prior_reference):
    probs, boxes = random_probs(shape, rng), tensor_of(rows, len(shape) - 2)
    settings = {**options, "normalization": normalization, "emptiness": emptiness}
    images = len(box_prior_reference.images_of(probs.numpy(), rows, options.get("slice_axis")))
    for module, cost in (
        (LogBarrierExtension(), box_prior_reference.log_barrier(5.0)),
        (QuadraticPenalty(), box_prior_reference.quadratic),
    ):
        expected = box_prior_reference.box_prior(probs.numpy(), rows, cost, weights=tuple(WEIGHTS.values()), **settings)
        for reduction in ("mean", "sum", "none"):
            loss = weighted(module, reduction=reduction, **settings)
            value = loss(probs, boxes)
            count = images if reduction == "mean" and normalization == "paper" else 1
            if reduction == "none":
                np.testing.assert_allclose(value.numpy(), expected.sum(-1), rtol=1e-9, atol=1e-12)
            else:
                assert value.shape == ()
                assert value.item() == pytest.approx(expected.sum() / count, rel=1e-9, abs=1e-12)
            terms = loss.terms()
            assert set(terms) == {*NAMES, "satisfied_tightness", "satisfied_size"}
            assert all(term.shape == () and not term.requires_grad for term in terms.values())
            own = [terms[name].item() for name in NAMES]
            assert own == pytest.approx((expected.sum((0, 1)) / count).tolist(), rel=1e-6)


@normalizations
def test_float32_gradient_equals_the_differences_of_the_reference(normalization, rng, box_prior_reference):
    shape, rows, options = CASES["2D, several and overlapping"]
    probs = 0.05 + 0.9 * random_probs(shape, rng)
    cost = box_prior_reference.log_barrier(5.0)
    single = probs.float().requires_grad_()
    weighted(LogBarrierExtension(), normalization=normalization, **options)(single, tensor_of(rows, 2)).backward()

    def value(array):
        terms = box_prior_reference.box_prior(
            array, rows, cost, weights=tuple(WEIGHTS.values()), normalization=normalization, **options
        )
        return terms.sum() / (shape[0] if normalization == "paper" else 1)

    step = 1e-5
    for index in [tuple(rng.integers(0, shape)) for _ in range(25)]:
        up, down = probs.numpy().copy(), probs.numpy().copy()
        up[index] += step
        down[index] -= step
        expected = (value(up) - value(down)) / (2 * step)
        assert single.grad[index].item() == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_by_hand():
    """One box of 4 x 6 in 8 x 10, a constant 0.25, w = 2: eq. 6.6 with the published weights, and relative."""
    probs, boxes = torch.full((1, 1, 8, 10), 0.25), torch.tensor([[[1, 2, 2, 6, 8]]])
    # 2 bands of 2 lines of 6 pixels hold 3; 3 bands of 2 lines of 4 pixels hold 2
    tight = 1e-4 * (2 * psi(2 - 3.0) + 3 * psi(2 - 2.0))
    rest = (psi(0.5 * 24 - 20.0) + psi(20.0 - 0.9 * 24) + psi(0.25 * 56)) / 80
    loss = BoxPriorLoss(LogBarrierExtension(), width=2, weights={"tightness": 1e-4}, normalization="paper")
    assert loss(probs, boxes).item() == pytest.approx(tight + rest, rel=1e-6)

    relative = (2 * psi(1 - 1.5) + 3 * psi(1 - 1.0)) / 5 + psi(0.5 - 0.25) + psi(0.25 - 0.9) + psi(14 / 24)
    assert BoxPriorLoss(LogBarrierExtension(), width=2)(probs, boxes).item() == pytest.approx(relative, rel=1e-6)


# Activations, weights, terms


@pytest.mark.parametrize(("channels", "activation"), [(2, "softmax"), (3, "softmax"), (3, "sigmoid"), (1, "sigmoid")])
@emptinesses
def test_activation(channels, activation, emptiness, rng):
    """Of logits, or of probabilities that another loss may share."""
    logits = torch.from_numpy(rng.normal(size=(2, channels, 9, 9)))
    boxes = torch.tensor([[[1, 1, 1, 6, 6]], [[1, 2, 3, 9, 8]]])
    probs = torch.softmax(logits, 1) if activation == "softmax" else torch.sigmoid(logits)
    loss = BoxPriorLoss(LogBarrierExtension(), emptiness=emptiness, **{activation: True})
    expected = BoxPriorLoss(LogBarrierExtension(), emptiness=emptiness)(probs, boxes)
    shared = loss.probabilities(logits)
    shared.all()
    torch.testing.assert_close(loss(logits, boxes), expected)
    torch.testing.assert_close(loss(logits, {"boxes": boxes}, probabilities=shared), expected)


@emptinesses
@pytest.mark.parametrize("dropped", NAMES)
def test_weight_zero_removes_a_term_exactly(dropped, emptiness, rng, box_prior_reference):
    shape, rows, options = CASES["2D, classes"]
    settings = {**options, "emptiness": emptiness}
    probs = random_probs(shape, rng)
    terms = box_prior_reference.box_prior(probs.numpy(), rows, box_prior_reference.log_barrier(5.0), **settings)
    kept = [k for k, name in enumerate(NAMES) if name != dropped]
    loss = BoxPriorLoss(LogBarrierExtension(), weights={dropped: 0}, reduction="none", **settings)
    np.testing.assert_allclose(loss(probs, tensor_of(rows, 2)).numpy(), terms[..., kept].sum(-1), rtol=1e-9)
    shares = {f"satisfied_{name}" for name in ("tightness", "size") if name != dropped}
    assert set(loss.terms()) == {*NAMES, *shares}


def test_all_weights_zero_give_no_gradient(rng):
    probs = random_probs((1, 2, 8, 8), rng).requires_grad_()
    loss = BoxPriorLoss(QuadraticPenalty(), weights=dict.fromkeys(NAMES, 0))
    value = loss(probs, torch.tensor([[[1, 1, 1, 6, 6]]]))
    value.backward()
    assert value.item() == 0 and (probs.grad == 0).all()


def test_terms_count_what_is_satisfied():
    probs = torch.zeros(1, 1, 10, 10)
    probs[0, 0, 2:8, 2:5] = 1  # the left half of the box: its rows are satisfied, half of its columns are not
    loss = BoxPriorLoss(QuadraticPenalty(), width=1, filling=(0.6, 0.9))
    assert loss.terms() == {} and loss.last is None
    loss(probs, torch.tensor([[[1, 2, 2, 8, 8]]]))
    terms = loss.terms()
    assert terms["satisfied_tightness"].item() == pytest.approx(9 / 12)
    assert terms["satisfied_size"].item() == pytest.approx(1 / 2)
    assert terms["emptiness"].item() == 0
    loss.left_out()
    assert loss.terms() == {} and loss.last is None


def test_terms_without_any_box_are_satisfied():
    loss = BoxPriorLoss(LogBarrierExtension())
    loss(torch.rand(1, 2, 6, 6), torch.zeros(1, 0, 5, dtype=torch.int64))
    terms = loss.terms()
    assert terms["satisfied_tightness"] == terms["satisfied_size"] == 1
    assert terms["tightness"] == terms["size"] == 0 and terms["emptiness"].isfinite()


# Named constraints and multipliers


def test_each_function_has_its_residual():
    """The left half of a box of 6 x 6 and two voxels outside, as above."""
    probs = torch.zeros(1, 1, 10, 10)
    probs[0, 0, 2:8, 2:5] = probs[0, 0, 0, :2] = 1
    loss = BoxPriorLoss(QuadraticPenalty(), width=1, filling=(0.6, 0.9))
    boxes = torch.tensor([[[1, 2, 2, 8, 8]]])
    loss(probs, boxes)
    residual, free, index = loss.last
    assert loss.constraint_names((1, 4), {1: "organ"}) == [
        "tightness_organ",
        "size_lower_organ",
        "size_upper_organ",
        "emptiness_organ",
    ]
    # 3 of 12 bands lack 1 each; satisfied ones do not make up for them
    assert residual[0, 0].tolist() == pytest.approx([3 / 12, 0.6 - 0.5, 0.5 - 0.9, 2 / 36])
    assert not free.any() and index is None and not residual.requires_grad
    again = loss.residual(probs.requires_grad_(), boxes)
    assert torch.equal(again.residual, residual) and again.residual.requires_grad
    whole = torch.zeros(1, 1, 10, 10)
    whole[0, 0, 2:8, 2:8] = 1
    whole[0, 0, 2] *= 0.5  # satisfied everywhere: the row nearest to its bound counts
    assert loss.residual(whole, boxes).residual[0, 0, 0].item() == pytest.approx(1 - 3)


def test_slices_of_a_sample_are_one_function():
    """Three slices: one is satisfied, one is empty but for its box, one has no box and does not count."""
    probs = torch.zeros(1, 1, 8, 8, 3)
    probs[0, 0, 2:6, 2:6, 0] = 1
    boxes = torch.tensor([[[1, 2, 2, 0, 6, 6, 1], [1, 2, 2, 1, 6, 4, 2]]])
    loss = BoxPriorLoss(QuadraticPenalty(), width=4, filling=(0.5, 1.0), slice_axis=2)
    # the mean of what is violated, by the voxels of the boxes
    assert loss.residual(probs, boxes).residual[0, 0].tolist() == pytest.approx([8 / 24, 0.5 * 8 / 24, 0, 0])
    probs[0, 0, 2:6, 2:4, 1] = 0.75
    # all are satisfied: the row that is nearest to its bound
    nearest = [1 - 6 / 4, 0.5 - 0.75, 0, 0]
    assert loss.residual(probs, boxes).residual[0, 0].tolist() == pytest.approx(nearest)


@pytest.mark.parametrize("name", ["2D, classes", "2D, cut", "slices 0"])
@normalizations
def test_multipliers_of_a_relu_lagrangian(name, normalization, rng):
    """With all multipliers equal it costs them times the violation, whatever the number of bands."""
    shape, rows, options = CASES[name]
    probs, boxes = random_probs(shape, rng), tensor_of(rows, len(shape) - 2)
    settings = {**options, "normalization": normalization}
    loss = weighted(ReLULagrangian(learning_rate=1.0, initial=0.5), **settings)

    class Violation(QuadraticPenalty):
        def forward(self, residual, index=None):
            return 0.5 * residual.clamp(min=0)

    assert loss(probs, boxes).item() == pytest.approx(weighted(Violation(), **settings)(probs, boxes).item(), rel=1e-6)
    residual, free, _ = loss.last
    loss.formulation.step()
    moved = residual.clamp(min=0).sum(0).flatten()
    assert (residual[free] == 0).all()
    torch.testing.assert_close(loss.formulation.multipliers[0], 0.5 + moved.float())


@pytest.mark.parametrize("weights", [{}, {"size": 0.0}])
def test_what_has_no_constraint_moves_no_multiplier(weights):
    lagrangian = ReLULagrangian(learning_rate=1.0)
    loss = BoxPriorLoss(lagrangian, softmax=True, weights=weights)
    # Many more padding boxes than there are functions, another number of them in each batch.
    for count in (0, 3, 64):
        loss(torch.zeros(2, 2, 8, 8), torch.full((2, count, 5), -1))
    lagrangian.step()
    assert (lagrangian.multipliers[0, :3] == 0).all() and lagrangian.multipliers[0, 3] > 0
    loss(torch.full((1, 2, 8, 8), -3.0) * torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1), torch.tensor([[[1, 1, 1, 7, 7]]]))
    before = lagrangian.multipliers.clone()
    lagrangian.step()
    assert ((lagrangian.multipliers > before)[0] == torch.tensor([True, not weights, False, True])).all()


def test_cross_entropy_is_no_constraint():
    loss = BoxPriorLoss(ReLULagrangian(learning_rate=1.0), softmax=True, emptiness="cross_entropy")
    loss(torch.zeros(1, 2, 8, 8), torch.tensor([[[1, 1, 1, 7, 7]]]))
    assert loss.last.free[0, 0].tolist() == [False, False, False, True] and loss.terms()["emptiness"] > 0
    loss.formulation.step()
    assert loss.formulation.multipliers[0, 3] == 0


@pytest.mark.parametrize("formulation", [Lagrangian(4, learning_rate=0.5, initial=1.0), AugmentedLagrangian(4)])
def test_multipliers_of_each_sample(formulation, rng):
    """Each sample moves the row of its number; the order of the batch is no matter."""
    loss = CombinedLoss({"boxes": BoxPriorLoss(formulation, softmax=True)})
    assert loss.target_keys == ("boxes", "index") and loss.host_keys == {"boxes", "index"}
    logits = torch.from_numpy(rng.normal(size=(2, 2, 10, 10))).requires_grad_()
    boxes = torch.tensor([[[1, 2, 2, 9, 9]], [[1, -2, 1, 4, 7]]])
    target = {"boxes": boxes, "index": torch.tensor([3, 1])}
    value = loss(logits, target)
    value.backward()
    turned = loss(logits.detach().flip(0), {key: entry.flip(0) for key, entry in target.items()})
    assert value.item() == pytest.approx(turned.item()) and logits.grad.isfinite().all()
    before = formulation.multipliers.clone()
    formulation.step()
    moved = formulation.multipliers != before
    assert not moved[[0, 2]].any() and moved[3].any() and not moved[1, 1:3].any()  # a cut box has no size


# Gradients and precision


@emptinesses
@normalizations
@pytest.mark.parametrize("state", ["feasible", "boundary", "violated"])
def test_gradcheck(state, normalization, emptiness, rng):
    """Feasible: all residuals well below 0. Boundary: bands and sizes near 0. Violated: bands and one size above."""
    inside, outside, bounds, width = {
        "feasible": (0.7, 0.0005, (0.5, 0.9), 2),
        "boundary": (1 / 6, 0.0005, (1 / 6 - 0.01, 1 / 6 + 0.01), 1),  # a line of 6 pixels holds 1
        "violated": (0.02, 0.95, (0.5, 0.9), 2),
    }[state]
    probs = torch.full((1, 2, 8, 9), outside, dtype=torch.float64)
    probs[:, :, 1:7, 2:8] = inside
    probs = (probs * (1 + 0.02 * torch.from_numpy(rng.random(probs.shape)))).requires_grad_()
    barrier = LogBarrierExtension(t=3.0).double()
    loss = BoxPriorLoss(barrier, width=width, filling=bounds, normalization=normalization, emptiness=emptiness)
    boxes = torch.tensor([[[1, 1, 2, 7, 8]]])
    assert torch.autograd.gradcheck(lambda p: loss(p, boxes), probs, eps=1e-7, fast_mode=True)
    if emptiness == "constraint" and state != "boundary":  # too small is not too large: half the sizes are satisfied
        satisfied = [loss.terms()[f"satisfied_{name}"].item() for name in ("tightness", "size")]
        assert satisfied == ([1.0, 1.0] if state == "feasible" else [0.0, 0.5])


@emptinesses
@pytest.mark.parametrize("name", ["2D, several and overlapping", "3D, classes", "slices 0"])
def test_second_derivatives_and_torch_func(name, emptiness, rng):
    """What bilevel methods take, through the softmax."""
    shape, rows, options = CASES[name]
    logits, boxes = torch.from_numpy(rng.normal(size=shape)).requires_grad_(), tensor_of(rows, len(shape) - 2)
    loss = weighted(LogBarrierExtension().double(), softmax=True, emptiness=emptiness, **options)
    assert torch.autograd.gradcheck(lambda x: loss(x, boxes), logits, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, boxes), logits, fast_mode=True)
    loss(logits, boxes).backward()
    gradient = torch.func.grad(lambda values: loss(values, boxes))(logits.detach())
    torch.testing.assert_close(gradient, logits.grad)


@emptinesses
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite(dtype, emptiness):
    """More voxels than float16 has numbers, t as large as after 150 epochs."""
    logits = torch.zeros(1, 2, 300, 300, dtype=dtype)
    logits[:, 1] += 8
    logits.requires_grad_()
    for normalization in ("relative", "paper"):
        loss = BoxPriorLoss(
            LogBarrierExtension(t=5 * 1.1**50), softmax=True, normalization=normalization, emptiness=emptiness
        )
        logits.grad = None
        value = loss(logits, torch.tensor([[[1, 20, 30, 120, 140]]]))
        value.backward()
        assert value.dtype == torch.float32 and value.isfinite()
        assert logits.grad.dtype == dtype and logits.grad.isfinite().all() and (logits.grad != 0).any()


@emptinesses
@pytest.mark.parametrize("name", ["2D, classes", "slices 0"])
def test_autocast_changes_nothing(name, emptiness, rng):
    shape, rows, options = CASES[name]
    values, boxes = torch.from_numpy(rng.normal(size=shape)).float(), tensor_of(rows, len(shape) - 2)
    results = []
    for enabled in (False, True):
        logits = values.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = weighted(LogBarrierExtension(), softmax=True, emptiness=emptiness, **options)
            value = loss(logits, boxes)
            value.backward()
        results.append((value.detach(), logits.grad, loss.last.residual))
    assert all(map(torch.equal, *results))


@table
def test_hard_masks_are_finite(shape, rows, options):
    for value in (0.0, 1.0):
        for emptiness in ("constraint", "cross_entropy"):
            probs = torch.full(shape, value, requires_grad=True)
            cost = BoxPriorLoss(LogBarrierExtension(t=100.0), emptiness=emptiness, **options)(
                probs, tensor_of(rows, len(shape) - 2)
            )
            cost.backward()
            assert cost.isfinite() and probs.grad.isfinite().all()


@pytest.mark.parametrize(("channels", "activation"), [(2, "softmax"), (3, "softmax"), (2, "sigmoid")])
def test_cross_entropy_still_pulls_at_a_saturated_voxel(channels, activation):
    logits = torch.zeros(1, channels, 8, 8)
    logits[0, 1] = 90.0  # 1 - s is rounded to 0, and so is exp(-90) in half of float32's range
    logits.requires_grad_()
    loss = BoxPriorLoss(
        LogBarrierExtension(), emptiness="cross_entropy", weights=only("emptiness"), **{activation: True}
    )
    value = loss(logits, torch.tensor([[[1, 2, 2, 6, 6]]]))
    value.backward()
    slope = logits.grad[0, 1, 0]
    assert value > 90 and (slope > 0).all() and torch.allclose(slope, slope[0])


# Empty and odd targets


@emptinesses
@pytest.mark.parametrize(
    "boxes", [torch.zeros(2, 0, 5, dtype=torch.int64), torch.full((2, 3, 5), -1)], ids=["N=0", "padding"]
)
def test_no_boxes_leave_only_the_emptiness(boxes, emptiness, rng):
    logits = torch.from_numpy(rng.normal(size=(2, 3, 7, 8))).requires_grad_()
    value = BoxPriorLoss(LogBarrierExtension(), softmax=True, emptiness=emptiness)(logits, boxes)
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all()
    assert (logits.grad[:, 0] < 0).all()  # every voxel is pulled to the background


def test_a_single_voxel_has_all_terms():
    """Its tightness is psi(1 - s)."""
    probs = torch.full((1, 1, 6, 6), 0.3)
    loss = BoxPriorLoss(LogBarrierExtension(), normalization="paper")
    loss(probs, torch.tensor([[[1, 2, 3, 3, 4]]]))
    assert loss.terms()["tightness"].item() == pytest.approx(psi(1 - 0.3), rel=1e-6)


def test_a_cut_box_gives_no_size_term(rng):
    probs, boxes = random_probs((1, 2, 9, 9), rng), torch.tensor([[[1, -2, 1, 6, 6]]])
    assert BoxPriorLoss(LogBarrierExtension(), weights=only("size"))(probs, boxes).item() == 0


def test_a_cut_object_is_satisfied_by_its_visible_part():
    """A disc whose upper part lies outside: nothing is asked of lines that the object may leave empty."""
    grid = torch.stack(torch.meshgrid(torch.arange(20.0), torch.arange(24.0), indexing="ij"))
    disc = ((grid - torch.tensor([2.0, 12.0]).view(2, 1, 1)).norm(dim=0) < 9).float()
    loss = BoxPriorLoss(QuadraticPenalty(), width=1)
    assert loss(disc[None, None], torch.tensor([[[1, -6, 4, 11, 21]]])).item() == 0


def test_input_and_boxes_are_not_changed(rng):
    probs, boxes = random_probs((1, 2, 9, 9), rng), torch.tensor([[[1, -2, 1, 6, 6], PAD2]])
    before = probs.clone(), boxes.clone()
    for emptiness in ("constraint", "cross_entropy"):
        BoxPriorLoss(LogBarrierExtension(), emptiness=emptiness)(probs, boxes)
    assert torch.equal(probs, before[0]) and torch.equal(boxes, before[1])


# Invariances


@normalizations
def test_flip(normalization, rng):
    probs, boxes = random_probs((1, 2, 11, 9), rng), torch.tensor([[[1, 2, 1, 8, 7], [1, 7, 0, 11, 4]]])
    mirrored = torch.tensor([[[1, 2, 2, 8, 8], [1, 7, 5, 11, 9]]])
    loss = BoxPriorLoss(LogBarrierExtension(), width=1, normalization=normalization)
    torch.testing.assert_close(loss(probs.flip(3), mirrored), loss(probs, boxes))


@normalizations
def test_permutation_of_classes_and_samples(normalization, rng):
    shape, rows, options = CASES["2D, classes"]
    bounds = options["filling"]
    probs, boxes = random_probs(shape, rng), tensor_of(rows, 2)
    order = torch.tensor([0, 3, 1, 2])  # new channel c holds old class order[c]
    new_class = {3: 1, 1: 2, 2: 3, -1: -1}
    renamed = boxes.clone()
    renamed[..., 0] = torch.tensor([[new_class[int(c)] for c in sample] for sample in boxes[..., 0]])
    settings = {**options, "normalization": normalization, "reduction": "none"}
    plain = weighted(LogBarrierExtension(), **settings)(probs, boxes)
    settings["filling"] = [bounds[2], bounds[0], bounds[1]]
    other = weighted(LogBarrierExtension(), **settings)(probs[:, order].flip(0), renamed.flip(0))
    torch.testing.assert_close(other, plain[:, order[1:] - 1].flip(0))


@table
def test_transposed_axes(shape, rows, options, rng):
    dims = len(shape) - 2
    probs, boxes = random_probs(shape, rng), tensor_of(rows, dims)
    turned = torch.cat([boxes[..., :1], boxes[..., 1 : 1 + dims].flip(-1), boxes[..., 1 + dims :].flip(-1)], -1)
    changed = dict(options)
    if "slice_axis" in options:
        changed["slice_axis"] = dims - 1 - options["slice_axis"]
    other = weighted(LogBarrierExtension(), **changed)(
        probs.movedim(list(range(2, 2 + dims)), list(range(1 + dims, 1, -1))), turned
    )
    torch.testing.assert_close(other, weighted(LogBarrierExtension(), **options)(probs, boxes))


def upsampled(probs, factor=2):
    for axis in range(2, probs.dim()):
        probs = probs.repeat_interleave(factor, axis)
    return probs


@pytest.mark.parametrize("shape", [(1, 2, 8, 9), (1, 2, 6, 7, 8)], ids=["2D", "3D"])
def test_size_and_emptiness_do_not_depend_on_the_resolution(shape, rng):
    """Each voxel becomes 2^D: V_I / |Omega_I| and V_O / mean |Omega_I| stay."""
    dims = len(shape) - 2
    probs, boxes = random_probs(shape, rng), torch.tensor([[[1, *[1] * dims, *[5] * dims]]])
    fine = torch.cat([boxes[..., :1], 2 * boxes[..., 1:]], -1)
    loss = BoxPriorLoss(LogBarrierExtension(), weights={"tightness": 0})
    torch.testing.assert_close(loss(upsampled(probs), fine), loss(probs, boxes))


@pytest.mark.parametrize(("dims", "width", "extent"), [(2, 2, 4), (3, 1, 4)])
def test_tightness_follows_the_resolution_by_a_known_factor(dims, width, extent, rng):
    """A band of twice the width in twice the resolution holds 2^D the mass for twice the bound.

    So mass / width grows by 2^(D - 1): a tightness prior in voxels asks less of a finer image, and the loss is the one
    of the coarse image with 2^(D - 1) times the mass in its bands.
    """
    shape = (1, 1, *[extent + 3] * dims)
    probs = random_probs(shape, rng) / 2 ** (dims - 1)
    boxes = torch.tensor([[[1, *[1] * dims, *[1 + extent] * dims]]])
    fine = torch.cat([boxes[..., :1], 2 * boxes[..., 1:]], -1)
    tight = only("tightness")
    doubled = BoxPriorLoss(LogBarrierExtension(), width=2 * width, weights=tight)(upsampled(probs), fine)
    scaled = BoxPriorLoss(LogBarrierExtension(), width=width, weights=tight)(probs * 2 ** (dims - 1), boxes)
    torch.testing.assert_close(doubled, scaled)


def test_more_copies_of_a_sample_change_nothing(rng):
    shape, rows, options = CASES["2D, classes"]
    probs, boxes = random_probs(shape, rng), tensor_of(rows, 2)
    loss = weighted(LogBarrierExtension(), **options)
    torch.testing.assert_close(loss(probs.repeat(3, 1, 1, 1), boxes.repeat(3, 1, 1)), loss(probs, boxes))


def test_a_second_class_that_copies_the_first_changes_nothing(rng):
    probs, boxes = random_probs((1, 2, 12, 12), rng), torch.tensor([[[1, 2, 3, 9, 10], [1, 1, 1, 5, 5]]])
    again = boxes.clone()
    again[..., 0] = 2
    loss = weighted(LogBarrierExtension())
    twice = loss(torch.cat([probs, probs[:, 1:]], 1), torch.cat([boxes, again], 1))
    torch.testing.assert_close(twice, loss(probs, boxes))


@pytest.mark.parametrize("options", [{}, {"slice_axis": 2}], ids=["volume", "slices"])
def test_empty_background_around_changes_nothing(options, rng):
    """A larger field of view, and (for slices) more slices without the organ, add no loss."""
    probs = random_probs((1, 2, 9, 9, 3), rng)
    rows = [[1, 1, 2, z, 8, 7, z + 1] for z in range(3)] if options else [[1, 1, 2, 0, 8, 7, 3]]
    boxes = torch.tensor([rows])
    shift = torch.tensor([0, 4, 5, 2, 4, 5, 2])
    wide = torch.nn.functional.pad(probs, (2, 3, 5, 1, 4, 4))
    loss = weighted(QuadraticPenalty(), width=2, **options)
    torch.testing.assert_close(loss(wide, boxes + shift), loss(probs, boxes))


def test_the_weight_of_an_image_is_the_volume_of_its_boxes(rng):
    """A voxel inside pulls alike in a large and in a small box."""
    probs = torch.full((2, 1, 16, 16), 0.2, requires_grad=True)
    boxes = torch.tensor([[[1, 1, 1, 15, 15]], [[1, 4, 4, 6, 7]]])
    loss = BoxPriorLoss(LogBarrierExtension(), weights=only("size"))
    loss(probs, boxes).backward()
    inside = probs.grad[probs.grad != 0]
    assert len(inside) == 14 * 14 + 6
    torch.testing.assert_close(inside, inside[:1].expand_as(inside))


def test_a_voxel_outside_pulls_as_one_inside(rng):
    """Violated by the barrier's straight part, size and emptiness have slopes of one size."""
    probs = torch.full((2, 1, 16, 16), 0.3, requires_grad=True)
    boxes = torch.tensor([[[1, 1, 1, 15, 15]], [[1, 4, 4, 12, 12]]])
    loss = BoxPriorLoss(LogBarrierExtension(t=50.0), weights={"tightness": 0}, filling=(0.6, 1.0))
    loss(probs, boxes).backward()
    assert probs.grad[0, 0, 0, 0].item() == pytest.approx(-probs.grad[0, 0, 8, 8].item(), rel=0.01)


# What the minimum looks like


def shapes():
    """An ellipse in its box, and wrong answers to it."""
    grid = torch.stack(torch.meshgrid(torch.arange(32.0), torch.arange(28.0), indexing="ij"))
    centre, radius = torch.tensor([15.5, 13.5]).view(2, 1, 1), torch.tensor([10.0, 8.0]).view(2, 1, 1)
    truth = (((grid - centre) / radius).square().sum(0) < 1).float()
    rows, columns = torch.nonzero(truth, as_tuple=True)
    box = [1, int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1]
    corner = torch.zeros_like(truth)
    corner[box[1] : box[1] + 10, box[2] : box[2] + 12] = 1
    wrong = {
        "empty": torch.zeros_like(truth),
        "full": torch.ones_like(truth),
        "the whole box": torch.zeros_like(truth),
        "shifted": truth.roll((4, 3), (0, 1)),
        "beside the box": truth.roll(8, 1),
        "in a corner of the box": corner,
        "half certain": torch.full_like(truth, 0.5),
        "inverted": 1 - truth,
    }
    wrong["the whole box"][box[1] : box[3], box[2] : box[4]] = 1
    return truth, torch.tensor([[box]]), wrong


@pytest.mark.parametrize("formulation", [LogBarrierExtension(t=10.0), QuadraticPenalty()], ids=["barrier", "quadratic"])
@emptinesses
@pytest.mark.parametrize(("normalization", "tightness"), [("relative", 1.0), ("paper", 1e-4)])
def test_the_truth_costs_least(normalization, tightness, emptiness, formulation):
    truth, boxes, others = shapes()
    weights = {"tightness": tightness}
    loss = BoxPriorLoss(formulation, normalization=normalization, emptiness=emptiness, width=3, weights=weights)
    costs = {name: loss(wrong[None, None], boxes).item() for name, wrong in others.items()}
    assert loss(truth[None, None], boxes).item() < min(costs.values()), costs


def test_a_feasible_truth_costs_nothing_with_a_penalty():
    truth, boxes, _ = shapes()
    for width in (1, 2, 5):
        assert BoxPriorLoss(QuadraticPenalty(), width=width)(truth[None, None], boxes).item() == pytest.approx(
            0, abs=1e-12
        )


@pytest.mark.parametrize("spacing", [1, 2], ids=["2D", "slices"])
def test_descent_from_random_logits_fills_the_box(spacing):
    """Boxes alone, no image: the constraints ask for an object of the given size that touches all sides."""
    if spacing == 1:
        shape, row, options = (1, 2, 24, 24), [[1, 5, 7, 19, 18]], {}
    else:
        shape, row, options = (1, 2, 24, 24, 2), [[1, 5, 7, z, 19, 18, z + 1] for z in range(2)], {"slice_axis": 2}
    truth = torch.zeros(shape[2:])
    truth[5:19, 7:18] = 1
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    barrier = LogBarrierExtension(t=5.0, factor=1.05, max_t=50.0)
    loss = BoxPriorLoss(barrier, width=2, filling=(0.9, 1.0), softmax=True, **options)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    values = []
    for step in range(200):
        optimizer.zero_grad()
        value = loss(logits, torch.tensor([row]))
        value.backward()
        optimizer.step()
        values.append(value.item())
        if step % 10 == 9:
            barrier.step()
    found = (logits.argmax(1)[0] == 1).float()
    dice = 2 * (found * truth).sum() / (found.sum() + truth.sum())
    assert dice > 0.9 and values[-1] < values[0]


def test_a_small_network_in_a_plain_pytorch_loop(rng):
    """Bright discs on noise; only their boxes are known. No MONAI engine, no scheduler."""
    grid = torch.stack(torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij"))
    images, truths, rows = [], [], []
    for _ in range(4):
        centre = torch.from_numpy(rng.uniform(8, 16, 2)).float().view(2, 1, 1)
        truth = ((grid - centre).norm(dim=0) < rng.uniform(4, 7)).float()
        where = truth.nonzero()
        rows.append([[1, *where.min(0).values.tolist(), *(where.max(0).values + 1).tolist()]])
        images.append(truth + 0.3 * torch.from_numpy(rng.normal(size=truth.shape)).float())
        truths.append(truth)
    images, truths = torch.stack(images)[:, None], torch.stack(truths)
    network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 3, padding=1))
    barrier = LogBarrierExtension(t=5.0, factor=1.1, max_t=50.0)
    loss_function = BoxPriorLoss(barrier, width=2, filling=(0.6, 0.9), softmax=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(10):
        for _ in range(10):
            optimizer.zero_grad()
            loss_function(network(images), torch.tensor(rows)).backward()
            optimizer.step()
        barrier.step()
    found = (network(images).argmax(1) == 1).float()
    assert (2 * (found * truths).sum() / (found.sum() + truths.sum())).item() > 0.8


# Drop-in


def test_meta_tensors_give_a_plain_tensor(rng):
    probs, boxes = random_probs((1, 2, 9, 9), rng), torch.tensor([[[1, 1, 1, 6, 6]]])
    plain = BoxPriorLoss(LogBarrierExtension())(probs, boxes)
    image = MetaTensor(probs.clone()).requires_grad_()
    loss = BoxPriorLoss(LogBarrierExtension())
    value = loss(image, MetaTensor(boxes))
    assert type(value) is torch.Tensor and torch.equal(value, plain)
    assert all(type(term) is torch.Tensor for term in loss.terms().values())
    value.backward()
    assert image.grad.isfinite().all()


def test_repr_and_state():
    loss = BoxPriorLoss(LogBarrierExtension(), width=3, filling=(0.4, 0.8), emptiness="cross_entropy")
    assert list(loss.state_dict()) == ["formulation.t"]
    for words in ("width=3", "[[0.4, 0.8]]", "slice_axis=None", "'tightness': 1.0", "'cross_entropy'", "'relative'"):
        assert words in repr(loss)


def test_one_pair_of_bounds_serves_all_classes(rng):
    shape, rows, _ = CASES["2D, classes"]
    probs, boxes = random_probs(shape, rng), tensor_of(rows, 2)
    one, each, flat = (
        BoxPriorLoss(LogBarrierExtension(), filling=bounds)(probs, boxes)
        for bounds in ((0.3, 0.7), [(0.3, 0.7)] * 3, np.array([[0.3, 0.7]]))
    )
    assert torch.equal(one, each) and torch.equal(one, flat)


# Refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 0}, "width: expected an integer >= 1"),
        ({"width": 2.5}, "width: expected an integer >= 1"),
        ({"filling": (0.9, 0.5)}, "filling: expected .lower, upper. shares of the box with 0 <= lower"),
        ({"filling": (0.5, 1.1)}, "filling: expected"),
        ({"filling": (float("nan"), 0.5)}, "filling: expected"),
        ({"filling": ()}, "filling: expected"),
        ({"filling": [(0.5, 0.9), (0.9, 0.5)]}, "filling: expected"),
        ({"weights": {"tightness": -1.0}}, "weights.*tightness.*expected a finite number >= 0, got -1.0"),
        ({"weights": {"size": float("nan")}}, "weights.*size.*expected a finite number"),
        ({"weights": {"tight": 1.0}}, "weights: .*tight.* name no term"),
        ({"slice_axis": -1}, "slice_axis: expected None"),
        ({"emptiness": "masked"}, 'emptiness: expected "constraint" or "cross_entropy", got .masked.'),
        ({"normalization": "image_size"}, 'normalization: expected "relative" or "paper", got .image_size.'),
        ({"reduction": "average"}, "average"),
    ],
)
def test_refuses_senseless_settings(options, words):
    with pytest.raises(ValueError, match=words):
        BoxPriorLoss(LogBarrierExtension(), **options)


@pytest.mark.parametrize("formulation", [LogBarrierExtension, lambda z: z, nn.Identity()])
def test_formulation_is_one(formulation):
    with pytest.raises(TypeError, match=r"formulation: expected one such as LogBarrierExtension\(\), got"):
        BoxPriorLoss(formulation)


ROW = [1, 1, 1, 4, 4]


@pytest.mark.parametrize(
    ("probs", "boxes", "error", "words"),
    [
        (torch.ones(2, 6, 6), [[ROW]], ValueError, r"input: expected a floating point tensor \(B, C, H, W\)"),
        (torch.ones(1, 2, 6, 6, dtype=torch.int64), [[ROW]], ValueError, "got torch.int64 of shape .*add the batch"),
        (torch.ones(1, 2, 6, 6), [[[3, *ROW[1:]]]], ValueError, r"row 0 of sample 0, .* has a class outside 1\.\.1"),
        (torch.ones(1, 2, 6, 6), [[ROW], [ROW]], ValueError, r"boxes: expected shape \(1, N, 5\)"),
        (torch.ones(1, 2, 6, 6, 6), [[ROW]], ValueError, r"boxes: expected shape \(1, N, 7\).*for 3D images"),
        (torch.ones(1, 2, 6, 6), [[[1.0, 1, 1, 4, 4]]], TypeError, "boxes: expected an integer tensor"),
    ],
)
def test_refuses_input_and_target_that_do_not_fit(probs, boxes, error, words):
    with pytest.raises(error, match=words):
        BoxPriorLoss(LogBarrierExtension())(probs, torch.tensor(boxes))


def test_filling_fit_the_classes():
    loss = BoxPriorLoss(LogBarrierExtension(), filling=[(0.5, 0.9), (0.5, 0.9)])
    with pytest.raises(ValueError, match="filling: expected one pair or 3 pairs, one per foreground class, got 2"):
        loss(torch.rand(1, 4, 6, 6), torch.tensor([[ROW]]))


def test_slice_axis_fits_the_image():
    with pytest.raises(ValueError, match="slice_axis: expected None"):
        BoxPriorLoss(LogBarrierExtension(), slice_axis=1)(torch.rand(1, 2, 6, 6), torch.tensor([[ROW]]))
