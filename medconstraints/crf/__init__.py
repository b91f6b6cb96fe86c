"""Fully connected conditional random fields, in plain PyTorch."""

from medconstraints.crf.lattice import PermutohedralLattice
from medconstraints.crf.mean_field import bilateral_features, dense_crf, spatial_features

__all__ = ["PermutohedralLattice", "bilateral_features", "dense_crf", "spatial_features"]
