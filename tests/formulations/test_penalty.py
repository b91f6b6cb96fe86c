"""Quadratic penalty: values, slope, extremes."""

import pytest
import torch

from medconstraints.formulations import QuadraticPenalty


def test_is_half_a_parabola_and_its_dual_the_slope():
    residual = torch.tensor([-torch.inf, -2.0, -1e-9, 0.0, 1e-3, 2.0, 30.0], dtype=torch.float64, requires_grad=True)
    cost = QuadraticPenalty()(residual)
    torch.testing.assert_close(cost, torch.tensor([0, 0, 0, 0, 1e-6, 4, 900], dtype=torch.float64))
    cost.sum().backward()
    torch.testing.assert_close(residual.grad, torch.tensor([0, 0, 0, 0, 2e-3, 4, 60], dtype=torch.float64))
    dual = QuadraticPenalty().dual(residual)
    assert torch.equal(dual, residual.grad) and not dual.requires_grad


@pytest.mark.parametrize("shape", [(), (0,), (2, 3, 4)])
def test_keeps_the_shape(shape):
    assert QuadraticPenalty()(torch.ones(shape)).shape == QuadraticPenalty().dual(torch.ones(shape)).shape == shape


@pytest.mark.parametrize("centre", [-1.0, 1.0, 100.0])
def test_gradcheck(centre, rng):
    residual = torch.from_numpy(centre + 0.1 * rng.random((3, 4))).requires_grad_()
    assert torch.autograd.gradcheck(QuadraticPenalty(), residual)
    assert torch.autograd.gradgradcheck(QuadraticPenalty(), residual)


def test_half_precision_is_computed_in_float32():
    residual = torch.tensor([300.0], dtype=torch.float16)
    assert QuadraticPenalty()(residual).item() == 90_000
    assert QuadraticPenalty().dual(100 * residual).item() == 60_000


def test_has_no_state_and_a_step_changes_nothing():
    penalty = QuadraticPenalty()
    penalty.step()
    penalty.forget()
    assert not penalty.state_dict() and not penalty.report() and penalty(torch.tensor(3.0)).item() == 9
    assert not penalty.needs_index and not penalty.has_multipliers


def test_toy_problem_approaches_the_bound_from_outside():
    """min (x - 2)^2 subject to x <= 1: with weight c the minimum is (2 + c) / (1 + c), and c * 2 (x - 1) -> 2."""
    penalty, weight = QuadraticPenalty(), 100.0
    x = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.4 / (1 + weight))
    for _ in range(200):
        optimizer.zero_grad()
        ((x - 2) ** 2 + weight * penalty(x - 1)).backward()
        optimizer.step()
    assert x.item() == pytest.approx((2 + weight) / (1 + weight), abs=1e-9)
    assert 2 * weight * (x.item() - 1) == pytest.approx(2, rel=0.02)


def test_dual_is_the_slope_of_the_cost():
    residual = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    (slope,) = torch.autograd.grad(QuadraticPenalty()(residual).sum(), residual)
    assert torch.equal(QuadraticPenalty().dual(residual), slope)
    assert slope.tolist() == [0, 1, 4]
