"""Quadratic penalty of a violated constraint."""

from __future__ import annotations

from torch import Tensor

from medconstraints.formulations.base import Formulation, at_least_float32

__all__ = ["QuadraticPenalty"]


class QuadraticPenalty(Formulation):
    """Cost `max(residual, 0)^2`: nothing while satisfied, quadratic in the violation (Kervadec 2020, eq. 2.3).

    Input and output have one shape; the output's unit is the square of the residual's. Half precision is raised to
    float32. The gradient is continuous.

    Example:
        >>> import torch
        >>> QuadraticPenalty()(torch.tensor([-1.0, 0.0, 2.0])).tolist()
        [0.0, 0.0, 4.0]
    """

    def forward(self, residual: Tensor, index: Tensor | None = None) -> Tensor:
        """Cost of each residual; see the class."""
        return at_least_float32(residual).clamp(min=0).square()

    def dual(self, residual: Tensor, index: Tensor | None = None) -> Tensor:
        """Slope 2 max(z, 0) of each cost, which stands where a multiplier would; same shape, no gradient."""
        return 2 * at_least_float32(residual.detach()).clamp(min=0)
