"""Log-barrier extension: closed form, C1 joint, extremes, schedule, duals, and a problem with a known optimum."""

import copy
import io
import math

import pytest
import torch

from medconstraints.formulations import LogBarrierExtension

SHARPNESS = pytest.mark.parametrize("t", [0.3, 5.0, 1e3])


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


@SHARPNESS
def test_closed_form_and_dual(t):
    barrier = LogBarrierExtension(t=t)
    t = float(barrier.t)  # rounded to float32
    residuals = [-1e6, -10.0, -1.0, -0.1, -2 / t**2, -0.5 / t**2, -1e-12, 0.0, 1e-9, 0.1, 1.0, 1e4]
    residuals = torch.tensor(residuals, dtype=torch.float64)
    expected = torch.tensor([closed_form(z, t) for z in residuals.tolist()], dtype=torch.float64)
    cost, slope = value_and_slope(barrier, residuals)
    torch.testing.assert_close(cost, expected[:, 0])
    torch.testing.assert_close(slope, expected[:, 1])
    dual = barrier.dual(residuals.requires_grad_())
    torch.testing.assert_close(dual, slope)
    assert not dual.requires_grad


@SHARPNESS
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


@SHARPNESS
def test_increasing_and_convex(t):
    z = torch.cat([-torch.logspace(3, -9, 200, dtype=torch.float64), torch.logspace(-9, 3, 200, dtype=torch.float64)])
    cost, slope = value_and_slope(LogBarrierExtension(t=t), z)
    assert (cost.diff() > 0).all() and (slope > 0).all() and (slope.diff() >= -1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("t", [5.0, 1e9])
def test_finite_for_any_finite_residual(t, dtype):
    largest = 6e4 if dtype == torch.float16 else 0.5 * torch.finfo(dtype).max / t
    residuals = torch.tensor([-largest, -1.0, -1 / t**2, -1e-30, -0.0, 0.0, 1e-30, 1.0, largest], dtype=dtype)
    cost, slope = value_and_slope(LogBarrierExtension(t=t, max_t=None), residuals)
    assert cost.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert cost.isfinite().all() and slope.dtype == dtype
    if dtype != torch.float16 or t < 65_504:  # a slope of t does not fit into half precision beyond
        assert slope.isfinite().all()


def test_infinite_residuals_give_no_nan():
    cost, slope = value_and_slope(LogBarrierExtension(), torch.tensor([-torch.inf, torch.inf]))
    assert cost.tolist() == [-torch.inf, torch.inf] and slope.tolist() == [0.0, 5.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_t(dtype):
    barrier = LogBarrierExtension(t=1e20, max_t=None)
    residual = torch.tensor([-1e30, -1.0, -1e-30, -0.0, 0.0, 1e-30, 1.0, 1e6], dtype=dtype)
    cost, slope = value_and_slope(barrier, residual)
    dual = barrier.dual(residual)
    assert all(values.isfinite().all() for values in (cost, slope, dual)) and (slope >= 0).all() and (dual >= 0).all()
    assert (slope[-2:] == float(barrier.t)).all()


@pytest.mark.parametrize("where", ["feasible", "boundary", "violated"])
def test_gradcheck(where, rng):
    noise, t = torch.from_numpy(rng.random((3, 4))), 5.0
    residual = {"feasible": -1.5 - noise, "boundary": -(1 + 0.5 * noise) / t**2, "violated": 0.1 + 10 * noise}[where]
    barrier = LogBarrierExtension(t=t).double()
    assert torch.autograd.gradcheck(barrier, residual.requires_grad_(), eps=1e-6 / t**2)
    inside = -0.4 / t**2 * noise  # just above the joint
    assert torch.autograd.gradcheck(barrier, inside.requires_grad_(), eps=1e-6 / t**2)


@pytest.mark.parametrize("shape", [(), (0,), (2, 3, 1, 2)])
def test_keeps_the_shape(shape):
    barrier = LogBarrierExtension()
    assert barrier(torch.ones(shape)).shape == barrier.dual(torch.ones(shape)).shape == shape


def test_autocast_changes_nothing():
    residual, barrier = torch.linspace(-3, 3, 101), LogBarrierExtension()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = value_and_slope(barrier, residual)
    assert all(torch.equal(a, b) for a, b in zip(inside, value_and_slope(barrier, residual), strict=True))


def test_dual_of_half_precision():
    barrier = LogBarrierExtension(t=1e3)
    residual = torch.tensor([-1.0, -1e-3, 0.0, 1.0]).half()
    torch.testing.assert_close(barrier.dual(residual).float(), barrier.dual(residual.float()), rtol=1e-2, atol=0)


def test_duality_gap_of_a_feasible_point():
    """-f * lambda is 1 / t for every satisfied constraint (eq. 3.10): the gap is at most P N / t."""
    residual = -torch.rand(100, dtype=torch.float64) - 0.1
    barrier = LogBarrierExtension(t=7.0)
    torch.testing.assert_close(-residual * barrier.dual(residual), torch.full_like(residual, 1 / 7))


# Schedule and state


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"factor": 1.1}, [5.5, 6.05, 6.655]),
        ({"factor": 1.0}, [5.0, 5.0, 5.0]),
        ({"factor": 3.0, "max_t": 20.0}, [15.0, 20.0, 20.0]),
        ({"factor": 1e12, "max_t": None}, [5e12, 1e20, 1e20]),  # float32 ends being useful
        ({"factor": 1000.0}, [2896.3093757, 2896.3093757]),  # 2^11.5: -1 / t^2 is the rounding error of 1
    ],
)
def test_schedule(options, expected):
    barrier, seen = LogBarrierExtension(t=5.0, **options), []
    for _ in expected:
        barrier.step()
        seen.append(float(barrier.report()["t"]))
    assert seen == pytest.approx(expected)


def test_t_is_a_buffer_and_no_parameter():
    barrier = LogBarrierExtension(t=2.0)
    assert list(barrier.state_dict()) == ["t"] and not list(barrier.parameters())
    barrier(torch.tensor(1.0, requires_grad=True)).backward()
    assert not barrier.t.requires_grad and not barrier.has_multipliers


def test_a_checkpoint_resumes_exactly():
    whole, file = LogBarrierExtension(t=5.0, factor=1.1), io.BytesIO()
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


def test_a_smaller_max_t_holds_for_a_state_too():
    barrier = LogBarrierExtension(t=5.0, max_t=50.0)
    barrier.load_state_dict(LogBarrierExtension(t=200.0).state_dict())
    assert float(barrier.t) == 50


def test_copies_do_not_share_t():
    barrier = LogBarrierExtension(t=5.0, factor=2.0, max_t=80.0)
    other = copy.deepcopy(barrier)
    barrier.step()
    assert float(other.t) == 5 and "t=10, factor=2, max_t=80" in repr(barrier)


@pytest.mark.parametrize(
    "options",
    [{"t": 0.0}, {"t": math.nan}, {"t": math.inf}, {"factor": 0.9}, {"factor": math.inf}, {"max_t": 4.0}],
)
def test_refuses_senseless_settings(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}: expected .*got {value:g}".replace("+", r"\+")):
        LogBarrierExtension(**options)


# A problem with a known optimum


def test_toy_problem_finds_the_optimum_and_the_multiplier():
    """min (x - 2)^2 subject to x <= 1: x = 1, lambda = 2; as t grows the barrier comes from inside."""
    barrier = LogBarrierExtension(5.0, factor=1.2, max_t=2000.0).double()
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
