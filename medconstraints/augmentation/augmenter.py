"""A network that draws augmentations, and what it draws: affine, elastic and intensity changes with bounded values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medconstraints import checks
from medconstraints.augmentation.intensity import blurred, gamma_corrected, recoloured, shifted
from medconstraints.augmentation.warp import affine_matrix, sampling_grid, warp

__all__ = ["FAMILIES", "Augmenter", "Quantity", "augment", "quantities"]


class Quantity(NamedTuple):
    """One value of an augmentation: it lies in -limit..limit, and 0 changes nothing."""

    name: str
    limit: float
    unit: str


_PLANES = {2: ("01",), 3: ("01", "02", "12")}
_TRANSLATION = ("translation", 4.0, "mm")
# Family -> (stem of the name, limit, unit); stems with an ending have one value for each axis or plane.
_STEMS: Mapping[str, Sequence[tuple[str, float, str]]] = {
    "translation": (_TRANSLATION,),
    "affine": (
        ("rotation", 30.0, "degrees"),
        _TRANSLATION,
        ("scale", 0.3, "log"),
        ("shear", 0.3, "log"),
    ),
    "elastic": (("displacement", 4.0, "mm"),),
    "intensity": (
        ("contrast", 1.2, "log"),
        ("brightness", 1.5, "standard deviations"),
        ("gamma", 0.7, "log"),
        ("noise", 0.5, "standard deviations"),
        ("blur", 1.5, "mm"),
    ),
    "colour": (("saturation", 1.0, "log"), ("hue", 45.0, "degrees")),
}
FAMILIES = tuple(_STEMS)
_PER_AXIS = ("translation", "scale")
_PER_PLANE = ("rotation", "shear")
SIZES = {"small": None, "medium": (100, 64, 32), "large": (100, 512, 1024, 124, 512)}


def quantities(
    families: Sequence[str], spatial_dims: int, limits: Mapping[str, float] | None = None
) -> tuple[Quantity, ...]:
    """The values that families of augmentations have, such as rotation_01, translation_0, contrast.

    Args:
        families: of `FAMILIES`: "translation" (D values), "affine" (6 in 2D, 12 in 3D), "elastic", "intensity" (5),
            "colour" (2, for three channels).
        spatial_dims: 2 or 3.
        limits: name without its axis or plane -> largest absolute value, in place of the default.

    Raises:
        ValueError: an unknown or repeated family, a limit of something else, or one that is not above 0.
    """
    checks.choice("spatial_dims", spatial_dims, (2, 3))
    for family in families:
        checks.choice("families", family, FAMILIES)
    stems = [stem for family in families for stem in _STEMS[family]]
    names = [name for name, _, _ in stems]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"families: expected some, each value once, got {list(families)}; affine translates too.")
    for name, limit in (limits or {}).items():
        if name not in names or not (math.isfinite(limit) and limit > 0):
            raise ValueError(f"limits: expected a number above 0 for some of {names}, got {name}: {limit!r}.")
    found = []
    for name, default, unit in stems:
        endings: Sequence[str] = [""]
        if name in _PER_AXIS:
            endings = [f"_{axis}" for axis in range(spatial_dims)]
        elif name in _PER_PLANE:
            endings = [f"_{plane}" for plane in _PLANES[spatial_dims]]
        found += [Quantity(name + ending, float((limits or {}).get(name, default)), unit) for ending in endings]
    return tuple(found)


def augment(
    image: Tensor,
    label: Tensor | None,
    values: Mapping[str, Tensor],
    spacing_mm: Tensor,
    *,
    label_mode: str = "bilinear",
    nodes: int = 4,
    largest_blur_mm: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Images (B, C, *S) with their label maps (B, K, *S), changed by values (B) of the names that `quantities` gives.

    In this order: warp, blur, colour, contrast and brightness, gamma, noise. The label is warped alone.

    Args:
        image: zero mean, unit variance.
        label: one-hot or class numbers; None, or what is no map, such as a class number, stays as it is.
        values: those that are missing change nothing.
        spacing_mm: (B, D).
        label_mode: "bilinear" for one-hot labels, "nearest" for class numbers.
        nodes: of the elastic grid along each axis.
        largest_blur_mm: limit of the blur; None takes the largest given.
        generator: of the elastic grid and the noise, which are drawn here; None is torch's global one.
    """
    batch, dims = len(image), image.dim() - 2

    def stacked(stem: str, endings: Sequence[object]) -> Tensor:
        zero = image.new_zeros(batch)
        return torch.stack([values.get(f"{stem}_{ending}", zero) for ending in endings], 1)

    def normal(shape: Sequence[int]) -> Tensor:
        return torch.randn(list(shape), device=image.device, dtype=image.dtype, generator=generator)

    if any(name.startswith((*_PER_AXIS, *_PER_PLANE, "displacement")) for name in values):
        axes, planes = range(dims), _PLANES[dims]
        displacement = None
        if "displacement" in values:
            amplitude = values["displacement"].reshape(-1, *[1] * (dims + 1))
            displacement = amplitude * normal([batch, dims, *[nodes] * dims])
        grid = sampling_grid(
            image.shape[2:],
            spacing_mm.to(image),
            matrix=affine_matrix(stacked("rotation", planes), stacked("scale", axes), stacked("shear", planes)),
            translation_mm=stacked("translation", axes),
            displacement_mm=displacement,
        )
        image = warp(image, grid)
        if label is not None and label.shape[2:] == image.shape[2:]:
            label = warp(label, grid, mode=label_mode)
    if "blur" in values:
        largest = float(values["blur"].abs().max()) if largest_blur_mm is None else largest_blur_mm
        image = blurred(image, values["blur"], spacing_mm.to(image), largest_mm=largest)
    if "hue" in values:
        image = recoloured(image, values["saturation"], values["hue"])
    if "contrast" in values:
        image = shifted(image, values["contrast"], values["brightness"])
    if "gamma" in values:
        image = gamma_corrected(image, values["gamma"])
    if "noise" in values:
        image = image + values["noise"].reshape(-1, *[1] * (dims + 1)) * normal(image.shape)
    return image, label


class Augmenter(nn.Module):
    """Draws augmentations from noise, and applies them (Mounsaveng et al. 2021, section 3.2).

    Noise U(-1, 1) goes through an MLP to one number r for each quantity; its value is `limit * tanh(r + floor * z)`
    with z from N(0, 1), so that it is bounded and its distribution cannot shrink to a point. Images do not matter for
    what is drawn. At the start the values lie around 0.

    Args:
        spatial_dims: 2 or 3.
        families: see `quantities`.
        limits: see `quantities`.
        size: "small" (n inputs, layers of n and 10 n for n quantities), "medium" (100 inputs, 64 and 32) or "large"
            (100 inputs, 512, 1024, 124 and 512).
        dropout: in the MLP.
        spread_floor: least standard deviation of each r; 0 lets a distribution collapse, as the published one does.
        nodes: see `augment`.

    Example:
        >>> augmenter = Augmenter(2, families=["translation"])
        >>> image, label = augmenter(torch.zeros(3, 1, 8, 8), torch.zeros(3, 2, 8, 8))
        >>> image.shape, label.shape, [quantity.name for quantity in augmenter.quantities]
        (torch.Size([3, 1, 8, 8]), torch.Size([3, 2, 8, 8]), ['translation_0', 'translation_1'])
    """

    def __init__(
        self,
        spatial_dims: int,
        *,
        families: Sequence[str] = ("affine", "intensity"),
        limits: Mapping[str, float] | None = None,
        size: str = "small",
        dropout: float = 0.2,
        spread_floor: float = 0.05,
        nodes: int = 4,
    ) -> None:
        super().__init__()
        self.spatial_dims = spatial_dims
        self.quantities = quantities(families, spatial_dims, limits)
        if not (math.isfinite(spread_floor) and spread_floor >= 0):
            raise ValueError(f"spread_floor: expected a number >= 0, got {spread_floor!r}.")
        self.spread_floor, self.nodes = spread_floor, checks.whole_number("nodes", nodes, 2)
        count = len(self.quantities)
        widths = SIZES[checks.choice("size", size, tuple(SIZES))] or (count, count, 10 * count)
        layers: list[nn.Module] = []
        for given, made in pairwise(widths):
            layers += [nn.Linear(given, made), nn.SiLU(), nn.Dropout(dropout)]
        last = nn.Linear(widths[-1], count)
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(*layers, last)
        self.num_inputs = widths[0]
        self.register_buffer("limits", torch.tensor([quantity.limit for quantity in self.quantities]))

    limits: Tensor

    def draw(self, count: int) -> Tensor:
        """Values (count, Q) of the quantities, in their units."""
        noise = torch.rand(count, self.num_inputs, device=self.limits.device, dtype=self.limits.dtype) * 2 - 1
        raw: Tensor = self.mlp(noise)
        return self.limits * torch.tanh(raw + self.spread_floor * torch.randn_like(raw))

    def forward(
        self, image: Tensor, label: Tensor | None = None, spacing_mm: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Augmented images (B, C, *S) and label maps, see `augment`; a spacing (B, D) of None is 1 mm."""
        if spacing_mm is None:
            spacing_mm = image.new_ones(len(image), image.dim() - 2)
        values = {q.name: column for q, column in zip(self.quantities, self.draw(len(image)).unbind(1), strict=True)}
        blur = next((q.limit for q in self.quantities if q.name == "blur"), None)
        return augment(image, label, values, spacing_mm, nodes=self.nodes, largest_blur_mm=blur)
