"""What the volumes of a training were like, and in which ways another one is unlike them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medconstraints.volumes.facts import mask_facts
from medconstraints.volumes.files import read_voxels
from medconstraints.volumes.grids import grid_of

__all__ = ["cohort_line", "cohort_of", "intensities_of", "outside_of"]

MOST_VOLUMES = 20
MOST_IN_ORDER = 20  # classes of which each pair is compared
# How far a volume may lie outside of what was seen before it is told.
SIZE_SLACK = 1.5  # factor, of lengths and of ml
PLACE_SLACK = 0.1  # share of the image's extent
INTENSITY_SLACK = 0.5  # standard deviations of the image
LEAST_APART = 2.0  # mm, from which on an order is one
PERCENTILES = (1, 25, 50, 75, 99)
AXES = (("right of", "left of"), ("in front of", "behind"), ("above", "below"))


def intensities_of(image: npt.NDArray[Any]) -> list[float]:
    """Percentiles 1, 25, 50, 75 and 99 of the voxels of a normalised image (*S), of at most a million of them."""
    voxels = image.reshape(-1)[:: max(1, image.size >> 20)]
    return [round(float(value), 3) for value in np.percentile(voxels, PERCENTILES)]


def cohort_of(
    items: Sequence[Mapping[str, Any]], num_classes: int | None = None, *, nonzero: bool = False
) -> dict[str, Any]:
    """Least and largest of what describes at most 20 items of a datalist, evenly spread.

    Keys: "volumes", their number; "spacing_mm" and "size_mm" along right, anterior and superior; "intensities", see
    `intensities_of`; of each class, by its number as a text, "ml" and "place", see `mask_facts`; and "order", of two
    classes "a b" how many mm b lies to the right of a, in front of it and above it. Items whose files cannot be read
    here are left out: the training says what is wrong with them. Labels with more classes than the network
    (`num_classes`, with the background) tell of other classes, and nothing here.

    Args:
        items: with "image" and, where there is one, "label".
        num_classes: see above.
        nonzero: of the training: voxels that are 0 are not normalised.
    """
    found: dict[str, list[Any]] = {}
    classes: dict[str, dict[str, list[Any]]] = {"ml": {}, "place": {}, "order": {}}
    # Not every sixth, say: phases of one patient often take turns.
    chosen = np.linspace(0, len(items) - 1, min(MOST_VOLUMES, len(items))).round().astype(int)
    for item in (items[number] for number in chosen):
        image = item.get("image")
        try:
            voxels, affine = read_voxels(Path(image[0] if isinstance(image, list) else str(image)))
            if voxels.ndim < 3:
                continue
            for key, value in grid_of(voxels.shape, affine).items():
                found.setdefault(key, []).append(value)
            first = voxels.reshape(*voxels.shape[:3], -1)[..., 0]
            found.setdefault("intensities", []).append(intensities_of(_normalised(first, nonzero=nonzero)))
            if isinstance(item.get("label"), str):
                label, affine = read_voxels(Path(item["label"]))
                facts = mask_facts(label.reshape(label.shape[:3]), affine)
                for name, part in facts.items():
                    classes["ml"].setdefault(name, []).append(part["ml"])
                    classes["place"].setdefault(name, []).append(part["place"])
                for pair, apart in _order(facts):
                    classes["order"].setdefault(pair, []).append(apart)
        except (OSError, ValueError, MemoryError):
            continue
    if not found:
        return {}
    if num_classes is not None and any(int(name) >= num_classes for name in classes["ml"]):
        classes = {key: {} for key in classes}
    ranges = {key: _range(values) for key, values in found.items()}
    of_classes = {key: {name: _range(values) for name, values in parts.items()} for key, parts in classes.items()}
    return {"volumes": len(found["size_mm"]), **ranges, **of_classes}


def _normalised(image: npt.NDArray[Any], *, nonzero: bool) -> npt.NDArray[np.float64]:
    voxels = np.asarray(image.reshape(-1)[:: max(1, image.size >> 20)], dtype=np.float64)
    used = voxels != 0 if nonzero else np.ones(voxels.shape, bool)
    inside = voxels[used]
    return np.where(used, (voxels - inside.mean()) / max(inside.std(), 1e-12), 0.0)


def _order(facts: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, list[float]]]:
    """Pairs of classes that are there, and how far the second lies from the first, RAS mm."""
    places = {str(part["value"]): part["centroid_mm"] for part in facts.values() if part["voxels"]}
    for first, second in combinations(list(places)[:MOST_IN_ORDER], 2):
        apart = np.subtract(places[second], places[first])
        yield f"{first} {second}", apart.round(2).tolist()


def _range(values: Sequence[Any]) -> list[Any]:
    array = np.array(values)
    return [array.min(0).tolist(), array.max(0).tolist()]


def cohort_line(cohort: Mapping[str, Any], total: int) -> str:
    """The cohort in a line, for the log of a training."""
    if not cohort:
        return f"{total} training volumes"
    spans = {key: [_span(end) for end in cohort[key]] for key in ("spacing_mm", "size_mm")}
    parts = [
        f"{total} training volumes, of {cohort['volumes']} that were looked at:",
        f"voxels of {' to '.join(dict.fromkeys(spans['spacing_mm']))} mm,",
        f"images of {' to '.join(dict.fromkeys(spans['size_mm']))} mm",
    ]
    sizes = [f"class {name} of {low:.3g} to {high:.3g} ml" for name, (low, high) in cohort["ml"].items()]
    return " ".join(parts) + "".join(f", {size}" for size in sizes)


def outside_of(cohort: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """In which ways a volume and its mask are not like those of the training, in words.

    Args:
        cohort: of `cohort_of`; what it lacks is not compared.
        facts: what is written beside the mask, see `SaveMaskd`; as above.
    """
    told = []
    for key, what in (("spacing_mm", "voxels of"), ("size_mm", "an image of")):
        if key in cohort and key in facts and not _within(facts[key], cohort[key], factor=SIZE_SLACK):
            low, high = (_span(end) for end in cohort[key])
            told.append(f"{what} {_span(facts[key])} mm, unlike the training's {low} to {high}")
    seen = cohort.get("intensities")
    if seen and "intensities" in facts and not _within(facts["intensities"], seen, slack=INTENSITY_SLACK):
        told.append("intensities that are distributed unlike the training's: another contrast, scanner or region?")
    parts = {str(part["value"]): (name, part) for name, part in facts.get("classes", {}).items() if part["voxels"]}
    for number, (name, part) in parts.items():
        sizes = cohort.get("ml", {}).get(number)
        if sizes and not _within([part["ml"]], [[one] for one in sizes], factor=SIZE_SLACK):
            told.append(f"{name}: {part['ml']:.3g} ml, where the training had {sizes[0]:.3g} to {sizes[1]:.3g}")
        places = cohort.get("place", {}).get(number)
        if places and "place" in part and not _within(part["place"], places, slack=PLACE_SLACK):
            here, low, high = (" / ".join(f"{share:.2f}" for share in end) for end in (part["place"], *places))
            told.append(f"{name}: at {here} of the image (right/front/top), where the training had {low} to {high}")
    for pair, apart in _order(facts.get("classes", {})):
        low, high = cohort.get("order", {}).get(pair, ([0.0] * 3, [0.0] * 3))
        first, second = (parts[number][0] for number in pair.split())
        for axis, sides in enumerate(AXES):
            if (low[axis] > LEAST_APART and apart[axis] < 0) or (high[axis] < -LEAST_APART and apart[axis] > 0):
                here, there = sides if apart[axis] > 0 else sides[::-1]
                told.append(f"{second}: {abs(apart[axis]):.3g} mm {here} {first}, where the training had it {there}")
    return told


def _within(
    values: Sequence[float], bounds: Sequence[Sequence[float]], factor: float = 1.0, slack: float = 0.0
) -> bool:
    low, high = np.array(bounds[0]) / factor - slack, np.array(bounds[1]) * factor + slack
    return bool(((low <= np.array(values)) & (np.array(values) <= high)).all())


def _span(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)
