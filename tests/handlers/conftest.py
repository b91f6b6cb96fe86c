"""Tiny engines: a few 4-voxel images, a network with one weight, the losses and handlers under test."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.data import DataLoader, Dataset

from medconstraints.engines import TargetTrainer
from medconstraints.formulations.base import Formulation
from medconstraints.losses.base import TargetLoss


class MeanLoss(TargetLoss):
    """Mean of the output, and terms that say which batch they come from."""

    target_keys = ("boxes",)

    def __init__(self):
        super().__init__()
        self.seen: list[float] = []

    def forward(self, input, target):
        self.seen.append(float(input.detach().mean()))
        return input.mean()

    def terms(self):
        return {"mean": torch.tensor(self.seen[-1]), "twice": torch.tensor(2 * self.seen[-1])}


class Stepper(Formulation):
    """A formulation that counts its steps."""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def forward(self, residual, index=None):
        return residual

    def dual(self, residual, index=None):
        return torch.ones_like(residual)

    def step(self):
        self.steps += 1

    def report(self):
        return {"t": torch.tensor(5.0 + self.steps)}


@pytest.fixture
def mean_loss() -> MeanLoss:
    """A loss with terms."""
    return MeanLoss()


@pytest.fixture
def make_stepper() -> type[Stepper]:
    """Maker of a formulation that counts its steps."""
    return Stepper


@pytest.fixture
def items() -> list[dict[str, torch.Tensor]]:
    """Five items: image i is full of i, with one box, a weak label and a label."""
    return [
        {
            "image": torch.full((1, 2, 2), float(i)),
            "boxes": torch.tensor([[1, 0, 0, 1, 2]]),
            "weak_label": torch.full((1, 2, 2), -1.0),
            "label": torch.full((1, 2, 2), i % 2),
        }
        for i in range(5)
    ]


@pytest.fixture
def make_trainer(mean_loss: MeanLoss, tiny_network: Any) -> Callable[..., TargetTrainer]:
    """A trainer on the CPU; its network multiplies by a weight that starts at 1."""

    def make(items: Any, *, max_epochs: int = 1, handlers: Any = (), lr: float = 0.0, **more: Any) -> TargetTrainer:
        network = more.pop("network", None) or tiny_network()
        options = {
            "device": "cpu",
            "max_epochs": max_epochs,
            "train_data_loader": DataLoader(Dataset(items), batch_size=2, shuffle=False),
            "network": network,
            "optimizer": torch.optim.SGD(network.parameters(), lr=lr),
            "loss_function": mean_loss,
            "train_handlers": list(handlers),
        }
        return TargetTrainer(**(options | more))

    return make
