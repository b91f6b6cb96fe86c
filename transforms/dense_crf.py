"""Probabilities that follow the image: a dense CRF behind a network."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type

from medconstraints import checks
from medconstraints.crf import dense_crf

__all__ = ["DenseCRFd"]


SUM_TOLERANCE = 1e-2  # half precision


class DenseCRFd(MapTransform):
    """Mean field of a dense CRF on class probabilities, see `medconstraints.crf.dense_crf`.

    Args:
        keys: key of the probabilities (C, *S), not logits.
        image_key: key of the image (M, *S) on the same grid.
        iterations: see `dense_crf`, as for the next five.
        spatial_sigma: in mm where the image has an affine, else in voxels; `sigma` too.
        spatial_weight: see there.
        sigma: see there.
        intensity_sigma: see there.
        weight: see there.

    Raises:
        ValueError: the probabilities are none, or see `dense_crf`; the message names the file.

    Example:
        >>> import torch
        >>> item = {"pred": torch.rand(2, 8, 8).softmax(0), "image": torch.rand(1, 8, 8)}
        >>> DenseCRFd("pred")(item)["pred"].shape
        torch.Size([2, 8, 8])
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        *,
        image_key: str = "image",
        iterations: int = 5,
        spatial_sigma: float = 1.0,
        spatial_weight: float = 3.0,
        sigma: float = 10.0,
        intensity_sigma: float = 20 / 255,
        weight: float = 10.0,
    ) -> None:
        super().__init__(keys)
        self.key = checks.one_key(keys)
        self.image_key = image_key
        self.options: dict[str, Any] = {
            "iterations": checks.whole_number("iterations", iterations, 0),
            "spatial_sigma": checks.number("spatial_sigma", spatial_sigma, above=0),
            "spatial_weight": checks.number("spatial_weight", spatial_weight, least=0),
            "sigma": checks.number("sigma", sigma, above=0),
            "intensity_sigma": checks.number("intensity_sigma", intensity_sigma, above=0),
            "weight": checks.number("weight", weight, least=0),
        }

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the probabilities in a copy of `data`."""
        item = dict(data)
        probabilities, image = item[self.key], item[self.image_key]
        name = checks.label_name(image, self.image_key)
        low, high = float(probabilities.min()), float(probabilities.max())
        if low < 0 or high > 1 + 1e-3:
            raise ValueError(f"{name}: expected probabilities under {self.key!r}, got {low:.3g} to {high:.3g}.")
        if len(probabilities) < 2 or (probabilities.sum(0) - 1).abs().max() > SUM_TOLERANCE:
            raise ValueError(
                f"{name}: expected probabilities of two classes or more that sum to 1 under {self.key!r} (a softmax, "
                f"with the background), got {len(probabilities)} channels; of a sigmoid p make two, 1 - p and p."
            )
        spacing = checks.affine_spacing(image, name) if isinstance(image, MetaTensor) else None
        try:
            refined = dense_crf(probabilities[None], image[None], spacing_mm=spacing, **self.options)[0]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        item[self.key] = convert_to_dst_type(refined, probabilities)[0]
        return item
