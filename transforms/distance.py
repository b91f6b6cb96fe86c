"""Signed distance maps of a label, the targets of the boundary losses, and their compact storage."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch import Tensor

from medconstraints import checks
from medconstraints.distance.measures import Euclidean, Geodesic
from medconstraints.distance.provenance import RECORD, check_not_resampled, record, spacing_now

__all__ = ["DecodeDistanceMapd", "SignedDistanceMapd"]

SHEAR = 0.01  # largest cosine between two axes that are taken to be perpendicular
STORAGE = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}

_DEFAULT = Euclidean()


class SignedDistanceMapd(MapTransform):
    """Adds the signed distance to the boundary of each class, in mm, negative inside (Kervadec 2020, eq. 4.4).

    And the voxel spacing, (D,), which `HausdorffLoss` needs.

    Put it after loading, orientation and resampling, and before random crops: distances are then those of the whole
    volume, and `CacheDataset`, or `PersistentDataset` with `track_meta=True`, keep them. Crops, flips, quarter turns
    and padding (with 0: no term there) may follow, on the label and the map alike; the losses refuse a map that was
    resampled after.

    The spacing is that of each label's affine, oblique or not. A class that is absent or fills the volume has a map of
    zeros.

    Args:
        keys: key of the label: class numbers (1, *S), or masks (C, *S), which may overlap, for networks with a sigmoid.
            With a `Geodesic` measure also a weak label (1, *S), points or scribbles.
        map_key: key of the map, (C, *S), or (len(classes), *S).
        num_classes: classes of the label with the background, C; or masks, C.
        classes: those that get a map, in this order, for networks with other channels: [1] for one foreground channel.
            None for all.
        measure: how distances are measured: `medconstraints.distance.Euclidean` straight, or
            `medconstraints.distance.Geodesic` along an image.
        image_key: key of the image (M, *S), for a `Geodesic` measure.
        storage: "float32"; "float16", at half the memory, with an error of at most 1/2048 of a value; "int8", at a
            quarter, with an error of at most clip_mm / 254 (the measure's `clip_mm`), to be decoded by
            `DecodeDistanceMapd`.
        spacing_mm: voxel spacing, one value per axis; None takes it from the affine.
        spacing_key: key of the spacing; None to leave it out.
        allow_missing_keys: leave items without a label as they are.

    Raises:
        TypeError: `measure` is neither of both.
        ValueError: an argument is outside its range.

    Example:
        >>> label = MetaTensor(torch.tensor([[[0.0, 1.0, 1.0, 0.0]]]), affine=torch.diag(torch.tensor([1.0, 3.0, 1.0])))
        >>> SignedDistanceMapd(num_classes=2)({"label": label})["distance_map"][1]
        metatensor([[ 1.5000, -1.5000, -1.5000,  1.5000]])
    """

    def __init__(
        self,
        keys: KeysCollection = "label",
        map_key: str = "distance_map",
        *,
        num_classes: int,
        classes: Sequence[int] | None = None,
        measure: Euclidean | Geodesic = _DEFAULT,
        image_key: str = "image",
        storage: str = "float32",
        spacing_mm: Sequence[float] | None = None,
        spacing_key: str | None = "spacing_mm",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(checks.one_key(keys), allow_missing_keys)
        if not isinstance(measure, (Euclidean, Geodesic)):
            raise TypeError(f"measure: expected Euclidean(...) or Geodesic(...), got {type(measure).__name__}.")
        if storage == "int8" and measure.clip_mm is None:
            raise ValueError(
                'clip_mm: expected a largest distance of the measure for storage "int8", whose steps it sets.'
            )
        self.map_key = map_key
        self.num_classes = checks.whole_number("num_classes", num_classes, least=1)
        self.classes = checks.class_numbers(classes, self.num_classes)
        self.measure = measure
        self.image_key = image_key
        self.storage = checks.choice("storage", storage, tuple(STORAGE))
        self.spacing_mm = None if spacing_mm is None else checks.spacing(spacing_mm, len(spacing_mm))
        self.spacing_key = spacing_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the map to a copy of `data`."""
        item = dict(data)
        for key in self.key_iterator(item):
            label, image = item[key], item[self.image_key] if isinstance(self.measure, Geodesic) else None
            name = checks.label_name(label, key)
            try:
                self._check(label)
                spacing = _affine_spacing(label) if self.spacing_mm is None else self.spacing_mm
                item[self.map_key] = self._map(label, image, spacing)
            except ValueError as error:
                text = str(error)
                raise ValueError(text if text.startswith(f"{name}: ") else f"{name}: {text}") from error
            if self.spacing_key is not None:
                item[self.spacing_key] = torch.tensor(spacing, dtype=torch.float32)
        return item

    def _check(self, label: Any) -> None:
        if label.ndim not in (3, 4) or label.shape[0] not in (1, self.num_classes):
            raise ValueError(
                f"expected a label map (1, *S) of class numbers, or {self.num_classes} masks ({self.num_classes}, *S), "
                f"one for each class, got shape {tuple(label.shape)}; use EnsureChannelFirstd before, or set "
                "num_classes."
            )
        if self.storage == "int8" and not isinstance(label, MetaTensor):
            raise ValueError('expected a MetaTensor for storage "int8", whose step its meta data keep.')

    def _map(self, label: Any, image: Any, spacing: Sequence[float]) -> Tensor:
        values = torch.as_tensor(label) if not isinstance(label, Tensor) else checks.plain(label)
        scale = 1.0 if self.storage != "int8" or self.measure.clip_mm is None else self.measure.clip_mm / 127
        maps = torch.empty((len(self.classes), *values.shape[1:]), dtype=STORAGE[self.storage], device=values.device)
        done = 0
        for distances in self._distances(values, image, spacing):
            if self.storage == "int8":
                distances = distances.div_(scale).round_()
            maps[done : done + len(distances)] = distances
            done += len(distances)
        if not isinstance(label, MetaTensor):
            return maps
        result = MetaTensor(maps, meta=deepcopy(label.meta), applied_operations=deepcopy(label.applied_operations))
        result.meta[RECORD] = record(label.affine, spacing, scale)
        return result

    def _distances(self, label: Tensor, image: Any, spacing: Sequence[float]) -> Iterator[Tensor]:
        """Maps of all classes, float32, in parts (k, *S): stored in another type, never all of them at once."""
        if len(label) == self.num_classes:  # masks
            for number in self.classes:
                mask = label[number]
                if isinstance(self.measure, Geodesic):
                    yield self.measure.of_mask(mask, checks.plain(torch.as_tensor(image)), spacing)[None]
                else:
                    yield self.measure.of_masks(mask[None], spacing)
        elif isinstance(self.measure, Geodesic):
            image = checks.plain(torch.as_tensor(image))
            yield self.measure.of_label(label[0], image, self.num_classes, spacing, self.classes)
        else:
            groups = [self.classes] if self.storage == "float32" else [[number] for number in self.classes]
            for group in groups:
                yield self.measure.of_label(label[0], self.num_classes, spacing, group)


class DecodeDistanceMapd(MapTransform):
    """Turns maps stored as "int8" or "float16" back into float32 millimetres, after the random crops, before collating.

    And looks whether a map was resampled, which nobody can once its meta data are gone, and brings the spacing beside
    it up to date, whose axes a turn exchanges.

    Args:
        keys: keys of the maps.
        spacing_key: key of the spacing that `SignedDistanceMapd` wrote.
        track_meta: keep the meta data; without them batches are put together faster.
        keep_half: leave "float16" as it is: the losses take it, and batches are put together faster.
        allow_missing_keys: leave items without a map as they are.

    Raises:
        ValueError: at the call, an int8 map without the meta data that hold its step, or a map that was resampled.
    """

    def __init__(
        self,
        keys: KeysCollection = "distance_map",
        *,
        spacing_key: str = "spacing_mm",
        track_meta: bool = True,
        keep_half: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.spacing_key = spacing_key
        self.track_meta = checks.flag("track_meta", track_meta)
        self.keep_half = checks.flag("keep_half", keep_half)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Decode the maps of a copy of `data`."""
        item = dict(data)
        for key in self.key_iterator(item):
            stored = item[key]
            check_not_resampled(stored, str(key))
            spacing = spacing_now(stored)
            if spacing is not None and self.spacing_key in item:
                item[self.spacing_key] = spacing.float()
            kept = stored.meta.get(RECORD) if isinstance(stored, MetaTensor) else None
            if stored.dtype == torch.int8 and kept is None:
                raise ValueError(
                    f"{key}: expected a distance map with its meta data, got plain int8; keep it a MetaTensor up to "
                    'here, or store it as "float16".'
                )
            decoded = stored if self.keep_half and stored.dtype == torch.float16 else stored.float()
            if kept is not None and float(kept["scale_mm"]) != 1:
                decoded = decoded * float(kept["scale_mm"])
                decoded.meta[RECORD] = {**kept, "scale_mm": 1.0}
            item[key] = decoded if self.track_meta or not isinstance(decoded, MetaTensor) else decoded.as_tensor()
        return item


def _affine_spacing(label: Any) -> tuple[float, ...]:
    """Voxel spacing of a label (1, *S): lengths of the columns of its affine."""
    dims = label.ndim - 1
    if not isinstance(label, MetaTensor):
        raise ValueError(
            f"expected a MetaTensor, whose affine tells the spacing, got {type(label).__name__}; load it with "
            "LoadImaged, or give spacing_mm."
        )
    columns = torch.as_tensor(label.affine, dtype=torch.float64).cpu()[:-1, :dims]
    spacing = columns.norm(dim=0)
    if not bool(torch.isfinite(columns).all()) or int(torch.linalg.matrix_rank(columns)) < dims:
        raise ValueError(
            f"expected an affine with {dims} independent axes of finite length, got {columns.tolist()}; repair the "
            "header, or give spacing_mm."
        )
    cosines = columns.T @ columns / torch.outer(spacing, spacing) - torch.eye(dims)
    if float(cosines.abs().max()) > SHEAR:
        raise ValueError(
            f"expected an affine with perpendicular axes, got {columns.tolist()} (a tilted gantry?); resample the "
            "image and the label to perpendicular axes, or give spacing_mm."
        )
    return tuple(spacing.tolist())
