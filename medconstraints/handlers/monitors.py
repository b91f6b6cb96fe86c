"""What a training run tells about its loss, when it is stopped, and how its formulations move on."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from monai.utils.enums import CommonKeys
from torch import Tensor

from medconstraints.formulations.base import Formulation
from medconstraints.handlers.parts import formulations_in, parts_of
from medconstraints.losses.base import TargetLoss
from medconstraints.losses.partial_cross_entropy import PartialCrossEntropyLoss
from medconstraints.losses.proposals import ProposalLoss
from medconstraints.processes import of_all_processes

__all__ = [
    "LossTermsHandler",
    "RequireFiniteLossHandler",
    "RequireTargetsHandler",
    "StepFormulationHandler",
]


logger = logging.getLogger(__name__)


def _terms(loss: Any) -> dict[str, Tensor]:
    """Terms of the last forward pass; a loss of another package has none."""
    return loss.terms() if isinstance(loss, TargetLoss) else {}


class LossTermsHandler:
    """Epoch means of the terms of a trainer's loss, as metrics: `StatsHandler`, `TensorBoardStatsHandler` show them.

    With one formulation in the loss, what that reports is a metric too, such as `train_t`. A term that is not computed
    in every iteration has the mean over those in which it is. The terms are added up on the device; the host waits for
    them once per epoch. Put it before the handlers that read the metrics.

    Args:
        prefix: put before each name.
    """

    def __init__(self, *, prefix: str = "train_") -> None:
        self.prefix = prefix
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._report)

    def _reset(self, engine: Engine) -> None:
        self._sums, self._counts = {}, {}

    def _add(self, engine: Any) -> None:
        for name, value in _terms(engine.loss_function).items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def _report(self, engine: Any) -> None:
        values = {name: float(value) / self._counts[name] for name, value in self._sums.items()}
        formulations = formulations_in(engine.loss_function)
        if len(formulations) == 1:
            values |= {name: float(value) for name, value in formulations[0].report().items()}
        engine.state.metrics.update({self.prefix + name: value for name, value in values.items()})


# What a loss reads -> what to do when there is nothing in it.
_ADVICE = {
    "boxes": "not one box in a whole epoch; check that the labels or box files of the training volumes hold the class, "
    "and that the patch size and the spacing leave boxes in the patches.",
    "weak_label": "not one annotated voxel in a whole epoch; check that the labels or scribbles of the training "
    "volumes hold the classes, and their value for what is not annotated. To train on constraints alone, take the loss "
    "that reads the weak label out.",
}
_CLASS_NUMBERS = {"boxes", "label", "weak_label"}  # entries that hold some


class RequireTargetsHandler:
    """Stops a run whose first epoch had nothing to learn from: not one box, not one annotated voxel.

    Looks at what the parts of the trainer's loss read as "boxes" (B, N, 1 + 2 D), whose class must be above 0, and as
    "weak_label" (B, 1, *S), which must not be the loss's `ignore_index`. Warns of classes of the network that were in
    none of them, and in no "label" (B, 1, *S). In distributed training the batches of all processes count, and all of
    them stop: one alone would leave the others waiting for it.

    Raises:
        ValueError: after the first epoch.
    """

    def __init__(self) -> None:
        self._found: dict[str, bool] = {}
        self._classes: set[int] = set()
        self._epoch_done = False

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._look)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._judge)

    def _look(self, engine: Any) -> None:
        if self._epoch_done:
            return
        for loss, entries in parts_of(engine.loss_function).values():
            for entry in _ADVICE.keys() & entries.keys():
                values = engine.state.batch.get(entries[entry])
                if values is not None and not self._found.get(entry):
                    self._found[entry] = bool(_teaches(entry, loss, values).any())
            for entry in _CLASS_NUMBERS & entries.keys():
                values = engine.state.batch.get(entries[entry])
                if values is not None and (entry == "boxes" or values.shape[1] == 1):
                    numbers = values[..., 0] if entry == "boxes" else values
                    self._classes.update(int(number) for number in numbers.unique().tolist())

    def _judge(self, engine: Any) -> None:
        if self._epoch_done:
            return
        self._epoch_done = True
        for entry in sorted(self._found):
            if not idist.all_reduce(float(self._found[entry]), op="MAX"):
                raise ValueError(f"{entry}: {_ADVICE[entry]}")
        numbers = torch.tensor(sorted(self._classes), dtype=torch.int64, device=idist.device())
        seen = set(of_all_processes(numbers).tolist())
        output = engine.state.output
        first = output[0][CommonKeys.PRED] if isinstance(output, list) else output[CommonKeys.PRED][0]
        channels = first.shape[0]
        absent = [number for number in range(1, channels) if number not in seen]
        if seen and absent:
            logger.warning(
                "the classes %s are in no target of the whole first epoch: nothing teaches them; check the labels of "
                "the training volumes and num_classes",
                absent,
            )


def _teaches(entry: str, loss: TargetLoss, values: Tensor) -> Tensor:
    if entry == "boxes":
        return values[..., 0] > 0
    return values != (loss.ignore_index if isinstance(loss, PartialCrossEntropyLoss | ProposalLoss) else -1)


class RequireFiniteLossHandler:
    """Stops a run at the end of an epoch whose mean loss is NaN or infinite: its weights are lost, and so is the rest.

    Put it before the handlers that validate and save, so that the files of the last sound epoch stay. Iterations are
    counted on the device; the host waits for them once per epoch. In distributed training all processes stop.

    Raises:
        RuntimeError: after the epoch; the message names the terms of the loss that are not finite.
    """

    def __init__(self) -> None:
        self._counts: dict[str, Tensor] = {}

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._judge)

    def _reset(self, engine: Engine) -> None:
        self._counts = {}

    def _add(self, engine: Any) -> None:
        total: Tensor = engine.state.output[CommonKeys.LOSS].detach()
        # The total under a name that no term has.
        for name, value in {"": total, **_terms(engine.loss_function)}.items():
            bad = (~torch.isfinite(torch.as_tensor(value, device=total.device))).any().float()
            self._counts[name] = self._counts[name] + bad if name in self._counts else bad

    def _judge(self, engine: Engine) -> None:
        if not self._counts:
            return
        counts = torch.as_tensor(idist.all_reduce(torch.stack(list(self._counts.values())), op="SUM"))
        bad = dict(zip(self._counts, counts.tolist(), strict=True))
        if bad.pop(""):
            terms = ", ".join(name for name, count in bad.items() if count)
            raise RuntimeError(
                f"loss: NaN or infinite in epoch {engine.state.epoch}"
                f"{f', in its terms {terms}' if terms else ''}; lower the learning rate, look for extreme intensities "
                "in the images, or train without mixed precision. Nothing of this epoch was saved."
            )


class StepFormulationHandler:
    """Calls `step()` of formulations after each epoch: raises a barrier, or takes the dual step of a Lagrangian.

    Put it before the handler that saves checkpoints, so that a resumed run starts with the next value.

    Args:
        formulations: what is stepped; None takes every formulation in the trainer's loss, each once.

    Raises:
        TypeError: one is no formulation.
    """

    def __init__(self, formulations: Iterable[Formulation] | None = None) -> None:
        self.formulations = None if formulations is None else checked_formulations(formulations)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Step."""
        for one in formulations_in(engine.loss_function) if self.formulations is None else self.formulations:
            one.step()


def checked_formulations(formulations: Iterable[Formulation]) -> list[Formulation]:
    """Formulations, each once.

    Raises:
        TypeError: one is no formulation.
    """
    given = list({id(one): one for one in formulations}.values())
    for one in given:
        if not isinstance(one, Formulation):
            raise TypeError(f"formulations: expected such as LogBarrierExtension, got {type(one).__name__}.")
    return given
