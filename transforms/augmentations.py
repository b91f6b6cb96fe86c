"""Augmentations with fixed ranges, to train with and to compare learned ones with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from monai.transforms import (
    CutMix,
    MixUp,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandomOrder,
    RandScaleIntensityd,
    RandScaleIntensityFixedMeand,
    RandSimulateLowResolutiond,
)

from medconstraints import checks
from medconstraints.transforms.random_ops import RandAugmentd, TrivialAugmentd

__all__ = [
    "PLACEMENTS",
    "UPSTREAMS",
    "affine_transforms",
    "nnunet_transforms",
    "placement_transforms",
    "upstream_mixing",
    "upstream_transforms",
]

PLACEMENTS = ("none", "rotate", "flip", "translate", "combined")
UPSTREAMS = ("randaugment", "trivial", "nnunet", "mixup", "cutmix")

Chain = list[Callable[..., Any]]


def affine_transforms(
    spatial_dims: int,
    *,
    keys: Sequence[str] = ("image", "label"),
    translation_voxels: float = 4.0,
    rotation_deg: float = 0.0,
    log_scale: float = 0.0,
    flip_axis: int | None = None,
    prob: float = 1.0,
    padding_mode: str = "border",
) -> Chain:
    """Random translation, rotation and scale within fixed ranges, and flips of one axis.

    The defaults are the predefined augmentation of Mounsaveng et al. 2021 for small images; its flips need an axis.
    Mirroring an image with left and right labels makes them wrong: leave `flip_axis` None there.

    Args:
        spatial_dims: 2 or 3.
        keys: images and label maps; a key that ends with "label" is read at the nearest voxel.
        translation_voxels: largest along each axis.
        rotation_deg: largest about each axis.
        log_scale: largest absolute logarithm of the scale along each axis, to first order.
        flip_axis: spatial axis that is mirrored in half of the cases, None for none.
        prob: share of the cases that are moved. Where other images are never moved, leave a share of these as they are,
            and pad as the frame is padded: a network that can tell the two apart treats them differently.
        padding_mode: what comes in from outside, "border" or "zeros".
    """
    chain: Chain = [
        RandAffined(
            keys,
            prob=prob,
            translate_range=[translation_voxels] * spatial_dims,
            rotate_range=[np.deg2rad(rotation_deg)] * (1 if spatial_dims == 2 else 3),
            scale_range=[log_scale] * spatial_dims,
            mode=_modes(keys),
            padding_mode=padding_mode,
        )
    ]
    return chain if flip_axis is None else [*chain, RandFlipd(keys, prob=0.5, spatial_axis=flip_axis)]


def placement_transforms(
    kind: str,
    spatial_dims: int,
    *,
    keys: Sequence[str] = ("image", "label"),
    rotation_deg: float = 30.0,
    translation_voxels: float = 6.0,
    flip_axis: int = 0,
) -> Chain:
    """Random rotation, flip or translation, or all three in random order (E2EAug, section 4.2); "none" is empty.

    Args:
        kind: one of `PLACEMENTS`.
        spatial_dims: 2 or 3.
        keys: images and label maps; a key that ends with "label" is read at the nearest voxel.
        rotation_deg: largest, see `affine_transforms`, as for the next.
        translation_voxels: see there.
        flip_axis: spatial axis that is mirrored in half of the cases.
    """
    checks.choice("kind", kind, PLACEMENTS)
    chains = {
        "rotate": affine_transforms(spatial_dims, keys=keys, translation_voxels=0, rotation_deg=rotation_deg),
        "flip": [RandFlipd(keys, prob=0.5, spatial_axis=flip_axis)],
        "translate": affine_transforms(spatial_dims, keys=keys, translation_voxels=translation_voxels),
    }
    if kind == "combined":
        return [RandomOrder([transform for chain in chains.values() for transform in chain])]
    return chains.get(kind, [])


def nnunet_transforms(
    spatial_dims: int, *, keys: Sequence[str] = ("image", "label"), mirror_axes: Sequence[int] = ()
) -> Chain:
    """Augmentation with the ranges of nnU-Net (Isensee et al. 2021, supplement), of MONAI's transforms.

    Rotation by up to 30 degrees (180 in 2D) in 20 % of the cases, scale 0.7 to 1.4 in 20 %, noise with a variance of up
    to 0.1 in 10 %, blur with 0.5 to 1 voxels in 20 %, brightness and contrast 0.75 to 1.25 in 15 % each, low resolution
    in 25 %, gamma 0.7 to 1.5 in 30 % and of the inverted image in 10 %. Images of zero mean and unit variance are
    expected. Each axis has its own scale.

    Args:
        spatial_dims: 2 or 3.
        keys: images and label maps; a key that ends with "label" is read at the nearest voxel.
        mirror_axes: spatial axes that are mirrored in half of the cases. nnU-Net mirrors all; with left and right
            labels that makes them wrong.
    """
    images = [key for key in keys if not _is_label(key)]
    angle, linear = (np.pi, "bilinear") if spatial_dims == 2 else (np.pi / 6, "trilinear")
    turned: dict[str, Any] = {"mode": _modes(keys), "padding_mode": "border"}
    return [
        RandAffined(keys, prob=0.2, rotate_range=[angle] * (1 if spatial_dims == 2 else 3), **turned),
        RandAffined(keys, prob=0.2, scale_range=[(-0.3, 0.4)] * spatial_dims, **turned),  # 1 is added
        RandGaussianNoised(images, prob=0.1, std=np.sqrt(0.1)),
        RandGaussianSmoothd(images, prob=0.2, sigma_x=(0.5, 1.0), sigma_y=(0.5, 1.0), sigma_z=(0.5, 1.0)),
        RandScaleIntensityd(images, prob=0.15, factors=0.25),
        RandScaleIntensityFixedMeand(images, prob=0.15, factors=0.25, preserve_range=True),
        RandSimulateLowResolutiond(images, prob=0.25, zoom_range=(0.5, 1.0), upsample_mode=linear),
        RandAdjustContrastd(images, prob=0.1, gamma=(0.7, 1.5), invert_image=True, retain_stats=True),
        RandAdjustContrastd(images, prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
        *(RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in mirror_axes),
    ]


def upstream_transforms(upstream: str, *, keys: Sequence[str], spatial_dims: int, magnitude: float = 5) -> Chain:
    """Augmentation of each item by name: "randaugment", "trivial" or "nnunet"; nothing for what mixes a batch.

    Args:
        upstream: of `UPSTREAMS`.
        keys: images and label maps; a key that ends with "label" is read at the nearest voxel.
        spatial_dims: 2 or 3.
        magnitude: of RandAugment.

    Raises:
        ValueError: an unknown name.
    """
    labels = [key for key in keys if _is_label(key)]
    checks.choice("upstream", upstream, UPSTREAMS)
    if upstream == "randaugment":
        return [RandAugmentd(keys, label_keys=labels, magnitude=magnitude)]
    if upstream == "trivial":
        return [TrivialAugmentd(keys, label_keys=labels)]
    return nnunet_transforms(spatial_dims, keys=keys) if upstream == "nnunet" else []


def upstream_mixing(upstream: str, batch_size: int) -> MixUp | CutMix | None:
    """Augmentation of a batch by name, MONAI's: "mixup" or "cutmix"; None for what augments each item.

    Args:
        upstream: of `UPSTREAMS`.
        batch_size: of the batches.

    Raises:
        ValueError: an unknown name.
    """
    mixers = {"mixup": MixUp, "cutmix": CutMix}
    kind = mixers.get(checks.choice("upstream", upstream, UPSTREAMS))
    return None if kind is None else kind(batch_size, alpha=1.0)


def _modes(keys: Sequence[str]) -> list[str]:
    return ["nearest" if _is_label(key) else "bilinear" for key in keys]


def _is_label(key: str) -> bool:
    return key.endswith("label")
