"""Handlers of constraints: what they do in each epoch, and the pass over the data that updates multipliers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from monai.utils.enums import CommonKeys
from torch import Tensor

from medconstraints.handlers.constraint_metrics import ConstraintMetrics, ConstraintTotals
from medconstraints.handlers.epoch_table import EpochTable
from medconstraints.handlers.random_state import kept_random_state

__all__ = ["ConstraintMetricsHandler", "DualPassHandler"]

# What is reported of a formulation, and the attribute without which it is not.
_OF_FORMULATIONS = {
    "t": "t",
    "duality_gap_bound": "duality_gap_bound",
    "multiplier_mean": "multipliers",
    "multiplier_max": "multipliers",
    "dual_mean": "dual",
}

# Entries of a target that losses read on the host, where they check them without a wait.
_ON_THE_HOST = frozenset({"bounds", "index", "volume"})


class ConstraintMetricsHandler:
    """Metrics of constraints in each epoch (Kervadec 2020, section 3.4.1), for logs and as a CSV file.

    In the metrics of the engine, where `StatsHandler` and `TensorBoardStatsHandler` find them, `prefix` before each:

    - `satisfied`, `stability`, `violation` over all constraints, and with several losses `satisfied_<loss>` ... of
      each; see `ConstraintMetrics`;
    - `satisfied_<constraint>` and `violation_<constraint>`; a constraint is called `<loss>_lower_<class>` or
      `<loss>_upper_<class>`, with `_<component>` behind when the statistic has several: `size_lower_1`,
      `centroid_upper_1_0`. Without `<loss>_` for a loss that has no name. The pairs of a relation are numbered from 0;
    - of the formulations: `t`; `duality_gap_bound`, for the constraints of the epoch
      as if each had the weight 1, see `LogBarrierExtension.duality_gap_bound`; `multiplier_mean` and
      `multiplier_max` over the whole table of multipliers, of this process; `dual_mean`, the mean of the multipliers,
      also implicit ones, over the constraints that were visited, before any division by the image size. With several
      formulations, `_<loss>` behind.

    A metric over no constraint is left out, such as `stability` in the first epoch; its cell of the CSV file is empty.

    Attached to a trainer, the metrics are those of the forward passes of the training: the network changes while they
    are taken. Put it after the handlers that stop a failed run, before `DualPassHandler` and `StepFormulationHandler`,
    so that it reports the `t` and the multipliers that the epoch was trained with, and before the handlers that read
    the metrics. Name it among the objects of `ResumeHandler`: a resumed run then continues the stability. Tensors stay
    on their device; the host waits once per epoch. In distributed training every process needs this handler.

    Args:
        losses: name -> loss, such as `ConstraintLoss`, with `last` and `residual`; or one loss without a name.
        csv_path: file that gets one row for each epoch, see `EpochTable`; None for none.
        formulations: name of a loss -> its formulation; or one of all losses. None takes `formulation` of each loss.
        prefix: put before the name of each metric, also in the CSV file.
        evaluate: attach it to an evaluator: the residuals of its predictions, whole and before postprocessing, which
            are the network's output as the loss expects it. The formulations are not reported then.
        keys: with `evaluate`, name -> key of the loss's target in the batch, or entry of the target -> key: `{"size":
            {"bounds": "size_bounds", "index": "index"}}`. A name that is left out uses its own name as key. For a loss
            without a name the key, or the mapping, alone; None is "bounds".
        class_names: class number -> name in the names of constraints; None uses the numbers.
        tolerance: largest residual that counts as satisfied.
        match_by_order: see `ConstraintMetrics`; for an evaluator whose samples have no index.
        also: further metrics of the engine that get a column of the file, such as "val_mean_dice"; an empty cell in an
            epoch without.
        rank: number of the process in distributed training; only process 0 writes the file.

    Raises:
        TypeError: a loss has no `last` or no `residual`.
        ValueError: no loss, `keys` or `formulations` name no loss, or do not go with `evaluate`.
        RuntimeError: in the first iteration, when the CSV file belongs to a run with other columns; or when a loss was
            not called.
        KeyError: with `evaluate`, when the batch lacks a key.
    """

    def __init__(
        self,
        losses: Mapping[str, Any] | Any,
        *,
        csv_path: str | Path | None = None,
        formulations: Mapping[str, Any] | Any = None,
        prefix: str = "",
        evaluate: bool = False,
        keys: Mapping[str, str | Mapping[str, str]] | str | None = None,
        class_names: Mapping[int, str] | None = None,
        tolerance: float = 0.0,
        match_by_order: bool = False,
        also: Sequence[str] = (),
        rank: int = 0,
    ) -> None:
        # A loss without a name has the name "".
        named = isinstance(losses, Mapping)
        self.losses: dict[str, Any] = dict(losses) if named else {"": losses}
        if not self.losses:
            raise ValueError("losses: expected at least one loss, got none.")
        for name, loss in self.losses.items():
            if not (hasattr(loss, "last") and hasattr(loss, "residual")):
                raise TypeError(
                    f"losses: expected a loss with last and residual(), such as ConstraintLoss, got "
                    f"{type(loss).__name__}{f' for {name!r}' if name else ''}."
                )
        if evaluate and formulations is not None:
            raise ValueError("formulations: are reported in training only; leave them out with evaluate=True.")
        if keys is not None and not evaluate:
            raise ValueError("keys: a trainer's losses have their targets already; leave it out, or set evaluate=True.")
        self.keys: dict[str, Any] = self._checked_keys(keys) if named else {"": "bounds" if keys is None else keys}
        self.csv = None if csv_path is None or rank else EpochTable(csv_path)
        self.prefix = prefix
        self.evaluate = evaluate
        self.also = [also] if isinstance(also, str) else [*also]
        self.class_names = {int(number): str(name) for number, name in (class_names or {}).items()}
        self.metrics = {
            name: ConstraintMetrics(tolerance=tolerance, match_by_order=match_by_order) for name in self.losses
        }
        self.formulations = [] if evaluate else self._groups(formulations)
        self._duals: dict[int, Tensor] = {}
        self._checked = False

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, or with `evaluate` to an evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        if self.evaluate:
            engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._add_predictions)
        else:
            engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._add_last)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._report)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """What stability needs of the epoch before, for each loss."""
        return {name: metrics.state_dict() for name, metrics in self.metrics.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on after the epoch that `state` was saved after.

        Raises:
            ValueError: it is of other losses.
        """
        if set(state) != set(self.metrics):
            raise ValueError(f"state: expected one of the losses {sorted(self.metrics)}, got {sorted(state)}.")
        for name, metrics in self.metrics.items():
            metrics.load_state_dict(state[name])

    def _checked_keys(self, keys: Mapping[str, str | Mapping[str, str]] | str | None) -> dict[str, Any]:
        if keys is not None and not isinstance(keys, Mapping):
            raise ValueError(f"keys: expected a mapping from the losses {sorted(self.losses)} to keys, got {keys!r}.")
        self._known("keys", keys or {})
        return {name: (keys or {}).get(name, name) for name in self.losses}

    def _known(self, argument: str, names: Iterable[str]) -> None:
        unknown = sorted(set(names) - set(self.losses))
        if unknown:
            raise ValueError(f"{argument}: {unknown} name no loss; the losses are {sorted(self.losses)}.")

    def _groups(self, formulations: Mapping[str, Any] | Any) -> list[tuple[Any, list[str]]]:
        """Each formulation once, with the names of its losses."""
        if formulations is None:
            formulations = {name: getattr(loss, "formulation", None) for name, loss in self.losses.items()}
        elif not isinstance(formulations, Mapping):
            formulations = dict.fromkeys(self.losses, formulations)
        self._known("formulations", formulations)
        groups: dict[int, tuple[Any, list[str]]] = {}
        for name, formulation in formulations.items():
            if formulation is not None:
                groups.setdefault(id(formulation), (formulation, []))[1].append(name)
        return [*groups.values()]

    def _reset(self, engine: Engine) -> None:
        for metrics in self.metrics.values():
            metrics.reset()
        self._duals = {}

    def _add_last(self, engine: Engine) -> None:
        for name, loss in self.losses.items():
            if loss.last is None:
                raise RuntimeError(
                    f"losses: {name or type(loss).__name__!r} was not called in the iteration; give the same object to "
                    "the trainer's loss and to this handler."
                )
            self._update(name, *loss.last)
        for number, (formulation, names) in enumerate(self.formulations):
            if hasattr(formulation, "dual"):
                for name in names:
                    self._add_dual(number, formulation, *self.losses[name].last)
        self._check_columns()

    def _add_predictions(self, engine: Engine) -> None:
        output: Any = engine.state.output
        predictions: Tensor = output[CommonKeys.PRED]
        for name, loss in self.losses.items():
            target = _target(engine.state.batch, self.keys[name], predictions.device)
            with torch.no_grad():
                self._update(name, *loss.residual(predictions, target))
        self._check_columns()

    def _update(self, name: str, residual: Tensor, free: Tensor, index: Tensor | None) -> None:
        metrics = self.metrics[name]
        if metrics.names is None:
            metrics.names = self._names(name, residual.shape[1:])
        metrics.update(residual, free, index)

    def _names(self, name: str, shape: Sequence[int]) -> list[str]:
        """Names of the constraints of one sample, in the order of the elements of a residual (C', M, 2)."""
        loss, (rows, components, _) = self.losses[name], shape
        per_class = getattr(loss, "per_class", True)
        first = 1 if per_class and not getattr(loss, "include_background", False) else 0
        numbers = getattr(loss, "classes", None) or range(first, first + rows)
        labels = [self.class_names.get(number, str(number)) if per_class else str(number) for number in numbers]
        return [
            f"{name}_{bound}_{label}{ending}".removeprefix("_")
            for label in labels
            for ending in ([""] if components == 1 else [f"_{component}" for component in range(components)])
            for bound in ("lower", "upper")
        ]

    def _add_dual(self, number: int, formulation: Any, residual: Tensor, free: Tensor, index: Tensor | None) -> None:
        needs_index = getattr(formulation, "needs_index", False)
        dual = formulation.dual(residual, index) if needs_index else formulation.dual(residual)
        sums = torch.stack([dual.masked_fill(free, 0.0).sum(), (~free).sum().to(dual)])
        self._duals[number] = self._duals[number] + sums if number in self._duals else sums

    def _check_columns(self) -> None:
        """In the first iteration of a run, so that no epoch is lost when the file does not fit."""
        if not self._checked and self.csv is not None:
            self.csv.check(self._columns())
        self._checked = True

    def _columns(self) -> list[str]:
        several = len(self.losses) > 1
        keys = ["satisfied", "stability", "violation"]
        for name, metrics in self.metrics.items():
            keys += [f"{key}_{name}" for key in metrics.keys()[:3] if several]
            keys += metrics.keys()[3:]
        for formulation, names in self.formulations:
            keys += [key + self._ending(names) for key in _reported(formulation)]
        return [*(self.prefix + key for key in keys), *self.also]

    def _ending(self, names: Sequence[str]) -> str:
        return "" if len(self.formulations) == 1 else "".join(f"_{name}" for name in names)

    def _report(self, engine: Engine) -> None:
        values = {self.prefix + key: value for key, value in self._values().items()}
        for key, value in values.items():
            if value is None:
                engine.state.metrics.pop(key, None)  # of a former epoch
            else:
                engine.state.metrics[key] = value
        if self.csv is not None:
            self.csv.write(engine.state.epoch, values | {key: engine.state.metrics.get(key) for key in self.also})
        for metrics in self.metrics.values():
            metrics.next_epoch()

    def _values(self) -> dict[str, float | None]:
        totals = {name: metrics.totals() for name, metrics in self.metrics.items()}
        values = _added(totals.values()).shares()
        for name, metrics in self.metrics.items():
            own = metrics.compute()
            if len(self.losses) > 1:
                values |= {f"{key}_{name}": value for key, value in totals[name].shares().items()}
            values |= {key: value for key, value in own.items() if key not in totals[name].shares()}
        for number, (formulation, names) in enumerate(self.formulations):
            constraints = sum(totals[name].constraints for name in names)
            for key in _reported(formulation):
                values[key + self._ending(names)] = self._of_formulation(key, number, formulation, constraints)
        return values

    def _of_formulation(self, key: str, number: int, formulation: Any, constraints: int) -> float | None:
        if key == "t":
            return float(formulation.t)
        if key == "duality_gap_bound":
            return float(formulation.duality_gap_bound(constraints))
        if key == "dual_mean":
            total, count = torch.as_tensor(idist.all_reduce(self._duals[number])).tolist()
            return total / count if count else None
        multipliers = formulation.multipliers
        if not multipliers.numel():
            return None
        return float(multipliers.mean() if key == "multiplier_mean" else multipliers.max())


class DualPassHandler:
    """After each epoch of training, one epoch over the same data that only moves the multipliers of Lagrangians.

    The thesis alternates so (Kervadec 2020, section 3.4.2): an epoch for the network's weights, then an epoch for the
    multipliers, with the weights as they are now. This handler forgets the residuals that the formulation saw while the
    weights moved, and calls the loss on every batch of the data loader, without gradient; the formulation observes the
    residuals, and `StepFormulationHandler`, put behind this handler, makes the step. Without this handler the step uses
    the residuals that the training saw anyway, at no cost.

    The network runs in training mode: the multipliers then answer the residuals whose cost is trained, with the batch
    norms' statistics of the batch and with dropout. In evaluation mode they would answer another function.

    The rest of the run is what it would be with these multipliers and without the pass: running statistics and other
    buffers of the network, its modes, the engine's state, and the states of all random generators (see
    `kept_random_state`) are as before. In distributed training every process passes over its own part of the data.

    Args:
        loss: called as the trainer calls its loss, on the output of the network and the target of `prepare_batch`; the
            trainer's own loss, or the part of it that has the constraints.
        formulation: formulation with `reset()` whose multipliers are updated, or several of them.
        data_loader: batches to pass over, once from beginning to end; None takes the trainer's. Its workers must not be
            persistent.

    Raises:
        TypeError: a formulation has no `reset()`: it has no multipliers.
        ValueError: in the first pass, when the data loader's workers are persistent.
    """

    def __init__(self, loss: Any, formulation: Any, *, data_loader: Iterable[Any] | None = None) -> None:
        self.loss = loss
        self.formulations = [*formulation] if isinstance(formulation, list | tuple) else [formulation]
        for one in self.formulations:
            if not hasattr(one, "reset"):
                raise TypeError(
                    f"formulation: expected one with reset(), such as Lagrangian, got {type(one).__name__}; without "
                    "multipliers there is no dual pass, leave this handler out."
                )
        self.data_loader = data_loader

    def attach(self, engine: Engine) -> None:
        """Attach to a `SupervisedTrainer`."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Pass over the data."""
        for formulation in self.formulations:
            formulation.reset()
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
                        self._pass(engine, batch)
            finally:
                for name, buffer in network.named_buffers():
                    buffer.copy_(buffers[name])
                for module, training in modes.items():
                    module.training = training

    def _pass(self, engine: Engine, batch: Any) -> None:
        prepared = engine.prepare_batch(batch, engine.state.device, engine.non_blocking, **engine.to_kwargs)
        inputs, targets, *more = prepared
        arguments, options = more if more else ((), {})
        if engine.compile and hasattr(inputs, "as_tensor"):
            inputs = inputs.as_tensor()  # what is compiled does not take MONAI's tensors
        self.loss(engine.inferer(inputs, engine.network, *arguments, **options), targets)


def _target(batch: Mapping[str, Any], key: str | Mapping[str, str], device: torch.device) -> Any:
    """Target of a loss: an entry of the batch, or a mapping of several."""
    wanted = [key] if isinstance(key, str) else [*key.values()]
    missing = [name for name in wanted if name not in batch]
    if missing:
        raise KeyError(
            f"batch: no {missing}, it has {sorted(map(str, batch))}; add the transform that makes them to the "
            "evaluator's data, or name other keys."
        )
    if isinstance(key, str):
        return batch[key]
    return {
        entry: batch[name].to(device, non_blocking=True)
        if isinstance(batch[name], Tensor) and entry not in _ON_THE_HOST
        else batch[name]
        for entry, name in key.items()
    }


def _reported(formulation: Any) -> list[str]:
    return [key for key, attribute in _OF_FORMULATIONS.items() if hasattr(formulation, attribute)]


def _added(totals: Iterable[ConstraintTotals]) -> ConstraintTotals:
    return ConstraintTotals(*(sum(column) for column in zip(*totals, strict=True)))
