"""Handlers of the loss: once per epoch, the means are means, and a run that cannot learn stops."""

import math

import pytest
import torch
from ignite.engine import Events
from torch import nn

from medconstraints.formulations import LogBarrierExtension
from medconstraints.handlers import (
    LossTermsHandler,
    RequireAnnotationHandler,
    RequireBoxesHandler,
    RequireFiniteLossHandler,
    RestoreLabelHandler,
    StepFormulationHandler,
)
from medconstraints.losses import BoxPriorLoss, CombinedLoss


def metrics_of_epochs(engine):
    """Fills with a copy of the metrics after each epoch."""
    history = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: history.append(dict(engine.state.metrics)))
    return history


def test_epoch_means(make_trainer, items, mean_loss):
    trainer = make_trainer(items, max_epochs=2, lr=0.1, handlers=[LossTermsHandler(mean_loss), RestoreLabelHandler()])
    history = metrics_of_epochs(trainer)
    trainer.run()
    assert len(mean_loss.seen) == 6  # batches of 2, 2 and 1 items
    for epoch, metrics in enumerate(history):
        expected = sum(mean_loss.seen[3 * epoch : 3 * epoch + 3]) / 3
        assert metrics == pytest.approx({"train_mean": expected, "train_twice": 2 * expected})
    assert history[0] != history[1]


def test_prefix_and_formulation(make_trainer, items, mean_loss, stepper):
    terms = LossTermsHandler(mean_loss, stepper, prefix="fit/")
    trainer = make_trainer(items, max_epochs=2, handlers=[terms, StepFormulationHandler(stepper)])
    history = metrics_of_epochs(trainer)
    trainer.run()
    # Reported before the step: the value that this epoch was trained with.
    assert [metrics["fit/t"] for metrics in history] == [5, 6]
    assert set(history[0]) == {"fit/mean", "fit/twice", "fit/t"}


def test_formulation_without_t_is_not_reported(make_trainer, items, mean_loss):
    trainer = make_trainer(items, handlers=[LossTermsHandler(mean_loss, nn.Identity())])
    trainer.run()
    assert set(trainer.state.metrics) == {"train_mean", "train_twice"}


def test_terms_of_a_box_prior(make_trainer, items):
    """With the real losses: the weighted terms add up to the loss."""
    barrier = LogBarrierExtension()
    loss = CombinedLoss({"prior": BoxPriorLoss(barrier, sigmoid=True, width=1)}, keys={"prior": "boxes"})
    losses = []
    trainer = make_trainer(items, loss_function=loss, handlers=[LossTermsHandler(loss, barrier)])
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: losses.append(float(engine.state.output[0]["loss"]))
    )
    trainer.run()
    metrics = trainer.state.metrics
    parts = sum(metrics[f"train_prior_{name}"] for name in ("tightness", "size", "emptiness"))
    assert parts == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert metrics["train_prior"] == pytest.approx(parts, rel=1e-5)
    assert 0 <= metrics["train_prior_satisfied_tightness"] <= 1
    assert 0 <= metrics["train_prior_satisfied_size"] <= 1
    assert metrics["train_t"] == 5


def test_steps_once_per_epoch(make_trainer, items, stepper):
    steps = []
    trainer = make_trainer(items, max_epochs=3, handlers=[StepFormulationHandler(stepper)])
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: steps.append(stepper.steps))
    trainer.run()
    assert steps == [0, 1, 2]
    assert stepper.steps == 3


def test_log_barrier_rises(make_trainer, items):
    barrier = LogBarrierExtension(t=5.0, factor=1.1)
    make_trainer(items, max_epochs=2, handlers=[StepFormulationHandler(barrier)]).run()
    assert float(barrier.t) == pytest.approx(5 * 1.1**2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LossTermsHandler(nn.MSELoss()), r"loss: expected a loss with terms\(\), got MSELoss"),
        (lambda: StepFormulationHandler(nn.Identity()), r"formulation: expected something with step\(\), got Identity"),
    ],
)
def test_wrong_objects_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()


# RequireBoxesHandler


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


def without_boxes(items):
    return [item | {"boxes": torch.zeros_like(item["boxes"])} for item in items]


def test_no_box_in_the_first_epoch(make_trainer, items):
    with pytest.raises(ValueError, match="boxes: not one box in a whole epoch"):
        make_trainer(without_boxes(items), handlers=[RequireBoxesHandler()]).run()
    one = [items[0], *without_boxes(items[1:])]
    make_trainer(one, max_epochs=2, handlers=[RequireBoxesHandler()]).run()


@pytest.mark.parametrize(("mine", "theirs"), [(True, 0.0), (False, 1.0), (False, 0.0)])
def test_processes_agree_on_the_boxes(make_trainer, items, other_process, mine, theirs):
    """A process without boxes goes on with the others; reduced once, in each process."""
    calls = other_process(theirs)
    trainer = make_trainer(items if mine else without_boxes(items), max_epochs=3, handlers=[RequireBoxesHandler()])
    if mine or theirs:
        trainer.run()
    else:
        with pytest.raises(ValueError, match="not one box"):
            trainer.run()
    assert calls == ["MAX"]


# RequireFiniteLossHandler


class Failing(nn.Module):
    """Mean of the output, times a value from the given iteration on; its term "size" tells so."""

    def __init__(self, value, start):
        super().__init__()
        self.value, self.start, self.calls = value, start, 0

    def forward(self, input, target):
        self.calls += 1
        self.factor = self.value if self.calls >= self.start else 1.0
        return input.mean() * self.factor

    def terms(self):
        return {"tightness": torch.tensor(1.0), "size": torch.tensor(float(self.factor))}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("start", [4, 6])
def test_a_loss_that_is_not_finite(make_trainer, items, value, start):
    """Three iterations an epoch: the first epoch is whole, the second is not, and nothing after it is called."""
    loss, epochs = Failing(value, start), []
    trainer = make_trainer(items, max_epochs=3, loss_function=loss, handlers=[RequireFiniteLossHandler(loss)])
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: epochs.append(engine.state.epoch))
    with pytest.raises(RuntimeError, match=r"loss: NaN or infinite in epoch 2, in its terms size; lower the learning"):
        trainer.run()
    assert epochs == [1]


def test_a_loss_without_terms(make_trainer, items):
    class Nan(nn.Module):
        def forward(self, input, target):
            return input.mean() * math.nan

    with pytest.raises(RuntimeError, match=r"loss: NaN or infinite in epoch 1; lower"):
        make_trainer(items, loss_function=Nan(), handlers=[RequireFiniteLossHandler()]).run()
    make_trainer(items, max_epochs=2, handlers=[RequireFiniteLossHandler()]).run()


def test_all_processes_stop(make_trainer, items, other_process, mean_loss):
    calls = other_process(torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(RuntimeError, match=r"NaN or infinite in epoch 1, in its terms twice;"):
        make_trainer(items, handlers=[RequireFiniteLossHandler(mean_loss)]).run()
    assert calls == ["SUM"]


# RequireAnnotationHandler


def weakly_labelled(items, voxels):
    """The items with `voxels` annotated voxels in the last one."""
    labelled = [item | {"weak_label": torch.full((1, 2, 2), -1.0)} for item in items]
    labelled[-1]["weak_label"].view(-1)[:voxels] = 1
    return labelled


def test_no_annotated_voxel_in_the_first_epoch(make_trainer, items):
    with pytest.raises(ValueError, match=r"weak_label: not one annotated voxel in a whole epoch.*annotation_key"):
        make_trainer(weakly_labelled(items, 0), handlers=[RequireAnnotationHandler()]).run()
    make_trainer(weakly_labelled(items, 1), max_epochs=2, handlers=[RequireAnnotationHandler()]).run()


def test_another_value_where_nothing_is_annotated(make_trainer, items):
    handler = RequireAnnotationHandler("label", ignore_index=0)
    empty = [item | {"label": torch.zeros(1, 2, 2)} for item in items]
    with pytest.raises(ValueError, match="label: not one annotated voxel"):
        make_trainer(empty, handlers=[handler]).run()


@pytest.mark.parametrize(("mine", "theirs"), [(1, 0.0), (0, 1.0), (0, 0.0)])
def test_processes_agree_on_the_annotation(make_trainer, items, other_process, mine, theirs):
    other_process(theirs)
    trainer = make_trainer(weakly_labelled(items, mine), handlers=[RequireAnnotationHandler()])
    if mine or theirs:
        trainer.run()
    else:
        with pytest.raises(ValueError, match="not one annotated voxel"):
            trainer.run()


# StepFormulationHandler


def test_several_formulations_are_stepped_once_each(make_trainer, items, stepper):
    other = type(stepper)()
    make_trainer(items, max_epochs=3, handlers=[StepFormulationHandler([stepper, other, stepper])]).run()
    assert (stepper.steps, other.steps) == (3, 3)
