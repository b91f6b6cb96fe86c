"""Losses: `(input, target) -> scalar`, with MONAI's argument names."""

from medconstraints.losses.base import ConstrainedLoss, Probabilities, ProbabilityLoss, Residuals, TargetLoss
from medconstraints.losses.boundary import BoundaryLoss
from medconstraints.losses.box_prior import BoxPriorLoss
from medconstraints.losses.combined import CombinedLoss
from medconstraints.losses.consistency import ConsistencyLoss
from medconstraints.losses.constraint import ConstraintLoss
from medconstraints.losses.dense_crf import DenseCRFLoss
from medconstraints.losses.distance_weighted import DistanceWeightedCrossEntropyLoss
from medconstraints.losses.generalized_dice import GeneralizedDiceLoss
from medconstraints.losses.hausdorff import HausdorffLoss
from medconstraints.losses.mask_to_image import CharbonnierLoss, MaskToImageLoss
from medconstraints.losses.partial_cross_entropy import PartialCrossEntropyLoss
from medconstraints.losses.proposals import ProposalLoss
from medconstraints.losses.regression import RegressionLoss

__all__ = [
    "BoundaryLoss",
    "BoxPriorLoss",
    "CharbonnierLoss",
    "CombinedLoss",
    "ConsistencyLoss",
    "ConstrainedLoss",
    "ConstraintLoss",
    "DenseCRFLoss",
    "DistanceWeightedCrossEntropyLoss",
    "GeneralizedDiceLoss",
    "HausdorffLoss",
    "MaskToImageLoss",
    "PartialCrossEntropyLoss",
    "Probabilities",
    "ProbabilityLoss",
    "ProposalLoss",
    "RegressionLoss",
    "Residuals",
    "TargetLoss",
]
