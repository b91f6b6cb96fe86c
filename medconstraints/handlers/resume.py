"""Runs that can be killed: the best weights, and a last state from which training goes on exactly."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data.utils import set_rnd
from torch import nn

__all__ = ["EpochSeedHandler", "ResumeHandler", "SamplerEpochHandler", "SaveBestHandler", "SaveLatestHandler"]

logger = logging.getLogger(__name__)


def _save(state: Any, path: Path) -> None:
    """Write beside and rename: a run killed while it writes leaves the former file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    torch.save(state, beside)
    os.replace(beside, path)


def _unwrapped(obj: Any) -> Any:
    """The network inside DistributedDataParallel: its weights then have the same names with one and many processes."""
    return obj.module if isinstance(obj, nn.parallel.DistributedDataParallel) else obj


class EpochSeedHandler:
    """Seeds torch, numpy and the random transforms from the epoch's number at its start.

    A run that resumes at epoch k then draws what the uninterrupted run drew there. Epochs differ from each other.

    Args:
        seed: seed of the run.
        dataset: training data set whose transforms are seeded, or None.
        rank: number of this process in distributed training; each process augments differently.
    """

    def __init__(self, seed: int, dataset: Any = None, *, rank: int = 0) -> None:
        self.seed = int(seed)
        self.dataset = dataset
        self.rank = int(rank)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed."""
        seed = (self.seed + 1_000_003 * engine.state.epoch + 7919 * self.rank) % 2**31
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - transforms of other packages draw from the global generator
        random.seed(seed)
        if self.dataset is not None:
            set_rnd(self.dataset, seed=seed)


class SamplerEpochHandler:
    """Tells a distributed sampler the epoch, which shuffles by it.

    Args:
        sampler: anything with `set_epoch`, such as MONAI's `DistributedSampler`.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Set the epoch."""
        self.sampler.set_epoch(engine.state.epoch)


class SaveBestHandler:
    """Saves the network's weights whenever the evaluator's key metric is better than ever before.

    MONAI's `CheckpointSaver` does so too, but forgets the best value when training resumes; this one reads
    `evaluator.state.best_metric`, which `ResumeHandler` restores. The file is a plain state dictionary.

    Args:
        network: the network.
        path: file to write, such as `models/model.pt`.
    """

    def __init__(self, network: nn.Module, path: str | Path) -> None:
        self.network = network
        self.path = Path(path)

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator that has a key metric."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Save if this validation was the best one."""
        if engine.state.best_metric_epoch == engine.state.epoch:
            _save(_unwrapped(self.network).state_dict(), self.path)
            logger.info("best key metric %.4f: saved %s", engine.state.best_metric, self.path.name)


class SaveLatestHandler:
    """Saves the network's weights after each epoch of a run without validation, which knows no best ones.

    Args:
        network: the network.
        path: file to write, such as `output/model.pt`.
    """

    def __init__(self, network: nn.Module, path: str | Path) -> None:
        self.network = network
        self.path = Path(path)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.STARTED, self._tell)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def _tell(self, engine: Engine) -> None:
        logger.warning(
            "no validation volume has a label: nothing is validated, %s gets the weights of the latest epoch",
            self.path.name,
        )

    def __call__(self, engine: Engine) -> None:
        """Save."""
        _save(_unwrapped(self.network).state_dict(), self.path)


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON makes of the settings: tuples become lists, as they are once they were saved."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    except (TypeError, ValueError) as error:
        raise TypeError(f"settings: expected numbers, strings, lists and dictionaries ({error}).") from error
    return plain


class ResumeHandler:
    """Saves everything a run needs after each epoch, and goes on from there when the file exists at the start.

    Put it last among the trainer's handlers, so that it saves what the others changed. The trainer's gradient scaler
    of mixed precision is kept too: it would skip the first steps of a resumed run until its scale fits again.

    Args:
        path: the file, such as `output/last.pt`.
        objects: name -> object with `state_dict` and `load_state_dict`: network, optimizer, scheduler, loss.
        evaluator: its best metric is kept too, or None.
        save: False for all but the first process of distributed training: they load but do not write.
        settings: what must be the same when the run goes on, in types of JSON; kept in the file and compared with it.

    Raises:
        TypeError: the settings are not of JSON's types.
        RuntimeError: at the start of a run, when the file cannot be read or belongs to another run.
    """

    def __init__(
        self,
        path: str | Path,
        objects: Mapping[str, Any],
        *,
        evaluator: Engine | None = None,
        save: bool = True,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.objects = {name: _unwrapped(obj) for name, obj in objects.items()}
        self.evaluator = evaluator
        self.save = save
        self.settings = None if settings is None else _as_json(settings)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.STARTED, self._load)
        if self.save:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)

    def _write(self, engine: Engine) -> None:
        state: dict[str, Any] = {name: obj.state_dict() for name, obj in self.objects.items()}
        state["trainer"] = {"epoch": engine.state.epoch, "iteration": engine.state.iteration}
        if getattr(engine, "scaler", None) is not None:
            state["scaler"] = engine.scaler.state_dict()
        if self.settings is not None:
            state["settings"] = self.settings
        if self.evaluator is not None:
            best = self.evaluator.state
            state["evaluator"] = {"best_metric": float(best.best_metric), "best_metric_epoch": best.best_metric_epoch}
        _save(state, self.path)

    def _load(self, engine: Engine) -> None:
        if not self.path.exists():
            return
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            # torch's advice for what is no file of weights is to load it with less care: not repeated here.
            unpickling = isinstance(error, pickle.UnpicklingError) or not str(error)
            reason = type(error).__name__ if unpickling else str(error).splitlines()[0]
            raise RuntimeError(
                f"{self.path.name}: the last state of this run cannot be read ({reason}); move it away to start again."
            ) from error
        known = set(state) if isinstance(state, dict) else set()
        missing = sorted({*self.objects, "trainer"} - known)
        if missing:
            raise RuntimeError(f"{self.path.name}: has no state of {missing}; it belongs to another run, move it away.")
        self._compare(state)
        for name, obj in self.objects.items():
            try:
                obj.load_state_dict(state[name])
            except (KeyError, RuntimeError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise RuntimeError(
                    f"{self.path.name}: the state of {name!r} does not fit ({reason}); it belongs to another run, or "
                    "this one was changed; move it away to start again."
                ) from error
        engine.state.epoch, engine.state.iteration = state["trainer"]["epoch"], state["trainer"]["iteration"]
        if getattr(engine, "scaler", None) is not None and state.get("scaler"):
            engine.scaler.load_state_dict(state["scaler"])
        if self.evaluator is not None and "evaluator" in state:
            self.evaluator.state.best_metric = state["evaluator"]["best_metric"]
            self.evaluator.state.best_metric_epoch = state["evaluator"]["best_metric_epoch"]
        logger.info("resumed after epoch %d from %s", engine.state.epoch, self.path.name)
        if engine.state.max_epochs is not None and engine.state.epoch >= engine.state.max_epochs:
            logger.info("all %d epochs are done already; raise the number of epochs to go on", engine.state.max_epochs)
            engine.terminate()

    def _compare(self, state: Mapping[str, Any]) -> None:
        if self.settings is None:
            return
        if "settings" not in state:
            logger.warning("%s does not tell the settings of its run: they are not compared", self.path.name)
            return
        saved = state["settings"]
        nothing = object()
        changed = [
            f"{name} was {saved.get(name, 'not set')!r}, is {self.settings.get(name, 'not set')!r}"
            for name in sorted({*saved, *self.settings})
            if saved.get(name, nothing) != self.settings.get(name, nothing)
        ]
        if changed:
            raise RuntimeError(
                f"{self.path.name}: belongs to a run with other settings: {'; '.join(changed)}; choose another "
                "output_dir, set them back, or move the file away to start again."
            )
