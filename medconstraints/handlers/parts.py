"""What a trainer's loss is made of: the losses in it, what they read, and their formulations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from medconstraints.formulations.base import Formulation
from medconstraints.losses.base import TargetLoss
from medconstraints.losses.combined import CombinedLoss

__all__ = ["LossPart", "formulations_in", "parts_of"]


class LossPart(NamedTuple):
    """A loss, and where it finds what it reads.

    Attributes:
        loss: one that says what it reads.
        entries: entry of its target, as the loss calls it -> key in the batch.
    """

    loss: TargetLoss
    entries: Mapping[str, str]


def parts_of(loss: Any) -> dict[str, LossPart]:
    """The losses of a `CombinedLoss` that say what they read, by name; any other loss is itself its only part, ""."""
    if isinstance(loss, CombinedLoss):
        parts = {name: (one, loss.entries[name]) for name, one in loss.losses.items()}
    else:
        parts = {"": (loss, {})}
    return {
        name: LossPart(one, entries or {key: key for key in (*one.target_keys, *one.optional_keys)})
        for name, (one, entries) in parts.items()
        if isinstance(one, TargetLoss)
    }


def formulations_in(loss: Any) -> list[Formulation]:
    """Every formulation in a loss, each once."""
    return [part for part in loss.modules() if isinstance(part, Formulation)] if isinstance(loss, nn.Module) else []
