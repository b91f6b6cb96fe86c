"""Handlers: what is attached to an engine, such as schedules, logs, checkpoints and the dual ascent."""

from medconstraints.handlers.augmenter_report import AugmenterReportHandler
from medconstraints.handlers.constraints import ConstraintMetricsHandler
from medconstraints.handlers.dual_pass import DualPassHandler
from medconstraints.handlers.end_to_end_report import EndToEndReportHandler
from medconstraints.handlers.lists import HandlerList, training_handlers, validation_handlers
from medconstraints.handlers.lookahead_report import LookaheadReportHandler
from medconstraints.handlers.loss_weights import LossWeightHandler
from medconstraints.handlers.monitors import (
    LossTermsHandler,
    RequireFiniteLossHandler,
    RequireTargetsHandler,
    StepFormulationHandler,
)
from medconstraints.handlers.resume import (
    EpochSeedHandler,
    ResumeHandler,
    SaveBestHandler,
    SaveLatestHandler,
    Stateful,
)
from medconstraints.handlers.saflex_report import SaflexReportHandler

__all__ = [
    "AugmenterReportHandler",
    "ConstraintMetricsHandler",
    "DualPassHandler",
    "EndToEndReportHandler",
    "EpochSeedHandler",
    "HandlerList",
    "LookaheadReportHandler",
    "LossTermsHandler",
    "LossWeightHandler",
    "RequireFiniteLossHandler",
    "RequireTargetsHandler",
    "ResumeHandler",
    "SaflexReportHandler",
    "SaveBestHandler",
    "SaveLatestHandler",
    "Stateful",
    "StepFormulationHandler",
    "training_handlers",
    "validation_handlers",
]
