"""Toy data of the log-barrier experiments: noisy 2D images with two discs that only intensity tells apart.

Size alone, or the rough place alone, does not say which disc is the target; the two together do (Kervadec, thesis,
section 3.4.1). The command is `discs`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from medconstraints import checks
from medconstraints.synthetic.cohort import Made, require, write_cohort

__all__ = ["make_disc", "make_discs"]

RADIUS, RADIUS_AT = 25, 256  # the thesis's radius, and the image size it belongs to


def make_disc(
    seed_or_rng: int | np.random.Generator,
    *,
    size: int = 256,
    radius: float | None = None,
    target: int = 125,
    distractor: int = 255,
    max_noise: int = 99,
) -> tuple[np.ndarray, np.ndarray]:
    """Make one image of two discs on a background of 0, and its label.

    The discs have exactly the same number of pixels, lie inside the image and share no pixel; any such pair of places
    is as likely as another. Each image has its own Gaussian noise, of a standard deviation drawn from the integers
    0..``max_noise``; sums are rounded and clipped to 0..255.

    Args:
        seed_or_rng: a seed (>= 0), or a generator, which is advanced.
        size: pixels of a side of the square image.
        radius: of both discs, in pixels, 1 to size / 6; None scales with the size, 25 at 256.
        target: intensity of the labelled disc, 1 to 255.
        distractor: intensity of the other disc, 1 to 255.
        max_noise: largest standard deviation of the noise, in units of intensity; 0 means no noise.

    Returns:
        Image and label, both (size, size) uint8; the label is 1 in the target disc, 0 elsewhere.

    Raises:
        ValueError: for an argument out of its range.

    Example:
        >>> image, label = make_disc(0, size=64, max_noise=0)
        >>> image.shape, np.unique(image[label == 1]).tolist()
        ((64, 64), [125])
    """
    good: Any = isinstance(seed_or_rng, np.random.Generator) or seed_or_rng >= 0
    require(good, "seed_or_rng", "a numpy Generator or an integer >= 0", seed_or_rng)
    checks.whole_number("size", size, 16)
    used = size * RADIUS / RADIUS_AT if radius is None else radius
    # With size / 6, about half of all pairs of places do not overlap: the draws below end soon.
    require(1 <= used <= size / 6, "radius", f"None or from 1 to a sixth of the size, {size / 6:g}", radius)
    for name, intensity in {"target": target, "distractor": distractor}.items():
        require(1 <= intensity <= 255, name, "from 1 to 255, the background being 0", intensity)
    checks.whole_number("max_noise", max_noise, 0)
    rng = np.random.default_rng(seed_or_rng)
    margin = math.ceil(used)
    centres = rng.integers(margin, size - margin, (2, 2))  # whole pixels, so that both discs have the same pixels
    while math.dist(*centres) <= 2 * used:
        centres = rng.integers(margin, size - margin, (2, 2))
    squares = (np.arange(size) - centres[..., None]) ** 2  # (disc, axis, pixel)
    inside = squares[:, 0, :, None] + squares[:, 1, None, :] <= used**2
    image = rng.standard_normal((size, size), dtype=np.float32)
    image *= rng.integers(0, max_noise + 1)
    for mask, intensity in zip(inside, (target, distractor), strict=True):
        image[mask] += intensity
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), inside[0].astype(np.uint8)


def make_discs(
    output_dir: str | Path,
    *,
    num_training: int = 1000,
    num_validation: int = 100,
    num_test: int = 100,
    size: int = 256,
    seed: int = 0,
    overwrite: bool = False,
    radius: float | None = None,
    target: int = 125,
    distractor: int = 255,
    max_noise: int = 99,
) -> Path:
    """Write images of two discs and a ``datalist.json``, see :func:`~medconstraints.synthetic.cohort.write_cohort`.

    The files, ``imagesTr/disc_0000.nii`` and so on, are 2D, uint8, not compressed, and have the identity as affine.

    Args:
        output_dir: folder of the cohort, made if needed.
        num_training: images to train on, at least 1; numbered first.
        num_validation: images to validate, with labels too.
        num_test: images to test, with labels too.
        size: pixels of a side.
        seed: of the cohort.
        overwrite: replace the datalist and all ``disc_*.nii`` there.
        radius: see `make_disc`, as are the others.
        target: intensity of the labelled disc.
        distractor: intensity of the other disc.
        max_noise: largest standard deviation of the noise.

    Returns:
        Path of the datalist.

    Raises:
        FileExistsError: ``output_dir`` holds a ``datalist.json`` already and ``overwrite`` is False.
        ValueError: an argument is out of its range.
    """
    options: dict[str, Any] = {"size": size, "radius": radius, "target": target}
    options |= {"distractor": distractor, "max_noise": max_noise}

    def make(index: int, rng: np.random.Generator) -> Made:
        return *make_disc(rng, **options), np.eye(4)

    about = {
        "name": "discs",
        "description": "Noisy images of two discs of one size, made by medconstraints.synthetic.discs",
        "labels": {"0": "background", "1": "target disc"},
        "parameters": options | {"seed": seed},
    }
    counts = {"training": num_training, "validation": num_validation, "test": num_test}
    return write_cohort(
        output_dir, make, about, file_name="disc_{:04d}.nii", counts=counts, seed=seed, overwrite=overwrite
    )
