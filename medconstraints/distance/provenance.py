"""Whether a distance map still tells distances: it may be cropped, flipped, turned and padded, but not resampled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor

__all__ = ["RECORD", "check_not_resampled", "record"]

RECORD = "distance_map"  # key of the meta data of a map
TOLERANCE = 1e-3  # of a step


def record(affine: Tensor, scale_mm: float) -> dict[str, Any]:
    """What a map keeps of how it was made: the affine, and the millimetres of one stored unit."""
    return {"affine": affine.detach().double().cpu().clone(), "scale_mm": float(scale_mm)}


def check_not_resampled(distance_map: Tensor, name: str) -> None:
    """Look at the affines of a map, or of a batch of maps; a tensor without meta data passes.

    Elastic deformations leave no trace in MONAI's meta data and are not noticed.

    Raises:
        ValueError: the voxels of a map are no longer those it was made on. The message says what to do.
    """
    if not isinstance(distance_map, MetaTensor):
        return
    kept = distance_map.meta.get(RECORD)
    if not isinstance(kept, Mapping):
        return
    made, now = (torch.as_tensor(one).double().cpu()[..., :-1, :-1] for one in (kept["affine"], distance_map.affine))
    steps, failed = torch.linalg.solve_ex(made, now)
    # The spacing was given by hand where the affine tells none; then there is nothing to compare.
    unknown = (failed != 0) | ~torch.isfinite(made).flatten(-2).all(-1)
    # Crops, flips, quarter turns and changed orders of axes make a signed permutation of the old steps.
    whole = steps.round()
    permutes = ((whole.abs().sum(-1) == 1) & (whole.abs().sum(-2) == 1)).all(-1)
    close = ((steps - whole).abs() <= TOLERANCE).flatten(-2).all(-1)
    if not bool(((permutes & close) | unknown).all()):
        raise ValueError(
            f"{name}: this distance map was resampled after it was made (its affine tells of another spacing, a "
            "rotation or a zoom), and its values are no longer distances; put SignedDistanceMapd after the transforms "
            "that resample, on the label they gave. Crops, flips, quarter turns and padding may follow it."
        )
