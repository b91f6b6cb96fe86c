"""Handlers of the loss: once per epoch, the means are means, and a run that cannot learn stops."""

import math

import pytest
import torch
from ignite.engine import Events
from torch import nn

from medconstraints.handlers import (
    LossTermsHandler,
    RequireFiniteLossHandler,
    RequireTargetsHandler,
    StepFormulationHandler,
)
from medconstraints.losses.base import TargetLoss


def metrics_of_epochs(engine):
    """Fills with a copy of the metrics after each epoch."""
    history = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: history.append(dict(engine.state.metrics)))
    return history


# LossTermsHandler


def test_epoch_means(make_trainer, items, mean_loss):
    trainer = make_trainer(items, max_epochs=2, lr=0.1, handlers=[LossTermsHandler()])
    history = metrics_of_epochs(trainer)
    trainer.run()
    assert len(mean_loss.seen) == 6  # batches of 2, 2 and 1 items
    for epoch, metrics in enumerate(history):
        expected = sum(mean_loss.seen[3 * epoch : 3 * epoch + 3]) / 3
        assert metrics == pytest.approx({"train_mean": expected, "train_twice": 2 * expected})
    assert history[0] != history[1]


def test_a_formulation_is_reported_before_its_step(make_trainer, items, mean_loss, make_stepper):
    mean_loss.formulation = make_stepper()
    handlers = [LossTermsHandler(prefix="fit/"), StepFormulationHandler()]
    trainer = make_trainer(items, max_epochs=2, handlers=handlers)
    history = metrics_of_epochs(trainer)
    trainer.run()
    assert [metrics["fit/t"] for metrics in history] == [5, 6]
    assert set(history[0]) == {"fit/mean", "fit/twice", "fit/t"}


def test_a_term_of_some_iterations_has_their_mean(make_trainer, items):
    class Sometimes(TargetLoss):
        target_keys = ()
        calls = 0

        def forward(self, input, target):
            self.calls += 1
            return input.mean()

        def terms(self):
            return {"calls": torch.tensor(float(self.calls))} if self.calls != 2 else {}

    trainer = make_trainer(items, loss_function=Sometimes(), handlers=[LossTermsHandler()])
    trainer.run()
    assert trainer.state.metrics == {"train_calls": 2}  # (1 + 3) / 2


def test_a_loss_of_others_has_no_terms(make_trainer, items):
    handlers = [LossTermsHandler(), StepFormulationHandler(), RequireTargetsHandler(), RequireFiniteLossHandler()]
    trainer = make_trainer(items, loss_function=nn.MSELoss(), handlers=handlers)
    trainer.run()
    assert trainer.state.metrics == {}


# StepFormulationHandler


@pytest.mark.parametrize("given", [True, False])
def test_each_formulation_is_stepped_once_an_epoch(make_trainer, items, mean_loss, make_stepper, given):
    one, two = make_stepper(), make_stepper()
    if not given:
        mean_loss.parts = nn.ModuleList([one, nn.Sequential(one, two)])
    handler = StepFormulationHandler([one, two, one] if given else None)
    make_trainer(items, max_epochs=3, handlers=[handler]).run()
    assert (one.steps, two.steps) == (3, 3)


def test_only_formulations_are_stepped():
    with pytest.raises(TypeError, match=r"formulations: .*got Identity"):
        StepFormulationHandler([nn.Identity()])


# RequireTargetsHandler


@pytest.fixture
def other_process(monkeypatch):
    """Stands in for a second process with values of its own; lists what was reduced."""

    def stand_in(value):
        calls = []

        def all_reduce(mine, op="SUM"):
            calls.append(op)
            return max(mine, value) if op == "MAX" else mine + value

        monkeypatch.setattr("medconstraints.handlers.monitors.idist.all_reduce", all_reduce)
        return calls

    return stand_in


def with_one(items, key):
    """The items with one box, or one annotated voxel, in the last one."""
    rest = [item | {"boxes": torch.zeros_like(item["boxes"])} for item in items]
    if key == "boxes":
        return [*rest[:-1], rest[-1] | {"boxes": items[-1]["boxes"]}]
    label = rest[-1]["weak_label"].clone()
    label[..., 0, 0] = 1
    return [*rest[:-1], rest[-1] | {"weak_label": label}]


@pytest.mark.parametrize(("key", "other"), [("boxes", "weak_label"), ("weak_label", "boxes")])
def test_a_first_epoch_with_nothing_to_learn_from(make_trainer, items, mean_loss, key, other):
    mean_loss.target_keys = (key,)
    make_trainer(with_one(items, key), max_epochs=2, handlers=[RequireTargetsHandler()]).run()
    with pytest.raises(ValueError, match=f"{key}: not one .* in a whole epoch"):
        make_trainer(with_one(items, other), handlers=[RequireTargetsHandler()]).run()


@pytest.mark.parametrize(("key", "values", "absent"), [("label", [0, 2], "[1, 3]"), ("weak_label", [-1, 1, 2, 3], "")])
def test_classes_that_nothing_teaches(make_trainer, items, mean_loss, caplog, key, values, absent):
    class FourClasses(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.weight.view(1, 4, 1, 1) * x

    mean_loss.target_keys = (key,)
    values = torch.tensor((values * 2)[:4], dtype=torch.float32).view(1, 2, 2)
    trainer = make_trainer(
        [item | {key: values} for item in items],
        max_epochs=2,
        handlers=[RequireTargetsHandler()],
        network=FourClasses(),
        decollate=False,
    )
    trainer.run()
    told = f"the classes {absent} are in no target of the whole first epoch"
    assert caplog.text.count("in no target") == bool(absent) and (not absent or told in caplog.text)


@pytest.mark.parametrize(("mine", "theirs"), [("boxes", 0.0), ("weak_label", 1.0), ("weak_label", 0.0)])
def test_processes_agree_on_what_is_there(make_trainer, items, other_process, mine, theirs):
    """A process without boxes goes on with the others; reduced once, in each process."""
    calls = other_process(theirs)
    trainer = make_trainer(with_one(items, mine), max_epochs=3, handlers=[RequireTargetsHandler()])
    if mine == "boxes" or theirs:
        trainer.run()
    else:
        with pytest.raises(ValueError, match="not one box"):
            trainer.run()
    assert calls == ["MAX"]


# RequireFiniteLossHandler


class Failing(TargetLoss):
    """Mean of the output, times a value from one iteration on to another; its term "size" tells so."""

    target_keys = ()

    def __init__(self, value, start, stop):
        super().__init__()
        self.value, self.start, self.stop, self.calls = value, start, stop, 0

    def forward(self, input, target):
        self.calls += 1
        self.factor = self.value if self.start <= self.calls < self.stop else 1.0
        return input.mean() * self.factor

    def terms(self):
        return {"tightness": torch.tensor(1.0), "size": torch.tensor(float(self.factor))}


@pytest.mark.parametrize(("value", "start", "stop"), [(math.nan, 4, 99), (math.inf, 6, 99), (math.nan, 4, 5)])
def test_a_loss_that_is_not_finite(make_trainer, items, value, start, stop):
    """Three iterations an epoch: the first epoch is whole, the second is not, and nothing after it is called."""
    epochs = []
    handlers = [RequireFiniteLossHandler()]
    trainer = make_trainer(items, max_epochs=3, loss_function=Failing(value, start, stop), handlers=handlers)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: epochs.append(engine.state.epoch))
    with pytest.raises(RuntimeError, match=r"loss: NaN or infinite in epoch 2, in its terms size;"):
        trainer.run()
    assert epochs == [1]


def test_a_loss_of_others_that_is_not_finite(make_trainer, items):
    class Nan(nn.Module):
        def forward(self, input, target):
            return input.mean() * math.nan

    with pytest.raises(RuntimeError, match=r"loss: NaN or infinite in epoch 1;"):
        make_trainer(items, loss_function=Nan(), handlers=[RequireFiniteLossHandler()]).run()


def test_all_processes_stop(make_trainer, items, other_process):
    calls = other_process(torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(RuntimeError, match=r"NaN or infinite in epoch 1, in its terms twice;"):
        make_trainer(items, handlers=[RequireFiniteLossHandler()]).run()
    assert calls == ["SUM"]
