"""From probabilities on the network's grid to classes on the file's, one class at a time."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, MapTransform
from torch.nn import functional as F

from medconstraints.checks import plain

__all__ = ["InvertedClassesd"]

SLAB_VALUES = 1 << 23  # float32 values that are in memory at once beside the result


class InvertedClassesd(MapTransform):
    """Invert the preprocessing for the probabilities of each class, and keep the class that is most probable.

    The same as MONAI's `Invertd` and an argmax, of equal probabilities the lower class; but on the file's grid, which
    may be far larger than the network's, there are never more than two classes in memory, and of a chain that only
    turns and resamples no more than a slab of each. Probabilities, not classes, go through the resampling: linear
    interpolation of a mask is ragged.

    Writes (1, *S) uint8 with the image's meta data at each key, and under "confidence" the mean probability of the
    voxels that are not background, where there are any.

    Args:
        keys: probabilities (C, *S), with the transforms that were applied to `image_key`.
        preprocessing: the chain that made the network's input.
        image_key: key of the image.
    """

    def __init__(self, keys: KeysCollection, *, preprocessing: Compose, image_key: str = "image") -> None:
        super().__init__(keys)
        self.image_key = image_key
        # Each key stands for one class while it is inverted.
        self.invert = Invertd(
            self.keys, transform=preprocessing, orig_keys=image_key, nearest_interp=False, to_tensor=True
        )

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Put the classes into a copy of `data`."""
        item = dict(data)
        for key in self.key_iterator(item):
            image = item[self.image_key]
            operations = {operation["class"] for operation in getattr(image, "applied_operations", [])}
            turned = operations <= {"SpatialResample", "Orientation"}
            if image.ndim == 4 and turned and "SpatialResample" in operations:
                classes, total, meta = self._in_slabs(item[key], image)
            else:
                classes, total, meta = self._class_by_class(item, key)
            if count := int(torch.count_nonzero(classes)):
                item["confidence"] = round(total / count, 4)
            item[key] = classes if meta is None else MetaTensor(classes, meta=meta)
        return item

    def _class_by_class(self, item: Mapping[Hashable, Any], key: Hashable) -> tuple[torch.Tensor, float, Any]:
        """Classes (1, *S), the sum of the probabilities of those that are not background, and the file's meta data."""
        probabilities = item[key]
        best: torch.Tensor | None = None
        for number in range(probabilities.shape[0]):
            given = {self.image_key: item[self.image_key], key: probabilities[number : number + 1]}
            inverted = self.invert(given)[key]
            share = plain(inverted)
            if best is None:
                best, classes = share, torch.zeros_like(share, dtype=torch.uint8)
                meta = inverted.meta if isinstance(inverted, MetaTensor) else None
                continue
            larger = share > best
            best = torch.where(larger, share, best)
            classes[larger] = number
        assert best is not None
        return classes, float(best.where(classes > 0, 0.0).sum(dtype=torch.float64)), meta

    @staticmethod
    def _in_slabs(probabilities: Any, image: MetaTensor) -> tuple[torch.Tensor, float, Any]:
        """The same for a chain that only turned and resampled: linear interpolation at each voxel of the file.

        Between the first and the last voxel's centre of the network's grid; beyond them the nearest counts.
        """
        stored = torch.as_tensor(image.meta["original_affine"], dtype=torch.float64)
        shape = [int(size) for size in image.meta["spatial_shape"]]
        source = plain(probabilities).float()[None]
        last = torch.tensor(source.shape[2:], dtype=torch.float64) - 1
        to_source = torch.linalg.solve(torch.as_tensor(image.affine, dtype=torch.float64).cpu(), stored)
        # In grid_sample's coordinates -1 is the first voxel's centre and 1 the last one's.
        scale = 2 / last.clamp(min=1)
        matrix, shift = to_source[:3, :3] * scale[:, None], to_source[:3, 3] * scale - 1
        matrix[last == 0], shift[last == 0] = 0.0, 0.0
        steps = [torch.arange(size, dtype=torch.float64)[:, None] * matrix[:, axis] for axis, size in enumerate(shape)]
        plane = steps[1][:, None] + steps[2][None]
        classes = torch.empty(1, *shape, dtype=torch.uint8)
        total = 0.0
        thick = max(1, SLAB_VALUES // (plane.shape[0] * plane.shape[1] * (source.shape[1] + 3)))
        for start in range(0, shape[0], thick):
            grid = (steps[0][start : start + thick, None, None] + plane + shift).flip(-1).to(source)
            slab = F.grid_sample(source, grid[None], mode="bilinear", padding_mode="border", align_corners=True)[0]
            share, number = slab.max(0)
            classes[0, start : start + thick] = number.to(torch.uint8)
            total += float(share.where(number > 0, 0.0).sum(dtype=torch.float64))
        meta = {**image.meta, "affine": stored}
        return classes, total, meta
