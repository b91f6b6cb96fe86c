"""Load images and labels, in millimetres, with errors that name the file and say what is wrong with it."""

from __future__ import annotations

import gzip
import logging
import math
import os
import warnings
import zlib
from collections.abc import Hashable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import DtypeLike, KeysCollection
from monai.data import MetaTensor
from monai.transforms import EnsureChannelFirst, LoadImage, MapTransform
from monai.utils import OptionalImportError, convert_to_dst_type

from medconstraints import checks
from medconstraints.volumes import VolumeError, load_nifti
from medconstraints.volumes.files import readers

__all__ = ["LoadVolumed"]

logger = logging.getLogger(__name__)
# LoadImage tries every reader that MONAI has; this one warns each time where pydicom is without a decoder on the GPU.
logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)

CHUNK_BYTES = 1 << 22
EXACT_IN_FLOAT32 = 1 << 24  # larger whole numbers have no float32 of their own


class LoadVolumed(MapTransform):
    """MONAI's `LoadImaged`, with errors that name the file and say what is wrong with it.

    Replaces a path, or a list of paths that become channels, by a MetaTensor: (C, *S), or as stored with
    `ensure_channel_first=False`. Its affine is in RAS millimetres, whatever unit the file has. NIfTI, NRRD, MetaImage
    and DICOM folders are read by `medconstraints.volumes`, other files by MONAI's readers. What a NIfTI header leaves
    open (`geometry_notes`) is logged, and stands in the meta data. NIfTI files are checked for completeness before they
    are read, whichever reader reads them: ITK fills a truncated file up without a word, and nibabel does not notice
    damaged bytes in the middle of a .nii.gz file. That check decompresses the file once more.

    Args:
        keys: keys of the paths.
        reader: name, class or instance of MONAI's reader, or a list, which take affines as the file has them; None
            chooses by file extension.
        dtype: of the loaded array; None keeps the file's. With float32 an image beyond 2^24 in magnitude becomes
            float64: its contrast would be lost.
        ensure_channel_first: move the channels to the front, or add a channel axis.
        spatial_dims: number of spatial axes, 2 or 3. A last axis of one element (X, Y, Z, 1) does not count.
        allow_channels: accept one axis more than `spatial_dims` as channels (RGB, or contrasts in one file). Without it
            such a file is refused: a time series would silently become an image of many channels.
        allow_missing_keys: leave items without the key as they are.
        form: which form of a NIfTI header counts, "sform" or "qform"; "best" is the sform where there is one.
        series: series instance UID, for DICOM folders of several series.

    Raises:
        VolumeError: no such file, not an image, truncated or damaged, complex or in colours, files of a list that
            differ in shape or place, or more or fewer axes than expected. The original exception is its cause.
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
        form: str = "best",
        series: str | None = None,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.dtype = dtype
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="NvImgCodecPydicomReader")
            self.loader = LoadImage(reader=reader, image_only=True, dtype=None, ensure_channel_first=False)
        if reader is None:
            for own in readers(form, series):
                self.loader.register(own)
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
        except OptionalImportError:
            raise  # the computer's fault, not the file's
        except MemoryError as error:
            raise MemoryError(f"{name}: there is no memory for it ({error}); {_needed(paths)}") from error
        except VolumeError:
            raise
        except Exception as error:
            hint = "check that the files have one shape" if len(paths) > 1 else "save it again, or give another reader"
            raise VolumeError(f"{name}: cannot be read ({_first_line(error)}); {hint}.") from error
        self._check_axes(name, image, len(paths))
        if notes := image.meta.get("geometry_notes") if isinstance(image, MetaTensor) else "":
            logger.warning("%s: %s", name, notes)
        image = self._cast(image)
        return image if self.to_channel_first is None else self.to_channel_first(image)

    def _cast(self, image: torch.Tensor) -> torch.Tensor:
        dtype = self.dtype
        if dtype is np.float32 and image.dtype in (torch.float64, torch.int32, torch.int64, torch.uint32):
            low, high = image.aminmax()
            if max(abs(float(low)), abs(float(high))) > EXACT_IN_FLOAT32:
                dtype = np.float64
        return image if dtype is None else convert_to_dst_type(image, image, dtype=dtype)[0]

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


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip(' .')}" if lines else type(error).__name__


def _check_file(path: Path) -> None:
    """Refuse a file that is missing, empty or, for NIfTI, not one or not complete."""
    name = path.name
    if not path.exists():
        what = "is a link that leads nowhere" if os.path.islink(path) else f"no such file ({path})"
        raise VolumeError(f"{name}: {what}; check the data list and its base folder.") from (
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
    header = load_nifti(path)
    needed = header.dataobj.offset + math.prod(header.shape) * header.get_data_dtype().itemsize
    if available < needed:
        raise VolumeError(f"{name}: is truncated ({available} bytes of {needed}); {again}.")


def _needed(paths: Sequence[Path]) -> str:
    """How much memory the voxels take, as far as the headers of NIfTI files tell."""
    nifti = [load_nifti(path) for path in paths if path.name.lower().endswith((".nii", ".nii.gz"))]
    total = sum(8 * math.prod(image.shape) for image in nifti)
    return f"its voxels take {total / 1e9:.3g} GB as they are read." if total else "use a computer with more."


def _unpacked_size(path: Path) -> int:
    """Length of a gzip file's content; reading to the end is what makes gzip compare the checksum."""
    size = 0
    with gzip.open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            size += len(chunk)
    return size
