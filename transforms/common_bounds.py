"""One pair of size bounds for all images, from the segmentation of one patient (Kervadec 2020, 2.4.3).

`python -m medconstraints fit_common_bounds` writes the file that `level` of `LabelToBoundsd` takes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from medconstraints import checks

__all__ = ["fit_common_bounds", "load_common_bounds", "save_common_bounds"]

UNIT = "voxel"


def fit_common_bounds(
    labels: Sequence[Any],
    *,
    num_classes: int,
    slice_axis: int | None = None,
    factors: tuple[float, float] = (0.9, 1.1),
    classes: Sequence[int] | None = None,
) -> list[list[float]]:
    """Smallest and largest size of each class over the slices that have it, widened (Kervadec 2020, eq. 2.6).

    Args:
        labels: label maps (*S) or (1, *S), values 0..num_classes - 1; those of one patient in the paper.
        num_classes: number of classes with the background.
        slice_axis: sizes are counted in every slice across this axis; None counts them in the whole map. Give what the
            network gets: slices, or volumes.
        factors: the smallest size is multiplied by the first, the largest by the second, because patients differ.
        classes: the classes to fit, in the order of the returned bounds, where the training knows only some of them;
            None for all but the background.

    Returns:
        One [lower, upper] per class in voxels, rounded to 4 places. Slices without the class do not count.

    Raises:
        ValueError: an argument is outside its range, a label has other values, or a class is in none of the labels.

    Example:
        >>> fit_common_bounds([np.array([[[0, 1]], [[1, 1]], [[0, 0]]])], num_classes=2, slice_axis=0)
        [[0.9, 2.2]]
    """
    low, high = factors
    if not 0 <= low <= high:
        raise ValueError(f"factors: expected 0 <= lower <= upper, got {tuple(factors)}.")
    wanted = [*range(1, num_classes)] if classes is None else [*classes]
    if not wanted or len(set(wanted)) < len(wanted) or not set(wanted) <= set(range(1, num_classes)):
        raise ValueError(f"classes: expected different class numbers 1 to {num_classes - 1}, got {wanted}.")
    sizes: list[list[int]] = [[] for _ in wanted]
    for label in labels:
        whole = label[0] if label.ndim == 4 or (label.ndim == 3 and len(label) == 1) else label
        array = checks.label_array(whole, num_classes, name="labels")
        axis = checks.slice_axis(slice_axis, array.ndim)
        others = tuple(other for other in range(array.ndim) if other != axis)
        for found, cls in zip(sizes, wanted, strict=True):
            counts = np.atleast_1d((array == cls).sum(axis=others))
            found += counts[counts > 0].tolist()
    for found, cls in zip(sizes, wanted, strict=True):
        if not found:
            raise ValueError(f"labels: class {cls} is in none of the {len(labels)} label maps; add a case that has it.")
    return [[round(low * min(found), 4), round(high * max(found), 4)] for found in sizes]


def save_common_bounds(
    path: str | PathLike[str],
    bounds: Sequence[Sequence[float]],
    *,
    cases: Sequence[str],
    factors: tuple[float, float] = (0.9, 1.1),
    overwrite: bool = False,
) -> None:
    """Write bounds with where they come from: {"bounds": ..., "unit": "voxel", "cases": ..., "factors": ...}.

    Args:
        path: JSON file; its folder is made.
        bounds: one [lower, upper] per foreground class in voxels, see `fit_common_bounds`.
        cases: names of the label maps they were fitted to.
        factors: see `fit_common_bounds`.
        overwrite: replace an existing file.

    Raises:
        FileExistsError: the file exists and `overwrite` is False.
        ValueError: the bounds are no ordered pairs of numbers >= 0.
    """
    file, pairs = Path(path), _pairs(bounds, "bounds")
    if file.exists() and not overwrite:
        raise FileExistsError(f"output: {file} exists; choose another name, or allow overwriting (--overwrite).")
    content = {"bounds": pairs, "unit": UNIT, "cases": [*cases], "factors": [*factors]}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def load_common_bounds(path: str | PathLike[str]) -> list[list[float]]:
    """Read the bounds that `save_common_bounds` wrote: one [lower, upper] per foreground class in voxels.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not JSON, or not such a file, or counts in another unit.
    """
    file, write = Path(path), "write it with python -m medconstraints fit_common_bounds"
    if not file.is_file():
        raise FileNotFoundError(f"common_bounds: no file {file}; {write}.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"common_bounds: {file.name} is not valid JSON ({error}).") from error
    if not isinstance(content, dict) or "bounds" not in content or content.get("unit") != UNIT:
        raise ValueError(f'common_bounds: expected "bounds" and "unit": "{UNIT}" in {file.name}; {write}.')
    return _pairs(content["bounds"], f"common_bounds: {file.name}")


def _pairs(bounds: Any, name: str) -> list[list[float]]:
    try:
        pairs = [[float(low), float(high)] for low, high in bounds]
    except (TypeError, ValueError):
        pairs = []
    # A comparison with NaN is false.
    if not pairs or not all(0 <= low <= high < np.inf for low, high in pairs):
        raise ValueError(f"{name}: expected one [lower, upper] per class, 0 <= lower <= upper, got {bounds!r}.")
    return pairs
