"""From probabilities on the network's grid to classes on the file's, one class at a time."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, MapTransform
from torch.nn import functional as F

from medconstraints.checks import plain

__all__ = ["InvertedClassesd"]

STEPS = 65535  # of a probability that is stored
SLAB_VALUES = 1 << 23  # float32 values that are in memory at once beside the result


class InvertedClassesd(MapTransform):
    """Invert the preprocessing for the probabilities of each class, and keep the class that is most probable.

    The same as MONAI's `Invertd` and an argmax, of equal probabilities the lower class; but on the file's grid, which
    may be far larger than the network's, there is no more than a slab of the probabilities of a chain that only turns
    and resamples; of another chain there are all of them on the network's grid and two on the file's. Probabilities,
    not classes, go through the resampling: linear interpolation of a mask is ragged.

    Writes (1, *S) uint8 with the image's meta data at each key, and under "confidence" the mean probability of the
    voxels that are not background, where there are any; under "probabilities", where they are asked for, (C, *S) uint16
    in steps of 1/65535.

    Args:
        keys: probabilities (C, *S), with the transforms that were applied to `image_key`; or what `SlabInferer` keeps.
        preprocessing: the chain that made the network's input.
        image_key: key of the image.
        softmax: what stands at the keys are logits, whose softmax is the probabilities.
        probabilities: keep them on the file's grid too, in two bytes for each voxel and class.
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        preprocessing: Compose,
        image_key: str = "image",
        softmax: bool = False,
        probabilities: bool = False,
    ) -> None:
        super().__init__(keys)
        self.probabilities = probabilities
        self.image_key = image_key
        self.softmax = softmax
        # Each key stands for one class, or for the classes, while it is inverted.
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
            shares: list[Any] | None = [] if self.probabilities else None
            if isinstance(item[key], Mapping) or (turned and "SpatialResample" not in operations and shares is None):
                classes, total, meta = self._only_turned(item, key)
            elif turned and "SpatialResample" in operations and image.ndim == 4:
                classes, total, meta = self._in_slabs(item[key], image, shares)
            else:
                classes, total, meta = self._class_by_class(item, key, shares)
            if shares is not None:
                item["probabilities"] = np.concatenate(shares, 1 if len(shares[0]) > 1 else 0)
            if count := int(torch.count_nonzero(classes)):
                item["confidence"] = round(total / count, 4)
            item[key] = classes if meta is None else MetaTensor(classes, meta=meta)
        return item

    def _probabilities(self, values: torch.Tensor) -> torch.Tensor:
        return values.float().softmax(0) if self.softmax else values.float()

    def _only_turned(self, item: Mapping[Hashable, Any], key: Hashable) -> tuple[torch.Tensor, float, Any]:
        """Classes (1, *S), the sum of the probabilities of those that are not background, and the file's meta data."""
        found = item[key]
        kept = found if isinstance(found, Mapping) else None
        shape = plain(found if kept is None else kept["classes"]).shape[1:]
        classes = torch.empty(1, *shape, dtype=torch.uint8) if kept is None else plain(kept["classes"])
        total = 0.0
        thick = max(1, SLAB_VALUES // max(1, shape[1:].numel() * (len(found) if kept is None else 1)))
        for start in range(0, shape[0], thick):
            slab = (slice(None), slice(start, start + thick))
            if kept is None:
                share, classes[0, slab[1]] = self._probabilities(plain(found)[slab]).max(0)
            else:
                share = plain(kept["probability"])[slab][0]
            total += float(share.where(classes[slab][0] > 0, 0.0).sum(dtype=torch.float64))
        classes, meta = self._inverted(item, key, classes)
        return classes, total, meta

    def _inverted(self, item: Mapping[Hashable, Any], key: Hashable, values: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Values (1, *S) on the file's grid, and its meta data; those of an image without any are left as they are."""
        image = item[self.image_key]
        if not isinstance(image, MetaTensor):
            return values, None
        found = self.invert({self.image_key: image, key: MetaTensor(values, meta=image.meta)})[key]
        return plain(found), found.meta

    def _class_by_class(
        self, item: Mapping[Hashable, Any], key: Hashable, shares: list[Any] | None
    ) -> tuple[torch.Tensor, float, Any]:
        """The same for any chain: of all classes the highest probability is kept; `shares` gets each of them."""
        probabilities = self._probabilities(plain(item[key]))
        best: torch.Tensor | None = None
        for number in range(probabilities.shape[0]):
            share, meta = self._inverted(item, key, probabilities[number : number + 1])
            if shares is not None:
                shares.append(_in_steps(share))
            if best is None:
                best, classes = share, torch.zeros_like(share, dtype=torch.uint8)
                continue
            larger = share > best
            best = torch.where(larger, share, best)
            classes[larger] = number
        assert best is not None
        return classes, float(best.where(classes > 0, 0.0).sum(dtype=torch.float64)), meta

    def _in_slabs(self, values: Any, image: MetaTensor, shares: list[Any] | None) -> tuple[torch.Tensor, float, Any]:
        """The same for a chain that turned and resampled, in slabs: linear interpolation at each voxel of the file.

        Between the first and the last voxel's centre of the network's grid; beyond them the nearest counts.
        """
        values = plain(values)
        stored = torch.as_tensor(image.meta["original_affine"], dtype=torch.float64)
        shape = [int(size) for size in image.meta["spatial_shape"]]
        last = torch.tensor(values.shape[1:], dtype=torch.float64) - 1
        to_source = torch.linalg.solve(torch.as_tensor(image.affine, dtype=torch.float64).cpu(), stored)
        steps = [
            torch.arange(size, dtype=torch.float64)[:, None] * to_source[:3, axis] for axis, size in enumerate(shape)
        ]
        plane = steps[1][:, None] + steps[2][None] + to_source[:3, 3]
        classes = torch.empty(1, *shape, dtype=torch.uint8)
        total = 0.0
        thick = max(1, SLAB_VALUES // (plane.shape[0] * plane.shape[1] * (values.shape[0] + 3)))
        for start in range(0, shape[0], thick):
            places = (steps[0][start : start + thick, None, None] + plane).clamp(torch.zeros(3).double(), last)
            low = places.amin((0, 1, 2)).floor().long()
            high = places.amax((0, 1, 2)).ceil().long() + 1
            source = self._probabilities(values[(slice(None), *map(slice, low, high))])
            # In grid_sample's coordinates -1 is the first voxel's centre and 1 the last one's.
            grid = ((places - low) * (2 / (high - 1 - low).clamp(min=1)) - 1).flip(-1).to(source)
            [slab] = F.grid_sample(source[None], grid[None], padding_mode="border", align_corners=True)
            if shares is not None:
                shares.append(_in_steps(slab))
            share, number = slab.max(0)
            classes[0, start : start + thick] = number
            total += float(share.where(number > 0, 0.0).sum(dtype=torch.float64))
        meta = {**image.meta, "affine": stored}
        return classes, total, meta


def _in_steps(probabilities: torch.Tensor) -> Any:
    return (probabilities.clamp(0, 1) * STEPS).round().cpu().numpy().astype(np.uint16)
