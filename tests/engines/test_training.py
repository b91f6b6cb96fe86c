"""TargetTrainer: the loss gets its targets, and postprocessing and metrics the label."""

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.losses import DiceLoss
from monai.transforms import Compose, Lambdad
from torch import nn

from medconstraints.engines import TargetTrainer
from medconstraints.losses.base import TargetLoss


class Weighted(TargetLoss):
    """Mean of output times target; has a buffer, to see where it is."""

    target_keys = ("weights",)

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, input, target):
        return (input * target["weights"]).mean() * self.scale


@pytest.fixture
def make_trainer(tiny_network):
    def make(*, label=True, loss=None, channels=1, **more):
        items = [{"image": torch.ones(1, 2, 2), "weights": torch.full((1, 2, 2), float(i))} for i in range(3)]
        for i, item in enumerate(items if label else []):
            item["label"] = torch.full((1, 2, 2), i % 2)
        network = tiny_network(channels)
        options = {"device": "cpu", "max_epochs": 1, "train_data_loader": DataLoader(Dataset(items), batch_size=2)}
        options |= {"network": network, "optimizer": torch.optim.SGD(network.parameters(), lr=0.0)}
        return TargetTrainer(**(options | {"loss_function": loss or Weighted()} | more))

    return make


def test_the_loss_gets_its_targets_and_metrics_the_label(make_trainer):
    outputs = []
    trainer = make_trainer(postprocessing=Compose([Lambdad("label", lambda label: label + 10)]))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: outputs.extend(engine.state.output))
    trainer.run()
    assert [int(output["label"].max()) for output in outputs] == [10, 11, 10]  # decollated: one for each item
    assert [float(output["loss"]) for output in outputs] == [0.5, 0.5, 2.0]


def test_without_a_label_there_is_none(make_trainer):
    trainer = make_trainer(label=False)
    trainer.run()
    assert [sorted(output) for output in trainer.state.output] == [["image", "loss", "pred"]]


def test_a_loss_of_others_gets_the_label(make_trainer):
    trainer = make_trainer(loss=DiceLoss(softmax=True, to_onehot_y=True), channels=2)
    trainer.run()
    assert trainer.state.output[0]["label"].shape == (1, 2, 2)


def test_own_targets_are_possible(make_trainer):
    seen = []
    trainer = make_trainer(
        prepare_batch=lambda batch, *_, **__: (batch["image"], {"weights": batch["weights"] + 1}),
        train_handlers=[type("Look", (), {"attach": lambda self, engine: seen.append(engine.network)})()],
    )
    trainer.run()
    assert float(trainer.state.output[0]["loss"]) == 3
    assert seen == [trainer.network]  # handlers find what they need when they are attached


def test_compiled_in_place(make_trainer, tiny_network, monkeypatch):
    """The weights keep their names, and what is compiled gets no meta tensors."""
    network, done = tiny_network(), []
    monkeypatch.setattr(network, "compile", lambda: done.append(1))
    trainer = make_trainer(network=network, compile=True)
    assert (trainer.network is network, trainer.compile, done) == (True, True, [1])


def test_defaults_follow_the_device(make_trainer):
    assert make_trainer().amp is False
    loss = Weighted()
    trainer = make_trainer(device=torch.device("meta"), loss=loss, network=nn.Identity())
    assert loss.scale.device.type == "meta"
    assert trainer.loss_function is loss
