"""From a collated batch to what a stock MONAI trainer takes: the image and the targets of each loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine
from monai.engines import IterationEvents, PrepareBatch
from monai.utils.enums import CommonKeys
from torch import Tensor

__all__ = ["PrepareBatchTargets", "RestoreLabelHandler"]


class PrepareBatchTargets(PrepareBatch):
    """`prepare_batch` of a trainer: `(image, {key: target})`.

    Args:
        target_keys: keys of the batch that the losses need.
        host_keys: those of them that stay on the CPU: boxes, which `BoxPriorLoss` plans there. Others are ignored.
        image_key: key of the image.

    Raises:
        KeyError: at the call, when the batch lacks a key; the message lists what it has.
    """

    def __init__(
        self,
        target_keys: Sequence[str] = ("boxes",),
        *,
        host_keys: Sequence[str] = ("boxes",),
        image_key: str = "image",
    ) -> None:
        self.target_keys = tuple(target_keys)
        self.host_keys = frozenset(host_keys) & frozenset(target_keys)
        self.image_key = image_key

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Move the image and the targets to the device."""
        missing = [key for key in (self.image_key, *self.target_keys) if key not in batchdata]
        if missing:
            raise KeyError(
                f"batch: no {missing}, it has {sorted(map(str, batchdata))}; add the transform that makes them."
            )
        image = batchdata[self.image_key].to(device=device, non_blocking=non_blocking, **kwargs)
        targets = {
            key: batchdata[key]
            if key in self.host_keys
            else batchdata[key].to(device=device, non_blocking=non_blocking)
            for key in self.target_keys
        }
        return image, targets


class RestoreLabelHandler:
    """Puts the plain label back into the trainer's output after the backward pass.

    A trainer hands its target on to postprocessing and metrics; with `PrepareBatchTargets` that is a dictionary, which
    neither can read. This handler replaces it by the label of the batch, or removes it when the batch has no label.

    Args:
        label_key: key of the label in the batch.
    """

    def __init__(self, label_key: str = "label") -> None:
        self.label_key = label_key

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer; acts before decollation."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Replace or remove the label entry."""
        output: Any = engine.state.output
        batch: Any = engine.state.batch
        if self.label_key in batch:
            output[CommonKeys.LABEL] = batch[self.label_key].to(output[CommonKeys.PRED].device)
        else:
            output.pop(CommonKeys.LABEL, None)
