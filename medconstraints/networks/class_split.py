"""A discriminator that sees an image cut up by the classes of a label map."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from medconstraints import checks

__all__ = ["ClassSplitDiscriminator"]


class ClassSplitDiscriminator(nn.Module):
    """One score of a label map given its image: the image times each class, stacked as channels (LoAd, figure 2).

    Args:
        body: (B, (C + 1) * K, *S) -> scores, or a list whose last are the scores, such as MONAI's `PatchDiscriminator`;
            (B, C * K, *S) without maps. The mean of its scores judges the image: in most patches there is nothing to
            tell.
        with_maps: the label map itself is stacked behind. Where intensities are 0, the mean of a normalised image, the
            product does not show the class.
        spectral: divide each convolution's weight by its largest singular value (Miyato et al. 2018).

    Example:
        >>> from monai.networks.nets import PatchDiscriminator
        >>> judge = ClassSplitDiscriminator(PatchDiscriminator(2, 4, 6, num_layers_d=1))
        >>> judge(torch.zeros(1, 1, 16, 16), torch.zeros(1, 3, 16, 16)).shape
        torch.Size([1, 1])
    """

    def __init__(self, body: nn.Module, *, with_maps: bool = True, spectral: bool = False) -> None:
        super().__init__()
        self.body, self.with_maps = body, checks.flag("with_maps", with_maps)
        if spectral:
            for module in list(body.modules()):
                if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
                    spectral_norm(module)

    def forward(self, image: Tensor, maps: Tensor) -> Tensor:
        """Image (B, C, *S) and label map, one-hot or soft, (B, K, *S) -> scores (B, 1), above 0 for real."""
        split = (image[:, :, None] * maps[:, None]).flatten(1, 2)
        found = self.body(torch.cat([split, maps], 1) if self.with_maps else split)
        scores: Tensor = found[-1] if isinstance(found, list | tuple) else found
        return scores.flatten(1).mean(1, keepdim=True)
