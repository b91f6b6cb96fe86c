"""The handlers that every bundle would otherwise list: seeding, schedules, logs, validation, saving, resuming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ignite.engine import Engine, Events
from ignite.handlers.tqdm_logger import ProgressBar
from monai.handlers import (
    LrScheduleHandler,
    StatsHandler,
    TensorBoardStatsHandler,
    ValidationHandler,
    from_engine,
)
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from medconstraints.handlers.monitors import (
    LossTermsHandler,
    RequireAnnotationHandler,
    RequireBoxesHandler,
    RequireFiniteLossHandler,
    StepFormulationHandler,
)
from medconstraints.handlers.restore_label import RestoreLabelHandler
from medconstraints.handlers.resume import EpochSeedHandler, ResumeHandler, SaveBestHandler, SaveLatestHandler

__all__ = ["HandlerList", "training_handlers", "validation_handlers"]


class HandlerList(list[Any]):
    """Handlers in their order, and itself a handler that attaches them all.

    In a config it is one entry of a list of handlers, which is what `check_properties()` and `--tracking` of
    `monai.bundle` expect.
    """

    def attach(self, engine: Engine) -> None:
        """Attach every handler to the engine."""
        for handler in self:
            handler.attach(engine)


class _ValidateAlsoAtTheEnd(ValidationHandler):
    """MONAI's handler, and after the last epoch: a run shorter than the interval would leave no weights."""

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""

        def due(engine: Engine, epoch: int) -> bool:
            return epoch % self.interval == 0 or epoch == engine.state.max_epochs

        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=due), self)


def training_handlers(
    *,
    loss: nn.Module,
    evaluator: Engine,
    objects: Mapping[str, Any],
    output_dir: str,
    seed: int,
    dataset: Any,
    lr_scheduler: LRScheduler | None = None,
    formulation: Any = None,
    monitors: Sequence[Any] = (),
    val_interval: int = 1,
    boxes_key: str | None = None,
    annotation_key: str | None = None,
    validate: bool = True,
    settings: Mapping[str, Any] | None = None,
    rank: int = 0,
) -> HandlerList:
    """Handlers of a trainer, in an order in which they work together.

    Args:
        loss: its terms are logged when it has any.
        evaluator: run after every `val_interval` epochs, and after the last one.
        objects: name -> object with a state that a resumed run needs: network, optimizer, scheduler, loss.
        output_dir: gets `last.pt` (see `ResumeHandler`) and `tensorboard/`.
        seed: see `EpochSeedHandler`.
        dataset: training data set.
        lr_scheduler: stepped after each epoch.
        formulation: stepped after each epoch, when it has a `step`; or a list of formulations.
        monitors: further handlers that look at the epoch before the formulations are stepped, such as
            `ConstraintMetricsHandler`, and `DualPassHandler` behind it; what state they have is kept for a resumed run.
        val_interval: epochs between validations.
        boxes_key: key of the boxes, when training needs them, see `RequireBoxesHandler`.
        annotation_key: key of the weak labels, when training needs them, see `RequireAnnotationHandler`.
        validate: False when there is nothing to validate with: the evaluator is not run, and `output_dir/model.pt` gets
            the weights of the latest epoch of `objects["network"]`.
        settings: what must not change when the run is resumed, see `ResumeHandler`.
        rank: number of the process in distributed training; only process 0 logs and saves.

    Raises:
        ValueError: `val_interval` is below 1, or `objects` has no network to save without validation.
    """
    if val_interval < 1:
        raise ValueError(f"val_interval: expected an integer >= 1 (epochs), got {val_interval!r}.")
    handlers: list[Any] = [EpochSeedHandler(seed, dataset, rank=rank), RestoreLabelHandler()]
    if boxes_key is not None:
        handlers.append(RequireBoxesHandler(boxes_key))
    if annotation_key is not None:
        handlers.append(RequireAnnotationHandler(annotation_key))
    handlers.append(RequireFiniteLossHandler(loss))
    if lr_scheduler is not None:
        handlers.append(LrScheduleHandler(lr_scheduler, print_lr=False))
    if hasattr(loss, "terms"):
        handlers.append(LossTermsHandler(loss, formulation))  # type: ignore[arg-type]
    handlers += monitors
    objects = {
        **objects,
        **{f"monitor_{i}": monitor for i, monitor in enumerate(monitors) if hasattr(monitor, "state_dict")},
    }
    steppable = [one for one in _listed(formulation) if hasattr(one, "step")]
    if steppable:
        handlers.append(StepFormulationHandler(steppable))
    if validate:
        handlers.append(_ValidateAlsoAtTheEnd(val_interval, evaluator))
    elif "network" not in objects:
        raise ValueError(f"objects: expected the network, whose weights are saved, as 'network', got {[*objects]}.")
    elif rank == 0:
        handlers.append(SaveLatestHandler(objects["network"], f"{output_dir}/model.pt"))
    if rank == 0:
        first_loss = from_engine(["loss"], first=True)
        handlers += [
            StatsHandler(name="train_loss", tag_name="train_loss", output_transform=first_loss, iteration_log=False),
            TensorBoardStatsHandler(
                log_dir=f"{output_dir}/tensorboard", tag_name="train_loss", output_transform=first_loss
            ),
            ProgressBar(desc="training"),
        ]
    handlers.append(
        ResumeHandler(f"{output_dir}/last.pt", objects, evaluator=evaluator, save=rank == 0, settings=settings)
    )
    return HandlerList(handlers)


def _listed(formulation: Any) -> list[Any]:
    if formulation is None:
        return []
    return list(formulation) if isinstance(formulation, Sequence) else [formulation]


def validation_handlers(
    *, network: nn.Module, output_dir: str, monitors: Sequence[Any] = (), rank: int = 0
) -> HandlerList:
    """Handlers of the evaluator in training: logs, and the best weights as `output_dir/model.pt`.

    Args:
        network: the network that is trained.
        output_dir: folder of the run.
        monitors: handlers whose metrics are to be logged, such as `ConstraintMetricsHandler`.
        rank: number of the process in distributed training; only process 0 logs and saves.
    """
    if rank:
        return HandlerList(monitors)
    handlers = [
        *monitors,
        StatsHandler(name="train_loss", iteration_log=False),
        TensorBoardStatsHandler(log_dir=f"{output_dir}/tensorboard", iteration_log=False),
        SaveBestHandler(network, f"{output_dir}/model.pt"),
    ]
    return HandlerList(handlers)
