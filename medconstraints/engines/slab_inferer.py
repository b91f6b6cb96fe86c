"""Sliding windows over a large volume, in the memory of a slab."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import torch
from monai.data import MetaTensor
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import SlidingWindowInferer
from monai.inferers.utils import _get_scan_interval
from monai.utils import PytorchPadMode, ensure_tuple_rep, fall_back_tuple, look_up_option
from torch import Tensor
from torch.nn import functional as F

from medconstraints.checks import plain

__all__ = ["SlabInferer"]

LARGE = 1 << 25  # voxels, from which on slabs are worth it
LEAST = -6e4  # of a logit below the largest of its voxel: half precision ends there, and its softmax is 0


class SlabInferer(SlidingWindowInferer):
    """MONAI's `SlidingWindowInferer`, which blends a large volume slab by slab and keeps little of it.

    Of an image that was only turned since it was read, the class that is most probable and its probability are kept:
    the classes of a voxel are never compared with those of another. Of other images, and with `whole`, all logits are
    kept in half precision, less the largest of their voxel: softmax is the same, and where classes are nearly equally
    probable the numbers are exact.

    Args:
        args: of `SlidingWindowInferer`, which does all other volumes.
        whole: keep the logits of all classes.
        large: voxels of a volume that is blended slab by slab.
        options: as `args`.

    Raises:
        ValueError: at the call, when the network's output has another shape than its window.
    """

    def __init__(self, *args: Any, whole: bool = False, large: int = LARGE, **options: Any) -> None:
        super().__init__(*args, **options)
        self.whole = whole
        self.large = large

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
        """Of an image (1, channels, *S) what MONAI's gives; of a large one what is kept, on the CPU.

        That is logits (1, C, *S) float16, or {"classes": (1, 1, *S) uint8, "probability": (1, 1, *S) float16}.
        """
        others = self.with_coord or not kwargs.keys().isdisjoint({"process_fn", "condition"})
        if others or len(inputs) > 1 or inputs.shape[2:].numel() < self.large:
            return super().__call__(inputs, network, *args, **kwargs)
        slabs = self._slabs(plain(inputs), lambda windows: network(windows, *args, **kwargs))
        size = inputs.shape[2:]
        if self.whole or not _only_turned(inputs):
            logits = None
            for start, plane in slabs:
                if logits is None:
                    logits = torch.empty(1, len(plane), *size, dtype=torch.float16)
                logits[0, :, start] = (plane - plane.amax(0)).clamp_(min=LEAST)
            return MetaTensor(logits).copy_meta_from(inputs) if isinstance(inputs, MetaTensor) else logits
        classes = torch.empty(1, 1, *size, dtype=torch.uint8)
        probability = torch.empty(1, 1, *size, dtype=torch.float16)
        for start, plane in slabs:
            probability[0, 0, start], classes[0, 0, start] = plane.softmax(0).max(0)
        return {"classes": classes, "probability": probability}

    def _slabs(self, image: Tensor, network: Callable[[Tensor], Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Number of each plane across the first axis, in order, and its logits (C, *S[1:])."""
        dims, size = image.dim() - 2, image.shape[2:]
        roi = fall_back_tuple(self.roi_size, size)
        margins = [max(side - full, 0) for side, full in zip(roi, size, strict=True)]
        if any(margins):
            pad = [end for margin in reversed(margins) for end in (margin // 2, margin - margin // 2)]
            image = F.pad(image, pad, mode=look_up_option(self.padding_mode, PytorchPadMode), value=self.cval)
        inside = [slice(margin // 2, margin // 2 + side) for margin, side in zip(margins, size, strict=True)]
        full = image.shape[2:]
        windows = dense_patch_slices(
            full, roi, _get_scan_interval(full, roi, dims, ensure_tuple_rep(self.overlap, dims))
        )
        weights = compute_importance_map(roi, self.mode, self.sigma_scale, image.device, torch.float32)
        sums, counts = torch.empty(0), torch.zeros(roi[0], *full[1:], device=image.device)
        rows = [list(row) for _, row in groupby(windows, lambda window: window[0].start)]
        starts = [row[0][0].start for row in rows]
        for row, start, after in zip(rows, starts, [*starts[1:], full[0]], strict=True):
            for number in range(0, len(row), self.sw_batch_size):
                batch = row[number : number + self.sw_batch_size]
                found = plain(network(torch.cat([image[(slice(None), slice(None), *window)] for window in batch])))
                if tuple(found.shape[2:]) != tuple(roi):
                    raise ValueError(
                        f"network: expected an output of the window's shape {tuple(roi)}, got {tuple(found.shape[2:])}."
                    )
                if not len(sums):
                    sums = torch.zeros(found.shape[1], *counts.shape, device=image.device)
                for one, window in zip(found.float(), batch, strict=True):
                    sums[(slice(None), slice(None), *window[1:])] += one * weights
                    counts[(slice(None), *window[1:])] += weights
            # No later window reaches the planes before its start. The others move up.
            for plane in range(after - start):
                if 0 <= start + plane - inside[0].start < size[0]:
                    shown = (slice(None), *inside[1:])
                    yield start + plane - inside[0].start, (sums[:, plane] / counts[plane])[shown]
            for buffer, axis in ((sums, 1), (counts, 0)):
                rest = roi[0] - (after - start)
                for plane in range(rest):
                    buffer.select(axis, plane).copy_(buffer.select(axis, plane + after - start))
                buffer.narrow(axis, rest, after - start).zero_()


def _only_turned(image: Tensor) -> bool:
    operations = getattr(image, "applied_operations", None) or [[{"class": None}]]
    return all(operation["class"] == "Orientation" for operation in operations[0])
