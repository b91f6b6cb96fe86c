"""What a training run tells about its loss, and how its formulation moves on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from monai.utils.enums import CommonKeys
from torch import Tensor

__all__ = [
    "LossTermsHandler",
    "RequireAnnotationHandler",
    "RequireBoxesHandler",
    "RequireFiniteLossHandler",
    "StepFormulationHandler",
]


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


class _RequireInFirstEpoch:
    """Stops a run after its first epoch when no batch of any process had what is needed.

    All processes of distributed training stop: one alone would leave the others waiting for it.
    """

    key: str
    message: str

    def __init__(self) -> None:
        self._found = False
        self._judged = False

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._look)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._judge)

    def _has(self, values: Tensor) -> Tensor:
        raise NotImplementedError

    def _look(self, engine: Engine) -> None:
        if not self._found:
            self._found = bool(self._has(engine.state.batch[self.key]).any())

    def _judge(self, engine: Engine) -> None:
        if self._judged:
            return
        self._judged = True
        self._found = bool(idist.all_reduce(float(self._found), op="MAX"))
        if not self._found:
            raise ValueError(f"{self.key}: {self.message}")


class RequireBoxesHandler(_RequireInFirstEpoch):
    """Stops a run whose first epoch held no box at all: it would train on emptiness alone and learn nothing.

    In distributed training the boxes of all processes count, and all of them stop.

    Args:
        key: key of the boxes in the batch, (B, N, 1 + 2 D).

    Raises:
        ValueError: after the first epoch, when no batch had a box.
    """

    message = (
        "not one box in a whole epoch; check that the labels or box files of the training volumes hold the class, and "
        "that patch_size and spacing_mm leave boxes in the patches."
    )

    def __init__(self, key: str = "boxes") -> None:
        super().__init__()
        self.key = key

    def _has(self, values: Tensor) -> Tensor:
        return values[..., 0] > 0


class RequireAnnotationHandler(_RequireInFirstEpoch):
    """Stops a run whose first epoch had not one annotated voxel: its weak labels would teach nothing.

    In distributed training the voxels of all processes count, and all of them stop.

    Args:
        key: key of the weak label in the batch, (B, 1, *S).
        ignore_index: its value where nothing is annotated.

    Raises:
        ValueError: after the first epoch, when no voxel was annotated.
    """

    message = (
        "not one annotated voxel in a whole epoch; check that the labels or scribbles of the training volumes hold the "
        "classes, and their value for what is not annotated. To train on constraints alone, set annotation_key to None."
    )

    def __init__(self, key: str = "weak_label", ignore_index: int = -1) -> None:
        super().__init__()
        self.key = key
        self.ignore_index = ignore_index

    def _has(self, values: Tensor) -> Tensor:
        return values != self.ignore_index


class RequireFiniteLossHandler:
    """Stops a run at the end of an epoch whose mean loss is NaN or infinite: its weights are lost, and so is the rest.

    Put it before the handlers that validate and save, so that the files of the last sound epoch stay. Iterations are
    counted on the device; the host waits for them once per epoch. In distributed training all processes stop.

    Args:
        loss: a loss whose `terms()` tell which part of it is not finite, or any other.

    Raises:
        RuntimeError: after the epoch; the message counts the iterations and names the terms.
    """

    def __init__(self, loss: Any = None) -> None:
        self.loss = loss
        self._counts: dict[str, Tensor] = {}

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._judge)

    def _reset(self, engine: Engine) -> None:
        self._counts = {}

    def _add(self, engine: Engine) -> None:
        output: Any = engine.state.output
        total: Tensor = output[CommonKeys.LOSS].detach()
        terms = self.loss.terms() if hasattr(self.loss, "terms") else {}
        for name, value in {"loss": total, **{f"loss/{name}": value for name, value in terms.items()}}.items():
            bad = (~torch.isfinite(torch.as_tensor(value, device=total.device))).any().float()
            self._counts[name] = self._counts[name] + bad if name in self._counts else bad

    def _judge(self, engine: Engine) -> None:
        if not self._counts:
            return
        counts = torch.as_tensor(idist.all_reduce(torch.stack(list(self._counts.values())), op="SUM"))
        bad = dict(zip(self._counts, counts.tolist(), strict=True))
        if bad.pop("loss"):
            terms = ", ".join(name.removeprefix("loss/") for name, count in bad.items() if count)
            raise RuntimeError(
                f"loss: NaN or infinite in epoch {engine.state.epoch}"
                f"{f', in its terms {terms}' if terms else ''}; lower the learning rate, look for extreme intensities "
                "in the images, or train without mixed precision. Nothing of this epoch was saved."
            )


class StepFormulationHandler:
    """Calls `formulation.step()` after each epoch: raises a barrier, or takes the dual step of a Lagrangian.

    Put it before the handler that saves checkpoints, so that a resumed run starts with the next value.

    Args:
        formulation: anything with `step()`, or a list of such; one that is listed twice is stepped once.

    Raises:
        TypeError: one has no `step()`.
    """

    def __init__(self, formulation: _Steppable | Sequence[_Steppable]) -> None:
        formulations = list(formulation) if isinstance(formulation, Sequence) else [formulation]
        for one in formulations:
            if not hasattr(one, "step"):
                raise TypeError(f"formulation: expected something with step(), got {type(one).__name__}.")
        self.formulations = list({id(one): one for one in formulations}.values())

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Step."""
        for formulation in self.formulations:
            formulation.step()
