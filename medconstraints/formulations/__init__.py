"""Formulations turn a constraint residual (`<= 0` when satisfied) into a cost, elementwise."""

from medconstraints.formulations.base import Formulation
from medconstraints.formulations.lagrangian import AugmentedLagrangian, Lagrangian, ReLULagrangian
from medconstraints.formulations.log_barrier import LogBarrierExtension
from medconstraints.formulations.penalty import QuadraticPenalty

__all__ = [
    "AugmentedLagrangian",
    "Formulation",
    "Lagrangian",
    "LogBarrierExtension",
    "QuadraticPenalty",
    "ReLULagrangian",
]
