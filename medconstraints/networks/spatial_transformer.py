"""A spatial transformer in front of a classifier: the affine map is chosen for each image, also at test time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medconstraints.augmentation import affine_matrix, sampling_grid, warp

__all__ = ["SpatialTransformer"]


class SpatialTransformer(nn.Module):
    """Spatial transformer network (Jaderberg et al. 2015): a small network looks at the image and turns it upright.

    Beside learned augmentation it is the baseline that makes the network invariant instead of showing it variants
    (Mounsaveng et al. 2021, table 1). It starts at the identity; for classification, a label map does not move.

    Args:
        network: takes the warped image.
        spatial_dims: 2 or 3.
        in_channels: of the image.
        channels: of the looking network's three layers.

    Raises:
        ValueError: at the call, when the network gives a map.

    Example:
        >>> network = SpatialTransformer(nn.Flatten(), 2, 1)
        >>> image = torch.randn(2, 1, 8, 8)
        >>> torch.allclose(network(image), image.flatten(1), atol=1e-5)
        True
    """

    def __init__(self, network: nn.Module, spatial_dims: int, in_channels: int, *, channels: int = 16) -> None:
        super().__init__()
        conv: type[nn.Module] = {2: nn.Conv2d, 3: nn.Conv3d}[spatial_dims]
        pool = {2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[spatial_dims]
        self.network = network
        planes = spatial_dims * (spatial_dims - 1) // 2
        self.sizes = (planes, spatial_dims, planes, spatial_dims)  # rotation, scale, shear, translation
        layers: list[nn.Module] = []
        for given in (in_channels, channels, channels):
            layers += [conv(given, channels, 3, stride=2, padding=1), nn.GroupNorm(4, channels), nn.SiLU()]
        last = nn.Linear(channels * 2**spatial_dims, sum(self.sizes))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.looking = nn.Sequential(*layers, pool(2), nn.Flatten(), last)

    def forward(self, image: Tensor) -> Tensor:
        """Output of the network for the warped images (B, C, *S)."""
        turn, scale, shear, shift = self.looking(image).tanh().split(self.sizes, dim=1)
        half = (torch.tensor(image.shape[2:], device=image.device) - 1) / 2
        grid = sampling_grid(
            image.shape[2:],
            image.new_ones(len(image), image.dim() - 2),
            matrix=affine_matrix(90 * turn, scale, shear),
            translation_mm=shift * half,
        )
        output: Tensor = self.network(warp(image, grid))
        if output.dim() > 2:
            raise ValueError(
                f"network: expected one for classification, got an output of shape {tuple(output.shape)}, a map of the "
                "warped image; take the network alone."
            )
        return output
