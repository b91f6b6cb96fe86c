"""Differentiable statistics of probability maps: pure functions `probs (B, C, *S) -> (B, C, M)`."""

from medconstraints.statistics.arguments import is_relation, relation
from medconstraints.statistics.box_plan import BoxPlan, plan_boxes
from medconstraints.statistics.boxes import BoxSums, box_sums, inside_mask
from medconstraints.statistics.intensity import soft_mean_intensity
from medconstraints.statistics.moments import soft_centroid, soft_fraction, soft_moments, soft_spread
from medconstraints.statistics.relations import soft_centroid_offset, soft_outside_extent, soft_size_ratio
from medconstraints.statistics.size import soft_size, soft_volume_size

__all__ = [
    "BoxPlan",
    "BoxSums",
    "box_sums",
    "inside_mask",
    "is_relation",
    "plan_boxes",
    "relation",
    "soft_centroid",
    "soft_centroid_offset",
    "soft_fraction",
    "soft_mean_intensity",
    "soft_moments",
    "soft_outside_extent",
    "soft_size",
    "soft_size_ratio",
    "soft_spread",
    "soft_volume_size",
]
