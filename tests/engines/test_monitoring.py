"""LossTermsHandler and StepFormulationHandler: once per epoch, and the means are means."""

import pytest
from ignite.engine import Events
from torch import nn

from medconstraints.engines import LossTermsHandler, RestoreLabelHandler, StepFormulationHandler
from medconstraints.formulations import LogBarrierExtension
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
