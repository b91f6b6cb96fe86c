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

__all__ = ["CheckVolumesd", "LoadVolumed", "VolumeError"]

SHOWN_VALUES = 5
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
        self.spatial_dims = _checked_dims(spatial_dims)
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
        stacked = files > 1 and _meta(image).get("original_channel_dim") == 0
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
        self.spatial_dims = _checked_dims(spatial_dims)
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes: expected at least 2, background included, got {num_classes}.")
        if min_shape is not None and len(min_shape) != spatial_dims:
            raise ValueError(f"min_shape: expected {spatial_dims} sizes, got {tuple(min_shape)}.")
        if not affine_tolerance >= 0:
            raise ValueError(f"affine_tolerance: expected a share >= 0 of the voxel spacing, got {affine_tolerance}.")
        self.num_classes = num_classes
        self.min_shape = None if min_shape is None else tuple(min_shape)
        self.allow_empty_label = allow_empty_label
        self.affine_tolerance = affine_tolerance
        self.ignore_index = ignore_index

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """Check `data` and return it."""
        if self.image_key not in data:
            raise KeyError(
                f"{self.image_key}: expected this key in the item, got {sorted(map(str, data))}; set image_key."
            )
        image, label = data[self.image_key], data.get(self.label_key)
        for key, volume in ((self.image_key, image), (self.label_key, label)):
            if volume is not None and not hasattr(volume, "shape"):
                raise TypeError(
                    f"{key}: expected a loaded volume, got {type(volume).__name__}; put CheckVolumesd after loading."
                )
        problems = [f"{_name(image, self.image_key)}: {problem}" for problem in self._image_problems(image)]
        if label is not None:
            found = [*self._label_problems(label), *self._pair_problems(image, label)]
            problems += [f"{_name(label, self.label_key)}: {problem}" for problem in found]
        if problems:
            raise VolumeError("\n".join(problems))
        return data

    def _image_problems(self, image: torch.Tensor) -> list[str]:
        problem = self._axes_problem(image)
        if problem:
            return [problem]
        values = _plain(image)
        problems = []
        shape = tuple(values.shape[1:])
        if self.min_shape is not None and any(size < low for size, low in zip(shape, self.min_shape, strict=True)):
            problems.append(
                f"has the shape {shape}, expected at least {self.min_shape}; pad it (SpatialPadd) or leave it out."
            )
        # One pass tells a sound image: its extremes are finite and differ (NaN and infinity show in them).
        low, high = torch.aminmax(values.flatten(1), dim=1)
        constant = [channel for channel in range(len(values)) if low[channel] == high[channel]]
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            finite = torch.isfinite(values)
            constant = [c for c, usable in enumerate(finite) if values[c][usable].unique().numel() == 1]
            for kind, wrong in (("NaN", torch.isnan(values)), ("infinite", torch.isinf(values))):
                count = int(wrong.sum())
                if count:
                    first = tuple(int(i) for i in wrong.nonzero()[0])
                    problems.append(
                        f"has {count} {kind} voxel{'s' * (count > 1)}, the first at {first[1:]} of channel {first[0]}; "
                        "repair the file, or replace them before this check."
                    )
        if constant:
            which = f"channel {', '.join(map(str, constant))} of {len(values)}"
            problems.append(f"is constant in {which}; it holds no picture: leave it out or export it again.")
        return problems

    def _label_problems(self, label: torch.Tensor) -> list[str]:
        problem = self._axes_problem(label)
        if problem:
            return [problem]
        if label.shape[0] != 1:
            return [f"has {label.shape[0]} channels, expected one with class numbers; use AsDiscreted(argmax=True)."]
        values = _plain(label).flatten()
        if self.ignore_index is not None:
            values = values[values != self.ignore_index]
        top = math.inf if self.num_classes is None else self.num_classes - 1
        whole = not values.is_floating_point() or torch.equal(values, values.round())  # False for NaN
        if not (whole and bool(((values >= 0) & (values <= top) & (values != math.inf)).all())):
            wrong = (values < 0) | (values > top) | (values != values.round()) | (values == math.inf)
            found = values[wrong & ~values.isnan()].unique().tolist()  # unique() lists every NaN
            found += [math.nan] if values.isnan().any() else []
            shown = ", ".join(f"{value:g}" for value in found[:SHOWN_VALUES])
            shown += f" and {len(found) - SHOWN_VALUES} more" if len(found) > SHOWN_VALUES else ""
            last = "1, 2, ..." if self.num_classes is None else f"{top}"
            return [
                f"has values that are no class number 0 to {last}: {shown}; map them (MapLabelValued), set "
                "num_classes or ignore_index, or resample labels with mode='nearest'."
            ]
        problems = []
        foreground = int(torch.count_nonzero(values))
        background = values.numel() - foreground
        if not foreground and not self.allow_empty_label:
            problems.append("has no foreground voxel; leave this item out, or set allow_empty_label=True.")
        if foreground and not background:
            problems.append(
                f"has no background voxel (all {foreground} are foreground); nothing lies outside the object, so check "
                "that 0 is the background, or leave the item out."
            )
        return problems

    def _pair_problems(self, image: torch.Tensor, label: torch.Tensor) -> list[str]:
        if self._axes_problem(image) or self._axes_problem(label):
            return []
        if image.shape[1:] != label.shape[1:]:
            return [
                f"has the shape {tuple(label.shape[1:])}, its image {_name(image, self.image_key)} "
                f"{tuple(image.shape[1:])}; check that they belong together, or use ResampleToMatchd."
            ]
        if not isinstance(image, MetaTensor) or not isinstance(label, MetaTensor):
            return []
        affine = torch.as_tensor(image.affine, dtype=torch.float64).cpu()
        difference = (torch.as_tensor(label.affine, dtype=torch.float64).cpu() - affine).abs()
        tolerance_mm = self.affine_tolerance * affine[:-1, : self.spatial_dims].norm(dim=0).min()
        # A NaN difference is larger than any tolerance: hence the negation.
        if not bool((difference <= tolerance_mm).all()):
            what = "origin" if bool((difference[:-1, :-1] <= tolerance_mm).all()) else "voxel size or direction"
            return [
                f"has another affine than its image {_name(image, self.image_key)}: the {what} differs by up to "
                f"{float(difference.max()):.4g} mm; use ResampleToMatchd, or copy the header if the voxels agree."
            ]
        return []

    def _axes_problem(self, volume: torch.Tensor) -> str:
        shape = tuple(volume.shape)
        dims = len(shape) - 1
        if dims == self.spatial_dims:
            return "" if min(shape) > 0 else f"has the shape {shape}, it holds no voxel; export it again."
        if dims > self.spatial_dims:
            advice = "take one time point or contrast per item (LoadVolumed says so while loading)"
        else:
            advice = "use EnsureChannelFirstd before this check, or set spatial_dims"
        return f"has the shape {shape}, expected one channel axis and {self.spatial_dims} spatial axes; {advice}."


def _checked_dims(spatial_dims: int) -> int:
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims: expected 2 or 3, got {spatial_dims}.")
    return spatial_dims


def _meta(volume: Any) -> Mapping[str, Any]:
    return volume.meta if isinstance(volume, MetaTensor) else {}


def _plain(volume: torch.Tensor) -> torch.Tensor:
    values = volume.as_tensor() if isinstance(volume, MetaTensor) else torch.as_tensor(volume)
    # torch cannot compare every integer type that a file may have.
    return values.to(torch.int64) if values.dtype in (torch.bool, torch.uint16, torch.uint32, torch.uint64) else values


def _name(volume: Any, key: Hashable) -> str:
    """File name of a volume; its key where it did not come from a file."""
    name = _meta(volume).get("filename_or_obj")
    return Path(str(name)).name if name else str(key)


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
