"""A pass over the data after each epoch that only moves the multipliers of Lagrangians."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn

from medconstraints.checks import plain
from medconstraints.formulations.base import Formulation
from medconstraints.handlers.parts import formulations_in
from medconstraints.handlers.random_state import kept_random_state

__all__ = ["DualPassHandler"]


class DualPassHandler:
    """After each epoch of training, one epoch over the same data that only moves the multipliers of Lagrangians.

    The thesis alternates so (Kervadec 2020, section 3.4.2): an epoch for the network's weights, then an epoch for the
    multipliers, with the weights as they are now. This handler lets the formulations forget the residuals that they saw
    while the weights moved, and calls the loss on every batch of the data loader, without gradient; the formulations
    observe the residuals, and `StepFormulationHandler`, put behind this handler, makes the step. Without this handler
    the step uses the residuals that the training saw anyway, at no cost.

    The network runs in training mode: the multipliers then answer the residuals whose cost is trained, with the batch
    norms' statistics of the batch and with dropout. In evaluation mode they would answer another function.

    The rest of the run is what it would be with these multipliers and without the pass: running statistics and other
    buffers of the network, its modes, the engine's state, and the states of all random generators (see
    `kept_random_state`) are as before. In distributed training every process passes over its own part of the data.

    Args:
        loss: called as the trainer calls its loss, on the output of the network and the target of `prepare_batch`; None
            is the trainer's own, another one may leave out what has no constraints.
        data_loader: batches to pass over, once from beginning to end; None takes the trainer's. Its workers must not be
            persistent.

    Raises:
        TypeError: no formulation of the loss has multipliers; for the trainer's loss at the start of the run.
        ValueError: in the first pass, when the data loader's workers are persistent.
    """

    def __init__(self, loss: nn.Module | None = None, *, data_loader: Iterable[Any] | None = None) -> None:
        self.loss = loss
        self.data_loader = data_loader
        if loss is not None:
            _learning(loss)

    def attach(self, engine: Engine) -> None:
        """Attach to a `SupervisedTrainer`."""
        engine.add_event_handler(Events.STARTED, lambda engine: _learning(self.loss or engine.loss_function))
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Pass over the data."""
        loss = self.loss or engine.loss_function
        for formulation in _learning(loss):
            formulation.forget()
        loader: Any = engine.data_loader if self.data_loader is None else self.data_loader
        network = engine.network
        modes = {module: module.training for module in network.modules()}
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        amp = engine.amp and engine.scaler is not None  # as the trainer decides
        with kept_random_state(loader, torch.device(engine.state.device)), torch.no_grad():
            network.train()
            try:
                for batch in loader:
                    with torch.autocast("cuda", enabled=amp, **engine.amp_kwargs):
                        _forward(engine, batch, loss)
            finally:
                for name, buffer in network.named_buffers():
                    buffer.copy_(buffers[name])
                for module, training in modes.items():
                    module.training = training


def _learning(loss: nn.Module) -> list[Formulation]:
    """Formulations with multipliers."""
    found = [one for one in formulations_in(loss) if one.has_multipliers]
    if not found:
        raise TypeError(
            f"loss: expected one with a formulation that learns multipliers, such as Lagrangian, got "
            f"{type(loss).__name__}; without multipliers there is no dual pass, leave this handler out."
        )
    return found


def _forward(engine: Any, batch: Any, loss: nn.Module) -> None:
    prepared = engine.prepare_batch(batch, engine.state.device, engine.non_blocking, **engine.to_kwargs)
    inputs, targets, *more = prepared
    arguments, options = more if more else ((), {})
    if engine.compile:
        inputs = plain(inputs)  # what is compiled does not take MONAI's tensors
    loss(engine.inferer(inputs, engine.network, *arguments, **options), targets)
