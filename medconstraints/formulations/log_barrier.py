"""Log-barrier extension of a constraint: defined everywhere, a barrier in the feasible region."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medconstraints.checks import number
from medconstraints.formulations.base import Formulation, at_least_float32

__all__ = ["LogBarrierExtension"]

# The barrier is curved below z = -1 / t^2. In float32 a residual of the size of its unit is known to 1.2e-7 only: with
# a larger t than this the curve cannot be told from 0, and all that still grows is the slope outside.
_SHARPEST_T = torch.finfo(torch.float32).eps ** -0.5
_LARGEST_T = 1e20  # float32 ends at 3.4e38; no slope is usable beyond this


class LogBarrierExtension(Formulation):
    """Log-barrier extension psi_t (Kervadec 2020, eq. 3.9 and 6.5).

    psi_t(z) = -log(-z) / t                   for z <= -1 / t^2,
    psi_t(z) = t z - log(1 / t^2) / t + 1 / t  otherwise.

    The function and its first derivative are continuous. A satisfied constraint is still pushed away from its bound, by
    1 / (t |z|); a violated one with the slope t. `t` is a buffer, so a checkpoint resumes the schedule exactly, up to
    the `max_t` of the module that loads it.

    Args:
        t: sharpness at the start, > 0. Larger is closer to a hard constraint.
        factor: `step()` multiplies `t` by it, >= 1. The papers call it after each epoch with 1.1.
        max_t: upper limit of `t`. The default, 2896, is where -1 / t^2 is the rounding error of a residual of 1 in
            float32, after 67 steps of the papers; a duality gap e that is wanted needs P N / e, see
            `duality_gap_bound`. None: 1e20, where float32 ends being useful.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> barrier = LogBarrierExtension(t=5.0)
        >>> [round(v, 4) for v in barrier(torch.tensor([-1.0, 0.0, 1.0])).tolist()]
        [-0.0, 0.8438, 5.8438]
    """

    t: Tensor

    def __init__(self, t: float = 5.0, factor: float = 1.1, max_t: float | None = _SHARPEST_T) -> None:
        super().__init__()
        self.factor = number("factor", factor, least=1)
        t = number("t", t, above=0)
        self.max_t = _LARGEST_T if max_t is None else min(number("max_t", max_t, above=0), _LARGEST_T)
        if t > self.max_t:
            raise ValueError(f"max_t: expected None or a number >= t = {t:g}, got {self.max_t:g}; raise it or lower t.")
        self.register_buffer("t", torch.tensor(t))

    def forward(self, residual: Tensor, index: Tensor | None = None) -> Tensor:
        """Cost of each residual, same shape, computed in at least float32."""
        residual, t, threshold = self._prepared(residual)
        # Both branches of `where` are differentiated: the argument of the logarithm must be negative in either.
        barrier = -torch.log(-residual.clamp(max=threshold)) / t
        line = t * residual + (2 * torch.log(t) + 1) / t
        return torch.where(residual <= threshold, barrier, line)

    def dual(self, residual: Tensor, index: Tensor | None = None) -> Tensor:
        """Implicit dual variable psi_t'(z) of each constraint (eq. 3.10), same shape, no gradient."""
        with torch.no_grad():
            residual, t, threshold = self._prepared(residual)
            return torch.where(residual <= threshold, -1 / (t * residual.clamp(max=threshold)), t)

    def duality_gap_bound(self, num_constraints: int) -> float:
        """Upper bound P N / t of the duality gap at a minimum, for P N constraints (Kervadec 2020, proposition 2).

        It holds for the cost E + sum psi_t(z), each psi with the weight 1: with weights w it is sum(w) / t, and a loss
        divides by the voxels of the image, by the number of constraints, and multiplies with its own weight. It
        certifies the minimum of a convex problem for this t, not the point where a training is: with t rising faster
        than the minimiser follows, the bound falls and the gap does not. For a network it says how sharp the barrier
        is, no more.
        """
        return num_constraints / float(self.t)

    def _prepared(self, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Residual in at least float32, t in its type, and -1 / t^2, which must not be rounded to 0."""
        residual = at_least_float32(residual)
        t = self.t.to(residual)  # type and device
        return residual, t, -t.reciprocal().square().clamp(min=torch.finfo(residual.dtype).tiny)

    def step(self) -> None:
        """Raise the barrier: `t <- min(t * factor, max_t)`; call it once after each epoch."""
        self.t.mul_(self.factor).clamp_(max=self.max_t)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.t.clamp_(max=self.max_t)

    def report(self) -> dict[str, Tensor]:
        """The sharpness "t"."""
        return {"t": self.t}

    def extra_repr(self) -> str:
        """Settings shown by `repr`."""
        return f"t={float(self.t):g}, factor={self.factor:g}, max_t={self.max_t:g}"
