"""How many constraints hold, how many of them stay so, and by how much the others are missed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from medconstraints import checks
from medconstraints.processes import of_all_processes

__all__ = ["ConstraintMetrics", "shares"]


def shares(sums: Tensor) -> dict[str, float | None]:
    """Entries "satisfied", "stability" and "violation" of `ConstraintMetrics.sums`, over all their constraints."""
    used, met, violation, before, kept = sums.sum(dim=1).tolist()
    return {
        "satisfied": met / used if used else None,
        "stability": kept / before if before else None,
        "violation": violation / used if used else None,
    }


class ConstraintMetrics:
    """Satisfied constraints, their stability and their violation over an epoch (Kervadec 2020, section 3.4.1).

    satisfied = share of the constraints with residual <= tolerance,
    stability = share of the constraints satisfied in the epoch before that still are,
    violation = mean of max(residual, 0), in the unit of the residuals.

    Free constraints (an infinite bound) count nowhere. Each sample counts once: one that an epoch visits several times,
    in several patches, counts with its last visit. Samples are told apart by their index; without an index every row is
    a sample of its own. Stability needs to know the samples again: it looks at the constraints of samples that both
    epochs visited, and that are free in neither. A share or mean over no constraint at all is None: stability in the
    first epoch and without an index, everything when all constraints are free or there was no batch. A residual of NaN
    is not satisfied and makes the violation NaN.

    Tensors stay on their device until the end of the epoch: no batch makes the host wait. In distributed training
    `compute` and `sums` gather the samples of all processes, so every process has to call them; all get the same
    values, and the same state, whichever process saw a sample before. A sample that two processes visited counts with
    the visit of the last process.

    Args:
        names: one for each constraint of a sample, in the order of the residual's elements; None numbers them.
        tolerance: largest residual that counts as satisfied, >= 0, in the unit of the residuals.
        match_by_order: samples without an index are known again by the order in which they come. Right only when every
            epoch brings the same samples in the same order, as validation does.

    Raises:
        ValueError: `tolerance` is negative or not finite, or two names are the same.

    Example:
        >>> metrics = ConstraintMetrics(["lower", "upper"])
        >>> free, index = torch.zeros(2, 2, dtype=torch.bool), torch.tensor([0, 1])
        >>> metrics.update(torch.tensor([[-1.0, -1.0], [3.0, -9.0]]), free, index)
        >>> metrics.compute()["satisfied"], metrics.compute()["violation_lower"], metrics.compute()["stability"]
        (0.75, 1.5, None)
        >>> metrics.next_epoch()
        >>> metrics.update(torch.tensor([[-1.0, -1.0], [-1.0, 1.0]]), free, index)
        >>> round(metrics.compute()["stability"], 3)
        0.667
    """

    def __init__(
        self, names: Sequence[str] | None = None, *, tolerance: float = 0.0, match_by_order: bool = False
    ) -> None:
        self.names = None if names is None else [*names]
        if self.names is not None and len(set(self.names)) < len(self.names):
            raise ValueError(f"names: expected a different one for each constraint, got {self.names}.")
        self.tolerance = checks.number("tolerance", tolerance, least=0)
        self.match_by_order = checks.flag("match_by_order", match_by_order)
        # Of the epoch before: sorted indices (N,), and what was satisfied (N, K).
        self._before: tuple[Tensor, Tensor] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the batches of an unfinished epoch, not the epoch before."""
        self._rows: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._epoch: tuple[Tensor, Tensor, Tensor | None] | None = None

    def update(self, residual: Tensor, free: Tensor, index: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            residual: (B, ...), such as (B, C, M, 2); <= 0 is satisfied.
            free: bool of the same shape, True where there is no constraint.
            index: (B,) integers, the samples' positions in the data set; None does not tell the samples apart.

        Raises:
            ValueError: shapes or types do not fit each other, the names, or the batches and epochs before.
        """
        if residual.dim() < 2 or free.shape != residual.shape or free.dtype != torch.bool:
            raise ValueError(
                f"residual, free: expected numbers (B, ...) and bool of that shape, got {tuple(residual.shape)} and "
                f"{free.dtype} {tuple(free.shape)}."
            )
        if index is not None and (index.shape != residual.shape[:1] or index.is_floating_point()):
            raise ValueError(
                f"index: expected None or an integer for each of the {len(residual)} samples, got {index.dtype} of "
                f"shape {tuple(index.shape)}."
            )
        if self._rows and (self._rows[0][2] is None) != (index is None):
            raise ValueError("index: expected in every batch of an epoch or in none; give it always.")
        width = math.prod(residual.shape[1:])
        known = [len(self.names)] if self.names is not None else []
        known += [rows[1].shape[1] for rows in (self._before, *self._rows[:1]) if rows is not None]
        if any(width != count for count in known):
            raise ValueError(
                f"residual: expected {known[0]} constraints in each sample, as in the names, the batches and the epoch "
                f"before, got {width}; use one ConstraintMetrics for each loss, and a state of the same run."
            )
        rows = (residual.detach().reshape(len(residual), width), free.detach().reshape(len(free), width))
        self._rows.append((*rows, None if index is None else index.detach()))
        self._epoch = None

    def compute(self) -> dict[str, float | None]:
        """Metrics of the epoch so far; the host waits.

        Keys: "satisfied", "stability", "violation", and for each constraint of a sample "satisfied_<name>" and
        "violation_<name>". None where there is no constraint, see the class.
        """
        sums = self.sums()
        names: Sequence[Any] = range(sums.shape[1]) if self.names is None else self.names
        single = [shares(sums[:, k : k + 1]) for k in range(sums.shape[1])]
        result = shares(sums)
        for what in ("satisfied", "violation"):
            result |= {f"{what}_{name}": one[what] for name, one in zip(names, single, strict=True)}
        return result

    def sums(self) -> Tensor:
        """Sums over the samples of the epoch so far, of which `shares` makes metrics; the host waits.

        Returns:
            (5, K) float64 on the CPU, for each constraint of a sample: how many are not free, how many of these hold,
            the sum of their max(residual, 0), how many of them held in the epoch before, how many of those still hold.
        """
        if not self._rows:
            return torch.zeros(5, len(self.names or ()), dtype=torch.float64)
        residual, free, index = self._samples()
        used = ~free
        met = used & (residual <= self.tolerance)
        before = torch.zeros_like(used)
        if index is not None and self._before is not None and len(self._before[0]):
            known, held = self._before
            row = torch.searchsorted(known, index).clamp(max=len(known) - 1)
            before = held[row] & (known[row] == index)[:, None] & used
        violation = torch.where(used, residual.double().clamp(min=0), 0.0)
        return torch.stack([part.double().sum(dim=0) for part in (used, met, violation, before, before & met)])

    def next_epoch(self) -> None:
        """Keep what is satisfied now for the next epoch's stability, and forget the batches; nothing without any."""
        if not self._rows:
            return
        residual, free, index = self._samples()
        self._before = None if index is None else (index, ~free & (residual <= self.tolerance))
        self.reset()

    def state_dict(self) -> dict[str, Any]:
        """What the next epoch's stability needs, on the CPU; the batches of an unfinished epoch are not kept.

        Keys: "names"; "index" (N,) int64 and "satisfied" (N, K) bool, not before the first `next_epoch` and not without
        an index.
        """
        before = {} if self._before is None else dict(zip(("index", "satisfied"), self._before, strict=True))
        return {"names": self.names, **before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the epoch that `state` was saved after.

        Raises:
            ValueError: it is no state of such metrics.
        """
        if set(state) not in ({"names"}, {"names", "index", "satisfied"}):
            raise ValueError(f"state: expected names, and perhaps index and satisfied, got {sorted(state)}.")
        self.names = state["names"]
        self._before = None
        if "index" in state:
            self._before = (state["index"].long().cpu().clone(), state["satisfied"].bool().cpu().clone())
        self.reset()

    def _samples(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Residual (N, K) and free (N, K) of the samples, and their sorted indices (N,), on the CPU."""
        if self._epoch is not None:
            return self._epoch
        residuals, frees, indices = zip(*self._rows, strict=True)
        residual, free = (of_all_processes(torch.cat(rows)).cpu() for rows in (residuals, frees))
        index: Tensor | None = None
        if indices[0] is not None:
            index, sample = torch.unique(of_all_processes(torch.cat(indices).long()).cpu(), return_inverse=True)
            visits = torch.arange(len(sample))
            last = torch.zeros(len(index), dtype=torch.long).scatter_reduce(0, sample, visits, "amax")
            residual, free = residual[last], free[last]
        elif self.match_by_order:
            index = torch.arange(len(residual))
        self._epoch = residual, free, index
        return self._epoch
