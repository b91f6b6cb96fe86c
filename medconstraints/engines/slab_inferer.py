"""Sliding windows over a large volume, in the memory of a slab."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from monai.data import MetaTensor
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import SlidingWindowInferer
from monai.inferers.utils import _get_scan_interval
from monai.utils import ensure_tuple_rep, fall_back_tuple
from torch import Tensor
from torch.nn import functional as F

from medconstraints.checks import plain

__all__ = ["SlabInferer"]

LARGE = 1 << 25  # voxels, from which on slabs are worth it
LEAST = -6e4  # of a logit below the largest of its voxel: half precision ends there, and its softmax is 0


class SlabInferer(SlidingWindowInferer):
    """MONAI's `SlidingWindowInferer`, which blends a large volume slab by slab, to logits in half precision.

    Of each voxel the largest logit is taken off before it is rounded: softmax is the same, and where classes are nearly
    equally probable the numbers are exact. So 20 classes of a volume take a quarter of the memory, or less.

    Args:
        args: of `SlidingWindowInferer`, which does all other volumes.
        large: voxels of a volume that is blended slab by slab.
        options: as `args`.

    Raises:
        ValueError: at the call, when the network's output has another shape than its window.
    """

    def __init__(self, *args: Any, large: int = LARGE, **options: Any) -> None:
        super().__init__(*args, **options)
        self.large = large

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
        """Logits (1, C, *S) of an image (1, channels, *S), float16 on the CPU of a large one."""
        if len(inputs) > 1 or inputs.shape[2:].numel() < self.large:
            return super().__call__(inputs, network, *args, **kwargs)
        logits = self._slabs(plain(inputs), lambda windows: network(windows, *args, **kwargs))
        return MetaTensor(logits).copy_meta_from(inputs) if isinstance(inputs, MetaTensor) else logits

    def _slabs(self, image: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
        dims, size = image.dim() - 2, image.shape[2:]
        roi = fall_back_tuple(self.roi_size, size)
        margins = [max(side - full, 0) for side, full in zip(roi, size, strict=True)]
        if any(margins):
            pad = [end for margin in reversed(margins) for end in (margin // 2, margin - margin // 2)]
            image = F.pad(image, pad, mode=str(self.padding_mode.value), value=self.cval)
        full = image.shape[2:]
        steps = _get_scan_interval(full, roi, dims, ensure_tuple_rep(self.overlap, dims))
        weights = compute_importance_map(roi, self.mode, self.sigma_scale, image.device, torch.float32)
        logits = sums = None
        counts = torch.zeros(roi[0], *full[1:], device=image.device)
        done = 0
        for start, group in groupby(dense_patch_slices(full, roi, steps), lambda window: window[0].start):
            if logits is not None and sums is not None and start > done:
                _hand_out(sums, counts, logits, done, start - done)
                done = start
            row = list(group)
            for number in range(0, len(row), self.sw_batch_size):
                windows = row[number : number + self.sw_batch_size]
                found = network(torch.cat([image[(slice(None), slice(None), *window)] for window in windows]))
                if tuple(found.shape[2:]) != tuple(roi):
                    raise ValueError(
                        f"network: expected an output of the window's shape {tuple(roi)}, got {tuple(found.shape[2:])}."
                    )
                if logits is None or sums is None:
                    logits = torch.empty(1, found.shape[1], *full, dtype=torch.float16)
                    sums = torch.zeros(found.shape[1], roi[0], *full[1:], device=image.device)
                for one, window in zip(plain(found).float(), windows, strict=True):
                    sums[(slice(None), slice(None), *window[1:])] += one * weights
                    counts[(slice(None), *window[1:])] += weights
        assert logits is not None and sums is not None
        _hand_out(sums, counts, logits, done, roi[0])
        inside = [slice(margin // 2, margin // 2 + side) for margin, side in zip(margins, size, strict=True)]
        return logits[(slice(None), slice(None), *inside)]


def _hand_out(sums: Tensor, counts: Tensor, logits: Tensor, start: int, thick: int) -> None:
    """Planes that no later window reaches go from the sums to the logits, and the others move up."""
    blended = sums[:, :thick] / counts[:thick]
    blended -= blended.amax(0)
    logits[0, :, start : start + thick] = blended.clamp_(min=LEAST).half()
    for buffer, axis in ((sums, 1), (counts, 0)):
        rest = buffer.shape[axis] - thick
        buffer.narrow(axis, 0, rest).copy_(buffer.narrow(axis, thick, rest).clone())
        buffer.narrow(axis, rest, thick).zero_()
