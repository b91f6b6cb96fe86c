"""From a collated batch to what a MONAI trainer takes: the image and the targets of each loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from monai.engines import PrepareBatch
from torch import Tensor

from medconstraints.losses.base import TargetLoss

__all__ = ["PrepareBatchTargets", "source_file"]


def source_file(image: Any) -> str | None:
    """Name of the file that an image, or a batch of them, was read from, where its meta data tell."""
    file = image.meta.get("filename_or_obj") if isinstance(image, MetaTensor) else None
    names = file if isinstance(file, list | tuple) else [file] if file else []
    return ", ".join(Path(str(name)).name for name in names) or None


class PrepareBatchTargets(PrepareBatch):
    """`prepare_batch` of a trainer: `(image, {key: target})`, with the targets that the loss says it reads.

    `TargetTrainer` makes its own, and leaves the label where training metrics look for it. MONAI's `SupervisedTrainer`
    shows its metrics the mapping instead.

    Args:
        loss: its `target_keys` must be in the batch, its `optional_keys` are taken if they are.
        target_keys: keys that must be in the batch; None takes those of the loss.
        host_keys: keys whose entries stay on the CPU; None takes those of the loss.
        image_key: key of the image.

    Raises:
        TypeError: the loss does not say what it reads; one of MONAI's needs no `prepare_batch`.
        ValueError: neither a loss nor target keys.
        KeyError: at the call, when the batch lacks a key; the message names the volumes and lists what there is.

    Example:
        >>> prepare = PrepareBatchTargets(target_keys=["bounds"])
        >>> image, target = prepare({"image": torch.zeros(1, 1, 2, 2), "bounds": torch.zeros(1, 2, 1, 2)})
        >>> list(target)
        ['bounds']
    """

    def __init__(
        self,
        loss: TargetLoss | None = None,
        *,
        target_keys: Iterable[str] | None = None,
        host_keys: Iterable[str] | None = None,
        image_key: str = "image",
    ) -> None:
        if loss is not None and not isinstance(loss, TargetLoss):
            raise TypeError(
                f"loss: expected one that says its target_keys, such as CombinedLoss, got {type(loss).__name__}; put "
                "it into a CombinedLoss, or leave prepare_batch out: MONAI's default gives image and label."
            )
        if loss is None and target_keys is None:
            raise ValueError("loss, target_keys: expected one of them, got none; give the loss that is trained.")
        self.target_keys = tuple(loss.target_keys if loss and target_keys is None else target_keys or ())
        self.optional_keys = tuple(loss.optional_keys) if loss else ()
        self.host_keys = frozenset(loss.host_keys if loss and host_keys is None else host_keys or ())
        self.image_key = image_key

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Move the image and the targets to the device."""
        missing = [key for key in (self.image_key, *self.target_keys) if key not in batchdata]
        if missing:
            file = source_file(batchdata.get(self.image_key))
            raise KeyError(
                f"batch{f' of {file}' if file else ''}: no {missing}, it has {sorted(map(str, batchdata))}; add the "
                "transform that makes them, and keep them in the selection of items."
            )
        image = batchdata[self.image_key].to(device=device, non_blocking=non_blocking, **kwargs)
        keys = [*self.target_keys, *(key for key in self.optional_keys if key in batchdata)]
        return image, {key: self._moved(key, batchdata[key], device, non_blocking) for key in keys}

    def _moved(self, key: str, value: Any, device: str | torch.device | None, non_blocking: bool) -> Any:
        if key in self.host_keys or not isinstance(value, Tensor):
            return value
        return value.to(device=device, non_blocking=non_blocking)
