"""A weighted sum of losses that each take their own entries of the target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from medconstraints.checks import plain
from medconstraints.distance.provenance import check_not_resampled
from medconstraints.formulations.base import Formulation
from medconstraints.losses.base import Probabilities, ProbabilityLoss, TargetLoss

__all__ = ["CombinedLoss"]


class CombinedLoss(TargetLoss):
    """Weighted sum of named losses; each gets the network's output and the entries of the target that it reads.

    A loss of this package says itself which entries these are (`target_keys`, `optional_keys`); another one, such as
    MONAI's, reads "label". `keys` renames them. Losses with the same activation share their probabilities.

    Args:
        losses: name -> loss, a module `(input, target) -> scalar`.
        keys: name -> {entry, as the loss calls it: key in the target}, for entries with another key; also for those
            that a loss reads only when they are named, such as "spacing_mm" of a statistic. The key alone renames the
            main entry; None in place of a key leaves an optional entry out. A loss that is none of this package gets a
            mapping of the named entries, or the tensor of the only one.
        weights: name -> weight; 1 for a name that is left out. A weight is read at every forward pass, so a schedule
            may change `loss.weights[name]`.
        skip_unweighted: leave out losses while their weight is 0, and the time they take; they then have no part in
            `terms()`, and their `last` is None. A loss whose formulation has multipliers is always left out then: a
            constraint that has no weight moves none.

    Attributes:
        batch_keys: all entries that the losses read, required or optional: what a bundle keeps of an item.

    Raises:
        TypeError: `losses` is not a mapping to modules, or one is itself a `CombinedLoss`.
        ValueError: no loss, a name in `keys` or `weights` that is no loss, an entry that its loss does not read, a
            weight that is not finite, or a formulation with multipliers that two losses share.

    Example:
        >>> loss = CombinedLoss({"ce": nn.CrossEntropyLoss(), "other": nn.CrossEntropyLoss()},
        ...                     keys={"other": {"label": "second"}}, weights={"other": 0.0})
        >>> loss.target_keys
        ('label', 'second')
        >>> label = torch.zeros(1, 4, dtype=torch.long)
        >>> round(float(loss(torch.zeros(1, 2, 4), {"label": label, "second": label})), 4)
        0.6931
    """

    def __init__(
        self,
        losses: Mapping[str, nn.Module],
        *,
        keys: Mapping[str, Mapping[str, str | None] | str] | None = None,
        weights: Mapping[str, float] | None = None,
        skip_unweighted: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(losses, Mapping) or not all(isinstance(loss, nn.Module) for loss in losses.values()):
            raise TypeError("losses: expected a mapping from names to loss modules.")
        if not losses:
            raise ValueError("losses: expected at least one loss, got none.")
        if any(isinstance(loss, CombinedLoss) for loss in losses.values()):
            raise TypeError("losses: expected losses that are no sums themselves; put those of a CombinedLoss in here.")
        keys, weights = keys or {}, weights or {}
        for argument, given in (("keys", keys), ("weights", weights)):
            unknown = sorted(set(given) - set(losses))
            if unknown:
                raise ValueError(f"{argument}: {unknown} name no loss; the losses are {sorted(losses)}.")
        _check_multipliers(losses)
        self.losses = nn.ModuleDict(dict(losses))
        self.entries = {name: _entries(name, loss, keys.get(name, {})) for name, loss in losses.items()}
        self.weights = {name: float(weights.get(name, 1.0)) for name in losses}
        for name, weight in self.weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"weights: expected finite numbers, got {weight} for {name!r}.")
        self.skip_unweighted = skip_unweighted
        self._declare()
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
        input, total = plain(input), None
        self._last = {}
        shared: dict[Any, Probabilities] = {}
        for name, loss in self.losses.items():
            if self.weights[name] == 0 and (self.skip_unweighted or _learns(loss)):
                if isinstance(loss, TargetLoss):
                    loss.left_out()
                continue
            own = target if isinstance(target, Tensor) else self._target(target, name)
            if isinstance(loss, ProbabilityLoss):
                if loss.activation not in shared:
                    shared[loss.activation] = loss.probabilities(input)
                value = loss(input, own, probabilities=shared[loss.activation])
            else:
                value = loss(input, own)
            value = self.weights[name] * plain(value)
            self._last[name] = value.detach()
            total = value if total is None else total + value
        # All weights are 0: a sum that can be differentiated all the same.
        return input.sum() * 0.0 if total is None else total

    def terms(self) -> dict[str, Tensor]:
        """Weighted value of each loss in the last forward pass, and `name_term`, unweighted, for one with terms."""
        terms = dict(self._last)
        for name, loss in self.losses.items():
            if isinstance(loss, TargetLoss) and name in self._last:
                terms.update({f"{name}_{key}": value for key, value in loss.terms().items()})
        return terms

    def _declare(self) -> None:
        """The entries that all losses read together, as a loss says them."""
        required: dict[str, None] = {}
        optional: dict[str, None] = {}
        host: set[str] = set()
        device: set[str] = set()
        for name, loss in self.losses.items():
            may_lack, on_host = (loss.optional_keys, loss.host_keys) if isinstance(loss, TargetLoss) else ((), ())
            for entry, key in self.entries[name].items():
                (optional if entry in may_lack else required)[key] = None
                (host if entry in on_host else device).add(key)
        self.target_keys = tuple(required)
        self.optional_keys = tuple(key for key in optional if key not in required)
        self.host_keys = frozenset(host - device)
        self.batch_keys = self.target_keys + self.optional_keys

    def _target(self, target: Mapping[str, Tensor], name: str) -> Tensor | dict[str, Tensor]:
        loss, entries = self.losses[name], self.entries[name]
        may_lack, meta = (loss.optional_keys, loss.reads_meta) if isinstance(loss, TargetLoss) else ((), False)
        found = {}
        for entry, key in entries.items():
            if key in target:
                found[entry] = _value(target[key], key, keep_meta=meta)
            elif entry not in may_lack:
                raise KeyError(
                    f"target: no entry {key!r} for the loss {name!r}, got {sorted(map(str, target))}; add the "
                    "transform that makes it, and let PrepareBatchTargets take its keys from this loss."
                )
        # A loss of one entry gets its tensor.
        return next(iter(found.values())) if len(entries) == 1 else found


def _entries(name: str, loss: nn.Module, renamed: Mapping[str, str | None] | str) -> dict[str, str]:
    """Entry, as the loss calls it -> key in the target."""
    needed: tuple[str, ...] = ("label",)
    optional: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    if isinstance(loss, TargetLoss):
        needed, optional, more = loss.target_keys, loss.optional_keys, loss.named_keys
    given = {needed[0]: renamed} if isinstance(renamed, str) else {**renamed}
    if not isinstance(loss, TargetLoss) and given:
        needed = tuple(given)  # whatever is named
    known = [*needed, *optional, *more]
    unknown = sorted({*given} - {*known})
    if unknown:
        raise ValueError(f"keys: {unknown} name no entry that the loss {name!r} reads; these are {known}.")
    missing = [entry for entry in needed if given.get(entry, entry) is None]
    if missing:
        raise ValueError(f"keys: the loss {name!r} needs {missing}; only optional entries can be left out by None.")
    entries = {entry: given.get(entry, entry) for entry in (*needed, *optional, *given)}
    return {entry: key for entry, key in entries.items() if key is not None}


def _value(value: Any, key: str, *, keep_meta: bool) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.as_tensor(value)
    check_not_resampled(value, key)
    return value if keep_meta else plain(value)


def _learns(loss: nn.Module) -> bool:
    return any(isinstance(module, Formulation) and module.has_multipliers for module in loss.modules())


def _check_multipliers(losses: Mapping[str, nn.Module]) -> None:
    """A multiplier belongs to one constraint of one loss."""
    owners: dict[Formulation, str] = {}
    for name, loss in losses.items():
        for module in loss.modules():
            if isinstance(module, Formulation) and module.has_multipliers and owners.setdefault(module, name) != name:
                raise ValueError(
                    f"losses: {owners[module]!r} and {name!r} share one {type(module).__name__}, whose multipliers "
                    "belong to the constraints of one loss; give each its own, such as copy.deepcopy(formulation)."
                )
