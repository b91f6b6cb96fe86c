"""Inference over many volumes, where one bad file does not stop the others."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset, list_data_collate
from monai.engines import IterationEvents, SupervisedEvaluator
from monai.inferers import Inferer
from monai.transforms import Transform
from monai.utils.enums import CommonKeys
from torch import nn

from medconstraints.data.output_folders import mask_path
from medconstraints.engines.prepare_batch import source_file

__all__ = ["TolerantDataset", "TolerantEvaluator", "collate_or_failure"]

logger = logging.getLogger(__name__)

_FAILURE = "failure"


def _reason(error: BaseException) -> str:
    """First line of the error's message, without MONAI's 'applying transform ...' around it."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0]


class TolerantDataset(Dataset):
    """Data set whose item is `{"failure": reason, "file": name}` when its transform fails, instead of an exception.

    Args:
        data: items, dictionaries with a file path under `image_key`.
        transform: transform of an item.
        image_key: key of the file path.
    """

    def __init__(self, data: Sequence[Any], transform: Any = None, *, image_key: str = "image") -> None:
        super().__init__(data, transform)
        self.image_key = image_key

    def __getitem__(self, index: int) -> Any:
        """Transformed item, or the failure."""
        try:
            return super().__getitem__(index)
        except Exception as error:
            file = self.data[index][self.image_key]
            # Of several channels the first file names the mask.
            return {_FAILURE: _reason(error), "file": str(file[0] if isinstance(file, list) else file)}


def collate_or_failure(batch: Sequence[Any]) -> Any:
    """MONAI's `list_data_collate`, or the failure itself; for batches of one item.

    Raises:
        ValueError: a failure in a batch of several items.
    """
    if any(_FAILURE in item for item in batch):
        if len(batch) > 1:
            raise ValueError(f"batch_size: expected 1 for inference that survives bad files, got {len(batch)}.")
        return dict(batch[0])
    return list_data_collate(batch)


class TolerantEvaluator(SupervisedEvaluator):
    """MONAI's `SupervisedEvaluator` that goes on after a failing volume and reports all failures at the end.

    A volume that cannot be read, and one whose inference or saving fails, is written down with its reason. At the end a
    list is logged, and written as `report_path` when that is given.

    Args:
        device: where the network is.
        network: the network.
        dataset: the volumes, one in a batch.
        val_data_loader: batches of one volume with `collate_or_failure`, in place of `dataset`.
        inferer, postprocessing, val_handlers: as in MONAI.
        amp: mixed precision; None uses it on a GPU.
        report_path: JSON file for the names of the files done and of those that failed with reasons, or None. That of
            a former run is removed at the start.
        output_dir: folder of the masks, see `SaveMaskd`. The mask that a failing volume has there from a former run is
            renamed to `<mask>.old`: it must not look like one of this run. None leaves masks alone.
        postfix: of the masks' names.

    Raises:
        ValueError: both or none of `dataset` and `val_data_loader`.
        RuntimeError: at the end of a run in which every volume failed.
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
        report_path: str | Path | None = None,
        output_dir: str | Path | None = None,
        postfix: str = "seg",
    ) -> None:
        if (dataset is None) == (val_data_loader is None):
            raise ValueError("dataset, val_data_loader: expected exactly one of them; a data set gets its own loader.")
        if val_data_loader is None:
            val_data_loader = DataLoader(dataset, collate_fn=collate_or_failure)
        device = torch.device(device)
        self.report_path = None if report_path is None else Path(report_path)
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.postfix = postfix
        self.failures: list[dict[str, str]] = []
        self.done: list[str] = []
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

    def _start(self, engine: Engine) -> None:
        self.failures, self.done = [], []
        if self.report_path is not None:
            self.report_path.unlink(missing_ok=True)

    def _iteration(self, engine: Any, batchdata: Any) -> Any:
        if _FAILURE in batchdata:
            self._fail(batchdata["file"], batchdata[_FAILURE])
            return {}
        name = source_file(batchdata["image"]) or "volume"
        try:
            output = super()._iteration(engine, batchdata)
        except Exception as error:
            engine.state.output = {}
            self._fail(name, _reason(error))
            return {}
        self.done.append(name)
        return output

    @staticmethod
    def _check_finite(engine: Any) -> None:
        if not bool(torch.isfinite(engine.state.output[CommonKeys.PRED]).all()):
            raise ValueError(
                "the network's output has NaN or infinite values: its weights are not sound, or such are in the image"
            )

    def _fail(self, file: str, reason: str) -> None:
        self.failures.append({"file": Path(file).name, "reason": reason})
        logger.error("%s failed: %s", Path(file).name, reason)
        if self.output_dir is None:
            return
        mask = mask_path(self.output_dir, file, postfix=self.postfix)
        if mask.exists():
            os.replace(mask, mask.with_name(mask.name + ".old"))
            logger.warning("%s: its mask of a former run is now called %s.old", Path(file).name, mask.name)

    def _finish(self, engine: Engine) -> None:
        if self.report_path is not None:
            self.report_path.parent.mkdir(parents=True, exist_ok=True)
            self.report_path.write_text(json.dumps({"done": self.done, "failed": self.failures}, indent=2) + "\n")
        total = len(self.done) + len(self.failures)
        lines = [f"  {f['file']}: {f['reason']}" for f in self.failures]
        logger.log(
            logging.ERROR if lines else logging.INFO, "\n".join([f"{len(self.done)} of {total} volumes done", *lines])
        )
        if total and not self.done:
            raise RuntimeError("every volume failed:\n" + "\n".join(lines))
