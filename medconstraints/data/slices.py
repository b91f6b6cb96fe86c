"""Volumes as 2D slices held in memory, and batches of all slices of one volume."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
from monai.data import Dataset
from monai.transforms import Compose
from monai.utils import convert_to_tensor
from torch import Tensor
from torch.utils.data import Sampler

from medconstraints import checks
from medconstraints.data.cohort import TransformSteps, in_order, missing_entry

__all__ = ["SliceDataset", "VolumeBatchSampler"]

logger = logging.getLogger(__name__)

MAX_ELEMENTS = 4096  # of an array that goes with each slice of its volume: bounds and spacings, not another volume
OWN_KEYS = ("volume", "slice")
LOG_EVERY = 50  # volumes


class SliceDataset(Dataset):
    """2D slices of volumes, for networks and constraints that see one slice at a time.

    `volume_transform` runs once on every entry of `data`, here and now; it is not kept. The volumes (C, *S) under
    `keys` are then cut across `slice_axis` into slices (C, H, W), with H and W the two other axes in their order, and
    stay in memory once. An item has, as plain tensors of their own, the slices under `keys` that the volume has, and

    - what else the volume's dictionary holds and collates: strings, numbers, and arrays of at most 4096 elements, such
      as bounds of the whole volume;
    - `index`, the number of the slice in this data set, 0..len - 1, as formulations with multipliers need it (of an
      entry that has an `index` it takes the place);
    - `volume`, the number of the volume in `data`;
    - `slice`, the position in the volume along `slice_axis`;

    and goes through `transform`. The slices are plain tensors, because a 3D affine is wrong for them: put what needs
    the spacing into `volume_transform`, or let that add the spacing as an entry. What depends on the slice as the
    network sees it (weak labels and bounds of each slice) belongs at the end of `transform`, after random flips and
    crops. Other entries that do not collate are left out, for large arrays with a warning. A path under one of `keys`,
    of a volume that was not loaded, is passed on as a string.

    MONAI's `set_rnd(dataset, seed)` and with it `EpochSeedHandler` seed the random parts of `transform`.

    Args:
        data: entries, dictionaries such as `read_datalist` gives them.
        volume_transform: transforms from an entry to a dictionary of volumes, see `in_order`; None for entries that
            hold them already.
        transform: transforms of a slice, run at every access; None for none.
        slice_axis: spatial axis that is cut, 0 to 2.
        keys: keys of the volumes to be cut. An entry need not have all of them.
        drop: function of an item (before `transform`, and without `index`): slices for which it is true are left out,
            for instance `lambda item: not item["label"].any()`. Bounds of whole volumes then no longer fit.

    Attributes:
        num_volumes: entries of `data`.
        slices_of_volume: for each volume the `range` of its slices' `index`; empty if all were dropped.

    Raises:
        TypeError: an entry is no dictionary after `volume_transform`.
        ValueError: no entries, no slices, an entry without volumes under `keys`, volumes of another number of axes than
            (C, X, Y, Z) or of different spatial shapes, or an entry with a key that the items need for themselves.

    Example:
        >>> import torch
        >>> volume = {"image": torch.zeros(1, 8, 6, 3), "case": "a"}
        >>> dataset = SliceDataset([volume, volume], None)
        >>> len(dataset), dataset[4]["image"].shape, dataset[4]["volume"], dataset[4]["slice"]
        (6, torch.Size([1, 8, 6]), 1, 1)
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        volume_transform: TransformSteps | None,
        transform: TransformSteps | None = None,
        *,
        slice_axis: int = 2,
        keys: Sequence[str] = ("image", "label", "weak_label", "scribble"),
        drop: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        axis = checks.slice_axis(slice_axis)
        if axis is None:
            raise ValueError("slice_axis: expected the axis 0, 1 or 2 that is cut, got None.")
        if not len(data):
            raise ValueError("data: expected at least one entry, got none; check the section of the datalist.")
        self.slice_axis = axis
        self.keys = (keys,) if isinstance(keys, str) else tuple(keys)
        self.num_volumes = len(data)
        self.slices_of_volume: list[range] = []
        self._slices: list[dict[str, Tensor]] = []  # of each volume: key -> (N, C, H, W)
        self._rest: list[dict[str, Any]] = []
        positions: list[tuple[int, int]] = []
        large: set[str] = set()
        prepare = Compose(in_order(volume_transform))
        for volume, entry in enumerate(data):
            try:
                prepared = prepare(entry)
            except Exception as error:
                if (missing := missing_entry(error, entry)) is None:
                    raise
                raise missing from None
            slices, rest = self._cut(prepared, volume)
            large |= {str(key) for key, value in rest.items() if _is_large(value)}
            rest = {key: value for key, value in rest.items() if not _is_large(value)}
            count = len(next(iter(slices.values())))
            kept = list(range(count))
            if drop is not None:
                kept = [i for i in kept if not drop(_item(slices, rest, i) | {"volume": volume, "slice": i})]
            if len(kept) < count:
                slices = {key: value[kept] for key, value in slices.items()}
            self._slices.append(slices)
            self._rest.append(rest)
            self.slices_of_volume.append(range(len(positions), len(positions) + len(kept)))
            positions += [(volume, i) for i in kept]
            if (volume + 1) % LOG_EVERY == 0 and volume + 1 < len(data):
                logger.info("cut %d of %d volumes", volume + 1, len(data))
        if not positions:
            raise ValueError(
                f"drop: expected to keep some slices of {len(data)} volumes, got none; check the function."
            )
        if large:
            logger.warning("left out of the slices: %s; name them in keys if they are volumes", sorted(large))
        size = sum(value.nbytes for slices in self._slices for value in slices.values())
        logger.info("%d slices of %d volumes in %.0f MiB", len(positions), len(data), size / 2**20)
        # An array, not a list: `set_rnd` visits the elements of lists at the start of every epoch.
        super().__init__(np.array(positions), in_order(transform))

    def _cut(self, entry: Any, volume: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Slices (N, C, H, W) under the keys of volumes, and what goes with every slice."""
        where = f"entry {volume} of data"
        if not isinstance(entry, Mapping):
            raise TypeError(
                f"{where}: expected a dictionary after volume_transform, got {type(entry).__name__}; crops that give "
                "several samples belong into transform."
            )
        if taken := [key for key in OWN_KEYS if key in entry]:
            raise ValueError(f"{where}: the keys {list(OWN_KEYS)} belong to the slices, got {taken}; rename them.")
        slices = {
            key: self._slices_of(value, f"{where}: expected a volume (C, X, Y, Z) under {key!r}")
            for key, value in entry.items()
            if key in self.keys and not isinstance(value, str | PathLike)
        }
        shapes = {key: tuple(value.shape[:1] + value.shape[2:]) for key, value in slices.items()}
        if not shapes or 0 in next(iter(shapes.values())):
            raise ValueError(
                f"{where}: expected loaded volumes under {list(self.keys)}, got {sorted(map(str, entry))}; load them "
                "in volume_transform, or set keys."
            )
        if len(set(shapes.values())) > 1:
            raise ValueError(
                f"{where}: expected volumes of one spatial shape, got {shapes} (slices, then the other axes); resample "
                "or pad them alike in volume_transform."
            )
        rest = {key: _collated(value) for key, value in entry.items() if key not in slices}
        return slices, {key: value for key, value in rest.items() if value is not None}

    def _slices_of(self, value: Any, expected: str) -> Tensor:
        if not _is_numeric(value) or value.ndim != 4:
            raise ValueError(f"{expected}, got {tuple(value.shape) if _is_numeric(value) else type(value).__name__}.")
        return _plain(value).movedim(self.slice_axis + 1, 0).contiguous()

    def _transform(self, index: int) -> Any:
        index = range(len(self))[index]  # negative ones count from the end
        volume, position = self.data[index].tolist()
        item = _item(self._slices[volume], self._rest[volume], index - self.slices_of_volume[volume].start)
        # Copies: a transform that works in place must not change what the next epoch gets.
        item = {key: value.clone() if isinstance(value, Tensor) else value for key, value in item.items()}
        return self.transform(item | {"index": index, "volume": volume, "slice": position})


class VolumeBatchSampler(Sampler[list[int]]):
    """Batches of all slices of one volume, in their order, for constraints on whole volumes (thesis, section 2.4.4).

    Give it as `DataLoader(dataset, batch_sampler=...)`. The order of the volumes is a function of `seed` and the epoch
    alone, so that a resumed run goes on with the batches of the uninterrupted one; attach `EpochSeedHandler` to the
    trainer, or call `set_epoch` yourself: without it every epoch has the order of epoch 0. A volume without slices (all
    dropped) gives no batch.

    Args:
        dataset: the data set.
        shuffle: shuffle the volumes in each epoch; False keeps the order of the data.
        seed: seed of the shuffling, at least 0.
        max_slices: largest batch. Of a volume with more slices, as many are drawn at random in each epoch. The sizes
            that the loss then sums are those of a part of the volume: its upper bound still holds, but its lower bound
            does not.

    Raises:
        TypeError: the data set is no `SliceDataset`.
        ValueError: `max_slices` below 1, or a negative seed.

    Example:
        >>> import torch
        >>> dataset = SliceDataset([{"image": torch.zeros(1, 4, 4, n)} for n in (2, 3)], None)
        >>> list(VolumeBatchSampler(dataset, shuffle=False))
        [[0, 1], [2, 3, 4]]
    """

    def __init__(
        self, dataset: SliceDataset, *, shuffle: bool = True, seed: int = 0, max_slices: int | None = None
    ) -> None:
        if not isinstance(dataset, SliceDataset):
            raise TypeError(f"dataset: expected a SliceDataset, got {type(dataset).__name__}.")
        self.batches = [slices for slices in dataset.slices_of_volume if len(slices)]
        self.shuffle = checks.flag("shuffle", shuffle)
        self.seed = checks.whole_number("seed", seed, 0)
        self.max_slices = None if max_slices is None else checks.whole_number("max_slices", max_slices, 1)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from which the order is drawn at the next iteration."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        """Number of batches of an epoch."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of this epoch, lists of indices."""
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.batches)) if self.shuffle else range(len(self.batches))
        for number in order:
            slices = np.array(self.batches[number])
            if self.max_slices is not None and len(slices) > self.max_slices:
                slices = np.sort(rng.choice(slices, self.max_slices, replace=False))
            yield slices.tolist()


def _plain(value: Any) -> Tensor:
    """A tensor without MONAI's meta data; MONAI also copes with numpy's negative strides."""
    tensor: Tensor = convert_to_tensor(value, track_meta=False)
    return tensor


def _is_numeric(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biuf")


def _is_large(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > MAX_ELEMENTS


def _collated(value: Any) -> Any:
    """What a collate function can put together: plain tensors, numbers and strings; None for all else."""
    if _is_numeric(value):
        return _plain(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, PathLike):
        return str(value)
    return value if isinstance(value, str | int | float) else None  # bool is an int


def _item(slices: Mapping[str, Tensor], rest: Mapping[str, Any], row: int) -> dict[str, Any]:
    return {**rest, **{key: value[row] for key, value in slices.items()}}
