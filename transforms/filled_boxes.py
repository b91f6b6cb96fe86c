"""Boxes as a label map: every voxel of a box belongs to its class."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.transforms import Transform
from monai.utils import convert_to_dst_type
from torch import Tensor

from medconstraints import checks

__all__ = ["FilledBoxesd", "fill_boxes"]


def fill_boxes(boxes: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Label map (*S) of boxes; where they overlap, the smaller one counts.

    Args:
        boxes: rows [class, starts, stops], (N, 1 + 2 D), half-open; class -1 is padding.
        shape: S.

    Raises:
        ValueError: the boxes have another number of axes.

    Example:
        >>> fill_boxes(torch.tensor([[1, 0, 1, 2, 3]]), (2, 4)).tolist()
        [[0, 1, 1, 0], [0, 1, 1, 0]]
    """
    dims = len(shape)
    if boxes.shape[-1:] != (1 + 2 * dims,):
        raise ValueError(f"boxes: expected rows of {1 + 2 * dims} numbers for {dims} axes, got {tuple(boxes.shape)}.")
    starts, stops = boxes[:, 1 : 1 + dims], boxes[:, 1 + dims :]
    filled = torch.zeros(shape, dtype=torch.int64)
    for row in (stops - starts).clamp(min=0).prod(1).argsort(descending=True).tolist():
        if boxes[row, 0] > 0:
            places = zip(starts[row].clamp(min=0).tolist(), stops[row].clamp(min=0).tolist(), strict=True)
            filled[tuple(slice(start, stop) for start, stop in places)] = boxes[row, 0]
    return filled


class FilledBoxesd(Transform):
    """`fill_boxes` of an item's boxes, on the grid of its image, with the image's meta data.

    Put it before spatial transforms, and treat it like a label from there on.

    Args:
        filled_key: key of the map, (1, *S) float32.
        boxes_key: key of the boxes; they go.
        image_key: key of the image.
    """

    def __init__(self, filled_key: str = "filled", *, boxes_key: str = "boxes", image_key: str = "image") -> None:
        self.filled_key, self.boxes_key, self.image_key = filled_key, boxes_key, image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the map to a copy of `data`."""
        item = dict(data)
        image, boxes = item[self.image_key], torch.as_tensor(item.pop(self.boxes_key))
        try:
            filled = fill_boxes(boxes, tuple(image.shape[1:]))
        except ValueError as error:
            raise ValueError(f"{checks.label_name(image, self.image_key)}: {error}") from error
        item[self.filled_key] = convert_to_dst_type(filled[None], image, dtype=torch.float32)[0]
        return item
