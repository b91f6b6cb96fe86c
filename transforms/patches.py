"""Random patches of an item and random intensities: the augmentation that the bundles share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from monai.transforms import (
    RandFlipd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSpatialCropd,
    SpatialPadd,
)

__all__ = ["intensity_transforms", "patch_transforms"]

# What stands where a patch reaches beyond the image: background in an image or a label, nothing known in a weak label.
PADDING: Mapping[str, float] = {"image": 0, "label": 0, "weak_label": -1, "distance_map": 0}


def patch_transforms(
    patch_size: Sequence[int], *, flip_axis: int | None = None, padding: Mapping[str, float] = PADDING
) -> list[Callable[..., Any]]:
    """Pad to the patch size, crop a random patch, and flip it in half of the cases; an item may lack keys.

    Args:
        patch_size: voxels along each axis.
        flip_axis: spatial axis of the flips, None for none.
        padding: key -> value that pads it. A weak label that was padded with 0 would be annotated background.
    """
    keys = [*padding]
    chain: list[Callable[..., Any]] = [
        SpatialPadd(key, spatial_size=patch_size, constant_values=value, allow_missing_keys=True)
        for key, value in padding.items()
    ]
    chain.append(RandSpatialCropd(keys, roi_size=patch_size, random_size=False, allow_missing_keys=True))
    if flip_axis is not None:
        chain.append(RandFlipd(keys, prob=0.5, spatial_axis=flip_axis, allow_missing_keys=True))
    return chain


def intensity_transforms(*, noise: float = 0.1, scale: float = 0.15, shift: float = 0.15) -> list[Callable[..., Any]]:
    """Random noise, scale and shift of the image's intensities.

    Args:
        noise: standard deviation of Gaussian noise, added in 3 of 10 cases.
        scale: largest relative change of all intensities, drawn in half of the cases.
        shift: largest offset, likewise.
    """
    return [
        RandGaussianNoised("image", prob=0.3, std=noise),
        RandScaleIntensityd("image", prob=0.5, factors=scale),
        RandShiftIntensityd("image", prob=0.5, offsets=shift),
    ]
