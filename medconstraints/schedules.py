"""Schedules: pure functions of the step, so that a resumed or prolonged run needs no state."""

from __future__ import annotations

import math

__all__ = ["cosine_decay"]


def cosine_decay(step: int, total: int) -> float:
    """Half a cosine from 1 at step 0 to 0 at `total`, then 0: a factor for `torch.optim.lr_scheduler.LambdaLR`.

    Unlike `CosineAnnealingLR`, whose state keeps the length of the first run, a run that is resumed with more epochs
    goes on along the longer cosine.

    Args:
        step: epochs done, >= 0.
        total: epochs of the run, >= 1.

    Raises:
        ValueError: `total` is below 1 or `step` negative.

    Example:
        >>> [round(cosine_decay(step, 4), 3) for step in (0, 2, 4, 5)]
        [1.0, 0.5, 0.0, 0.0]
    """
    if total < 1 or step < 0:
        raise ValueError(f"step, total: expected step >= 0 and total >= 1, got {step} and {total}.")
    return 0.5 * (1 + math.cos(math.pi * min(step, total) / total))
