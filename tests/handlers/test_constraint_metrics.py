"""Constraint metrics against a slow reference with dictionaries; samples seen twice, resumed, in other processes."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from medconstraints.handlers.constraint_metrics import ConstraintMetrics


def share(values):
    values = [*values]
    return sum(values) / len(values) if values else None


def slow_metrics(epochs, tolerance=0.0):
    """One dictionary of metrics for each epoch, a list of batches (residual, free, index) of shape (B, C, M, 2)."""
    before, history = {}, []
    for batches in epochs:
        last = {}
        for residual, free, index in batches:
            for row, sample in enumerate(index.tolist()):
                last[sample] = (residual[row].flatten().tolist(), free[row].flatten().tolist())
        entries = {(n, k): r for n, (rs, fs) in last.items() for k, r in enumerate(rs) if not fs[k]}
        met = {entry: r <= tolerance for entry, r in entries.items()}
        metrics = {
            "satisfied": share(met.values()),
            "stability": share(met[entry] for entry, held in before.items() if held and entry in met),
            "violation": share(max(r, 0) for r in entries.values()),
        }
        for k in range(math.prod(batches[0][0].shape[1:])):
            metrics[f"satisfied_{k}"] = share(m for entry, m in met.items() if entry[1] == k)
            metrics[f"violation_{k}"] = share(max(r, 0) for entry, r in entries.items() if entry[1] == k)
        before = met
        history.append(metrics)
    return history


def run(metrics, epochs):
    history = []
    for batches in epochs:
        for batch in batches:
            metrics.update(*batch)
        history.append(metrics.compute())
        metrics.next_epoch()
    return history


def approx(history):
    return [{key: value if value is None else pytest.approx(value) for key, value in row.items()} for row in history]


def random_epochs(*, epochs=4, samples=20, batch=4, visits=30, seed=0):
    """Shuffled samples, some seen twice or never; about a third of the constraints is free."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(epochs):
        index = torch.randint(samples, (visits,), generator=generator)
        residual = torch.randn(visits, 2, 1, 2, generator=generator)
        free = torch.rand(visits, 2, 1, 2, generator=generator) < 0.3
        result.append(list(zip(residual.split(batch), free.split(batch), index.split(batch), strict=True)))
    return result


@pytest.mark.parametrize(("seed", "tolerance"), [(0, 0.0), (1, 0.5)])
def test_against_a_slow_reference(seed, tolerance):
    epochs = random_epochs(seed=seed)
    history = run(ConstraintMetrics(tolerance=tolerance), epochs)
    assert history == approx(slow_metrics(epochs, tolerance))
    assert history[0]["stability"] is None
    assert all(0 < row["stability"] < 1 for row in history[1:])


def test_order_of_samples_and_batches_does_not_matter():
    residual, free = torch.randn(3, 8, 2, 1, 2), torch.rand(3, 8, 2, 1, 2) < 0.2
    one = [[(residual[e], free[e], torch.arange(8))] for e in range(3)]
    orders = [torch.randperm(8) for _ in range(3)]
    two = [
        list(zip(residual[e][order].split(3), free[e][order].split(3), order.split(3), strict=True))
        for e, order in enumerate(orders)
    ]
    assert run(ConstraintMetrics(), one) == approx(run(ConstraintMetrics(), two))


def batch_of(*values, index=None, free=False):
    """Samples with one constraint each."""
    residual = torch.tensor(values, dtype=torch.float32)[:, None]
    return residual, torch.full_like(residual, free, dtype=torch.bool), None if index is None else torch.tensor(index)


def test_bounds_count_as_satisfied():
    metrics = ConstraintMetrics(["upper"])
    metrics.update(*batch_of(0.0, 1e-6, -1e-6, 2.0))
    assert metrics.compute() == {
        "satisfied": 0.5,
        "stability": None,
        "violation": pytest.approx(2.000001 / 4),
        "satisfied_upper": 0.5,
        "violation_upper": pytest.approx(2.000001 / 4),
    }
    assert metrics.sums()[:, 0].tolist() == pytest.approx([4, 2, 2.000001, 0, 0])


@pytest.mark.parametrize(
    ("first", "second", "stability"),
    [
        ([-1, -1, 1], [-1, 1, -1], 1 / 2),
        ([1, 1, 1], [-1, -1, -1], None),  # nothing was satisfied that could stay so
    ],
)
def test_stability(first, second, stability):
    index = [5, 0, 7]
    history = run(ConstraintMetrics(), [[batch_of(*first, index=index)], [batch_of(*second, index=index)]])
    assert history[1]["stability"] == stability


@pytest.mark.parametrize(
    ("batches", "satisfied", "stability"),
    [
        ([batch_of(-1.0, 1.0, index=[0, 0])], 0.0, 0.0),
        ([batch_of(-1.0, index=[0]), batch_of(1.0, index=[0])], 0.0, 0.0),
    ],
)
def test_last_visit_counts(batches, satisfied, stability):
    row = run(ConstraintMetrics(), [[batch_of(-1.0, index=[0])], batches])[1]
    assert (row["satisfied"], row["stability"]) == (satisfied, stability)


def test_only_samples_and_constraints_of_both_epochs_are_compared():
    first = [batch_of(-1, -1, -1, index=[0, 1, 2])]
    second = [batch_of(-1, 1, index=[0, 9]), batch_of(-1, index=[1], free=True)]
    assert run(ConstraintMetrics(), [first, second])[1]["stability"] == 1.0
    # An epoch further back is forgotten.
    assert run(ConstraintMetrics(), [first, [batch_of(-1, index=[9])], first])[2]["stability"] is None


def test_without_an_index():
    epochs = [[batch_of(-1, -1), batch_of(1)], [batch_of(-1, 1), batch_of(-1)]]
    assert [row["stability"] for row in run(ConstraintMetrics(), epochs)] == [None, None]
    metrics = ConstraintMetrics(match_by_order=True)
    assert [row["stability"] for row in run(metrics, epochs)] == [None, 0.5]
    # Fewer samples: the first ones are compared.
    assert run(metrics, [[batch_of(-1)]])[0]["stability"] == 1.0


def test_no_constraint_at_all():
    epochs = [[batch_of(3.0, math.nan, index=[0, 1], free=True)]] * 2
    nothing = dict.fromkeys(["satisfied", "stability", "violation", "satisfied_0", "violation_0"])
    assert run(ConstraintMetrics(), epochs) == [nothing] * 2
    empty = (torch.zeros(3, 0, 1, 2), torch.zeros(3, 0, 1, 2, dtype=torch.bool), torch.arange(3))
    assert run(ConstraintMetrics(), [[empty]] * 2) == [dict.fromkeys(["satisfied", "stability", "violation"])] * 2


def test_an_epoch_without_a_batch_changes_nothing():
    """A loss that is skipped for an epoch: nothing to report, and stability goes on from the epoch before it."""
    metrics = ConstraintMetrics(["upper"])
    nothing = dict.fromkeys(["satisfied", "stability", "violation", "satisfied_upper", "violation_upper"])
    first, empty, third = run(metrics, [[batch_of(-1.0, -1.0, index=[0, 1])], [], [batch_of(-1.0, 1.0, index=[0, 1])]])
    assert (first["satisfied"], empty, third["stability"]) == (1.0, nothing, 0.5)


def test_not_finite_is_not_satisfied():
    for value in (math.inf, math.nan):
        row = run(ConstraintMetrics(), [[batch_of(-1.0, value)]])[0]
        assert row["satisfied"] == 0.5
        assert row["violation"] == pytest.approx(value, nan_ok=True)


def test_tensors_are_kept_without_their_graph_and_compute_can_be_repeated():
    weight = torch.ones(4, 2, requires_grad=True)
    metrics = ConstraintMetrics()
    metrics.update((weight * 2).half(), torch.zeros(4, 2, dtype=torch.bool))
    first = metrics.compute()
    assert first == metrics.compute()
    metrics.update(-weight.half(), torch.zeros(4, 2, dtype=torch.bool))
    assert (first["satisfied"], metrics.compute()["satisfied"]) == (0.0, 0.5)
    assert not metrics._rows[0][0].requires_grad


def test_no_wait_for_the_device_in_update():
    """A tensor on "meta" has no values: reading one would raise."""
    metrics = ConstraintMetrics()
    meta = {"device": "meta"}
    for _ in range(2):
        index = torch.empty(2, dtype=torch.long, **meta)
        metrics.update(torch.empty(2, 3, **meta), torch.empty(2, 3, dtype=torch.bool, **meta), index)


def test_resumed_stability_is_exact(tmp_path):
    epochs = random_epochs(epochs=5)
    whole = run(ConstraintMetrics(), epochs)
    first = ConstraintMetrics()
    history = run(first, epochs[:2])
    first.update(*epochs[2][0])  # of an epoch that was cut off
    torch.save(first.state_dict(), tmp_path / "state.pt")
    again = ConstraintMetrics()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert history + run(again, epochs[2:]) == whole
    # ... and this test can fail: without the state the third epoch has no stability.
    assert run(ConstraintMetrics(), epochs[2:])[0] != whole[2]


def test_state_before_the_first_epoch_and_without_index():
    metrics = ConstraintMetrics(["upper"])
    assert metrics.state_dict() == {"names": ["upper"]}
    run(metrics, [[batch_of(-1.0, index=[0])]])
    metrics.load_state_dict({"names": ["upper"]})
    assert run(metrics, [[batch_of(-1.0, index=[0])]])[0]["stability"] is None
    run(metrics, [[batch_of(-1.0)]])
    assert set(metrics.state_dict()) == {"names"}


class Processes:
    """Collectives between threads that stand for the processes."""

    def __init__(self, count):
        self.count = count
        self.barrier = threading.Barrier(count, timeout=10)
        self.mine = threading.local()
        self.slots = [None] * count

    def get_world_size(self):
        return self.count

    def all_gather(self, value):
        self.slots[self.mine.rank] = value
        self.barrier.wait()
        values = [*self.slots]
        self.barrier.wait()
        return torch.cat(values) if isinstance(value, torch.Tensor) else values

    def run(self, functions):
        """Results of the functions, one in each process."""

        def start(rank):
            self.mine.rank = rank
            return functions[rank]()

        with ThreadPoolExecutor(self.count) as pool:
            return [*pool.map(start, range(self.count))]


def test_all_processes_get_the_metrics_of_all_samples(monkeypatch):
    """In the second epoch the samples have moved to the other process."""
    shares = [
        [[batch_of(-1.0, 1.0, index=[4, 0]), batch_of(-1.0, index=[2])], [batch_of(-1.0, index=[1])]],
        [[batch_of(3.0, index=[1]), batch_of(1.0, index=[4])], [batch_of(-2.0, 2.0, 2.0, index=[0, 2, 4])]],
    ]  # sample 4 is seen by both in the first epoch
    expected = ConstraintMetrics()
    history = run(expected, [shares[0][epoch] + shares[1][epoch] for epoch in range(2)])
    assert [row["stability"] for row in history] == [None, 0.0]
    processes = Processes(2)
    monkeypatch.setattr("medconstraints.processes.idist", processes)
    metrics = [ConstraintMetrics(), ConstraintMetrics()]
    got = processes.run([lambda rank=rank: run(metrics[rank], shares[rank]) for rank in range(2)])
    assert got == [history, history]
    for own in metrics:
        assert all(torch.equal(own.state_dict()[key], expected.state_dict()[key]) for key in ("index", "satisfied"))


ONE, FREE = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: ConstraintMetrics(tolerance=-1), "tolerance: .* >= 0, got -1"),
        (lambda: ConstraintMetrics(["a", "a"]), "names: expected a different one for each constraint"),
        (lambda: ConstraintMetrics(["a"]).update(ONE, FREE), "expected 1 constraints in each sample, .* got 3"),
        (lambda: ConstraintMetrics().update(ONE, ONE), "residual, free: expected .*bool.* torch.float32"),
        (lambda: ConstraintMetrics().update(ONE, FREE, torch.arange(3)), "index: expected None or an integer for each"),
        (lambda: ConstraintMetrics().load_state_dict({"index": ONE}), "state: expected names"),
    ],
)
def test_wrong_arguments(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_batches_that_do_not_fit_together():
    metrics = ConstraintMetrics()
    metrics.update(ONE, FREE, torch.arange(2))
    with pytest.raises(ValueError, match="expected 3 constraints in each sample"):
        metrics.update(ONE[:, :2], FREE[:, :2], torch.arange(2))
    with pytest.raises(ValueError, match="index: expected in every batch of an epoch or in none"):
        metrics.update(ONE, FREE)
    metrics.next_epoch()
    with pytest.raises(ValueError, match="expected 3 constraints in each sample"):
        metrics.update(ONE[:, :1], FREE[:, :1])
