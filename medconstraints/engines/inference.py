"""Inference over many volumes, where one bad file does not stop the others."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset, list_data_collate
from monai.engines import IterationEvents, SupervisedEvaluator
from monai.inferers import Inferer
from monai.transforms import Transform
from monai.utils.enums import CommonKeys
from torch import nn
from torch.utils.data import Subset
from tqdm import tqdm  # type: ignore[import-untyped]

from medconstraints.checks import plain
from medconstraints.data.inference_files import INFERENCE_REPORT, RESULTS
from medconstraints.data.output_folders import mask_path
from medconstraints.writing import set_aside, write_text

__all__ = ["TolerantDataset", "TolerantEvaluator", "collate_or_failure"]

logger = logging.getLogger(__name__)

_TOLD = ("name", "mask", "file", "state", "reason")
_WITH_MASK = ("done", "kept")
_STATES = {"refused": "failed", "left_out": "left out", "kept": "kept"}


def _reason(error: BaseException) -> str:
    """First line of the error's message, without MONAI's 'applying transform ...' around it."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0]


class TolerantDataset(Dataset):
    """Data set whose item is `{"state": "failed", "reason": ..., "name": ...}` when its transform fails.

    Every item gets its "name", the path of its "mask", and its "file". Items that are not to be segmented (see
    `volumes_for_inference`) come as such, with the state "failed", "left out" or "kept", and are not read.

    Args:
        data: items, dictionaries with a file path under `image_key`.
        transform: transform of an item.
        image_key: key of the file path.
    """

    def __init__(self, data: Sequence[Any], transform: Any = None, *, image_key: str = "image") -> None:
        super().__init__(data, transform)
        self.image_key = image_key

    def __getitem__(self, index: int) -> Any:
        """Transformed item, or what became of it."""
        item = self.data[index]
        file = item[self.image_key]
        file = str(file[0] if isinstance(file, list) else file)  # of several channels the first names the mask
        told = {"name": item.get("name", Path(file).name), "mask": item.get("mask", ""), "file": file}
        for key, state in _STATES.items():
            if key in item:
                return {**told, "state": state, "reason": item[key]}
        try:
            return {**super().__getitem__(index), **told}
        except Exception as error:
            return {**told, "state": "failed", "reason": _reason(error)}


def collate_or_failure(batch: Sequence[Any]) -> Any:
    """MONAI's `list_data_collate`, or what became of an item; for batches of one item.

    Raises:
        ValueError: a failure in a batch of several items.
    """
    if any("state" in item for item in batch):
        if len(batch) > 1:
            raise ValueError(f"batch_size: expected 1 for inference that survives bad files, got {len(batch)}.")
        return dict(batch[0])
    return list_data_collate(batch)


class TolerantEvaluator(SupervisedEvaluator):
    """MONAI's `SupervisedEvaluator` that goes on after a failing volume and tells of all volumes at the end.

    A volume that cannot be read, and one whose inference or saving fails, is written down with its reason. At the end a
    summary is logged, and everything written to `inference.json` in `output_dir`. Started as several processes, each
    takes its share of the data set, and the first one tells of all.

    Args:
        device: where the network is.
        network: the network.
        dataset: the volumes, one in a batch.
        val_data_loader: batches of one volume with `collate_or_failure`, in place of `dataset`.
        inferer, postprocessing, val_handlers: as in MONAI.
        amp: mixed precision; None uses it on a GPU.
        output_dir: folder of the masks, see `SaveMaskd`, and of the report; that of a former run is removed at the
            start. The mask that a failing volume has there from a former run is renamed to `<mask>.old`: it must not
            look like one of this run. None writes nothing.
        postfix: of the masks' names, for items without "mask".

    Attributes:
        rows: of each volume "name", "state" ("done", "failed", "left out" or "kept"), "reason", "mask", "seconds", and
            "image", the path, which reports do not tell.

    Raises:
        ValueError: both or none of `dataset` and `val_data_loader`.
    """

    def __init__(
        self,
        *,
        device: str | torch.device,
        network: nn.Module,
        dataset: TolerantDataset | None = None,
        val_data_loader: Iterable[Any] | None = None,
        inferer: Inferer | None = None,
        postprocessing: Transform | None = None,
        val_handlers: Sequence[Any] | None = None,
        amp: bool | None = None,
        output_dir: str | Path | None = None,
        postfix: str = "seg",
    ) -> None:
        if (dataset is None) == (val_data_loader is None):
            raise ValueError("dataset, val_data_loader: expected exactly one of them; a data set gets its own loader.")
        if dataset is not None:
            share: Any = Subset(dataset, range(idist.get_rank(), len(dataset), idist.get_world_size()))
            val_data_loader = DataLoader(share, collate_fn=collate_or_failure)
        device = torch.device(device)
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.postfix = postfix
        self.rows: list[dict[str, Any]] = []
        super().__init__(
            device=device,
            val_data_loader=val_data_loader,
            network=network,
            inferer=inferer,
            postprocessing=postprocessing,
            val_handlers=val_handlers,
            amp=device.type == "cuda" if amp is None else amp,
        )
        self.add_event_handler(Events.STARTED, self._start)
        self.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._check_finite)
        self.add_event_handler(Events.COMPLETED, self._finish)

    @property
    def exit_status(self) -> int:
        """0 if no volume failed, 2 if all that should have been segmented did, else 1."""
        states = [row["state"] for row in self.rows]
        return 0 if "failed" not in states else 1 if "done" in states or "kept" in states else 2

    def run(self, global_epoch: int = 1) -> None:
        """Segment the volumes; a process that has none tells the others so."""
        super().run(global_epoch)
        if not self.state.epoch_length:  # MONAI has done nothing
            self._start(self)
            self._finish(self)

    def _start(self, engine: Engine) -> None:
        self.rows = []
        # On a terminal of the first process: tqdm sees where it is.
        self.bar = tqdm(total=self.state.epoch_length, desc="volumes", disable=None if idist.get_rank() == 0 else True)
        if self.output_dir is not None and idist.get_rank() == 0:
            (self.output_dir / INFERENCE_REPORT).unlink(missing_ok=True)

    def _iteration(self, engine: Any, batchdata: Any) -> Any:
        start = time.perf_counter()
        # A batch of one item is collated; what became of an item without an image is not.
        told = {key: value[0] if isinstance(value, list) else value for key, value in batchdata.items() if key in _TOLD}
        self.bar.set_postfix_str(told["name"])
        if "state" in told:
            self._add(told)
            return {}
        try:
            output = super()._iteration(engine, batchdata)
        except Exception as error:
            engine.state.output = {}
            self._add({**told, "state": "failed", "reason": _reason(error)})
            return {}
        self._add({**told, "state": "done", "reason": ""}, time.perf_counter() - start)
        return output

    @staticmethod
    def _check_finite(engine: Any) -> None:
        found = engine.state.output[CommonKeys.PRED]
        found = found["probability"] if isinstance(found, Mapping) else found  # see SlabInferer
        # In parts: of a large volume the answers of all voxels are as much as its logits.
        parts = plain(found).flatten(1).split(1 << 24, 1)
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise ValueError(
                "the network's output has NaN or infinite values: its weights are not sound, or such are in the image"
            )

    def _add(self, told: Mapping[str, str], seconds: float = 0.0) -> None:
        name, state = told["name"], told["state"]
        mask = told["mask"] or mask_path("", told["file"], postfix=self.postfix).name
        row = {"name": name, "state": state, "reason": told["reason"], "mask": mask if state in _WITH_MASK else ""}
        self.rows.append({**row, "seconds": round(seconds, 2), "image": told["file"]})
        self.bar.update()
        if state != "failed":
            return
        logger.error("%s failed: %s", name, told["reason"])
        if self.output_dir is None:
            return
        for former in (result(self.output_dir / mask) for result in RESULTS):
            if set_aside(former):
                logger.warning("%s: its mask of a former run is now called %s.old", name, former.name)

    def _finish(self, engine: Engine) -> None:
        self.bar.close()
        if idist.get_world_size() > 1:
            gathered: list[Any] = [None] * idist.get_world_size()
            torch.distributed.all_gather_object(gathered, self.rows)
            self.rows = sorted((row for rows in gathered for row in rows), key=lambda row: row["name"])
            if idist.get_rank() > 0:
                return
        by_state = {state: [row for row in self.rows if row["state"] == state] for state in ("done", *_STATES.values())}
        total = len(self.rows) - len(by_state["left out"])
        counts = [
            f"{len(rows)} {state}" for state, rows in by_state.items() if rows and state not in ("done", "failed")
        ]
        lines = [f"  {row['name']}: {row['reason']}" for row in by_state["failed"]]
        head = ", ".join([f"{len(by_state['done'])} of {total} volumes done", *counts])
        # Told before anything is written: the disk may be full.
        logger.log(logging.ERROR if lines else logging.INFO, "\n".join([head, *lines]))
        if self.output_dir is not None:
            rows = [{key: value for key, value in row.items() if key != "image"} for row in self.rows]
            write_text(self.output_dir / INFERENCE_REPORT, json.dumps({"volumes": rows}, indent=1) + "\n")
