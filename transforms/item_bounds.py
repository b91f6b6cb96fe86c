"""Bounds on sizes that are known without a label, from the entries of a datalist."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from medconstraints import checks
from medconstraints.transforms.bounds import UNITS, free_bounds

__all__ = ["ItemToBoundsd"]

MM3_PER_ML = 1000.0


class ItemToBoundsd(MapTransform):
    """Bounds on sizes that are known without a label, for instance from a report, in millilitres.

    Reads from the item `keys`, the size of each class in ml, and `range_key`, the smallest and largest size in ml: a
    mapping from class number to value, such as {"1": 3.2} or {"1": [2.9, 3.5]}, or a list with one value, or null, per
    foreground class. A class that neither names is unknown: free, as the background is. A size of 0 says that the class
    is absent. Writes `bounds_key`, (C, 1, 2) float32, and removes `keys` and `range_key` from the item, because
    mappings with different classes cannot be collated.

    Voxels are counted with the volume that one has in the image's affine at this place in the chain: put it after
    resampling and spatial augmentation. Only the lower bounds need the whole object: where the network gets a crop, set
    `whole_image=False`.

    Args:
        keys: key of the sizes.
        bounds_key: key of the bounds.
        num_classes: classes of the network with the background, C.
        range_key: key of the smallest and largest sizes.
        margin: of the sizes at `keys`, a share: size * (1 - margin) to size * (1 + margin). Ranges are taken as they
            are.
        units: "voxel" for bounds in voxels, "mm" for mm^3.
        image_key: key of the image, a 3D MetaTensor (C, *S).
        whole_image: False when the image was cropped after loading: of an object that may be cut only the upper bounds
            hold, and the lower ones become free.
        full_key: an item whose value here is true gets free bounds.
        allow_missing_keys: give items with neither key free bounds (all items of a batch need bounds).

    Raises:
        ValueError: an argument is outside its range, a size is no number >= 0, a class is unknown or has a size and a
            range, or the image is not 3D or no MetaTensor, which alone knows the volume of a voxel; the message names
            the image's file.
        KeyError: neither key is there.

    Example:
        >>> from monai.data import MetaTensor
        >>> item = {"image": MetaTensor(torch.zeros(1, 8, 8, 8), affine=torch.eye(4) * 5), "size_ml": {"1": 4.0}}
        >>> ItemToBoundsd(num_classes=3, margin=0.25)(item)["bounds"].tolist()
        [[[-inf, inf]], [[24.0, 40.0]], [[-inf, inf]]]
    """

    def __init__(
        self,
        keys: KeysCollection = "size_ml",
        bounds_key: str = "bounds",
        *,
        num_classes: int,
        range_key: str = "size_bounds_ml",
        margin: float = 0.1,
        units: str = "voxel",
        image_key: str = "image",
        whole_image: bool = True,
        full_key: str = "fully_labelled",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.key = checks.one_key(keys)
        self.bounds_key = bounds_key
        self.num_classes = checks.whole_number("num_classes", num_classes, 2)
        self.range_key = range_key
        self.margin = checks.number("margin", margin, least=0)
        self.units = checks.choice("units", units, UNITS)
        self.image_key = image_key
        self.whole_image = checks.flag("whole_image", whole_image)
        self.full_key = full_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the bounds to a copy of `data`."""
        item = dict(data)
        full = checks.fully_labelled(item, self.full_key)
        if self.key not in item and self.range_key not in item and not (full or self.allow_missing_keys):
            raise KeyError(
                f"{self.key}: expected sizes in ml under this key or {self.range_key!r}, got "
                f"{sorted(map(str, item))}; add them to the datalist, or set allow_missing_keys=True for free bounds."
            )
        image: Any = item.get(self.image_key)
        name = checks.label_name(image, self.image_key)
        known = self._bounds_ml(item.pop(self.key, None), item.pop(self.range_key, None), name)
        bounds = free_bounds(self.num_classes, 1)
        if known and not full:
            spacing = checks.affine_spacing(image, name)
            if len(spacing) != 3:
                raise ValueError(
                    f"{name}: expected a 3D image (C, *S) for sizes in ml, got shape {tuple(image.shape)}; a slice has "
                    "an area: use LabelToBoundsd, or bounds of the volume on all of its slices together."
                )
            scale = MM3_PER_ML / (1.0 if self.units == "mm" else math.prod(spacing))
            for cls, (low, high) in known.items():
                bounds[cls, 0] = torch.tensor([low * scale if self.whole_image else -math.inf, high * scale])
        item[self.bounds_key] = bounds
        return item

    def _bounds_ml(self, sizes: Any, ranges: Any, name: str) -> dict[int, tuple[float, float]]:
        """Smallest and largest size of the classes that have one."""
        sizes = _by_class(sizes, self.num_classes, f"{name}: {self.key}")
        ranges = _by_class(ranges, self.num_classes, f"{name}: {self.range_key}")
        if both := sorted(set(sizes) & set(ranges)):
            raise ValueError(
                f"{name}: {self.key} and {self.range_key}: expected a size or a range for class {both[0]}, got both; "
                "remove one."
            )
        bounds = {}
        for cls, size in sizes.items():
            size = checks.number(f"{name}: {self.key} of class {cls} in ml", size, least=0)
            bounds[cls] = (max(size * (1 - self.margin), 0.0), size * (1 + self.margin))
        for cls, pair in ranges.items():
            what = f"{name}: {self.range_key} of class {cls} in ml"
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise ValueError(f"{what}: expected [smallest, largest], got {pair!r}.")
            low = checks.number(what, pair[0], least=0)
            bounds[cls] = (low, checks.number(what, pair[1], least=low))
        return bounds


def _by_class(value: Any, num_classes: int, name: str) -> dict[int, Any]:
    """Class number -> value of the classes that have one."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        known = {str(cls): cls for cls in range(1, num_classes)}
        unknown = [key for key in value if str(key) not in known]
        if unknown:
            raise ValueError(f"{name}: expected the class numbers 1 to {num_classes - 1}, got {unknown}.")
        return {known[str(key)]: entry for key, entry in value.items() if entry is not None}
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != num_classes - 1:
        raise ValueError(
            f"{name}: expected a mapping from class number to value, or a list with one value per foreground class "
            f"({num_classes - 1}), got {value!r}."
        )
    return {cls: entry for cls, entry in enumerate(value, start=1) if entry is not None}
