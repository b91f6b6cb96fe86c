"""Tiny MONAI engines: a few 4-voxel images, a linear network, the losses and handlers under test."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from torch import nn

from medconstraints.engines import PrepareBatchTargets


class MeanLoss(nn.Module):
    """Mean of the output, and terms that say which batch they come from."""

    def __init__(self):
        super().__init__()
        self.seen: list[float] = []

    def forward(self, input, target):
        self.seen.append(float(input.detach().mean()))
        return input.mean()

    def terms(self):
        return {"mean": torch.tensor(self.seen[-1]), "twice": torch.tensor(2 * self.seen[-1])}


class Stepper:
    """A formulation that counts its steps."""

    def __init__(self, t: float = 5.0):
        self.t = torch.tensor(t)
        self.steps = 0

    def step(self):
        self.steps += 1
        self.t += 1


@pytest.fixture
def mean_loss() -> MeanLoss:
    """A loss with terms."""
    return MeanLoss()


@pytest.fixture
def stepper() -> Stepper:
    """A formulation with `step` and `t`."""
    return Stepper()


@pytest.fixture
def items() -> list[dict[str, torch.Tensor]]:
    """Five items: image i is full of i, with one box and a label."""
    return [
        {
            "image": torch.full((1, 2, 2), float(i)),
            "boxes": torch.tensor([[1, 0, 0, 1, 2]]),
            "label": torch.full((1, 2, 2), i % 2),
        }
        for i in range(5)
    ]


@pytest.fixture
def make_trainer(mean_loss: MeanLoss) -> Callable[..., SupervisedTrainer]:
    """A trainer on the CPU; its network multiplies by a weight that starts at 1."""

    def make(items: Any, *, max_epochs: int = 1, handlers: Any = (), lr: float = 0.0, **more: Any) -> SupervisedTrainer:
        network = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.ones_(network.weight)
        options = {
            "device": torch.device("cpu"),
            "max_epochs": max_epochs,
            "train_data_loader": DataLoader(Dataset(items), batch_size=2, shuffle=False),
            "network": network,
            "optimizer": torch.optim.SGD(network.parameters(), lr=lr),
            "loss_function": mean_loss,
            "prepare_batch": PrepareBatchTargets(),
            "train_handlers": list(handlers),
        }
        return SupervisedTrainer(**(options | more))

    return make
