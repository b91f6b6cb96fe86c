"""Say early, by file name, what is wrong with an image or a label."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Hashable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import DtypeLike, KeysCollection
from monai.data import MetaTensor
from monai.transforms import EnsureChannelFirst, LoadImage, MapTransform
from monai.utils import OptionalImportError
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from medconstraints import checks
from medconstraints.checks import label_name

__all__ = ["CheckVolumesd", "LoadVolumed", "VolumeError"]

CHUNK_BYTES = 1 << 22


class VolumeError(ValueError):
    """An image or label file cannot be used; the message names the file, what was found, and what to do."""


class LoadVolumed(MapTransform):
    """MONAI's `LoadImaged`, with errors that name the file and say what is wrong with it.

    Replaces a path, or a list of paths that become channels, by a MetaTensor: (C, *S), or as stored with
    `ensure_channel_first=False`. NIfTI files are checked for completeness before they are read, whichever reader reads
    them: ITK fills a truncated file up without a word, and nibabel does not notice damaged bytes in the middle of a
    .nii.gz file. That check decompresses the file once more.

    Args:
        keys: keys of the paths.
        reader: name, class or instance of MONAI's reader, or a list; None chooses by file extension.
        dtype: of the loaded array; None keeps the file's.
        ensure_channel_first: move the channels to the front, or add a channel axis.
        spatial_dims: number of spatial axes, 2 or 3. A last axis of one element (X, Y, Z, 1) does not count.
        allow_channels: accept one axis more than `spatial_dims` as channels (RGB, or contrasts in one file). Without it
            such a file is refused: a time series would silently become an image of many channels.
        allow_missing_keys: leave items without the key as they are.

    Raises:
        VolumeError: no such file, not an image, truncated or damaged, files of a list that differ in shape, or more or
            fewer axes than expected. The original exception is its cause.
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        reader: Any = None,
        dtype: DtypeLike = np.float32,
        ensure_channel_first: bool = True,
        spatial_dims: int = 3,
        allow_channels: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.loader = LoadImage(reader=reader, image_only=True, dtype=dtype, ensure_channel_first=False)
        self.to_channel_first = EnsureChannelFirst() if ensure_channel_first else None
        self.spatial_dims = checks.choice("spatial_dims", spatial_dims, (2, 3))
        self.allow_channels = allow_channels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Load the volumes into a copy of `data`."""
        item = dict(data)
        for key in self.key_iterator(item):
            item[key] = self._load(item[key], key)
        return item

    def _load(self, value: Any, key: Hashable) -> torch.Tensor:
        paths = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        if not paths or not all(isinstance(path, str | PathLike) for path in paths):
            raise TypeError(
                f"{key}: expected a path or a list of paths, got {type(value).__name__}; load images once only."
            )
        paths = [Path(path).expanduser() for path in paths]
        for path in paths:
            _check_file(path)
        name = ", ".join(path.name for path in paths)
        try:
            image = self.loader(value)
        except (MemoryError, OptionalImportError):
            raise  # the computer's fault, not the file's
        except Exception as error:
            hint = "check that the files have one shape" if len(paths) > 1 else "save it again, or give another reader"
            raise VolumeError(f"{name}: cannot be read ({_first_line(error)}); {hint}.") from error
        self._check_axes(name, image, len(paths))
        return image if self.to_channel_first is None else self.to_channel_first(image)

    def _check_axes(self, name: str, image: torch.Tensor, files: int) -> None:
        # MONAI stacks the files of a list in front; files that have a channel axis are joined along that one.
        stacked = files > 1 and isinstance(image, MetaTensor) and image.meta.get("original_channel_dim") == 0
        axes = tuple(image.shape[1:] if stacked else image.shape)
        extra = len(axes) - self.spatial_dims
        if extra < 0:
            raise VolumeError(
                f"{name}: has {len(axes)} axes {axes}, expected {self.spatial_dims} spatial axes; use a volume, or set "
                f"spatial_dims={len(axes)}."
            )
        if extra == 0 or (extra == 1 and not stacked and (axes[-1] == files or self.allow_channels)):
            return
        raise VolumeError(
            f"{name}: is {len(axes)}D {axes}, expected {self.spatial_dims} spatial axes; save one time point or "
            "contrast per file, or set allow_channels=True if the last axis holds channels."
        )


class CheckVolumesd(MapTransform):
    """Check a loaded image, and its label, and return the item unchanged.

    Put it after loading and channel-first. All that is wrong with an item stands in one error: axes, NaN or infinite
    voxels, a constant channel, an image too small, and for the label another shape or affine than the image's, values
    that are no class numbers, no foreground, or no background (then nothing lies outside the object, and boxes, sizes
    and distances say nothing).

    Args:
        image_key: key of the image, (C, *S).
        label_key: key of the label, (1, *S) with class numbers; items without one are checked for their image alone.
        num_classes: label values must be 0..num_classes - 1, background included; None accepts any number >= 0.
        spatial_dims: number of spatial axes, 2 or 3.
        min_shape: smallest spatial shape that is accepted, for instance the network's.
        allow_empty_label: accept a label without foreground.
        affine_tolerance: largest difference between an element of the label's and the image's affine, as a share of the
            image's smallest voxel spacing. Plain tensors have no affine and are not compared.
        ignore_index: label value of voxels without annotation, which is no class; such voxels are neither foreground
            nor background.

    Raises:
        VolumeError: with the file's name, what was found, and what to do.

    Example:
        >>> item = {"image": torch.arange(64.0).reshape(1, 4, 4, 4)}
        >>> CheckVolumesd(min_shape=(4, 4, 4))(item) is item
        True
    """

    def __init__(
        self,
        image_key: str = "image",
        label_key: str | None = None,
        *,
        num_classes: int | None = None,
        spatial_dims: int = 3,
        min_shape: Sequence[int] | None = None,
        allow_empty_label: bool = True,
        affine_tolerance: float = 1e-2,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__([image_key] if label_key is None else [image_key, label_key])
        self.image_key = image_key
        self.label_key = label_key
        self.spatial_dims = checks.choice("spatial_dims", spatial_dims, (2, 3))
        self.num_classes = None if num_classes is None else checks.whole_number("num_classes", num_classes, 2)
        if min_shape is not None and len(min_shape) != spatial_dims:
            raise ValueError(f"min_shape: expected {spatial_dims} sizes, got {tuple(min_shape)}.")
        self.min_shape = None if min_shape is None else tuple(min_shape)
        self.allow_empty_label = allow_empty_label
        self.affine_tolerance = checks.number("affine_tolerance", affine_tolerance, least=0)
        self.ignore_index = ignore_index

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """Check `data` and return it."""
        if self.image_key not in data:
            raise KeyError(
                f"{self.image_key}: expected this key in the item, got {sorted(map(str, data))}; set image_key."
            )
        found: dict[Hashable, list[str]] = {}
        for key in [key for key in (self.image_key, self.label_key) if data.get(key) is not None]:
            volume = data[key]
            if not isinstance(volume, torch.Tensor | np.ndarray):
                raise TypeError(
                    f"{key}: expected a loaded volume, got {type(volume).__name__}; put CheckVolumesd after loading."
                )
            found[key] = self._axes_problems(volume)
        image, label = (data[key] if found.get(key) == [] else None for key in (self.image_key, self.label_key))
        if image is not None:
            found[self.image_key] += self._image_problems(_array(image))
        if label is not None:
            found[self.label_key] += self._label_problems(_array(label))
        if image is not None and label is not None:
            found[self.label_key] += self._pair_problems(image, label)
        lines = [f"{label_name(data[key], key)}: {problem}" for key, problems in found.items() for problem in problems]
        if lines:
            raise VolumeError("\n".join(lines))
        return data

    def _axes_problems(self, volume: torch.Tensor | np.ndarray) -> list[str]:
        shape = tuple(volume.shape)
        if len(shape) == self.spatial_dims + 1:
            return [] if min(shape) > 0 else [f"has the shape {shape}, it holds no voxel; export it again."]
        advice = "use EnsureChannelFirstd before this check, or set spatial_dims"
        if len(shape) > self.spatial_dims:
            advice = "take one time point or contrast per item (LoadVolumed says so while loading)"
        return [f"has the shape {shape}, expected one channel axis and {self.spatial_dims} spatial axes; {advice}."]

    def _image_problems(self, image: np.ndarray) -> list[str]:
        problems, shape = [], image.shape[1:]
        if self.min_shape is not None and any(size < low for size, low in zip(shape, self.min_shape, strict=True)):
            problems.append(
                f"has the shape {shape}, expected at least {self.min_shape}; pad it (SpatialPadd) or leave it out."
            )
        # The extremes tell a sound image: they are finite (NaN and infinity show in them) and differ.
        flat = image.reshape(len(image), -1)
        low, high = flat.min(1), flat.max(1)
        constant = np.flatnonzero(low == high).tolist()
        if not (np.isfinite(low) & np.isfinite(high)).all():
            constant = [c for c, values in enumerate(flat) if len(np.unique(values[np.isfinite(values)])) == 1]
            for kind, wrong in (("NaN", np.isnan(image)), ("infinite", np.isinf(image))):
                if count := int(wrong.sum()):
                    channel, *first = np.argwhere(wrong)[0].tolist()
                    problems.append(
                        f"has {count} {kind} voxel{'s' * (count > 1)}, the first at {tuple(first)} of channel "
                        f"{channel}; repair the file, or replace them before this check."
                    )
        if constant:
            which = f"channel {', '.join(map(str, constant))} of {len(image)}"
            problems.append(f"is constant in {which}; it holds no picture: leave it out or export it again.")
        return problems

    def _label_problems(self, label: np.ndarray) -> list[str]:
        if len(label) != 1:
            return [f"has {len(label)} channels, expected one with class numbers; use AsDiscreted(argmax=True)."]
        values = label if self.ignore_index is None else label[label != self.ignore_index]
        if stray := checks.stray_values(values, self.num_classes):
            last = "1, 2, ..." if self.num_classes is None else self.num_classes - 1
            return [
                f"has values that are no class number 0 to {last}: {stray}; map them (MapLabelValued), set num_classes "
                "or ignore_index, or resample labels with mode='nearest'."
            ]
        foreground = np.count_nonzero(values)
        if not foreground and not self.allow_empty_label:
            return ["has no foreground voxel; leave this item out, or set allow_empty_label=True."]
        if foreground and foreground == values.size:
            return [
                f"has no background voxel (all {foreground} are foreground); nothing lies outside the object, so check "
                "that 0 is the background, or leave the item out."
            ]
        return []

    def _pair_problems(self, image: torch.Tensor | np.ndarray, label: torch.Tensor | np.ndarray) -> list[str]:
        name = label_name(image, self.image_key)
        if image.shape[1:] != label.shape[1:]:
            return [
                f"has the shape {tuple(label.shape[1:])}, its image {name} {tuple(image.shape[1:])}; check that they "
                "belong together, or use ResampleToMatchd."
            ]
        if not isinstance(image, MetaTensor) or not isinstance(label, MetaTensor):
            return []
        difference = np.abs(np.asarray(label.affine.cpu(), float) - np.asarray(image.affine.cpu(), float))
        near = difference <= self.affine_tolerance * min(checks.affine_spacing(image, name))  # NaN is not
        if near.all():
            return []
        what = "origin" if near[:-1, :-1].all() else "voxel size or direction"
        return [
            f"has another affine than its image {name}: the {what} differs by up to {difference.max():.4g} mm; use "
            "ResampleToMatchd, or copy the header if the voxels agree."
        ]


def _array(volume: torch.Tensor | np.ndarray) -> np.ndarray:
    return np.asarray(volume.detach().cpu() if isinstance(volume, torch.Tensor) else volume)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip(' .')}" if lines else type(error).__name__


def _check_file(path: Path) -> None:
    """Refuse a file that is missing, empty or, for NIfTI, not one or not complete."""
    name = path.name
    if not path.exists():
        raise VolumeError(f"{name}: no such file ({path}); check the data list and its base folder.") from (
            FileNotFoundError(f"no such file: {path}")
        )
    if path.is_dir():
        return  # a DICOM series
    if path.stat().st_size == 0:
        raise VolumeError(f"{name}: is empty (0 bytes); copy or download it again.")
    if not name.lower().endswith((".nii", ".nii.gz")):
        return
    again = "copy or download it again"
    compressed = name.lower().endswith(".gz")
    with path.open("rb") as file:
        magic = file.read(2)
    if compressed and magic != b"\x1f\x8b":
        raise VolumeError(f"{name}: is not gzip-compressed although its name ends in .gz; rename it, or {again}.")
    try:
        available = _unpacked_size(path) if compressed else path.stat().st_size
    except EOFError as error:
        raise VolumeError(f"{name}: is truncated (its compressed data end too early); {again}.") from error
    except (zlib.error, gzip.BadGzipFile) as error:
        raise VolumeError(f"{name}: is damaged ({_first_line(error)}); {again}.") from error
    try:
        header = nib.load(path)
        needed = header.dataobj.offset + math.prod(header.shape) * header.get_data_dtype().itemsize
    except (ImageFileError, HeaderDataError, ValueError, OSError, EOFError) as error:
        raise VolumeError(f"{name}: is not a NIfTI file, or its header is damaged; export it again.") from error
    if available < needed:
        raise VolumeError(f"{name}: is truncated ({available} bytes of {needed}); {again}.")


def _unpacked_size(path: Path) -> int:
    """Length of a gzip file's content; reading to the end is what makes gzip compare the checksum."""
    size = 0
    with gzip.open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            size += len(chunk)
    return size
