"""The plain label, put back where postprocessing and metrics look for it."""

from __future__ import annotations

from typing import Any

from ignite.engine import Engine
from monai.engines import IterationEvents
from monai.utils.enums import CommonKeys

__all__ = ["RestoreLabelHandler"]


class RestoreLabelHandler:
    """Puts the plain label back into the trainer's output after the backward pass.

    A trainer hands its target on to postprocessing and metrics; with `PrepareBatchTargets` that is a dictionary, which
    neither can read. This handler replaces it by the label of the batch, or removes it when the batch has no label.

    Args:
        label_key: key of the label in the batch.
    """

    def __init__(self, label_key: str = "label") -> None:
        self.label_key = label_key

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer; acts before decollation."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Replace or remove the label entry."""
        output: Any = engine.state.output
        batch: Any = engine.state.batch
        if self.label_key in batch:
            output[CommonKeys.LABEL] = batch[self.label_key].to(output[CommonKeys.PRED].device)
        else:
            output.pop(CommonKeys.LABEL, None)
