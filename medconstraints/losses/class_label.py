"""What losses on a label of class numbers share: its checks, and the size of each class."""

from __future__ import annotations

import torch
from torch import Tensor

from medconstraints.checks import plain, readable

__all__ = ["checked_label", "class_sizes", "row_sums"]

_AS_IT_IS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64)


def checked_label(label: Tensor, input: Tensor) -> Tensor:
    """The label (B, 1, *S) of class numbers, without metadata, on the device of the input (B, C, *S).

    Raises:
        ValueError: another shape; or a value that is no class number, looked at where that does not make the host wait
            for an accelerator.
    """
    label = plain(label)
    classes, expected = input.shape[1], (input.shape[0], 1, *input.shape[2:])
    if label.shape != expected or label.is_complex():
        raise ValueError(
            f"target: expected a label (B, 1, *S) = {expected} of class numbers, got {label.dtype} of shape "
            f"{tuple(label.shape)}."
        )
    if label.dtype not in _AS_IT_IS:
        label = label.to(torch.float32 if label.is_floating_point() else torch.int64)
    if readable(label) and label.numel():
        if label.is_floating_point() and not bool((label == label.round()).all()):
            raise ValueError(
                f"target: expected whole class numbers, got {float(label[label != label.round()][0]):g}; resample "
                'labels with mode "nearest".'
            )
        low, high = (float(value) for value in label.detach().aminmax())
        if low < 0 or high >= classes:
            raise ValueError(
                f"target: expected class numbers 0..{classes - 1} for an input with {classes} channels, got "
                f"{low:g}..{high:g}; map the labels, or give the network more channels."
            )
    return label.to(input.device, non_blocking=True)


def class_sizes(label: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Number of voxels of each class in each sample, (B, C), from a label (B, 1, *S) of type int64."""
    rows = label.flatten(1, -2)
    ones = torch.ones(1, dtype=dtype, device=label.device).expand(rows.shape)
    return row_sums(ones, rows, classes).sum(1)


def row_sums(values: Tensor, rows: Tensor, classes: int) -> Tensor:
    """Sum of the values (B, R, L) of each class in each row, (B, R, C).

    One sum for each row of the image: a sum over all voxels, one by one, would lose float32's digits, and on an
    accelerator all threads would wait for the same few numbers.
    """
    return values.new_zeros(*rows.shape[:2], classes).scatter_add(-1, rows, values)
