"""Weights of losses over the epochs: each epoch trains with its own, also in a run that was resumed."""

import logging

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from medconstraints.engines import PrepareBatchTargets
from medconstraints.handlers import training_handlers
from medconstraints.handlers.loss_weights import LossWeightHandler
from medconstraints.losses import CombinedLoss
from medconstraints.schedules import AlphaSchedule


class MeanProduct(nn.Module):
    """The boundary loss in small: mean of the product with a map."""

    def forward(self, input, target):
        return (input * target).mean()


def losses(**more):
    return CombinedLoss(
        {"dice": nn.MSELoss(), "boundary": MeanProduct(), "other": nn.L1Loss()},
        keys={"dice": "label", "boundary": "label", "other": "label"},
        weights={"other": 0.25} | more,
    )


SCHEDULES = {
    "rebalance": AlphaSchedule("rebalance", regional="dice", alpha=0.1, increment=0.3, floor=0.2),
    "increase": AlphaSchedule("increase", regional="dice", increment=None, total=4),
    "constant": AlphaSchedule("constant", regional="dice", alpha=0.3),
    "none": AlphaSchedule("none", regional="dice"),
    "alone": AlphaSchedule("alone", regional="dice"),
}


def expected(schedule, epoch):
    return {**schedule(epoch - 1), "other": 0.25}


@pytest.fixture
def make_run(make_trainer, items, tmp_path):
    """A trainer with the handlers of a bundle and momentum; it notes the weights of every iteration."""
    items = [{"image": item["image"] / 4, "label": item["label"].float()} for item in items]

    def make(schedule, *, max_epochs=4, folder="run", seen=None):
        torch.manual_seed(0)
        network = nn.Conv2d(1, 1, 1)
        loss = losses()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        handlers = training_handlers(
            loss=loss,
            evaluator=SupervisedEvaluator(torch.device("cpu"), DataLoader(Dataset(items)), nn.Identity()),
            objects={"network": network, "optimizer": optimizer, "loss": loss},
            output_dir=str(tmp_path / folder),
            seed=0,
            dataset=None,
            monitors=[LossWeightHandler(loss, schedule)],
            validate=False,
        )
        trainer = make_trainer(
            items,
            max_epochs=max_epochs,
            handlers=handlers,
            network=network,
            optimizer=optimizer,
            loss_function=loss,
            prepare_batch=PrepareBatchTargets(["label"]),
            train_data_loader=DataLoader(Dataset(items), batch_size=2, shuffle=True),
        )
        # In the forward pass itself: what the epoch's very first step is made of.
        loss.register_forward_pre_hook(
            lambda module, args: None if seen is None else seen.append((trainer.state.iteration, dict(module.weights)))
        )
        return trainer

    return make


def last_state(folder):
    return torch.load(folder / "last.pt", weights_only=True)


@pytest.mark.parametrize("word", SCHEDULES)
def test_every_iteration_has_the_weights_of_its_epoch(make_run, word):
    schedule, seen = SCHEDULES[word], []
    make_run(schedule, seen=seen).run()
    assert seen == [(i, expected(schedule, (i - 1) // 3 + 1)) for i in range(1, 13)]


@pytest.mark.parametrize("cut_at", [4, 6, 7])  # the first and the last iteration of epoch 2, the first of epoch 3
def test_a_resumed_run_ends_like_an_uninterrupted_one(make_run, tmp_path, cut_at):
    schedule = SCHEDULES["rebalance"]
    whole, before, after = [], [], []
    make_run(schedule, folder="whole", seen=whole).run()
    cut = make_run(schedule, folder="cut", seen=before)

    def stop(engine):
        if engine.state.iteration == cut_at:
            raise InterruptedError

    cut.add_event_handler(Events.ITERATION_STARTED, stop)
    with pytest.raises(InterruptedError):
        cut.run()
    make_run(schedule, folder="cut", seen=after).run()
    first = (cut_at - 1) // 3 * 3
    assert before == whole[: cut_at - 1]
    assert after == whole[first:]
    one, two = last_state(tmp_path / "whole"), last_state(tmp_path / "cut")
    assert one["trainer"] == two["trainer"] == {"epoch": 4, "iteration": 12}
    assert all(torch.equal(one["network"][name], two["network"][name]) for name in one["network"])
    # ... and the weights matter to the network: with those of the first epochs it would be another one.
    make_run(lambda epoch: schedule(max(epoch - first // 3, 0)), folder="restarted").run()
    other = last_state(tmp_path / "restarted")
    assert not torch.equal(one["network"]["weight"], other["network"]["weight"])


def test_a_longer_run_goes_on(make_run, tmp_path):
    schedule, seen, whole = SCHEDULES["rebalance"], [], []
    make_run(schedule, max_epochs=2).run()
    make_run(schedule, max_epochs=3, seen=seen).run()
    make_run(schedule, max_epochs=3, seen=whole, folder="whole").run()
    assert seen == whole[6:]
    assert torch.equal(*(last_state(tmp_path / name)["network"]["weight"] for name in ("run", "whole")))


def test_weights_are_logged(make_run, tmp_path, caplog):
    schedule = SCHEDULES["rebalance"]
    logger = logging.getLogger("train_loss")
    logger.addHandler(caplog.handler)
    try:
        trainer = make_run(schedule, max_epochs=3)
        trainer.run()
    finally:
        logger.removeHandler(caplog.handler)
    assert "train_weight_boundary: 0.4000" in caplog.text
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for name in ("dice", "boundary"):
        logged = [(event.step, event.value) for event in events.Scalars(f"train_weight_{name}")]
        assert logged == [(epoch, pytest.approx(schedule(epoch - 1)[name])) for epoch in (1, 2, 3)]
    # Those of the losses themselves are beside them, and a weight that nobody schedules is not logged.
    assert {"train_dice", "train_boundary", "train_other"} <= set(events.Tags()["scalars"])
    assert "train_weight_other" not in trainer.state.metrics


def test_prefix_and_other_schedules():
    loss = losses()
    engine = Engine(lambda engine, batch: None)
    LossWeightHandler(loss, lambda epoch: {"other": epoch + 1}, prefix="w/").attach(engine)
    engine.run([0], max_epochs=3)
    assert loss.weights == {"dice": 1.0, "boundary": 1.0, "other": 3.0}
    assert engine.state.metrics == {"w/other": 3.0}


def test_nothing_changes_before_the_run():
    loss = losses(dice=0.5)
    LossWeightHandler(loss, SCHEDULES["alone"])
    assert loss.weights == {"dice": 0.5, "boundary": 1.0, "other": 0.25}


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        (AlphaSchedule(), ValueError, r"schedule: \['regional'\] name no loss; .*\['boundary', 'dice', 'other'\]"),
        (
            lambda epoch: {"dice": float("nan")},
            ValueError,
            "expected finite weights, got nan for 'dice' after 0 epochs",
        ),
        (lambda epoch: {"dice": float("inf")}, ValueError, "expected finite weights, got inf for 'dice'"),
        (lambda epoch: 0.1, TypeError, "schedule: expected a mapping from names of losses to weights, got float"),
        ("rebalance", TypeError, "schedule: expected a function of the epochs done, such as AlphaSchedule, got str"),
    ],
)
def test_wrong_schedules_are_found_at_construction(schedule, error, message):
    with pytest.raises(error, match=message):
        LossWeightHandler(losses(), schedule)


def test_a_weight_that_goes_wrong_later_stops_the_run():
    loss = losses()
    engine = Engine(lambda engine, batch: None)
    LossWeightHandler(loss, lambda epoch: {"dice": 1.0, "boundary": [1.0, 2.0, float("nan")][epoch]}).attach(engine)
    with pytest.raises(ValueError, match="expected finite weights, got nan for 'boundary' after 2 epochs"):
        engine.run([0], max_epochs=3)
    assert loss.weights["boundary"] == 2.0


def test_other_losses_have_no_weights():
    with pytest.raises(TypeError, match="loss: expected a CombinedLoss, whose weights can be set, got MSELoss"):
        LossWeightHandler(nn.MSELoss(), SCHEDULES["alone"])
