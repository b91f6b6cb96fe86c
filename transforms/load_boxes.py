"""Boxes from a file, in the voxels of the image they were drawn on."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from medconstraints import checks
from medconstraints.boxes.files import MAX_LOOSENESS, read_boxes

__all__ = ["LoadBoxesd"]


class LoadBoxesd(MapTransform):
    """Replace the path of a box file by its boxes, in the voxels of the loaded image.

    Reads `keys`, the path of a JSON, CSV or 3D Slicer file (see `medconstraints.boxes.files`), and the image at
    `image_key`, a MetaTensor (C, *S). Writes `keys`, (N, 1 + 2 D) int64 rows
    [class, start_1..start_D, stop_1..stop_D], half-open, N = 0 for a file without boxes, and `key + "_affine"`, the
    (4, 4) float64 affine of the grid these numbers belong to. Put it after loading, orientation and resampling, before
    any crop, and finish with `BoxesToGridd`.

    Millimetre boxes go straight into the image's present grid. "voxel" boxes refer to the image as it is stored; they
    follow it into its present orientation exactly, and after a resampling to the nearest voxel edge. A CSV file with a
    column `image` is searched for the image's file name, and for as many of its folders as the rows give.

    Args:
        keys: keys of the box files.
        image_key: key of the image.
        classes: class name -> number, see `read_boxes`.
        num_classes: classes of the network with the background; files with boxes of other classes are refused.
        max_looseness: of turned millimetre boxes, see `read_boxes`.
        allow_missing_keys: leave items without a box file as they are.

    Raises:
        BoxFileError: a `ValueError`; rows that cannot be used, with row and reason.
        FileNotFoundError: no such file.
        TypeError: the value is no path, or the image is not loaded.
        ValueError: the image was moved since loading, and nothing tells from which grid.

    Example:
        >>> import numpy as np, tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "case.csv"
        >>> _ = path.write_text("class,x_min,y_min,x_max,y_max" + chr(10) + "1,0,2,3,4")
        >>> image = MetaTensor(torch.zeros(1, 8, 8), affine=torch.eye(4))
        >>> LoadBoxesd()({"image": image, "boxes": path})["boxes"].tolist()
        [[1, 0, 2, 3, 4]]
    """

    def __init__(
        self,
        keys: KeysCollection = "boxes",
        image_key: str = "image",
        *,
        classes: Mapping[str, int] | None = None,
        num_classes: int | None = None,
        max_looseness: float = MAX_LOOSENESS,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.max_looseness = max_looseness
        self.image_key = image_key
        self.classes = dict(classes) if classes else None
        self.num_classes = num_classes

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Read the boxes into a copy of `data`."""
        item = dict(data)
        if not self.allow_missing_keys and (missing := [key for key in self.keys if key not in item]):
            name = checks.label_name(item.get(self.image_key), self.image_key)
            raise KeyError(f"{missing[0]}: the item of {name} has none; add its box file to the datalist.")
        for key in self.key_iterator(item):
            paths, image = _files(item[key], key), item[self.image_key]
            if not isinstance(image, MetaTensor):
                raise TypeError(
                    f"{self.image_key}: expected a loaded image (MetaTensor), got {type(image).__name__}; put "
                    "LoadBoxesd after LoadImaged or LoadVolumed."
                )
            stored_affine, stored_shape = _stored_grid(image, self.image_key)
            name = image.meta.get("filename_or_obj")
            how = {
                "affine": image.affine,
                "shape": image.shape[1:],
                "classes": self.classes,
                "num_classes": self.num_classes,
                "image": os.path.abspath(name) if name else None,  # rows may name folders above the current one
                "stored_affine": stored_affine,
                "stored_shape": stored_shape,
                "max_looseness": self.max_looseness,
                "doubt": _doubt(image),
            }
            item[key] = torch.cat([read_boxes(path, **how) for path in paths])
            item[f"{key}_affine"] = torch.as_tensor(image.affine, dtype=torch.float64).cpu().clone()
        return item


def _files(value: Any, key: Hashable) -> list[Path]:
    """Paths of box files: of one, of several, or of a folder that has any."""
    given = value if isinstance(value, list | tuple) else [value]
    if not given or not all(isinstance(path, str | PathLike) for path in given):
        raise TypeError(
            f"{key}: expected the path of a box file or folder, or a list of such, got {type(value).__name__}; load "
            "boxes once only."
        )
    files = []
    for path in map(Path, given):
        found = [path]
        if path.is_dir():
            there = (file for file in path.iterdir() if not file.name.startswith("."))
            found = sorted(file for file in there if file.suffix.lower() in (".json", ".csv"))
        if not found:
            raise FileNotFoundError(f"{key}: no .json or .csv file in the folder {path.name}.")
        files += found
    return files


def _doubt(image: MetaTensor) -> str:
    if not image.meta.get("forms_differ"):
        return ""
    return f"{image.meta['geometry_notes']}; set form to sform or qform"


def _stored_grid(image: MetaTensor, image_key: str) -> tuple[np.ndarray, tuple[int, ...]]:
    """Affine and shape of the array in the image's file."""
    dims = image.ndim - 1
    affine, shape = image.meta.get("original_affine"), image.meta.get("spatial_shape")
    if affine is None or shape is None:
        # PNG and the like, and images made in memory: MONAI keeps no stored affine.
        if image.applied_operations:
            raise ValueError(
                f"{image_key}: expected original_affine and spatial_shape in its meta data, because it was transformed "
                "after loading, got none; put LoadBoxesd right after the loading transform."
            )
        return np.asarray(image.affine.cpu()), tuple(image.shape[1:])
    affine, sizes = np.asarray(affine, dtype=np.float64), [int(size) for size in np.asarray(shape)]
    if len(sizes) != dims:
        raise ValueError(
            f"{image_key}: expected an image of the {len(sizes)} axes of its file, got {dims} spatial axes; put "
            "LoadBoxesd before axes are added or removed."
        )
    if image.meta.get("as_closest_canonical"):
        # NibabelReader(as_closest_canonical=True) keeps the file's affine beside the shape of the re-ordered array.
        sizes = [sizes[int(axis)] for axis in nib.io_orientation(affine)[:dims, 0]]
    return affine, tuple(sizes)
