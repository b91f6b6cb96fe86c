"""Differentiable statistics of probability maps: pure functions `probs (B, C, *S) -> (B, C, M)`."""

from medconstraints.statistics.box_plan import BoxPlan, plan_boxes
from medconstraints.statistics.boxes import box_sums, inside_mask
from medconstraints.statistics.size import soft_size

__all__ = ["BoxPlan", "box_sums", "inside_mask", "plan_boxes", "soft_size"]
