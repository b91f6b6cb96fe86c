"""From a collated batch to what a stock MONAI trainer takes: the image and the targets of each loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.engines import PrepareBatch
from torch import Tensor

__all__ = ["PrepareBatchTargets"]


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
