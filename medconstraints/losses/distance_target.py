"""The check of a distance map that is the target of a loss."""

from __future__ import annotations

import torch
from torch import Tensor

from medconstraints.checks import plain
from medconstraints.distance.provenance import check_not_resampled

__all__ = ["DistanceMapCheck"]


class DistanceMapCheck:
    """Refuses what is no distance map of the network's output, and remembers that it has seen one.

    Labels are told from maps by their values, which makes the host wait for an accelerator: so that is done until a map
    with a negative distance was seen.
    """

    def __init__(self) -> None:
        self.seen = False

    def __call__(self, distance_map: Tensor, shape: torch.Size) -> Tensor:
        """The map without meta data.

        Args:
            distance_map: (B, C, *S), floating point.
            shape: of the network's output.

        Raises:
            ValueError: another shape or type, a label, or a map that was resampled.
        """
        check_not_resampled(distance_map, "distance_map")
        values = plain(distance_map)
        if not values.is_floating_point():
            raise ValueError(
                f"distance_map: expected distances in mm, floating point, got {values.dtype}; a label is turned into "
                'them by SignedDistanceMapd, and a map stored with storage="int8" needs DecodeDistanceMapd at the end '
                "of the transforms."
            )
        if values.shape != shape:
            raise _no_map(f"one map for each channel of the input, {tuple(shape)}, got {tuple(values.shape)}")
        if not self.seen:
            low, high = torch.aminmax(values.detach())
            self.seen = bool(low < 0)
            if not self.seen and bool(high == 1) and bool(((values == 0) | (values == 1)).all()):
                raise _no_map("distances in mm, got zeros and ones as of a label")
        return values


def _no_map(what: str) -> ValueError:
    return ValueError(
        f"distance_map: expected {what}; make it with SignedDistanceMapd(label_key, map_key, num_classes=...), and "
        "crop, flip and pad it together with the image."
    )
