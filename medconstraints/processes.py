"""What the processes of a distributed training know together."""

from __future__ import annotations

import ignite.distributed as idist
import torch
from torch import Tensor

__all__ = ["of_all_processes"]


def of_all_processes(rows: Tensor) -> Tensor:
    """Rows (N, ...) of all processes, in the order of the processes; each may have another number of them, or none.

    Every process has to call it, with the same shape but for N.
    """
    if idist.get_world_size() == 1:
        return rows
    counts: list[int] = idist.all_gather(rows.shape[0])
    largest = max(counts)
    if not largest:
        return rows
    # Not every backend gathers bool.
    padded = rows.new_zeros((largest, *rows.shape[1:]), dtype=torch.uint8 if rows.dtype == torch.bool else rows.dtype)
    padded[: len(rows)] = rows
    parts = torch.as_tensor(idist.all_gather(padded)).split(largest)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(rows.dtype)
