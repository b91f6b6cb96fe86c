"""One loss of several, by name: what a config needs to choose with one value."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

__all__ = ["chosen_loss"]


def chosen_loss(losses: Mapping[str, nn.Module], name: str, setting: str = "loss") -> nn.Module:
    """The loss of that name.

    Args:
        losses: name -> loss.
        name: the one to use.
        setting: what the config calls the choice, for the message.

    Raises:
        ValueError: there is none of that name; the message lists them.

    Example:
        >>> chosen_loss({"ce": nn.CrossEntropyLoss()}, "ce")
        CrossEntropyLoss()
    """
    if name not in losses:
        raise ValueError(f"{setting}: expected one of {sorted(losses)}, got {name!r}.")
    return losses[name]
