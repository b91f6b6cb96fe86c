"""Whether a distance map still tells distances: it may be cropped, flipped, turned and padded, but not resampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor

__all__ = ["RECORD", "check_not_resampled", "is_recorded", "record", "spacing_now"]

RECORD = "distance_map"  # key of the meta data of a map
TOLERANCE = 1e-3  # of a step


def record(affine: Tensor, spacing_mm: Sequence[float], scale_mm: float) -> dict[str, Any]:
    """What a map keeps of how it was made: the affine, the spacing, and the millimetres of one stored unit."""
    return {
        "affine": affine.detach().double().cpu().clone(),
        "spacing_mm": torch.tensor(spacing_mm, dtype=torch.float64),
        "scale_mm": float(scale_mm),
    }


def is_recorded(distance_map: Tensor) -> TypeGuard[MetaTensor]:
    """Whether a tensor, or a batch, says itself that it is a distance map."""
    return isinstance(distance_map, MetaTensor) and isinstance(distance_map.meta.get(RECORD), Mapping)


def spacing_now(distance_map: Tensor) -> Tensor | None:
    """Spacing (D,) or (B, D) of a map that may have been flipped or turned since it was made; None if it is unknown."""
    if not is_recorded(distance_map):
        return None
    kept = distance_map.meta[RECORD]
    spacing, dims = kept["spacing_mm"], kept["spacing_mm"].shape[-1]
    steps, known = _steps(kept["affine"], distance_map.affine)
    moved = np.einsum("...ij,...i->...j", np.rint(np.abs(steps))[..., :dims, :dims], spacing.numpy())
    return torch.from_numpy(np.where(known[..., None] & (moved > 0), moved, spacing.numpy()))


def _steps(made: Any, now: Any) -> tuple[np.ndarray, np.ndarray]:
    """Today's steps in those of the map's making, and whether they can be compared."""
    # In numpy: for matrices as small as these torch takes many times as long, once for each item of a training.
    made, now = (torch.as_tensor(one).cpu().numpy().astype(np.float64)[..., :-1, :-1] for one in (made, now))
    # The spacing was given by hand where the affine tells none; then there is nothing to compare.
    known = np.isfinite(made).all((-2, -1))
    known &= np.abs(np.linalg.det(np.where(known[..., None, None], made, 0.0))) > 0
    return np.linalg.solve(np.where(known[..., None, None], made, np.eye(made.shape[-1])), now), known


def check_not_resampled(distance_map: Tensor, name: str) -> None:
    """Look at the affines of a map, or of a batch of maps; a tensor without meta data passes.

    Elastic deformations leave no trace in MONAI's meta data and are not noticed; the chain of a bundle refuses
    them, see `medconstraints.data.in_order`.

    Raises:
        ValueError: the voxels of a map are no longer those it was made on. The message says what to do.
    """
    if not is_recorded(distance_map):
        return
    kept = distance_map.meta[RECORD]
    steps, known = _steps(kept["affine"], distance_map.affine)
    # Crops, flips, quarter turns and changed orders of axes make a signed permutation of the old steps.
    whole = np.rint(steps)
    permutes = ((np.abs(whole).sum(-1) == 1) & (np.abs(whole).sum(-2) == 1)).all(-1)
    close = (np.abs(steps - whole) <= TOLERANCE).all((-2, -1))
    if not ((permutes & close) | ~known).all():
        raise ValueError(
            f"{name}: this distance map was resampled after it was made (its affine tells of another spacing, a "
            "rotation or a zoom), and its values are no longer distances; put SignedDistanceMapd after the transforms "
            "that resample, on the label they gave. Crops, flips, quarter turns and padding may follow it."
        )
