"""How distances are measured: the options of a map in one object, so that a transform and a loss can share them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from medconstraints import checks
from medconstraints.distance.geodesic import grow_label, signed_geodesic_distance
from medconstraints.distance.maps import check_options, signed_distance, signed_distance_map

__all__ = ["Euclidean", "Geodesic"]


@dataclass(frozen=True, kw_only=True)
class Euclidean:
    """Straight distances, exact; see `signed_distance_map` for the options.

    Args:
        convention: "boundary", "voxel" or "published".
        slice_axis: None for distances in the volume; an axis 0..2 for distances within each slice across it.
        clip_mm: largest distance; also saves most of the work for small objects. None for no limit.
        backend: "auto", "numba" or "torch".

    Raises:
        ValueError: an option is unknown or outside its range.
    """

    convention: str = "boundary"
    slice_axis: int | None = None
    clip_mm: float | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_options(self.convention, self.slice_axis, self.clip_mm, self.backend)

    def of_masks(self, masks: Tensor, spacing_mm: Sequence[float]) -> Tensor:
        """Signed distances (N, *S) of masks (N, *S), each by itself; 2D images are slices already."""
        distance = partial(signed_distance, convention=self.convention, clip_mm=self.clip_mm, backend=self.backend)
        axis = self.slice_axis
        if masks.dim() == 3:
            return distance(masks, (1.0, *spacing_mm), slice_axis=0)  # all images in one call
        if axis is None:
            return torch.stack([distance(mask, spacing_mm) for mask in masks])
        slices = masks.movedim(axis + 1, 1)
        steps = (1.0, *spacing_mm[:axis], *spacing_mm[axis + 1 :])
        return distance(slices.flatten(0, 1), steps, slice_axis=0).view(slices.shape).movedim(1, axis + 1)

    def of_label(
        self, label: Tensor, num_classes: int, spacing_mm: Sequence[float] | None, classes: Sequence[int]
    ) -> Tensor:
        """Signed distances (len(classes), *S) of a label (*S) of class numbers."""
        return signed_distance_map(
            label,
            num_classes,
            spacing_mm,
            classes=classes,
            convention=self.convention,
            slice_axis=self.slice_axis,
            clip_mm=self.clip_mm,
            backend=self.backend,
        )


@dataclass(frozen=True, kw_only=True)
class Geodesic:
    """Distances along paths for which edges of the image are obstacles; of weak labels too, which are grown first.

    See `signed_geodesic_distance` for the distances, and `grow_label` for what becomes of voxels without annotation.

    Args:
        image_weight: mm that a step gets longer per unit of intensity, >= 0.
        slice_axis: None for paths in the volume; an axis 0..2 for paths within each slice across it.
        clip_mm: largest distance; None for no limit.
        reach_mm: voxels without annotation that are farther than this from every annotated one are background; None
            for no limit.
        ignore_index: value of the voxels without annotation, no class number.

    Raises:
        ValueError: an option is outside its range.
    """

    image_weight: float
    slice_axis: int | None = None
    clip_mm: float | None = None
    reach_mm: float | None = None
    ignore_index: int = -1

    def __post_init__(self) -> None:
        checks.number("image_weight", self.image_weight, least=0.0)
        checks.slice_axis(self.slice_axis)
        for name, limit in (("clip_mm", self.clip_mm), ("reach_mm", self.reach_mm)):
            if limit is not None:
                checks.number(name, limit, above=0.0)

    def of_mask(self, mask: Tensor, image: Tensor, spacing_mm: Sequence[float] | None) -> Tensor:
        """Signed distance (*S) of a mask (*S) along an image (M, *S)."""
        return signed_geodesic_distance(
            mask,
            image,
            spacing_mm,
            image_weight=self.image_weight,
            slice_axis=self.slice_axis,
            clip_mm=self.clip_mm,
        )

    def of_label(
        self,
        label: Tensor,
        image: Tensor,
        num_classes: int,
        spacing_mm: Sequence[float] | None,
        classes: Sequence[int],
    ) -> Tensor:
        """Signed distances (len(classes), *S) of a label (*S), weak or whole, along an image (M, *S)."""
        grown = grow_label(
            label,
            image,
            num_classes,
            spacing_mm,
            image_weight=self.image_weight,
            slice_axis=self.slice_axis,
            reach_mm=self.reach_mm,
            ignore_index=self.ignore_index,
        )
        return torch.stack([self.of_mask(grown == number, image, spacing_mm) for number in classes])
