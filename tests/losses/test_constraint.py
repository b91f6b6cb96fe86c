"""Constraint loss: every formulation and statistic against the slow reference, free bounds, targets, refusals."""

import functools
import math
import warnings

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medconstraints.formulations import (
    AugmentedLagrangian,
    Lagrangian,
    LogBarrierExtension,
    QuadraticPenalty,
    ReLULagrangian,
)
from medconstraints.losses import ConstraintLoss
from medconstraints.statistics import (
    relation,
    soft_centroid,
    soft_centroid_offset,
    soft_fraction,
    soft_mean_intensity,
    soft_moments,
    soft_outside_extent,
    soft_size,
    soft_size_ratio,
    soft_spread,
    soft_volume_size,
)

INF = math.inf
NUM_SAMPLES = 6
INDEX = torch.tensor([4, 1])
SHAPES = {"2D": (2, 3, 6, 5), "3D": (2, 3, 4, 3, 5)}
FORMULATIONS = {
    "quadratic": QuadraticPenalty,
    "barrier": lambda: LogBarrierExtension(t=5.0),
    "Lagrangian": lambda: Lagrangian(NUM_SAMPLES, learning_rate=0.1),
    "ReLULagrangian": lambda: ReLULagrangian(learning_rate=0.1),
    "AugmentedLagrangian": lambda: AugmentedLagrangian(NUM_SAMPLES, penalty=2.0),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
formulations = pytest.mark.parametrize("name", FORMULATIONS)
statistics = pytest.mark.parametrize("statistic", [soft_spread, soft_moments])


def random_probs(shape, rng):
    """Softmax probabilities, double."""
    return torch.softmax(torch.from_numpy(rng.normal(size=shape)), 1)


def bounds_around(values, rng, free=0.3):
    """Bounds (..., 2) of which some are satisfied, some violated, some free; lower <= upper."""
    centre = values.detach().double().cpu().numpy() + rng.normal(scale=0.5, size=values.shape)
    width = rng.uniform(0, 1.5, values.shape)
    bounds = np.stack([centre - width, centre + width], -1)
    missing = rng.random(bounds.shape) < free
    missing[..., 0].flat[0], missing[..., 1].flat[-1] = True, True
    return torch.from_numpy(np.where(missing, np.array([-INF, INF]), bounds))


def target_of(formulation, bounds, **more):
    """Bounds alone, or with the index where the formulation needs it."""
    if formulation.needs_index:
        more["index"] = INDEX
    return {"bounds": bounds, **more} if more else bounds


def cost_of(name, formulation, reference, shape):
    """cost(z, sample, row, component, side) of the reference with the multipliers that the formulation has now."""
    if name == "quadratic":
        return lambda z, *place: reference.quadratic(z)
    if name == "barrier":
        return lambda z, *place: reference.log_barrier(z, 5.0)
    rows = formulation.multipliers.double().reshape(-1, *shape[1:])
    rows = rows.expand(shape) if name == "ReLULagrangian" else rows[INDEX]
    if name == "Lagrangian":
        return lambda z, *place: reference.lagrangian(z, rows[place].item())
    if name == "ReLULagrangian":
        return lambda z, *place: reference.relu_lagrangian(z, rows[place].item())
    return lambda z, *place: reference.augmented_lagrangian(z, rows[place].item(), 2.0)


def warmed_up(loss, probs, target, steps=2):
    """The multipliers of a formulation that has some."""
    if loss.formulation.has_multipliers:
        for _ in range(steps):
            loss(probs, target)
            loss.formulation.step()
    return loss


# Against the reference


@formulations
@shapes
def test_equals_the_reference(shape, name, rng, constraint_reference):
    probs = random_probs(shape, rng)
    values = soft_moments(probs)
    np.testing.assert_allclose(values.numpy(), constraint_reference.moments(probs.numpy()), rtol=1e-9)
    bounds = bounds_around(values, rng)
    formulation = FORMULATIONS[name]()
    loss = ConstraintLoss(soft_moments, formulation, reduction="none")
    target = target_of(formulation, bounds)
    warmed_up(loss, probs, target)
    value = loss(probs, target)
    cost = cost_of(name, formulation, constraint_reference, (2, 2, values.shape[-1], 2))
    expected = constraint_reference.constraint_loss(
        constraint_reference.moments(probs.numpy()),
        bounds.numpy(),
        cost,
        rows=[1, 2],
        voxels_per_image=math.prod(shape[2:]),
        reduction="none",
    )
    assert value.shape == (2, 2, values.shape[-1])
    assert name == "barrier" or np.any(expected != 0)
    np.testing.assert_allclose(value.numpy(), expected, rtol=2e-5, atol=1e-6)


STATISTICS = {
    "size": (soft_size, "size", {}),
    "size in mm": (soft_size, "size", {"spacing_mm": (0.5, 2.0)}),
    "centroid, spacing of each sample": (soft_centroid, "centroid", {"spacing_mm": [[0.5, 2.0], [3.0, 0.7]]}),
    "spread": (soft_spread, "spread", {"spacing_mm": (0.5, 2.0)}),
    "moments": (soft_moments, "moments", {"spacing_mm": [[0.5, 2.0], [3.0, 0.7]]}),
}


@pytest.mark.parametrize(("statistic", "name", "more"), STATISTICS.values(), ids=STATISTICS)
def test_a_mapping_hands_its_keywords_to_the_statistic(statistic, name, more, rng, constraint_reference):
    probs = random_probs((2, 3, 6, 5), rng)
    spacing = more.get("spacing_mm")
    values = getattr(constraint_reference, name)(probs.numpy(), spacing)
    bounds = bounds_around(torch.from_numpy(values), rng)
    expected = constraint_reference.constraint_loss(
        values, bounds.numpy(), lambda z, *_: constraint_reference.quadratic(z), rows=[1, 2], voxels_per_image=30
    )
    as_tensor = {"spacing_mm": MetaTensor(torch.tensor(spacing, dtype=torch.float64))} if spacing else {}
    for keywords in (more, as_tensor):
        value = ConstraintLoss(statistic, QuadraticPenalty())(probs, {"bounds": bounds, **keywords})
        assert value.item() == pytest.approx(expected, rel=1e-9) and expected > 0


@pytest.mark.parametrize("statistic", [soft_mean_intensity, soft_fraction])
def test_intensities(statistic, rng, constraint_reference):
    probs, maps = random_probs((2, 3, 6, 5), rng), torch.from_numpy(rng.normal(5, 2, (2, 2, 6, 5)))
    values = constraint_reference.fraction(probs.numpy(), maps.numpy())
    bounds = bounds_around(torch.from_numpy(values), rng)
    expected = constraint_reference.constraint_loss(
        values, bounds.numpy(), lambda z, *_: constraint_reference.quadratic(z), rows=[1, 2], voxels_per_image=30
    )
    keyword = "image" if statistic is soft_mean_intensity else "potential"
    loss = ConstraintLoss(statistic, QuadraticPenalty())
    assert loss(probs, {"bounds": bounds, keyword: maps}).item() == pytest.approx(expected, rel=1e-9)
    other = ConstraintLoss(functools.partial(statistic, **{keyword: maps}), QuadraticPenalty())
    assert other(probs, bounds).item() == pytest.approx(expected, rel=1e-9)


RELATIONS = {
    "size ratio": (soft_size_ratio, "size_ratio", {}),
    "centroid offset": (soft_centroid_offset, "centroid_offset", {}),
    "outside extent": (soft_outside_extent, "outside_extent", {}),
    "outside extent along lines": (soft_outside_extent, "outside_extent", {"along_lines": True}),
}


@pytest.mark.parametrize(("relation", "name", "options"), RELATIONS.values(), ids=RELATIONS)
def test_relations_keep_all_their_rows(relation, name, options, rng, constraint_reference):
    probs, pairs = random_probs((2, 4, 6, 5), rng), [(1, 2), (3, 1), (2, 3)]
    values = getattr(constraint_reference, name)(probs.numpy(), pairs, **options)
    bounds = bounds_around(torch.from_numpy(values), rng, free=0)
    expected = constraint_reference.constraint_loss(
        values, bounds.numpy(), lambda z, *_: constraint_reference.quadratic(z), voxels_per_image=30, reduction="none"
    )
    statistic = functools.partial(relation, pairs=pairs, **options)
    loss = ConstraintLoss(statistic, QuadraticPenalty(), reduction="none")
    value = loss(probs, bounds)
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-8, atol=1e-14)
    assert loss.last.residual.shape == (2, 3, values.shape[-1], 2)


def test_a_statistic_of_ones_own_can_be_a_relation(rng):
    @relation
    def difference(probs):
        sizes = soft_size(probs)
        return sizes[:, 1:2] - sizes[:, 2:3]

    probs = random_probs((2, 3, 6, 5), rng)
    loss = ConstraintLoss(difference, QuadraticPenalty(), normalization="none")
    expected = difference(probs).square().mean()
    torch.testing.assert_close(loss(probs, torch.zeros(2, 1, 1, 2)), expected)


# Selection, units, normalization, reductions


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, [1, 2, 3]),
        ({"include_background": True}, [0, 1, 2, 3]),
        ({"classes": (2,)}, [2]),
        ({"classes": [1, 3]}, [1, 3]),
        ({"classes": (3, 1)}, [3, 1]),
        ({"classes": (0, 2), "include_background": True}, [0, 2]),
    ],
)
def test_selects_classes(options, rows, rng, constraint_reference):
    probs = random_probs((2, 4, 6, 5), rng)
    values = constraint_reference.centroid(probs.numpy())
    bounds = bounds_around(torch.from_numpy(values), rng)
    loss = ConstraintLoss(soft_centroid, QuadraticPenalty(), reduction="none", **options)
    expected = constraint_reference.constraint_loss(
        values,
        bounds.numpy(),
        lambda z, *_: constraint_reference.quadratic(z),
        rows=rows,
        voxels_per_image=30,
        reduction="none",
    )
    np.testing.assert_allclose(loss(probs, bounds).numpy(), expected, rtol=1e-9, atol=1e-15)
    assert loss.last.residual.shape == (2, len(rows), 2, 2)


def test_classes_that_do_not_count_have_no_gradient(rng):
    probs = random_probs((2, 4, 6, 5), rng).requires_grad_()
    loss = ConstraintLoss(soft_size, QuadraticPenalty(), classes=(2,))
    loss(probs, torch.zeros(2, 4, 1, 2)).backward()
    assert (probs.grad[:, [0, 1, 3]] == 0).all() and (probs.grad[:, 2] > 0).all()


@formulations
def test_unit_divides_the_residual(name, rng, constraint_reference):
    probs, unit = random_probs((2, 3, 6, 5), rng), 3.0
    bounds = bounds_around(soft_moments(probs), rng)
    formulation = FORMULATIONS[name]()
    loss = ConstraintLoss(soft_moments, formulation, unit=unit)
    target = target_of(formulation, bounds)
    value = warmed_up(loss, probs, target)(probs, target)
    expected = constraint_reference.constraint_loss(
        constraint_reference.moments(probs.numpy()),
        bounds.numpy(),
        cost_of(name, formulation, constraint_reference, (2, 2, 3, 2)),
        rows=[1, 2],
        voxels_per_image=30,
        unit=unit,
    )
    assert value.item() == pytest.approx(expected, rel=2e-5, abs=1e-6)


def test_units_of_the_components(rng):
    """The size in hundreds of voxels, the centroid in tenths."""
    probs, units = random_probs((2, 3, 6, 5), rng), [100.0, 0.1, 0.2]
    bounds = bounds_around(soft_moments(probs), rng)
    scaled = bounds / torch.tensor(units, dtype=torch.float64).view(3, 1)

    def statistic(probs):
        return soft_moments(probs) / torch.tensor(units, dtype=torch.float64)

    expected = ConstraintLoss(statistic, QuadraticPenalty())(probs, scaled)
    torch.testing.assert_close(ConstraintLoss(soft_moments, QuadraticPenalty(), unit=units)(probs, bounds), expected)


@shapes
def test_normalization(shape, rng):
    probs = random_probs(shape, rng)
    bounds = bounds_around(soft_size(probs), rng)
    plain = ConstraintLoss(soft_size, QuadraticPenalty(), normalization="none")(probs, bounds)
    by_size = ConstraintLoss(soft_size, QuadraticPenalty(), normalization="image_size")(probs, bounds)
    assert plain.item() > 0
    torch.testing.assert_close(by_size * math.prod(shape[2:]), plain)
    assert ConstraintLoss(soft_size, QuadraticPenalty())(probs, bounds) == by_size


def test_reductions(rng):
    probs = random_probs((2, 4, 6, 5), rng)
    bounds = bounds_around(soft_moments(probs), rng)
    none, total, mean = (
        ConstraintLoss(soft_moments, QuadraticPenalty(), reduction=reduction)(probs, bounds)
        for reduction in ("none", "sum", "mean")
    )
    assert none.shape == (2, 3, 3) and total.shape == mean.shape == ()
    torch.testing.assert_close(none.sum(), total)
    torch.testing.assert_close(total / (2 * 3 * 3), mean)  # samples * classes * components, free ones too


# Activations


@pytest.mark.parametrize("logit_scale", [None, 5.0])
@pytest.mark.parametrize(("channels", "activation"), [(3, "softmax"), (3, "sigmoid"), (1, "sigmoid")])
def test_activation(channels, activation, logit_scale, rng):
    """softmax(5 * logits) is what the thesis calls a temperature of 5."""
    logits = torch.from_numpy(rng.normal(size=(2, channels, 6, 5)))
    scaled = logits if logit_scale is None else logit_scale * logits
    probs = torch.softmax(scaled, 1) if activation == "softmax" else torch.sigmoid(scaled)
    bounds, options = torch.tensor([5.0, 6.0]).expand(2, channels, 1, 2), {"include_background": True}
    given = {} if logit_scale is None else {"logit_scale": logit_scale}
    inside = ConstraintLoss(soft_size, QuadraticPenalty(), **{activation: True}, **given, **options)(logits, bounds)
    expected = (soft_size(probs).unsqueeze(-1) - bounds.double()) * torch.tensor([-1.0, 1.0])
    expected = expected.clamp(min=0).square().sum(-1).mean() / 30
    assert expected.item() > 0
    torch.testing.assert_close(inside, expected)


@pytest.mark.parametrize("one", [0, 1])
def test_one_of_two_channels_is_activated_alone(one, rng):
    """A softmax of two channels is a sigmoid of their difference; not when others have made the softmax already."""
    logits = torch.from_numpy(rng.normal(size=(2, 2, 6, 5)))
    probs, seen, bounds = torch.softmax(3 * logits, 1), [], torch.zeros(2, 2, 1, 2)

    def size(probs):
        seen.append(probs)
        return soft_size(probs)

    loss = ConstraintLoss(size, QuadraticPenalty(), classes=[one], softmax=True, logit_scale=3.0, normalization="none")
    shared = loss.probabilities(logits)
    shared.all()
    for probabilities in (None, shared):
        value = loss(logits, bounds, probabilities=probabilities)
        torch.testing.assert_close(value, soft_size(probs)[:, one].square().mean())
    assert [each.shape[1] for each in seen] == [1, 2]


def test_one_channel_is_a_foreground(rng):
    probs = torch.from_numpy(rng.random((2, 1, 6, 5)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = ConstraintLoss(soft_size, QuadraticPenalty())(probs, torch.zeros(2, 1, 1, 2))
    torch.testing.assert_close(value, soft_size(probs).square().mean() / 30)


def test_does_not_warn_without_reason(rng):
    bounds, logits = torch.zeros(1, 2, 1, 2), torch.from_numpy(rng.normal(size=(1, 2, 6, 5)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ConstraintLoss(soft_size, QuadraticPenalty())(torch.softmax(logits, 1), bounds)
        ConstraintLoss(soft_size, QuadraticPenalty(), softmax=True)(logits, bounds)
        single = torch.softmax(logits.float(), 1).bfloat16()  # does not add up to 1 exactly
        ConstraintLoss(soft_size, QuadraticPenalty())(single, bounds)


# Free bounds


@formulations
def test_all_free_costs_nothing(name, rng):
    formulation = FORMULATIONS[name]()
    bounds = torch.tensor([-INF, INF]).expand(2, 3, 3, 2).contiguous()
    for reduction in ("mean", "sum", "none"):
        probs = random_probs((2, 3, 6, 5), rng).float().requires_grad_()
        loss = ConstraintLoss(soft_moments, formulation, reduction=reduction)
        for _ in range(2):
            probs.grad = None
            value = loss(probs, target_of(formulation, bounds))
            value.sum().backward()
            assert (value == 0).all() and (probs.grad == 0).all()
            formulation.step()
    if formulation.has_multipliers:
        assert (formulation.multipliers == 0).all()
    assert loss.last.free.all() and loss.terms()["satisfied"] == 1 and loss.terms()["violation"] == 0


@formulations
def test_a_free_bound_leaves_the_other_side(name, rng):
    """What is free on one side costs and pulls as the other side alone does."""
    probs = random_probs((2, 3, 6, 5), rng)
    values = soft_size(probs).detach()
    results = []
    for lower, upper in ((-INF, -1.0), (-1e9, -1.0)):
        formulation = FORMULATIONS[name]()
        bounds = torch.stack([values + lower, values + upper], -1)
        loss = ConstraintLoss(soft_size, formulation, reduction="sum", normalization="none")
        target, logits = target_of(formulation, bounds), probs.clone().requires_grad_()
        warmed_up(loss, probs, target)
        (slope,) = torch.autograd.grad(loss(logits, target), logits)
        results.append(slope)
    assert results[0].isfinite().all() and (results[0] != 0).any()
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["Lagrangian", "ReLULagrangian", "AugmentedLagrangian"])
def test_multipliers_of_free_bounds_stay_zero(name, rng):
    probs, formulation = random_probs((2, 3, 6, 5), rng), FORMULATIONS[name]()
    bounds = torch.tensor([INF, INF]).expand(2, 3, 1, 2).clone()
    bounds[..., 0] = -INF
    bounds[:, 1, 0, 1] = 1.0  # violated
    loss = warmed_up(ConstraintLoss(soft_size, formulation), probs, target_of(formulation, bounds))
    rows = formulation.multipliers.reshape(-1, 2, 1, 2)
    rows = rows if name == "ReLULagrangian" else rows[INDEX]
    assert rows.isfinite().all() and (rows[:, 0, 0, 1] > 0).all()
    assert (rows[:, 1] == 0).all() and (rows[:, 0, 0, 0] == 0).all()
    assert loss.last.free.sum() == 2 * 3


def test_equal_bounds_pull_from_both_sides():
    loss = ConstraintLoss(soft_size, QuadraticPenalty(), include_background=True, normalization="none")
    for goal, sign in ((10.0, 1), (30.0, -1), (20.0, 0)):
        probs = torch.full((1, 1, 8, 10), 0.25, requires_grad=True)
        value = loss(probs, torch.full((1, 1, 1, 2), goal))
        value.backward()
        assert value.item() == pytest.approx((20 - goal) ** 2)
        assert (probs.grad.sign() == sign).all()


@formulations
@pytest.mark.parametrize("statistic", [soft_spread, soft_moments])
def test_empty_classes_are_finite(name, statistic):
    probs = torch.zeros(2, 3, 6, 5)
    probs[0, 0] = 1
    probs.requires_grad_()
    formulation = FORMULATIONS[name]()
    loss = ConstraintLoss(statistic, formulation)
    bounds = torch.tensor([1.0, 2.0]).expand(2, 3, statistic(probs).shape[-1], 2)
    for _ in range(2):
        value = loss(probs, target_of(formulation, bounds))
        value.backward()
        formulation.step()
    assert value.isfinite() and probs.grad.isfinite().all()


def test_an_absent_class_with_a_free_centroid_has_no_gradient():
    """The size is bound, the centroid of an absent class is not."""
    logits = torch.zeros(1, 2, 6, 5)
    logits[:, 1] = -200.0  # exactly 0 after the softmax
    logits.requires_grad_()
    bounds = torch.tensor([[[[-INF, INF]] * 2] * 2])
    value = ConstraintLoss(soft_centroid, LogBarrierExtension(), softmax=True)(logits, bounds)
    value.backward()
    assert value.item() == 0 and (logits.grad == 0).all()


# Gradients and precision


@pytest.mark.parametrize("state", ["feasible", "boundary", "violated"])
@pytest.mark.parametrize("name", ["quadratic", "barrier"])
def test_gradcheck(name, state, rng):
    logits = torch.from_numpy(rng.normal(size=(1, 3, 3, 3))).requires_grad_()
    values = soft_moments(torch.softmax(logits, 1)).detach()
    below, above = {"feasible": (-1.0, 1.5), "boundary": (-0.03, 0.02), "violated": (0.2, 0.4)}[state]
    bounds = torch.stack([values + below, values + above], -1)
    bounds[0, 1, 0, 1] = INF
    formulation = QuadraticPenalty() if name == "quadratic" else LogBarrierExtension(t=4.0).double()
    loss = ConstraintLoss(soft_moments, formulation, softmax=True)
    assert torch.autograd.gradcheck(lambda x: loss(x, bounds), logits)
    satisfied = loss.terms()["satisfied"].item()
    assert satisfied == 1 if state != "violated" else 0 < satisfied < 1


@pytest.mark.parametrize("name", ["Lagrangian", "ReLULagrangian", "AugmentedLagrangian"])
def test_gradcheck_with_multipliers(name, rng):
    probs = random_probs((2, 3, 3, 4), rng)
    formulation = FORMULATIONS[name]()
    bounds = bounds_around(soft_moments(probs), rng)
    target = target_of(formulation, bounds)
    loss = warmed_up(ConstraintLoss(soft_moments, formulation), probs, target).double()
    assert torch.autograd.gradcheck(lambda p: loss(p, target), probs.requires_grad_())


def test_slope_of_the_penalty(rng):
    """Eq. 2.4: 2 (V - b) of each voxel of what is too large, nothing else."""
    probs = random_probs((2, 3, 6, 5), rng).requires_grad_()
    loss = ConstraintLoss(soft_size, QuadraticPenalty(), reduction="sum", normalization="none")
    size = soft_size(probs).detach()
    bounds = torch.stack([size - 1, size + 1], -1)
    bounds[1, 2, 0] = torch.tensor([0.0, 2.0])
    loss(probs, bounds).backward()
    expected = torch.zeros_like(probs)
    expected[1, 2] = 2 * (size[1, 2, 0] - 2)
    torch.testing.assert_close(probs.grad, expected)


@formulations
def test_half_precision_is_finite(name):
    """67,600 voxels; residuals whose square is above 65,504."""
    logits = torch.zeros(1, 2, 260, 260, dtype=torch.float16)
    logits[:, 1, :200] += 8
    logits.requires_grad_()
    formulation = FORMULATIONS[name]()
    loss = ConstraintLoss(soft_moments, formulation, softmax=True)
    bounds = torch.tensor([[[10.0, 1000.0], [200.0, 210.0], [-INF, 100.0]]] * 2)[None]
    target = {"bounds": bounds, "index": torch.tensor([3])}
    for _ in range(2):
        logits.grad = None
        value = loss(logits, target)
        value.backward()
        formulation.step()
    assert value.dtype == torch.float32 and value.isfinite() and value > 0
    assert logits.grad.dtype == torch.float16 and logits.grad.isfinite().all() and (logits.grad != 0).any()
    other = ConstraintLoss(soft_moments, QuadraticPenalty(), softmax=True)
    assert other(logits.detach(), bounds).item() == pytest.approx(other(logits.detach().float(), bounds).item())


@pytest.mark.slow
def test_half_precision_of_a_large_volume():
    logits = torch.zeros(1, 2, 512, 512, 200, dtype=torch.float16)
    logits[:, 1, :300] += 8
    logits.requires_grad_()
    bounds = torch.tensor([[[10.0, 1000.0], [200.0, 210.0], [-INF, 100.0], [0.0, 10.0]]] * 2)[None]
    value = ConstraintLoss(soft_moments, LogBarrierExtension(), softmax=True)(logits, bounds)
    value.backward()
    assert value.dtype == torch.float32 and value.isfinite() and logits.grad.isfinite().all()
    sizes = ConstraintLoss(soft_size, QuadraticPenalty(), softmax=True, normalization="none")
    part = sizes(logits.detach(), torch.tensor([[[[0.0, 0.0]]] * 2]))
    inside = torch.tensor(8.0).sigmoid().double() * 300 + 0.5 * 212
    assert part.item() == pytest.approx((inside.item() * 512 * 200) ** 2, rel=1e-2)


@formulations
def test_autocast_changes_nothing(name, rng):
    values = torch.from_numpy(rng.normal(size=(2, 3, 6, 5))).float()
    bounds = bounds_around(soft_moments(torch.softmax(values, 1)), rng).float()
    results = []
    for enabled in (False, True):
        logits, formulation = values.clone().requires_grad_(), FORMULATIONS[name]()
        loss = ConstraintLoss(soft_moments, formulation, softmax=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            for _ in range(2):
                logits.grad = None
                value = loss(logits, target_of(formulation, bounds))
                value.backward()
                formulation.step()
        results.append((value.detach(), logits.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert (results[0][1] != 0).any()


# Invariances


def test_translation(rng):
    probs = random_probs((2, 3, 6, 5), rng)
    bounds = bounds_around(soft_centroid(probs), rng)
    moved = bounds + torch.tensor([4.0, 7.0], dtype=torch.float64).view(2, 1)
    loss = ConstraintLoss(soft_centroid, LogBarrierExtension(), normalization="none")
    torch.testing.assert_close(loss(torch.nn.functional.pad(probs, (7, 1, 4, 2)), moved), loss(probs, bounds))


@statistics
def test_permutation_of_classes_and_samples(statistic, rng):
    probs, order = random_probs((3, 4, 6, 5), rng), torch.tensor([0, 3, 1, 2])
    bounds = bounds_around(statistic(probs), rng)
    loss = ConstraintLoss(statistic, LogBarrierExtension(), reduction="none")
    other = loss(probs[:, order].flip(0), bounds[:, order].flip(0))
    torch.testing.assert_close(other, loss(probs, bounds)[:, order[1:] - 1].flip(0))


@pytest.mark.parametrize("statistic", [soft_centroid, soft_spread])
def test_spacing_and_unit_cancel(statistic, rng):
    """The same image in mm, with bounds and the unit in mm."""
    probs = random_probs((2, 3, 6, 5), rng)
    bounds = bounds_around(statistic(probs), rng)
    plain = ConstraintLoss(statistic, LogBarrierExtension())(probs, bounds)
    in_mm = ConstraintLoss(statistic, LogBarrierExtension(), unit=2.5)
    torch.testing.assert_close(in_mm(probs, {"bounds": 2.5 * bounds, "spacing_mm": (2.5, 2.5)}), plain)


@statistics
def test_samples_are_independent(statistic, rng):
    probs = random_probs((3, 3, 6, 5), rng).requires_grad_()
    bounds = bounds_around(statistic(probs), rng)
    loss = ConstraintLoss(statistic, LogBarrierExtension(), reduction="none")
    whole = loss(probs, bounds)
    for sample in range(3):
        own = slice(sample, sample + 1)
        torch.testing.assert_close(whole[own], loss(probs[own], bounds[own]))
    (slope,) = torch.autograd.grad(whole[1].sum(), probs)
    assert (slope[[0, 2]] == 0).all() and (slope[1] != 0).any()


def test_samples_have_their_own_multipliers(rng):
    """The order of the batch does not matter where the index goes with it."""
    probs = random_probs((3, 3, 6, 5), rng)
    bounds, index = bounds_around(soft_size(probs), rng), torch.tensor([5, 0, 2])
    formulation = Lagrangian(NUM_SAMPLES, learning_rate=0.1)
    loss = ConstraintLoss(soft_size, formulation, reduction="none")
    warmed_up(loss, probs, {"bounds": bounds, "index": index})
    plain = loss(probs, {"bounds": bounds, "index": index})
    other = loss(probs.flip(0), {"bounds": bounds.flip(0), "index": index.flip(0)})
    torch.testing.assert_close(other, plain.flip(0))
    assert (plain != 0).any()


# What it remembers


def test_last_and_residual(rng, constraint_reference):
    probs = random_probs((2, 3, 6, 5), rng).requires_grad_()
    bounds = bounds_around(soft_moments(probs), rng)
    loss = ConstraintLoss(soft_moments, QuadraticPenalty(), unit=2.0)
    expected = constraint_reference.residuals(soft_moments(probs).detach().numpy(), bounds.numpy(), unit=2.0)[:, 1:]
    free = np.isinf(bounds.numpy())[:, 1:]
    residual, is_free, index = loss.residual(probs, bounds)
    assert index is None and residual.requires_grad
    loss(probs, bounds)
    assert loss.last._fields == ("residual", "free", "index") and not loss.last.residual.requires_grad
    for own, own_free in ((residual.detach(), is_free), (loss.last.residual, loss.last.free)):
        assert own.shape == (2, 2, 3, 2) and own_free.dtype == torch.bool
        assert (own_free.numpy() == free).all() and free.any()
        np.testing.assert_allclose(own.numpy()[~free], expected[~free], rtol=1e-9)


@pytest.mark.parametrize("name", ["quadratic", "Lagrangian"])
def test_the_index_is_remembered(name, rng):
    formulation = FORMULATIONS[name]()
    loss = ConstraintLoss(soft_size, formulation)
    target = {"bounds": torch.zeros(2, 3, 1, 2), "index": INDEX}
    loss(random_probs((2, 3, 6, 5), rng), target)
    assert torch.equal(loss.last.index, INDEX)
    assert torch.equal(loss.residual(random_probs((2, 3, 6, 5), rng), target)[2], INDEX)


def test_residual_is_not_observed(rng):
    formulation = FORMULATIONS["Lagrangian"]()
    loss = ConstraintLoss(soft_size, formulation)
    probs, target = random_probs((2, 3, 6, 5), rng), {"bounds": torch.zeros(2, 3, 1, 2), "index": INDEX}
    loss(probs, target)
    formulation.forget()
    loss.residual(probs, target)
    formulation.step()
    assert (formulation.multipliers == 0).all()


def test_an_evaluation_is_not_observed(rng):
    formulation = FORMULATIONS["Lagrangian"]()
    loss = ConstraintLoss(soft_size, formulation)
    probs, target = random_probs((2, 3, 6, 5), rng), {"bounds": torch.zeros(2, 3, 1, 2), "index": INDEX}
    loss.eval()
    loss(probs, target)
    formulation.step()
    assert not formulation.multipliers.any()
    loss.train()
    loss(probs, target)
    formulation.step()
    assert formulation.multipliers.any()


def test_terms():
    """Mass 20 of both classes; of four bounds one is free, one is satisfied, and two are violated by 4 and 8 units."""
    probs = torch.full((1, 3, 8, 10), 0.25)
    bounds = torch.tensor([[[[0.0, 0.0]], [[-INF, 12.0]], [[24.0, 30.0]]]])
    loss = ConstraintLoss(soft_size, QuadraticPenalty(), unit=0.5)
    loss(probs, bounds)
    terms = loss.terms()
    assert set(terms) >= {"satisfied", "violation"}
    assert all(type(term) is torch.Tensor and term.shape == () and not term.requires_grad for term in terms.values())
    assert terms["satisfied"].item() == pytest.approx(1 / 3)
    assert terms["violation"].item() == pytest.approx((16 + 8) / 3)


def test_a_residual_of_zero_is_satisfied():
    probs = torch.full((1, 2, 8, 10), 0.25)
    loss = ConstraintLoss(soft_size, QuadraticPenalty())
    loss(probs, torch.full((1, 2, 1, 2), 20.0))
    assert loss.terms()["satisfied"] == 1 and loss.terms()["violation"] == 0


def test_terms_before_a_forward_pass():
    assert ConstraintLoss(soft_size, QuadraticPenalty()).terms() == {}


def test_state_is_that_of_the_formulation(rng):
    loss = ConstraintLoss(soft_size, Lagrangian(NUM_SAMPLES, learning_rate=0.1))
    target = {"bounds": torch.zeros(2, 3, 1, 2), "index": INDEX}
    warmed_up(loss, random_probs((2, 3, 6, 5), rng), target)
    other = ConstraintLoss(soft_size, Lagrangian(NUM_SAMPLES, learning_rate=0.1))
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.formulation.multipliers, loss.formulation.multipliers)
    assert (other.formulation.multipliers > 0).any()
    assert all(key.startswith("formulation.") for key in loss.state_dict()) and not list(loss.parameters())


def test_repr_shows_the_settings():
    text = repr(ConstraintLoss(soft_size, QuadraticPenalty(), classes=(1, 2), unit=100.0, normalization="none"))
    for words in ("soft_size", "QuadraticPenalty", "classes=[1, 2]", "100.0", "'none'"):
        assert words in text
    assert "soft_size_ratio" in repr(
        ConstraintLoss(functools.partial(soft_size_ratio, pairs=[(1, 2)]), QuadraticPenalty())
    )


# Drop-in


@pytest.mark.parametrize("name", ["barrier", "Lagrangian"])
def test_meta_tensors_give_a_plain_tensor(name, rng):
    probs = random_probs((2, 3, 6, 5), rng)
    bounds = bounds_around(soft_size(probs), rng)
    plain = ConstraintLoss(soft_size, FORMULATIONS[name]())
    expected = plain(probs, target_of(plain.formulation, bounds))
    loss = ConstraintLoss(soft_size, FORMULATIONS[name]())
    image, target = MetaTensor(probs.clone()).requires_grad_(), target_of(loss.formulation, MetaTensor(bounds))
    value = loss(image, target)
    assert type(value) is torch.Tensor and torch.equal(value, expected)
    assert type(loss.last.residual) is torch.Tensor and type(loss.last.free) is torch.Tensor
    assert all(type(term) is torch.Tensor for term in loss.terms().values())
    value.backward()
    assert image.grad.isfinite().all()


def test_bounds_of_another_precision(rng):
    probs = random_probs((2, 3, 6, 5), rng).float()
    bounds = torch.tensor([1.0, 3.0]).expand(2, 3, 1, 2)
    loss = ConstraintLoss(soft_size, QuadraticPenalty())
    for other in (bounds.double(), bounds.half(), bounds.long()):
        value = loss(probs, other)
        assert value.isfinite() and value.item() == pytest.approx(loss(probs, bounds).item(), rel=1e-6)


def test_descent_reaches_size_and_centroid():
    """No image and no label: a size of 60 to 80 and a place."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, 16, 16, generator=generator).requires_grad_()
    barrier = LogBarrierExtension(t=5.0, factor=1.05, max_t=50.0)
    loss = ConstraintLoss(soft_moments, barrier, softmax=True)
    bounds = torch.tensor([[[[-INF, INF]] * 3, [[60.0, 80.0], [5.0, 7.0], [11.0, 13.0]]]])
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for step in range(120):
        optimizer.zero_grad()
        loss(logits, bounds).backward()
        optimizer.step()
        if step % 6 == 5:
            barrier.step()
    assert loss.terms()["satisfied"] == 1
    size, row, column = soft_moments(torch.softmax(logits, 1))[0, 1].tolist()
    assert 60 <= size <= 80 and 5 <= row <= 7 and 11 <= column <= 13


# Refusals

EVEN = torch.full((2, 3, 4, 4), 1 / 3)
BAD_BOUNDS = {
    "too few samples": ((1, 3, 1, 2), "target: axis 0 of the bounds counts samples: expected 2, got 1"),
    "too few classes": (
        (2, 2, 1, 2),
        "target: axis 1 of the bounds counts classes, background included: expected 3, got 2",
    ),
    "too many components": (
        (2, 3, 2, 2),
        "target: axis 2 of the bounds counts components of the statistic: expected 1, got 2",
    ),
    "one number": ((2, 3, 1, 1), "target: axis 3 of the bounds counts lower and upper: expected 2, got 1"),
    "no pair": ((2, 3, 1), r"target: expected bounds of shape \(2, 3, 1, 2\).*got \(2, 3, 1\)"),
}


@pytest.mark.parametrize(("shape", "words"), BAD_BOUNDS.values(), ids=BAD_BOUNDS)
def test_refuses_bounds_of_another_shape(shape, words):
    with pytest.raises(ValueError, match=words):
        ConstraintLoss(soft_size, QuadraticPenalty())(EVEN, torch.zeros(shape))


def test_refuses_lower_above_upper():
    bounds = torch.tensor([1.0, 2.0]).expand(2, 3, 1, 2).clone()
    bounds[1, 2, 0] = torch.tensor([3.0, 2.0])
    with pytest.raises(ValueError, match=r"target: expected lower <= upper.*got 3\.0 and 2\.0 at .*\(1, 2, 0\)"):
        ConstraintLoss(soft_size, QuadraticPenalty())(EVEN, bounds)


def test_refuses_bounds_that_are_no_number():
    side = 1
    bounds = torch.tensor([1.0, 2.0]).expand(2, 3, 1, 2).clone()
    bounds[1, 2, 0, side] = math.nan
    with pytest.raises(ValueError, match=r"target: expected lower <= upper.*\(1, 2, 0\); .*never NaN"):
        ConstraintLoss(soft_size, QuadraticPenalty())(EVEN, bounds)


@pytest.mark.parametrize("classes", [(3,), (1, 7), (-1,)])
def test_refuses_a_class_that_does_not_exist(classes):
    with pytest.raises(ValueError, match=r"classes: expected .*-1|classes: expected channel numbers below 3"):
        ConstraintLoss(soft_size, QuadraticPenalty(), classes=classes)(EVEN, torch.zeros(2, 3, 1, 2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"classes": ()}, r"classes: expected .*got"),
        ({"unit": 0.0}, r"unit: expected .*got 0\.0"),
        ({"unit": math.nan}, "unit: expected .*got nan"),
        ({"logit_scale": 0.0, "softmax": True}, r"logit_scale: expected .*got 0\.0"),
        ({"logit_scale": 2.0}, r"logit_scale: expected .*1 without sigmoid or softmax, got 2\.0"),
        ({"softmax": "false"}, r"softmax: expected True or False, got 'false'"),
        ({"normalization": "relative"}, r'normalization: expected "image_size" or "none", got .relative.'),
        ({"sigmoid": True, "softmax": True}, "sigmoid, softmax, other_act: expected at most one"),
        ({"reduction": "average"}, "average"),
    ],
)
def test_refuses_senseless_settings(options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        ConstraintLoss(soft_size, QuadraticPenalty(), **options)


@pytest.mark.parametrize("formulation", [LogBarrierExtension, torch.nn.Identity()])
def test_formulation_is_declared(formulation):
    with pytest.raises(TypeError, match=r"formulation: expected one such as .*got"):
        ConstraintLoss(soft_size, formulation)


@pytest.mark.parametrize("statistic", ["soft_size", None])
def test_statistic_is_a_function(statistic):
    with pytest.raises(TypeError, match=r"statistic: expected .*got"):
        ConstraintLoss(statistic, QuadraticPenalty())


@pytest.mark.parametrize("name", ["Lagrangian", "AugmentedLagrangian"])
def test_asks_for_the_index(name):
    with pytest.raises(ValueError, match=f"index: {name}"):
        ConstraintLoss(soft_size, FORMULATIONS[name]())(EVEN, torch.zeros(2, 3, 1, 2))


def test_asks_for_the_bounds():
    with pytest.raises((ValueError, KeyError), match=r"bounds"):
        ConstraintLoss(soft_size, QuadraticPenalty())(EVEN, {"index": INDEX})


@pytest.mark.parametrize("target", [None, [[0.0, 1.0]]])
def test_refuses_what_is_no_target(target):
    with pytest.raises((TypeError, ValueError), match=r"(target|bounds): expected .*got"):
        ConstraintLoss(soft_size, QuadraticPenalty())(EVEN, target)


@pytest.mark.parametrize(
    ("probs", "words"),
    [
        (torch.ones(2, 6, 6), r"input: expected a floating point tensor"),
        (torch.ones(2, 3, 6, 6, dtype=torch.int64), "input: expected a floating point .*got torch.int64 of shape"),
    ],
)
def test_refuses_input_that_is_no_map(probs, words):
    with pytest.raises(ValueError, match=words):
        ConstraintLoss(soft_size, QuadraticPenalty())(probs, torch.zeros(2, 3, 1, 2))


def test_softmax_of_one_channel():
    with pytest.raises(ValueError, match="softmax of a single channel is always 1; use sigmoid=True or two channels"):
        ConstraintLoss(soft_size, QuadraticPenalty(), softmax=True)(torch.zeros(1, 1, 6, 6), torch.zeros(1, 1, 1, 2))


# Volumes of several slices


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("volume", [[0, 1, 0, 2, 1], [7] * 5, None], ids=["three", "one", "the batch"])
def test_volume_size(volume, reduction, rng, constraint_reference):
    """A volume counts once, however many slices it has; divided by the pixels of one slice."""
    probs, numbers = random_probs((5, 3, 6, 4), rng), volume or [0] * 5
    first = [numbers.index(number) for number in numbers]
    values = constraint_reference.volume_size(probs.numpy(), None, numbers)
    bounds = 0.5 * bounds_around(torch.from_numpy(values), rng)[first]
    once = sorted({*first})
    cost = constraint_reference.quadratic
    expected = constraint_reference.constraint_loss(
        values[once],
        bounds[once].numpy(),
        lambda z, *_: cost(z),
        rows=[1, 2],
        voxels_per_image=24,
        reduction=reduction,
    )
    loss = ConstraintLoss(soft_volume_size, QuadraticPenalty(), reduction=reduction)
    target = {"bounds": bounds} if volume is None else {"bounds": bounds, "volume": torch.tensor(volume)}
    assert loss(probs, target).item() == pytest.approx(expected, rel=1e-9) and expected != 0
    assert loss.last.residual.shape == (5, 2, 1, 2)


def test_a_volume_moves_a_shared_multiplier_once(rng):
    """As a batch with one slice of each volume whose residuals are the same would."""
    probs, volume = random_probs((5, 3, 6, 4), rng).float(), torch.tensor([0, 1, 0, 2, 1])
    bounds = torch.zeros(5, 3, 1, 2)
    formulation, expected = (ReLULagrangian(learning_rate=0.1) for _ in range(2))
    ConstraintLoss(soft_volume_size, formulation)(probs, {"bounds": bounds, "volume": volume})
    formulation.step()
    sizes = soft_volume_size(probs, volume=volume)[[0, 1, 3], 1:]
    expected(torch.stack([-sizes, sizes], -1))
    expected.step()
    torch.testing.assert_close(formulation.multipliers, expected.multipliers)
    assert expected.multipliers.any()


def test_a_relation_without_its_mark_is_refused():
    """It would lose its first pair as if that were the background."""
    with pytest.raises(ValueError, match=r"statistic: expected one row for each of the 3 channels, got 2; .*relation"):
        ConstraintLoss(lambda probs: soft_size_ratio(probs, [[1, 2], [2, 1]]), QuadraticPenalty())(
            torch.rand(1, 3, 4, 4), torch.zeros(1, 2, 1, 2)
        )


@pytest.mark.parametrize("make", [lambda: Lagrangian(1, learning_rate=0.5), lambda: AugmentedLagrangian(1)])
def test_a_bound_that_becomes_free_leaves_its_multiplier(make):
    formulation = make()
    loss = ConstraintLoss(soft_size, formulation, normalization="none")
    probs, index = torch.full((1, 2, 4, 4), 0.5), torch.tensor([0])
    known = torch.tensor([[[[-torch.inf, torch.inf]], [[-torch.inf, 5.0]]]])
    loss(probs, {"bounds": known, "index": index})
    formulation.step()
    before = formulation.multipliers.clone()
    assert before.max() > 0
    free = torch.tensor([-torch.inf, torch.inf]).expand(1, 2, 1, 2)
    loss(probs, {"bounds": free, "index": index})
    formulation.step()
    assert torch.equal(formulation.multipliers, before)


def test_unknown_arguments_of_the_statistic_are_named():
    with pytest.raises(ValueError, match=r"target: \['image'\] do not fit the arguments of the statistic"):
        ConstraintLoss(soft_size, QuadraticPenalty())(
            torch.rand(1, 2, 4, 4), {"bounds": torch.zeros(1, 2, 1, 2), "image": torch.rand(1, 1, 4, 4)}
        )
