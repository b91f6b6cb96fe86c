"""The check of a distance map that is the target of a loss."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from medconstraints.checks import plain
from medconstraints.distance.provenance import check_not_resampled, is_recorded

__all__ = ["DistanceMapCheck"]


class DistanceMapCheck:
    """Refuses what is no distance map of the network's output, and warns of what may be a label.

    Maps of `SignedDistanceMapd` say what they are in their meta data. Of a tensor without them the values are looked
    at, which makes the host wait for an accelerator, until one had a negative distance, as every map of all classes
    has, or the warning was given; `warnings.filterwarnings("ignore", message="distance_map")` switches it off.
    """

    def __init__(self) -> None:
        self.seen = False

    def __call__(self, distance_map: Tensor, shape: torch.Size) -> Tensor:
        """The map without meta data.

        Args:
            distance_map: (B, C, *S), floating point.
            shape: of the network's output.

        Raises:
            ValueError: another shape or type, or a map that was resampled.
        """
        check_not_resampled(distance_map, "distance_map")
        known = is_recorded(distance_map)
        values = plain(distance_map)
        if not values.is_floating_point():
            raise ValueError(
                f"distance_map: expected distances in mm, floating point, got {values.dtype}; a label is turned into "
                'them by SignedDistanceMapd, and a map stored with storage="int8" needs DecodeDistanceMapd at the end '
                "of the transforms."
            )
        if values.shape != shape:
            raise _no_map(f"one map for each channel of the input, {tuple(shape)}, got {tuple(values.shape)}")
        if not (known or self.seen or torch.compiler.is_compiling()):
            low, high = torch.aminmax(values.detach())
            self.seen = bool((low < 0) | (high > 0))
            if self.seen and bool(low >= 0):
                warnings.warn(
                    f"distance_map: no distance of the batch is negative (they are {float(low):g} to {float(high):g}), "
                    "as if a label had been given; maps are made by SignedDistanceMapd. This is looked at once.",
                    stacklevel=4,
                )
        return values


def _no_map(what: str) -> ValueError:
    return ValueError(
        f"distance_map: expected {what}; make it with SignedDistanceMapd(label_key, map_key, num_classes=...), and "
        "crop, flip and pad it together with the image."
    )
