"""Say early, by file name, what is wrong with an image or a label."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform

from medconstraints import checks
from medconstraints.checks import label_name
from medconstraints.volumes import VolumeError
from medconstraints.volumes.grids import GRID_TOLERANCE, grid_difference

__all__ = ["CheckVolumesd"]


class CheckVolumesd(MapTransform):
    """Check a loaded image, and its label, and return the item unchanged.

    Put it after loading and channel-first. All that is wrong with an item stands in one error: axes, NaN or infinite
    voxels, a constant channel, an image too small, and for the label another shape or affine than the image's, values
    that are no class numbers, no foreground, or no background (then nothing lies outside the object, and boxes, sizes
    and distances say nothing).

    Args:
        image_key: key of the image, (C, *S).
        label_key: key of the label, (1, *S) with class numbers; items without one are checked for their image alone.
        num_classes: label values must be 0..num_classes - 1, background included; None accepts any number >= 0.
        spatial_dims: number of spatial axes, 2 or 3.
        min_shape: smallest spatial shape that is accepted, for instance the network's.
        allow_empty_label: accept a label without foreground.
        affine_tolerance: largest difference between an element of the label's and the image's affine, as a share of the
            image's smallest voxel spacing. Plain tensors have no affine and are not compared.
        ignore_index: label value of voxels without annotation, which is no class; such voxels are neither foreground
            nor background.

    Raises:
        VolumeError: with the file's name, what was found, and what to do.

    Example:
        >>> item = {"image": torch.arange(64.0).reshape(1, 4, 4, 4)}
        >>> CheckVolumesd(min_shape=(4, 4, 4))(item) is item
        True
    """

    def __init__(
        self,
        image_key: str = "image",
        label_key: str | None = None,
        *,
        num_classes: int | None = None,
        spatial_dims: int = 3,
        min_shape: Sequence[int] | None = None,
        allow_empty_label: bool = True,
        affine_tolerance: float = GRID_TOLERANCE,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__([image_key] if label_key is None else [image_key, label_key])
        self.image_key = image_key
        self.label_key = label_key
        self.spatial_dims = checks.choice("spatial_dims", spatial_dims, (2, 3))
        self.num_classes = None if num_classes is None else checks.whole_number("num_classes", num_classes, 2)
        if min_shape is not None and len(min_shape) != spatial_dims:
            raise ValueError(f"min_shape: expected {spatial_dims} sizes, got {tuple(min_shape)}.")
        self.min_shape = None if min_shape is None else tuple(min_shape)
        self.allow_empty_label = allow_empty_label
        self.affine_tolerance = checks.number("affine_tolerance", affine_tolerance, least=0)
        self.ignore_index = ignore_index

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """Check `data` and return it."""
        if self.image_key not in data:
            raise KeyError(
                f"{self.image_key}: expected this key in the item, got {sorted(map(str, data))}; set image_key."
            )
        found: dict[Hashable, list[str]] = {}
        for key in [key for key in (self.image_key, self.label_key) if data.get(key) is not None]:
            volume = data[key]
            if not isinstance(volume, torch.Tensor | np.ndarray):
                raise TypeError(
                    f"{key}: expected a loaded volume, got {type(volume).__name__}; put CheckVolumesd after loading."
                )
            found[key] = self._axes_problems(volume)
        image, label = (data[key] if found.get(key) == [] else None for key in (self.image_key, self.label_key))
        if image is not None:
            found[self.image_key] += self._image_problems(_array(image))
        if label is not None:
            found[self.label_key] += self._label_problems(_array(label))
        if image is not None and label is not None:
            found[self.label_key] += self._pair_problems(image, label)
        lines = [f"{label_name(data[key], key)}: {problem}" for key, problems in found.items() for problem in problems]
        if lines:
            raise VolumeError("\n".join(lines))
        return data

    def _axes_problems(self, volume: torch.Tensor | np.ndarray) -> list[str]:
        shape = tuple(volume.shape)
        if len(shape) == self.spatial_dims + 1:
            return [] if min(shape) > 0 else [f"has the shape {shape}, it holds no voxel; export it again."]
        advice = "use EnsureChannelFirstd before this check, or set spatial_dims"
        if len(shape) > self.spatial_dims:
            advice = "take one time point or contrast per item (LoadVolumed says so while loading)"
        return [f"has the shape {shape}, expected one channel axis and {self.spatial_dims} spatial axes; {advice}."]

    def _image_problems(self, image: np.ndarray) -> list[str]:
        problems, shape = [], image.shape[1:]
        if self.min_shape is not None and any(size < low for size, low in zip(shape, self.min_shape, strict=True)):
            problems.append(
                f"has the shape {shape}, expected at least {self.min_shape}; pad it (SpatialPadd) or leave it out."
            )
        # The extremes tell a sound image: they are finite (NaN and infinity show in them) and differ.
        flat = image.reshape(len(image), -1)
        low, high = flat.min(1), flat.max(1)
        constant = np.flatnonzero(low == high).tolist()
        if not (np.isfinite(low) & np.isfinite(high)).all():
            constant = [c for c, values in enumerate(flat) if len(np.unique(values[np.isfinite(values)])) == 1]
            for kind, wrong in (("NaN", np.isnan(image)), ("infinite", np.isinf(image))):
                if count := int(wrong.sum()):
                    channel, *first = np.argwhere(wrong)[0].tolist()
                    problems.append(
                        f"has {count} {kind} voxel{'s' * (count > 1)}, the first at {tuple(first)} of channel "
                        f"{channel}; repair the file, or replace them before this check."
                    )
        if constant:
            which = f"channel {', '.join(map(str, constant))} of {len(image)}"
            problems.append(f"is constant in {which}; it holds no picture: leave it out or export it again.")
        return problems

    def _label_problems(self, label: np.ndarray) -> list[str]:
        if len(label) != 1:
            return [f"has {len(label)} channels, expected one with class numbers; use AsDiscreted(argmax=True)."]
        values = label if self.ignore_index is None else label[label != self.ignore_index]
        if stray := checks.stray_values(values, self.num_classes):
            last = "1, 2, ..." if self.num_classes is None else self.num_classes - 1
            return [
                f"has values that are no class number 0 to {last}: {stray}; map them (MapLabelValued), set num_classes "
                "or ignore_index, or resample labels with mode='nearest'."
            ]
        foreground = np.count_nonzero(values)
        if not foreground and not self.allow_empty_label:
            return ["has no foreground voxel; leave this item out, or set allow_empty_label=True."]
        if foreground and foreground == values.size:
            return [
                f"has no background voxel (all {foreground} are foreground); nothing lies outside the object, so check "
                "that 0 is the background, or leave the item out."
            ]
        return []

    def _pair_problems(self, image: torch.Tensor | np.ndarray, label: torch.Tensor | np.ndarray) -> list[str]:
        name = label_name(image, self.image_key)
        if image.shape[1:] != label.shape[1:]:
            return [
                f"has the shape {tuple(label.shape[1:])}, its image {name} {tuple(image.shape[1:])}; check that they "
                "belong together, or use ResampleToMatchd."
            ]
        if not isinstance(image, MetaTensor) or not isinstance(label, MetaTensor):
            return []
        apart = grid_difference(label.affine.cpu(), image.affine.cpu(), self.affine_tolerance)
        if not apart:
            return []
        return [
            f"has another affine than its image {name}: {apart}; use ResampleToMatchd, or copy the header if the "
            "voxels agree."
        ]


def _array(volume: torch.Tensor | np.ndarray) -> np.ndarray:
    return np.asarray(volume.detach().cpu() if isinstance(volume, torch.Tensor) else volume)
