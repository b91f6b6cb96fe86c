"""Losses: `(input, target) -> scalar`, with MONAI's argument names."""

from medconstraints.losses.boundary import BoundaryLoss
from medconstraints.losses.box_prior import BoxPriorLoss
from medconstraints.losses.choice import chosen_loss
from medconstraints.losses.combined import CombinedLoss
from medconstraints.losses.constraint import ConstraintLoss, Residuals
from medconstraints.losses.distance_weighted import DistanceWeightedCrossEntropyLoss
from medconstraints.losses.generalized_dice import GeneralizedDiceLoss
from medconstraints.losses.hausdorff import HausdorffLoss
from medconstraints.losses.old_base import ProbabilityLoss
from medconstraints.losses.partial_cross_entropy import PartialCrossEntropyLoss
from medconstraints.losses.proposals import ProposalLoss

__all__ = [
    "BoundaryLoss",
    "BoxPriorLoss",
    "CombinedLoss",
    "ConstraintLoss",
    "DistanceWeightedCrossEntropyLoss",
    "GeneralizedDiceLoss",
    "HausdorffLoss",
    "PartialCrossEntropyLoss",
    "ProbabilityLoss",
    "ProposalLoss",
    "Residuals",
    "chosen_loss",
]
