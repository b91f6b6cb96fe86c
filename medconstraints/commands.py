"""Commands that fit bounds to a few segmented cases of a datalist, read as the training reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.transforms import Compose

from medconstraints import boxes
from medconstraints.checks import label_name
from medconstraints.data.datalist_sections import choose_segmented
from medconstraints.transforms import common_bounds
from medconstraints.transforms.chains import reading_transforms

__all__ = ["fit_common_bounds", "fit_filling"]


def fit_common_bounds(
    *,
    datalist: str,
    num_classes: int,
    output: str,
    section: str = "training",
    cases: int = 1,
    patients: Sequence[str] | None = None,
    classes: Sequence[int] | None = None,
    slice_axis: int | None = None,
    spacing_mm: Sequence[float] = (-1.0,),
    spatial_dims: int = 3,
    factors: Sequence[float] = (0.9, 1.1),
    overwrite: bool = False,
) -> str:
    """Fit one pair of size bounds for all images to a few labels, and write the file that `common_bounds` takes.

    Args:
        datalist: list with segmented cases; entries without label are passed over.
        num_classes: of the labels, with the background.
        output: JSON file to write.
        section: of the list.
        cases: labels to use, evenly spread over the section.
        patients: take all cases of these patients (entry "patient" of the list) instead.
        classes: classes of the training, where not all; in its order.
        slice_axis: count in slices across this axis (after orientation to RAS).
        spacing_mm: resample as the training does; -1 keeps an axis.
        spatial_dims: 2 for lists of 2D images.
        factors: the smallest size is multiplied by the first, the largest by the second.
        overwrite: replace an existing output.
    """
    if Path(output).exists() and not overwrite:
        raise FileExistsError(f"--output: {output} exists; choose another name or add --overwrite")
    entries = choose_segmented(datalist, section, cases=cases, patients=patients)
    labels = _labels(entries, num_classes=num_classes, spacing_mm=spacing_mm, spatial_dims=spatial_dims)
    widened = _pair("factors", factors)
    bounds = common_bounds.fit_common_bounds(
        labels, num_classes=num_classes, slice_axis=slice_axis, factors=widened, classes=classes
    )
    names = [label_name(label, "label") for label in labels]
    common_bounds.save_common_bounds(output, bounds, cases=names, factors=widened, overwrite=overwrite)
    return json.dumps(bounds)


def fit_filling(
    *,
    datalist: str,
    num_classes: int,
    section: str = "training",
    cases: int = 10,
    slice_axis: int | None = None,
    mode: str = "class",
    quantiles: Sequence[float] = (0.05, 0.95),
) -> str:
    """Fit how much of its boxes an organ fills, as `--filling` of the bundle `box_prior` takes it.

    Args:
        datalist: list with segmented cases; entries without label are passed over.
        num_classes: with the background.
        section: of the list.
        cases: labels to use, evenly spread over the section.
        slice_axis: flat boxes across this axis (after orientation to RAS).
        mode: "class" or "component", the `box_mode` of the training.
        quantiles: lower and upper quantile over the boxes.
    """
    labels = _labels(choose_segmented(datalist, section, cases=cases), num_classes=num_classes)
    low_high = _pair("quantiles", quantiles)
    return json.dumps(
        boxes.fit_filling(labels, num_classes=num_classes, mode=mode, slice_axis=slice_axis, quantiles=low_high)
    )


def _pair(name: str, values: Sequence[float]) -> tuple[float, float]:
    if len(values) != 2:
        raise ValueError(f"{name}: expected two numbers, got {list(values)}.")
    return values[0], values[1]


def _labels(entries: Sequence[dict[str, Any]], **how: Any) -> list[Any]:
    read = Compose(reading_transforms(**how))
    try:
        return [read(entry)["label"] for entry in entries]
    except RuntimeError as error:  # names a transform; its cause names the file
        raise ValueError(error.__cause__ or error) from error
