"""Whether a segmentation has the structure of what it shows: its pieces, its holes, and what should enclose what."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from medconstraints import checks
from medconstraints.statistics import soft_outside_extent

__all__ = ["structure_of"]

SHARE = 0.01  # of the inner class outside the outer one that still counts as enclosed


def structure_of(
    label: np.ndarray | Tensor, num_classes: int, *, enclosed: Sequence[Sequence[int]] = ()
) -> dict[str, float]:
    """Counts of one label map.

    Args:
        label: (*S), 2D or 3D, class numbers.
        num_classes: with the background.
        enclosed: pairs (inner, outer) of classes of which the second should enclose the first, such as [[3, 2]] for a
            ventricle in its myocardium.

    Returns:
        "pieces": connected components (voxels that touch at a corner are connected) of all classes beyond one each;
        "holes": components of background that the foreground encloses; "implausible", with pairs: 1 if more than 1 % of
        an inner class lies outside the outer one along a line (`soft_outside_extent`), else 0.

    Raises:
        ValueError: the label has other values, or a pair names what is no class.

    Example:
        >>> ring = np.array([[1, 1, 1, 0, 1], [1, 0, 1, 0, 0], [1, 1, 1, 0, 0]])
        >>> structure_of(ring, 2)
        {'pieces': 1.0, 'holes': 1.0}
    """
    array = checks.label_array(label, num_classes)
    corners = np.ones([3] * array.ndim)
    pieces = [max(ndimage.label(array == cls, corners)[1] - 1, 0) for cls in range(1, num_classes)]
    around = np.pad(array == 0, 1, constant_values=True)  # what reaches the border is outside
    found = {"pieces": float(sum(pieces)), "holes": float(ndimage.label(around)[1] - 1)}
    if len(enclosed):
        masks = torch.from_numpy(np.stack([array == cls for cls in range(num_classes)])[None]).float()
        outside = soft_outside_extent(masks, enclosed, along_lines=True)
        found["implausible"] = float((outside > SHARE).any())
    return found
