"""Networks that MONAI lacks."""

from medconstraints.networks.enet import ENet
from medconstraints.networks.searchable_generator import MaskToImage, SearchableCell, SearchableGenerator
from medconstraints.networks.spatial_transformer import SpatialTransformer

__all__ = ["ENet", "MaskToImage", "SearchableCell", "SearchableGenerator", "SpatialTransformer"]
