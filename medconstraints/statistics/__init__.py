"""Differentiable statistics of probability maps: pure functions `probs (B, C, *S) -> (B, C, M)`."""

from medconstraints.statistics.boxes import BoxPlan, box_sums, inside_mask, plan_boxes
from medconstraints.statistics.size import soft_size

__all__ = ["BoxPlan", "box_sums", "inside_mask", "plan_boxes", "soft_size"]
