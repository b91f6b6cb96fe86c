"""Metrics of constraints in each epoch of a training or a validation, for logs and as a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator, IterationEvents
from monai.utils.enums import CommonKeys
from torch import Tensor

from medconstraints.formulations import LogBarrierExtension
from medconstraints.formulations.base import Formulation
from medconstraints.handlers.constraint_metrics import ConstraintMetrics, shares
from medconstraints.handlers.epoch_table import EpochTable
from medconstraints.handlers.parts import parts_of
from medconstraints.losses.base import ConstrainedLoss, Residuals, TargetLoss

__all__ = ["ConstraintMetricsHandler"]


class ConstraintMetricsHandler:
    """Metrics of constraints in each epoch (Kervadec 2020, section 3.4.1), for logs and as a CSV file.

    In the metrics of the engine, where `StatsHandler` and `TensorBoardStatsHandler` find them, `prefix` before each:

    - `satisfied`, `stability`, `violation` over all constraints, and with several losses `satisfied_<loss>` ... of
      each; see `ConstraintMetrics`;
    - `satisfied_<constraint>` and `violation_<constraint>`, by the names that the loss gives its constraints, with
      those of a `CombinedLoss` before: `size_lower_1`, `centroid_upper_1_0`, see `ConstrainedLoss.constraint_names`;
    - in training, of the formulations: what they report, such as `t`; `duality_gap_at_minimum` of a log-barrier: the
      bound P N / t if the loss were convex and at its minimum for this t, each of the constraints of the epoch with the
      weight 1, see `LogBarrierExtension.duality_gap_bound`; `dual_mean`, the mean of the multipliers, also implicit
      ones, over the constraints that were visited, before any division by the image size. With several formulations,
      `_<loss>` behind.

    A metric over no constraint is left out, such as `stability` in the first epoch, and all of a loss that was not
    computed; its cell of the CSV file is empty.

    Attached to a trainer, the metrics are those of the forward passes of the training: the network changes while they
    are taken. Put it after the handlers that stop a failed run, before `DualPassHandler` and `StepFormulationHandler`,
    so that it reports the `t` and the multipliers that the epoch was trained with, and before the handlers that read
    the metrics: as `training_handlers(monitors=...)` does, which also keeps its state, so that a resumed run continues
    the stability. Attached to an evaluator, they are those of its predictions, whole and before postprocessing, which
    are the network's output as the loss expects it; the data need the entries that the loss reads. Tensors stay on
    their device; the host waits once per epoch. In distributed training every process needs this handler, and process 0
    writes the file.

    Args:
        loss: a `ConstrainedLoss`, or a `CombinedLoss` with such; None is the trainer's, an evaluator has none.
        csv_path: file that gets one row for each epoch, see `EpochTable`; None for none.
        prefix: put before the name of each metric, also in the CSV file.
        class_names: class number -> name in the names of constraints; None uses the numbers.
        tolerance: largest residual that counts as satisfied.
        match_by_order: see `ConstraintMetrics`; for an evaluator whose samples have no index.
        also: further metrics of the engine that get a column of the file, such as "val_mean_dice"; an empty cell in an
            epoch without.

    Raises:
        TypeError: there is no loss with constraints; for that of the trainer at the start of the run.
        ValueError: attached to an evaluator without a loss; or the loss is no part of the trainer's.
        RuntimeError: after the first epoch, when the CSV file belongs to a run with other columns.
        KeyError: in a validation, when the batch lacks a key.
    """

    def __init__(
        self,
        loss: TargetLoss | None = None,
        *,
        csv_path: str | Path | None = None,
        prefix: str = "",
        class_names: Mapping[int, str] | None = None,
        tolerance: float = 0.0,
        match_by_order: bool = False,
        also: str | Sequence[str] = (),
    ) -> None:
        self.loss = loss
        self.csv = None if csv_path is None else EpochTable(csv_path)
        self.prefix = prefix
        self.class_names = {int(number): str(name) for number, name in (class_names or {}).items()}
        self.tolerance = tolerance
        self.match_by_order = match_by_order
        self.also = [also] if isinstance(also, str) else [*also]
        self.metrics: dict[str, ConstraintMetrics] = {}
        self._losses: dict[str, ConstrainedLoss] = {}
        self._entries: dict[str, Mapping[str, str]] = {}
        self._duals: dict[Formulation, Tensor] = {}
        if loss is not None:
            self._prepare(loss)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer or an evaluator."""
        trains = not isinstance(engine, Evaluator)
        if trains:
            engine.add_event_handler(Events.STARTED, self._start)
            engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._add_last)
        elif self.loss is None:
            raise ValueError("loss: expected the loss whose constraints are measured, an evaluator has none.")
        else:
            engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._add_predictions)
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._report, trains=trains)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """What stability needs of the epoch before, for each loss."""
        return {name: metrics.state_dict() for name, metrics in self.metrics.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on after the epoch that `state` was saved after.

        Raises:
            ValueError: it is of other losses.
        """
        if set(state) != set(self.metrics):
            raise ValueError(f"state: expected one of the losses {sorted(self.metrics)}, got {sorted(state)}.")
        for name, metrics in self.metrics.items():
            metrics.load_state_dict(state[name])

    def _prepare(self, loss: Any) -> None:
        for name, (one, entries) in parts_of(loss).items():
            if isinstance(one, ConstrainedLoss):
                self._losses[name], self._entries[name] = one, entries
        if not self._losses:
            raise TypeError(
                f"loss: expected one with constraints, such as ConstraintLoss or a CombinedLoss with it, got "
                f"{type(loss).__name__}; leave this handler out, or give it the loss."
            )
        self.metrics = {
            name: ConstraintMetrics(tolerance=self.tolerance, match_by_order=self.match_by_order)
            for name in self._losses
        }

    def _start(self, engine: Any) -> None:
        trained = engine.loss_function
        if self.loss is None and not self._losses:
            self._prepare(trained)
        for name, loss in self._losses.items():
            if not any(loss is module for module in trained.modules()):
                raise ValueError(
                    f"loss: {name or type(loss).__name__!r} is no part of the loss that is trained; give the same "
                    "object to both, or leave it out here."
                )

    def _reset(self, engine: Engine) -> None:
        for metrics in self.metrics.values():
            metrics.reset()
        self._duals = {}

    def _add_last(self, engine: Engine) -> None:
        for name, loss in self._losses.items():
            if loss.last is not None:
                self._update(name, loss, loss.last)
                self._add_dual(loss.formulation, loss.last)

    def _add_predictions(self, engine: Engine) -> None:
        output: Any = engine.state.output
        predictions: Tensor = output[CommonKeys.PRED]
        for name, loss in self._losses.items():
            target = _target(engine.state.batch, loss, self._entries[name], predictions.device)
            with torch.no_grad():
                self._update(name, loss, loss.residual(predictions, target))

    def _update(self, name: str, loss: ConstrainedLoss, seen: Residuals) -> None:
        metrics = self.metrics[name]
        if metrics.names is None:
            names = loss.constraint_names(seen.residual.shape[1:], self.class_names)
            metrics.names = [f"{name}_{one}" if name else one for one in names]
        metrics.update(*seen)

    def _add_dual(self, formulation: Formulation, seen: Residuals) -> None:
        residual, free, index = seen
        dual = formulation.dual(residual, index)
        sums = torch.stack([dual.masked_fill(free, 0.0).sum(), (~free).sum().to(dual)])
        self._duals[formulation] = self._duals[formulation] + sums if formulation in self._duals else sums

    def _formulations(self) -> list[tuple[Formulation, str, list[str]]]:
        """Each formulation once, the ending of its metrics, and the names of its losses."""
        groups: dict[Formulation, list[str]] = {}
        for name, loss in self._losses.items():
            groups.setdefault(loss.formulation, []).append(name)
        several = len(groups) > 1
        return [(one, "".join(f"_{name}" for name in names if several), names) for one, names in groups.items()]

    def _report(self, engine: Engine, *, trains: bool) -> None:
        values = {self.prefix + key: value for key, value in self._values(trains=trains).items()}
        for key, value in values.items():
            if value is None:
                engine.state.metrics.pop(key, None)  # of a former epoch
            else:
                engine.state.metrics[key] = value
        if self.csv is not None and idist.get_rank() == 0:
            self.csv.write(engine.state.epoch, values | {key: engine.state.metrics.get(key) for key in self.also})
        for metrics in self.metrics.values():
            metrics.next_epoch()

    def _values(self, *, trains: bool) -> dict[str, float | None]:
        sums = {name: metrics.sums() for name, metrics in self.metrics.items()}
        total = shares(torch.cat([*sums.values()], dim=1))
        values = dict(total)
        for name, metrics in self.metrics.items():
            if len(sums) > 1:
                values |= {f"{key}_{name}": value for key, value in shares(sums[name]).items()}
            values |= {key: value for key, value in metrics.compute().items() if key not in total}
        for formulation, ending, names in self._formulations() if trains else ():
            constraints = int(sum(sums[name][0].sum() for name in names))
            values |= {key + ending: value for key, value in self._reported(formulation, constraints).items()}
        return values

    def _reported(self, formulation: Formulation, constraints: int) -> dict[str, float | None]:
        values: dict[str, float | None] = {key: float(value) for key, value in formulation.report().items()}
        if isinstance(formulation, LogBarrierExtension):
            values["duality_gap_at_minimum"] = formulation.duality_gap_bound(constraints)
        values["dual_mean"] = None
        if formulation in self._duals:
            total, count = torch.as_tensor(idist.all_reduce(self._duals[formulation])).tolist()
            values["dual_mean"] = total / count if count else None
        return values


def _target(
    batch: Mapping[str, Any], loss: TargetLoss, keys: Mapping[str, str], device: torch.device
) -> dict[str, Any]:
    """Target of a loss; the index of the samples is used where there is one."""
    optional = {*loss.optional_keys, "index"}
    missing = [key for entry, key in keys.items() if key not in batch and entry not in optional]
    if missing:
        raise KeyError(
            f"batch: no {missing}, it has {sorted(map(str, batch))}; add the transform that makes them to the "
            "evaluator's data."
        )
    target = {entry: batch[key] for entry, key in keys.items() if key in batch}
    moved = [entry for entry in target if isinstance(target[entry], Tensor) and entry not in loss.host_keys]
    return target | {entry: target[entry].to(device, non_blocking=True) for entry in moved}
