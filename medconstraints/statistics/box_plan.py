"""Layout of the boxes of a batch: which voxels, lines and bands they hold, planned on the host."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from medconstraints import checks
from medconstraints.boxes.batch import BoxRows, checked_boxes

__all__ = ["Bands", "BoxPlan", "Slots", "plan_boxes", "to_device"]

# More intersections of one size than this, in one image and class, are left to a mask.
_MAX_CORRECTIONS = 32


class Slots(NamedTuple):
    """M boxes for every image and class, on the device of the probabilities.

    Slot 0 is the whole image; then follow the boxes of that image and class and, where they overlap, corrections.

    Attributes:
        starts: first voxel of each slot, (I, K, M, D) int64.
        stops: one past the last voxel, likewise; 0 for an unused slot.
        sign: (I, K, M - 1) float64: the signed sum of the slots from 1 on is the sum over the union of the boxes. None
            when so many boxes share voxels that a mask of the union is cheaper.
    """

    starts: Tensor
    stops: Tensor
    sign: Tensor | None


class Bands(NamedTuple):
    """The S bands of all boxes ("segments" in eq. 6.2 of Kervadec 2020), and the L lines that make them.

    Attributes:
        line: position of each line in the flattened profiles of the slots, (L,) int64 on the device: the profiles along
            the first axis stand before those along the second, slot by slot.
        band: the band of each line, (L,) int64 on the device.
        width: lines of each band, (S,) float64 on the host.
        group: image * K + class - 1 of each band, (S,) int64 on the host.
    """

    line: Tensor
    band: Tensor
    width: np.ndarray
    group: np.ndarray


@dataclass(frozen=True)
class BoxPlan:
    """Where each box and band of a batch lies; made by `plan_boxes`, used by `box_sums`.

    I images as in `BoxRows`: I = B, or B times the number of slices; K foreground classes.

    Attributes:
        shape: spatial shape of an image (without the slice axis).
        slice_axis: spatial axis that was turned into the image index, or None.
        num_slices: images of each sample: slices across `slice_axis`, else 1.
        slots: the boxes of each image and class.
        bands: the bands of each box.
        volume: voxels in the union of the boxes of each image and class, (I, K) float64 on the host.
        cut: whether a box of that image and class reaches beyond the image, (I, K) bool on the host.
    """

    shape: tuple[int, ...]
    slice_axis: int | None
    num_slices: int
    slots: Slots
    bands: Bands
    volume: np.ndarray
    cut: np.ndarray

    @cached_property
    def indicators(self) -> list[Tensor]:
        """For each axis 1 where a slot covers a coordinate, else 0: (I, K, M, size) float64."""
        starts, stops = self.slots.starts.unsqueeze(-1), self.slots.stops.unsqueeze(-1)
        grids = [torch.arange(size, device=starts.device) for size in self.shape]
        return [
            (grid >= starts[..., axis, :]).logical_and_(grid < stops[..., axis, :]).to(torch.float64)
            for axis, grid in enumerate(grids)
        ]

    def images(self, values: Tensor) -> Tensor:
        """(B, C, *S) -> (I, K, *shape): the last K channels, slices as images when the plan has a slice axis."""
        values = values[:, values.shape[1] - self.volume.shape[1] :]
        return values if self.slice_axis is None else values.movedim(2 + self.slice_axis, 1).flatten(0, 1)

    def samples(self, values: Tensor) -> Tensor:
        """(I, C, *shape) -> (B, C, *S): images back to the axes of the batch."""
        if self.slice_axis is None:
            return values
        return values.unflatten(0, (-1, self.num_slices)).movedim(1, 2 + self.slice_axis)


def plan_boxes(
    boxes: Tensor,
    shape: torch.Size | tuple[int, ...],
    *,
    width: int,
    slice_axis: int | None = None,
    device: torch.device | str = "cpu",
) -> BoxPlan:
    """Check a batch of boxes against an image and lay out its slots and bands.

    In a box of N lines along an axis, consecutive bands take `width` lines each; the last one takes what is left. A
    box one voxel thick has no bands across that axis, and a box of one voxel is one band of one line. A box may reach
    beyond the image (negative start, or stop above the size): it is clipped, and as the object may lie in the part that
    was cut off, lines that run along a cut axis are no tightness evidence and give no bands.

    Args:
        boxes: (B, N, 1 + 2 D) integers, see `checked_boxes`. Best kept on the CPU.
        shape: (B, C, *S) of the network's output; with C = 1 class 1 is the only channel, else channel c is class c and
            channel 0 the background.
        width: lines per band, w of eq. 6.2, >= 1.
        slice_axis: spatial axis across which every slice is an image of its own, for boxes drawn slice by slice.
        device: where the index tensors go.

    Raises:
        TypeError, ValueError: as for `checked_boxes`, or `width` is no integer >= 1.
    """
    batch, channels, *spatial = (int(size) for size in shape)
    num_classes = max(channels - 1, 1)
    width = checks.whole_number("width", width, 1)
    rows = checked_boxes(boxes, batch, tuple(spatial), num_classes, slice_axis)
    num_slices = 1 if slice_axis is None else spatial.pop(slice_axis)
    groups, size = (batch * num_slices, num_classes), np.array(spatial)

    group = rows.image * num_classes + rows.label - 1
    order = np.argsort(group, kind="stable")
    group, rows = group[order], BoxRows(*(column[order] for column in rows))
    rank = _rank(group)
    extra = _union_corrections(group, rank, rows.start, rows.stop, batch * num_slices * num_classes)
    starts, stops, sign = _slots(group, rows, extra, groups, size)
    volume = ((stops - starts)[..., 1:, :].prod(-1) * sign).sum(-1)
    if extra is None:
        volume = _union_volume(starts[..., 1:, :], stops[..., 1:, :], size)
    cut = np.zeros(groups, dtype=bool)
    cut.flat[group[rows.cut.any(1)]] = True
    flat_slot = group * starts.shape[2] + 1 + rank
    line, band, band_width, box = _bands(rows, flat_slot, starts[..., 0].size, size, width)
    return BoxPlan(
        shape=tuple(spatial),
        slice_axis=slice_axis,
        num_slices=num_slices,
        slots=Slots(
            to_device(starts, device), to_device(stops, device), None if extra is None else to_device(sign, device)
        ),
        bands=Bands(to_device(line, device), to_device(band, device), band_width, group[box]),
        volume=volume,
        cut=cut,
    )


def to_device(array: np.ndarray, device: torch.device | str) -> Tensor:
    """A numpy array as a tensor on the device, without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if str(device) == "cpu" else tensor.to(device, non_blocking=True)


def _rank(group: np.ndarray) -> np.ndarray:
    """Position of each entry of a sorted array among those equal to it."""
    return np.arange(len(group)) - np.searchsorted(group, group)


def _slots(
    group: np.ndarray,
    rows: BoxRows,
    extra: tuple[np.ndarray, ...] | None,
    groups: tuple[int, int],
    size: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts, stops (I, K, M, D) and signs (I, K, M - 1): the image, the boxes by their rank, then the corrections."""
    num_groups = groups[0] * groups[1]
    more, more_start, more_stop, more_sign = extra or (group[:0], rows.start[:0], rows.stop[:0], np.zeros(0))
    all_groups = np.concatenate([group, more])
    by_group = np.argsort(all_groups, kind="stable")  # boxes keep their rank, corrections follow
    slot = np.empty_like(all_groups)
    slot[by_group] = 1 + _rank(all_groups[by_group])
    num_slots = 1 + int(slot.max(initial=0))
    starts = np.zeros((num_groups, num_slots, len(size)), dtype=np.int64)
    stops, sign = np.zeros_like(starts), np.zeros((num_groups, num_slots))
    stops[:, 0] = size
    starts[all_groups, slot] = np.concatenate([rows.start, more_start])
    stops[all_groups, slot] = np.concatenate([rows.stop, more_stop])
    sign[all_groups, slot] = np.concatenate([np.ones(len(group)), more_sign])
    shape = *groups, num_slots
    return starts.reshape(*shape, -1), stops.reshape(*shape, -1), sign.reshape(shape)[..., 1:]


def _bands(
    rows: BoxRows, flat_slot: np.ndarray, num_slots: int, size: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Bands of every box along every axis: position and band of each line, width and box of each band."""
    banded = rows.thick.copy()
    banded[~rows.thick.any(1), 0] = True  # a single voxel: one band of one line
    others_cut = rows.cut.sum(1, keepdims=True) > rows.cut
    axis, box = np.nonzero((banded & ~others_cut).T)
    lines = (rows.stop - rows.start)[box, axis]
    bands = -(-lines // width)
    first_band = np.cumsum(bands) - bands
    # The profiles of the first axis stand before those of the second: slot by slot, `size` values each.
    first_line = (num_slots * (np.cumsum(size) - size))[axis] + flat_slot[box] * size[axis] + rows.start[box, axis]
    of_line, of_band = np.repeat(np.arange(len(box)), lines), np.repeat(np.arange(len(box)), bands)
    position = np.arange(len(of_line)) - (np.cumsum(lines) - lines)[of_line]
    left = lines[of_band] - (np.arange(len(of_band)) - first_band[of_band]) * width
    widths = np.minimum(width, left).astype(np.float64)
    return first_line[of_line] + position, first_band[of_line] + position // width, widths, box[of_band]


def _union_volume(starts: np.ndarray, stops: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Voxels in the union of the boxes of each group, (I, K, M, D) -> (I, K), by counting."""
    covered = [
        ((np.arange(n) >= starts[..., axis, None]) & (np.arange(n) < stops[..., axis, None])).astype(np.float32)
        for axis, n in enumerate(size)
    ]
    counts = np.einsum("ikmx,ikmy->ikxy" if len(size) == 2 else "ikmx,ikmy,ikmz->ikxyz", *covered, optimize=True)
    return (counts > 0).reshape(*counts.shape[:2], -1).sum(-1).astype(np.float64)


def _union_corrections(
    group: np.ndarray, rank: np.ndarray, start: np.ndarray, stop: np.ndarray, num_groups: int
) -> tuple[np.ndarray, ...] | None:
    """Signed boxes that, added to the boxes of a group, make their sum the union (inclusion and exclusion).

    Level k holds the non-empty intersections of k boxes of one group, with sign (-1)^(k + 1). Returns group, start,
    stop and sign of each; None when so many boxes lie on top of each other that a mask is cheaper. Without this, thirty
    boxes of which few overlap would take three times as long, in a mask.
    """
    members = int(rank.max(initial=0)) + 1
    found, sign = [(group[:0], start[:0], stop[:0], np.zeros(0))], -1.0
    if members < 2:
        return found[0]
    table_start = np.zeros((num_groups, members, start.shape[1]), dtype=np.int64)
    table_stop = np.zeros_like(table_start)
    table_start[group, rank], table_stop[group, rank] = start, stop
    while len(group):
        low = np.maximum(start[:, None], table_start[group])
        high = np.minimum(stop[:, None], table_stop[group])
        entry, rank = np.nonzero((high > low).all(-1) & (np.arange(members) > rank[:, None]))
        group, start, stop = group[entry], low[entry, rank], high[entry, rank]
        if len(group) and np.bincount(group).max() > _MAX_CORRECTIONS:
            return None
        found.append((group, start, stop, np.full(len(group), sign)))
        sign = -sign
    return tuple(np.concatenate(column) for column in zip(*found, strict=True))
