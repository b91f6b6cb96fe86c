"""A weighted sum of losses that each take their own target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from medconstraints.distance.provenance import check_not_resampled
from medconstraints.losses.old_base import plain, shared_softmax

__all__ = ["CombinedLoss"]


class CombinedLoss(_Loss):
    """Weighted sum of named losses; each gets the network's output and its own entry of the target.

    Losses of this package with `softmax=True` share one softmax.

    Args:
        losses: name -> loss, a module `(input, target) -> scalar`.
        keys: name -> key of its target in the target dictionary; a name that is left out uses its own name as key. Or
            name -> {part: key} for a loss that takes several targets, such as
            {"bounds": "size_bounds", "index": "index"} for `ConstraintLoss`.
        weights: name -> weight; 1 for a name that is left out. A weight is read at every forward pass, so a schedule
            may change `loss.weights[name]`.
        skip_unweighted: leave out losses while their weight is 0, and the time they take; they then have no part in
            `terms()`, and what they observe (a Lagrangian its residuals) is not updated.

    Raises:
        TypeError: `losses` is not a mapping to modules.
        ValueError: no loss, a name in `keys` or `weights` that is no loss, or a weight that is not finite.

    Example:
        >>> loss = CombinedLoss({"ce": nn.CrossEntropyLoss(), "again": nn.CrossEntropyLoss()},
        ...                     keys={"ce": "label", "again": "label"}, weights={"again": 0.0})
        >>> round(float(loss(torch.zeros(1, 2, 4), {"label": torch.zeros(1, 4, dtype=torch.long)})), 4)
        0.6931
    """

    def __init__(
        self,
        losses: Mapping[str, nn.Module],
        *,
        keys: Mapping[str, str | Mapping[str, str]] | None = None,
        weights: Mapping[str, float] | None = None,
        skip_unweighted: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(losses, Mapping) or not all(isinstance(loss, nn.Module) for loss in losses.values()):
            raise TypeError("losses: expected a mapping from names to loss modules.")
        if not losses:
            raise ValueError("losses: expected at least one loss, got none.")
        for argument, given in (("keys", keys or {}), ("weights", weights or {})):
            unknown = sorted(set(given) - set(losses))
            if unknown:
                raise ValueError(f"{argument}: {unknown} name no loss; the losses are {sorted(losses)}.")
        self.losses = nn.ModuleDict(dict(losses))
        self.keys = {name: (keys or {}).get(name, name) for name in losses}
        self.weights = {name: float((weights or {}).get(name, 1.0)) for name in losses}
        for name, weight in self.weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"weights: expected finite numbers, got {weight} for {name!r}.")
        self.skip_unweighted = skip_unweighted
        self._last: dict[str, Tensor] = {}

    def forward(self, input: Tensor, target: Mapping[str, Tensor] | Tensor) -> Tensor:
        """Weighted sum of the losses.

        Args:
            input: output of the network, (B, C, *S).
            target: dictionary of targets, as `PrepareBatchTargets` makes it; or one tensor, given to every loss.

        Raises:
            KeyError: a target is missing; the message lists what is there.
            ValueError: a distance map was resampled.
        """
        total: Tensor | None = None
        self._last = {}
        input = plain(input)
        with shared_softmax(input):
            for name, loss in self.losses.items():
                if self.skip_unweighted and self.weights[name] == 0:
                    continue
                own = target if isinstance(target, Tensor) else self._target(target, name)
                value = self.weights[name] * plain(loss(input, own))
                self._last[name] = value.detach()
                total = value if total is None else total + value
        # All weights are 0: a sum that can be differentiated all the same.
        return input.sum() * 0.0 if total is None else total

    def terms(self) -> dict[str, Tensor]:
        """Weighted value of each loss in the last forward pass, and `name_term`, unweighted, for one with terms."""
        terms = dict(self._last)
        for name, loss in self.losses.items():
            own: Any = getattr(loss, "terms", None)
            if own is not None and name in self._last:
                terms.update({f"{name}_{key}": value for key, value in own().items()})
        return terms

    def _target(self, target: Mapping[str, Tensor], name: str) -> Tensor | dict[str, Tensor]:
        key = self.keys[name]
        if isinstance(key, Mapping):
            return {part: self._entry(target, other, name) for part, other in key.items()}
        return self._entry(target, key, name)

    def _entry(self, target: Mapping[str, Tensor], key: str, name: str) -> Tensor:
        if key not in target:
            raise KeyError(
                f"target: no entry {key!r} for the loss {name!r}, got {sorted(map(str, target))}; add the transform "
                "that makes it and name it in PrepareBatchTargets(target_keys=...)."
            )
        value: Any = target[key]
        if not isinstance(value, Tensor):
            return torch.as_tensor(value)
        check_not_resampled(value, key)
        return value if getattr(self.losses[name], "reads_meta", False) else plain(value)
