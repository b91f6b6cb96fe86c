"""Augmentation with values that can be learned: warps, intensities, and the network that draws them."""

from medconstraints.augmentation.augmenter import FAMILIES, Augmenter, Quantity, augment, quantities
from medconstraints.augmentation.intensity import blurred, gamma_corrected, recoloured, shifted
from medconstraints.augmentation.warp import affine_matrix, sampling_grid, warp

__all__ = [
    "FAMILIES",
    "Augmenter",
    "Quantity",
    "affine_matrix",
    "augment",
    "blurred",
    "gamma_corrected",
    "quantities",
    "recoloured",
    "sampling_grid",
    "shifted",
    "warp",
]
