"""A discriminator that sees an image cut up by the classes of a label map."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

__all__ = ["ClassSplitDiscriminator"]


class ClassSplitDiscriminator(nn.Module):
    """Scores of a label map given its image: the image times each class, stacked as channels (LoAd, figure 2).

    Args:
        body: (B, C * K, *S) -> scores, or a list whose last are the scores, such as MONAI's `PatchDiscriminator` with
            `in_channels = C * K`.
        spectral: divide each convolution's weight by its largest singular value (Miyato et al. 2018).

    Example:
        >>> from monai.networks.nets import PatchDiscriminator
        >>> judge = ClassSplitDiscriminator(PatchDiscriminator(2, 4, 3, num_layers_d=1))
        >>> judge(torch.zeros(1, 1, 16, 16), torch.zeros(1, 3, 16, 16)).shape
        torch.Size([1, 1, 7, 7])
    """

    def __init__(self, body: nn.Module, *, spectral: bool = False) -> None:
        super().__init__()
        self.body = body
        if spectral:
            for module in list(body.modules()):
                if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
                    spectral_norm(module)

    def forward(self, image: Tensor, maps: Tensor) -> Tensor:
        """Image (B, C, *S) and label map, one-hot or soft, (B, K, *S) -> scores, above 0 for real."""
        split = (image[:, :, None] * maps[:, None]).flatten(1, 2)
        found = self.body(split)
        scores: Tensor = found[-1] if isinstance(found, list | tuple) else found
        return scores
