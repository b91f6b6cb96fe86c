"""From probabilities on the network's grid to classes on the file's, one class at a time."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, MapTransform

__all__ = ["InvertedClassesd"]


class InvertedClassesd(MapTransform):
    """Invert the preprocessing for the probabilities of each class, and keep the class that is most probable.

    The same as MONAI's `Invertd` and an argmax, of equal probabilities the lower class; but on the file's grid, which
    may be far larger than the network's, there are never more than two classes in memory. Probabilities, not classes,
    go through the resampling: linear interpolation of a mask is ragged.

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
            probabilities = item[key]
            best: torch.Tensor | None = None
            classes: torch.Tensor | None = None
            meta: MetaTensor | None = None
            for number in range(probabilities.shape[0]):
                given = {self.image_key: item[self.image_key], key: probabilities[number : number + 1]}
                inverted = self.invert(given)[key]
                share = inverted.as_tensor() if isinstance(inverted, MetaTensor) else inverted
                if best is None or classes is None:
                    best, classes, meta = share, torch.zeros_like(share, dtype=torch.uint8), inverted
                    continue
                larger = share > best
                best = torch.where(larger, share, best)
                classes[larger] = number
            assert best is not None and classes is not None
            inside = classes > 0
            if bool(inside.any()):
                item["confidence"] = round(float(best[inside].double().mean()), 4)
            item[key] = MetaTensor(classes, meta=meta.meta) if isinstance(meta, MetaTensor) else classes
        return item
