"""Proposals: against a convex solver, optimality conditions, both solvers, labels, and bounds that cannot be met."""

import numpy as np
import pytest
import torch
from scipy.optimize import LinearConstraint, minimize

from medconstraints.losses.size_proposals import size_proposals

INF = float("inf")
FREE = (-INF, INF)

# Bounds of each class on images of 12 voxels, classes, and perhaps (class, voxel) labels: small enough for a reference.
SMALL = {
    "upper": ([FREE, (-INF, 3)], ()),
    "lower": ([FREE, (9, INF)], ()),
    "equality": ([FREE, (5, 5)], ()),
    "already kept": ([FREE, (0.5, 11.5)], ()),
    "background": ([(10, 11), FREE], ()),
    "both classes": ([(7, 12), (2, 4)], ()),
    "labels": ([FREE, (-INF, 3)], ((1, 0), (1, 5), (0, 7))),
    "four, upper": ([FREE, (-INF, 2), (-INF, 1), (-INF, 1.5)], ()),
    "four, lower": ([FREE, (4, INF), (-INF, INF), (5, 6)], ()),
    "four, mixed": ([FREE, (1, 2), (6, 7), (0, 1)], ((2, 3), (0, 4))),
    "four, all": ([(2, 3), (2, 3), (3, 4), (3.5, 6)], ()),
    "four, exact": ([(2, 2), (3, 3), (3, 3), (4, 4)], ()),
}
small = pytest.mark.parametrize(("rows", "labels"), SMALL.values(), ids=SMALL)
solvers = pytest.mark.parametrize("solver", ["newton", "gradient"])


def propose(probs, *arguments, **options):
    """From probabilities; exact 0 counts as the smallest float32."""
    return size_proposals(probs.clamp(min=torch.finfo(torch.float32).tiny).log(), *arguments, **options)


def bounds_of(*samples):
    """(B, C, 1, 2) from one list of (lower, upper) for each sample."""
    return torch.tensor(samples, dtype=torch.float64).unsqueeze(2)


def label_of(labels, batch, *shape):
    label = torch.full((batch, 1, int(np.prod(shape))), -1)
    for cls, voxel in labels:
        label[:, 0, voxel] = cls
    return label.view(batch, 1, *shape)


def random_logits(batch, classes, *shape, sharpness=1.0, seed=0):
    return sharpness * torch.randn(batch, classes, *shape, generator=torch.Generator().manual_seed(seed))


def smooth_logits(batch, classes, side, sharpness):
    """Blobs: few voxels are undecided if sharp, as in the output of a trained network."""
    noise = random_logits(batch, classes, side, side)
    return sharpness * 5 * torch.nn.functional.avg_pool2d(noise, 5, 1, 2)


def sizes(proposals):
    return proposals.double().flatten(2).sum(-1)


def reference(probs, rows, labels):
    """min KL(y || s) as a program in all entries of y, float64, for one image (C, N)."""
    classes, voxels = probs.shape
    log_probs = np.log(probs.astype(np.float64))
    lower, upper = np.full_like(log_probs, 1e-12), np.ones_like(log_probs)
    for cls, voxel in labels:
        lower[:, voxel], upper[:, voxel] = 0, 1e-12
        lower[cls, voxel], upper[cls, voxel] = 1 - 1e-12, 1
    ones = np.kron(np.ones((1, classes)), np.eye(voxels))
    constraints = [LinearConstraint(ones, 1, 1)]
    for k, (low, high) in enumerate(rows):
        if np.isfinite([low, high]).any():
            row = np.kron(np.eye(classes)[k], np.ones(voxels))
            # An equality without an interior needs a little room.
            constraints.append(LinearConstraint(row[None], low - 1e-9, high + 1e-9))

    def divergence(y):
        y = y.reshape(classes, voxels).clip(1e-300)
        return (y * (np.log(y) - log_probs)).sum(), (np.log(y) - log_probs + 1).ravel()

    start = probs.astype(np.float64).clip(lower, upper).ravel()
    limits = list(zip(lower.ravel(), upper.ravel(), strict=True))
    options = {"ftol": 1e-11, "maxiter": 300}
    found = minimize(
        divergence, start, jac=True, method="SLSQP", bounds=limits, constraints=constraints, options=options
    )
    assert found.success or found.status == 8, found.message
    return found.x.reshape(classes, voxels)


def check_optimal(logits, bounds, proposals, multipliers, tolerance=1e-4):
    """Karush-Kuhn-Tucker conditions of an image without labels: together they make the only minimum."""
    size = sizes(proposals)
    lower, upper = bounds[:, :, 0, 0], bounds[:, :, 0, 1]
    for excess, multiplier, bound in (
        (lower - size, multipliers[..., 0], lower),
        (size - upper, multipliers[..., 1], upper),
    ):
        allowed = 1.05 * tolerance * bound.abs().nan_to_num(posinf=1).clamp(1)
        assert (excess <= allowed).all()
        assert (multiplier >= 0).all()
        assert ((multiplier == 0) | (excess.abs() <= allowed)).all()  # complementary slackness
    torch.testing.assert_close(proposals.sum(1), torch.ones_like(proposals[:, 0]))
    shift = (multipliers[..., 1] - multipliers[..., 0]).view(*size.shape, 1, 1)
    torch.testing.assert_close(proposals, torch.softmax(logits - shift, 1))  # stationary, eq. A.12


@small
def test_agrees_with_a_convex_solver(rows, labels):
    probs = random_logits(1, len(rows), 3, 4, sharpness=1.5).softmax(1)
    label = label_of(labels, 1, 3, 4) if labels else None
    proposals, multipliers = propose(probs, bounds_of(rows), label, tolerance=1e-5)
    expected = reference(probs[0].flatten(1).numpy(), rows, labels)
    np.testing.assert_allclose(proposals[0].flatten(1), expected, atol=1e-3)
    assert multipliers.shape == (1, len(rows), 2)
    assert (multipliers >= 0).all()


@pytest.mark.parametrize(("sharpness", "classes"), [(0.01, 4), (1.0, 2), (60.0, 4)])
@pytest.mark.parametrize("kind", ["small", "large", "interval", "all"])
def test_optimality_conditions(sharpness, classes, kind):
    logits = smooth_logits(3, classes, 40, sharpness)
    bounds = torch.tensor(FREE).repeat(3, classes, 1, 1)
    generator = torch.Generator().manual_seed(1)
    if kind == "small":
        bounds[:, 1:] = torch.tensor([8.0, 12.0])
    elif kind == "large":
        bounds[:, 1:, 0, 0] = 500
    elif kind == "interval":
        bounds[:, 1:, 0, 0] = 400 * torch.rand(3, classes - 1, generator=generator)
        bounds[:, 1:, 0, 1] = bounds[:, 1:, 0, 0] + 50 * torch.rand(3, classes - 1, generator=generator)
    else:
        share = torch.rand(3, classes, generator=generator).softmax(1)
        bounds[..., 0, :] = 1600 * share.unsqueeze(-1) + torch.tensor([-3.0, 3.0])
    proposals, multipliers = size_proposals(logits.log_softmax(1), bounds)
    check_optimal(logits, bounds, proposals, multipliers)


def test_classes_that_compete_for_the_same_voxels():
    """Classes 1 and 2 share every voxel, and few with the background: one class after the other would take long."""
    logits = 0.1 * random_logits(1, 3, 32, 32)
    logits[:, 0] += torch.where(torch.arange(32) < 16, 14.0, -14.0) + random_logits(1, 1, 32, 32, seed=1)[:, 0]
    bounds = bounds_of([FREE, (290, 290), (250, 260)])
    proposals, multipliers = propose(logits.softmax(1), bounds)
    check_optimal(logits, bounds, proposals, multipliers)


def test_volumes_and_float64():
    logits = random_logits(2, 3, 6, 7, 8).double()
    bounds = bounds_of([FREE, (20, 22), (100, INF)], [FREE, FREE, (-INF, 1)])
    proposals, multipliers = propose(logits.softmax(1), bounds)
    assert proposals.shape == logits.shape
    assert proposals.dtype == multipliers.dtype == torch.float64
    check_optimal(logits.flatten(3), bounds, proposals.flatten(3), multipliers)


@pytest.mark.parametrize("case", ["equality", "labels", "four, mixed"])
def test_the_gradient_reaches_newton(case):
    rows, labels = SMALL[case]
    probs = random_logits(1, len(rows), 3, 4).softmax(1)
    label = label_of(labels, 1, 3, 4) if labels else None
    expected, _ = propose(probs, bounds_of(rows), label)
    found, multipliers = propose(probs, bounds_of(rows), label, solver="gradient", learning_rate=0.3, max_steps=3000)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert (multipliers >= 0).all()


def test_gradient_steps_are_those_of_the_paper():
    """Two steps by hand: lambda <- max(0, lambda + lr * gradient)."""
    probs = torch.full((1, 2, 4, 4), 0.5)
    _, one = propose(probs, bounds_of([FREE, (-INF, 3)]), solver="gradient", learning_rate=0.01, max_steps=1)
    _, two = propose(probs, bounds_of([FREE, (-INF, 3)]), solver="gradient", learning_rate=0.01, max_steps=2)
    np.testing.assert_allclose(one[0], [[0, 0], [0, 0.05]], rtol=1e-5)
    np.testing.assert_allclose(two[0, 1, 1], 0.05 + 0.01 * (16 / (1 + np.exp(0.05)) - 3), rtol=1e-5)


def test_gradient_stops_once_converged():
    probs = random_logits(2, 2, 3, 4).softmax(1)
    bounds = bounds_of([FREE, (-INF, 3)], [FREE, (8, INF)])
    options = {"solver": "gradient", "learning_rate": 0.3, "tolerance": 1e-3}
    proposals, multipliers = propose(probs, bounds, max_steps=2000, **options)
    _, more = propose(probs, bounds, max_steps=4000, **options)
    assert torch.equal(multipliers, more)
    assert (sizes(proposals)[:, 1] - torch.tensor([3.0, 8.0])).abs().max() <= 8e-3


def test_gradient_makes_nothing_to_at_most_nothing():
    """0..0 becomes -1..0: the lower bound never has a multiplier, the upper one grows by the size at each step."""
    probs = torch.full((1, 2, 4, 4), 0.5)
    _, multipliers = propose(probs, bounds_of([FREE, (0, 0)]), solver="gradient", learning_rate=0.5, max_steps=50)
    assert multipliers[0, 1, 0] == 0
    assert multipliers[0, 1, 1] > 4


@solvers
def test_free_bounds_return_the_prediction(solver):
    probs = random_logits(2, 3, 5, 6).softmax(1)
    proposals, multipliers = propose(probs, bounds_of([FREE] * 3, [FREE] * 3), solver=solver)
    torch.testing.assert_close(proposals, probs)
    assert not multipliers.any()


@solvers
def test_labelled_voxels_are_fixed_and_count(solver):
    probs = random_logits(2, 3, 6, 6).softmax(1)
    label = label_of(((1, 0), (1, 1), (2, 20), (0, 35)), 2, 6, 6)
    label[1] = -1
    bounds = bounds_of([FREE, (-INF, 4), (-INF, INF)], [FREE, (-INF, 4), (-INF, INF)])
    options = {"solver": solver, "learning_rate": 0.1, "max_steps": 2000}
    proposals, _ = propose(probs, bounds, label, **options)
    assert proposals[0].flatten(1)[:, [0, 1, 20, 35]].tolist() == [[0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0]]
    assert sizes(proposals)[:, 1].tolist() == pytest.approx([4, 4], rel=1e-3)
    alone, _ = propose(probs[1:], bounds[1:], **options)
    torch.testing.assert_close(proposals[1:], alone)
    marked, _ = propose(probs, bounds, label.to(torch.int16).masked_fill(label == -1, 255), ignore_index=255, **options)
    assert torch.equal(marked, proposals)


@solvers
def test_a_sample_does_not_depend_on_its_batch(solver):
    classes = 4
    logits = torch.cat([smooth_logits(2, classes, 24, 1.0), smooth_logits(2, classes, 24, 20.0)])
    rows = [[FREE, *[(5 + 30 * sample, 20 + 30 * sample)] * (classes - 1)] for sample in range(4)]
    options = {"solver": solver, "learning_rate": 1e-3, "max_steps": 40}
    proposals, multipliers = propose(logits.softmax(1), bounds_of(*rows), **options)
    for sample in range(4):
        own, factors = propose(logits[[sample]].softmax(1), bounds_of(rows[sample]), **options)
        torch.testing.assert_close(own[0], proposals[sample], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(factors[0], multipliers[sample], atol=1e-4, rtol=1e-5)


@solvers
def test_symmetries(solver):
    probs = random_logits(1, 4, 8, 9).softmax(1)
    bounds = bounds_of([FREE, (2, 5), (30, 40), (-INF, 10)])
    options = {"solver": solver, "learning_rate": 0.01}
    proposals, multipliers = propose(probs, bounds, **options)
    flipped, _ = propose(probs.flip(-1), bounds, **options)
    torch.testing.assert_close(flipped.flip(-1), proposals, atol=1e-4, rtol=0)
    order = [2, 0, 3, 1]
    permuted, factors = propose(probs[:, order], bounds[:, order], **options)
    torch.testing.assert_close(permuted, proposals[:, order], atol=1e-4, rtol=0)
    torch.testing.assert_close(factors, multipliers[:, order], atol=1e-3, rtol=0)


IMPOSSIBLE = {
    "absent class": ([FREE, (0, 0)], (), [12, 0]),
    "absent class with labels": ([FREE, (0, 0)], ((1, 2), (1, 3)), [10, 2]),
    "more than there is": ([FREE, (20, INF)], (), [0, 12]),
    "more than the labels leave": ([FREE, (11, INF)], ((0, 0), (0, 1), (0, 2)), [3, 9]),
    "everything labelled": ([FREE, (1, 2)], tuple((1, voxel) for voxel in range(12)), [0, 12]),
}


@pytest.mark.parametrize(("rows", "labels", "expected"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_bounds_that_cannot_be_met_come_as_near_as_possible(rows, labels, expected):
    log_probs = random_logits(1, 2, 3, 4, sharpness=50.0).log_softmax(1)
    label = label_of(labels, 1, 3, 4) if labels else None
    proposals, multipliers = size_proposals(log_probs, bounds_of(rows), label)
    np.testing.assert_allclose(sizes(proposals)[0], expected, atol=2e-3)
    odds = (log_probs[:, 1] - log_probs[:, 0]).abs().max()
    assert multipliers.max() <= odds + np.log(12 / 1e-4) + 1


@pytest.mark.parametrize("rows", [[(8, INF)] * 3, [(0, 0)] * 3])
def test_bounds_that_contradict_each_other_stay_finite(rows):
    probs = random_logits(2, 3, 3, 4).softmax(1)
    proposals, multipliers = propose(probs, bounds_of(rows, [FREE, FREE, (5, 6)]))
    assert proposals.isfinite().all()
    assert multipliers.max() <= 1000
    assert sizes(proposals)[1, 2] == pytest.approx(5, rel=1e-3)  # the other sample is solved


@solvers
def test_probabilities_of_exactly_0_and_1(solver):
    probs = torch.zeros(1, 2, 4, 4)
    probs[:, 1, :2], probs[:, 0, 2:] = 1, 1
    proposals, multipliers = propose(probs, bounds_of([FREE, (12, 13)]), solver=solver, learning_rate=1.0)
    assert proposals.isfinite().all()
    assert (proposals[0, 1, :2] > 0.999).all()
    if solver == "newton":
        np.testing.assert_allclose(proposals[0, 1, 2:], 0.5, atol=1e-3)
        assert multipliers[0, 1, 0] == pytest.approx(-np.log(torch.finfo(torch.float32).tiny), rel=1e-3)


def test_half_precision():
    log_probs = random_logits(1, 2, 300, 300).log_softmax(1).half()
    bounds = bounds_of([FREE, (-INF, 70000)])  # above the largest number of float16
    low, high = size_proposals(log_probs, bounds)[0], size_proposals(log_probs.float(), bounds)[0]
    assert low.dtype == torch.float32 and torch.equal(low, high)
    lower, _ = size_proposals(log_probs, bounds_of([FREE, (70000, INF)]))
    assert sizes(lower)[0, 1] == pytest.approx(70000, rel=1e-4)


def test_no_gradient():
    probs = random_logits(1, 2, 4, 4).requires_grad_().softmax(1)
    proposals, multipliers = propose(probs, bounds_of([FREE, (1, 2)]))
    assert not proposals.requires_grad
    assert not multipliers.requires_grad


PROBS, BOUNDS = torch.full((2, 2, 4, 4), 0.5), bounds_of([FREE, (1, 2)], [FREE, (1, 2)])
MISTAKES = {
    "bounds of another batch": ({"bounds": BOUNDS[:1]}, "axis 0 of the bounds counts samples: expected 2, got 1"),
    "bounds without background": ({"bounds": BOUNDS[:, 1:]}, "classes, background included: expected 2, got 1"),
    "reversed bounds": ({"bounds": BOUNDS.flip(-1)}, "expected lower <= upper"),
    "label of another size": ({"weak_label": torch.zeros(2, 1, 4, 5)}, r"expected a label .*got .*\(2, 1, 4, 5\)"),
    "label that is no class": ({"weak_label": torch.full((2, 1, 4, 4), 2)}, r"expected class numbers 0\.\.1"),
    "label between classes": ({"weak_label": torch.full((2, 1, 4, 4), 0.5)}, r"whole class numbers, got 0\.5"),
    "ignored class": ({"weak_label": torch.zeros(2, 1, 4, 4), "ignore_index": 0}, "a number that is no class"),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(change, message):
    with pytest.raises(ValueError, match=message):
        size_proposals(**{"log_probs": PROBS.log(), "bounds": BOUNDS, **change})
