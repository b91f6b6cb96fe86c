"""Signed distance maps against two calls of scipy's transform (the mask and its inverse): time, memory and error.

The object is an ellipsoid with a rough surface, one third of the volume long in each direction ("organ") or four fifths
("brain").
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt, gaussian_filter
from timing import extra_rss_bytes, medians_ms, steady_allocator, write

from medconstraints.distance import signed_distance, signed_distance_map

sys.path.append(str(Path(__file__).parents[1] / "tests" / "reference"))
import distance_backends

SPACING_MM = (1.0, 1.0, 3.0)
SHAPES = [(197, 233, 189), (512, 512, 200)]
OBJECTS = {"organ": 1 / 3, "brain": 0.8}
CLIP_MM = 10.0


def ellipsoid(shape: tuple[int, ...], share: float) -> np.ndarray:
    """A mask with a rough surface."""
    rng = np.random.default_rng(0)
    radius = np.zeros(shape, np.float32)
    for axis, size in enumerate(shape):
        position = (np.arange(size, dtype=np.float32) - size / 2) / (share * size / 2)
        radius += (position**2).reshape([-1 if number == axis else 1 for number in range(len(shape))])
    noise = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), 3)
    mask: np.ndarray = radius < 1 + 0.2 * noise / noise.std()
    return mask


def quarters(mask: np.ndarray) -> np.ndarray:
    """The mask cut into four classes along the first two axes."""
    first = (np.arange(mask.shape[0]) >= mask.shape[0] // 2).astype(np.uint8)[:, None, None]
    second = (np.arange(mask.shape[1]) >= mask.shape[1] // 2).astype(np.uint8)[None, :, None]
    label: np.ndarray = mask * (1 + first + 2 * second)
    return label


def scipy_map(mask: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """What users do: two transforms."""
    result: np.ndarray = distance_transform_edt(~mask, sampling=spacing_mm)
    result -= distance_transform_edt(mask, sampling=spacing_mm)
    return result


def case(name: str, mask: np.ndarray, threads: int, runs: int) -> dict[str, Any]:
    """One shape and object."""
    label = quarters(mask)
    functions: dict[str, Callable[[], Any]] = {
        "scipy": lambda: scipy_map(mask, SPACING_MM),
        "exact": lambda: signed_distance(mask, SPACING_MM),
        "clipped": lambda: signed_distance(mask, SPACING_MM, clip_mm=CLIP_MM),
        "four": lambda: signed_distance_map(label, 5, SPACING_MM, classes=(1, 2, 3, 4)),
        "one": lambda: signed_distance_map(label, 5, SPACING_MM, classes=(1,)),
    }
    if min(mask.shape) < 197:
        simpleitk = distance_backends.distance_simpleitk
        functions["simpleitk"] = lambda: distance_backends.signed(
            mask, SPACING_MM, convention="voxel", distance=simpleitk
        )
    torch.set_num_threads(1)
    single = medians_ms({key: functions[key] for key in ("exact", "clipped")}, runs=runs, warmup=1)
    torch.set_num_threads(threads)
    times = medians_ms(functions, runs=runs, warmup=1)
    error = np.abs(signed_distance(mask, SPACING_MM, convention="voxel") - scipy_map(mask, SPACING_MM)).max()
    output = 4 * mask.size
    row = {
        "case": name,
        "shape": list(mask.shape),
        "threads": threads,
        "scipy_ms": times["scipy"],
        "ratio_exact": times["exact"] / times["scipy"],
        "ratio_clipped": times["clipped"] / times["scipy"],
        "ratio_exact_one_thread": single["exact"] / times["scipy"],
        "ratio_clipped_one_thread": single["clipped"] / times["scipy"],
        "ratio_four_classes_to_whole": times["four"] / times["exact"],
        "ratio_four_classes_to_one": times["four"] / times["one"],
        "largest_error_mm": float(error),
        "extra_memory_mb": (extra_rss_bytes(functions["exact"]) - output) / 1e6,
        "extra_memory_clipped_mb": (extra_rss_bytes(functions["clipped"]) - output) / 1e6,
    }
    if "simpleitk" in times:
        row["ratio_simpleitk"] = times["simpleitk"] / times["scipy"]
    return row


def main() -> None:
    """Print and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="docs/results/benchmark_boundary_distance_maps.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    steady_allocator()
    rows = []
    for shape in SHAPES:
        for name, share in OBJECTS.items():
            # A minute for each run of scipy on the large volume.
            runs = args.runs if np.prod(shape) < 2e7 else max(1, args.runs // 3)
            rows.append(case(name, ellipsoid(shape, share), args.threads, runs))
            shown = {key: round(value, 3) for key, value in rows[-1].items() if isinstance(value, float)}
            sys.stdout.write(f"{shape}, {name}: {shown}\n")
    write(args.output, rows)


if __name__ == "__main__":
    main()
