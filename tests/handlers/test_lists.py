"""The handler lists of a bundle work together: order, logs, files, and who writes in distributed training."""

import logging

import pytest
import torch
from ignite.engine import Events
from ignite.metrics import Average
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from medconstraints.handlers import training_handlers, validation_handlers


class Counter:
    """A monitor that remembers the formulation's steps so far, which it has to see before the next one."""

    def __init__(self, stepper):
        self.stepper = stepper
        self.seen: list[int] = []

    def attach(self, engine):
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda _: self.seen.append(self.stepper.steps))

    def state_dict(self):
        return {"seen": torch.tensor(self.seen)}

    def load_state_dict(self, state):
        self.seen = state["seen"].tolist()


@pytest.fixture
def make_run(make_trainer, make_stepper, mean_loss, items, tmp_path):
    """A trainer with both lists, as a bundle builds it."""

    def make(*, max_epochs=2, folder="run", validate=True, plateau=False, monitors=None, **more):
        torch.manual_seed(0)
        output_dir = str(tmp_path / folder)
        network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout(0.5))
        mean_loss.stepper = make_stepper()
        optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        if plateau:  # nothing is ever 1e9 better: lowered after each validation but the first
            scheduler = ReduceLROnPlateau(optimizer, "max", 0.5, patience=0, threshold=1e9, threshold_mode="abs")
        evaluator = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=DataLoader(Dataset(items if validate else []), batch_size=1),
            network=network,
            key_val_metric={"val_score": Average(output_transform=lambda output: output[0]["pred"].mean())},
            val_handlers=validation_handlers(output_dir=output_dir),
        )
        counter = Counter(mean_loss.stepper)
        handlers = training_handlers(
            evaluator=evaluator,
            output_dir=output_dir,
            seed=0,
            lr_scheduler=scheduler,
            monitors={"counter": counter, "removed": None} if monitors is None else monitors,
            **more,
        )
        trainer = make_trainer(
            items,
            max_epochs=max_epochs,
            handlers=handlers,
            network=network,
            optimizer=optimizer,
            train_data_loader=DataLoader(Dataset(items), batch_size=2, shuffle=True),
        )
        trainer.made = {"evaluator": evaluator, "optimizer": optimizer, "counter": counter}
        return trainer

    return make


def files(folder):
    return sorted({path.name.split(".out.")[0] for path in folder.rglob("*") if path.is_file()})


def saved(path):
    return torch.load(path, weights_only=True)


@pytest.fixture
def stats_log(caplog):
    """Messages of MONAI's StatsHandler, whose logger does not hand them on."""
    logger = logging.getLogger("train_loss")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_a_run_logs_validates_and_saves(make_run, mean_loss, tmp_path, stats_log):
    trainer = make_run()
    trainer.run()
    assert files(tmp_path / "run") == ["events", "last.pt", "model.pt"]
    assert mean_loss.stepper.steps == 2
    assert trainer.made["optimizer"].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**2)
    assert trainer.made["counter"].seen == [0, 1]  # before the step
    assert "train_twice" in stats_log.text
    assert "Key metric: val_score best value" in stats_log.text
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train_loss", "val_score", "train_t", "train_mean", "train_twice"}
    assert [event.value for event in events.Scalars("train_t")] == [5, 6]


def test_a_restart_ends_like_an_uninterrupted_run(make_run, tmp_path):
    make_run(folder="whole", max_epochs=4).run()
    cut = make_run(folder="cut", max_epochs=4)

    def stop(engine):
        if engine.state.iteration == 7:  # in epoch 3
            raise InterruptedError

    cut.add_event_handler(Events.ITERATION_STARTED, stop)
    with pytest.raises(InterruptedError):
        cut.run()
    again = make_run(folder="cut", max_epochs=4)
    again.run()
    one, two = (saved(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    assert set(one["objects"]) == {"network", "optimizer", "loss", "lr_scheduler", "constraints", "counter"}
    assert one["trainer"] == two["trainer"] == {"epoch": 4, "iteration": 12}
    assert one["evaluator"] == two["evaluator"]
    assert all(torch.equal(one["objects"]["network"][k], two["objects"]["network"][k]) for k in ("0.weight", "0.bias"))
    assert len(again.made["counter"].seen) == 4


@pytest.mark.parametrize(("max_epochs", "val_interval", "expected"), [(5, 2, [2, 4, 5]), (2, 5, [2])])
def test_validates_after_the_last_epoch_too(make_run, tmp_path, max_epochs, val_interval, expected):
    trainer = make_run(max_epochs=max_epochs, val_interval=val_interval)
    validated = []
    trainer.made["evaluator"].add_event_handler(Events.COMPLETED, lambda engine: validated.append(engine.state.epoch))
    trainer.run()
    assert validated == expected
    assert (tmp_path / "run" / "model.pt").exists()


def test_a_schedule_can_follow_the_key_metric(make_run):
    trainer = make_run(max_epochs=5, val_interval=2, plateau=True)
    trainer.run()
    assert trainer.made["optimizer"].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**2)  # validated after 2, 4, 5


@pytest.mark.parametrize(
    ("options", "message"), [({"val_interval": 0}, "val_interval"), ({"plateau": True, "validate": False}, "no data")]
)
def test_wrong_options(make_run, options, message):
    with pytest.raises(ValueError, match=message):
        make_run(**options)


def test_other_processes_write_nothing(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr("ignite.distributed.get_rank", lambda: 1)
    trainer = make_run()
    trainer.run()
    make_run(validate=False).run()
    assert not (tmp_path / "run").exists()
    assert trainer.made["evaluator"].state.metrics  # but they validate, as a distributed metric needs
    assert "train_mean" in trainer.state.metrics


def test_without_validation_the_latest_weights_are_saved(make_run, tmp_path):
    trainer = make_run(validate=False, max_epochs=3)
    validated = []
    trainer.made["evaluator"].add_event_handler(Events.STARTED, lambda engine: validated.append(1))
    trainer.run()
    assert not validated
    assert files(tmp_path / "run") == ["events", "last.pt", "model.pt"]
    weights, state = (saved(tmp_path / "run" / name) for name in ("model.pt", "last.pt"))
    assert all(torch.equal(weights[name], state["objects"]["network"][name]) for name in weights)
    make_run(validate=False, max_epochs=4).run()
    assert saved(tmp_path / "run" / "last.pt")["trainer"]["epoch"] == 4


def test_stages_settings_and_further_objects(make_run, tmp_path):
    """Each stage of a method has its folder; what is named is kept, and settings are compared."""
    make_run(folder="out/first", max_epochs=1, monitors=[], objects={"teacher": nn.Linear(1, 1)}).run()
    state = saved(tmp_path / "out" / "first" / "last.pt")
    assert set(state["objects"]) == {"network", "optimizer", "loss", "lr_scheduler", "constraints", "teacher"}
    make_run(folder="out/second", max_epochs=1, settings={"seed": 0}).run()
    make_run(folder="out/second", max_epochs=2, settings={"seed": 0}).run()
    with pytest.raises(RuntimeError, match="other settings: seed was 0, is 1"):
        make_run(folder="out/second", max_epochs=3, settings={"seed": 1}).run()


def test_nothing_is_saved_of_an_epoch_with_a_nan(make_run, tmp_path):
    make_run(max_epochs=1).run()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.pt")}
    trainer = make_run(max_epochs=3)

    def spoil(engine):
        with torch.no_grad():
            engine.network[0].weight.fill_(float("nan"))

    trainer.add_event_handler(Events.EPOCH_STARTED, spoil)
    with pytest.raises(RuntimeError, match=r"loss: NaN or infinite in epoch 2, in its terms mean, twice"):
        trainer.run()
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.pt")} == before
