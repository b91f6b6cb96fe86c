"""Log-barrier extension: closed form, C1 joint, extremes, schedule, duals, and a problem with a known optimum."""

import copy
import io
import math

import pytest
import torch

from medconstraints.formulations import LogBarrierExtension

SHARPNESS = [0.3, 1.0, 5.0, 40.0, 1e3]


def closed_form(z, t):
    """Eq. 6.5, and its derivative."""
    if z <= -1 / t**2:
        return -math.log(-z) / t, -1 / (t * z)
    return t * z - math.log(1 / t**2) / t + 1 / t, t


def value_and_slope(barrier, z):
    residual = torch.as_tensor(z).clone().requires_grad_()
    cost = barrier(residual)
    (slope,) = torch.autograd.grad(cost.sum(), residual)
    return cost.detach(), slope


def barrier_of(t, **options):
    """A barrier whose t is exact in double precision."""
    return LogBarrierExtension(t=t, **options).double()


@pytest.mark.parametrize("t", SHARPNESS)
def test_closed_form(t):
    barrier = LogBarrierExtension(t=t)
    t = float(barrier.t)  # rounded to float32
    residuals = [-1e6, -10.0, -1.0, -0.1, -2 / t**2, -0.5 / t**2, -1e-12, 0.0, 1e-9, 0.1, 1.0, 1e4]
    cost, slope = value_and_slope(barrier, torch.tensor(residuals, dtype=torch.float64))
    expected = [closed_form(z, t) for z in residuals]
    torch.testing.assert_close(cost, torch.tensor([e[0] for e in expected], dtype=torch.float64))
    torch.testing.assert_close(slope, torch.tensor([e[1] for e in expected], dtype=torch.float64))


@pytest.mark.parametrize("t", SHARPNESS)
def test_value_and_slope_are_continuous_at_the_joint(t):
    barrier = LogBarrierExtension(t=t)
    t = float(barrier.t)
    joint, step = -1 / t**2, 1e-9 / t**2
    cost, slope = value_and_slope(barrier, torch.tensor([joint - step, joint, joint + step], dtype=torch.float64))
    assert (cost - cost[1]).abs().max().item() <= 2 * t * step
    torch.testing.assert_close(slope, torch.full_like(slope, t), rtol=1e-8, atol=0)
    h = 1e-5 / t**2  # the slope from the left and from the right, from values alone
    left, middle, right = barrier(torch.tensor([joint - h, joint, joint + h], dtype=torch.float64))
    assert ((middle - left) / h).item() == pytest.approx(t, rel=1e-4)
    assert ((right - middle) / h).item() == pytest.approx(t, rel=1e-4)


@pytest.mark.parametrize("t", SHARPNESS)
def test_increasing_and_convex(t):
    z = torch.cat([-torch.logspace(3, -9, 200, dtype=torch.float64), torch.logspace(-9, 3, 200, dtype=torch.float64)])
    cost, slope = value_and_slope(LogBarrierExtension(t=t), z)
    assert (cost.diff() > 0).all() and (slope > 0).all() and (slope.diff() >= -1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("t", [5.0, 1e3, 1e6, 1e9])
def test_finite_for_any_finite_residual(t, dtype):
    largest = 6e4 if dtype == torch.float16 else 0.5 * torch.finfo(dtype).max / t
    residuals = torch.tensor([-largest, -1.0, -1 / t**2, -1e-30, -0.0, 0.0, 1e-30, 1.0, largest], dtype=dtype)
    cost, slope = value_and_slope(LogBarrierExtension(t=t), residuals)
    assert cost.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert cost.isfinite().all() and slope.dtype == dtype
    if dtype != torch.float16 or t < 65_504:  # a slope of t does not fit into half precision beyond
        assert slope.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinite_residuals_give_no_nan(dtype):
    cost, slope = value_and_slope(LogBarrierExtension(), torch.tensor([-torch.inf, torch.inf], dtype=dtype))
    assert cost.tolist() == [-torch.inf, torch.inf] and slope.tolist() == [0.0, 5.0]


@pytest.mark.parametrize(
    ("t", "dtype"),
    [
        (1e18, torch.float32),
        (1e20, torch.float64),
        (1e20, torch.float32),
    ],
)
def test_huge_t(t, dtype):
    barrier = LogBarrierExtension(t=t)
    residual = torch.tensor([-1e30, -1.0, -1e-30, -0.0, 0.0, 1e-30, 1.0, 1e6], dtype=dtype)
    cost, slope = value_and_slope(barrier, residual)
    assert cost.isfinite().all() and slope.isfinite().all() and (slope >= 0).all()
    assert (slope[-2:] == float(barrier.t)).all()
    dual = barrier.dual(residual)
    assert dual.isfinite().all() and (dual >= 0).all()


@pytest.mark.parametrize("t", [1.0, 5.0, 50.0])
@pytest.mark.parametrize("where", ["feasible", "boundary", "violated"])
def test_gradcheck(where, t, rng):
    noise = torch.from_numpy(rng.random((3, 4)))
    residual = {"feasible": -1.5 - noise, "boundary": -(1 + 0.5 * noise) / t**2, "violated": 0.1 + 10 * noise}[where]
    barrier = barrier_of(t)
    assert torch.autograd.gradcheck(barrier, residual.requires_grad_(), eps=1e-6 / t**2)
    inside = -0.4 / t**2 * noise  # just above the joint
    assert torch.autograd.gradcheck(barrier, inside.requires_grad_(), eps=1e-6 / t**2)


@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (2, 3, 1, 2)])
def test_keeps_the_shape(shape):
    barrier = LogBarrierExtension()
    assert barrier(torch.ones(shape)).shape == barrier.dual(torch.ones(shape)).shape == shape


def test_autocast_changes_nothing():
    residual, barrier = torch.linspace(-3, 3, 101), LogBarrierExtension()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = value_and_slope(barrier, residual)
    assert all(torch.equal(a, b) for a, b in zip(inside, value_and_slope(barrier, residual), strict=True))


# Duals


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("t", SHARPNESS)
def test_dual_is_the_slope(t, dtype):
    barrier = LogBarrierExtension(t=t)
    residual = torch.cat([torch.linspace(-5, 5, 101), -torch.logspace(2, -8, 60), torch.tensor([0.0, -1 / t**2])])
    residual = residual.to(dtype).requires_grad_()
    dual = barrier.dual(residual)
    (slope,) = torch.autograd.grad(barrier(residual).sum(), residual)
    assert not dual.requires_grad
    torch.testing.assert_close(dual, slope)


def test_dual_of_half_precision_is_the_slope():
    barrier = LogBarrierExtension(t=1e3)
    residual = torch.tensor([-1.0, -1e-3, 0.0, 1.0]).half()
    torch.testing.assert_close(barrier.dual(residual).float(), barrier.dual(residual.float()), rtol=1e-2, atol=0)


def test_duality_gap_of_a_feasible_point():
    """-f * lambda is 1 / t for every satisfied constraint (eq. 3.10): the gap is at most P N / t."""
    residual = -torch.rand(100, dtype=torch.float64) - 0.1
    barrier = LogBarrierExtension(t=7.0)
    torch.testing.assert_close(-residual * barrier.dual(residual), torch.full_like(residual, 1 / 7))


# Schedule and state


def test_step_multiplies_t():
    barrier = LogBarrierExtension(t=5.0, factor=1.1)
    for _ in range(20):
        barrier.step()
    assert float(barrier.t) == pytest.approx(5 * 1.1**20, rel=1e-5)


def test_step_with_factor_one_keeps_t():
    barrier = LogBarrierExtension(t=5.0, factor=1.0)
    barrier.step()
    assert float(barrier.t) == 5


def test_t_stops_at_its_cap():
    barrier = LogBarrierExtension(t=5.0, factor=3.0, max_t=20.0)
    seen = []
    for _ in range(4):
        barrier.step()
        seen.append(float(barrier.t))
    assert seen == [15.0, 20.0, 20.0, 20.0]


def test_t_never_leaves_float32():
    barrier = LogBarrierExtension(t=5.0, factor=1e12)
    for _ in range(10):
        barrier.step()
    assert float(barrier.t) == pytest.approx(1e20)


def test_t_is_a_buffer_and_no_parameter():
    barrier = LogBarrierExtension(t=2.0)
    assert list(barrier.state_dict()) == ["t"] and not list(barrier.parameters())
    residual = torch.tensor(1.0, requires_grad=True)
    barrier(residual).backward()
    assert not barrier.t.requires_grad


def test_a_checkpoint_resumes_exactly():
    whole = LogBarrierExtension(t=5.0, factor=1.1)
    file = io.BytesIO()
    for epoch in range(40):
        if epoch == 17:
            torch.save(whole.state_dict(), file)
        whole.step()
    file.seek(0)
    resumed = LogBarrierExtension(t=5.0, factor=1.1)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(17, 40):
        resumed.step()
    assert torch.equal(resumed.t, whole.t)


def test_copies_do_not_share_t():
    barrier = LogBarrierExtension(t=5.0)
    other = copy.deepcopy(barrier)
    barrier.step()
    assert float(other.t) == 5 and float(barrier.t) > 5


def test_repr_shows_the_present_t():
    barrier = LogBarrierExtension(t=5.0, factor=2.0, max_t=80.0)
    barrier.step()
    assert "t=10, factor=2, max_t=80" in repr(barrier)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"t": 0.0}, r"t: expected a number in \(0, 1e\+20\], got 0.0; the papers start at 5"),
        ({"t": -5.0}, "t: expected a number in"),
        ({"t": math.inf}, "t: expected a number in .*got inf"),
        ({"t": math.nan}, "t: expected a number in .*got nan"),
        ({"t": 1e31}, "t: expected a number in"),
        ({"factor": 0.9}, "factor: expected a number >= 1, got 0.9; 1 keeps t constant"),
        ({"factor": math.nan}, "factor: expected a number >= 1"),
        ({"factor": math.inf}, "factor: expected a number >= 1"),
        ({"max_t": 4.0}, "max_t: expected None or a number >= t = 5.0, got 4.0; raise it or lower t"),
        ({"max_t": math.nan}, "max_t: expected None or a number"),
    ],
)
def test_refuses_senseless_settings(options, words):
    with pytest.raises(ValueError, match=words):
        LogBarrierExtension(**options)


# A problem with a known optimum


def test_toy_problem_finds_the_optimum_and_the_multiplier():
    """min (x - 2)^2 subject to x <= 1: x = 1, lambda = 2; as t grows the barrier comes from inside."""
    barrier = barrier_of(5.0, factor=1.2, max_t=2000.0)
    x = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    distances = []
    for _ in range(40):
        optimizer = torch.optim.SGD([x], lr=min(0.05, 0.5 / (2 + 4 * float(barrier.t))))
        for _ in range(60):
            optimizer.zero_grad()
            ((x - 2) ** 2 + barrier(x - 1)).backward()
            optimizer.step()
        distances.append(1 - x.item())
        barrier.step()
    assert distances[-1] == pytest.approx(0, abs=1e-3) and distances[-1] > 0
    assert distances == sorted(distances, reverse=True)
    assert barrier.dual(x - 1).item() == pytest.approx(2, rel=0.05)


def test_toy_problem_with_a_slack_constraint_has_no_multiplier():
    """min (x - 2)^2 subject to x <= 5: the constraint is idle."""
    barrier = barrier_of(1e4)
    x = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        ((x - 2) ** 2 + barrier(x - 5)).backward()
        optimizer.step()
    assert x.item() == pytest.approx(2, abs=1e-4) and barrier.dual(x - 5).item() < 1e-4
