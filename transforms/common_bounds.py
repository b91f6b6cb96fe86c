"""One pair of size bounds for all images, from the segmentation of one patient (Kervadec 2020, 2.4.3).

`python -m medconstraints.transforms.common_bounds --datalist my/datalist.json --num-classes 3 --slice-axis 2
--output common_bounds.json` writes the file that `common_bounds` of `LabelToBoundsd` takes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from monai.transforms import Compose

from medconstraints.checks import label_name

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
        >>> fit_common_bounds([np.array([[0, 1, 0], [1, 1, 1], [0, 0, 0]])], num_classes=2, slice_axis=0)
        [[0.9, 3.3]]
    """
    low, high = factors
    if not 0 <= low <= high:
        raise ValueError(f"factors: expected 0 <= lower <= upper, got {tuple(factors)}.")
    wanted = list(range(1, num_classes)) if classes is None else list(classes)
    if not wanted or len(set(wanted)) < len(wanted) or not set(wanted) <= set(range(1, num_classes)):
        raise ValueError(f"classes: expected different class numbers 1 to {num_classes - 1}, got {wanted}.")
    sizes: dict[int, list[int]] = {cls: [] for cls in wanted}
    for label in labels:
        array = np.asarray(label)
        array = array[0] if array.ndim == 4 or (array.ndim == 3 and array.shape[0] == 1) else array
        if slice_axis is not None and not 0 <= slice_axis < array.ndim:
            raise ValueError(f"slice_axis: expected None or an axis 0..{array.ndim - 1}, got {slice_axis}.")
        found = np.unique(array)
        if not np.isin(found, np.arange(num_classes)).all():
            raise ValueError(
                f"labels: expected class numbers 0 to {num_classes - 1}, got values such as {found[[0, -1]].tolist()}; "
                "set num_classes."
            )
        others = tuple(axis for axis in range(array.ndim) if axis != slice_axis)
        for cls in wanted:
            counts = np.atleast_1d((array == cls).sum(axis=others))
            sizes[cls] += counts[counts > 0].tolist()
    for cls in wanted:
        if not sizes[cls]:
            raise ValueError(f"labels: class {cls} is in none of the {len(labels)} label maps; add a case that has it.")
    return [[round(low * min(sizes[cls]), 4), round(high * max(sizes[cls]), 4)] for cls in wanted]


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
    file = Path(path)
    content = {
        "bounds": _checked_bounds(bounds, "bounds"),
        "unit": UNIT,
        "cases": list(cases),
        "factors": list(factors),
    }
    if file.exists() and not overwrite:
        raise FileExistsError(f"output: {file} exists; choose another name, or allow overwriting (--overwrite).")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def load_common_bounds(path: str | PathLike[str]) -> list[list[float]]:
    """Read the bounds that `save_common_bounds` wrote.

    Args:
        path: JSON file.

    Returns:
        One [lower, upper] per foreground class in voxels.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not JSON, or not such a file, or counts in another unit.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"common_bounds: no file {file}; write it with python -m medconstraints.transforms.common_bounds."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"common_bounds: {file.name} is not valid JSON ({error}).") from error
    if not isinstance(content, dict) or "bounds" not in content or content.get("unit") != UNIT:
        raise ValueError(
            f'common_bounds: expected {file.name} to hold an object with "bounds" and "unit": "{UNIT}"; write it with '
            "python -m medconstraints.transforms.common_bounds."
        )
    return _checked_bounds(content["bounds"], f"common_bounds: {file.name}")


def _checked_bounds(bounds: Any, name: str) -> list[list[float]]:
    try:
        pairs = [[float(low), float(high)] for low, high in bounds]
    except (TypeError, ValueError):
        pairs = []
    # A comparison with NaN is false.
    if not pairs or not all(0 <= low <= high < np.inf for low, high in pairs):
        raise ValueError(f"{name}: expected one [lower, upper] per class, 0 <= lower <= upper, got {bounds!r}.")
    return pairs


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module."""
    from medconstraints.data.datalist_sections import choose_segmented
    from medconstraints.transforms.chains import reading_transforms

    parser = argparse.ArgumentParser(prog="python -m medconstraints.transforms.common_bounds", description=__doc__)
    parser.add_argument(
        "--datalist", required=True, help="list with segmented cases; entries without label are passed over"
    )
    parser.add_argument("--section", default="training")
    parser.add_argument("--cases", type=int, default=1, help="labels to use, evenly spread over the section")
    parser.add_argument(
        "--patient", nargs="+", help='take all cases of these patients (entry "patient" of the list) instead'
    )
    parser.add_argument("--num-classes", type=int, required=True, help="of the labels, with the background")
    parser.add_argument("--classes", type=int, nargs="+", help="classes of the training, where not all; in its order")
    parser.add_argument("--slice-axis", type=int, help="count in slices across this axis (after orientation to RAS)")
    parser.add_argument(
        "--spacing-mm", type=float, nargs="+", default=[-1.0], help="resample as the training does; -1 keeps an axis"
    )
    parser.add_argument("--spatial-dims", type=int, default=3, choices=[2, 3], help="2 for lists of 2D images")
    parser.add_argument("--factors", type=float, nargs=2, default=[0.9, 1.1])
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    args = parser.parse_args(argv)
    try:
        if Path(args.output).exists() and not args.overwrite:
            raise FileExistsError(f"--output: {args.output} exists; choose another name or add --overwrite.")
        chosen = choose_segmented(args.datalist, args.section, cases=args.cases, patients=args.patient)
        read = Compose(
            reading_transforms(num_classes=args.num_classes, spacing_mm=args.spacing_mm, spatial_dims=args.spatial_dims)
        )
        labels = [read(item)["label"] for item in chosen]
        factors = (args.factors[0], args.factors[1])
        bounds = fit_common_bounds(
            labels,
            num_classes=args.num_classes,
            slice_axis=args.slice_axis,
            factors=factors,
            classes=args.classes,
        )
        names = [label_name(label, "label") for label in labels]
        save_common_bounds(args.output, bounds, cases=names, factors=factors, overwrite=args.overwrite)
    except (OSError, ValueError, RuntimeError) as error:
        # Compose raises a RuntimeError that names the transform; its cause names the file.
        sys.stderr.write(f"{error.__cause__ or error}\n")
        return 2
    sys.stdout.write(json.dumps(bounds) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
