"""Convolutions at full resolution first, and a mean over all positions last: features that count what is there."""

from __future__ import annotations

from collections.abc import Sequence

from monai.networks.blocks import Convolution
from monai.networks.layers.factories import Pool
from torch import nn

__all__ = ["PooledEncoder"]


class PooledEncoder(nn.Sequential):
    """Images (B, C, *S) to features (B, channels[-1]), wherever in the image they come from.

    MONAI's `Regressor` ends in a layer with a weight for each position; a mean over them has none to learn by heart.

    Args:
        spatial_dims: 2 or 3.
        in_channels: C.
        channels: of each level; two convolutions, and between levels the maximum of 2 x 2 (x 2) positions.
        norm: see MONAI's `Convolution`; of batches, because instance normalisation takes away how much of an image is
            bright.

    Example:
        >>> import torch
        >>> PooledEncoder(2, 1, (4, 8))(torch.zeros(3, 1, 16, 16)).shape
        torch.Size([3, 8])
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, channels: Sequence[int] = (16, 32, 64, 64), norm: str = "batch"
    ) -> None:
        layers: list[nn.Module] = []
        for level, count in enumerate(channels):
            if level:
                layers.append(Pool["max", spatial_dims](2))
            for before in (in_channels, count):
                layers.append(Convolution(spatial_dims, before, count, act="relu", norm=norm, adn_ordering="NA"))
            in_channels = count
        super().__init__(*layers, Pool["adaptiveavg", spatial_dims](1), nn.Flatten())
