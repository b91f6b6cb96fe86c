"""How much of its boxes an organ fills, fitted to a few segmented cases.

`python -m medconstraints.transforms.size_bounds --datalist my/datalist.json --num-classes 3 --slice-axis 1`
prints the bounds in the form that `--size_bounds` of a bundle takes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from monai.transforms import Compose

from medconstraints.transforms.boxes import label_to_boxes

__all__ = ["fit_size_bounds"]


def fit_size_bounds(
    labels: Sequence[Any],
    *,
    num_classes: int,
    mode: str = "class",
    slice_axis: int | None = None,
    quantiles: tuple[float, float] = (0.05, 0.95),
    slack: float = 0.0,
) -> list[list[float]]:
    """`size_bounds` for `BoxPriorLoss` from a few label maps: quantiles of the filled share of the boxes.

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


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module."""
    from medconstraints.data.datalist_sections import choose_segmented
    from medconstraints.transforms.chains import reading_transforms

    parser = argparse.ArgumentParser(prog="python -m medconstraints.transforms.size_bounds", description=__doc__)
    parser.add_argument(
        "--datalist", required=True, help="list with segmented cases; entries without label are passed over"
    )
    parser.add_argument("--section", default="training")
    parser.add_argument("--cases", type=int, default=10, help="labels to use, evenly spread over the section")
    parser.add_argument("--num-classes", type=int, required=True, help="with the background")
    parser.add_argument("--slice-axis", type=int, help="flat boxes across this axis (after orientation to RAS)")
    parser.add_argument("--mode", default="class", choices=["class", "component"], help="box_mode of the training")
    parser.add_argument("--quantiles", type=float, nargs=2, default=[0.05, 0.95])
    args = parser.parse_args(argv)
    try:
        chosen = choose_segmented(args.datalist, args.section, cases=args.cases)
        read = Compose(reading_transforms(num_classes=args.num_classes))
        bounds = fit_size_bounds(
            [read(item)["label"] for item in chosen],
            num_classes=args.num_classes,
            mode=args.mode,
            slice_axis=args.slice_axis,
            quantiles=tuple(args.quantiles),
        )
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        # Compose raises a RuntimeError that names the transform; its cause names the file.
        sys.stderr.write(f"{error.__cause__ or error}\n")
        return 2
    sys.stdout.write(json.dumps(bounds) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
