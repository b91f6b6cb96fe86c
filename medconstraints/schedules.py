"""Schedules: pure functions of the step, so that a resumed or prolonged run needs no state."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from numbers import Real

__all__ = ["AlphaSchedule", "alpha_weights", "cosine_decay"]

_ALPHA_SCHEDULES = ("alone", "constant", "increase", "none", "rebalance")


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


def alpha_weights(
    schedule: str,
    epoch: int,
    *,
    alpha: float = 0.01,
    increment: float | None = 0.01,
    max_alpha: float = 1.0,
    floor: float = 0.01,
    total: int | None = None,
) -> tuple[float, float]:
    """Weights of a regional and a boundary loss in an epoch (Kervadec 2020, eq. 4.6 and section 4.3.4).

    With `a = min(alpha + increment * epoch, max_alpha)`, which rises at the end of each epoch:

    | schedule | regional weight | boundary weight |
    |---|---|---|
    | `"rebalance"` | `max(1 - a, floor)` | `a` |
    | `"increase"` | 1 | `a` |
    | `"constant"` | 1 | `alpha` |
    | `"none"` | 1 | 0 |
    | `"alone"` | 0 | 1 |

    The thesis starts with 0.01 and adds 0.01, so that `a` is 1 in the 100th epoch. Its regional weight of "rebalance"
    never reaches 0, because an empty segmentation is close to a local minimum of the boundary loss; it does not tell
    the `floor`.

    Args:
        schedule: one of the words above.
        epoch: epochs done, >= 0.
        alpha: boundary weight of the first epoch, or of all for `"constant"`.
        increment: what is added after each epoch; None for the one that reaches `max_alpha` in the last of `total`
            epochs, `(max_alpha - alpha) / (total - 1)`, so that a run of another length needs no tuning. A run that is
            prolonged then goes on along the slower rise.
        max_alpha: largest boundary weight of `"increase"` and `"rebalance"`.
        floor: smallest regional weight of `"rebalance"`, in [0, 1].
        total: epochs of the run, read when `increment` is None. The weights of a run of one epoch are the first ones.

    Returns:
        Regional weight, boundary weight.

    Raises:
        ValueError: an unknown word; a number that is negative or not finite; `floor` above 1; `alpha` above `max_alpha`
            where it rises; neither `increment` nor `total`.

    Example:
        >>> [alpha_weights("rebalance", epoch, alpha=0.25, increment=0.25) for epoch in (0, 1, 9)]
        [(0.75, 0.25), (0.5, 0.5), (0.01, 1.0)]
        >>> [alpha_weights("increase", epoch, alpha=0.5, increment=None, total=3) for epoch in (0, 1, 2, 3)]
        [(1.0, 0.5), (1.0, 0.75), (1.0, 1.0), (1.0, 1.0)]
    """
    if schedule not in _ALPHA_SCHEDULES:
        raise ValueError(f"schedule: expected one of {list(_ALPHA_SCHEDULES)}, got {schedule!r}.")
    numbers: dict[str, object] = {"epoch": epoch, "alpha": alpha, "max_alpha": max_alpha, "floor": floor}
    if increment is not None:
        numbers["increment"] = increment
    for name, value in numbers.items():
        if not isinstance(value, Real) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}.")
    if floor > 1:
        raise ValueError(f"floor: expected a number in [0, 1], the smallest 1 - alpha, got {floor!r}.")
    if increment is None:
        if total is None or not total >= 1:
            raise ValueError(
                f"total: expected the number of epochs, >= 1, with increment=None, got {total!r}; give it or an "
                "increment."
            )
        increment = (max_alpha - alpha) / max(total - 1, 1)
    if schedule in ("none", "alone"):
        return (1.0, 0.0) if schedule == "none" else (0.0, 1.0)
    if schedule == "constant":
        return 1.0, float(alpha)
    if alpha > max_alpha:
        raise ValueError(f"alpha: expected at most max_alpha = {max_alpha!r}, to which it rises, got {alpha!r}.")
    risen = float(min(alpha + increment * epoch, max_alpha))
    return (1.0 if schedule == "increase" else float(max(1 - risen, floor))), risen


@dataclass(frozen=True)
class AlphaSchedule:
    """`alpha_weights` for `LossWeightHandler`: epochs done -> {name of a loss: its weight}.

    Equal schedules are equal, and print alike; `dataclasses.asdict` makes settings for `ResumeHandler` of one.

    Args:
        schedule: "rebalance", "increase", "constant", "none" or "alone", see `alpha_weights`.
        regional: name of the regional loss in `CombinedLoss`.
        boundary: name of the boundary loss there.
        alpha, increment, max_alpha, floor, total: see `alpha_weights`.

    Raises:
        ValueError: as `alpha_weights` does, or both losses have the same name.

    Example:
        >>> AlphaSchedule("increase", regional="dice", alpha=0.5)(epoch=0)
        {'dice': 1.0, 'boundary': 0.5}
    """

    schedule: str = "rebalance"
    _: KW_ONLY
    regional: str = "regional"
    boundary: str = "boundary"
    alpha: float = 0.01
    increment: float | None = 0.01
    max_alpha: float = 1.0
    floor: float = 0.01
    total: int | None = None

    def __post_init__(self) -> None:
        if self.regional == self.boundary:
            raise ValueError(f"regional, boundary: expected the names of two losses, got {self.regional!r} for both.")
        self(0)  # shows at once what is wrong

    def __call__(self, epoch: int) -> dict[str, float]:
        """Weights of both losses after `epoch` epochs."""
        regional, boundary = alpha_weights(
            self.schedule,
            epoch,
            alpha=self.alpha,
            increment=self.increment,
            max_alpha=self.max_alpha,
            floor=self.floor,
            total=self.total,
        )
        return {self.regional: regional, self.boundary: boundary}
