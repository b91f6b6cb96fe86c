"""Toy data of the log-barrier experiments: noisy 2D images with two discs that only intensity tells apart.

``python -m medconstraints.synthetic.discs --output DIR`` writes a cohort. Size alone, or the rough place alone, does
not say which disc is the target; the two together do (Kervadec, thesis, section 3.4.1).
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nibabel import Nifti1Image

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
    _require(good, "seed_or_rng", "a numpy Generator or an integer of at least 0", seed_or_rng, "pass one of these")
    _require(isinstance(size, int) and size >= 16, "size", "an integer of at least 16", size, "give pixels of a side")
    used = size * RADIUS / RADIUS_AT if radius is None else radius
    # With size / 6, about half of all pairs of places do not overlap: the draws below end soon.
    _require(1 <= used <= size / 6, "radius", "None or from 1 to size / 6", radius, "enlarge size or try None")
    for name, intensity in {"target": target, "distractor": distractor}.items():
        _require(1 <= intensity <= 255, name, "from 1 to 255", intensity, "the background is 0")
    _require(max_noise >= 0, "max_noise", "an integer of at least 0", max_noise, "0 means none")
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
    folder: str | Path,
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
    """Write images of two discs and a ``datalist.json`` in the style of the Medical Segmentation Decathlon.

    ``num_training`` (at least 1), ``num_validation`` and ``num_test`` images, all with labels, are numbered in this
    order: ``imagesTr/disc_0000.nii`` and ``labelsTr/disc_0000.nii`` in ``folder``, made if needed. They are 2D, uint8,
    not compressed, and have the identity as affine. Image i depends on ``seed`` (at least 0), i and the options, never
    on the counts. The datalist, with relative paths and the parameters, is written last. ``overwrite`` replaces the
    datalist and all ``disc_*.nii`` there. The other options are those of :func:`make_disc`.

    Returns:
        Path of the datalist, for ``monai.data.load_decathlon_datalist(path, True, "training")``.

    Raises:
        FileExistsError: if ``folder`` holds a ``datalist.json`` already and ``overwrite`` is False.
        ValueError: for an argument out of its range.
    """
    _require(num_training >= 1, "num_training", "an integer of at least 1", num_training, "ask for some")
    for name, count in {"num_validation": num_validation, "num_test": num_test, "seed": seed}.items():
        _require(count >= 0, name, "an integer of at least 0", count, "pass 0 or more")
    folder = Path(folder)
    datalist_path = folder / "datalist.json"
    if datalist_path.exists() and not overwrite:
        raise FileExistsError(f"folder {folder} holds a datalist.json; name another one, or pass overwrite=True")
    options: dict[str, Any] = {"size": size, "radius": radius, "target": target}
    options |= {"distractor": distractor, "max_noise": max_noise}
    cases: list[dict[str, str]] = []
    for index in range(num_training + num_validation + num_test):
        # Made, and its options checked, before anything is replaced; no datalist stands while its images change.
        arrays = make_disc(np.random.default_rng([seed, index]), **options)
        datalist_path.unlink(missing_ok=True)
        cases.append({kind: f"{kind}sTr/disc_{index:04d}.nii" for kind in ("image", "label")})
        for array, path in zip(arrays, cases[-1].values(), strict=True):
            volume = Nifti1Image(array, np.eye(4))
            volume.header.set_xyzt_units("mm")
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(volume.to_bytes())
    written = {folder / path for case in cases for path in case.values()}
    for stale in set(folder.glob("*sTr/disc_*.nii")) - written:
        stale.unlink()
    datalist = {
        "name": "discs",
        "description": "Noisy images of two discs of one size, made by medconstraints.synthetic.discs",
        "labels": {"0": "background", "1": "target disc"},
        "licence": "CC0-1.0",
        "parameters": options | {"seed": seed},
        "training": cases[:num_training],
        "validation": cases[num_training : num_training + num_validation],
        "test": cases[num_training + num_validation :],
    }
    datalist_path.write_text(json.dumps(datalist, indent=2, default=float) + "\n", encoding="utf-8")
    return datalist_path


def _require(condition: Any, name: str, expected: str, value: object, advice: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, but is {value!r}; {advice}.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a cohort as the command line asks; wrong values end with a message and status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m medconstraints.synthetic.discs", argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--output", required=True, metavar="DIR", dest="folder")
    for name in ("num-training", "num-validation", "num-test", "size", "seed", "target", "distractor", "max-noise"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--radius", type=float)
    parser.add_argument("--overwrite", action="store_true")
    try:
        sys.stdout.write(f"{make_discs(**vars(parser.parse_args(arguments)))}\n")
    except (FileExistsError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
