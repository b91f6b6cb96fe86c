"""Lagrangian formulations: multipliers of each constraint that rise while it is violated."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import ignite.distributed as idist
import torch
from torch import Tensor

from medconstraints.checks import number, plain, readable, whole_number
from medconstraints.formulations.base import Formulation, at_least_float32
from medconstraints.processes import of_all_processes

__all__ = ["AugmentedLagrangian", "Lagrangian", "ReLULagrangian"]


class _DualVariables(Formulation):
    """What the Lagrangians share: a table of multipliers, and the residuals seen since the last dual step.

    The table is a buffer, so checkpoints resume exactly; its width, the constraints of one sample, is known only at the
    first forward pass or from a state that is loaded. Residuals are summed up on their device, without a wait.
    """

    multipliers: Tensor
    needs_index = True
    has_multipliers = True

    def __init__(self, rows: int, max_multiplier: float | None, initial: float) -> None:
        super().__init__()
        self.rows = rows
        self.initial = number("initial", initial, least=0)
        if max_multiplier is not None and not max_multiplier > initial:
            raise ValueError(f"max_multiplier: expected None or a number > {initial:g}, got {max_multiplier!r}.")
        self.max_multiplier = math.inf if max_multiplier is None else max_multiplier
        self.register_buffer("multipliers", torch.zeros(rows, 0))
        self.forget()

    @abstractmethod
    def _cost(self, residual: Tensor, multipliers: Tensor) -> Tensor:
        """Of residuals (B, K) with their multipliers (B, K)."""

    @abstractmethod
    def _slope(self, residual: Tensor, multipliers: Tensor) -> Tensor:
        """Derivative of the cost."""

    @abstractmethod
    def _ascent(self, total: Tensor, visits: Tensor) -> Tensor:
        """Step of the multipliers from the residuals of an epoch: their sums (rows, K), and visits (rows, 1)."""

    def forward(self, residual: Tensor, index: Tensor | None = None) -> Tensor:
        """Cost of each residual, same shape, at least float32; in training it is remembered until the next step.

        Args:
            residual: (B, ...), the constraints of each sample.
            index: number of each sample in the data set, (B,), best on the CPU; only read with `needs_index`.

        Raises:
            ValueError: no index, one out of range, or another number of constraints than before.
        """
        flat = self._flat(residual)
        rows = self._table_rows(index, flat)
        if self.training:
            self._observe(flat.detach(), rows, index)
        return self._cost(flat, self._multipliers_of(rows).to(flat)).view(residual.shape)

    def dual(self, residual: Tensor, index: Tensor | None = None) -> Tensor:
        """Slope of the cost of each constraint, same shape, no gradient; it is not remembered."""
        with torch.no_grad():
            flat = self._flat(residual)
            multipliers = self._multipliers_of(self._table_rows(index, flat))
            return self._slope(flat, multipliers.to(flat)).view(residual.shape)

    def step(self) -> None:
        """Dual step; see the class. It forgets the residuals. In distributed training every process has to call it."""
        self._agree()
        moved = self.multipliers + self._ascent(*self._seen())
        self.multipliers.copy_(moved.clamp(min=0, max=self.max_multiplier))
        self.forget()

    def forget(self) -> None:
        """Forget the residuals seen since the last step."""
        self._sum: Tensor | None = None
        self._visits: Tensor | None = None

    def report(self) -> dict[str, Tensor]:
        """Mean and largest multiplier of the table, of this process; nothing before the first residual."""
        if not self.multipliers.numel():
            return {}
        return {"multiplier_mean": self.multipliers.mean(), "multiplier_max": self.multipliers.max()}

    def _widen(self, count: int, device: torch.device) -> None:
        """The table, once it is known how many constraints a sample has."""
        if self.multipliers.shape[1] == 0 and count:
            self.multipliers = torch.full((self.rows, count), self.initial, dtype=torch.float32, device=device)

    def _agree(self) -> None:
        """A process that saw no batch yet has no table: it gets one like that of the others."""
        count = idist.all_reduce(self.multipliers.shape[1], "MAX")
        self._widen(int(count), self.multipliers.device)

    def _flat(self, residual: Tensor) -> Tensor:
        """Residuals as (B, K), and a table that fits them."""
        residual = at_least_float32(plain(residual))
        flat = residual.reshape(residual.shape[0], -1) if residual.dim() else residual.reshape(1, 1)
        self._widen(flat.shape[1], flat.device)
        if self.multipliers.shape[1] != flat.shape[1]:
            raise ValueError(
                f"residual: expected {self.multipliers.shape[1]} constraints for each sample, as before, got "
                f"{flat.shape[1]} (shape {tuple(residual.shape)}); use one formulation for each loss."
            )
        if self.multipliers.device != flat.device:
            self.multipliers = self.multipliers.to(flat.device)
        return flat

    def _multipliers_of(self, rows: Tensor | None) -> Tensor:
        return self.multipliers if rows is None else self.multipliers[rows]

    def _table_rows(self, index: Tensor | None, flat: Tensor) -> Tensor | None:
        """Row of the table of each sample; None if all samples share one."""
        if not self.needs_index:
            return None
        if index is None:
            raise ValueError(
                f"index: {type(self).__name__} has a multiplier for every sample; give the samples' numbers in the "
                'data set, (B,), or a target {"bounds": ..., "index": ...} to the loss.'
            )
        index = plain(torch.as_tensor(index))
        if index.shape != flat.shape[:1] or index.is_floating_point():
            raise ValueError(
                f"index: expected {len(flat)} whole numbers, one for each sample, got {index.dtype} of shape "
                f"{tuple(index.shape)}."
            )
        if readable(index) and len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.rows:
            raise ValueError(
                f"index: expected numbers 0..{self.rows - 1}, got {int(index.min())}..{int(index.max())}; set "
                "num_samples to the length of the data set."
            )
        return index.to(flat.device, torch.int64, non_blocking=True)

    def _observe(self, flat: Tensor, rows: Tensor | None, index: Tensor | None) -> None:
        if self._sum is None or self._visits is None:
            self._sum = flat.new_zeros(self.multipliers.shape)
            self._visits = flat.new_zeros(self.rows, 1)
        # Out of place: the sums may be of another type or device than before.
        total, visits = self._sum.to(flat), self._visits.to(flat)
        if rows is None:
            self._sum, self._visits = total + flat.sum(0, keepdim=True), visits + len(flat)
        else:
            self._sum = total.index_add(0, rows, flat)
            self._visits = visits.index_add(0, rows, flat.new_ones(len(flat), 1))

    def _seen(self) -> tuple[Tensor, Tensor]:
        """Sums and visits since the last step, over all processes; a process that saw nothing adds zeros."""
        total = torch.zeros_like(self.multipliers) if self._sum is None else self._sum.float()
        visits = self.multipliers.new_zeros(self.rows, 1) if self._visits is None else self._visits.float()
        total, visits = (torch.as_tensor(idist.all_reduce(values)) for values in (total, visits))
        return total, visits

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        saved = state_dict.get(prefix + "multipliers")
        if saved is not None and saved.dim() == 2:
            if len(saved) != self.rows:
                arguments[-1].append(
                    f"{prefix}multipliers: the state has {len(saved)} rows, one for each sample, but num_samples is "
                    f"{self.rows}; train on the data set of that state, or start anew."
                )
                return
            self.multipliers = self.multipliers.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self.multipliers.clamp_(max=self.max_multiplier)  # this module's, not that of the run that saved


class Lagrangian(_DualVariables):
    """Standard Lagrangian: cost lambda z, one multiplier for each constraint of each sample (Kervadec 2020, eq. 3.2).

    `step()`, once after each epoch, is the projected gradient ascent: lambda <- max(0, lambda + learning_rate z), with
    z the mean residual over the sample's visits in that epoch; samples that were not seen keep theirs. The residuals
    are those seen in training; the thesis makes an epoch of its own for them, see `DualPassHandler`.

    Args:
        num_samples: samples in the data set.
        learning_rate: step of the multipliers, in 1 / unit of the residual; the thesis does not tell its own.
        max_multiplier: upper limit of the multipliers, or None.
        initial: multipliers at the start.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> lagrangian = Lagrangian(num_samples=2, learning_rate=0.5)
        >>> residual, index = torch.tensor([[2.0], [-1.0]]), torch.tensor([0, 1])
        >>> _ = lagrangian(residual, index)
        >>> lagrangian.step()
        >>> lagrangian(residual, index).tolist()
        [[2.0], [-0.0]]
    """

    def __init__(
        self, num_samples: int, *, learning_rate: float, max_multiplier: float | None = None, initial: float = 0.0
    ) -> None:
        super().__init__(whole_number("num_samples", num_samples, 1), max_multiplier, initial)
        self.learning_rate = number("learning_rate", learning_rate, above=0)

    def _cost(self, residual: Tensor, multipliers: Tensor) -> Tensor:
        return multipliers * residual

    def _slope(self, residual: Tensor, multipliers: Tensor) -> Tensor:
        return multipliers

    def _ascent(self, total: Tensor, visits: Tensor) -> Tensor:
        return self.learning_rate * total / visits.clamp(min=1)

    def extra_repr(self) -> str:
        """Settings shown by `repr`."""
        return f"num_samples={self.rows}, learning_rate={self.learning_rate:g}"


class ReLULagrangian(_DualVariables):
    """ReLU Lagrangian: cost lambda max(z, 0), one multiplier for each constraint over the data set (eq. 3.3).

    `step()`, once after each epoch: lambda <- lambda + learning_rate sum_n max(z_n, 0), over the samples n seen in that
    epoch. It never falls (Kervadec 2020, appendix A.3). With an index each sample counts once, with the mean over its
    visits, also one that a sampler of several processes repeats to give all the same number. Without, each visit counts
    as a sample.

    Args:
        learning_rate: step of the multipliers; with N samples their sum is N times the mean violation.
        max_multiplier: upper limit of the multipliers, or None.
        initial: multipliers at the start.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> lagrangian = ReLULagrangian(learning_rate=0.5)
        >>> _ = lagrangian(torch.tensor([[2.0], [1.0], [-1.0]]))
        >>> lagrangian.step()
        >>> lagrangian.multipliers.tolist()
        [[1.5]]
    """

    needs_index = False

    def __init__(self, *, learning_rate: float, max_multiplier: float | None = None, initial: float = 0.0) -> None:
        super().__init__(1, max_multiplier, initial)
        self.learning_rate = number("learning_rate", learning_rate, above=0)

    def forget(self) -> None:
        """Forget the residuals seen since the last step."""
        super().forget()
        self._known: list[tuple[Tensor, Tensor]] = []

    def _flat(self, residual: Tensor) -> Tensor:
        return super()._flat(residual).clamp(min=0)

    def _observe(self, flat: Tensor, rows: Tensor | None, index: Tensor | None) -> None:
        if index is None:
            super()._observe(flat, rows, index)
        else:
            self._known.append((plain(torch.as_tensor(index)).long().to(flat.device), flat.float()))

    def _seen(self) -> tuple[Tensor, Tensor]:
        total, visits = super()._seen()
        found = [torch.cat(parts) for parts in zip(*self._known, strict=True)]
        device = self.multipliers.device
        index, values = found or (torch.zeros(0, dtype=torch.int64, device=device), total[:0])
        index, values = of_all_processes(index), of_all_processes(values)
        if not len(index):
            return total, visits
        samples, row, counts = torch.unique(index, return_inverse=True, return_counts=True)
        sums = values.new_zeros(len(samples), values.shape[1]).index_add(0, row, values)
        return total + (sums / counts.unsqueeze(1)).sum(0, keepdim=True).to(total), visits

    def _cost(self, residual: Tensor, multipliers: Tensor) -> Tensor:
        return multipliers * residual

    def _slope(self, residual: Tensor, multipliers: Tensor) -> Tensor:
        return multipliers * (residual > 0)

    def _ascent(self, total: Tensor, visits: Tensor) -> Tensor:
        return self.learning_rate * total

    def extra_repr(self) -> str:
        """Settings shown by `repr`."""
        return f"learning_rate={self.learning_rate:g}"


class AugmentedLagrangian(_DualVariables):
    """Augmented Lagrangian for inequalities: cost ([lambda + rho z]+^2 - lambda^2) / (2 rho).

    The method of multipliers (Hestenes 1969, Powell 1969, Rockafellar 1973; Bertsekas 1982, section 3.1): a penalty
    whose multipliers make it exact at a finite rho. `step()`, once after each epoch: lambda <- [lambda + rho z]+, with
    z the mean residual over the sample's visits, then rho <- min(factor rho, max_penalty). Samples that were not seen
    keep their multipliers.

    Args:
        num_samples: samples in the data set.
        penalty: rho at the start, > 0.
        factor: growth of rho after each epoch, >= 1.
        max_penalty: upper limit of rho, or None.
        max_multiplier: upper limit of the multipliers, or None.
        initial: multipliers at the start.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> augmented = AugmentedLagrangian(num_samples=1, penalty=2.0)
        >>> augmented(torch.tensor([[1.0]]), torch.tensor([0])).tolist()
        [[1.0]]
    """

    penalty: Tensor

    def __init__(
        self,
        num_samples: int,
        *,
        penalty: float = 1.0,
        factor: float = 1.0,
        max_penalty: float | None = None,
        max_multiplier: float | None = None,
        initial: float = 0.0,
    ) -> None:
        super().__init__(whole_number("num_samples", num_samples, 1), max_multiplier, initial)
        penalty = number("penalty", penalty, above=0)
        if max_penalty is not None and not max_penalty >= penalty:
            raise ValueError(f"max_penalty: expected None or a number >= penalty = {penalty}, got {max_penalty!r}.")
        self.factor = number("factor", factor, least=1)
        self.max_penalty = 1e30 if max_penalty is None else max_penalty
        self.register_buffer("penalty", torch.tensor(penalty))

    def _cost(self, residual: Tensor, multipliers: Tensor) -> Tensor:
        rho = self.penalty.to(residual)
        # Without the difference of two large squares: where the bracket is positive, lambda z + rho z^2 / 2.
        return torch.where(
            multipliers + rho * residual > 0,
            residual * (multipliers + rho * residual / 2),
            -multipliers.square() / (2 * rho),
        )

    def _slope(self, residual: Tensor, multipliers: Tensor) -> Tensor:
        return (multipliers + self.penalty.to(residual) * residual).clamp(min=0)

    def _ascent(self, total: Tensor, visits: Tensor) -> Tensor:
        return self.penalty.to(total) * total / visits.clamp(min=1)

    def step(self) -> None:
        """Dual step, then a larger penalty; see the class."""
        super().step()
        self.penalty.mul_(self.factor).clamp_(max=self.max_penalty)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.penalty.clamp_(max=self.max_penalty)

    def extra_repr(self) -> str:
        """Settings shown by `repr`."""
        return f"num_samples={self.rows}, penalty={float(self.penalty):g}, factor={self.factor:g}"
