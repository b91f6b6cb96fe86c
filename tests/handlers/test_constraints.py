"""Constraints in a training: metrics in logs and files, the dual pass, and a run that was killed and resumed."""

import csv
import math
import random

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import IterationEvents, SupervisedEvaluator, SupervisedTrainer
from monai.transforms import Compose, RandGaussianNoised
from torch import nn

from medconstraints.engines import PrepareBatchTargets
from medconstraints.formulations import Lagrangian, LogBarrierExtension, QuadraticPenalty, ReLULagrangian
from medconstraints.handlers import EpochSeedHandler, ResumeHandler, StepFormulationHandler
from medconstraints.handlers.constraint_metrics import ConstraintMetrics
from medconstraints.handlers.constraints import ConstraintMetricsHandler, DualPassHandler
from medconstraints.handlers.epoch_table import EpochTable
from medconstraints.handlers.random_state import kept_random_state
from medconstraints.losses import CombinedLoss, ConstraintLoss
from medconstraints.statistics import soft_size

CPU = torch.device("cpu")

pytest.skip("they follow the losses with declared constraints", allow_module_level=True)


@pytest.fixture(autouse=True)
def _one_thread():
    """Images of a few voxels: threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Fakes, where the real classes would only be in the way


class FakeLoss(nn.Module):
    """Residuals that a test chooses, one row for each sample: the image holds the sample's number."""

    def __init__(self, rows, formulation=None, *, free=None, **attributes):
        super().__init__()
        self.rows = torch.as_tensor(rows, dtype=torch.float32)
        self.free = torch.zeros_like(self.rows, dtype=torch.bool) if free is None else torch.as_tensor(free)
        self.formulation = formulation
        self.last = None
        for name, value in attributes.items():
            setattr(self, name, value)

    def residual(self, input, target):
        index = input.detach()[:, 0, 0, 0].round().long()
        return self.rows[index], self.free[index], index

    def forward(self, input, target):
        self.last = self.residual(input, target)
        return input.mean()


class Table(nn.Module):
    """A formulation with a fixed table of multipliers."""

    needs_index = True

    def __init__(self, multipliers):
        super().__init__()
        self.register_buffer("multipliers", torch.tensor(multipliers))

    def dual(self, residual, index):
        return self.multipliers[index].view(residual.shape)


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
    loss = FakeLoss(rows_of((-1, 1), (-1, -1), (-1, -1), (-1, -1), (2, -1)))
    handler = ConstraintMetricsHandler(loss, csv_path=tmp_path / "run" / "constraints.csv")
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
    }
    second = {
        "satisfied": 0.8,
        "stability": 6 / 8,
        "violation": 0.8,
        "satisfied_lower_1": 1.0,
        "violation_lower_1": 0.0,
        "satisfied_upper_1": 0.6,
        "violation_upper_1": 8 / 5,
    }
    assert history == [pytest.approx(first), pytest.approx(second), pytest.approx(second | {"stability": 1.0})]
    table = read(tmp_path / "run" / "constraints.csv")
    assert [row.pop("epoch") for row in table] == ["1", "2", "3"]
    assert table[0].pop("stability") == ""
    assert [{key: float(value) for key, value in row.items()} for row in table] == history
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["constraints.csv"]


def test_several_losses_add_up(make_trainer, items):
    """Of 10 and 20 constraints: the total is over constraints, not a mean of means."""
    barrier = LogBarrierExtension()
    size = FakeLoss(rows_of(*[(-1, 1)] * 5), barrier)
    centroid = FakeLoss(torch.full((5, 1, 2, 2), -2.0), barrier)
    loss = CombinedLoss({"size": size, "centroid": centroid}, keys={"size": "boxes", "centroid": "boxes"})
    handler = ConstraintMetricsHandler({"size": size, "centroid": centroid}, prefix="train_")
    trainer = make_trainer(items, loss_function=loss, handlers=[handler])
    trainer.run()
    got = trainer.state.metrics
    assert all(key.startswith("train_") for key in got)
    got = {key.removeprefix("train_"): value for key, value in got.items()}
    assert got["satisfied"] == pytest.approx(25 / 30)
    assert (got["satisfied_size"], got["satisfied_centroid"]) == (0.5, 1.0)
    assert (got["violation"], got["violation_size"]) == pytest.approx((5 / 30, 0.5))
    assert got["duality_gap_bound"] == pytest.approx(30 / 5)
    assert got["t"] == 5
    # psi_t' is t for a violated constraint and 1 / (t |z|) deep inside.
    assert got["dual_mean"] == pytest.approx((5 * 5 + 5 / 5 + 20 / (5 * 2)) / 30)
    assert set(got) - {"satisfied", "violation", "t", "duality_gap_bound", "dual_mean"} == {
        f"{what}_{name}"
        for what in ("satisfied", "violation")
        for name in (
            *("size", "size_lower_1", "size_upper_1", "centroid"),
            *("centroid_lower_1_0", "centroid_upper_1_0", "centroid_lower_1_1", "centroid_upper_1_1"),
        )
    }


@pytest.mark.parametrize(
    ("attributes", "class_names", "expected"),
    [
        ({}, None, ["lower_1", "upper_1", "lower_2", "upper_2"]),
        ({}, {2: "myocard"}, ["lower_1", "upper_1", "lower_myocard", "upper_myocard"]),
        ({"include_background": True}, None, ["lower_0", "upper_0", "lower_1", "upper_1"]),
        ({"classes": [3, 1]}, {1: "a", 3: "b"}, ["lower_b", "upper_b", "lower_a", "upper_a"]),
        ({"per_class": False}, {1: "a"}, ["lower_0", "upper_0", "lower_1", "upper_1"]),
    ],
)
def test_names_of_constraints(make_trainer, items, attributes, class_names, expected):
    """The k-th constraint has the k-th violation."""
    rows = torch.arange(1.0, 5.0).reshape(1, 2, 1, 2).expand(5, -1, -1, -1)
    loss = FakeLoss(rows, **attributes)
    trainer = make_trainer(
        items, loss_function=loss, handlers=[ConstraintMetricsHandler(loss, class_names=class_names)]
    )
    trainer.run()
    named = {key: value for key, value in trainer.state.metrics.items() if key.startswith("violation_")}
    assert named == {f"violation_{name}": k + 1 for k, name in enumerate(expected)}


def test_names_of_the_real_loss(make_trainer, items):
    """Two channels, bounds of the whole batch: the background is dropped by the loss and by the names."""
    for i, item in enumerate(items):
        item["bounds"] = torch.tensor([[[-torch.inf, torch.inf]], [[1.0, torch.inf]]])
        item["image"] = torch.full((2, 2, 2), float(i))
    loss = ConstraintLoss(soft_size, QuadraticPenalty(), softmax=True)
    network = nn.Identity()
    network.weight = nn.Parameter(torch.zeros(()))
    trainer = make_trainer(
        items,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
        loss_function=CombinedLoss(
            {"size": loss, "gradient": Gradient(network)}, keys={"gradient": {"label": "gradient"}}
        ),
        prepare_batch=PrepareBatchTargets(["bounds", "gradient"]),
        handlers=[ConstraintMetricsHandler({"size": loss})],
    )
    for item in items:
        item["gradient"] = torch.zeros(1)
    trainer.run()
    assert trainer.state.metrics == {
        "satisfied": 1.0,
        "violation": 0.0,
        "satisfied_size_lower_1": 1.0,
        "violation_size_lower_1": 0.0,
        "dual_mean": 0.0,
    }


class Gradient(nn.Module):
    """A loss that depends on the weights of a network that ignores them."""

    def __init__(self, network):
        super().__init__()
        self.weight = network.weight

    def forward(self, input, target):
        return self.weight.square()


def test_free_constraints_leave_no_metric(make_trainer, items, tmp_path):
    free = torch.tensor([True, False]).expand(5, 1, 1, 2)
    loss = FakeLoss(rows_of(*[(9, -1)] * 5), LogBarrierExtension(), free=free)
    path = tmp_path / "c.csv"
    trainer = make_trainer(items, loss_function=loss, handlers=[ConstraintMetricsHandler(loss, csv_path=path)])
    trainer.run()
    assert "satisfied_lower_1" not in trainer.state.metrics
    assert trainer.state.metrics["satisfied"] == 1.0
    assert trainer.state.metrics["duality_gap_bound"] == 1.0  # 5 constraints, t = 5
    assert trainer.state.metrics["dual_mean"] == pytest.approx(1 / 5)
    assert read(path)[0]["violation_lower_1"] == ""
    # All of them free in the second epoch: what the first one left in the metrics goes.
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda: setattr(loss, "free", torch.ones(5, 1, 1, 2) > 0))
    trainer.state.max_epochs = 2
    trainer.run()
    assert set(trainer.state.metrics) == {"t", "duality_gap_bound"}
    assert [row["satisfied"] for row in read(path)] == ["1.0", ""]


def test_multipliers(make_trainer, items):
    """Each sample's own multipliers, free ones left out of the mean of those visited."""
    table = Table([[float(i), 10.0 * i] for i in range(5)])
    free = torch.tensor([[False, i == 4] for i in range(5)]).reshape(5, 1, 1, 2)
    loss = FakeLoss(rows_of(*[(1, 1)] * 5), table, free=free)
    other = FakeLoss(rows_of(*[(1, 1)] * 5), LogBarrierExtension(t=2.0))
    handler = ConstraintMetricsHandler({"a": loss, "b": other})
    combined = CombinedLoss({"a": loss, "b": other}, keys={"a": "boxes", "b": "boxes"})
    trainer = make_trainer(items, loss_function=combined, handlers=[handler])
    trainer.run()
    got = trainer.state.metrics
    assert (got["multiplier_mean_a"], got["multiplier_max_a"]) == (11.0, 40.0)
    assert got["dual_mean_a"] == pytest.approx((10 + 60) / 9)
    assert (got["t_b"], got["dual_mean_b"]) == (2.0, 2.0)
    assert not {"t_a", "multiplier_mean_b", "t", "dual_mean"} & set(got)


def test_formulations_are_reported_as_they_trained(make_trainer, items):
    barrier = LogBarrierExtension(t=5.0, factor=2.0)
    loss = FakeLoss(rows_of(*[(1, 1)] * 5))
    handlers = [ConstraintMetricsHandler(loss, formulations=barrier), StepFormulationHandler(barrier)]
    trainer = make_trainer(items, max_epochs=2, loss_function=loss, handlers=handlers)
    history = metrics_of_epochs(trainer)
    trainer.run()
    assert [(row["t"], row["duality_gap_bound"]) for row in history] == [(5, 2), (10, 1)]


def test_a_table_without_multipliers_yet():
    loss = FakeLoss(rows_of((1, 1)), ReLULagrangian(learning_rate=0.1))
    handler = ConstraintMetricsHandler(loss)
    engine = Engine(lambda engine, batch: loss(torch.zeros(1, 1, 1, 1), None))
    engine.register_events(*IterationEvents)
    handler.attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: engine.fire_event(IterationEvents.LOSS_COMPLETED))
    loss.formulation.dual = lambda residual: torch.zeros_like(residual)
    engine.run([0])
    assert not [key for key in engine.state.metrics if key.startswith("multiplier")]
    assert "multiplier_max" in handler._columns()


def test_mean_of_the_duals_over_all_processes(make_trainer, items, monkeypatch):
    monkeypatch.setattr(
        "medconstraints.handlers.constraints.idist.all_reduce", lambda sums: sums + torch.tensor([7, 4])
    )
    loss = FakeLoss(rows_of(*[(1, 1)] * 5), LogBarrierExtension(t=2.0))
    trainer = make_trainer(items, loss_function=loss, handlers=[ConstraintMetricsHandler(loss)])
    trainer.run()
    assert trainer.state.metrics["dual_mean"] == pytest.approx((20 + 7) / (10 + 4))


def test_an_epoch_that_was_cut_off_does_not_count(make_trainer, items):
    """Run again in one process: the batches of the first try are forgotten, also without an index."""
    loss = FakeLoss(rows_of(*[(1, 1)] * 5), LogBarrierExtension())
    loss.residual = lambda input, target: (torch.ones(len(input), 1, 1, 2), torch.zeros(len(input), 1, 1, 2) > 0, None)
    handler = ConstraintMetricsHandler(loss)

    def stop():
        raise ArithmeticError

    for failing in (True, False):
        trainer = make_trainer(items, loss_function=loss, handlers=[handler])
        if failing:
            trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), stop)
            with pytest.raises(ArithmeticError):
                trainer.run()
    trainer.run()
    assert trainer.state.metrics["duality_gap_bound"] == 10 / 5


def test_a_loss_that_is_not_trained_with(make_trainer, items):
    handler = ConstraintMetricsHandler({"size": FakeLoss(rows_of((1, 1)))})
    with pytest.raises(RuntimeError, match="losses: 'size' was not called in the iteration; give the same object"):
        make_trainer(items, handlers=[handler]).run()


GOOD = FakeLoss(rows_of((1, 1)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ConstraintMetricsHandler({}), ValueError, "losses: expected at least one loss"),
        (lambda: ConstraintMetricsHandler({"a": nn.MSELoss()}), TypeError, r"last and residual\(\).* MSELoss for 'a'"),
        (lambda: ConstraintMetricsHandler(GOOD, keys="bounds"), ValueError, "keys: a trainer's losses have"),
        (
            lambda: ConstraintMetricsHandler({"a": GOOD}, keys={"b": "c"}, evaluate=True),
            ValueError,
            r"keys: \['b'\] name no loss; the losses are \['a'\]",
        ),
        (
            lambda: ConstraintMetricsHandler({"a": GOOD}, keys="c", evaluate=True),
            ValueError,
            "keys: expected a mapping",
        ),
        (
            lambda: ConstraintMetricsHandler({"a": GOOD}, formulations={"b": LogBarrierExtension()}),
            ValueError,
            r"formulations: \['b'\] name no loss",
        ),
        (
            lambda: ConstraintMetricsHandler(GOOD, formulations=LogBarrierExtension(), evaluate=True),
            ValueError,
            "formulations: are reported in training only",
        ),
        (
            lambda: ConstraintMetricsHandler({"a": GOOD}).load_state_dict({"b": {}}),
            ValueError,
            r"state: expected one of the losses \['a'\], got \['b'\]",
        ),
        (lambda: DualPassHandler(GOOD, LogBarrierExtension()), TypeError, r"formulation: .*reset\(\).*LogBarrierExt"),
    ],
)
def test_wrong_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


# Metrics of an evaluator


def evaluate(items, handler, network=None, *, epochs=1):
    """Metrics after each validation; the network multiplies by its weight."""
    network = network or nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(network.weight)
    evaluator = SupervisedEvaluator(
        device=CPU, val_data_loader=DataLoader(Dataset(items), batch_size=2), network=network, val_handlers=[handler]
    )
    history = []
    for epoch in range(1, epochs + 1):
        evaluator.run(epoch)
        history.append(dict(evaluator.state.metrics))
        with torch.no_grad():
            network.weight.add_(1)
    return history


@pytest.fixture
def bounded(items):
    """Image i is full of i: four voxels, a size of 4 i. Bounds 4 to 12 for all, and what a target may have besides."""
    for i, item in enumerate(items):
        item |= {"size_bounds": torch.tensor([[[4.0, 12.0]]]), "index": i, "spacing_mm": torch.ones(2)}
    return items


SIZES = {"satisfied_lower_1": 4 / 5, "satisfied_upper_1": 4 / 5, "violation_lower_1": 4 / 5, "violation_upper_1": 4 / 5}


@pytest.mark.parametrize("spacing", [{}, {"spacing_mm": "spacing_mm"}])
@pytest.mark.parametrize("name", ["", "size"])
def test_metrics_of_a_validation(bounded, tmp_path, name, spacing):
    """A network's output in logits, here the size itself; in the second validation the sizes are doubled."""
    loss = ConstraintLoss(soft_size, LogBarrierExtension())
    keys = {"bounds": "size_bounds", "index": "index"} | spacing
    options = {"evaluate": True, "csv_path": tmp_path / "val.csv", "prefix": "val_"}
    if name:
        handler = ConstraintMetricsHandler({name: loss}, keys={name: keys}, **options)
    else:
        handler = ConstraintMetricsHandler(loss, keys=keys, **options)
    history = evaluate(bounded, handler, epochs=2)
    named = {key.replace("_lower", f"_{name}_lower").replace("_upper", f"_{name}_upper"): v for key, v in SIZES.items()}
    expected = {"satisfied": 0.8, "violation": 0.8} | (named if name else SIZES)
    assert history[0] == pytest.approx({f"val_{key}": value for key, value in expected.items()})
    # Sizes 0, 8, 16, 24, 32: of 8 satisfied ones the upper bounds of samples 2 and 3 are lost.
    assert history[1]["val_stability"] == pytest.approx(6 / 8)
    assert history[1]["val_satisfied"] == pytest.approx(6 / 10)
    assert [row["epoch"] for row in read(tmp_path / "val.csv")] == ["1", "2"]
    assert loss.last is None  # nothing that a formulation would observe


@pytest.mark.parametrize(("match", "stability"), [(True, 6 / 8), (False, None)])
def test_validation_without_index(bounded, match, stability):
    loss = ConstraintLoss(soft_size, LogBarrierExtension())
    handler = ConstraintMetricsHandler(loss, keys="size_bounds", evaluate=True, match_by_order=match)
    assert evaluate(bounded, handler, epochs=2)[1].get("stability") == stability


def test_the_key_of_a_named_loss_is_its_name(bounded):
    handler = ConstraintMetricsHandler({"size_bounds": ConstraintLoss(soft_size, QuadraticPenalty())}, evaluate=True)
    assert evaluate(bounded, handler)[0]["satisfied"] == 0.8


@pytest.mark.parametrize("keys", [None, {"bounds": "bounds"}])
def test_missing_key_of_a_validation(bounded, keys):
    handler = ConstraintMetricsHandler(ConstraintLoss(soft_size, QuadraticPenalty()), keys=keys, evaluate=True)
    with pytest.raises(KeyError, match=r"batch: no \['bounds'\], it has .*'size_bounds'.*; add the transform"):
        evaluate(bounded, handler)


def test_targets_that_the_loss_reads_on_the_host_stay_there(bounded):
    seen = []

    class Spy(FakeLoss):
        def residual(self, input, target):
            seen.append({key: value.device.type for key, value in target.items()})
            return torch.zeros(2, 1, 1, 2), torch.zeros(2, 1, 1, 2, dtype=torch.bool), None

    keys = {"bounds": "size_bounds", "index": "index", "image": "image"}
    handler = ConstraintMetricsHandler(Spy(rows_of((1, 1))), keys=keys, evaluate=True)
    engine = Engine(lambda engine, batch: None)
    engine.state.batch = next(iter(DataLoader(Dataset(bounded), batch_size=2)))
    engine.state.output = {"pred": torch.empty(2, 1, 2, 2, device="meta")}
    handler._add_predictions(engine)
    assert seen == [{"bounds": "cpu", "index": "cpu", "image": "meta"}]


# EpochTable


def test_rows_of_repeated_epochs_are_cut(tmp_path):
    table = EpochTable(tmp_path / "t.csv")
    for epoch in range(1, 5):
        table.write(epoch, {"a": epoch / 5, "b": None})
    EpochTable(tmp_path / "t.csv").write(3, {"a": math.inf, "b": 1e-30})
    assert (tmp_path / "t.csv").read_bytes() == b"epoch,a,b\n1,0.2,\n2,0.4,\n3,inf,1e-30\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "epoch,a,c\n1,2,3\n",
            r"columns are those of another run \(it lacks \['b'\], has besides \['c'\]\)",
        ),
        ("epoch,b,a\n1,2,3\n", r"t\.csv: its columns are those of another run"),
        ("name,a,b\n1,2,3\n", r"another run \(it lacks \[\], has besides \['name'\]\); choose another file"),
        ("epoch,a,b\nfirst,2,3\n", r"t\.csv: expected the number of an epoch at the start .*'first'.*; move it away"),
    ],
)
def test_a_file_of_another_run_stays(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_text(text)
    for act in (lambda table: table.write(1, {"a": 1.0, "b": 2.0}), lambda table: table.check(["a", "b"])):
        with pytest.raises(RuntimeError, match=message):
            act(EpochTable(path))
    assert path.read_text() == text


def test_a_kill_while_writing_leaves_the_former_table(tmp_path, monkeypatch):
    table = EpochTable(tmp_path / "t.csv")
    table.write(1, {"a": 1.0})
    before = table.path.read_bytes()

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("medconstraints.handlers.epoch_table.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        table.write(2, {"a": 1.0})
    assert table.path.read_bytes() == before


def test_a_file_with_other_columns_stops_the_run_in_its_first_iteration(make_trainer, items, tmp_path):
    path = tmp_path / "c.csv"
    for rank, iterations in ((0, 0), (1, 3)):
        path.write_text("epoch,loss\n1,0.5\n")
        loss = FakeLoss(rows_of(*[(1, 1)] * 5))
        trainer = make_trainer(
            items, loss_function=loss, handlers=[ConstraintMetricsHandler(loss, csv_path=path, rank=rank)]
        )
        done = []
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine, done=done: done.append(1))
        if rank:
            trainer.run()
        else:
            with pytest.raises(RuntimeError, match=r"c\.csv: its columns are those of another run"):
                trainer.run()
        assert len(done) == iterations
        assert path.read_text() == "epoch,loss\n1,0.5\n"


# The dual pass


class Noisy(nn.Module):
    """A network with everything that a pass could disturb: batch norm, dropout, and draws from three generators."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Conv2d(3, 2, 1))

    def forward(self, x):
        return self.layers(x) + 0.01 * (np.random.rand() + random.random())  # noqa: NPY002


class Observer(nn.Module):
    """A formulation that only watches: cost z, whatever was observed."""

    def __init__(self):
        super().__init__()
        self.seen, self.steps = [], []

    def forward(self, residual):
        self.seen.append((residual.detach().clone(), torch.is_grad_enabled()))
        return residual

    def reset(self):
        self.seen = []

    def step(self):
        self.steps.append(self.seen)
        self.seen = []


def cohort(count=7):
    """Images of noise, with bounds of the size of two channels and their numbers."""
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "image": torch.rand(1, 4, 4, generator=generator),
            "bounds": torch.tensor([[[-torch.inf, torch.inf]], [[9.0, 12.0]]]),
            "index": i,
            "label": torch.zeros(1, 4, 4),
        }
        for i in range(count)
    ]


class PrepareConstraint(PrepareBatchTargets):
    """Image, and bounds with the index."""

    def __init__(self):
        super().__init__(["bounds", "index"])


def make_run(formulation, *, extra=(), max_epochs=3, seeds=True, epoch_length=None, lr=0.05, **loader_options):
    """A trainer with noise in the data, shuffled, and everything random."""
    torch.manual_seed(5)
    network = Noisy()
    loss = ConstraintLoss(soft_size, formulation, softmax=True)
    dataset = Dataset(cohort(), Compose([RandGaussianNoised("image", prob=0.9)]))
    loader = DataLoader(dataset, batch_size=2, shuffle=True, **loader_options)
    handlers = [*([EpochSeedHandler(0, dataset)] if seeds else []), *extra]
    trainer = SupervisedTrainer(
        device=CPU,
        max_epochs=max_epochs,
        train_data_loader=loader,
        epoch_length=epoch_length,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9),
        loss_function=loss,
        prepare_batch=PrepareConstraint(),
        train_handlers=handlers,
    )
    return trainer


def test_the_pass_sees_all_data_once_with_the_weights_of_the_end(make_trainer, items):
    """The network multiplies by a weight that training lowers: residuals in training, and after it in the pass."""
    observer, calls = Observer(), []
    loss = ConstraintLoss(soft_size, observer, normalization="none")
    for item in items:
        item["bounds"] = torch.tensor([[[-torch.inf, 0.0]]])
    trainer = make_trainer(
        items,
        max_epochs=2,
        lr=0.01,
        loss_function=loss,
        prepare_batch=PrepareOne(),
        handlers=[Validation(), DualPassHandler(loss, observer), StepFormulationHandler(observer)],
    )
    weights = []
    trainer.network.register_forward_hook(lambda network, inputs, output: calls.append(network.training))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: weights.append(e.network.weight.item()))
    trainer.run()
    assert weights[1] < weights[0] < 1
    for weight, seen in zip(weights, observer.steps, strict=True):
        assert len(seen) == 3
        assert not any(gradient for _, gradient in seen)
        sizes = torch.cat([residual[:, 0, 0, 1] for residual, _ in seen])
        assert sizes.tolist() == pytest.approx([4 * i * weight for i in range(5)])
    assert calls == [True] * 12


class Validation:
    """Leaves the network in evaluation mode."""

    def attach(self, engine):
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: engine.network.eval())


class PrepareOne(PrepareBatchTargets):
    """Image and bounds, and arguments for the network's call as MONAI allows them."""

    def __call__(self, batchdata, device=None, non_blocking=False, **kwargs):
        return batchdata["image"], batchdata["bounds"], (), {}


@pytest.mark.parametrize("seeds", [True, False])
@pytest.mark.parametrize("epoch_length", [None, 3, 5])
@pytest.mark.parametrize("generator", [False, True])
def test_the_pass_leaves_no_trace(seeds, epoch_length, generator):
    """With an observer that changes nothing, the run is bit for bit what it is without the pass."""
    results = []
    for with_pass in (False, True):
        options = {"generator": torch.Generator().manual_seed(1)} if generator else {}
        observer = Observer()
        trainer = make_run(observer, seeds=seeds, epoch_length=epoch_length, **options)
        dual = DualPassHandler(trainer.loss_function, observer)
        states = []
        if with_pass:
            trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e, states=states: states.append(snapshot(e)))
            dual.attach(trainer)
            trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e, states=states: states.append(snapshot(e)))
        for source in (torch.manual_seed, np.random.seed, random.seed):
            source(11)
        trainer.run()
        assert all(before == after for before, after in zip(states[::2], states[1::2], strict=True))
        assert len(states) == (6 if with_pass else 0)
        draws = [torch.rand(()).item(), np.random.rand(), random.random()]  # noqa: NPY002
        results.append([*(v.tolist() for v in trainer.network.state_dict().values()), *draws])
    assert results[0] == results[1]


def snapshot(engine):
    """What of an engine a pass could change."""
    state = {key: value for key, value in vars(engine.state).items() if key not in ("output", "batch", "times")}
    return (
        {key: value for key, value in state.items() if isinstance(value, int | float | str | dict)},
        id(engine.state.output),
        id(engine.state.batch),
        engine.state.output[0]["loss"],
        [module.training for module in engine.network.modules()],
    )


def test_without_keeping_the_states_there_would_be_a_trace():
    """What the test above relies on: the very same pass without protection changes the run."""

    def plain_pass(engine):
        with torch.no_grad():
            for batch in engine.data_loader:
                engine.network(batch["image"])

    results = []
    for extra in ((), (plain_pass,)):
        trainer = make_run(Observer())
        for handler in extra:
            trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
        trainer.run()
        results.append(trainer.network.layers[1].running_mean.tolist())
    assert results[0] != results[1]


def test_modes_and_buffers_are_back_after_an_error():
    observer = Observer()
    trainer = make_run(observer, max_epochs=1)
    trainer.network.layers[2].eval()
    trainer.run()
    trainer.network.eval()
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}

    def broken(input, target):
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        DualPassHandler(broken, observer)(trainer)
    assert not any(module.training for module in trainer.network.modules())
    assert all(torch.equal(value, before[name]) for name, value in trainer.network.state_dict().items())


def test_several_formulations_and_another_loader():
    first, second = Observer(), Observer()
    trainer = make_run(first, max_epochs=1)
    loss = trainer.loss_function
    keys = {"a": {"bounds": "a"}, "b": {"bounds": "b"}}
    both = CombinedLoss({"a": loss, "b": ConstraintLoss(soft_size, second, softmax=True)}, keys=keys)
    trainer.run()
    second.seen = [0]
    target = {"a": cohort()[0]["bounds"][None], "b": cohort()[0]["bounds"][None]}
    trainer.prepare_batch = lambda batch, *arguments, **options: (batch, target)
    DualPassHandler(both, [first, second], data_loader=[torch.rand(1, 1, 4, 4)] * 3)(trainer)
    assert (len(first.seen), len(second.seen)) == (3, 3)


def test_persistent_workers_are_refused():
    loader = DataLoader(Dataset(cohort()), batch_size=2, num_workers=1, persistent_workers=True)
    with (
        pytest.raises(ValueError, match="data_loader: the random states of persistent workers cannot be put back"),
        kept_random_state(loader, CPU),
    ):
        pass


def test_generators_of_transforms_that_nobody_seeded():
    """Those of the class, which instances share until they are seeded."""

    class Fresh(RandGaussianNoised):
        R = np.random.RandomState(4)

    loader = torch.utils.data.DataLoader(Dataset([{"image": torch.zeros(1, 2)}] * 2, Fresh("image", prob=1.0)))
    with kept_random_state(loader, CPU):
        first = [batch["image"].tolist() for batch in loader]
    assert first[0] != first[1]
    assert [batch["image"].tolist() for batch in loader] == first


def test_multipliers_rise_by_the_residuals_of_the_pass():
    """The real Lagrangian: after one epoch and its pass, lambda = learning rate times the residuals, at least 0."""
    lagrangian = Lagrangian(num_samples=7, learning_rate=0.5)
    trainer = make_run(lagrangian, max_epochs=1, lr=0.0)
    loss = trainer.loss_function
    seen = {}

    class Watching(nn.Module):
        def forward(self, input, target):
            loss(input, target)
            residual, _, index = loss.last
            seen.update(zip(index.tolist(), residual.flatten(1).tolist(), strict=True))

    DualPassHandler(Watching(), lagrangian).attach(trainer)
    StepFormulationHandler(lagrangian).attach(trainer)
    trainer.run()
    assert sorted(seen) == list(range(7))
    expected = [[max(0.0, 0.5 * z) for z in seen[n]] for n in range(7)]
    assert lagrangian.multipliers.tolist() == [pytest.approx(row) for row in expected]
    assert lagrangian.multipliers.max() > 0


# A run that was killed


class StopRunError(Exception):
    """A run that is cut off."""


def whole_run(folder, *, max_epochs=5, stop_after=None, lagrangian="standard", keep=True):
    """Everything together: metrics with a CSV file, the dual pass, the step, and resuming. Returns what must agree."""
    if lagrangian == "standard":
        formulation = Lagrangian(num_samples=7, learning_rate=0.05)
    else:
        formulation = ReLULagrangian(learning_rate=0.05)
    trainer = make_run(formulation, max_epochs=max_epochs)
    loss = trainer.loss_function
    metrics = ConstraintMetricsHandler({"size": loss}, csv_path=folder / "constraints.csv")
    objects = {"network": trainer.network, "optimizer": trainer.optimizer, "loss": loss}
    handlers = [metrics, DualPassHandler(loss, formulation), StepFormulationHandler(formulation)]
    for handler in [*handlers, ResumeHandler(folder / "last.pt", objects | ({"constraints": metrics} if keep else {}))]:
        handler.attach(trainer)

    def stop(engine):
        if stop_after is not None and engine.state.epoch > stop_after:
            raise StopRunError

    # In the middle of an epoch: batches of it were seen.
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=4 * (stop_after or 0) + 3), stop)
    trainer.run()
    return trainer.state.metrics, formulation.multipliers.tolist(), (folder / "constraints.csv").read_text()


@pytest.mark.parametrize("lagrangian", ["standard", "relu"])
@pytest.mark.parametrize("epoch", [1, 3])
def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path, epoch, lagrangian):
    whole = whole_run(tmp_path / "whole", lagrangian=lagrangian)
    assert max(map(max, whole[1])) > 0
    assert 0 < float(read(tmp_path / "whole" / "constraints.csv")[epoch]["stability"]) < 1
    with pytest.raises(StopRunError):
        whole_run(tmp_path / "cut", stop_after=epoch, lagrangian=lagrangian)
    assert len(read(tmp_path / "cut" / "constraints.csv")) == epoch
    assert whole_run(tmp_path / "cut", lagrangian=lagrangian) == whole


def test_rows_after_the_last_state_are_written_again(tmp_path):
    """Killed between the row and the state: the row is of an epoch that the resumed run repeats."""
    whole = whole_run(tmp_path / "whole")
    with pytest.raises(StopRunError):
        whole_run(tmp_path / "cut", stop_after=2)
    path = tmp_path / "cut" / "constraints.csv"
    lines = path.read_text().splitlines()
    lost = [f"{epoch}{',0.5' * lines[0].count(',')}" for epoch in (3, 4)]
    path.write_text("\n".join([*lines, *lost]) + "\n")
    assert whole_run(tmp_path / "cut") == whole


def test_without_its_state_the_stability_is_lost(tmp_path):
    """What the tests above can fail by."""
    with pytest.raises(StopRunError):
        whole_run(tmp_path, stop_after=2, keep=False)
    whole_run(tmp_path, keep=False)
    assert [row["stability"] == "" for row in read(tmp_path / "constraints.csv")] == [True, False, True, False, False]


def test_state_goes_through_a_safe_file(tmp_path):
    handler = ConstraintMetricsHandler({"a": GOOD, "b": GOOD})
    handler.metrics["a"].update(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool), torch.arange(2))
    handler.metrics["a"].next_epoch()
    torch.save(handler.state_dict(), tmp_path / "state.pt")
    again = ConstraintMetricsHandler({"a": GOOD, "b": GOOD})
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert isinstance(again.metrics["a"], ConstraintMetrics)
    assert torch.equal(again.state_dict()["a"]["index"], torch.arange(2))
    assert again.state_dict()["b"] == {}


def test_the_table_of_a_former_run_is_kept_aside(tmp_path):
    path = tmp_path / "t.csv"
    for run in range(3):
        table = EpochTable(path)
        for epoch in (1, 2):
            table.write(epoch, {"a": float(run)})
    assert path.read_text() == "epoch,a\n1,2.0\n2,2.0\n"
    assert (tmp_path / "t.csv.old1").read_text() == "epoch,a\n1,0.0\n2,0.0\n"
    assert (tmp_path / "t.csv.old2").read_text() == "epoch,a\n1,1.0\n2,1.0\n"
    EpochTable(path).write(2, {"a": 9.0})  # resumed after epoch 1
    assert path.read_text() == "epoch,a\n1,2.0\n2,9.0\n"
    assert len(list(tmp_path.iterdir())) == 3
