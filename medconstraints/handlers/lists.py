"""The handlers that every bundle would otherwise list: seeding, schedules, logs, validation, saving, resuming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from ignite.handlers.tqdm_logger import ProgressBar
from monai.engines import Evaluator
from monai.handlers import (
    LrScheduleHandler,
    StatsHandler,
    TensorBoardStatsHandler,
    ValidationHandler,
    from_engine,
)
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from medconstraints import checks
from medconstraints.handlers.constraints import ConstraintMetricsHandler
from medconstraints.handlers.monitors import (
    LossTermsHandler,
    RequireFiniteLossHandler,
    RequireTargetsHandler,
    StepFormulationHandler,
)
from medconstraints.handlers.parts import parts_of
from medconstraints.handlers.resume import EpochSeedHandler, ResumeHandler, SaveBestHandler, SaveLatestHandler, Stateful
from medconstraints.losses.base import ConstrainedLoss

__all__ = ["HandlerList", "training_handlers", "validation_handlers"]

_Monitors = Mapping[str, Any] | Sequence[Any]


class HandlerList(list[Any]):
    """Handlers in their order, and itself a handler that attaches them all.

    In a config it is one entry of a list of handlers, which is what `check_properties()` and `--tracking` of
    `monai.bundle` expect.
    """

    def attach(self, engine: Engine) -> None:
        """Attach every handler to the engine."""
        for handler in self:
            handler.attach(engine)


class _Validation(ValidationHandler):
    """MONAI's handler, and after the last epoch: a run shorter than the interval would leave no weights.

    A schedule that follows the key metric is stepped after each validation.
    """

    def __init__(self, interval: int, validator: Evaluator, plateau: ReduceLROnPlateau | None) -> None:
        super().__init__(interval, validator)
        self.plateau = plateau

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""

        def due(engine: Engine, epoch: int) -> bool:
            return epoch % self.interval == 0 or epoch == engine.state.max_epochs

        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=due), self)

    def __call__(self, engine: Engine) -> None:
        """Validate."""
        super().__call__(engine)
        if self.plateau is not None:
            state: Any = self.validator.state
            self.plateau.step(state.metrics[state.key_metric_name])


class _ConstraintMetrics(ConstraintMetricsHandler):
    """Metrics of the constraints that the trained loss has; none for a loss without."""

    def attach(self, engine: Any) -> None:
        """Attach to a trainer."""
        if any(isinstance(part.loss, ConstrainedLoss) for part in parts_of(engine.loss_function).values()):
            super().attach(engine)


def training_handlers(
    *,
    evaluator: Evaluator | None,
    output_dir: str,
    seed: int,
    lr_scheduler: LRScheduler | None = None,
    val_interval: int = 1,
    monitors: _Monitors = (),
    objects: Mapping[str, Stateful] | None = None,
    save_latest: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> HandlerList:
    """Handlers of a trainer, in an order in which they work together.

    What they need of network, optimizer, loss and data they take from the trainer: the terms of the loss are logged,
    and what its constraints do (`ConstraintMetricsHandler`, prefix "train_", `output_dir/constraints.csv`); its
    formulations are stepped after each epoch, boxes and weak labels that it reads must be there (see
    `RequireTargetsHandler`), and the states of all are kept for a resumed run. In distributed training only process 0
    logs and saves.

    Args:
        evaluator: run after every `val_interval` epochs, and after the last one. When it has no data, or is None,
            nothing is validated, and `output_dir/model.pt` gets the weights of the latest epoch.
        output_dir: folder of the run, or of its stage: gets `last.pt` (see `ResumeHandler`) and `tensorboard/`.
        seed: see `EpochSeedHandler`.
        lr_scheduler: stepped after each epoch; a `ReduceLROnPlateau` after each validation, with the evaluator's key
            metric (`mode="max"` for a Dice).
        val_interval: epochs between validations.
        monitors: name -> further handler that looks at the epoch before the formulations are stepped, such as
            `DualPassHandler`; None leaves one out, as an overlay may. Or a list of them. The state of a `Stateful` one
            is kept for a resumed run. A `ConstraintMetricsHandler` among them stands in for the one above.
        objects: name -> further object whose state is kept, see `ResumeHandler`.
        save_latest: write `model.pt` when nothing is validated; False for a trainer that knows better which weights
            are worth keeping.
        settings: what must not change when the run is resumed, see `ResumeHandler`.

    Raises:
        ValueError: `val_interval` is below 1, or a schedule follows the metric of an evaluator without data.
    """
    checks.whole_number("val_interval", val_interval, 1)
    named = _named(monitors)
    if not any(isinstance(monitor, ConstraintMetricsHandler) for monitor in named.values()):
        named = {"constraints": _ConstraintMetrics(csv_path=f"{output_dir}/constraints.csv", prefix="train_"), **named}
    plateau = lr_scheduler if isinstance(lr_scheduler, ReduceLROnPlateau) else None
    handlers: list[Any] = [EpochSeedHandler(seed), RequireTargetsHandler(), RequireFiniteLossHandler()]
    if lr_scheduler is not None and plateau is None:
        handlers.append(LrScheduleHandler(lr_scheduler, print_lr=False))
    handlers += [LossTermsHandler(), *named.values(), StepFormulationHandler()]
    if evaluator is not None and evaluator.state.epoch_length != 0:
        handlers.append(_Validation(val_interval, evaluator, plateau))
    elif plateau is not None:
        raise ValueError("lr_scheduler: follows the key metric, but the evaluator has no data; take another schedule.")
    elif save_latest:
        handlers.append(SaveLatestHandler(f"{output_dir}/model.pt"))
    handlers += _logs(output_dir)
    states: dict[str, Any] = {name: monitor for name, monitor in named.items() if isinstance(monitor, Stateful)}
    states |= objects or {}
    if lr_scheduler is not None:
        states["lr_scheduler"] = lr_scheduler
    handlers.append(ResumeHandler(f"{output_dir}/last.pt", states, evaluator=evaluator, settings=settings))
    return HandlerList(handlers)


def _logs(output_dir: str) -> list[Any]:
    """Losses and metrics of a training on the console and for TensorBoard."""
    if idist.get_rank():
        return []
    loss = from_engine(["loss"], first=True)
    return [
        StatsHandler(name="train_loss", tag_name="train_loss", output_transform=loss, iteration_log=False),
        TensorBoardStatsHandler(log_dir=f"{output_dir}/tensorboard", tag_name="train_loss", output_transform=loss),
        ProgressBar(desc="training"),
    ]


def validation_handlers(*, output_dir: str, monitors: _Monitors = ()) -> HandlerList:
    """Handlers of the evaluator in training: logs, and the best weights as `output_dir/model.pt`.

    In distributed training only process 0 logs and saves.

    Args:
        output_dir: folder of the run, or of its stage.
        monitors: name -> handler whose metrics are to be logged, such as `ConstraintMetricsHandler`; None leaves one
            out. Or a list of them. To continue the state of one in a resumed run, name it in the `objects` of
            `training_handlers`.
    """
    handlers = [*_named(monitors).values()]
    if idist.get_rank() == 0:
        handlers += [
            StatsHandler(name="train_loss", iteration_log=False),
            TensorBoardStatsHandler(log_dir=f"{output_dir}/tensorboard", iteration_log=False),
            SaveBestHandler(f"{output_dir}/model.pt"),
        ]
    return HandlerList(handlers)


def _named(monitors: _Monitors) -> dict[str, Any]:
    pairs = monitors.items() if isinstance(monitors, Mapping) else ((f"monitor_{i}", m) for i, m in enumerate(monitors))
    return {name: monitor for name, monitor in pairs if monitor is not None}
