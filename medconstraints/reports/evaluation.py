"""Score saved masks against their references: Dice, HD95 in millimetres and volumes, in the references' own geometry.

The command is `evaluation`.
"""

from __future__ import annotations

import logging
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance
from scipy import ndimage
from scipy.spatial import cKDTree

from medconstraints.data.run_settings import read_settings
from medconstraints.reports.datalist import Entry, find_predictions, read_section
from medconstraints.reports.volumes import Volume, read_labels, require_same_grid
from medconstraints.version import __version__

__all__ = ["dice", "evaluate_predictions", "format_summary", "hd95_mm"]

logger = logging.getLogger(__name__)

SHEAR = 1e-3  # cosine between two axes from which on they are not at right angles
_RESERVED = ("name", "image", "reason")
# A path from the root, at the start of an argument or after a character that can precede one.
_ABSOLUTE_PATH = re.compile(r"""(?<![^\s='"(\[,])(?:[A-Za-z]:[\\/]|/)[^\s='"()\[\],]*""")


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Dice overlap `2 |P n R| / (|P| + |R|)` of two boolean masks; 1 when both are empty, 0 when one is.

    Example:
        >>> dice(np.array([True, True, False]), np.array([True, False, False]))
        0.6666666666666666
    """
    total = int(prediction.sum()) + int(reference.sum())
    return 2.0 * int((prediction & reference).sum()) / total if total else 1.0


def hd95_mm(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing_mm: Sequence[float] | None = None,
    *,
    affine: np.ndarray | None = None,
) -> float | None:
    """95th percentile Hausdorff distance in mm: the larger of the two directed 95th percentiles.

    Directed distances go from every surface voxel of one mask to the nearest surface voxel of the other; each direction
    gives its own percentile (linear interpolation) and the larger one counts (MONAI's `compute_hausdorff_distance`;
    some tools pool both directions and report less). A surface voxel has a face neighbour outside the mask, and what
    lies beyond the volume is outside. Axes of one voxel are dropped first: along them every voxel would be surface.

    Args:
        prediction: boolean mask of 2 or 3 axes.
        reference: boolean mask of the same shape.
        spacing_mm: voxel edge along each axis, of a grid whose axes are at right angles.
        affine: in its place, voxel to mm of any grid; of a sheared one the distances are those of the voxels' centres.

    Returns:
        The distance, or None when a mask is empty and there is none.
    """
    if not prediction.any() or not reference.any():
        return None
    if spacing_mm is None:
        if affine is None:
            raise ValueError("spacing_mm, affine: expected one of them, got none.")
        edges = np.asarray(affine, dtype=np.float64)[:3, : prediction.ndim]
        spacing_mm = np.linalg.norm(edges, axis=0).tolist()
        if np.abs((edges / spacing_mm).T @ (edges / spacing_mm) - np.eye(prediction.ndim)).max() > SHEAR:
            return _hd95_of_points(*(np.argwhere(_surface(mask)) @ edges.T for mask in (prediction, reference)))
    axes = [axis for axis, size in enumerate(reference.shape) if size > 1]
    if len(axes) >= 2:
        shape = [reference.shape[axis] for axis in axes]
        prediction, reference = prediction.reshape(shape), reference.reshape(shape)
        spacing_mm = [spacing_mm[axis] for axis in axes]
    with warnings.catch_warnings():
        # MONAI 1.6 warns that MONAI itself passes this argument; the user can do nothing about it
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy")
        distance = compute_hausdorff_distance(
            torch.from_numpy(prediction)[None, None],
            torch.from_numpy(reference)[None, None],
            include_background=True,
            percentile=95,
            spacing=[float(edge) for edge in spacing_mm],
        )
    return float(distance)


def _surface(mask: np.ndarray) -> np.ndarray:
    return np.asarray(mask & ~ndimage.binary_erosion(mask))


def _hd95_of_points(first: np.ndarray, second: np.ndarray) -> float:
    directed = [cKDTree(there).query(here)[0] for here, there in ((first, second), (second, first))]
    return float(max(np.percentile(distances, 95) for distances in directed))


def evaluate_predictions(
    datalist: str | os.PathLike[str],
    section: str,
    predictions: str | os.PathLike[str],
    *,
    structures: Mapping[str, Sequence[int]],
    base_dir: str | os.PathLike[str] | None = None,
    suffix: str = "_seg",
) -> dict[str, Any]:
    """Score the saved prediction of every volume in one section of a data list.

    The prediction of image `a/b/case_001.nii.gz` is `case_001{suffix}.nii.gz` anywhere below `predictions`. It must
    lie on its reference's grid; nothing is resampled. Both masks empty: Dice 1; one empty: Dice 0; in either case HD95
    does not exist: None in the case, counted in `hd95_undefined`, left out of the mean. HD95 is the larger of the two
    directed 95th percentiles, in mm, see `hd95_mm`.

    Args:
        datalist: JSON file of the Medical Segmentation Decathlon's style.
        section: the key whose `{"image", "label"}` entries are scored.
        predictions: folder with the saved masks.
        structures: name -> label values that are united, e.g. `{"hippocampus": [1, 2]}`.
        base_dir: folder that the list's paths start from; default the list's own.
        suffix: what was appended to the image's name.

    Returns:
        A dict that JSON can hold. `cases`: for each volume `name`, `image`, and for each structure `dice`, `hd95_mm`,
        `volume_ml_prediction`, `volume_ml_reference`; one without a prediction on its grid has a `reason`. `summary`:
        for each structure `dice_mean`, `dice_sd`, `hd95_mm_mean`, `hd95_mm_sd`, `hd95_undefined`, `n`, over the volumes
        scored; sd is the sample standard deviation (ddof = 1), None below two values. `missing`: names of the volumes
        not scored. `structures`: as given. `settings`: what the run that wrote the masks left beside them in
        `settings.json`, or None. `provenance`: the command, date (UTC), seconds, versions. Neither has absolute paths.

    Raises:
        FileNotFoundError: when the list, the folder, a reference, or every prediction is missing.
        ValueError: for a bad section or structure, several predictions of one volume, a reference that is no label map,
            or predictions of which none can be scored.
    """
    start = time.perf_counter()
    checked = _check_structures(structures)
    entries = read_section(datalist, section, base_dir=base_dir)
    masks = find_predictions(entries, predictions, suffix=suffix)
    cases = [_scored(entry, masks[entry.name], checked, suffix) for entry in entries]
    if all("reason" in row for row in cases):
        raise ValueError(f"predictions: none can be scored; {cases[0]['reason']}")
    scores = {name: [row[name] for row in cases if name in row] for name in checked}
    for name, rows in scores.items():
        if all(score["volume_ml_reference"] == 0 for score in rows):
            logger.warning("%s: no reference has label values %s; check `structures`.", name, checked[name])
    settings = read_settings(Path(predictions))
    return {
        "cases": cases,
        "summary": {name: _summarise(rows) for name, rows in scores.items()},
        "missing": [row["name"] for row in cases if "reason" in row],
        "structures": checked,
        "settings": _shareable(settings),
        "provenance": _provenance(time.perf_counter() - start),
    }


def format_summary(results: Mapping[str, Any]) -> str:
    """The summary of `evaluate_predictions` as a small aligned text table, with the missing volumes below it."""
    rows = [["structure", "Dice", "sd", "HD95 mm", "sd", "undefined", "n"]]
    for name, row in results["summary"].items():
        digits = {"dice_mean": 4, "dice_sd": 4, "hd95_mm_mean": 2, "hd95_mm_sd": 2}
        numbers = ["-" if row[key] is None else f"{row[key]:.{places}f}" for key, places in digits.items()]
        rows.append([name, *numbers, str(row["hd95_undefined"]), str(row["n"])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    lines += [f"{case['name']}: {case['reason']}" for case in results["cases"] if "reason" in case]
    return "\n".join(lines)


def _check_structures(structures: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    if not isinstance(structures, Mapping) or not structures:
        raise ValueError(f'structures: expected names and label values such as {{"organ": [1]}}, got {structures!r}.')
    for name, values in structures.items():
        if not isinstance(name, str) or not name or name in _RESERVED:
            raise ValueError(f"structures: {name!r} cannot name a structure; use text other than {_RESERVED}.")
        if not isinstance(values, (list, tuple)) or not values or any(type(value) is not int for value in values):
            raise ValueError(f"structures: {name!r} has {values!r}; expected a list of label values such as [1, 2].")
    return {name: list(values) for name, values in structures.items()}


def _scored(entry: Entry, path: Path | None, structures: Mapping[str, Sequence[int]], suffix: str) -> dict[str, Any]:
    """Row of one volume; without a prediction with a reason in place of scores."""
    row: dict[str, Any] = {"name": entry.name, "image": entry.listed}
    if path is None:
        row["reason"] = f"no prediction {entry.name}{suffix}.nii.gz"
        logger.warning("%s: %s; it is not in the means.", entry.name, row["reason"])
        return row
    reference = read_labels(entry.label, f"label of {entry.name}")
    try:
        prediction = read_labels(path, f"prediction of {entry.name}")
        require_same_grid(prediction, reference)
    except ValueError as error:
        row["reason"] = str(error)
        logger.warning("%s: %s; it is not in the means.", entry.name, error)
        return row
    return row | {name: _score(prediction, reference, values) for name, values in structures.items()}


def _provenance(seconds: float) -> dict[str, Any]:
    return {
        "command": _shareable([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 2),
        "versions": {"torch": version("torch"), "monai": version("monai"), "medconstraints": __version__},
    }


def _score(prediction: Volume, reference: Volume, values: Sequence[int]) -> dict[str, float | None]:
    predicted, expected = np.isin(prediction.data, values), np.isin(reference.data, values)
    return {
        "dice": dice(predicted, expected),
        "hd95_mm": hd95_mm(predicted, expected, affine=reference.affine),
        "volume_ml_prediction": int(predicted.sum()) * reference.voxel_ml,
        "volume_ml_reference": int(expected.sum()) * reference.voxel_ml,
    }


def _summarise(scores: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for key in ("dice", "hd95_mm"):
        values = [value for score in scores if (value := score[key]) is not None]
        summary[f"{key}_mean"] = statistics.fmean(values) if values else None
        summary[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else None
    undefined = sum(score["hd95_mm"] is None for score in scores)
    return {**summary, "hd95_undefined": undefined, "n": len(scores)}


def _shareable(value: Any) -> Any:
    """The same without absolute paths: a home folder tells a name, and helps nobody to run a command again."""

    def shorten(text: str) -> str:
        path = Path(text)
        if path.is_relative_to(Path.cwd()):
            return path.relative_to(Path.cwd()).as_posix()
        return PureWindowsPath(text).name if text[1:2] == ":" else path.name

    if isinstance(value, dict):
        return {key: _shareable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_shareable(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if os.path.isabs(value):
        return shorten(value)
    return _ABSOLUTE_PATH.sub(lambda match: shorten(match.group()), value)
