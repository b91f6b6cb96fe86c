"""Signed distance maps of a label, the targets of the boundary losses, and their compact storage."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch import Tensor

from medconstraints.checks import label_name
from medconstraints.distance.maps import check_options, signed_distance, signed_distance_map
from medconstraints.distance.provenance import RECORD, check_not_resampled, record, spacing_now

__all__ = ["DecodeDistanceMapd", "SignedDistanceMapd"]

SHEAR = 0.01  # largest cosine between two axes that are taken to be perpendicular
STORAGE = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}


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
        map_key: key of the map, (C, *S), or (len(classes), *S).
        spacing_key: key of the spacing; None to leave it out.
        num_classes: classes of the label with the background, C; or masks, C.
        classes: those that get a map, in this order, for networks with other channels: [1] for one foreground channel.
            None for all.
        slice_axis: None for distances in the volume; an axis for distances within each slice across it.
        convention: "boundary", "voxel" or "published", see `medconstraints.distance.signed_distance_map`.
        clip_mm: largest distance; also saves most of the work for small objects. None for no limit.
        storage: "float32"; "float16", at half the memory, with an error of at most 1/2048 of a value; "int8", at a
            quarter, with an error of at most clip_mm / 254 (give clip_mm), to be decoded by `DecodeDistanceMapd`.
        spacing_mm: voxel spacing, one value per axis; None takes it from the affine.
        image_key: of an image (M, *S), for distances that follow it, see
            `medconstraints.distance.signed_geodesic_distance`; None for straight distances.
        image_weight: mm for one unit of intensity, with `image_key`.
        backend: see `medconstraints.distance.signed_distance_map`.
        allow_missing_keys: leave items without a label as they are.

    Raises:
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
        spacing_key: str | None = "spacing_mm",
        num_classes: int,
        classes: Sequence[int] | None = None,
        slice_axis: int | None = None,
        convention: str = "boundary",
        clip_mm: float | None = None,
        storage: str = "float32",
        spacing_mm: Sequence[float] | None = None,
        image_key: str | None = None,
        image_weight: float = 0.0,
        backend: str = "auto",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if len(self.keys) != 1:
            raise ValueError(f"keys: expected the key of one label, got {list(self.keys)}; use one transform for each.")
        if not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes: expected an integer of at least 1, got {num_classes!r}.")
        chosen = list(range(num_classes)) if classes is None else list(classes)
        if not chosen or not all(isinstance(number, int) and 0 <= number < num_classes for number in chosen):
            raise ValueError(f"classes: expected class numbers 0..{num_classes - 1}, got {classes!r}.")
        check_options(convention, clip_mm, backend)
        if storage not in STORAGE:
            raise ValueError(f"storage: expected one of {', '.join(STORAGE)}, got {storage!r}.")
        if storage == "int8" and clip_mm is None:
            raise ValueError('clip_mm: expected the largest distance for storage "int8", whose 127 steps it sets.')
        if not 0 <= image_weight < math.inf or (image_weight and image_key is None):
            raise ValueError(
                f"image_weight: expected a number of mm >= 0, and 0 without image_key, got {image_weight!r}."
            )
        if image_key is not None and (convention != "boundary" or backend not in ("auto", "numba", "scipy")):
            raise ValueError(
                'image_key: distances along an image have the convention "boundary" and the backend "numba" or '
                f'"scipy", got {convention!r} and {backend!r}.'
            )
        self.map_key = map_key
        self.spacing_key = spacing_key
        self.num_classes = num_classes
        self.classes = chosen
        self.slice_axis = slice_axis
        self.convention = convention
        self.clip_mm = clip_mm
        self.storage = storage
        self.spacing_mm = None if spacing_mm is None else [float(step) for step in spacing_mm]
        self.image_key = image_key
        self.image_weight = image_weight
        self.backend = backend

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the map to a copy of `data`."""
        item = dict(data)
        for key in self.key_iterator(item):
            image = None if self.image_key is None else item[self.image_key]
            name = label_name(item[key], key)
            label = item[key]
            self._check_shape(label, name)
            spacing = self.spacing_mm if self.spacing_mm is not None else _spacing(label, name)
            item[self.map_key] = self._map(label, name, image, spacing)
            if self.spacing_key is not None:
                item[self.spacing_key] = torch.tensor(spacing, dtype=torch.float32)
        return item

    def _check_shape(self, label: Any, name: str) -> None:
        if label.ndim not in (3, 4) or label.shape[0] not in (1, self.num_classes):
            raise ValueError(
                f"{name}: expected a label map (1, *S) of class numbers, or {self.num_classes} masks "
                f"({self.num_classes}, *S), one for each class, got shape {tuple(label.shape)}; use "
                "EnsureChannelFirstd before, or set num_classes."
            )

    def _map(self, label: Any, name: str, image: Any, spacing: Sequence[float]) -> Tensor:
        if not isinstance(label, MetaTensor) and self.storage == "int8":
            raise ValueError(f'{name}: expected a MetaTensor for storage "int8", whose step its meta data keep.')
        plain = label.as_tensor() if isinstance(label, MetaTensor) else torch.as_tensor(label)
        scale = 1.0 if self.storage != "int8" or self.clip_mm is None else self.clip_mm / 127
        maps = torch.empty((len(self.classes), *plain.shape[1:]), dtype=STORAGE[self.storage], device=plain.device)
        try:
            # Stored in another type, one class after the other: never all of them in float32.
            groups = [[number] for number in self.classes]
            if self.storage == "float32" and not self._are_masks(plain):
                groups = [self.classes]
            done = 0
            for group in groups:
                distances = self._distances(plain, group, image, spacing)
                if self.storage == "int8":
                    distances = distances.div_(scale).round_()
                maps[done : done + len(group)] = distances
                done += len(group)
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if name != "label" else str(error)) from error
        if not isinstance(label, MetaTensor):
            return maps
        result = MetaTensor(maps, meta=deepcopy(label.meta), applied_operations=deepcopy(label.applied_operations))
        result.meta[RECORD] = record(label.affine, spacing, scale)
        return result

    def _distances(self, label: Tensor, classes: list[int], image: Any, spacing: Sequence[float]) -> Tensor:
        """Maps (len(classes), *S), float32, of a label (1, *S), or of one class of masks (C, *S)."""
        options: dict[str, Any] = {"slice_axis": self.slice_axis, "clip_mm": self.clip_mm, "backend": self.backend}
        masks = self._are_masks(label)
        if image is None and not masks:
            return signed_distance_map(
                label[0], self.num_classes, spacing, classes=classes, convention=self.convention, **options
            )
        if image is None:
            return signed_distance(label[classes[0]], spacing, convention=self.convention, **options)[None]
        # Imported here: most users need straight distances only.
        from medconstraints.distance.geodesic import signed_geodesic_distance

        values = image.as_tensor() if isinstance(image, MetaTensor) else torch.as_tensor(image)
        if self.slice_axis is not None:
            options["slice_axis"] = self.slice_axis % (label.ndim - 1)
        maps = []
        for number in classes:
            # Refuses what is no label, once, and what is no mask; near the object alone, for the sake of time.
            near: dict[str, Any] = {"slice_axis": self.slice_axis, "clip_mm": min(spacing)}
            if masks:
                signed_distance(label[number], spacing, **near)
            elif number == classes[0]:
                signed_distance_map(label[0], self.num_classes, spacing, classes=(number,), **near)
            mask = label[number] > 0 if masks else label[0] == number
            maps.append(signed_geodesic_distance(mask, values, spacing, image_weight=self.image_weight, **options))
        return torch.stack(maps)

    def _are_masks(self, label: Tensor) -> bool:
        """One channel for each class, not class numbers."""
        return len(label) == self.num_classes


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
        self.keep_half = keep_half
        self.spacing_key = spacing_key
        self.track_meta = track_meta

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


def _spacing(label: Any, name: str) -> list[float]:
    """Voxel spacing of a label (1, *S): lengths of the columns of its affine."""
    dims = label.ndim - 1
    if not isinstance(label, MetaTensor):
        raise ValueError(
            f"{name}: expected a MetaTensor, whose affine tells the spacing, got {type(label).__name__}; load it with "
            "LoadImaged, or give spacing_mm."
        )
    affine = torch.as_tensor(label.affine, dtype=torch.float64).cpu()
    columns = affine[:-1, :dims]
    spacing: list[float] = columns.norm(dim=0).tolist()
    volume = float(torch.linalg.matrix_rank(columns)) if bool(torch.isfinite(columns).all()) else 0
    if volume < dims or not all(0 < step < math.inf for step in spacing):
        raise ValueError(
            f"{name}: expected an affine with {dims} independent axes of finite length, got {columns.tolist()}; repair "
            "the header, or give spacing_mm."
        )
    angles = (columns.T @ columns) / torch.outer(columns.norm(dim=0), columns.norm(dim=0)) - torch.eye(dims)
    if float(angles.abs().max()) > SHEAR:
        raise ValueError(
            f"{name}: expected an affine with perpendicular axes, got {columns.tolist()} (a tilted gantry?); resample "
            "the image and the label to perpendicular axes, or give spacing_mm."
        )
    return spacing
