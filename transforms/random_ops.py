"""RandAugment and TrivialAugment for grey images in 2D and 3D: a few operations drawn from one list."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Affine, GaussianSmooth, MapTransform, Randomizable
from torch import Tensor

from medconstraints import checks

__all__ = ["OPERATIONS", "RandAugmentd", "TrivialAugmentd"]


class _Draw(NamedTuple):
    """One operation: its name, its signed strength in [-1, 1], the spatial axis it acts on, and a seed for noise."""

    name: str
    level: float
    axis: int
    seed: int


def _rotate(level: float, axis: int, shape: Sequence[int]) -> dict[str, Any]:
    angle = np.deg2rad(30 * level)
    return {"rotate_params": angle if len(shape) == 2 else [angle * (n == axis) for n in range(3)]}


def _translate(level: float, axis: int, shape: Sequence[int]) -> dict[str, Any]:
    return {"translate_params": [0.3 * level * size * (n == axis) for n, size in enumerate(shape)]}


def _scale(level: float, axis: int, shape: Sequence[int]) -> dict[str, Any]:
    return {"scale_params": [1 + 0.3 * level] * len(shape)}


def _shear(level: float, axis: int, shape: Sequence[int]) -> dict[str, Any]:
    count = 2 if len(shape) == 2 else 6
    return {"shear_params": [0.3 * level * (n == 2 * axis % count) for n in range(count)]}


def _contrast(image: Tensor, draw: _Draw) -> Tensor:
    mean = image.mean()
    return mean + (image - mean) * (1 + 0.9 * draw.level)


def _brightness(image: Tensor, draw: _Draw) -> Tensor:
    return image + 0.9 * draw.level * image.std()


def _gamma(image: Tensor, draw: _Draw) -> Tensor:
    low, high = image.min(), image.max()
    width = (high - low).clamp(min=1e-8)
    return low + width * ((image - low) / width) ** np.exp(0.9 * draw.level)


def _blur(image: Tensor, draw: _Draw) -> Tensor:
    return torch.as_tensor(GaussianSmooth(sigma=max(1.5 * abs(draw.level), 1e-3))(image))


def _sharpen(image: Tensor, draw: _Draw) -> Tensor:
    return image + 2 * abs(draw.level) * (image - torch.as_tensor(GaussianSmooth(sigma=1.0)(image)))


def _noise(image: Tensor, draw: _Draw) -> Tensor:
    generator = torch.Generator().manual_seed(draw.seed)
    noise = torch.randn(image.shape, generator=generator).to(image)
    return image + 0.5 * abs(draw.level) * image.std() * noise


_SPATIAL: dict[str, Callable[[float, int, Sequence[int]], dict[str, Any]]] = {
    "rotate": _rotate,
    "translate": _translate,
    "scale": _scale,
    "shear": _shear,
}
_INTENSITY: dict[str, Callable[[Tensor, _Draw], Tensor]] = {
    "contrast": _contrast,
    "brightness": _brightness,
    "gamma": _gamma,
    "blur": _blur,
    "sharpen": _sharpen,
    "noise": _noise,
}
OPERATIONS = ("identity", *_SPATIAL, *_INTENSITY)


class _RandomOperationsd(Randomizable, MapTransform):
    """Base: draws operations, and applies each to all keys."""

    def __init__(
        self,
        keys: KeysCollection,
        *,
        label_keys: Sequence[str] = ("label",),
        operations: Sequence[str] = OPERATIONS,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.label_keys = set(label_keys)
        self.operations = [checks.choice("operations", name, OPERATIONS) for name in operations]
        if not self.operations:
            raise ValueError(f"operations: expected some of {', '.join(OPERATIONS)}, got none.")
        self._draws: list[_Draw] = []

    def _draw(self, strength: float) -> _Draw:
        """An operation of this strength, 0 to 1, with a sign that is drawn."""
        name = self.operations[self.R.randint(len(self.operations))]
        sign = 1 if self.R.rand() < 0.5 else -1
        return _Draw(name, sign * strength, int(self.R.randint(3)), int(self.R.randint(2**31)))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Augment the keys of a copy of `data`, all by the same operations.

        Raises:
            ValueError: an image is not (C, H, W) or (C, H, W, D).
        """
        item = dict(data)
        self.randomize(None)
        for key in self.key_iterator(item):
            for draw in self._draws:
                item[key] = self._applied(torch.as_tensor(item[key]), draw, str(key))
        return item

    def _applied(self, image: Tensor, draw: _Draw, key: str) -> Tensor:
        if image.dim() not in (3, 4):
            raise ValueError(f"{key}: expected an image (C, H, W) or (C, H, W, D), got {tuple(image.shape)}.")
        label = key in self.label_keys
        if draw.name in _SPATIAL:
            shape = image.shape[1:]
            given = _SPATIAL[draw.name](draw.level, draw.axis % len(shape), shape)
            warp = Affine(**given, mode="nearest" if label else "bilinear", padding_mode="border", image_only=True)
            return torch.as_tensor(warp(image)).to(image.dtype)
        if label or draw.name == "identity":
            return image
        values = image.as_tensor() if isinstance(image, MetaTensor) else image
        changed = _INTENSITY[draw.name](values.float(), draw).to(values)
        return MetaTensor(changed, meta=image.meta) if isinstance(image, MetaTensor) else changed


class RandAugmentd(_RandomOperationsd):
    """RandAugment (Cubuk et al. 2020) for grey images: some operations, all of one magnitude, with drawn signs.

    Operations, at magnitude 10: rotation by 30 degrees about one axis; translation by 30 % of the image along one axis;
    scale by 1 -+ 0.3; shear by 0.3; contrast 1 -+ 0.9; brightness -+ 0.9 standard deviations; gamma exp(-+ 0.9); blur
    of 1.5 voxels; sharpening by twice what a blur of 1 voxel takes away; noise of half a standard deviation; identity.
    No mirrors: with left and right labels they would make them wrong.

    Args:
        keys: images and label maps (C, *S) on one grid.
        num_ops: operations in a row.
        magnitude: 0 to 10: the one number that is searched.
        label_keys: those of `keys` that are label maps: read at the nearest voxel, with intensities as they are.
        operations: names of those that are drawn from.
        allow_missing_keys: augment only the keys that are there.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> augment = RandAugmentd("image", num_ops=1, magnitude=10, operations=["brightness"]).set_random_state(0)
        >>> image = torch.tensor([[[0.0, 2.0], [0.0, 2.0]]])
        >>> (augment({"image": image})["image"] - image).unique().numel()
        1
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        num_ops: int = 2,
        magnitude: float = 5,
        label_keys: Sequence[str] = ("label",),
        operations: Sequence[str] = OPERATIONS,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, label_keys=label_keys, operations=operations, allow_missing_keys=allow_missing_keys)
        self.num_ops = checks.whole_number("num_ops", num_ops, 1)
        self.magnitude = checks.number("magnitude", magnitude, least=0)
        if self.magnitude > 10:
            raise ValueError(f"magnitude: expected a number 0 to 10, got {magnitude!r}.")

    def randomize(self, data: Any = None) -> None:
        """Draw operations."""
        self._draws = [self._draw(self.magnitude / 10) for _ in range(self.num_ops)]


class TrivialAugmentd(_RandomOperationsd):
    """TrivialAugment (Müller and Hutter 2021) for grey images: one operation, its strength drawn too; nothing to tune.

    The operations are those of `RandAugmentd`, at a magnitude between 0 and 10.

    Args:
        keys: images and label maps (C, *S) on one grid.
        label_keys: see `RandAugmentd`.
        operations: see there.
        allow_missing_keys: see there.

    Raises:
        ValueError: an argument is out of its range.
    """

    def randomize(self, data: Any = None) -> None:
        """Draw one operation and its strength."""
        self._draws = [self._draw(self.R.rand())]
