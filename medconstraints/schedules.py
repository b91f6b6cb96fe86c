"""Schedules: pure functions of the step, so that a resumed or prolonged run needs no state."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

from medconstraints import checks

__all__ = ["AlphaSchedule", "cosine_decay", "gaussian_ramp"]

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
    checks.number("total", total, least=1)
    return 0.5 * (1 + math.cos(math.pi * min(checks.number("step", step, least=0), total) / total))


def gaussian_ramp(step: int, total: int) -> float:
    """From 0.0067 at step 0 to 1 at `total`, exp(-5 (1 - step / total)^2): the weight of a teacher.

    Source: Laine and Aila 2017, "Temporal ensembling for semi-supervised learning", section 2.

    Args:
        step: epochs done, >= 0.
        total: length of the ramp, >= 1.

    Raises:
        ValueError: `total` is below 1 or `step` negative.

    Example:
        >>> [round(gaussian_ramp(step, 4), 3) for step in (0, 2, 4, 5)]
        [0.007, 0.287, 1.0, 1.0]
    """
    checks.number("total", total, least=1)
    return math.exp(-5 * (1 - min(checks.number("step", step, least=0), total) / total) ** 2)


@dataclass(frozen=True)
class AlphaSchedule:
    """Weights of a regional and a boundary loss, for `LossWeightHandler` (Kervadec 2020, eq. 4.6 and section 4.3.4).

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
    the `floor`. Equal schedules are equal, and print alike.

    Args:
        schedule: one of the words above.
        regional: name of the regional loss in `CombinedLoss`.
        boundary: name of the boundary loss there.
        alpha: boundary weight of the first epoch, or of all for `"constant"`.
        increment: what is added after each epoch; None for the one that reaches `max_alpha` in the last of `total`
            epochs, `(max_alpha - alpha) / (total - 1)`, so that a run of another length needs no tuning. A run that is
            prolonged then goes on along the slower rise.
        max_alpha: largest boundary weight of `"increase"` and `"rebalance"`.
        floor: smallest regional weight of `"rebalance"`, in [0, 1].
        total: epochs of the run, read when `increment` is None. The weights of a run of one epoch are the first ones.

    Raises:
        ValueError: an unknown word; a number that is negative or not finite; `floor` above 1; `alpha` above `max_alpha`
            where it rises; neither `increment` nor `total`; or both losses have the same name.

    Example:
        >>> schedule = AlphaSchedule("rebalance", regional="dice", alpha=0.25, increment=0.25)
        >>> [schedule(epoch) for epoch in (0, 9)]
        [{'dice': 0.75, 'boundary': 0.25}, {'dice': 0.01, 'boundary': 1.0}]
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
        if self.schedule not in _ALPHA_SCHEDULES:
            raise ValueError(f"schedule: expected one of {list(_ALPHA_SCHEDULES)}, got {self.schedule!r}.")
        for name in ("alpha", "max_alpha", "floor"):
            checks.number(name, vars(self)[name], least=0)
        if self.floor > 1:
            raise ValueError(f"floor: expected a number in [0, 1], the smallest 1 - alpha, got {self.floor!r}.")
        if self.increment is None:
            checks.whole_number("total (with increment=None, the epochs of the run)", self.total, 1)
        else:
            checks.number("increment", self.increment, least=0)
        if self.schedule in ("increase", "rebalance") and self.alpha > self.max_alpha:
            raise ValueError(f"alpha: expected at most max_alpha = {self.max_alpha!r}, got {self.alpha!r}.")

    def __call__(self, epoch: int) -> dict[str, float]:
        """Weights of both losses after `epoch` epochs, >= 0."""
        checks.number("epoch", epoch, least=0)
        increment = self.increment
        if increment is None:
            increment = (self.max_alpha - self.alpha) / max((self.total or 1) - 1, 1)
        risen = float(min(self.alpha + increment * epoch, self.max_alpha))
        regional, boundary = {
            "rebalance": (float(max(1 - risen, self.floor)), risen),
            "increase": (1.0, risen),
            "constant": (1.0, float(self.alpha)),
            "none": (1.0, 0.0),
            "alone": (0.0, 1.0),
        }[self.schedule]
        return {self.regional: regional, self.boundary: boundary}
