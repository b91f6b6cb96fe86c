"""Quadratic penalty of a violated constraint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["QuadraticPenalty"]


class QuadraticPenalty(nn.Module):
    """Cost `max(residual, 0)^2`: nothing while satisfied, quadratic in the violation (Kervadec 2020, eq. 2.3).

    Input and output have one shape; the output's unit is the square of the residual's. Half precision is raised to
    float32. The gradient is continuous.

    Example:
        >>> import torch
        >>> QuadraticPenalty()(torch.tensor([-1.0, 0.0, 2.0])).tolist()
        [0.0, 0.0, 4.0]
    """

    def forward(self, residual: Tensor) -> Tensor:
        """Cost of each residual; see the class."""
        if residual.dtype in (torch.float16, torch.bfloat16):
            residual = residual.float()
        return residual.clamp(min=0).square()

    def dual(self, residual: Tensor) -> Tensor:
        """Slope 2 max(z, 0) of each cost, which stands where a multiplier would; same shape, no gradient."""
        with torch.no_grad():
            return 2 * (residual.float() if residual.dtype in (torch.float16, torch.bfloat16) else residual).clamp(
                min=0
            )

    def step(self) -> None:
        """No schedule: present so that every formulation can be stepped after an epoch."""
