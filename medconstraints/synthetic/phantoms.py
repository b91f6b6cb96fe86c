"""Synthetic 3D cohorts as NIfTI files: the embedded data set of the demo, the tests and the studies.

A phantom is a body in air with one labelled organ, a brighter distractor organ (label 0), texture, bias field and
noise; no patient is behind it. The command is `phantoms`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nibabel import orientations
from scipy import ndimage
from scipy.spatial.transform import Rotation

from medconstraints import checks
from medconstraints.synthetic.cohort import Made, require, write_cohort

__all__ = ["make_cohort", "make_phantom"]

ORIENTATIONS = ("RAS", "LPS", "RAS", "LAS", "PSR")  # of volumes 0, 1, 2 ... of a cohort, repeated
AIR, BODY, ORGAN, DISTRACTOR = 20.0, 300.0, (600.0, 520.0), 950.0  # intensities, arbitrary units as in MR
LABELS = {1: ("background", "organ"), 2: ("background", "anterior part of the organ", "posterior part of the organ")}


def make_phantom(
    seed_or_rng: int | np.random.Generator,
    *,
    shape: Sequence[int] = (48, 48, 32),
    spacing_mm: Sequence[float] = (1.0, 1.0, 2.0),
    num_classes: int = 1,
    filling: float | None = None,
    noise: float = 0.2,
    oblique_degrees: float = 12.0,
    distractor: bool = True,
    orientation: str = "RAS",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make one volume, its label and its affine; the organ is one connected component away from the border.

    Args:
        seed_or_rng: a seed (>= 0), or a generator, which is advanced.
        shape: voxels along the patient's axes R, A and S, each at least 16.
        spacing_mm: distance of voxel centres along R, A and S.
        num_classes: 1 (the organ) or 2 (1 its anterior, 2 its posterior part, cut across its longest axis).
        filling: share of its voxel bounding box that the organ fills, 0.12 to 0.85, met within 0.03 by shape: thin
            ellipsoids along a diagonal to near-cuboids. None: tilted ellipsoids, 0.42 to 0.55.
        noise: standard deviation of the Gaussian noise, as a share of the contrast between organ and body.
        oblique_degrees: largest rotation of the voxel axes against the patient's, 0 to 30; the smallest is half of it.
        distractor: whether the second, brighter organ is there; nothing else depends on it.
        orientation: axis codes in which the arrays are stored, such as "LPS".

    Returns:
        Image (int16, from 0) and label (uint8) of ``shape``, stored as ``orientation`` says; affine (4, 4) to RAS+ mm.

    Raises:
        ValueError: for an argument out of its range, or a filling that voxels this coarse cannot show.

    Example:
        >>> [array.shape for array in make_phantom(0, shape=(32, 32, 24), orientation="PSR")]
        [(32, 24, 32), (32, 24, 32), (4, 4)]
    """
    _check(seed_or_rng, shape, num_classes, filling, noise, oblique_degrees, orientation)
    sizes, spacings = np.asarray(shape), np.array(checks.spacing(spacing_mm, 3))
    rng = np.random.default_rng(seed_or_rng)
    # Normalised coordinates: the volume is the cube [-1, 1]^3. Of the organ, |centre| + half width + bend stay below
    # 0.88, inside the body and off the border. It lies on one side of the patient, the distractor on the other.
    points = np.stack(np.meshgrid(*((2 * np.arange(n) + 1 - n) / n for n in shape), indexing="ij")).astype(np.float32)
    bend = np.stack([_smooth_field(rng, shape, 5) for _ in range(3)]) * np.float32(0.09)
    side = rng.choice([-1.0, 1.0])
    centre = rng.uniform([0.15, -0.1, -0.15], [0.25, 0.1, 0.15]) * [side, 1, 1]
    organ = _organ(rng, points - centre.astype(np.float32).reshape(3, 1, 1, 1), bend, filling)
    label = organ.astype(np.uint8)
    if num_classes == 2:
        inside_mm = points[:, organ] * (sizes * spacings)[:, None] / 2
        long_axis = np.linalg.eigh(np.cov(inside_mm))[1][:, -1]
        along = np.copysign(1, long_axis[1]) * long_axis @ inside_mm  # rises towards anterior
        label[organ] = np.where(along < np.quantile(along, rng.uniform(0.45, 0.55)), 2, 1)
    image = _intensities(rng, points + bend, label, side, noise, distractor)
    affine = np.eye(4)
    axis, degrees = rng.standard_normal(3), oblique_degrees * rng.uniform(0.5, 1)
    affine[:3, :3] = Rotation.from_rotvec(degrees * axis / np.linalg.norm(axis), degrees=True).as_matrix() * spacings
    affine[:3, 3] = rng.uniform(-20, 20, 3) - affine[:3, :3] @ (sizes - 1) / 2
    change = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(orientation))
    image, label = (orientations.apply_orientation(array, change) for array in (image, label))
    return image, label, affine @ orientations.inv_ornt_aff(change, shape)


def make_cohort(
    output_dir: str | Path,
    *,
    num_training: int = 24,
    num_validation: int = 4,
    num_test: int = 4,
    seed: int = 0,
    overwrite: bool = False,
    shape: Sequence[int] = (48, 48, 32),
    spacing_mm: Sequence[float] = (1.0, 1.0, 2.0),
    num_classes: int = 1,
    filling: float | None = None,
    noise: float = 0.2,
    oblique_degrees: float = 12.0,
    distractor: bool = True,
) -> Path:
    """Write phantoms and their ``datalist.json``, whose path is returned; see `write_cohort`.

    The files, ``imagesTr/phantom_000.nii.gz`` (int16), ``labelsTr/phantom_000.nii.gz`` (uint8) and so on, have spacings
    that differ by up to 5 % from ``spacing_mm``; their axis codes cycle through RAS, LPS, RAS, LAS, PSR.

    Args:
        output_dir: folder of the cohort, made if needed.
        num_training: volumes to train on, at least 1; numbered first.
        num_validation: volumes to validate, with labels too.
        num_test: volumes to test, with labels too.
        seed: of the cohort.
        overwrite: replace the datalist and all ``phantom_*.nii.gz`` there.
        shape: see `make_phantom`, as are the others.
        spacing_mm: distance of voxel centres along R, A and S.
        num_classes: 1, or 2 for an organ in two parts.
        filling: share of its bounding box that the organ fills; None for ellipsoids.
        noise: standard deviation, as a share of the contrast.
        oblique_degrees: largest rotation of the voxel axes.
        distractor: whether the second, brighter organ is there.

    Raises:
        FileExistsError: ``output_dir`` holds a ``datalist.json`` already and ``overwrite`` is False.
        ValueError: an argument is out of its range.
    """
    options: dict[str, Any] = {"shape": shape, "spacing_mm": [*map(float, spacing_mm)], "num_classes": num_classes}
    options |= {"filling": filling, "noise": noise, "oblique_degrees": oblique_degrees, "distractor": distractor}

    def make(index: int, rng: np.random.Generator) -> Made:
        image, label, affine = make_phantom(rng, orientation=ORIENTATIONS[index % len(ORIENTATIONS)], **options)
        affine[:3, :3] *= rng.uniform(0.95, 1.05, 3)
        return image, label, affine

    about = {
        "name": "phantoms",
        "description": "Synthetic volumes with one organ and a distractor, made by medconstraints.synthetic.phantoms",
        "labels": {str(value): name for value, name in enumerate(LABELS.get(num_classes, ()))},
        "parameters": options | {"shape": np.asarray(shape).tolist(), "seed": seed},
    }
    counts = {"training": num_training, "validation": num_validation, "test": num_test}
    return write_cohort(
        output_dir, make, about, file_name="phantom_{:03d}.nii.gz", counts=counts, seed=seed, overwrite=overwrite
    )


def _check(
    seed_or_rng: int | np.random.Generator,
    shape: Sequence[int],
    num_classes: int,
    filling: float | None,
    noise: float,
    oblique_degrees: float,
    orientation: str,
) -> None:
    good: Any = isinstance(seed_or_rng, np.random.Generator) or seed_or_rng >= 0
    require(good, "seed_or_rng", "a numpy Generator or an integer >= 0", seed_or_rng)
    sizes = np.asarray(shape)
    good = sizes.shape == (3,) and sizes.dtype.kind in "iu" and sizes.min() >= 16
    require(good, "shape", "three integers of at least 16, the voxels along R, A and S", shape)
    require(num_classes in LABELS, "num_classes", "1, or 2 for an organ in two parts", num_classes)
    require(filling is None or 0.12 <= filling <= 0.85, "filling", "None or from 0.12 to 0.85", filling)
    checks.number("noise", noise, least=0)
    require(0 <= oblique_degrees <= 30, "oblique_degrees", "from 0 to 30", oblique_degrees)
    good = sorted("RLAPSI".find(code) // 2 for code in orientation) == [0, 1, 2]
    require(good, "orientation", 'one each of R/L, A/P and S/I, such as "LPS"', orientation)


def _intensities(
    rng: np.random.Generator, points: np.ndarray, label: np.ndarray, side: float, noise: float, distractor: bool
) -> np.ndarray:
    """Image (int16) of a label: body in air, organ, distractor on the other side, bias field, noise."""
    shape = label.shape
    body = (np.abs(points) ** 4).sum(0) < 0.95**4
    image = np.where(body, BODY + 80 * _smooth_field(rng, shape, 12), AIR)
    widths = rng.uniform([0.16, 0.2, 0.2], [0.22, 0.35, 0.35])
    centre = np.array([-0.62 * side, *rng.uniform(-0.25, 0.25, 2)], np.float32).reshape(3, 1, 1, 1)
    if distractor:
        image[_superellipsoid(points - centre, widths, 0.0, np.zeros(3))] = DISTRACTOR
    image = ndimage.gaussian_filter(np.choose(label, [image, *ORGAN]), 0.5)  # partial volume: borders are not sharp
    image *= rng.uniform(0.85, 1.15) * np.exp(0.25 * _smooth_field(rng, shape, 3))  # gain of the scan, bias field
    image += noise * (ORGAN[0] - BODY) * rng.standard_normal(shape)
    return np.rint(np.clip(image, 0, np.iinfo(np.int16).max)).astype(np.int16)


def _organ(rng: np.random.Generator, points: np.ndarray, bend: np.ndarray, filling: float | None) -> np.ndarray:
    """Organ around 0 that fills its voxel bounding box as asked: bisection of its shape."""
    half_widths = rng.uniform([0.40, 0.58, 0.36], [0.50, 0.68, 0.46])
    tilt = rng.choice([-1.0, 1.0], 3) * (rng.uniform(0.7, 1, 3) if filling is None else 1)
    target = rng.uniform(0.42, 0.55) if filling is None else filling
    best_gap, best = np.inf, points[0] < -1
    for strength in np.array([1, 0.5, 0.25, 0], np.float32):  # bend less where a bent organ cannot fill its box so
        low, high = -1.0, 1.0
        for _ in range(10 if best_gap > 0.015 else 0):
            middle = (low + high) / 2
            inside = _superellipsoid(points + strength * bend, half_widths, middle, tilt)
            components, count = ndimage.label(inside)
            organ = components == 1 + np.argmax(np.bincount(components.ravel())[1:]) if count else inside
            share = organ.sum() / organ[ndimage.find_objects(organ.view(np.uint8))[0]].size if count else 0.0
            best_gap, best = min((best_gap, best), (abs(share - target), organ), key=lambda pair: pair[0])
            low, high = (middle, high) if share < target else (low, middle)
    require(best_gap < 0.03, "filling", "a share that voxels this coarse can show (enlarge shape)", filling)
    return best


def _superellipsoid(points: np.ndarray, half_widths: np.ndarray, roundness: float, tilt: np.ndarray) -> np.ndarray:
    """Body in the box +-half_widths; its share of the box rises with ``roundness`` in [-1, 1].

    Below 0: ellipsoid x' (H C H)^-1 x < 1, H = diag(half_widths), C a correlation matrix with the off-diagonals
    -0.97 roundness tilt_i tilt_j; it touches the box for any C, and fills pi / 6 sqrt(det C) of it.
    Above 0: sum |x_i / h_i|^p < 1 with p from 2 (pi / 6) to 40 (almost a cuboid).
    """
    correlation = np.where(np.eye(3), 1, 0.97 * max(-roundness, 0) * np.outer(tilt, tilt))
    whitening = np.linalg.inv(half_widths[:, None] * np.linalg.cholesky(correlation)).astype(np.float32)
    exponent = 2 / (1 - 0.95 * max(roundness, 0))
    return (np.abs(np.tensordot(whitening, points, axes=1)) ** exponent).sum(0) < 1


def _smooth_field(rng: np.random.Generator, shape: Sequence[int], order: int) -> np.ndarray:
    """Random sum of the ``order`` lowest cosines per axis, scaled to a largest magnitude of 1."""
    field = rng.standard_normal((order,) * 3)
    for n in shape:  # contracts the first axis and appends the voxels: after three rounds the axes are in order
        basis = np.cos(np.pi * np.outer(np.arange(order), np.arange(n) + 0.5) / n)
        field = np.tensordot(field, basis, axes=(0, 0))
    return (field / np.abs(field).max()).astype(np.float32)
