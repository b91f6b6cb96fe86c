"""Seeds, the best weights, and resuming: a run that was cut off ends like one that was not."""

import logging
import math
import os
import random
import signal

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Average
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.transforms import Compose, RandGaussianNoised
from torch import nn

from medconstraints.engines import TargetTrainer
from medconstraints.formulations import LogBarrierExtension
from medconstraints.handlers import (
    EpochSeedHandler,
    ResumeHandler,
    SaveBestHandler,
    SaveLatestHandler,
)


class StopRunError(Exception):
    """A run that is cut off."""


def stop_after(engine, epoch):
    """Cut the run off in the first iteration after `epoch`."""

    def stop(engine):
        if engine.state.epoch > epoch:
            raise StopRunError

    engine.add_event_handler(Events.ITERATION_STARTED, stop)


# EpochSeedHandler


def draws_of_run(seed, *, first_epoch=1, max_epochs=3):
    """What three generators and a random transform draw in each epoch."""
    noisy = Dataset([{"image": torch.zeros(1, 4)}], Compose([RandGaussianNoised("image", prob=1.0)]))
    engine = Engine(lambda engine, batch: None)
    if first_epoch > 1:  # what ResumeHandler does
        engine.add_event_handler(Events.STARTED, lambda engine: setattr(engine.state, "epoch", first_epoch - 1))
    EpochSeedHandler(seed).attach(engine)
    draws = []

    @engine.on(Events.ITERATION_STARTED)
    def draw(engine):
        state = (torch.rand(()).item(), np.random.rand(), random.random(), *noisy[0]["image"][0].tolist())  # noqa: NPY002
        draws.append((engine.state.epoch, state))

    engine.run(DataLoader(noisy), max_epochs=max_epochs)
    return dict(draws)


def test_same_draws_on_resume_others_with_another_seed_or_process(monkeypatch):
    whole = draws_of_run(7)
    assert list(whole) == [1, 2, 3]
    assert draws_of_run(7, first_epoch=3) == {3: whole[3]}
    assert len({draw for epoch in whole.values() for draw in epoch}) == sum(map(len, whole.values()))
    other_seed = draws_of_run(8)
    monkeypatch.setattr("medconstraints.handlers.resume.idist.get_rank", lambda: 1)
    for other in (other_seed, draws_of_run(7)):
        assert all(whole[epoch][i] != other[epoch][i] for epoch in whole for i in range(4))


def test_any_seed_and_any_data():
    engine = Engine(lambda engine, batch: torch.rand(()).item())
    EpochSeedHandler(2**31 - 1).attach(engine)  # the sum with the epoch does not fit numpy's 32 bits
    first = engine.run([0], max_epochs=5).output
    torch.rand(3)
    engine.state.epoch = 0
    assert engine.run([0], max_epochs=5).output == first


def test_sampler_of_distributed_training_is_told_the_epoch():
    sampler = torch.utils.data.DistributedSampler(range(4), num_replicas=1, rank=0)
    epochs = []
    engine = Engine(lambda engine, batch: epochs.append(sampler.epoch))
    EpochSeedHandler(0).attach(engine)
    engine.run(DataLoader(Dataset([0, 1, 2, 3]), batch_size=4, sampler=sampler), max_epochs=3)
    assert epochs == [1, 2, 3]


# SaveBestHandler, SaveLatestHandler


def evaluator_of(network, handlers):
    """Its key metric is the network's only weight."""
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset([{"image": torch.ones(1, 1), "label": torch.ones(1, 1)}]), batch_size=1),
        network=network,
        key_val_metric={"score": Average(output_transform=lambda output: output[0]["pred"].mean())},
        val_handlers=handlers,
    )


def network_of(weight=0.0):
    network = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        network.weight.fill_(weight)
    return network


def validate(evaluator, path, weights, first_epoch=1):
    """Saved weight after each validation."""
    saved = []
    for epoch, weight in enumerate(weights, start=first_epoch):
        with torch.no_grad():
            evaluator.network.weight.fill_(weight)
        evaluator.run(epoch)
        saved.append(torch.load(path, weights_only=True)["weight"].item() if path.exists() else None)
    return saved


def test_saves_only_what_is_better_than_ever(tmp_path, caplog):
    path = tmp_path / "run" / "model.pt"
    evaluator = evaluator_of(network_of(), [SaveBestHandler(path)])
    with caplog.at_level(logging.INFO, "medconstraints"):
        assert validate(evaluator, path, [1, 3, 2, 3, 4]) == [1, 3, 3, 3, 4]
    assert [r.message for r in caplog.records if r.name.startswith("medconstraints")] == [
        f"best key metric {best:.4f}: saved model.pt" for best in (1, 3, 4)
    ]
    assert [file.name for file in path.parent.iterdir()] == ["model.pt"]


def test_best_weights_of_a_distributed_network_have_plain_names(tmp_path):
    # Without its constructor, which needs a process group.
    network = nn.Module.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(network)
    network.module = network_of(2)
    evaluator = evaluator_of(network, [])
    evaluator.state.best_metric, evaluator.state.best_metric_epoch = 1.0, evaluator.state.epoch
    SaveBestHandler(tmp_path / "model.pt")(evaluator)
    assert set(torch.load(tmp_path / "model.pt", weights_only=True)) == {"weight"}


def test_the_best_value_survives_a_restart(tmp_path):
    """MONAI's own CheckpointSaver would overwrite the weights of epoch 2 with the worse ones of epoch 3."""
    path = tmp_path / "model.pt"

    def run(weights, first_epoch):
        evaluator = evaluator_of(network_of(), [SaveBestHandler(path)])
        trainer = Engine(lambda engine, batch: None)
        ResumeHandler(tmp_path / "last.pt", evaluator=evaluator).attach(trainer)
        saved = []
        trainer.add_event_handler(
            Events.EPOCH_STARTED,
            lambda engine: saved.extend(
                validate(evaluator, path, [weights[engine.state.epoch - first_epoch]], engine.state.epoch)
            ),
        )
        trainer.run([0], max_epochs=first_epoch + len(weights) - 1)
        return saved

    assert run([1, 3], 1) == [1, 3]
    assert run([2, 2.5, 4], 3) == [3, 3, 4]


def test_latest_weights_after_each_epoch(tmp_path, caplog):
    network = network_of(1)
    engine = Engine(lambda engine, batch: network.weight.data.add_(1))
    engine.network = network
    SaveLatestHandler(tmp_path / "run" / "model.pt").attach(engine)
    saved = []
    engine.add_event_handler(
        Events.EPOCH_COMPLETED,
        lambda engine: saved.append(torch.load(tmp_path / "run" / "model.pt", weights_only=True)["weight"].item()),
    )
    engine.run([0], max_epochs=3)
    assert saved == [2, 3, 4]
    assert "nothing is validated, model.pt gets the weights of the latest epoch" in caplog.text


# ResumeHandler


class BarrierLoss(nn.Module):
    """The log-barrier of the output: a loss with a state."""

    def __init__(self):
        super().__init__()
        self.barrier = LogBarrierExtension(factor=1.1)

    def forward(self, input, target):
        return self.barrier(input).mean()


class Run:
    """A network with dropout, momentum, a learning rate schedule, a barrier and a counter, on random data."""

    def __init__(self, folder, *, max_epochs, width=8, settings=None, scaler=None):
        torch.manual_seed(1)  # a new process starts from its own state
        network = nn.Sequential(nn.Linear(4, width), nn.Dropout(0.5), nn.Linear(width, 1))
        optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        self.loss = BarrierLoss()
        self.counters = {"seen": 0, "mean": 0.0}
        self.engine = TargetTrainer(
            device="cpu",
            max_epochs=max_epochs,
            train_data_loader=[0, 1, 2],
            network=network,
            optimizer=optimizer,
            loss_function=self.loss,
            prepare_batch=lambda *_, **__: (torch.randn(3, 4), torch.zeros(3)),
            decollate=False,
        )
        self.engine.add_event_handler(Events.STARTED, lambda engine: setattr(engine, "scaler", scaler))
        self.engine.add_event_handler(Events.EPOCH_COMPLETED, self.after_epoch)
        EpochSeedHandler(0).attach(self.engine)
        objects = {"schedule": self.schedule}
        resume = ResumeHandler(folder / "last.pt", objects, counters=self.counters, settings=settings)
        resume.attach(self.engine)

    def after_epoch(self, engine):
        self.schedule.step()
        self.loss.barrier.step()
        self.counters["seen"] += 1
        self.counters["mean"] += 0.5

    def __call__(self):
        self.engine.run()
        return self

    def state(self):
        return [
            *(p.clone() for p in self.engine.network.parameters()),
            self.loss.barrier.t.clone(),
            torch.tensor([*self.schedule.get_last_lr(), *self.counters.values()]),
        ]


def test_resumed_run_ends_like_an_uninterrupted_one(tmp_path, caplog):
    whole = Run(tmp_path / "whole", max_epochs=4)()
    cut = Run(tmp_path / "cut", max_epochs=4)
    stop_after(cut.engine, 2)
    with pytest.raises(StopRunError):
        cut()
    again = Run(tmp_path / "cut", max_epochs=4)
    with caplog.at_level(logging.INFO, "medconstraints"):
        again()
    assert "resumed after epoch 2 from last.pt" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(whole.state(), again.state(), strict=True))
    assert (again.engine.state.epoch, again.engine.state.iteration) == (4, 12)
    assert again.counters == {"seen": 4, "mean": 2.0}
    # ... and this test can fail: the state of the network alone is not enough.
    assert not torch.equal(cut.state()[0], whole.state()[0])


def test_all_epochs_done(tmp_path, caplog):
    done = Run(tmp_path, max_epochs=2)()
    written = (tmp_path / "last.pt").read_bytes()
    again = Run(tmp_path, max_epochs=2)
    with caplog.at_level(logging.INFO, "medconstraints"):
        again()
    assert "all 2 epochs are done already; raise the number of epochs to go on" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(done.state(), again.state(), strict=True))
    assert (tmp_path / "last.pt").read_bytes() == written
    assert Run(tmp_path, max_epochs=3)().engine.state.epoch == 3


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    Run(tmp_path, max_epochs=1)()
    monkeypatch.setattr("medconstraints.handlers.resume.idist.get_rank", lambda: 1)
    assert Run(tmp_path, max_epochs=2)().engine.state.epoch == 2
    assert torch.load(tmp_path / "last.pt", weights_only=True)["trainer"]["epoch"] == 1


def test_a_kill_while_writing_leaves_the_former_state(tmp_path, monkeypatch):
    Run(tmp_path, max_epochs=1)()
    before = (tmp_path / "last.pt").read_bytes()

    def half(state, path):
        path.write_bytes(before[: len(before) // 2])
        raise StopRunError

    monkeypatch.setattr("medconstraints.handlers.resume.torch.save", half)
    with pytest.raises(StopRunError):
        Run(tmp_path, max_epochs=2)()
    monkeypatch.undo()
    assert (tmp_path / "last.pt").read_bytes() == before
    assert Run(tmp_path, max_epochs=2)().engine.state.epoch == 2  # the leftover does no harm,
    assert not (tmp_path / "last.pt.part").exists()  # and is used up by the next write


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs the limits of a POSIX system")
def test_a_full_disk_leaves_the_former_state(tmp_path):
    """A limit of the file size stands for it: the write fails in the middle."""
    import resource

    Run(tmp_path, max_epochs=1)()
    before = (tmp_path / "last.pt").read_bytes()
    child = os.fork()
    if not child:
        told = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2,) * 2)
            Run(tmp_path, max_epochs=2)()
        except OSError as error:
            told = 0 if "last.pt: cannot be written" in str(error) else 2
        finally:
            os._exit(told)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert (tmp_path / "last.pt").read_bytes() == before
    assert Run(tmp_path, max_epochs=2)().engine.state.epoch == 2


@pytest.mark.parametrize("of", ["weights", "moments"])
def test_a_state_that_is_not_finite_is_not_written(tmp_path, of):
    """A gradient that is not finite in the last iteration, with a finite loss."""
    Run(tmp_path, max_epochs=1)()
    before = (tmp_path / "last.pt").read_bytes()
    spoilt = Run(tmp_path, max_epochs=2)

    def spoil(engine):
        weight = next(engine.network.parameters())
        values = weight.data if of == "weights" else engine.optimizer.state[weight]["exp_avg"]
        values.view(-1)[0] = math.nan

    spoilt.engine.add_event_handler(Events.ITERATION_COMPLETED(once=6), spoil)
    with pytest.raises(
        RuntimeError, match=r"last\.pt: not written, as 1 of its tensors, such as 'objects\..*', hold NaN"
    ):
        spoilt()
    assert (tmp_path / "last.pt").read_bytes() == before
    assert Run(tmp_path, max_epochs=2)().engine.state.epoch == 2


def test_a_run_killed_before_its_first_epoch_ended_begins_anew(tmp_path):
    """Also with other settings: nothing was trained with the former ones."""
    cut = Run(tmp_path, max_epochs=2, settings={"alpha": 1})
    cut.engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda engine: (_ for _ in ()).throw(StopRunError))
    with pytest.raises(StopRunError):
        cut()
    assert (tmp_path / "last.pt").exists()
    again, whole = Run(tmp_path, max_epochs=2, settings={"alpha": 2})(), Run(tmp_path / "whole", max_epochs=2)()
    assert all(torch.equal(a, b) for a, b in zip(whole.state(), again.state(), strict=True))


class Payload:
    """Runs code when it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return self.path.touch, ()


@pytest.mark.parametrize("spoil", ["truncated", "pickle with code"])
def test_unreadable_state_gives_a_clear_error(tmp_path, spoil):
    Run(tmp_path, max_epochs=1)()
    path = tmp_path / "last.pt"
    if spoil == "pickle with code":
        torch.save({"objects": Payload(tmp_path / "ran")}, path)
    else:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match=r"last\.pt: the last state of this run cannot be read .*; move it away"):
        Run(tmp_path, max_epochs=2)()
    assert path.read_bytes() == before
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["objects"].pop("loss"), r"no state of \['loss'\]; it belongs to another run"),
        (lambda state: state["counters"].pop("seen"), r"no state of \['seen'\]"),
        (lambda state: state.pop("trainer"), r"is no state of a run, it lacks \['trainer'\]"),
        (lambda state: state["objects"]["network"].pop("0.bias"), r"the state of 'network' does not fit .*move it"),
        (lambda state: state["objects"]["optimizer"]["param_groups"].pop(), r"the state of 'optimizer' does not fit"),
    ],
)
def test_state_of_another_run(tmp_path, change, message):
    Run(tmp_path, max_epochs=1)()
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    change(state)
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(RuntimeError, match=message):
        Run(tmp_path, max_epochs=2)()


def test_what_has_no_state_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"objects: .*got list for 'seen'"):
        ResumeHandler(tmp_path / "last.pt", {"seen": []})
    run = Run(tmp_path, max_epochs=1)
    ResumeHandler(tmp_path / "other.pt", {"network": nn.Identity()}).attach(run.engine)
    with pytest.raises(ValueError, match=r"objects: \['network'\] are kept of the trainer already"):
        run()


class Scaler:
    """Stands in for the scaler of mixed precision, which a machine without a GPU disables."""

    def __init__(self, factor):
        self.factor = factor

    def state_dict(self):
        return {"factor": self.factor}

    def load_state_dict(self, state):
        self.factor = state["factor"]

    def scale(self, loss):
        return loss

    def step(self, optimizer):
        optimizer.step()

    def update(self):
        """Nothing to adapt."""


def test_the_scale_of_mixed_precision_is_kept(tmp_path):
    Run(tmp_path, max_epochs=1, scaler=Scaler(2.0))()
    scaler = Scaler(65536.0)
    Run(tmp_path, max_epochs=2, scaler=scaler)()
    assert scaler.factor == 2.0
    for epoch, other in ((3, None), (5, torch.GradScaler("cpu", enabled=False))):  # whose state is empty
        Run(tmp_path, max_epochs=epoch, scaler=other)()
        fresh = Scaler(4.0)
        assert Run(tmp_path, max_epochs=epoch + 1, scaler=fresh)().engine.state.epoch == epoch + 1
        assert fresh.factor == 4.0


# Settings of the run


SETTINGS = {"seed": 0, "patch_size": (16, 16), "learning_rate": 1e-3, "slice_axis": None, "size_bounds": [0.1, 0.9]}


def test_the_same_settings_go_on(tmp_path):
    Run(tmp_path, max_epochs=1, settings=SETTINGS)()
    again = SETTINGS | {"patch_size": [16, 16], "learning_rate": 0.001}  # a tuple is a list in JSON
    assert Run(tmp_path, max_epochs=2, settings=again)().engine.state.epoch == 2
    assert Run(tmp_path, max_epochs=3)().engine.state.epoch == 3  # who names none, asks for no comparison


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"last\.pt: belongs to a run with other settings: seed was 0, is 1; choose another output_dir"),
        (
            {"slice_axis": 2, "patch_size": [16, 8]},
            r"settings: patch_size was \[16, 16\], is \[16, 8\]; slice_axis was None, is 2;",
        ),
        ({"box_mode": None}, r"box_mode was 'not set', is None"),
    ],
)
def test_other_settings_are_refused(tmp_path, change, message):
    Run(tmp_path, max_epochs=1, settings=SETTINGS)()
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(RuntimeError, match=message):
        Run(tmp_path, max_epochs=2, settings=SETTINGS | change)()
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_state_without_settings_goes_on_with_a_warning(tmp_path, caplog):
    Run(tmp_path, max_epochs=1)()
    Run(tmp_path, max_epochs=2, settings=SETTINGS)()
    assert "last.pt does not tell the settings of its run: they are not compared" in caplog.text
    assert torch.load(tmp_path / "last.pt", weights_only=True)["settings"]["seed"] == 0


def test_settings_that_are_not_json(tmp_path):
    with pytest.raises(TypeError, match="settings: expected numbers, strings, lists and dictionaries"):
        ResumeHandler(tmp_path / "last.pt", {}, settings={"device": torch.device("cpu")})
