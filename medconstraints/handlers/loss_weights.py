"""Weights of losses that follow a schedule over the epochs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ignite.engine import Engine, Events

from medconstraints import checks
from medconstraints.losses.combined import CombinedLoss

__all__ = ["LossWeightHandler"]


class LossWeightHandler:
    """Sets weights of a trainer's `CombinedLoss` at the start of each epoch, from the number of epochs done.

    The weights are those of this very epoch from its first iteration on; MONAI's `ParamSchedulerHandler` acts after an
    iteration, and so one too late. Nothing needs to be saved: a resumed run computes them from its epoch. They are put
    into the metrics of the trainer. Name the handler among the `monitors` of `training_handlers`. A loss whose weight
    is 0 is still computed, unless the combined loss has `skip_unweighted=True`.

    Args:
        schedule: epochs done, from 0 -> {name of a loss: its weight}, such as `AlphaSchedule`; a loss that it does not
            name keeps its weight.
        loss: the loss whose `weights` are set; None is the trainer's. Given, the first weights are checked at once.
        prefix: put before each name in the metrics.

    Raises:
        TypeError: the loss is no `CombinedLoss`, or `schedule` gives no mapping.
        ValueError: `schedule` names what is no loss, or a weight is not finite.

    Example:
        >>> from torch import nn
        >>> from medconstraints.schedules import AlphaSchedule
        >>> loss = CombinedLoss({"dice": nn.MSELoss(), "boundary": nn.L1Loss()})
        >>> handler = LossWeightHandler(AlphaSchedule("rebalance", regional="dice"), loss=loss)
    """

    def __init__(
        self,
        schedule: Callable[[int], Mapping[str, float]],
        *,
        loss: CombinedLoss | None = None,
        prefix: str = "train_weight_",
    ) -> None:
        self.loss = loss
        self.schedule = schedule
        self.prefix = prefix
        if loss is not None:
            self._weights_after(0, loss)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Any) -> None:
        """Set the weights of the epoch that starts."""
        loss = engine.loss_function if self.loss is None else self.loss
        # ignite counts from 1, and has counted this epoch already.
        weights = self._weights_after(engine.state.epoch - 1, loss)
        loss.weights.update(weights)
        engine.state.metrics.update({self.prefix + name: weight for name, weight in weights.items()})

    def _weights_after(self, epoch: int, loss: CombinedLoss) -> dict[str, float]:
        if not isinstance(loss, CombinedLoss):
            raise TypeError(f"loss: expected a CombinedLoss, whose weights can be set, got {type(loss).__name__}.")
        given = self.schedule(epoch)
        if not isinstance(given, Mapping):
            raise TypeError(f"schedule: expected a mapping from losses to weights, got {type(given).__name__}.")
        unknown = sorted(set(given) - set(loss.weights))
        if unknown:
            raise ValueError(f"schedule: {unknown} name no loss; the losses are {sorted(loss.weights)}.")
        return {
            name: checks.number(f"schedule: weight of {name!r} after {epoch} epochs", weight)
            for name, weight in given.items()
        }
