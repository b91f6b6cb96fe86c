"""Targets of segmented and unsegmented items side by side."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.transforms import Transform
from torch import Tensor

from medconstraints import checks
from medconstraints.transforms.bounds import LabelToBoundsd

__all__ = ["SUPERVISION", "HybridLabeld", "PredictedBoundsd", "semi_supervised_transforms", "statistic_transforms"]

SUPERVISION = ("curriculum", "oracle", "proposals", "labelled", "mean_teacher")


class HybridLabeld(Transform):
    """The label of a segmented item, or the proposal of an unsegmented one, as its "weak_label".

    An unsegmented item without a proposal gets `ignore_index` on every voxel. Reads "fully_labelled"; the label goes.

    Args:
        ignore_index: value of what is not annotated.
        proposals: unsegmented items must have one.
        foreground_only: of proposals, leave the background open (Kervadec 2020, section 5.4.1).

    Raises:
        KeyError: a segmented item has no label, or an unsegmented one no proposal.
    """

    def __init__(self, *, ignore_index: int = -1, proposals: bool = False, foreground_only: bool = False) -> None:
        self.ignore_index = ignore_index
        self.proposals = checks.flag("proposals", proposals)
        self.foreground_only = checks.flag("foreground_only", foreground_only)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the weak label to a copy of `data`."""
        item = dict(data)
        label, proposal = item.pop("label", None), item.pop("proposal", None)
        if checks.fully_labelled(item, "fully_labelled"):
            if label is None:
                raise KeyError(f"label: expected this key in the item, got {sorted(map(str, item))}.")
            weak = torch.as_tensor(label)
        elif proposal is not None:
            weak = torch.as_tensor(proposal)
            if self.foreground_only:
                weak = weak.masked_fill(weak == 0, self.ignore_index)
        elif self.proposals:
            raise KeyError(f"proposal: {item.get('case', 'an item')} has none; set --proposals_dir to the masks.")
        else:
            weak = torch.full_like(torch.as_tensor(item["image"])[:1], self.ignore_index)
        # Slices become MONAI's tensors by some transforms and not by others; a batch of both does not collate.
        item["weak_label"] = checks.plain(weak).to(torch.float32)
        return item


class PredictedBoundsd(Transform):
    """Bounds of an unsegmented item from what a regressor says of it; of a segmented one bounds that bound nothing.

    Put it behind all spatial transforms: what no longer is as the regressor saw it, is refused.

    Args:
        predictions: `medconstraints.engines.StatisticPredictions`.
    """

    def __init__(self, predictions: Any) -> None:
        self.predictions = predictions

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the bounds to a copy of `data`."""
        full = checks.fully_labelled(data, "fully_labelled")
        return {**data, **(self.predictions.free() if full else self.predictions.bounds(data))}


def statistic_transforms(
    statistics: Mapping[str, Callable[..., Tensor]],
    *,
    num_classes: int,
    level: str = "individual",
    relative_margin: float = 0.0,
    free_labelled: bool = False,
) -> list[Callable[..., Any]]:
    """Bounds of several statistics of the label, each at `<name>_bounds`, see `LabelToBoundsd`.

    Args:
        statistics: name -> statistic.
        num_classes: of the label.
        level: "individual" or "none".
        relative_margin: 0 gives the values themselves, as a regression learns them.
        free_labelled: whether the bounds of segmented items are free.
    """
    return [
        LabelToBoundsd(
            bounds_key=f"{name}_bounds",
            num_classes=num_classes,
            statistic=statistic,
            level=level,
            relative_margin=relative_margin,
            full_key="fully_labelled" if free_labelled else "",
        )
        for name, statistic in statistics.items()
    ]


def semi_supervised_transforms(
    supervision: str,
    *,
    statistics: Mapping[str, Callable[..., Tensor]],
    num_classes: int,
    predictions: Any,
    read_keys: Sequence[str],
    margin: float = 0.1,
    foreground_only: bool = False,
) -> list[Callable[..., Any]]:
    """Weak label and bounds of an item; put it behind all spatial transforms.

    Args:
        supervision: what trains beside the labels of segmented items. "curriculum": bounds from `predictions`.
            "oracle": bounds from the labels of the unsegmented items. "proposals": their masks under "proposal".
            "labelled", "mean_teacher": nothing here.
        statistics: name -> statistic that is bounded.
        num_classes: of the label.
        predictions: see `PredictedBoundsd`.
        read_keys: what the loss reads of a batch.
        margin: share of the oracle's bounds.
        foreground_only: see `HybridLabeld`.

    Raises:
        ValueError: the loss does not read what the supervision gives, or reads what it does not give.
    """
    checks.choice("supervision", supervision, SUPERVISION)
    bounded = any(f"{name}_bounds" in read_keys for name in statistics)
    if supervision in ("curriculum", "oracle") and not bounded:
        raise ValueError(
            f"supervision: {supervision!r} bounds {', '.join(statistics)}, but the loss reads {', '.join(read_keys)} "
            "alone; leave mean_teacher.json out, or the supervision as it sets it."
        )
    if supervision == "mean_teacher" and bounded:
        raise ValueError("supervision: 'mean_teacher' needs its loss and its teacher; put mean_teacher.json behind.")
    level = "individual" if supervision == "oracle" else "none"
    bounds: list[Callable[..., Any]] = (
        [PredictedBoundsd(predictions)]
        if supervision == "curriculum"
        else statistic_transforms(
            statistics, num_classes=num_classes, level=level, relative_margin=margin, free_labelled=True
        )
    )
    return [*bounds, HybridLabeld(proposals=supervision == "proposals", foreground_only=foreground_only)]
