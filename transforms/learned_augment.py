"""What an augmenter learned, as an ordinary random transform."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, RandomizableTransform
from monai.utils import ensure_tuple_rep
from torch import Tensor

from medconstraints import checks
from medconstraints.augmentation import augment, read_draws

__all__ = ["LearnedAugmentd"]

_INTENSITIES = ("contrast", "brightness", "gamma", "noise", "blur", "saturation", "hue")


class LearnedAugmentd(RandomizableTransform, MapTransform):
    """Augment by the draws of a trained `Augmenter`, from its `augmenter.json`; no part of its training is needed.

    Put it where that training had its augmenter: after normalisation, crops and flips. It is not invertible.

    Args:
        keys: images and label maps (C, *S) on one grid. Millimetres are those of their affines; a plain tensor has
            voxels of 1 mm.
        path: `augmenter.json` of a training.
        mode: "bilinear" for images, whose intensities are changed too, "nearest" for maps of class numbers; one value
            for all keys, or one for each.
        prob: probability that an item is augmented.
        allow_missing_keys: augment only the keys that are there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another file, another mode, or at the call images of another number of axes.
    """

    def __init__(
        self,
        keys: KeysCollection,
        path: str | os.PathLike[str],
        *,
        mode: str | Sequence[str] = "bilinear",
        prob: float = 1.0,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        self.mode = ensure_tuple_rep(mode, len(self.keys))
        for one in self.mode:
            checks.choice("mode", one, ("bilinear", "nearest"))
        self.draws = read_draws(path)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Augment the keys of a copy of `data`."""
        item = dict(data)
        self.randomize(None)
        row, seed = self.R.randint(len(self.draws.table)), int(self.R.randint(2**31))
        if not self._do_transform:
            return item
        values = {
            name: torch.tensor([value], dtype=torch.float32)
            for name, value in zip(self.draws.names, self.draws.table[row], strict=True)
        }
        spatial = {name: value for name, value in values.items() if name not in _INTENSITIES}
        for key, mode in self.key_iterator(item, self.mode):
            volume = item[key]
            if volume.ndim != self.draws.spatial_dims + 1:
                raise ValueError(
                    f"{checks.label_name(volume, key)}: expected (C, *S) with {self.draws.spatial_dims} spatial axes, "
                    f"as the augmenter was trained on, got shape {tuple(volume.shape)}."
                )
            # The same seed for each key: they draw the same displacement, which comes first.
            item[key] = self._augmented(volume, values if mode == "bilinear" else spatial, mode, seed)
        return item

    def _augmented(self, volume: Any, values: Mapping[str, Tensor], mode: str, seed: int) -> Any:
        plain = torch.as_tensor(volume)
        batch = (plain.as_tensor() if isinstance(plain, MetaTensor) else plain)[None].float()
        spacing = torch.ones(1, volume.ndim - 1)
        if isinstance(volume, MetaTensor):
            spacing = torch.tensor([checks.affine_spacing(volume, "image")], dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        # A map takes the place of the label; the image beside it is not looked at.
        label = batch if mode == "nearest" else None
        options: dict[str, Any] = {"label_mode": mode, "nodes": self.draws.nodes, "generator": generator}
        image, warped = augment(batch, label, values, spacing, **options)
        changed = image if warped is None else warped
        changed = changed[0].to(plain.dtype)
        return MetaTensor(changed, meta=volume.meta) if isinstance(volume, MetaTensor) else changed
