"""What a training run tells about its loss, and how its formulation moves on."""

from __future__ import annotations

from typing import Any, Protocol

from ignite.engine import Engine, Events
from torch import Tensor

__all__ = ["LossTermsHandler", "RequireBoxesHandler", "StepFormulationHandler"]


class _HasTerms(Protocol):
    def terms(self) -> dict[str, Tensor]: ...


class _Steppable(Protocol):
    def step(self) -> Any: ...


class LossTermsHandler:
    """Epoch means of a loss's terms, as metrics of the trainer: `StatsHandler` and `TensorBoardStatsHandler` show them.

    The terms are added up on the device; the host waits for them once per epoch. Put it before the handlers that read
    the metrics.

    Args:
        loss: a loss with `terms()`, such as `BoxPriorLoss` or `CombinedLoss`.
        formulation: a formulation whose `t` is reported too, or None.
        prefix: put before each name.

    Raises:
        TypeError: the loss has no `terms()`.
    """

    def __init__(self, loss: _HasTerms, formulation: Any = None, *, prefix: str = "train_") -> None:
        if not hasattr(loss, "terms"):
            raise TypeError(f"loss: expected a loss with terms(), got {type(loss).__name__}.")
        self.loss = loss
        self.formulation = formulation
        self.prefix = prefix
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._report)

    def _reset(self, engine: Engine) -> None:
        self._sums, self._count = {}, 0

    def _add(self, engine: Engine) -> None:
        for name, value in self.loss.terms().items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def _report(self, engine: Engine) -> None:
        for name, value in self._sums.items():
            engine.state.metrics[self.prefix + name] = float(value) / self._count
        if self.formulation is not None and hasattr(self.formulation, "t"):
            engine.state.metrics[self.prefix + "t"] = float(self.formulation.t)


class RequireBoxesHandler:
    """Stops a run whose first epoch held no box at all: it would train on emptiness alone and learn nothing.

    Args:
        key: key of the boxes in the batch, (B, N, 1 + 2 D).

    Raises:
        ValueError: after the first epoch, when no batch had a box.
    """

    def __init__(self, key: str = "boxes") -> None:
        self.key = key
        self._found = False

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._look)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._judge)

    def _look(self, engine: Engine) -> None:
        if not self._found:
            boxes = engine.state.batch[self.key]
            self._found = bool((boxes[..., 0] > 0).any())

    def _judge(self, engine: Engine) -> None:
        if not self._found:
            raise ValueError(
                f"{self.key}: not one box in a whole epoch; check that the labels or box files of the training volumes "
                "hold the class, and that patch_size and spacing_mm leave boxes in the patches."
            )


class StepFormulationHandler:
    """Calls `formulation.step()` after each epoch, which raises the barrier of `LogBarrierExtension`.

    Put it before the handler that saves checkpoints, so that a resumed run starts with the next value.

    Args:
        formulation: anything with `step()`.

    Raises:
        TypeError: it has no `step()`.
    """

    def __init__(self, formulation: _Steppable) -> None:
        if not hasattr(formulation, "step"):
            raise TypeError(f"formulation: expected something with step(), got {type(formulation).__name__}.")
        self.formulation = formulation

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Step."""
        self.formulation.step()
