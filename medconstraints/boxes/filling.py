"""How much of its boxes an organ fills, fitted to a few segmented cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from medconstraints.boxes.from_label import label_to_boxes

__all__ = ["fit_filling"]


def fit_filling(
    labels: Sequence[Any],
    *,
    num_classes: int,
    mode: str = "class",
    slice_axis: int | None = None,
    quantiles: tuple[float, float] = (0.05, 0.95),
    slack: float = 0.0,
) -> list[list[float]]:
    """`filling` for `BoxPriorLoss` from a few label maps: quantiles of the filled share of the boxes.

    Args:
        labels: label maps (*S) or (1, *S), values 0..num_classes - 1.
        num_classes: number of classes with the background.
        mode: as for `label_to_boxes`; give what the training gets (`box_mode` of the bundle, "class" there too).
        slice_axis: as for `label_to_boxes`; give what the loss gets.
        quantiles: lower and upper quantile over the boxes, each box counting with its volume.
        slack: widens both bounds by this share of them.

    Returns:
        One [lower, upper] per foreground class, rounded to 4 places.

    Raises:
        ValueError: a class is in none of the labels, or the quantiles are not ordered.

    Example:
        >>> fit_filling([np.array([[0, 1, 1], [0, 0, 1]])], num_classes=2)
        [[0.75, 0.75]]
    """
    low, high = quantiles
    if not 0 <= low <= high <= 1:
        raise ValueError(f"quantiles: expected 0 <= lower <= upper <= 1, got {quantiles}.")
    filled: dict[int, list[tuple[float, int]]] = {cls: [] for cls in range(1, num_classes)}
    for label in labels:
        array = np.asarray(label)
        array = array[0] if array.ndim == 4 or (array.ndim == 3 and array.shape[0] == 1) else array
        dims = array.ndim
        for row in label_to_boxes(array, mode=mode, slice_axis=slice_axis).tolist():
            inside = array[tuple(slice(a, b) for a, b in zip(row[1 : 1 + dims], row[1 + dims :], strict=True))]
            filled.setdefault(row[0], []).append((float((inside == row[0]).mean()), inside.size))
    bounds = []
    for cls in range(1, num_classes):
        if not filled[cls]:
            raise ValueError(f"labels: class {cls} is in none of the {len(labels)} label maps; add a case that has it.")
        share, volume = (np.array(column, dtype=np.float64) for column in zip(*filled[cls], strict=True))
        order = np.argsort(share)
        position = (np.cumsum(volume[order]) - volume[order] / 2) / volume.sum()
        lower, upper = np.interp([low, high], position, share[order])
        bounds.append([round(float(lower * (1 - slack)), 4), round(float(min(upper * (1 + slack), 1.0)), 4)])
    return bounds
