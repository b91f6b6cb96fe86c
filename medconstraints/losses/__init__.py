"""Losses: `(input, target) -> scalar`, with MONAI's argument names."""

from medconstraints.losses.base import ProbabilityLoss
from medconstraints.losses.box_prior import BoxPriorLoss
from medconstraints.losses.combined import CombinedLoss
from medconstraints.losses.constraint import ConstraintLoss, Residuals
from medconstraints.losses.partial_cross_entropy import PartialCrossEntropyLoss
from medconstraints.losses.proposals import ProposalLoss

__all__ = [
    "BoxPriorLoss",
    "CombinedLoss",
    "ConstraintLoss",
    "PartialCrossEntropyLoss",
    "ProbabilityLoss",
    "ProposalLoss",
    "Residuals",
]
