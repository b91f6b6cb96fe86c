"""The pass that moves multipliers: it sees all data once, leaves no trace, and a killed run with it ends as a whole."""

import csv
import random

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.transforms import Compose, RandGaussianNoised
from torch import nn

from medconstraints.engines import TargetTrainer
from medconstraints.formulations import Lagrangian, LogBarrierExtension, ReLULagrangian
from medconstraints.formulations.base import Formulation
from medconstraints.handlers import (
    ConstraintMetricsHandler,
    DualPassHandler,
    EpochSeedHandler,
    ResumeHandler,
    StepFormulationHandler,
)
from medconstraints.handlers.random_state import kept_random_state
from medconstraints.losses import CombinedLoss, ConstraintLoss
from medconstraints.statistics import soft_size

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    """Images of a few voxels: threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Noisy(nn.Module):
    """A network with everything that a pass could disturb: batch norm, dropout, and draws from three generators."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Conv2d(3, 2, 1))

    def forward(self, x):
        return self.layers(x) + 0.01 * (np.random.rand() + random.random())  # noqa: NPY002


class Observer(Formulation):
    """A formulation that only watches: cost z, whatever was observed."""

    has_multipliers = True

    def __init__(self):
        super().__init__()
        self.seen, self.steps = [], []

    def forward(self, residual, index=None):
        self.seen.append((residual.detach().clone(), torch.is_grad_enabled()))
        return residual

    def dual(self, residual, index=None):
        return torch.ones_like(residual)

    def forget(self):
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


def make_run(formulation, *, extra=(), max_epochs=3, seeds=True, epoch_length=None, lr=0.05, **loader_options):
    """A trainer with noise in the data, shuffled, and everything random."""
    torch.manual_seed(5)
    network = Noisy()
    dataset = Dataset(cohort(), Compose([RandGaussianNoised("image", prob=0.9)]))
    return TargetTrainer(
        device=CPU,
        max_epochs=max_epochs,
        train_data_loader=DataLoader(dataset, batch_size=2, shuffle=True, **loader_options),
        epoch_length=epoch_length,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9),
        loss_function=ConstraintLoss(soft_size, formulation, softmax=True),
        train_handlers=[*([EpochSeedHandler(0)] if seeds else []), *extra],
    )


class Validation:
    """Leaves the network in evaluation mode."""

    def attach(self, engine):
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: engine.network.eval())


@pytest.mark.parametrize("more", [(), ((), {})])  # with arguments of the network's call, as MONAI allows
def test_the_pass_sees_all_data_once_with_the_weights_of_the_end(make_trainer, items, more):
    """The network multiplies by a weight that training lowers: residuals in training, and after it in the pass."""
    observer, calls = Observer(), []
    for item in items:
        item["bounds"] = torch.tensor([[[-torch.inf, 0.0]]])
    trainer = make_trainer(
        items,
        max_epochs=2,
        lr=0.01,
        loss_function=ConstraintLoss(soft_size, observer, normalization="none"),
        prepare_batch=lambda batch, *_, **__: (batch["image"], {"bounds": batch["bounds"]}, *more),
        handlers=[Validation(), DualPassHandler(), StepFormulationHandler()],
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


@pytest.mark.parametrize(("seeds", "epoch_length", "generator"), [(True, None, False), (False, 3, True)])
def test_the_pass_leaves_no_trace(seeds, epoch_length, generator):
    """With an observer that changes nothing, the run is bit for bit what it is without the pass."""
    results = []
    for with_pass in (False, True):
        options = {"generator": torch.Generator().manual_seed(1)} if generator else {}
        trainer = make_run(Observer(), seeds=seeds, epoch_length=epoch_length, **options)
        states = []
        if with_pass:
            trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e, states=states: states.append(snapshot(e)))
            DualPassHandler().attach(trainer)
            trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e, states=states: states.append(snapshot(e)))
        for source in (torch.manual_seed, np.random.seed, random.seed):
            source(11)
        trainer.run()
        assert all(before == after for before, after in zip(states[::2], states[1::2], strict=True))
        assert len(states) == (6 if with_pass else 0)
        draws = [torch.rand(()).item(), np.random.rand(), random.random()]  # noqa: NPY002
        results.append([*(v.tolist() for v in trainer.network.state_dict().values()), *draws])
    assert results[0] == results[1]


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
    trainer = make_run(Observer(), max_epochs=1)
    trainer.run()
    trainer.network.eval()
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.formulation = Observer()

        def forward(self, input, target):
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        DualPassHandler(Broken())(trainer)
    assert not any(module.training for module in trainer.network.modules())
    assert all(torch.equal(value, before[name]) for name, value in trainer.network.state_dict().items())


def test_several_formulations_and_another_loader():
    first, second = Observer(), Observer()
    trainer = make_run(first, max_epochs=1)
    barrier = ConstraintLoss(soft_size, LogBarrierExtension(), softmax=True)
    others = {"b": ConstraintLoss(soft_size, second, softmax=True), "c": barrier}
    both = CombinedLoss({"a": trainer.loss_function, **others})
    trainer.run()
    second.seen = [0]
    trainer.prepare_batch = lambda batch, *_, **__: (batch, {"bounds": cohort()[0]["bounds"][None]})
    DualPassHandler(both, data_loader=[torch.rand(1, 1, 4, 4)] * 3)(trainer)
    assert (len(first.seen), len(second.seen)) == (3, 3)


def test_without_multipliers_there_is_no_pass():
    loss = ConstraintLoss(soft_size, LogBarrierExtension(), softmax=True)
    with pytest.raises(TypeError, match=r"loss: .* learns multipliers.*got ConstraintLoss"):
        DualPassHandler(loss)
    with pytest.raises(TypeError, match=r"loss: .* learns multipliers"):
        make_run(LogBarrierExtension(), extra=[DualPassHandler()]).run()


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
    loss, seen = trainer.loss_function, {}

    def watch(module, arguments, output):
        if not torch.is_grad_enabled():
            residual, _, index = loss.last
            seen.update(zip(index.tolist(), residual.flatten(1).tolist(), strict=True))

    loss.register_forward_hook(watch)
    DualPassHandler().attach(trainer)
    StepFormulationHandler().attach(trainer)
    trainer.run()
    assert sorted(seen) == list(range(7))
    expected = [[max(0.0, 0.5 * z) for z in seen[n]] for n in range(7)]
    assert lagrangian.multipliers.flatten(1).tolist() == [pytest.approx(row) for row in expected]
    assert lagrangian.multipliers.max() > 0


# A run that was killed


class StopRunError(Exception):
    """A run that is cut off."""


def read(path):
    with path.open(newline="") as file:
        return [*csv.DictReader(file)]


def whole_run(folder, *, max_epochs=5, stop_after=None, lagrangian="standard", keep=True):
    """Everything together: metrics with a CSV file, the dual pass, the step, and resuming. Returns what must agree."""
    if lagrangian == "standard":
        formulation = Lagrangian(num_samples=7, learning_rate=0.05)
    else:
        formulation = ReLULagrangian(learning_rate=0.05)
    trainer = make_run(formulation, max_epochs=max_epochs)
    metrics = ConstraintMetricsHandler(csv_path=folder / "constraints.csv")
    resume = ResumeHandler(folder / "last.pt", {"constraints": metrics} if keep else {})
    for handler in [metrics, DualPassHandler(), StepFormulationHandler(), resume]:
        handler.attach(trainer)

    def stop(engine):
        if stop_after is not None and engine.state.epoch > stop_after:
            raise StopRunError

    # In the middle of an epoch: batches of it were seen.
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=4 * (stop_after or 0) + 3), stop)
    trainer.run()
    return trainer.state.metrics, formulation.multipliers.tolist(), (folder / "constraints.csv").read_text()


@pytest.mark.parametrize(("lagrangian", "epoch"), [("standard", 1), ("relu", 3)])
def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path, epoch, lagrangian):
    whole = whole_run(tmp_path / "whole", lagrangian=lagrangian)
    assert torch.tensor(whole[1]).max() > 0
    assert 0 < float(read(tmp_path / "whole" / "constraints.csv")[epoch]["stability"]) < 1
    with pytest.raises(StopRunError):
        whole_run(tmp_path / "cut", stop_after=epoch, lagrangian=lagrangian)
    path = tmp_path / "cut" / "constraints.csv"
    assert len(read(path)) == epoch
    # Killed between the row and the state: the row is of an epoch that the resumed run repeats.
    with path.open("a") as file:
        file.write(f"{epoch + 1}{',0.5' * path.read_text().splitlines()[0].count(',')}\n")
    assert whole_run(tmp_path / "cut", lagrangian=lagrangian) == whole


def test_without_its_state_the_stability_is_lost(tmp_path):
    """What the test above can fail by."""
    with pytest.raises(StopRunError):
        whole_run(tmp_path, stop_after=2, keep=False)
    whole_run(tmp_path, keep=False)
    assert [row["stability"] == "" for row in read(tmp_path / "constraints.csv")] == [True, False, True, False, False]
