"""Networks that MONAI lacks."""

from medconstraints.networks.enet import ENet
from medconstraints.networks.spatial_transformer import SpatialTransformer

__all__ = ["ENet", "SpatialTransformer"]
