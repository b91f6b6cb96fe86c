"""Ignite engines, handlers and batch preparation."""

from medconstraints.engines.checkpoints import (
    EpochSeedHandler,
    ResumeHandler,
    SamplerEpochHandler,
    SaveBestHandler,
    SaveLatestHandler,
)
from medconstraints.engines.constraints import ConstraintMetricsHandler, DualPassHandler
from medconstraints.engines.handler_lists import HandlerList, training_handlers, validation_handlers
from medconstraints.engines.inference import TolerantDataset, TolerantEvaluator, collate_or_failure
from medconstraints.engines.loss_weights import LossWeightHandler
from medconstraints.engines.monitoring import (
    LossTermsHandler,
    RequireAnnotationHandler,
    RequireBoxesHandler,
    RequireFiniteLossHandler,
    StepFormulationHandler,
)
from medconstraints.engines.prepare_batch import PrepareBatchTargets, RestoreLabelHandler

__all__ = [
    "ConstraintMetricsHandler",
    "DualPassHandler",
    "EpochSeedHandler",
    "HandlerList",
    "LossTermsHandler",
    "LossWeightHandler",
    "PrepareBatchTargets",
    "RequireAnnotationHandler",
    "RequireBoxesHandler",
    "RequireFiniteLossHandler",
    "RestoreLabelHandler",
    "ResumeHandler",
    "SamplerEpochHandler",
    "SaveBestHandler",
    "SaveLatestHandler",
    "StepFormulationHandler",
    "TolerantDataset",
    "TolerantEvaluator",
    "collate_or_failure",
    "training_handlers",
    "validation_handlers",
]
