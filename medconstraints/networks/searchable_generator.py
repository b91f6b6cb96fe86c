"""A mask-to-image generator whose cells weigh several convolutions, and the pair of networks that a GAN trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medconstraints import checks

__all__ = ["MaskToImage", "SearchableCell", "SearchableGenerator"]

_CONVOLUTIONS = {2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}
_FUNCTIONS = {2: (F.conv2d, F.conv_transpose2d), 3: (F.conv3d, F.conv_transpose3d)}
_NORMS = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


class SearchableCell(nn.Module):
    """Sum of K convolutions with different kernels, each times its weight alpha in [0, 1].

    E2EAug, section 3.3: an operator with kernel k, stride 2 and padding (k - 2) / 2 halves an axis, a transposed one
    doubles it. Along an axis with stride 1 the kernel is k - 1 and the size stays, so that thick slices can be kept.
    The operators are linear and have one centre: their sum is computed as one convolution with the sum of the kernels.

    Args:
        spatial_dims: 2 or 3.
        in_channels: of the input.
        out_channels: of the sum.
        stride: 1 or 2 for each axis.
        transposed: enlarge in place of making smaller.
        kernels: even sizes, one for each operator; at least two.

    Attributes:
        logits: (K,), alpha is their sigmoid. They begin at 0, alpha at one half.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        stride: int | Sequence[int] = 2,
        transposed: bool = False,
        kernels: Sequence[int] = (4, 6, 8),
    ) -> None:
        super().__init__()
        strides = _strides(spatial_dims, stride)
        if len(kernels) < 2 or any(kernel < 2 or kernel % 2 for kernel in kernels):
            raise ValueError(f"kernels: expected at least two even sizes, got {tuple(kernels)}.")
        convolution: Any = _CONVOLUTIONS[spatial_dims][transposed]
        self.function, self.strides, self.kernels = _FUNCTIONS[spatial_dims][transposed], strides, tuple(kernels)
        self.operators = nn.ModuleList(
            convolution(
                in_channels,
                out_channels,
                kernel_size=[kernel if step == 2 else kernel - 1 for step in strides],
                stride=strides,
                padding=kernel // 2 - 1,
            )
            for kernel in kernels
        )
        self.logits = nn.Parameter(torch.zeros(len(kernels)))

    @property
    def alpha(self) -> Tensor:
        """Weights of the operators, (K,)."""
        return torch.sigmoid(self.logits)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C_in, *S) -> (B, C_out, *S')."""
        largest = max(self.kernels)
        weight, bias = image.new_zeros(()), image.new_zeros(())
        operator: Any
        for alpha, operator, kernel in zip(self.alpha, self.operators, self.kernels, strict=True):
            margin = [(largest - kernel) // 2] * (2 * len(self.strides))
            weight = weight + alpha * F.pad(operator.weight, margin)
            bias = bias + alpha * operator.bias
        result: Tensor = self.function(image, weight, bias, stride=self.strides, padding=largest // 2 - 1)
        return result


class SearchableGenerator(nn.Module):
    """U-Net of searchable cells that makes an image of a mask, as pix2pix (Isola et al. 2017) does.

    Instance norm and SiLU follow each cell but the last, whose output is the image, unbounded: images have zero mean
    and unit variance here. SiLU has the second derivatives that the search of the cells' weights needs.

    Args:
        spatial_dims: 2 or 3.
        in_channels: of the mask, one-hot.
        out_channels: of the image.
        channels: of each level of the encoder.
        strides: of each level: 2, or one of 1 and 2 for each axis where slices are thick.
        kernels: of every cell, see `SearchableCell`.
        dropout: share of the decoder's channels set to 0, pix2pix's source of chance: other images of the same mask.

    Raises:
        ValueError: `channels` and `strides` differ in length or are fewer than two.

    Example:
        >>> SearchableGenerator(2, 2, 1, channels=(4, 8), strides=(2, 2))(torch.zeros(1, 2, 8, 8)).shape
        torch.Size([1, 1, 8, 8])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int] = (32, 64, 128),
        strides: Sequence[int | Sequence[int]] = (2, 2, 2),
        kernels: Sequence[int] = (4, 6, 8),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        checks.choice("spatial_dims", spatial_dims, (2, 3))
        if len(channels) != len(strides) or len(channels) < 2:
            raise ValueError(
                f"channels, strides: expected one of each for at least two levels, got {len(channels)}, {len(strides)}."
            )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.total_strides = [
            int(torch.tensor([_strides(spatial_dims, stride)[axis] for stride in strides]).prod())
            for axis in range(spatial_dims)
        ]
        widths = [in_channels, *channels]
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for level, stride in enumerate(strides):
            cell = SearchableCell(spatial_dims, widths[level], widths[level + 1], stride=stride, kernels=kernels)
            self.encoder.append(nn.Sequential(cell, _NORMS[spatial_dims](widths[level + 1]), nn.SiLU()))
        for level in reversed(range(len(strides))):
            # What comes from below, and but for the deepest level the encoder's output beside it.
            width = widths[level + 1] * (1 if level == len(strides) - 1 else 2)
            out = widths[level] if level else out_channels
            cell = SearchableCell(spatial_dims, width, out, stride=strides[level], transposed=True, kernels=kernels)
            tail = [_NORMS[spatial_dims](out), nn.SiLU(), nn.Dropout(dropout)] if level else []
            self.decoder.append(nn.Sequential(cell, *tail))

    def forward(self, mask: Tensor) -> Tensor:
        """One-hot mask (B, K, *S) -> image (B, C, *S).

        Raises:
            ValueError: another number of classes, or a size that the strides do not divide into at least two voxels.
        """
        shape = mask.shape[2:]
        smallest = [size // total for size, total in zip(shape, self.total_strides, strict=True)]
        if any(size % total for size, total in zip(shape, self.total_strides, strict=True)) or max(smallest) < 2:
            raise ValueError(
                f"mask: expected sizes that are multiples of {self.total_strides}, at least one of them twice that, "
                f"got {tuple(shape)}; change patch_size, or the generator's strides."
            )
        if mask.shape[1] != self.in_channels:
            raise ValueError(
                f"mask: expected {self.in_channels} channels, one for each class, got {mask.shape[1]}; set the "
                "generator's in_channels to num_classes."
            )
        skips: list[Tensor] = []
        image = mask
        for block in self.encoder:
            image = block(image)
            skips.append(image)
        image = skips.pop()
        for number, block in enumerate(self.decoder):
            image = block(image if not number else torch.cat([image, skips.pop()], 1))
        return image


class MaskToImage(nn.Module):
    """Generator of images from masks, and the discriminator of (mask, image) pairs: one object to save and to load.

    Args:
        generator: one-hot mask (B, K, *S) -> image (B, C, *S); with at least one `SearchableCell`.
        discriminator: (B, K + C, *S) -> scores, or a list of features whose last are the scores, such as MONAI's
            `PatchDiscriminator`.

    Raises:
        ValueError: the generator has no searchable cell.
    """

    def __init__(self, generator: nn.Module, discriminator: nn.Module) -> None:
        super().__init__()
        self.generator, self.discriminator = generator, discriminator
        if not any(True for _ in self.cells()):
            raise ValueError(
                f"generator: expected at least one SearchableCell, got none in {type(generator).__name__}; build it of "
                "cells, such as SearchableGenerator does."
            )

    def cells(self) -> Iterator[tuple[str, SearchableCell]]:
        """Names and searchable cells of the generator."""
        return ((name, module) for name, module in self.generator.named_modules() if isinstance(module, SearchableCell))

    def architecture(self) -> dict[str, nn.Parameter]:
        """Logits of the cells, A, by their name in the generator."""
        return {f"{name}.logits".lstrip("."): cell.logits for name, cell in self.cells()}

    def generator_weights(self) -> dict[str, nn.Parameter]:
        """Parameters of the generator but for its architecture, G, by name."""
        architecture = self.architecture()
        return {name: value for name, value in self.generator.named_parameters() if name not in architecture}

    def scores(self, mask: Tensor, image: Tensor) -> Tensor:
        """What the discriminator says of pairs."""
        found = self.discriminator(torch.cat([mask, image], 1))
        return found[-1] if isinstance(found, list | tuple) else found

    def forward(self, mask: Tensor) -> Tensor:
        """Images of one-hot masks."""
        return self.generator(mask)


def _strides(spatial_dims: int, stride: int | Sequence[int]) -> list[int]:
    strides = [stride] * spatial_dims if isinstance(stride, int) else list(stride)
    if len(strides) != spatial_dims or any(step not in (1, 2) for step in strides):
        raise ValueError(f"stride: expected 1 or 2 for each of {spatial_dims} axes, got {stride!r}.")
    return strides
