"""Quadratic penalty: values, slope, extremes."""

import pytest
import torch

from medconstraints.formulations import QuadraticPenalty


def test_is_half_a_parabola():
    cost = QuadraticPenalty()(torch.tensor([-1e30, -2.0, -1e-9, 0.0, 1e-3, 2.0, 30.0], dtype=torch.float64))
    torch.testing.assert_close(cost, torch.tensor([0, 0, 0, 0, 1e-6, 4, 900], dtype=torch.float64))


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4)])
def test_keeps_the_shape(shape):
    assert QuadraticPenalty()(torch.ones(shape)).shape == shape


def test_gradient_is_twice_the_violation():
    residual = torch.tensor([-torch.inf, -3.0, 0.0, 0.5, 4.0], requires_grad=True)
    QuadraticPenalty()(residual).sum().backward()
    assert residual.grad.tolist() == [0.0, 0.0, 0.0, 1.0, 8.0]


@pytest.mark.parametrize("centre", [-1.0, 1.0, 100.0])
def test_gradcheck(centre, rng):
    residual = torch.from_numpy(centre + 0.1 * rng.random((3, 4))).requires_grad_()
    assert torch.autograd.gradcheck(QuadraticPenalty(), residual)
    assert torch.autograd.gradgradcheck(QuadraticPenalty(), residual)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    cost = QuadraticPenalty()(torch.tensor([300.0], dtype=dtype))
    assert cost.dtype == torch.float32 and cost.item() == 90_000


def test_has_no_state_and_a_step_changes_nothing():
    penalty = QuadraticPenalty()
    penalty.step()
    assert not penalty.state_dict() and penalty(torch.tensor(3.0)).item() == 9


def test_toy_problem_approaches_the_bound_from_outside():
    """min (x - 2)^2 subject to x <= 1: with weight c the minimum is (2 + c) / (1 + c), and c * 2 (x - 1) -> 2."""
    penalty = QuadraticPenalty()
    for weight in (1.0, 10.0, 100.0):
        x = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([x], lr=0.4 / (1 + weight))
        for _ in range(200):
            optimizer.zero_grad()
            ((x - 2) ** 2 + weight * penalty(x - 1)).backward()
            optimizer.step()
        assert x.item() == pytest.approx((2 + weight) / (1 + weight), abs=1e-9)
    assert 2 * weight * (x.item() - 1) == pytest.approx(2, rel=0.02)
