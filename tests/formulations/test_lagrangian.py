"""Explicit multipliers: costs, steps, visits of an epoch, state, and problems with a known primal and dual optimum."""

import copy
import io
import math

import pytest
import torch
from monai.data import MetaTensor
from scipy import optimize
from torch import nn

from medconstraints.formulations import AugmentedLagrangian, Lagrangian, LogBarrierExtension, ReLULagrangian

NUM_SAMPLES, SHAPE = 5, (2, 1, 2)  # classes, components, lower and upper
COUNT = math.prod(SHAPE)
MAKERS = {
    "Lagrangian": lambda **options: Lagrangian(NUM_SAMPLES, **{"learning_rate": 0.1, **options}),
    "ReLULagrangian": lambda **options: ReLULagrangian(**{"learning_rate": 0.1, **options}),
    "AugmentedLagrangian": lambda **options: AugmentedLagrangian(NUM_SAMPLES, **{"penalty": 2.0, **options}),
}
INDEXED = ["Lagrangian", "AugmentedLagrangian"]
each = pytest.mark.parametrize("name", MAKERS)
each_indexed = pytest.mark.parametrize("name", INDEXED)


def batch_of(samples, rng, dtype=torch.float32):
    """Residuals of both signs, none of them near 0, and the index."""
    values = rng.uniform(0.1, 3, (len(samples), *SHAPE)) * rng.choice([-1, 1], (len(samples), *SHAPE))
    return torch.from_numpy(values).to(dtype), torch.tensor(samples)


def trained(name, rng, epochs=2, **options):
    """A formulation with multipliers that differ, some of them 0."""
    formulation = MAKERS[name](**options)
    for _ in range(epochs):
        formulation(*batch_of(list(range(NUM_SAMPLES)), rng))
        formulation.step()
    return formulation


def multipliers_of(formulation, index):
    """Multipliers of each residual, (B, *SHAPE), as numbers."""
    rows = formulation.multipliers.double().reshape(-1, COUNT)
    rows = rows if isinstance(formulation, ReLULagrangian) else rows[index]
    return rows.expand(len(index), COUNT).reshape(len(index), *SHAPE)


def reference_cost(name, z, multiplier, reference, penalty):
    """The cost of one residual."""
    if name == "Lagrangian":
        return reference.lagrangian(z, multiplier)
    if name == "ReLULagrangian":
        return reference.relu_lagrangian(z, multiplier)
    return reference.augmented_lagrangian(z, multiplier, penalty)


# Costs and duals


@each
def test_cost_equals_the_reference(name, rng, constraint_reference):
    formulation = trained(name, rng)
    residual, index = batch_of([3, 0, 4], rng)
    multipliers = multipliers_of(formulation, index)
    assert (multipliers > 0).any() and multipliers.isfinite().all()
    if name != "ReLULagrangian":
        assert (multipliers == 0).any()  # projected
    cost = formulation(residual, index)
    assert cost.shape == residual.shape and cost.dtype == torch.float32
    for place in torch.cartesian_prod(*map(torch.arange, residual.shape)).tolist():
        place = tuple(place)
        expected = reference_cost(
            name, residual[place].item(), multipliers[place].item(), constraint_reference, penalty=2.0
        )
        assert cost[place].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@each
def test_multipliers_start_at_zero(name, rng):
    formulation, (residual, index) = MAKERS[name](), batch_of([0, 1], rng)
    cost = formulation(residual, index)
    assert (formulation.multipliers == 0).all()
    expected = residual.clamp_min(0).square() if name == "AugmentedLagrangian" else torch.zeros_like(residual)
    torch.testing.assert_close(cost, expected)  # penalty / 2 = 1


@each
def test_dual_is_the_slope(name, rng):
    formulation = trained(name, rng)
    residual, index = batch_of([3, 0, 4], rng)
    residual.requires_grad_()
    (slope,) = torch.autograd.grad(formulation(residual, index).sum(), residual)
    value = formulation.dual(residual, index)
    assert not value.requires_grad and value.shape == residual.shape and (value >= 0).all()
    torch.testing.assert_close(value, slope)


@each
def test_gradcheck(name, rng):
    formulation = trained(name, rng).double()
    residual, index = batch_of([3, 0, 4], rng, torch.float64)
    assert torch.autograd.gradcheck(lambda z: formulation(z, index), residual.requires_grad_())


@each
def test_half_precision_is_raised(name, rng):
    formulation = trained(name, rng).eval()
    residual, index = batch_of([3, 0, 4], rng)
    half = (1e4 * residual).half().requires_grad_()  # its square is above 65,504
    cost = formulation(half, index)
    cost.sum().backward()
    assert cost.dtype == torch.float32 and cost.isfinite().all()
    assert half.grad.dtype == torch.float16 and half.grad.isfinite().all()
    torch.testing.assert_close(cost, formulation(half.detach().float(), index))


@each
def test_autocast_changes_nothing(name, rng):
    formulation = trained(name, rng)
    residual, index = batch_of([3, 0, 4], rng)
    plain = formulation(residual, index)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = formulation(residual, index)
    assert torch.equal(inside, plain) and inside.dtype == torch.float32


@each
def test_a_meta_tensor_gives_a_plain_tensor(name, rng):
    formulation = trained(name, rng)
    residual, index = batch_of([3, 0, 4], rng)
    plain = formulation(residual, index)
    value = formulation(MetaTensor(residual), MetaTensor(index))
    assert type(value) is torch.Tensor and torch.equal(value, plain)
    formulation.step()
    assert type(formulation.multipliers) is torch.Tensor


# Steps. An epoch is a list of batches, each a list of samples.

EPOCHS = {
    "some samples": [[3], [1]],
    "several visits": [[0, 2], [2, 1], [2, 0]],
    "twice in one batch": [[1, 1, 4], [4, 1, 0]],
}


def run_epoch(formulation, batches, rng):
    """One forward pass of each batch; the visits as the reference takes them."""
    visits = []
    for samples in batches:
        residual, index = batch_of(samples, rng)
        formulation(residual.requires_grad_(), index).sum().backward()
        visits += list(zip(samples, residual.detach().double().flatten(1).tolist(), strict=True))
    return visits


@pytest.mark.parametrize("batches", EPOCHS.values(), ids=EPOCHS)
@each
def test_step_equals_the_reference(name, batches, rng, constraint_reference):
    formulation = trained(name, rng)
    for _ in range(3):
        old = formulation.multipliers.clone()
        before = old.double().flatten().tolist() if name == "ReLULagrangian" else old.double().tolist()
        visits = run_epoch(formulation, batches, rng)
        assert torch.equal(formulation.multipliers, old)  # nothing moves within an epoch
        formulation.step()
        if name == "Lagrangian":
            expected = constraint_reference.lagrangian_step(before, visits, 0.1)
        elif name == "ReLULagrangian":
            expected = constraint_reference.relu_lagrangian_step(before, visits, 0.1)
        else:
            expected = constraint_reference.augmented_lagrangian_step(before, visits, 2.0)
        own, expected = formulation.multipliers.float(), torch.tensor(expected)
        torch.testing.assert_close(own.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)


@each
def test_an_epoch_does_not_depend_on_its_batches(name, rng):
    residual, index = batch_of([0, 1, 2, 3, 4, 1], rng)
    results = []
    for size in (1, 2, 6):
        formulation = MAKERS[name]()
        for start in range(0, 6, size):
            formulation(residual[start : start + size], index[start : start + size])
        formulation.step()
        results.append(formulation.multipliers)
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


@each_indexed
def test_samples_that_were_not_visited_keep_their_multipliers(name, rng):
    formulation = trained(name, rng)
    before = formulation.multipliers.clone()
    formulation(*batch_of([1, 3], rng))
    formulation.step()
    same = (formulation.multipliers == before).all(1)
    assert same.tolist() == [True, False, True, False, True]


@each
def test_multipliers_are_never_negative(name, rng):
    formulation = trained(name, rng)
    for _ in range(10):
        formulation(torch.full((NUM_SAMPLES, *SHAPE), -1.0), torch.arange(NUM_SAMPLES))
        formulation.step()
    if name == "ReLULagrangian":
        assert (formulation.multipliers > 0).any()  # never decreases
    else:
        assert (formulation.multipliers == 0).all()


def test_largest_multiplier(rng):
    formulation = Lagrangian(NUM_SAMPLES, learning_rate=1.0, max_multiplier=2.5)
    residual = torch.full((NUM_SAMPLES, *SHAPE), 1.0)
    seen = []
    for _ in range(4):
        formulation(residual, torch.arange(NUM_SAMPLES))
        formulation.step()
        assert (formulation.multipliers == formulation.multipliers[0, 0]).all()
        seen.append(formulation.multipliers[0, 0].item())
    assert seen == [1.0, 2.0, 2.5, 2.5]


def test_the_penalty_grows_after_the_multipliers():
    """First epoch: lambda = rho z = 2; then rho is 6, 10, 10."""
    formulation = AugmentedLagrangian(1, penalty=2.0, factor=3.0, max_penalty=10.0)
    seen, index = [], torch.tensor([0])
    for _ in range(4):
        formulation(torch.ones(1, 1), index)
        formulation.step()
        seen.append(formulation.multipliers.item())
    assert seen == [2.0, 8.0, 18.0, 28.0]
    assert formulation.dual(torch.zeros(1, 1), index).item() == 28
    assert formulation.dual(torch.ones(1, 1), index).item() == 38


@each
def test_only_training_mode_is_observed(name, rng):
    formulation = trained(name, rng)
    before = formulation.multipliers.clone()
    formulation.eval()
    formulation(*batch_of([0, 1, 2], rng))
    formulation.dual(*batch_of([0, 1, 2], rng))
    formulation.train()
    formulation.dual(*batch_of([0, 1, 2], rng))
    other = copy.deepcopy(formulation)
    formulation.step()
    assert torch.equal(formulation.multipliers, before)
    residual, index = batch_of([0, 1, 2], rng)
    for one in (formulation, other):
        one.train()
        one(residual, index)
        one.eval()
        one(10 * residual, index)
        one.step()
    if name != "AugmentedLagrangian":
        assert not torch.equal(other.multipliers, before)
        torch.testing.assert_close(other.multipliers, formulation.multipliers)


@each
def test_step_forgets(name, rng):
    formulation = trained(name, rng)
    formulation(*batch_of([0, 1, 2], rng))
    formulation.step()
    before = formulation.multipliers.clone()
    formulation.step()
    assert torch.equal(formulation.multipliers, before)


@each
def test_forget_forgets(name, rng):
    formulation = trained(name, rng)
    before = formulation.multipliers.clone()
    formulation(*batch_of([0, 1, 2], rng))
    formulation.forget()
    formulation.step()
    assert torch.equal(formulation.multipliers, before) and (before > 0).any()


# State


def saved(formulation):
    """The state as a file gives it back."""
    file = io.BytesIO()
    torch.save(formulation.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def run_epochs(formulation, epochs):
    """Epochs of the toy data, each the same for any formulation."""
    for _ in range(epochs):
        generator = torch.Generator().manual_seed(7)
        for samples in ([0, 1, 2], [3, 4, 2]):
            residual = torch.randn(3, *SHAPE, generator=generator)
            formulation(residual, torch.tensor(samples))
        formulation.step()


OPTIONS = {
    "Lagrangian": {},
    "ReLULagrangian": {},
    "AugmentedLagrangian": {"factor": 1.3, "max_penalty": 5.0},
}


@each
def test_a_checkpoint_resumes_exactly(name):
    whole = MAKERS[name](**OPTIONS[name])
    run_epochs(whole, 3)
    resumed = MAKERS[name](**OPTIONS[name])
    run_epochs(resumed, 1)
    resumed.load_state_dict(saved(whole))
    assert torch.equal(resumed.multipliers, whole.multipliers)
    run_epochs(whole, 4)
    run_epochs(resumed, 4)
    assert (whole.multipliers > 0).any() and torch.equal(resumed.multipliers, whole.multipliers)
    residual, index = torch.ones(2, *SHAPE), torch.tensor([0, 3])
    assert torch.equal(resumed(residual, index), whole(residual, index))


@each
def test_a_checkpoint_from_before_the_first_forward_pass_forgets_the_multipliers(name):
    new, other = MAKERS[name](**OPTIONS[name]), MAKERS[name](**OPTIONS[name])
    run_epochs(other, 2)
    other.load_state_dict(saved(new))
    run_epochs(new, 2)
    run_epochs(other, 2)
    assert torch.equal(other.multipliers, new.multipliers)


@each
def test_loaded_multipliers_are_a_copy(name):
    whole, other = MAKERS[name](), MAKERS[name]()
    run_epochs(whole, 2)
    state = whole.state_dict()
    other.load_state_dict(state)
    before = state["multipliers"].clone()
    run_epochs(other, 2)
    assert torch.equal(state["multipliers"], before) and torch.equal(whole.multipliers, before)


@each_indexed
def test_a_checkpoint_of_another_data_set_is_refused(name):
    whole = MAKERS[name]()
    run_epochs(whole, 1)
    other = Lagrangian(7, learning_rate=0.1) if name == "Lagrangian" else AugmentedLagrangian(7)
    with pytest.raises((RuntimeError, ValueError), match=r"num_samples.*7|7.*num_samples"):
        other.load_state_dict(saved(whole))


@each
def test_shape_of_the_multipliers(name, rng):
    formulation = MAKERS[name]()
    formulation(*batch_of([1, 2], rng))
    expected = (1, COUNT) if name == "ReLULagrangian" else (NUM_SAMPLES, COUNT)
    assert formulation.multipliers.shape == expected and not list(formulation.parameters())
    assert dict(formulation.named_buffers())["multipliers"] is formulation.multipliers
    assert formulation.has_multipliers and formulation.needs_index == (name != "ReLULagrangian")


@each
def test_report(name, rng):
    assert MAKERS[name]().report() == {}  # the number of constraints is not known yet
    formulation = trained(name, rng)
    report = formulation.report()
    assert {key: value.item() for key, value in report.items()} == {
        "multiplier_mean": formulation.multipliers.mean().item(),
        "multiplier_max": formulation.multipliers.max().item(),
    }


# Refusals


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Lagrangian(0, learning_rate=0.1), "num_samples: expected .*got 0"),
        (lambda: Lagrangian(2.5, learning_rate=0.1), r"num_samples: expected .*got 2\.5"),
        (lambda: Lagrangian(3, learning_rate=0.0), r"learning_rate: expected .*got 0\.0"),
        (lambda: ReLULagrangian(learning_rate=math.nan), "learning_rate: expected .*got nan"),
        (lambda: Lagrangian(3, learning_rate=0.1, max_multiplier=0.0), r"max_multiplier: expected .*got 0\.0"),
        (lambda: ReLULagrangian(learning_rate=0.1, initial=-1.0), r"initial: expected .*got -1\.0"),
        (lambda: AugmentedLagrangian(0), "num_samples: expected .*got 0"),
        (lambda: AugmentedLagrangian(3, penalty=0.0), r"penalty: expected .*got 0\.0"),
        (lambda: AugmentedLagrangian(3, factor=0.9), r"factor: expected .*got 0\.9"),
        (lambda: AugmentedLagrangian(3, penalty=2.0, max_penalty=1.0), r"max_penalty: expected .*got 1\.0"),
        (lambda: AugmentedLagrangian(3, max_penalty=math.nan), "max_penalty: expected .*got nan"),
    ],
)
def test_refuses_senseless_settings(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()


@each_indexed
@pytest.mark.parametrize(
    "index",
    [
        torch.tensor([0, 5]),
        torch.tensor([0, -1]),
        torch.tensor([0]),
        torch.tensor([0.0, 1.0]),
    ],
    ids=["too large", "negative", "too short", "floating point"],
)
def test_refuses_an_index_that_does_not_fit(name, index, rng):
    formulation, residual = trained(name, rng), torch.ones(2, *SHAPE)
    for function in (formulation, formulation.dual):
        with pytest.raises((ValueError, TypeError), match=r"index: expected .*got"):
            function(residual, index)


@each_indexed
def test_asks_for_the_index(name):
    with pytest.raises(ValueError, match=f"index: {name} .*numbers in the data set"):
        MAKERS[name]()(torch.ones(2, *SHAPE))


@each
def test_refuses_another_number_of_constraints(name, rng):
    formulation = trained(name, rng)
    with pytest.raises(ValueError, match=r"residual: expected .*4 constraints.*got"):
        formulation(torch.ones(2, 3, 1, 2), torch.tensor([0, 1]))


# Problems with a known optimum.
#
# min (x - 2)^2 + (y - 2)^2 subject to x + y <= 2, x <= 1/2, y >= -3. The first two hold with equality at (1/2, 3/2),
# where the gradient (-3, -1) + lambda_1 (1, 1) + lambda_2 (1, 0) is zero for lambda = (1, 2, 0).

ROWS = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
LIMITS = torch.tensor([2.0, 0.5, 3.0], dtype=torch.float64)
TARGET = torch.tensor([2.0, 2.0], dtype=torch.float64)
PRIMAL = torch.tensor([0.5, 1.5], dtype=torch.float64)
DUAL = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
OPTIMUM = 2.5
ONE = torch.tensor([0])


def objective(point):
    """E of the toy problem."""
    return (point - TARGET).square().sum()


def constraints(point):
    """f <= 0 of the toy problem, one sample: (1, 3)."""
    return (ROWS @ point - LIMITS)[None]


def dual_function(multipliers):
    """min over the points of E + lambda f; it is reached at target - A^T lambda / 2."""
    point = TARGET - ROWS.T @ multipliers / 2
    return (objective(point) + multipliers @ constraints(point)[0]).item()


def minimize(formulation, point, steps, learning_rate):
    """Gradient descent of E plus the cost, without being observed."""
    formulation.eval()
    point = point.clone().requires_grad_()
    for _ in range(steps):
        cost = objective(point) + formulation(constraints(point), ONE).sum()
        (slope,) = torch.autograd.grad(cost, point)
        point = (point - learning_rate * slope).detach().requires_grad_()
    return point.detach()


def minimum(barrier, start):
    """The minimum of E plus the barrier, which is too steep for a fixed pace: quasi-Newton with a line search."""

    def value_and_slope(numbers):
        point = torch.from_numpy(numbers).requires_grad_()
        cost = objective(point) + barrier(constraints(point)).sum()
        (slope,) = torch.autograd.grad(cost, point)
        return cost.item(), slope.numpy()

    return torch.from_numpy(optimize.minimize(value_and_slope, start.numpy(), jac=True, options={"gtol": 1e-7}).x)


def observe_and_step(formulation, point):
    """One visit in training mode, then the step."""
    formulation.train()
    formulation(constraints(point), ONE)
    formulation.step()


@pytest.mark.parametrize("t", [1.0, 50.0])
def test_duality_gap_bound(t):
    """Proposition 2: E - g(lambda) <= P N / t at the minimum for each t, feasible or not; here P = 3, N = 1."""
    barrier = LogBarrierExtension(t=t).double()
    point = minimum(barrier, torch.tensor([-1.0, -1.0], dtype=torch.float64))
    residual = constraints(point)
    slack = objective(point).item() - dual_function(barrier.dual(residual)[0])
    bound = barrier.duality_gap_bound(3)
    assert float(bound) == pytest.approx(3 / t, rel=1e-6)
    assert slack <= float(bound) * (1 + 1e-6)
    if (residual <= 0).all():  # then E is above, and g below, the optimum
        assert -1e-6 <= objective(point).item() - OPTIMUM <= slack + 1e-6
    assert bool((residual <= 0).all()) == (t > 1)  # a soft barrier lets the point out


def test_barrier_finds_primal_and_dual_as_t_grows():
    barrier = LogBarrierExtension(t=5.0, factor=1.3).double()
    point = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    gaps = []
    for _ in range(22):  # up to t = 1,236
        point = minimum(barrier, point)
        duals = barrier.dual(constraints(point))[0]
        gaps.append(objective(point).item() - dual_function(duals))
        assert gaps[-1] <= barrier.duality_gap_bound(3) * (1 + 1e-6)
        barrier.step()
    torch.testing.assert_close(point, PRIMAL, rtol=0, atol=2e-3)
    torch.testing.assert_close(duals, DUAL, rtol=0, atol=0.01)
    assert gaps[-1] < 0.05 * gaps[0] and (constraints(point) <= 0).all()


def test_lagrangian_finds_primal_and_dual():
    formulation = Lagrangian(1, learning_rate=0.8)
    point = torch.zeros(2, dtype=torch.float64)
    for _ in range(120):
        point = minimize(formulation, point, 1, 0.5)  # exact: the Hessian is 2
        observe_and_step(formulation, point)
    torch.testing.assert_close(point, PRIMAL, rtol=0, atol=1e-4)
    torch.testing.assert_close(formulation.multipliers[0].double(), DUAL, rtol=0, atol=1e-3)


def test_augmented_lagrangian_finds_primal_and_dual():
    formulation = AugmentedLagrangian(1, penalty=1.0, factor=1.2, max_penalty=4.0)
    point, penalty = torch.zeros(2, dtype=torch.float64), 1.0
    for _ in range(40):
        point = minimize(formulation, point, 60, 1 / (2 + 3 * penalty))
        observe_and_step(formulation, point)
        penalty = min(penalty * 1.2, 4.0)
    torch.testing.assert_close(point, PRIMAL, rtol=0, atol=1e-4)
    torch.testing.assert_close(formulation.multipliers[0].double(), DUAL, rtol=0, atol=1e-3)


def test_relu_lagrangian_approaches_the_primal():
    """An exact penalty: once each multiplier is above the optimal one, the minimum is that of the problem."""
    formulation = ReLULagrangian(learning_rate=0.5)
    point, distances = torch.zeros(2, dtype=torch.float64), []
    for epoch in range(60):
        for step in range(20):
            point = minimize(formulation, point, 1, 0.1 / (1 + epoch * 20 + step) ** 0.5)
        observe_and_step(formulation, point)
        distances.append((point - PRIMAL).norm().item())
    assert distances[-1] < 0.05 < distances[0]
    assert (formulation.multipliers.double() >= DUAL - 0.2).all()
    assert constraints(point).clamp_min(0).sum().item() < 0.05


@each_indexed
def test_each_sample_has_its_own_problem(name):
    """Two samples, min (x - 2)^2 subject to x <= 1 and to x <= 5: lambda = 2 and 0."""
    formulation = {
        "Lagrangian": lambda: Lagrangian(2, learning_rate=0.8),
        "AugmentedLagrangian": lambda: AugmentedLagrangian(2, penalty=2.0),
    }[name]()
    limits = torch.tensor([[1.0], [5.0]], dtype=torch.float64)
    point = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    for epoch in range(200):
        for order in ([0], [1]):
            index = torch.tensor(order)
            cost = (point[index] - 2).square().sum() + formulation(point[index] - limits[index], index).sum()
            (slope,) = torch.autograd.grad(cost, point)
            point = (point - 0.2 / (1 + epoch) ** 0.3 * slope).detach().requires_grad_()
        formulation.step()
    assert point.flatten().tolist() == pytest.approx([1.0, 2.0], abs=0.08)
    assert formulation.multipliers.flatten().tolist() == pytest.approx([2.0, 0.0], abs=0.08)


# An independent implementation


def cooper_problem(cooper, formulation_type, **parts):
    """The toy problem, as cooper states it."""

    class Problem(cooper.ConstrainedMinimizationProblem):
        def __init__(self):
            super().__init__()
            self.multiplier = cooper.multipliers.DenseMultiplier(num_constraints=3, dtype=torch.float64)
            self.constraint = cooper.Constraint(
                constraint_type=cooper.ConstraintType.INEQUALITY,
                formulation_type=formulation_type,
                multiplier=self.multiplier,
                **parts,
            )

        def compute_cmp_state(self, point):
            state = cooper.ConstraintState(violation=constraints(point)[0])
            return cooper.CMPState(loss=objective(point), observed_constraints={self.constraint: state})

    return Problem()


def test_plain_lagrangian_steps_as_cooper_does():
    """Both descend and ascend at once, from the same residuals."""
    cooper = pytest.importorskip("cooper")
    problem = cooper_problem(cooper, cooper.formulations.Lagrangian)
    theirs = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = cooper.optim.SimultaneousOptimizer(
        cmp=problem,
        primal_optimizers=torch.optim.SGD([theirs], lr=0.1),
        dual_optimizers=torch.optim.SGD(problem.dual_parameters(), lr=0.3, maximize=True),
    )
    formulation = Lagrangian(1, learning_rate=0.3)
    ours = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    descent = torch.optim.SGD([ours], lr=0.1)
    seen = []
    for _ in range(150):
        optimizer.roll(compute_cmp_state_kwargs={"point": theirs})
        descent.zero_grad()
        (objective(ours) + formulation(constraints(ours), ONE).sum()).backward()
        descent.step()
        formulation.step()
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            formulation.multipliers[0].double(), problem.multiplier.weight.detach(), rtol=1e-4, atol=1e-5
        )
        seen.append(formulation.multipliers[0].tolist())
    assert any(row[1] > 2.1 for row in seen) and seen[-1] == pytest.approx(DUAL.tolist(), abs=0.01)


def test_augmented_lagrangian_steps_as_cooper_does():
    """First the point, then the multipliers at the new point, with the penalty as the learning rate."""
    cooper = pytest.importorskip("cooper")
    penalty = cooper.penalty_coefficients.DensePenaltyCoefficient(init=torch.tensor(0.5, dtype=torch.float64))
    problem = cooper_problem(cooper, cooper.formulations.AugmentedLagrangian, penalty_coefficient=penalty)
    theirs = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    ascent = torch.optim.SGD(problem.dual_parameters(), lr=0.5, maximize=True)
    optimizer = cooper.optim.AlternatingPrimalDualOptimizer(
        cmp=problem, primal_optimizers=torch.optim.SGD([theirs], lr=0.05), dual_optimizers=ascent
    )
    formulation = AugmentedLagrangian(1, penalty=0.5, factor=1.05, max_penalty=3.0)
    ours = torch.zeros(2, dtype=torch.float64)
    for _ in range(150):
        optimizer.roll(compute_cmp_state_kwargs={"point": theirs})
        grown = penalty.value.mul(1.05).clamp_max(3.0)
        penalty.value, ascent.param_groups[0]["lr"] = grown, grown.item()
        ours = minimize(formulation, ours, 1, 0.05)
        observe_and_step(formulation, ours)
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            formulation.multipliers[0].double(), problem.multiplier.weight.detach(), rtol=1e-4, atol=1e-5
        )
    torch.testing.assert_close(formulation.multipliers[0].double(), DUAL, rtol=0, atol=0.01)


@pytest.mark.parametrize("kind", ["half", "bfloat16", "double"])
@pytest.mark.parametrize("name", [*MAKERS, "barrier"])
def test_state_stays_exact_when_a_module_is_converted(name, kind, rng):
    """A training in half precision: steps work, and nothing is rounded to three digits."""
    make = {**MAKERS, "barrier": lambda: LogBarrierExtension(t=5.3)}[name]
    expected, converted = make(), getattr(make(), kind)()
    for _ in range(3):
        residual, index = batch_of([0, 3, 1], rng)
        for formulation in (expected, converted):
            formulation(residual, index)
            formulation.step()
    assert all(buffer.dtype != torch.float16 for buffer in converted.buffers())
    for one, two in zip(expected.buffers(), converted.buffers(), strict=True):
        torch.testing.assert_close(one.double(), two.double(), rtol=1e-6, atol=0)


@each
def test_limits_of_a_module_hold_for_a_state_that_it_loads(name, rng):
    formulation = (
        trained(name, rng, epochs=20, learning_rate=3.0) if name != "AugmentedLagrangian" else trained(name, rng)
    )
    state = formulation.state_dict()
    limit = float(formulation.multipliers.max()) / 2
    limited = MAKERS[name](max_multiplier=limit)
    limited.load_state_dict(state)
    torch.testing.assert_close(limited.multipliers, state["multipliers"].clamp(max=limit))
    if name == "AugmentedLagrangian":
        state["penalty"] = torch.tensor(100.0)
        limited = MAKERS[name](max_penalty=5.0)
        limited.load_state_dict(state)
        assert float(limited.penalty) == 5
