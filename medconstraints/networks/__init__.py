"""Networks that MONAI lacks."""

from medconstraints.networks.class_split import ClassSplitDiscriminator
from medconstraints.networks.enet import ENet
from medconstraints.networks.pooled_encoder import PooledEncoder
from medconstraints.networks.searchable_generator import MaskToImage, SearchableCell, SearchableGenerator
from medconstraints.networks.spatial_transformer import SpatialTransformer
from medconstraints.networks.statistic_regressor import StatisticBlock, StatisticRegressor, statistic_blocks

__all__ = [
    "ClassSplitDiscriminator",
    "ENet",
    "MaskToImage",
    "PooledEncoder",
    "SearchableCell",
    "SearchableGenerator",
    "SpatialTransformer",
    "StatisticBlock",
    "StatisticRegressor",
    "statistic_blocks",
]
