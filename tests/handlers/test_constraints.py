"""Metrics of constraints in a training and a validation: names, sums, formulations, files, and resumed runs."""

import csv

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from torch import nn

from medconstraints.formulations import LogBarrierExtension, QuadraticPenalty, ReLULagrangian
from medconstraints.formulations.base import Formulation
from medconstraints.handlers import ConstraintMetricsHandler, StepFormulationHandler
from medconstraints.losses import CombinedLoss, ConstraintLoss
from medconstraints.losses.base import ConstrainedLoss, Residuals
from medconstraints.statistics import soft_size


class Given(ConstraintLoss):
    """Residuals that a test chooses, one row for each sample: the image holds the sample's number."""

    def __init__(self, rows, formulation=None, *, free=None, **more):
        super().__init__(soft_size, formulation or QuadraticPenalty(), **more)
        self.target_keys = ("boxes",)
        self.rows = torch.as_tensor(rows, dtype=torch.float32)
        self.free = torch.zeros_like(self.rows, dtype=torch.bool) if free is None else torch.as_tensor(free)

    def residual(self, input, target, *, probabilities=None):
        index = input.detach()[:, 0, 0, 0].round().long()
        return Residuals(self.rows[index], self.free[index], index)

    def forward(self, input, target, *, probabilities=None):
        self.last = self.residual(input, target)
        return input.mean()


class Table(Formulation):
    """A formulation with a fixed table of multipliers."""

    needs_index = has_multipliers = True

    def __init__(self, multipliers):
        super().__init__()
        self.multipliers = torch.tensor(multipliers)

    def forward(self, residual, index=None):
        return residual

    def dual(self, residual, index=None):
        return self.multipliers[index].view(residual.shape)

    def report(self):
        return {"multiplier_max": self.multipliers.max()}


def rows_of(*samples):
    """Residuals (N, C', M, 2) of one class and one component: lower, upper."""
    return torch.tensor(samples, dtype=torch.float32).reshape(-1, 1, 1, 2)


def read(path):
    with path.open(newline="") as file:
        return [*csv.DictReader(file)]


def metrics_of_epochs(engine):
    history = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: history.append(dict(engine.state.metrics)))
    return history


# Metrics of a trainer


def test_metrics_of_a_training(make_trainer, items, tmp_path):
    loss = Given(rows_of((-1, 1), (-1, -1), (-1, -1), (-1, -1), (2, -1)))
    handler = ConstraintMetricsHandler(csv_path=tmp_path / "run" / "constraints.csv")
    trainer = make_trainer(items, max_epochs=3, loss_function=loss, handlers=[handler])
    later = rows_of((-1, -1), (-1, 3), (-1, -1), (-1, -1), (-1, 5))
    trainer.add_event_handler(Events.EPOCH_STARTED(once=2), lambda: setattr(loss, "rows", later))
    history = metrics_of_epochs(trainer)
    trainer.run()
    first = {
        "satisfied": 0.8,
        "violation": 0.3,
        "satisfied_lower_1": 0.8,
        "violation_lower_1": 0.4,
        "satisfied_upper_1": 0.8,
        "violation_upper_1": 0.2,
        "dual_mean": 2 * 0.3,  # the slope of the penalty
    }
    second = {
        "satisfied": 0.8,
        "stability": 6 / 8,
        "violation": 0.8,
        "satisfied_lower_1": 1.0,
        "violation_lower_1": 0.0,
        "satisfied_upper_1": 0.6,
        "violation_upper_1": 8 / 5,
        "dual_mean": 2 * 0.8,
    }
    assert history == [pytest.approx(first), pytest.approx(second), pytest.approx(second | {"stability": 1.0})]
    table = read(tmp_path / "run" / "constraints.csv")
    assert [row.pop("epoch") for row in table] == ["1", "2", "3"]
    assert table[0].pop("stability") == ""
    assert [{key: float(value) for key, value in row.items()} for row in table] == history


def test_several_losses_add_up(make_trainer, items):
    """Of 10 and 20 constraints: the total is over constraints, not a mean of means; one barrier is reported once."""
    barrier = LogBarrierExtension()
    size = Given(rows_of(*[(-1, 1)] * 5), barrier)
    centroid = Given(torch.full((5, 1, 2, 2), -2.0), barrier)
    loss = CombinedLoss({"size": size, "centroid": centroid, "other": nn.MSELoss()}, weights={"other": 0})
    trainer = make_trainer(items, loss_function=loss, handlers=[ConstraintMetricsHandler(prefix="train_")])
    trainer.run()
    got = trainer.state.metrics
    assert all(key.startswith("train_") for key in got)
    got = {key.removeprefix("train_"): value for key, value in got.items()}
    assert got["satisfied"] == pytest.approx(25 / 30)
    assert (got["satisfied_size"], got["satisfied_centroid"]) == (0.5, 1.0)
    assert (got["violation"], got["violation_size"]) == pytest.approx((5 / 30, 0.5))
    assert got["duality_gap_at_minimum"] == pytest.approx(30 / 5)
    assert got["t"] == 5
    # psi_t' is t for a violated constraint and 1 / (t |z|) deep inside.
    assert got["dual_mean"] == pytest.approx((5 * 5 + 5 / 5 + 20 / (5 * 2)) / 30)
    assert set(got) - {"satisfied", "violation", "t", "duality_gap_at_minimum", "dual_mean"} == {
        f"{what}_{name}"
        for what in ("satisfied", "violation")
        for name in (
            *("size", "size_lower_1", "size_upper_1", "centroid"),
            *("centroid_lower_1_0", "centroid_upper_1_0", "centroid_lower_1_1", "centroid_upper_1_1"),
        )
    }


def test_each_constraint_has_its_violation_under_its_name(make_trainer, items):
    rows = torch.arange(1.0, 5.0).reshape(1, 2, 1, 2).expand(5, -1, -1, -1)
    handler = ConstraintMetricsHandler(class_names={1: "a", 3: "b"})
    trainer = make_trainer(items, loss_function=Given(rows, classes=[3, 1]), handlers=[handler])
    trainer.run()
    named = {key: value for key, value in trainer.state.metrics.items() if key.startswith("violation_")}
    assert named == {f"violation_{name}": k + 1 for k, name in enumerate(["lower_b", "upper_b", "lower_a", "upper_a"])}


def test_a_loss_with_other_residuals_numbers_its_constraints(make_trainer, items):
    class Other(ConstrainedLoss):
        target_keys = ()

        def __init__(self):
            super().__init__()
            self.formulation = QuadraticPenalty()

        def residual(self, input, target, *, probabilities=None):
            return Residuals(torch.ones(len(input), 3), torch.zeros(len(input), 3, dtype=torch.bool), None)

        def forward(self, input, target, *, probabilities=None):
            self.last = self.residual(input, target)
            return input.mean()

    trainer = make_trainer(items, loss_function=Other(), handlers=[ConstraintMetricsHandler()])
    trainer.run()
    assert {f"violation_{number}" for number in range(3)} < set(trainer.state.metrics)


def test_free_constraints_leave_no_metric(make_trainer, items, tmp_path):
    free = torch.tensor([True, False]).expand(5, 1, 1, 2)
    loss = Given(rows_of(*[(9, -1)] * 5), LogBarrierExtension(), free=free)
    path = tmp_path / "c.csv"
    trainer = make_trainer(items, loss_function=loss, handlers=[ConstraintMetricsHandler(csv_path=path)])
    trainer.run()
    assert "satisfied_lower_1" not in trainer.state.metrics
    assert trainer.state.metrics["satisfied"] == 1.0
    assert trainer.state.metrics["duality_gap_at_minimum"] == 1.0  # 5 constraints, t = 5
    assert trainer.state.metrics["dual_mean"] == pytest.approx(1 / 5)
    assert read(path)[0]["violation_lower_1"] == ""
    # All of them free in the second epoch: what the first one left in the metrics goes.
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda: setattr(loss, "free", torch.ones(5, 1, 1, 2) > 0))
    trainer.state.max_epochs = 2
    trainer.run()
    assert set(trainer.state.metrics) == {"t", "duality_gap_at_minimum"}
    assert [row["satisfied"] for row in read(path)] == ["1.0", ""]


def test_a_skipped_loss_is_not_counted_again(make_trainer, items, tmp_path):
    """The weight of a loss is 0 in the second epoch, and from the start for another: its columns come when it does."""
    parts = {"a": Given(rows_of(*[(1, 1)] * 5)), "b": Given(rows_of(*[(-1, -1)] * 5))}
    loss = CombinedLoss(parts, weights={"b": 0}, skip_unweighted=True)
    path = tmp_path / "c.csv"
    trainer = make_trainer(items, max_epochs=2, loss_function=loss, handlers=[ConstraintMetricsHandler(csv_path=path)])
    trainer.add_event_handler(Events.EPOCH_STARTED(once=2), lambda: loss.weights.update(a=0.0, b=1.0))
    history = metrics_of_epochs(trainer)
    trainer.run()
    assert [row["satisfied"] for row in history] == [0.0, 1.0]
    assert [row.get("satisfied_a") for row in history] == [0.0, None]
    assert [row["satisfied_b_lower_1"] for row in read(path)] == ["", "1.0"]


def test_multipliers_of_several_formulations(make_trainer, items):
    """Each sample's own multipliers, free ones left out of the mean of those visited."""
    table = Table([[float(i), 10.0 * i] for i in range(5)])
    free = torch.tensor([[False, i == 4] for i in range(5)]).reshape(5, 1, 1, 2)
    parts = {"a": Given(rows_of(*[(1, 1)] * 5), table, free=free)}
    parts["b"] = Given(rows_of(*[(1, 1)] * 5), LogBarrierExtension(t=2.0))
    trainer = make_trainer(items, loss_function=CombinedLoss(parts), handlers=[ConstraintMetricsHandler()])
    trainer.run()
    got = trainer.state.metrics
    assert got["multiplier_max_a"] == 40.0
    assert got["dual_mean_a"] == pytest.approx((10 + 60) / 9)
    assert (got["t_b"], got["dual_mean_b"], got["duality_gap_at_minimum_b"]) == (2.0, 2.0, 5.0)
    assert not {"t_a", "multiplier_max_b", "t", "dual_mean"} & set(got)


def test_formulations_are_reported_as_they_trained(make_trainer, items):
    loss = Given(rows_of(*[(1, 1)] * 5), LogBarrierExtension(t=5.0, factor=2.0))
    handlers = [ConstraintMetricsHandler(), StepFormulationHandler()]
    trainer = make_trainer(items, max_epochs=2, loss_function=loss, handlers=handlers)
    history = metrics_of_epochs(trainer)
    trainer.run()
    assert [(row["t"], row["duality_gap_at_minimum"]) for row in history] == [(5, 2), (10, 1)]


def test_mean_of_the_duals_over_all_processes(make_trainer, items, monkeypatch):
    monkeypatch.setattr(
        "medconstraints.handlers.constraints.idist.all_reduce", lambda sums: sums + torch.tensor([7, 4])
    )
    loss = Given(rows_of(*[(1, 1)] * 5), LogBarrierExtension(t=2.0))
    trainer = make_trainer(items, loss_function=loss, handlers=[ConstraintMetricsHandler()])
    trainer.run()
    assert trainer.state.metrics["dual_mean"] == pytest.approx((20 + 7) / (10 + 4))


def test_an_epoch_that_was_cut_off_does_not_count(make_trainer, items):
    """Run again in one process: the batches of the first try are forgotten, also without an index."""
    loss = Given(rows_of(*[(1, 1)] * 5), LogBarrierExtension())
    residual = loss.residual
    loss.residual = lambda *arguments: residual(*arguments)._replace(index=None)
    handler = ConstraintMetricsHandler()

    def stop():
        raise ArithmeticError

    cut = make_trainer(items, loss_function=loss, handlers=[handler])
    cut.add_event_handler(Events.ITERATION_COMPLETED(once=2), stop)
    with pytest.raises(ArithmeticError):
        cut.run()
    trainer = make_trainer(items, loss_function=loss, handlers=[handler])
    trainer.run()
    assert trainer.state.metrics["duality_gap_at_minimum"] == 10 / 5


def test_only_process_0_writes_the_file(make_trainer, items, tmp_path, monkeypatch):
    path = tmp_path / "c.csv"
    for rank in (1, 0):
        monkeypatch.setattr("ignite.distributed.get_rank", lambda rank=rank: rank)
        loss = Given(rows_of(*[(1, 1)] * 5))
        make_trainer(items, loss_function=loss, handlers=[ConstraintMetricsHandler(csv_path=path)]).run()
        assert path.exists() == (rank == 0)


def test_state_goes_on_in_another_handler(make_trainer, items, tmp_path):
    loss = Given(rows_of(*[(-1, 1)] * 5))
    handler = ConstraintMetricsHandler(loss)
    make_trainer(items, loss_function=loss, handlers=[handler]).run()
    torch.save(handler.state_dict(), tmp_path / "state.pt")
    again = ConstraintMetricsHandler(loss)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    trainer = make_trainer(items, loss_function=loss, handlers=[again])
    trainer.run()
    assert trainer.state.metrics["stability"] == 1.0
    with pytest.raises(ValueError, match=r"state: .*losses \[''\], got \['b'\]"):
        again.load_state_dict({"b": {}})


@pytest.mark.parametrize(
    ("loss", "trained", "error", "message"),
    [
        (None, CombinedLoss({"a": nn.MSELoss()}), TypeError, "loss: expected one with constraints.*CombinedLoss"),
        (Given(rows_of((1, 1))), Given(rows_of((1, 1))), ValueError, "loss: 'Given' is no part of the loss"),
    ],
)
def test_a_loss_that_has_nothing_to_measure(make_trainer, items, loss, trained, error, message):
    with pytest.raises(error, match=message):
        make_trainer(items, loss_function=trained, handlers=[ConstraintMetricsHandler(loss)]).run()


# Metrics of an evaluator


@pytest.fixture
def evaluate(tiny_network):
    def run(items, handler, *, epochs=1):
        """Metrics after each validation; the network multiplies by its weight: 1, 2 ..."""
        network = tiny_network()
        loader = DataLoader(Dataset(items), batch_size=2)
        evaluator = SupervisedEvaluator(torch.device("cpu"), loader, network, val_handlers=[handler])
        history = []
        for epoch in range(1, epochs + 1):
            evaluator.run(epoch)
            history.append(dict(evaluator.state.metrics))
            with torch.no_grad():
                network.weight.add_(1)
        return history

    return run


@pytest.fixture
def bounded(items):
    """Image i is full of i: four voxels, a size of 4 i. Bounds 4 to 12 for all, and what a target may have besides."""
    for i, item in enumerate(items):
        item |= {"size_bounds": torch.tensor([[[4.0, 12.0]]]), "index": i, "spacing_mm": torch.ones(2)}
    return items


def sized(formulation=None, **entries):
    size = ConstraintLoss(soft_size, formulation or LogBarrierExtension())
    return CombinedLoss({"size": size}, keys={"size": {"bounds": "size_bounds"} | entries})


@pytest.mark.parametrize("entries", [{}, {"spacing_mm": "spacing_mm"}])
def test_metrics_of_a_validation(evaluate, bounded, tmp_path, entries):
    """A network's output in logits, here the size itself; in the second validation the sizes are doubled."""
    loss = sized(**entries)
    handler = ConstraintMetricsHandler(loss, csv_path=tmp_path / "val.csv", prefix="val_", also="val_score")
    history = evaluate(bounded, handler, epochs=2)
    sides = {f"{what}_size_{side}_1": 0.8 for what in ("satisfied", "violation") for side in ("lower", "upper")}
    expected = {"satisfied": 0.8, "violation": 0.8} | sides
    assert history[0] == pytest.approx({f"val_{key}": value for key, value in expected.items()})
    # Sizes 0, 8, 16, 24, 32: of 8 satisfied ones the upper bounds of samples 2 and 3 are lost.
    assert history[1]["val_stability"] == pytest.approx(6 / 8)
    assert history[1]["val_satisfied"] == pytest.approx(6 / 10)
    assert [(row["epoch"], row["val_score"]) for row in read(tmp_path / "val.csv")] == [("1", ""), ("2", "")]
    assert loss.losses["size"].last is None  # nothing that a formulation would observe


@pytest.mark.parametrize(("match", "stability"), [(True, 6 / 8), (False, None)])
def test_validation_without_index(evaluate, bounded, match, stability):
    for item in bounded:
        del item["index"]
    loss = sized(ReLULagrangian(learning_rate=0.1))
    history = evaluate(bounded, ConstraintMetricsHandler(loss, match_by_order=match), epochs=2)
    assert history[1].get("stability") == stability


def test_a_validation_needs_a_loss_and_what_it_reads(evaluate, bounded):
    with pytest.raises(ValueError, match="loss: expected the loss whose constraints are measured"):
        evaluate(bounded, ConstraintMetricsHandler())
    with pytest.raises(KeyError, match=r"batch: no \['bounds'\], it has .*'size_bounds'.*; add the transform"):
        evaluate(bounded, ConstraintMetricsHandler(ConstraintLoss(soft_size, QuadraticPenalty())))


def test_targets_that_the_loss_reads_on_the_host_stay_there(bounded):
    seen = []

    class Spy(Given):
        def residual(self, input, target, *, probabilities=None):
            seen.append({key: value.device.type for key, value in target.items()})
            return Residuals(torch.zeros(2, 1, 1, 2), torch.zeros(2, 1, 1, 2, dtype=torch.bool), None)

    loss = Spy(rows_of((1, 1)))
    loss.target_keys, loss.optional_keys = ("bounds", "image"), ("index",)
    loader = DataLoader(Dataset([item | {"bounds": item["size_bounds"]} for item in bounded]), batch_size=2)
    evaluator = SupervisedEvaluator(torch.device("cpu"), loader, nn.Identity(), epoch_length=1)
    evaluator.inferer = lambda image, network: torch.empty(2, 1, 2, 2, device="meta")
    ConstraintMetricsHandler(loss).attach(evaluator)
    evaluator.run()
    assert seen == [{"bounds": "cpu", "index": "cpu", "image": "meta"}]
