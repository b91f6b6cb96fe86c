"""Points from a file, as a map of annotated voxels on the grid of the image they were set on."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from os import PathLike
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type

from medconstraints import checks
from medconstraints.boxes.points import read_points

__all__ = ["LoadPointsd"]


class LoadPointsd(MapTransform):
    """Replace the path of a point list of 3D Slicer by a map (1, *S) of what is annotated, float32.

    A ball around each point has its class, all other voxels `ignore_index`; where balls of several classes meet, the
    nearest point counts. Put it after loading, orientation and resampling, and `WeakLabeld` behind it.

    Args:
        keys: key of the point lists.
        image_key: key of the image, a MetaTensor (C, *S) of three axes.
        radius_voxels: of the balls; 0 is the voxel alone.
        classes: class name -> number, see `read_points`.
        num_classes: see there.
        ignore_index: see above.
        allow_missing_keys: leave items without a point list as they are.

    Raises:
        BoxFileError: a `ValueError`; points that cannot be used.
        FileNotFoundError: no such file.
        TypeError: the value is no path, or the image is not loaded.
    """

    def __init__(
        self,
        keys: KeysCollection = "points",
        image_key: str = "image",
        *,
        radius_voxels: int = 0,
        classes: Mapping[str, int] | None = None,
        num_classes: int | None = None,
        ignore_index: int = -1,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(checks.one_key(keys), allow_missing_keys)
        self.image_key = image_key
        self.radius_voxels = checks.whole_number("radius_voxels", radius_voxels, 0)
        self.classes = dict(classes) if classes else None
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Read the points into a copy of `data`."""
        item = dict(data)
        for key in self.key_iterator(item):
            path, image = item[key], item[self.image_key]
            if not isinstance(path, str | PathLike) or not isinstance(image, MetaTensor):
                raise TypeError(
                    f"{key}, {self.image_key}: expected the path of a point list and a loaded image (MetaTensor), got "
                    f"{type(path).__name__} and {type(image).__name__}; put LoadPointsd after LoadVolumed."
                )
            if image.meta.get("forms_differ"):
                name = checks.label_name(image, self.image_key)
                raise ValueError(f"{name}: {image.meta['geometry_notes']}; set form to sform or qform to place points.")
            points = read_points(
                path,
                affine=image.affine,
                shape=image.shape[1:],
                classes=self.classes,
                num_classes=self.num_classes,
            )
            item[key] = convert_to_dst_type(self._map(points, image.shape[1:])[None], image, dtype=torch.float32)[0]
        return item

    def _map(self, points: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        found = torch.full(shape, float(self.ignore_index))
        nearest = torch.full(shape, float("inf"))
        radius = self.radius_voxels
        for label, *centre in points.tolist():
            box = tuple(
                slice(max(0, at - radius), min(size, at + radius + 1)) for at, size in zip(centre, shape, strict=True)
            )
            axes = [torch.arange(side.start, side.stop) - at for side, at in zip(box, centre, strict=True)]
            squared = axes[0][:, None, None] ** 2 + axes[1][:, None] ** 2 + axes[2] ** 2
            closer = (squared <= radius**2) & (squared < nearest[box])
            found[box] = torch.where(closer, float(label), found[box])
            nearest[box] = torch.where(closer, squared.float(), nearest[box])
        return found
