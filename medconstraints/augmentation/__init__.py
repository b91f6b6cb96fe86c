"""Augmentation with values that can be learned: warps, intensities, and the network that draws them."""

from medconstraints.augmentation.augmenter import FAMILIES, Augmenter, Quantity, augment, quantities
from medconstraints.augmentation.draws import Draws, read_draws, write_draws
from medconstraints.augmentation.intensity import blurred, gamma_corrected, recoloured, shifted
from medconstraints.augmentation.warp import affine_matrix, sampling_grid, warp

__all__ = [
    "FAMILIES",
    "Augmenter",
    "Draws",
    "Quantity",
    "affine_matrix",
    "augment",
    "blurred",
    "gamma_corrected",
    "quantities",
    "read_draws",
    "recoloured",
    "sampling_grid",
    "shifted",
    "warp",
    "write_draws",
]
