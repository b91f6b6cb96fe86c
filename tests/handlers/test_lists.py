"""The handler lists of a bundle work together: order, logs, files, and who writes in distributed training."""

import logging

import pytest
import torch
from ignite.engine import Events
from ignite.metrics import Average
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.handlers import ValidationHandler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from medconstraints.formulations import LogBarrierExtension
from medconstraints.handlers import (
    EpochSeedHandler,
    LossTermsHandler,
    RequireFiniteLossHandler,
    RestoreLabelHandler,
    ResumeHandler,
    SaveBestHandler,
    SaveLatestHandler,
    StepFormulationHandler,
    training_handlers,
    validation_handlers,
)
from medconstraints.losses import BoxPriorLoss, CombinedLoss


@pytest.fixture
def make_run(make_trainer, items, tmp_path):
    """A trainer with both lists, as a bundle builds it."""

    def make(*, max_epochs=2, val_interval=1, rank=0, folder="run", **more):
        torch.manual_seed(0)
        output_dir = str(tmp_path / folder)
        network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout(0.5))
        barrier = LogBarrierExtension(factor=1.1)
        loss = CombinedLoss({"prior": BoxPriorLoss(barrier, sigmoid=True, width=1)}, keys={"prior": "boxes"})
        optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        evaluator = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=DataLoader(Dataset(items), batch_size=1),
            network=network,
            key_val_metric={"val_score": Average(output_transform=lambda output: output[0]["pred"].mean())},
            val_handlers=validation_handlers(network=network, output_dir=output_dir, rank=rank),
        )
        data = Dataset(items)
        handlers = training_handlers(
            loss=loss,
            evaluator=evaluator,
            objects={"network": network, "optimizer": optimizer, "scheduler": scheduler, "loss": loss},
            output_dir=output_dir,
            seed=0,
            dataset=data,
            lr_scheduler=scheduler,
            formulation=barrier,
            val_interval=val_interval,
            rank=rank,
            **more,
        )
        trainer = make_trainer(
            items,
            max_epochs=max_epochs,
            handlers=handlers,
            network=network,
            loss_function=loss,
            optimizer=optimizer,
            train_data_loader=DataLoader(data, batch_size=2, shuffle=True),
        )
        trainer.made = {"evaluator": evaluator, "scheduler": scheduler, "barrier": barrier, "output_dir": output_dir}
        return trainer

    return make


def files(folder):
    return sorted({path.name.split(".out.")[0] for path in folder.rglob("*") if path.is_file()})


@pytest.fixture
def stats_log(caplog):
    """Messages of MONAI's StatsHandler, whose logger does not hand them on."""
    logger = logging.getLogger("train_loss")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_a_run_logs_validates_and_saves(make_run, tmp_path, stats_log):
    trainer = make_run()
    trainer.run()
    assert files(tmp_path / "run") == ["events", "last.pt", "model.pt"]
    assert float(trainer.made["barrier"].t) == pytest.approx(5 * 1.1**2)
    assert trainer.made["scheduler"].get_last_lr() == pytest.approx([0.1 * 0.5**2])
    assert "train_prior_tightness" in stats_log.text
    assert "Key metric: val_score best value" in stats_log.text
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    terms = [f"train_prior{part}" for part in ("", "_tightness", "_size", "_emptiness")]
    shares = [f"train_prior_satisfied_{name}" for name in ("tightness", "size")]
    assert set(events.Tags()["scalars"]) == {"train_loss", "val_score", "train_t", *terms, *shares}
    assert [round(event.value, 5) for event in events.Scalars("train_t")] == [5, 5.5]


def test_a_restart_ends_like_an_uninterrupted_run(make_run, tmp_path):
    make_run(folder="whole", max_epochs=4).run()
    cut = make_run(folder="cut", max_epochs=4)

    def stop(engine):
        if engine.state.iteration == 7:  # in epoch 3
            raise InterruptedError

    cut.add_event_handler(Events.ITERATION_STARTED, stop)
    with pytest.raises(InterruptedError):
        cut.run()
    make_run(folder="cut", max_epochs=4).run()
    one, two = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "cut"))
    assert one["trainer"] == two["trainer"] == {"epoch": 4, "iteration": 12}
    assert one["evaluator"] == two["evaluator"]
    assert all(torch.equal(one["network"][name], two["network"][name]) for name in one["network"])
    assert torch.equal(one["loss"]["losses.prior.formulation.t"], two["loss"]["losses.prior.formulation.t"])


@pytest.mark.parametrize(
    ("max_epochs", "val_interval", "expected"), [(4, 2, [2, 4]), (5, 2, [2, 4, 5]), (2, 5, [2]), (3, 1, [1, 2, 3])]
)
def test_validates_after_the_last_epoch_too(make_run, tmp_path, max_epochs, val_interval, expected):
    trainer = make_run(max_epochs=max_epochs, val_interval=val_interval)
    validated = []
    trainer.made["evaluator"].add_event_handler(Events.COMPLETED, lambda engine: validated.append(engine.state.epoch))
    trainer.run()
    assert validated == expected
    assert (tmp_path / "run" / "model.pt").exists()


@pytest.mark.parametrize("val_interval", [0, -1])
def test_interval_below_one_is_refused(make_run, val_interval):
    with pytest.raises(ValueError, match=f"val_interval: expected an integer >= 1 .epochs., got {val_interval}"):
        make_run(val_interval=val_interval)


def test_other_processes_write_nothing(make_run, tmp_path):
    trainer = make_run(rank=1)
    trainer.run()
    assert not (tmp_path / "run").exists()
    assert trainer.made["evaluator"].state.metrics  # but they validate, as a distributed metric needs
    assert "train_prior" in trainer.state.metrics


def of(kind, handlers):
    return [i for i, handler in enumerate(handlers) if isinstance(handler, kind)]


@pytest.mark.parametrize("rank", [0, 1])
def test_order(make_trainer, items, rank, tmp_path):
    barrier = LogBarrierExtension()
    loss = BoxPriorLoss(barrier)
    handlers = training_handlers(
        loss=loss,
        evaluator=SupervisedEvaluator(torch.device("cpu"), DataLoader(Dataset(items)), nn.Identity()),
        objects={},
        output_dir=str(tmp_path),
        seed=0,
        dataset=None,
        formulation=barrier,
        rank=rank,
    )
    assert of(EpochSeedHandler, handlers) == [0]
    assert of(RestoreLabelHandler, handlers) == [1]
    assert of(RequireFiniteLossHandler, handlers) < of(ValidationHandler, handlers)
    assert of(LossTermsHandler, handlers) < of(StepFormulationHandler, handlers)
    assert of(ResumeHandler, handlers) == [len(handlers) - 1]
    assert handlers[-1].save == (rank == 0)


def test_a_stock_loss_needs_neither_terms_nor_formulation(items, tmp_path):
    handlers = training_handlers(
        loss=nn.CrossEntropyLoss(),
        evaluator=SupervisedEvaluator(torch.device("cpu"), DataLoader(Dataset(items)), nn.Identity()),
        objects={},
        output_dir=str(tmp_path),
        seed=0,
        dataset=None,
    )
    assert not of((LossTermsHandler, StepFormulationHandler), handlers)


def test_validation_handlers(tmp_path):
    handlers = validation_handlers(network=nn.Identity(), output_dir=str(tmp_path / "run"))
    [best] = [handler for handler in handlers if isinstance(handler, SaveBestHandler)]
    assert best.path == tmp_path / "run" / "model.pt"
    assert validation_handlers(network=nn.Identity(), output_dir=str(tmp_path / "run"), rank=1) == []


def test_without_validation_the_latest_weights_are_saved(make_run, tmp_path):
    trainer = make_run(validate=False, max_epochs=3)
    validated = []
    trainer.made["evaluator"].add_event_handler(Events.STARTED, lambda engine: validated.append(1))
    trainer.run()
    assert not validated
    assert files(tmp_path / "run") == ["events", "last.pt", "model.pt"]
    saved, state = (torch.load(tmp_path / "run" / name, weights_only=True) for name in ("model.pt", "last.pt"))
    assert all(torch.equal(saved[name], state["network"][name]) for name in saved)
    make_run(validate=False, max_epochs=4).run()
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["trainer"]["epoch"] == 4
    make_run(validate=False, rank=1, folder="second").run()
    assert not (tmp_path / "second").exists()


def test_without_validation_there_must_be_a_network_to_save(items, tmp_path):
    with pytest.raises(ValueError, match=r"objects: expected the network.* as 'network', got \['net'\]"):
        training_handlers(
            loss=nn.CrossEntropyLoss(),
            evaluator=SupervisedEvaluator(torch.device("cpu"), DataLoader(Dataset(items)), nn.Identity()),
            objects={"net": nn.Identity()},
            output_dir=str(tmp_path),
            seed=0,
            dataset=None,
            validate=False,
        )
    assert not of(SaveLatestHandler, validation_handlers(network=nn.Identity(), output_dir=str(tmp_path)))


def test_settings_are_compared(make_run):
    make_run(max_epochs=1, settings={"seed": 0}).run()
    make_run(max_epochs=2, settings={"seed": 0}).run()
    with pytest.raises(RuntimeError, match="other settings: seed was 0, is 1"):
        make_run(max_epochs=3, settings={"seed": 1}).run()


def test_nothing_is_saved_of_an_epoch_with_a_nan(make_run, tmp_path):
    make_run(max_epochs=1).run()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.pt")}
    trainer = make_run(max_epochs=3)

    def spoil(engine):
        with torch.no_grad():
            engine.network[0].weight.fill_(float("nan"))

    trainer.add_event_handler(Events.EPOCH_STARTED, spoil)
    with pytest.raises(RuntimeError, match=r"loss: NaN or infinite in epoch 2, in its terms .*prior"):
        trainer.run()
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.pt")} == before


class Counter:
    """A monitor that counts epochs, and has to see them before the formulation moves on."""

    def __init__(self, barrier):
        self.barrier = barrier
        self.seen: list[float] = []

    def attach(self, engine):
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda _: self.seen.append(float(self.barrier.t)))

    def state_dict(self):
        return {"seen": torch.tensor(self.seen)}

    def load_state_dict(self, state):
        self.seen = state["seen"].tolist()


def test_monitors_look_before_the_step_and_are_resumed(make_trainer, items, tmp_path):
    def run(max_epochs):
        barrier = LogBarrierExtension(t=2.0, factor=2.0)
        loss = CombinedLoss({"prior": BoxPriorLoss(barrier, sigmoid=True, width=1)}, keys={"prior": "boxes"})
        monitor = Counter(barrier)
        network = nn.Conv2d(1, 1, 1)
        handlers = training_handlers(
            loss=loss,
            evaluator=SupervisedEvaluator(torch.device("cpu"), DataLoader(Dataset(items)), nn.Identity()),
            objects={"network": network, "loss": loss},
            output_dir=str(tmp_path),
            seed=0,
            dataset=None,
            formulation=[barrier],
            monitors=[monitor],
            validate=False,
        )
        make_trainer(items, max_epochs=max_epochs, loss_function=loss, handlers=handlers).run()
        return monitor.seen

    assert run(2) == [2.0, 4.0]
    assert run(3) == [2.0, 4.0, 8.0]
