"""Losses: `(input, target) -> scalar`, with MONAI's argument names."""

from medconstraints.losses.base import ProbabilityLoss
from medconstraints.losses.box_prior import BoxPriorLoss
from medconstraints.losses.combined import CombinedLoss

__all__ = ["BoxPriorLoss", "CombinedLoss", "ProbabilityLoss"]
