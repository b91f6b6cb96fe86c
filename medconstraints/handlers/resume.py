"""Runs that can be killed: the best weights, and a last state from which training goes on exactly."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data.utils import set_rnd
from monai.engines import SupervisedTrainer, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from medconstraints.data.slices import VolumeBatchSampler
from medconstraints.data.weights_card import CARD, write_card

__all__ = [
    "EpochSeedHandler",
    "ResumeHandler",
    "SaveBestHandler",
    "SaveLatestHandler",
    "Stateful",
]

logger = logging.getLogger(__name__)

_SHOWN = 8  # changed settings in an error
_OTHER = "it belongs to another run, or this one was changed; move it away to start again."


@runtime_checkable
class Stateful(Protocol):
    """What a resumed run can put back: networks, optimizers, schedules, losses, and monitors that remember."""

    def state_dict(self) -> Any:
        """The state, of types that `torch.load(weights_only=True)` reads."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Put it back."""


def save_whole(state: Any, path: Path, *, card: Mapping[str, Any] | None = None) -> None:
    """Write beside and rename: a run killed while it writes leaves the former file whole.

    Args:
        state: for `torch.save`.
        path: the file.
        card: see `write_card`.

    Raises:
        RuntimeError: a number is not finite; the former file stays.
        OSError: the disk is full or fails; the former file stays.
    """
    if bad := [name for name, tensor in _tensors(state) if not bool(tensor.isfinite().all())]:
        raise RuntimeError(
            f"{path.name}: not written, as {len(bad)} of its tensors, such as {bad[0]!r}, hold NaN or infinity though "
            "every loss was finite: a gradient was not. Lower the learning rate or clip the gradient; a run that is "
            "started again goes on from what was saved before."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    try:
        torch.save(state, beside)
        if card:
            write_card(beside, card)
    except (OSError, RuntimeError) as error:  # torch's own writer raises the second
        beside.unlink(missing_ok=True)
        raise OSError(
            f"{path}: cannot be written ({str(error).splitlines()[0]}); make room, or look at the disk, and start the "
            "run again: it goes on from the former file."
        ) from error
    os.replace(beside, path)


def _tensors(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of a nested state, with their names."""
    if isinstance(state, Tensor):
        yield name, state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(state, list | tuple):
        for number, value in enumerate(state):
            yield from _tensors(value, f"{name}.{number}")


def _unwrapped(obj: Any) -> Any:
    """The network inside DistributedDataParallel: its weights then have the same names with one and many processes."""
    return obj.module if isinstance(obj, nn.parallel.DistributedDataParallel) else obj


class EpochSeedHandler:
    """Seeds torch, numpy, samplers and the random transforms of a trainer's data from the epoch at its start.

    A run that resumes at epoch k then draws what the uninterrupted run drew there. Epochs differ from each other, and
    so do the processes of distributed training.

    Args:
        seed: seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = int(seed)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed."""
        seed = (self.seed + 1_000_003 * engine.state.epoch + 7919 * idist.get_rank()) % 2**31
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - transforms of other packages draw from the global generator
        random.seed(seed)
        loader = engine.state.dataloader
        if isinstance(loader, DataLoader):
            set_rnd(loader.dataset, seed=seed)
            for sampler in (loader.sampler, loader.batch_sampler):
                if isinstance(sampler, DistributedSampler | VolumeBatchSampler):
                    sampler.set_epoch(engine.state.epoch)  # they shuffle by it


def _save_weights(network: Any, path: Path) -> None:
    """A plain state dictionary, with the card that the run's `settings.json` has for it."""
    told = path.parent / "settings.json"
    card = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}
    save_whole(_unwrapped(network).state_dict(), path, card={key: card[key] for key in CARD if key in card})


class SaveBestHandler:
    """Saves an evaluator's network whenever its key metric is better than ever before.

    MONAI's `CheckpointSaver` does so too, but forgets the best value when training resumes; this one reads
    `evaluator.state.best_metric`, which `ResumeHandler` restores. The file is a plain state dictionary.

    Args:
        path: file to write, such as `models/model.pt`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator that has a key metric."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Save if this validation was the best one."""
        if engine.state.best_metric_epoch == engine.state.epoch:
            _save_weights(engine.network, self.path)
            logger.info("best key metric %.4f: saved %s", engine.state.best_metric, self.path.name)


class SaveLatestHandler:
    """Saves a trainer's network after each epoch of a run without validation, which knows no best one.

    In distributed training process 0 saves.

    Args:
        path: file to write, such as `output/model.pt`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.STARTED, self._tell)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def _tell(self, engine: Engine) -> None:
        logger.warning(
            "no validation volume has a label: nothing is validated, %s gets the weights of the latest epoch",
            self.path.name,
        )

    def __call__(self, engine: Any) -> None:
        """Save."""
        _save_weights(engine.network, self.path)


def _as_json(settings: Mapping[str, Any]) -> Any:
    """What JSON makes of the settings: tuples become lists, as they are once they were saved."""
    try:
        return json.loads(json.dumps(dict(settings)))
    except (TypeError, ValueError) as error:
        raise TypeError(f"settings: expected numbers, strings, lists and dictionaries ({error}).") from error


class ResumeHandler:
    """Saves everything a run needs after each epoch, and goes on from there when the file exists at the start.

    Of MONAI's `SupervisedTrainer` network, optimizer and loss are kept as they are, under these names, and of any
    `Trainer` the gradient scaler of mixed precision: without it the first steps of a resumed run would be skipped until
    its scale fits again. A file is there from the start on, of epoch 0: it says that what else is in the folder belongs
    to this run, and a run that was killed before its first epoch ended begins anew. Put it last among the trainer's
    handlers, so that it saves what the others changed. In distributed training process 0 saves, and all load.

    Args:
        path: the file, such as `output/last.pt`; each stage of a method has its own.
        objects: name -> further object with a state: a schedule, a second network, a monitor.
        counters: name -> number that the run changes in this very mapping; put back into it.
        evaluator: its best metric is kept too, or None.
        settings: what must be the same when the run goes on, in types of JSON; kept in the file and compared with it.

    Raises:
        TypeError: an object has no state, or the settings are not of JSON's types.
        ValueError: an object has the name of one of the trainer's.
        RuntimeError: at the start of a run, when the file cannot be read or belongs to another run.
    """

    def __init__(
        self,
        path: str | Path,
        objects: Mapping[str, Stateful] | None = None,
        *,
        counters: MutableMapping[str, int | float] | None = None,
        evaluator: Engine | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.objects = dict(objects or {})
        for name, obj in self.objects.items():
            if not isinstance(obj, Stateful):
                raise TypeError(
                    f"objects: expected state_dict() and load_state_dict(), got {type(obj).__name__} for {name!r}."
                )
        self.counters = {} if counters is None else counters
        self.evaluator: Any = evaluator
        self.settings: dict[str, Any] | None = None if settings is None else _as_json(settings)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.STARTED, self._load)
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)

    def _stateful(self, engine: Engine) -> dict[str, Any]:
        """Everything with a state, by name."""
        found: dict[str, Any] = {}
        if isinstance(engine, SupervisedTrainer):
            found = {"network": engine.network, "optimizer": engine.optimizer}
            if isinstance(engine.loss_function, nn.Module):
                found["loss"] = engine.loss_function
        if isinstance(engine, Trainer) and engine.scaler is not None:
            found["scaler"] = engine.scaler
        if twice := sorted(found.keys() & self.objects):
            raise ValueError(f"objects: {twice} are kept of the trainer already; give other objects other names.")
        return {name: _unwrapped(obj) for name, obj in (found | self.objects).items()}

    def _write(self, engine: Engine) -> None:
        state: dict[str, Any] = {
            "objects": {name: obj.state_dict() for name, obj in self._stateful(engine).items()},
            "counters": dict(self.counters),
            "trainer": {"epoch": engine.state.epoch, "iteration": engine.state.iteration},
            "settings": self.settings,
        }
        if self.evaluator is not None:
            best = self.evaluator.state
            state["evaluator"] = {"best_metric": float(best.best_metric), "best_metric_epoch": best.best_metric_epoch}
        save_whole(state, self.path)

    def _load(self, engine: Engine) -> None:
        state = self._read() if self.path.exists() else None
        idist.barrier()  # all have looked before process 0 writes
        if state is None or not state["trainer"]["epoch"]:
            if idist.get_rank() == 0:
                self._write(engine)
            return
        objects = self._stateful(engine)
        # A run may go on on a device of another kind, with a scaler that it did not have before.
        missing = sorted({*objects, *self.counters} - {*state["objects"], *state["counters"], "scaler"})
        if missing:
            raise RuntimeError(f"{self.path.name}: has no state of {missing}; {_OTHER}")
        self._compare(state["settings"])
        for name, obj in objects.items():
            if name == "scaler" and not state["objects"].get(name):  # that of a run without mixed precision has none
                continue
            try:
                obj.load_state_dict(state["objects"][name])
            except (KeyError, RuntimeError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise RuntimeError(
                    f"{self.path.name}: the state of {name!r} does not fit ({reason}); {_OTHER}"
                ) from error
        self.counters.update({name: state["counters"][name] for name in self.counters})
        engine.state.epoch, engine.state.iteration = state["trainer"]["epoch"], state["trainer"]["iteration"]
        if self.evaluator is not None:
            for name, value in state.get("evaluator", {}).items():
                setattr(self.evaluator.state, name, value)
        logger.info("resumed after epoch %d from %s", engine.state.epoch, self.path.name)
        if engine.state.max_epochs is not None and engine.state.epoch >= engine.state.max_epochs:
            logger.info("all %d epochs are done already; raise the number of epochs to go on", engine.state.max_epochs)
            engine.terminate()

    def _read(self) -> dict[str, Any]:
        try:
            state: Any = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            # torch's advice for what is no file of weights is to load it with less care: not repeated here.
            unpickling = isinstance(error, pickle.UnpicklingError) or not str(error)
            reason = type(error).__name__ if unpickling else str(error).splitlines()[0]
            raise RuntimeError(
                f"{self.path.name}: the last state of this run cannot be read ({reason}); move it away to start again."
            ) from error
        parts = {"objects", "counters", "trainer", "settings"}
        missing = sorted(parts - (set(state) if isinstance(state, dict) else set()))
        if missing:
            raise RuntimeError(f"{self.path.name}: is no state of a run, it lacks {missing}; {_OTHER}")
        return dict(state)

    def _compare(self, saved: Mapping[str, Any] | None) -> None:
        if self.settings is None:
            return
        if saved is None:
            logger.warning("%s does not tell the settings of its run: they are not compared", self.path.name)
            return
        changed = [
            f"{name} was {saved.get(name, 'not set')!r}, is {self.settings.get(name, 'not set')!r}"
            for name in sorted({*saved, *self.settings})
            # None is a setting too.
            if (name in saved, saved.get(name)) != (name in self.settings, self.settings.get(name))
        ]
        if changed:
            more = f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
            raise RuntimeError(
                f"{self.path.name}: belongs to a run with other settings: {'; '.join(changed[:_SHOWN])}{more}; choose "
                "another output_dir, set them back, or move the file away to start again."
            )
