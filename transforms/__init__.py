"""Transforms: from labels or box files to the targets of the losses; imported as `medconstraints.transforms`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from medconstraints.transforms.box_grid import BoxesToGridd, map_boxes
from medconstraints.transforms.boxes import LabelToBoxesd, label_to_boxes
from medconstraints.transforms.chains import boxes_from, inference_postprocessing, read_volumes
from medconstraints.transforms.check_volumes import CheckVolumesd, LoadVolumed, VolumeError
from medconstraints.transforms.collate import pad_boxes_collate
from medconstraints.transforms.crop_to_box import RandCropToBoxd
from medconstraints.transforms.load_boxes import LoadBoxesd
from medconstraints.transforms.save_mask import SaveMaskd, save_mask

if TYPE_CHECKING:
    from medconstraints.transforms.size_bounds import fit_size_bounds

__all__ = [
    "BoxesToGridd",
    "CheckVolumesd",
    "LabelToBoxesd",
    "LoadBoxesd",
    "LoadVolumed",
    "RandCropToBoxd",
    "SaveMaskd",
    "VolumeError",
    "boxes_from",
    "fit_size_bounds",
    "inference_postprocessing",
    "label_to_boxes",
    "map_boxes",
    "pad_boxes_collate",
    "read_volumes",
    "save_mask",
]


def __getattr__(name: str) -> Any:
    # Not imported above: `python -m medconstraints.transforms.size_bounds` would warn that the module is there already.
    if name == "fit_size_bounds":
        return import_module(f"{__name__}.size_bounds").fit_size_bounds
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
