"""The constraints that boxes make, as rows with a name: kind and side, sample, class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from medconstraints.statistics.box_plan import BoxPlan

__all__ = ["FUNCTIONS", "KINDS", "BoxConstraints", "box_constraints"]

# Constraint functions of a class, and the kind of each, by which they are weighted and logged.
FUNCTIONS = ("tightness", "size_lower", "size_upper", "emptiness")
KINDS = ("tightness", "size", "size", "emptiness")

_Scale = tuple[np.ndarray | float, np.ndarray | float, np.ndarray | float]


class BoxConstraints(NamedTuple):
    """R constraints: the residual of a row is `offset + scale * mass`, its cost counts with `weight`.

    The rows of the bands stand first, in the order of the plan, then the images and classes (I, K) with their lower
    size bound, again with the upper one, and with their emptiness: as the masses do. Arrays (R,) on the host.

    Attributes:
        sample: sample of the batch.
        label: class, from 0 on, without the background.
        function: which of `FUNCTIONS`.
        offset: residual of no mass.
        scale: residual of one more voxel.
        weight: of the cost; 0 where there is no constraint: no box, a box that the border cuts, a kind of weight 0.
    """

    sample: np.ndarray
    label: np.ndarray
    function: np.ndarray
    offset: np.ndarray
    scale: np.ndarray
    weight: np.ndarray

    def cells(self, classes: int) -> np.ndarray:
        """Where each row belongs in a flattened table (B, K, functions), (R,)."""
        return (self.sample * classes + self.label) * len(FUNCTIONS) + self.function


def box_constraints(
    plan: BoxPlan, *, filling: np.ndarray, weights: Mapping[str, float], normalization: str
) -> BoxConstraints:
    """Name, scale and weigh the constraints of a batch.

    Args:
        plan: from `plan_boxes`.
        filling: smallest and largest share of its boxes that an object fills, (1, 2) or (K, 2).
        weights: weight of each kind.
        normalization: "relative" or "paper", see `BoxPriorLoss`.

    Raises:
        ValueError: there are not as many bounds as classes.
    """
    images, classes = plan.volume.shape
    if len(filling) not in (1, classes):
        raise ValueError(
            f"filling: expected one pair or {classes} pairs, one per foreground class, got {len(filling)}."
        )
    scales = (_relative if normalization == "relative" else _paper)(plan, filling)
    bands, groups = len(plan.bands.group), np.arange(images * classes)
    group = np.concatenate([plan.bands.group, groups, groups, groups])
    function = np.repeat(np.arange(len(FUNCTIONS)), [bands, *[len(groups)] * 3])
    columns = np.empty((3, len(group)))  # offset, scale, weight
    of_groups = columns[:, bands:].reshape(3, 3, images, classes)
    for column in range(3):
        columns[column, :bands] = scales["tightness"][column]
        for number, name in enumerate(FUNCTIONS[1:]):
            of_groups[column, number] = scales[name][column]
    columns[2] *= np.array([weights[kind] for kind in KINDS])[function]
    return BoxConstraints(group // classes // plan.num_slices, group % classes, function, *columns)


def _sized(plan: BoxPlan) -> np.ndarray:
    """Where the size counts: a box that the border cuts says nothing about how much of its visible part is filled."""
    return (plan.volume > 0) & ~plan.cut


def _paper(plan: BoxPlan, filling: np.ndarray) -> dict[str, _Scale]:
    """Offset, scale and weight of each function, in voxels (eq. 6.6)."""
    voxels = float(np.prod(plan.shape))
    lower, upper = filling[:, 0] * plan.volume, filling[:, 1] * plan.volume
    return {
        "tightness": (plan.bands.width, -1.0, 1.0),
        "size_lower": (lower, -1.0, _sized(plan) / voxels),
        "size_upper": (-upper, 1.0, _sized(plan) / voxels),
        "emptiness": (0.0, 1.0, 1 / voxels),
    }


def _relative(plan: BoxPlan, filling: np.ndarray) -> dict[str, _Scale]:
    """Offset, scale and weight of each function, as shares of a band or a box.

    A class without a box in the batch takes the means over the others; without any box the image is the scale.
    """
    count, volume = (plan.volume > 0).sum(0).astype(np.float64), plan.volume.sum(0)
    present = count > 0
    classes = max(int(present.sum()), 1)
    if present.any():
        images, voxels = count[present].mean(), volume[present].mean()
    else:
        images, voxels = float(len(plan.volume)), float(len(plan.volume) * np.prod(plan.shape))
    images, voxels = np.where(present, count, images), np.where(present, volume, voxels)
    # Every image and class weighs as much as its boxes hold voxels; all weights add up to 1.
    share = plan.volume / voxels / classes
    bands = np.bincount(plan.bands.group, minlength=share.size)
    of_box = 1 / np.maximum(plan.volume, 1)
    return {
        "tightness": (1.0, -1 / plan.bands.width, (share.reshape(-1) / np.maximum(bands, 1))[plan.bands.group]),
        "size_lower": (filling[:, 0], -of_box, _sized(plan) * share),
        "size_upper": (-filling[:, 1], of_box, _sized(plan) * share),
        "emptiness": (0.0, images / voxels, 1 / (images * classes)),
    }
