"""Handlers: what is attached to an engine, such as schedules, logs, checkpoints and the dual ascent."""

from medconstraints.handlers.constraints import ConstraintMetricsHandler, DualPassHandler
from medconstraints.handlers.lists import HandlerList, training_handlers, validation_handlers
from medconstraints.handlers.loss_weights import LossWeightHandler
from medconstraints.handlers.monitors import (
    LossTermsHandler,
    RequireAnnotationHandler,
    RequireBoxesHandler,
    RequireFiniteLossHandler,
    StepFormulationHandler,
)
from medconstraints.handlers.restore_label import RestoreLabelHandler
from medconstraints.handlers.resume import (
    EpochSeedHandler,
    ResumeHandler,
    SamplerEpochHandler,
    SaveBestHandler,
    SaveLatestHandler,
)

__all__ = [
    "ConstraintMetricsHandler",
    "DualPassHandler",
    "EpochSeedHandler",
    "HandlerList",
    "LossTermsHandler",
    "LossWeightHandler",
    "RequireAnnotationHandler",
    "RequireBoxesHandler",
    "RequireFiniteLossHandler",
    "RestoreLabelHandler",
    "ResumeHandler",
    "SamplerEpochHandler",
    "SaveBestHandler",
    "SaveLatestHandler",
    "StepFormulationHandler",
    "training_handlers",
    "validation_handlers",
]
