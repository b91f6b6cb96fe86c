"""One formulation of several, by name: what a config needs to choose with one value."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

__all__ = ["chosen_formulation"]


def chosen_formulation(formulations: Mapping[str, nn.Module], name: str) -> nn.Module:
    """A copy of the formulation of that name; each loss needs its own, because multipliers belong to constraints.

    Args:
        formulations: name -> formulation.
        name: the one to use.

    Raises:
        ValueError: there is none of that name; the message lists them.

    Example:
        >>> from medconstraints.formulations import QuadraticPenalty
        >>> chosen_formulation({"penalty": QuadraticPenalty()}, "penalty")
        QuadraticPenalty()
    """
    if name not in formulations:
        raise ValueError(f"formulation: expected one of {sorted(formulations)}, got {name!r}.")
    return copy.deepcopy(formulations[name])
