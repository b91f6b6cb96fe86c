"""Networks and network parts that MONAI lacks."""

from medconstraints.networks.smooth_output import SmoothOutput

__all__ = ["SmoothOutput"]
