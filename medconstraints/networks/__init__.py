"""Networks that MONAI lacks."""

from medconstraints.networks.enet import ENet

__all__ = ["ENet"]
