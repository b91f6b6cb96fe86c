"""Engines and what they take their batches from: training, validation, and inference that survives bad files."""

from medconstraints.engines.bilevel import BilevelTrainer
from medconstraints.engines.classification import ClassificationEvaluator
from medconstraints.engines.end_to_end import EndToEndTrainer
from medconstraints.engines.guided import GuidedTrainer
from medconstraints.engines.inference import TolerantDataset, TolerantEvaluator, collate_or_failure
from medconstraints.engines.lookahead import LookaheadTrainer
from medconstraints.engines.mask_to_image import MaskToImageTrainer
from medconstraints.engines.mean_teacher import PrepareBatchTeacher
from medconstraints.engines.prepare_batch import PrepareBatchTargets
from medconstraints.engines.regression import PrepareBatchStatistics, RegressionEvaluator, RegressionStage
from medconstraints.engines.relabel import BoxProposals, RelabelTrainer
from medconstraints.engines.saflex import SaflexTrainer
from medconstraints.engines.slab_inferer import SlabInferer
from medconstraints.engines.statistic_predictions import StatisticPredictions
from medconstraints.engines.training import TargetTrainer
from medconstraints.engines.validation import ValidationEvaluator

__all__ = [
    "BilevelTrainer",
    "BoxProposals",
    "ClassificationEvaluator",
    "EndToEndTrainer",
    "GuidedTrainer",
    "LookaheadTrainer",
    "MaskToImageTrainer",
    "PrepareBatchStatistics",
    "PrepareBatchTargets",
    "PrepareBatchTeacher",
    "RegressionEvaluator",
    "RegressionStage",
    "RelabelTrainer",
    "SaflexTrainer",
    "SlabInferer",
    "StatisticPredictions",
    "TargetTrainer",
    "TolerantDataset",
    "TolerantEvaluator",
    "ValidationEvaluator",
    "collate_or_failure",
]
