"""Layout of the boxes of a batch: which voxels, lines and bands they hold, planned and checked on the host."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["BoxPlan", "check_width", "plan_boxes", "to_device"]

# More intersections of one size than this, in one image and class, are left to a mask.
_MAX_CORRECTIONS = 32


@dataclass(frozen=True)
class BoxPlan:
    """Where each box and band of a batch lies; made by `plan_boxes`, used by `box_sums`.

    An "image" is a volume (or 2D image) of the batch, or one slice of it when `slice_axis` is set; images are counted
    sample first, slice second. I images, K foreground channels, M slots: slot 0 is the whole image, then follow the
    boxes of that image and class and, where they overlap, signed corrections. S bands ("segments" in eq. 6.2 of
    Kervadec 2020).

    Attributes:
        shape: spatial shape of an image (without the slice axis).
        slice_axis: spatial axis that was turned into the image index, or None.
        first_channel: channel of class 1: 1, or 0 for a single-channel (sigmoid) output.
        starts: first voxel of each slot, (I, K, M, D') int64 on the device of the probabilities, clipped to the image.
        stops: one past the last voxel of each slot, likewise; 0 for an unused slot.
        line_index: for every line of every band its position in the flattened profiles, (L,) int64.
        line_segment: the band of every line, (L,) int64.
        num_segments: S.
        segment_width: lines of each band, (S,), float64 on the host.
        segment_group: image * K + class of each band, (S,) int64 on the host.
        box_volume: voxels in the union of the boxes of each image and class, (I, K), float64 on the host.
        box_cut: whether a box of that image and class reaches beyond the image, (I, K) bool on the host.
        slot_sign: (I, K, M) float64 on the device; the signed sum of the slots is the sum over the union of the boxes.
            None when too many boxes share voxels: then use `inside_mask`.
        num_slices: images of each sample: slices across `slice_axis`, else 1.
    """

    shape: tuple[int, ...]
    slice_axis: int | None
    first_channel: int
    starts: Tensor
    stops: Tensor
    line_index: Tensor
    line_segment: Tensor
    num_segments: int
    segment_width: np.ndarray
    segment_group: np.ndarray
    box_volume: np.ndarray
    box_cut: np.ndarray
    slot_sign: Tensor | None
    num_slices: int

    @cached_property
    def indicators(self) -> list[Tensor]:
        """For each axis 1 where a slot covers a coordinate, else 0: (I, K, M, size) float64."""
        found = []
        for axis, size in enumerate(self.shape):
            grid = torch.arange(size, device=self.starts.device)
            covered = (grid >= self.starts[..., axis, None]).logical_and_(grid < self.stops[..., axis, None])
            found.append(covered.to(torch.float64))
        return found


def plan_boxes(
    boxes: Tensor,
    probs_shape: torch.Size | tuple[int, ...],
    *,
    width: int = 5,
    slice_axis: int | None = None,
    device: torch.device | str = "cpu",
) -> BoxPlan:
    """Check a batch of boxes against an image and lay out its slots and bands.

    In a box of N lines along an axis, consecutive bands take `width` lines each; the last one takes what is left. A
    box one voxel thick has no bands across that axis. A box may reach beyond the image (negative start, or stop above
    the size): it is clipped, and as the object may lie in the part that was cut off, lines that run along a cut axis
    are no tightness evidence and give no bands.

    Args:
        boxes: (B, N, 1 + 2 D) integers, rows [class, start_1..start_D, stop_1..stop_D], half-open, in voxels; class -1
            marks padding. Best kept on the CPU: boxes on another device are fetched, which waits for that device.
        probs_shape: shape (B, C, *S) of the probabilities; with C = 1 class 1 is the only channel, else channel c is
            class c and channel 0 the background.
        width: lines per band, w of eq. 6.2, >= 1.
        slice_axis: spatial axis across which every slice is an image of its own, for boxes drawn slice by slice.
        device: where the index tensors go.

    Raises:
        TypeError: `boxes` is not an integer tensor.
        ValueError: wrong shape, an unknown class, an empty or inverted box, a box outside the image, or a box thicker
            than a slice when `slice_axis` is set. The message names the sample and the row.
    """
    spatial = tuple(int(n) for n in probs_shape[2:])
    dims, batch, channels = len(spatial), int(probs_shape[0]), int(probs_shape[1])
    first_channel = 0 if channels == 1 else 1
    num_classes = channels - first_channel
    check_width(width)
    if slice_axis is not None and not (0 <= slice_axis < dims and dims == 3):
        raise ValueError(
            f"slice_axis: expected None, or 0, 1 or 2 for 3D volumes, got {slice_axis} for shape {spatial}."
        )
    rows = _checked_rows(boxes, batch, dims)
    sample, row = np.nonzero(rows[:, :, 0] != -1)
    kept = rows[sample, row]
    cls, start, stop = kept[:, 0], kept[:, 1 : 1 + dims], kept[:, 1 + dims :]
    size = np.array(spatial)
    found = sample, row, kept
    fine = (cls >= 1) & (cls <= num_classes) & ((stop > start) & (stop > 0) & (start < size)).all(1)
    if not fine.all():
        _explain(found, num_classes, spatial)
    cut, thick = (start < 0) | (stop > size), stop - start > 1
    start, stop = np.maximum(start, 0), np.minimum(stop, size)

    image, axes = sample, [a for a in range(dims) if a != slice_axis]
    if slice_axis is not None:
        _refuse(
            thick[:, slice_axis],
            found,
            f"is not one voxel thick along slice_axis {slice_axis}; draw a flat box per slice, or use slice_axis=None "
            "for 3D boxes",
        )
        image = sample * spatial[slice_axis] + start[:, slice_axis]
        start, stop, cut, thick, size = start[:, axes], stop[:, axes], cut[:, axes], thick[:, axes], size[axes]
    num_slices = spatial[slice_axis] if slice_axis is not None else 1
    num_images = batch * num_slices

    order = np.argsort(image * num_classes + cls - 1, kind="stable")
    group = (image * num_classes + cls - 1)[order]
    start, stop, cut, thick = start[order], stop[order], cut[order], thick[order]
    num_groups = num_images * num_classes
    rank = np.arange(len(group)) - np.searchsorted(group, group)
    extra = _union_corrections(group, rank, start, stop, num_groups)
    signed = extra is not None
    corrections = extra if extra is not None else (group[:0], start[:0], stop[:0], np.zeros(0))
    all_groups, slot = np.concatenate([group, corrections[0]]), 1 + rank
    if len(all_groups) > len(group):
        # Slots: boxes first, in their order, so that a box keeps its rank when corrections follow.
        ranked = np.argsort(all_groups, kind="stable")
        slot = np.empty(len(all_groups), dtype=np.int64)
        slot[ranked] = 1 + np.arange(len(all_groups)) - np.searchsorted(all_groups[ranked], all_groups[ranked])
    num_slots = 1 + int(slot.max(initial=0))
    starts = np.zeros((num_groups, num_slots, len(axes)), dtype=np.int64)
    stops, signs = np.zeros_like(starts), np.zeros((num_groups, num_slots))
    stops[:, 0] = size
    starts[all_groups, slot] = np.concatenate([start, corrections[1]])
    stops[all_groups, slot] = np.concatenate([stop, corrections[2]])
    signs[all_groups, slot] = np.concatenate([np.ones(len(group)), corrections[3]])
    box_cut = np.zeros(num_groups, dtype=bool)
    box_cut[group[cut.any(1)]] = True
    boxes_only = starts[:, 1:], stops[:, 1:]
    volume = ((stops - starts).prod(-1) * signs).sum(-1) if signed else _union_volume(*boxes_only, size)
    line_index, line_segment, segment_width, segment_group = _bands(
        group, group * num_slots + slot[: len(group)], start, stop, cut, thick, size, width, num_groups * num_slots
    )
    slots_shape = (num_images, num_classes, num_slots, len(axes))
    return BoxPlan(
        shape=tuple(int(n) for n in size),
        slice_axis=slice_axis,
        first_channel=first_channel,
        starts=to_device(starts.reshape(slots_shape), device),
        stops=to_device(stops.reshape(slots_shape), device),
        line_index=to_device(line_index, device),
        line_segment=to_device(line_segment, device),
        num_segments=len(segment_width),
        segment_width=segment_width,
        segment_group=segment_group,
        box_volume=volume.reshape(num_images, num_classes),
        box_cut=box_cut.reshape(num_images, num_classes),
        slot_sign=to_device(signs.reshape(slots_shape[:3]), device) if signed else None,
        num_slices=num_slices,
    )


def to_device(array: np.ndarray, device: torch.device | str) -> Tensor:
    """A numpy array as a tensor on the device, without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if str(device) == "cpu" else tensor.to(device, non_blocking=True)


def check_width(width: object) -> None:
    """Refuse anything but a whole number of lines.

    Raises:
        ValueError: `width` is not an integer >= 1.
    """
    if isinstance(width, bool) or not isinstance(width, int | np.integer) or width < 1:
        raise ValueError(f"width: expected an integer >= 1 (lines per band), got {width!r}.")


def _checked_rows(boxes: Tensor, batch: int, dims: int) -> np.ndarray:
    if not isinstance(boxes, Tensor) or boxes.is_floating_point() or boxes.is_complex() or boxes.dtype == torch.bool:
        got = boxes.dtype if isinstance(boxes, Tensor) else type(boxes).__name__
        raise TypeError(f"boxes: expected an integer tensor (B, N, 1 + 2 D), got {got}; round voxel coordinates first.")
    if boxes.dim() != 3 or boxes.shape[0] != batch or boxes.shape[2] != 1 + 2 * dims:
        raise ValueError(
            f"boxes: expected shape ({batch}, N, {1 + 2 * dims}), rows [class, start_1..start_{dims}, "
            f"stop_1..stop_{dims}], for {dims}D images, got {tuple(boxes.shape)}; collate with pad_boxes_collate."
        )
    # Not `.numpy()`, which torch.func refuses, and no operation on boxes that are on the CPU already.
    return np.asarray(np.from_dlpack(boxes if boxes.device.type == "cpu" else boxes.cpu()), dtype=np.int64)


def _explain(found: tuple[np.ndarray, np.ndarray, np.ndarray], num_classes: int, spatial: tuple[int, ...]) -> None:
    """Raise for the first fault of boxes that were found to be faulty."""
    kept, dims = found[2], len(spatial)
    cls, start, stop = kept[:, 0], kept[:, 1 : 1 + dims], kept[:, 1 + dims :]
    _refuse(
        (cls < 1) | (cls > num_classes),
        found,
        f"has a class outside 1..{num_classes}; class 0 is the background and -1 marks padding. Check the class "
        "numbers or the network's channels",
    )
    _refuse(np.any(stop <= start, axis=1), found, "is empty or inverted; each stop must be above its start")
    _refuse(
        np.any((stop <= 0) | (start >= np.array(spatial)), axis=1),
        found,
        f"lies outside the image of shape {spatial}; are its coordinates those of this grid, in voxels? BoxesToGridd "
        "maps boxes to an augmented image",
    )


def _refuse(bad: Any, found: tuple[np.ndarray, np.ndarray, np.ndarray], why: str) -> None:
    """Raise for the first bad row; `found` holds the sample, the position and the numbers of every row."""
    if bad.any():
        first = int(np.argmax(bad))
        sample, row, kept = (column[first] for column in found)
        raise ValueError(f"boxes: row {row} of sample {sample}, {kept.tolist()}, {why}.")


def _bands(
    group: np.ndarray,
    flat_slot: np.ndarray,
    start: np.ndarray,
    stop: np.ndarray,
    cut: np.ndarray,
    thick: np.ndarray,
    size: np.ndarray,
    width: int,
    total_slots: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Bands of every box along every axis: line positions in the flattened profiles, their band, widths and groups."""
    others_cut = cut.sum(1, keepdims=True) > cut
    axis, box = np.nonzero((thick & ~others_cut).T)
    lines = (stop - start)[box, axis]
    bands = -(-lines // width)
    first_band = np.cumsum(bands) - bands
    # The profiles of the first axis stand before those of the second: slot by slot, `size` values each.
    first_line = (total_slots * (np.cumsum(size) - size))[axis] + flat_slot[box] * size[axis] + start[box, axis]
    of_line, of_band = np.repeat(np.arange(len(box)), lines), np.repeat(np.arange(len(box)), bands)
    position = np.arange(len(of_line)) - (np.cumsum(lines) - lines)[of_line]
    left = lines[of_band] - (np.arange(len(of_band)) - first_band[of_band]) * width
    widths = np.minimum(width, left).astype(np.float64)
    return first_line[of_line] + position, first_band[of_line] + position // width, widths, group[box][of_band]


def _union_volume(starts: np.ndarray, stops: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Voxels in the union of the boxes of each group, (G,), by counting; (G, M, D) arrays, unused slots empty."""
    covered = [
        ((np.arange(n) >= starts[..., axis, None]) & (np.arange(n) < stops[..., axis, None])).astype(np.float32)
        for axis, n in enumerate(size)
    ]
    counts = np.einsum("gmx,gmy->gxy" if len(size) == 2 else "gmx,gmy,gmz->gxyz", *covered, optimize=True)
    return (counts > 0).reshape(len(starts), -1).sum(1).astype(np.float64)


def _union_corrections(
    group: np.ndarray, rank: np.ndarray, start: np.ndarray, stop: np.ndarray, num_groups: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Signed boxes that, added to the boxes of a group, make their sum the union (inclusion and exclusion).

    Level k holds the non-empty intersections of k boxes of one group, with sign (-1)^(k + 1). Returns group, start,
    stop and sign of each; None when so many boxes lie on top of each other that a mask is cheaper.
    """
    members = int(rank.max(initial=-1)) + 1
    if members < 2:
        return group[:0], start[:0], stop[:0], np.zeros(0)
    table_start = np.zeros((num_groups, members, start.shape[1]), dtype=np.int64)
    table_stop = np.zeros_like(table_start)
    table_start[group, rank], table_stop[group, rank] = start, stop
    found, sign = [(group[:0], start[:0], stop[:0], np.zeros(0))], -1.0
    while len(group):
        low = np.maximum(start[:, None], table_start[group])
        high = np.minimum(stop[:, None], table_stop[group])
        entry, rank = np.nonzero((high > low).all(-1) & (np.arange(members) > rank[:, None]))
        group, start, stop = group[entry], low[entry, rank], high[entry, rank]
        if len(group) and np.bincount(group).max() > _MAX_CORRECTIONS:
            return None
        found.append((group, start, stop, np.full(len(group), sign)))
        sign = -sign
    columns = zip(*found, strict=True)
    return tuple(np.concatenate(column) for column in columns)  # type: ignore[return-value]
