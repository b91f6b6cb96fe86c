"""Weights of losses over the epochs: each epoch trains with its own, also in a run that was resumed."""

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from torch import nn

from medconstraints.handlers import EpochSeedHandler, LossWeightHandler, ResumeHandler
from medconstraints.losses import CombinedLoss
from medconstraints.losses.base import TargetLoss
from medconstraints.schedules import AlphaSchedule


class MeanProduct(TargetLoss):
    """The boundary loss in small: mean of the product with a map, here the label."""

    def forward(self, input, target):
        return (input * target).mean()


def losses(**more):
    parts = {"dice": nn.MSELoss(), "boundary": MeanProduct(), "other": nn.L1Loss()}
    return CombinedLoss(parts, weights={"other": 0.25} | more)


SCHEDULE = AlphaSchedule("rebalance", regional="dice", alpha=0.1, increment=0.3, floor=0.2)


@pytest.fixture
def make_run(make_trainer, items, tmp_path):
    """A trainer with momentum that can be resumed; it notes the weights of every iteration."""
    items = [{"image": item["image"] / 4, "label": item["label"].float()} for item in items]

    def make(schedule, *, max_epochs=4, folder="run", seen=None):
        torch.manual_seed(0)
        network, loss = nn.Conv2d(1, 1, 1), losses()
        handlers = [EpochSeedHandler(0), LossWeightHandler(schedule), ResumeHandler(tmp_path / folder / "last.pt")]
        trainer = make_trainer(
            items,
            max_epochs=max_epochs,
            handlers=handlers,
            network=network,
            optimizer=torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9),
            loss_function=loss,
            train_data_loader=DataLoader(Dataset(items), batch_size=2, shuffle=True),
        )
        # In the forward pass itself: what the epoch's very first step is made of.
        loss.register_forward_pre_hook(
            lambda module, args: None if seen is None else seen.append((trainer.state.iteration, dict(module.weights)))
        )
        return trainer

    return make


def last_weight(folder):
    return torch.load(folder / "last.pt", weights_only=True)["objects"]["network"]["weight"]


def test_every_iteration_has_the_weights_of_its_epoch(make_run):
    seen, logged = [], []
    trainer = make_run(SCHEDULE, seen=seen)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: logged.append(dict(engine.state.metrics)))
    trainer.run()
    assert seen == [(i, SCHEDULE((i - 1) // 3) | {"other": 0.25}) for i in range(1, 13)]
    # A weight that nobody schedules is not logged.
    assert logged == [{f"train_weight_{name}": w for name, w in SCHEDULE(epoch).items()} for epoch in range(4)]


@pytest.mark.parametrize("cut_at", [6, 7])  # the last iteration of epoch 2, the first of epoch 3
def test_a_resumed_run_ends_like_an_uninterrupted_one(make_run, tmp_path, cut_at):
    whole, before, after = [], [], []
    make_run(SCHEDULE, folder="whole", seen=whole).run()
    cut = make_run(SCHEDULE, folder="cut", seen=before)

    def stop(engine):
        if engine.state.iteration == cut_at:
            raise InterruptedError

    cut.add_event_handler(Events.ITERATION_STARTED, stop)
    with pytest.raises(InterruptedError):
        cut.run()
    make_run(SCHEDULE, folder="cut", seen=after).run()
    first = (cut_at - 1) // 3 * 3
    assert before == whole[: cut_at - 1]
    assert after == whole[first:]
    assert torch.equal(last_weight(tmp_path / "whole"), last_weight(tmp_path / "cut"))
    # ... and the weights matter to the network: with those of the first epochs it would be another one.
    make_run(lambda epoch: SCHEDULE(max(epoch - first // 3, 0)), folder="restarted").run()
    assert not torch.equal(last_weight(tmp_path / "whole"), last_weight(tmp_path / "restarted"))


def test_given_loss_and_prefix(make_trainer, items, mean_loss):
    loss = losses(dice=0.5)
    trainer = make_trainer(items, max_epochs=3)
    LossWeightHandler(lambda epoch: {"other": epoch + 1}, loss=loss, prefix="w/").attach(trainer)
    assert loss.weights == {"dice": 0.5, "boundary": 1.0, "other": 0.25}
    trainer.run()
    assert loss.weights == {"dice": 0.5, "boundary": 1.0, "other": 3.0}
    assert trainer.state.metrics == {"w/other": 3.0}


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        (AlphaSchedule(), ValueError, r"schedule: \['regional'\] name no loss; .*\['boundary', 'dice', 'other'\]"),
        (lambda epoch: {"dice": float("nan")}, ValueError, "weight of 'dice' after 0 epochs: .*got nan"),
        (lambda epoch: 0.1, TypeError, "schedule: expected a mapping .*got float"),
    ],
)
def test_wrong_schedules_are_found_at_construction(schedule, error, message):
    with pytest.raises(error, match=message):
        LossWeightHandler(schedule, loss=losses())


def test_a_weight_that_goes_wrong_later_stops_the_run(make_run):
    trainer = make_run(lambda epoch: {"dice": 1.0, "boundary": [1.0, 2.0, float("nan")][epoch]})
    with pytest.raises(ValueError, match=r"weight of 'boundary' after 2 epochs: .*got nan"):
        trainer.run()
    assert trainer.loss_function.weights["boundary"] == 2.0


def test_other_losses_have_no_weights(make_trainer, items):
    with pytest.raises(TypeError, match="loss: expected a CombinedLoss, whose weights can be set, got MeanLoss"):
        make_trainer(items, handlers=[LossWeightHandler(SCHEDULE)]).run()
