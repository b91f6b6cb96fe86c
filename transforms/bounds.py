"""Bounds on any statistic of each object, made from its label: the small tensor that the constraint losses take."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from torch import Tensor

from medconstraints import checks
from medconstraints.statistics import (
    is_relation,
    soft_centroid,
    soft_moments,
    soft_outside_extent,
    soft_size,
    soft_size_ratio,
    soft_spread,
)
from medconstraints.transforms.common_bounds import load_common_bounds

__all__ = ["LabelToBoundsd", "free_bounds", "is_never_negative", "label_to_bounds", "presence_bounds"]

LEVELS = ("individual", "tags", "none")
UNITS = ("voxel", "mm")

Statistic = Callable[..., Tensor]
Margin = float | Sequence[float] | None

_NEVER_NEGATIVE = (soft_size, soft_centroid, soft_moments, soft_spread, soft_size_ratio, soft_outside_extent)


def label_to_bounds(
    label: np.ndarray | Tensor,
    num_classes: int,
    statistic: Statistic = soft_size,
    *,
    margin: Margin = None,
    relative_margin: Margin = None,
    options: Mapping[str, Any] | None = None,
) -> Tensor:
    """Value of a statistic in the label -+ a margin, for each class, or pair of classes, that the label has.

    value -+ margin (Kervadec 2020, eq. 3.12), or value * (1 -+ relative_margin) (eq. 2.7); not below 0 for sizes,
    centroids, spreads, ratios and extents. Free are the background, unless a relation names it, and what concerns an
    absent class, except its size, which gets 0 to 0.

    Args:
        label: (*S), 2D or 3D, class numbers 0..num_classes - 1 on every voxel.
        num_classes: classes of the network with the background, C.
        statistic: function `probs (B, C, *S) -> (B, C, M)`, or a `relation` of `pairs` of classes, (B, R, M). It gets
            the label as probabilities 0 and 1 in float64: B = 1, one class at a time, or for a relation all.
        margin: in the statistic's unit, >= 0, one or M.
        relative_margin: a share of the value, >= 0, one or M; 0.1 when no margin is given.
        options: further arguments of the statistic, such as {"spacing_mm": (1, 1, 3)} for mm, or {"image": (1, M, *S)}.

    Returns:
        (C, M, 2), or (R, M, 2), float32, lower and upper; free is -inf and inf.

    Raises:
        ValueError: an argument is outside its range, or the label has other values.

    Example:
        >>> label = np.array([[0, 1, 1], [0, 1, 1]])
        >>> label_to_bounds(label, 2, relative_margin=0.25).tolist()
        [[[-inf, inf]], [[3.0, 5.0]]]
        >>> label_to_bounds(label, 2, soft_centroid, margin=1)[1].tolist()
        [[0.0, 1.5], [0.5, 2.5]]
    """
    margins = _margins(margin, relative_margin)
    array = checks.label_array(label, num_classes)
    known = _known_rows(array, num_classes, statistic)
    values = _values(array, known, num_classes, statistic, options or {})
    for name, given in margins.items():
        if given.size not in (1, values.shape[1]):
            raise ValueError(
                f"{name}: expected one value, or one for each of {values.shape[1]} components, got {given}."
            )
    step, share = margins.values()
    sides = np.stack([values * (1 - share), values * (1 + share)])  # a negative value turns them round
    lower, upper = sides.min(0) - step, sides.max(0) + step
    if is_never_negative(statistic):
        lower = np.maximum(lower, 0)
    return _bounds(lower, upper, known, statistic)


def presence_bounds(
    label: np.ndarray | Tensor,
    num_classes: int,
    bounds: Sequence[Any] | np.ndarray,
    statistic: Statistic = soft_size,
) -> Tensor:
    """The same bounds in every image that has the class (Kervadec 2020, eq. 2.6), or both classes of a pair.

    Args:
        label: see `label_to_bounds`.
        num_classes: see `label_to_bounds`.
        bounds: one [lower, upper], or M of them, for each foreground class, or for each pair of a relation.
        statistic: what they are bounds of; its value is not computed.

    Returns:
        As `label_to_bounds`.

    Raises:
        ValueError: the bounds are not ordered or not as many as classes, or the label has other values.

    Example:
        >>> presence_bounds(np.array([[0, 1, 1]]), 3, [[1, 9], [2, 5]]).tolist()
        [[[-inf, inf]], [[1.0, 9.0]], [[0.0, 0.0]]]
    """
    table = _table(bounds, num_classes, statistic, "bounds")
    known = _known_rows(checks.label_array(label, num_classes), num_classes, statistic)
    table = np.concatenate([np.zeros((len(known) - len(table), *table.shape[1:])), table])  # the background is free
    return _bounds(table[..., 0], table[..., 1], known, statistic)


def free_bounds(rows: int, components: int) -> Tensor:
    """Bounds (rows, components, 2) that bound nothing."""
    return torch.tensor([-math.inf, math.inf]).repeat(rows, components, 1)


def is_never_negative(statistic: Statistic, *, size: bool = False) -> bool:
    """Whether a statistic has no values below 0, or, with `size`, whether it is the size."""
    function = _function(statistic)
    return function is soft_size if size else function in _NEVER_NEGATIVE


class LabelToBoundsd(MapTransform):
    """Bounds of a label, for experiments that pretend that only a statistic of the objects is known.

    Reads the label at `keys`, (1, *S), and writes `bounds_key`, (C, M, 2) float32, lower and upper, background first,
    or (R, M, 2) for a relation. The bounds are those of the array at this place in the chain: put it after all spatial
    augmentation, because a crop, a zoom or a rotation changes sizes and places. To constrain the volume that all slices
    of a patient have together (Kervadec 2020, 2.4.4), put it before the slicing and give each slice the bounds of its
    volume.

    Args:
        keys: key of the label.
        bounds_key: key of the bounds.
        num_classes: classes of the network with the background, C.
        statistic: see `label_to_bounds`. In a config: {"_target_": "medconstraints.statistics.soft_centroid",
            "_mode_": "callable"}, where more keys set its arguments. Arguments without a default, such as `image`, are
            taken from the item, under their name.
        level: what is known (Kervadec 2020, 2.4.3). "individual": the value -+ a margin. "tags", of sizes (eq. 2.5): 1
            voxel to the whole image where the class is present. Common bounds, see `presence_bounds`: a list in
            `units`, or the path of the .json file of sizes that `python -m medconstraints fit_common_bounds` writes.
            "none": free bounds; no label is needed, but an "image".
        margin: see `label_to_bounds`, in `units`.
        relative_margin: see `label_to_bounds`.
        units: "voxel", or "mm" (mm^D for sizes), with the spacing of the label's affine. The loss needs the same: it is
            written to "spacing_mm", (D,), the name under which `ConstraintLoss` takes it.
        full_key: an item whose value here is true gets free bounds, because its whole label trains it (hybrid
            training).
        allow_missing_keys: leave items without a label as they are.

    Raises:
        ValueError: an argument is outside its range, or the label is not (1, *S), has other values than
            0..num_classes - 1 or (for "mm") no affine; the message names the file.
        KeyError: no label, or no entry for an argument of the statistic.

    Example:
        >>> item = {"label": torch.tensor([[[0, 1, 1], [0, 1, 0]]])}
        >>> LabelToBoundsd(num_classes=2, level="tags")(item)["bounds"].tolist()
        [[[-inf, inf]], [[1.0, 6.0]]]
    """

    def __init__(
        self,
        keys: KeysCollection = "label",
        bounds_key: str = "bounds",
        *,
        num_classes: int,
        statistic: Statistic = soft_size,
        level: str | PathLike[str] | Sequence[Any] = "individual",
        margin: Margin = None,
        relative_margin: Margin = None,
        units: str = "voxel",
        full_key: str = "fully_labelled",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.key = checks.one_key(keys)
        self.bounds_key = bounds_key
        self.num_classes = checks.whole_number("num_classes", num_classes, 2)
        if not callable(statistic):
            raise TypeError(f"statistic: expected a function such as soft_size, got {statistic!r}.")
        _pairs(statistic, self.num_classes)
        _margins(margin, relative_margin)
        self.statistic = statistic
        self.units = checks.choice("units", units, UNITS)
        self.level, self.common = self._checked_level(level)
        self.margin = margin
        self.relative_margin = relative_margin
        self.full_key = full_key

    def _checked_level(self, level: Any) -> tuple[str, np.ndarray | None]:
        """The level, "common" where it is bounds or their file, and these."""
        is_size = _function(self.statistic) is soft_size
        if isinstance(level, str) and level in LEVELS:
            if level == "tags" and not is_size:
                raise ValueError('level: expected "tags" for sizes alone: 1 voxel to all is none of this statistic.')
            if level == "individual" and self.units == "mm" and "spacing_mm" not in _arguments(self.statistic):
                raise ValueError('units: expected a statistic with an argument spacing_mm for "mm", got one without.')
            return level, None
        if isinstance(level, str) and not level.endswith(".json"):
            levels = ", ".join(LEVELS)
            raise ValueError(
                f"level: expected {levels}, common bounds, or the path of their .json file, got {level!r}."
            )
        if isinstance(level, str | PathLike):
            if self.units != "voxel" or not is_size:
                raise ValueError(f'level: expected soft_size and units "voxel" for {level}: such a file counts voxels.')
            level = load_common_bounds(level)
        return "common", _table(level, self.num_classes, self.statistic, "level")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the bounds to a copy of `data`."""
        item = dict(data)
        # At "none" nothing is looked up in the label; how many components there are, an image tells as well.
        key = "image" if self.level == "none" and self.key not in item else self.key
        if key not in item:
            if self.allow_missing_keys:
                return item
            raise KeyError(f"{key}: expected this key in the item, got {sorted(map(str, item))}.")
        volume, name = item[key], checks.label_name(item[key], key)
        if key == self.key:
            checks.label_map(volume, name)
        spacing = checks.affine_spacing(volume, name) if self.units == "mm" else None
        try:
            if self.level == "none" or checks.fully_labelled(item, self.full_key):
                nothing = np.zeros(tuple(volume.shape[1:]), dtype=np.uint8)
                item[self.bounds_key] = free_bounds(*self._bounds(nothing, item, spacing).shape[:2])
            else:
                item[self.bounds_key] = self._bounds(volume[0], item, spacing)
        except ValueError as error:
            raise ValueError(f"{name}: {str(error).removeprefix('label: ')}") from error
        if spacing is not None:
            item["spacing_mm"] = torch.tensor(spacing, dtype=torch.float32)
        return item

    def _bounds(self, label: Any, item: Mapping[Hashable, Any], spacing: tuple[float, ...] | None) -> Tensor:
        table = self.common
        if self.level == "tags":
            voxel = math.prod(spacing or (1.0,))
            table = np.array([[[voxel, voxel * math.prod(label.shape)]]] * (self.num_classes - 1))
        if table is not None:
            return presence_bounds(label, self.num_classes, table, self.statistic)
        arguments = _arguments(self.statistic)
        options: dict[str, Any] = {"spacing_mm": spacing} if spacing is not None and "spacing_mm" in arguments else {}
        for name, default in arguments.items():
            if default is inspect.Parameter.empty and name not in options:
                if name not in item:
                    raise KeyError(f"{name}: expected this argument of the statistic, got {sorted(map(str, item))}.")
                options[name] = checks.plain(torch.as_tensor(item[name]))[None]
        margins = {"margin": self.margin, "relative_margin": self.relative_margin}
        return label_to_bounds(label, self.num_classes, self.statistic, **margins, options=options)


def _function(statistic: Statistic) -> Statistic:
    """The function inside of `functools.partial`, as a config makes it."""
    while isinstance(statistic, functools.partial):
        statistic = statistic.func
    return statistic


def _arguments(statistic: Statistic) -> dict[str, Any]:
    """Name and default of the arguments besides the probabilities."""
    return {name: entry.default for name, entry in [*inspect.signature(statistic).parameters.items()][1:]}


def _pairs(statistic: Statistic, num_classes: int) -> Sequence[Sequence[int]] | None:
    """The pairs of classes of a relation; None for a statistic of single classes."""
    if not is_relation(statistic):
        return None
    pairs: Any = _arguments(statistic).get("pairs", inspect.Parameter.empty)
    if pairs is inspect.Parameter.empty or any(not 0 <= cls < num_classes for pair in pairs for cls in pair):
        raise ValueError(
            f"statistic: expected pairs of the classes 0..{num_classes - 1}, such as functools.partial(statistic, "
            f"pairs=[[1, 2]]), got {pairs!r}."
        )
    return pairs


def _known_rows(array: np.ndarray, num_classes: int, statistic: Statistic) -> np.ndarray:
    """Whether there is something to bound: the foreground classes, or pairs of classes, that are present."""
    present = np.bincount(array.ravel(), minlength=num_classes) > 0
    pairs = _pairs(statistic, num_classes)
    if pairs is not None:
        return np.array([present[first] and present[second] for first, second in pairs])
    present[0] = False
    return present


def _values(array: np.ndarray, known: np.ndarray, num_classes: int, statistic: Statistic, options: Any) -> np.ndarray:
    """Values (R, M) in float64; those of rows that are not known mean nothing."""

    def of(classes: Sequence[int]) -> np.ndarray:
        masks = torch.from_numpy(np.stack([array == cls for cls in classes])[None])
        return np.asarray(statistic(masks.double(), **options)[0], dtype=np.float64)

    if is_relation(statistic):
        return of(range(num_classes))
    # One class at a time: with many classes in a large volume all masks together would be too much.
    classes = [*np.flatnonzero(known)] or [1]
    rows = np.concatenate([of([cls]) for cls in classes])
    values = np.zeros((num_classes, rows.shape[1]))
    values[classes] = rows
    return values


def _bounds(lower: np.ndarray, upper: np.ndarray, known: np.ndarray, statistic: Statistic) -> Tensor:
    bounds = free_bounds(*lower.shape)
    bounds[known] = torch.from_numpy(np.stack([lower, upper], axis=-1)[known]).float()
    if _function(statistic) is soft_size:
        bounds[1:][torch.from_numpy(~known[1:])] = 0
    return bounds


def _margins(margin: Margin, relative_margin: Margin) -> dict[str, np.ndarray]:
    """Both margins, one of which is 0."""
    if margin is not None and relative_margin is not None:
        raise ValueError("margin: expected a margin or a relative_margin, got both; remove one.")
    if margin is None and relative_margin is None:
        relative_margin = 0.1
    given = {"margin": margin, "relative_margin": relative_margin}
    margins = {name: np.array(0.0 if value is None else value, dtype=float, ndmin=1) for name, value in given.items()}
    for name, values in margins.items():
        if values.ndim != 1 or not (np.isfinite(values) & (values >= 0)).all():
            raise ValueError(f"{name}: expected a number >= 0, or one for each component, got {values.tolist()}.")
    return margins


def _table(bounds: Any, num_classes: int, statistic: Statistic, name: str) -> np.ndarray:
    """Common bounds as (R, M, 2), without a row for the background."""
    pairs = _pairs(statistic, num_classes)
    rows, what = (num_classes - 1, "foreground classes") if pairs is None else (len(pairs), "pairs")
    try:
        table = np.asarray(bounds, dtype=np.float64)
        table = table[:, None] if table.ndim == 2 else table
    except (TypeError, ValueError):
        table = np.empty(0)
    good = table.ndim == 3 and table.shape[::2] == (rows, 2) and bool((table[..., 0] <= table[..., 1]).all())
    if not good or (_function(statistic) is soft_size and (table < 0).any()):
        raise ValueError(
            f"{name}: expected [lower, upper], lower <= upper, for each of the {rows} {what}, and >= 0 for sizes, got "
            f"{bounds!r}."
        )
    return table
