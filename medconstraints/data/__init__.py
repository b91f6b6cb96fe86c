"""Data sets: synthetic cohorts, manifests of public data, datalists."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from medconstraints.data.box_files import BoxFileError, read_boxes, write_boxes

if TYPE_CHECKING:
    from medconstraints.data.datalist_sections import read_datalist, read_labelled
    from medconstraints.data.datalists import make_datalist
    from medconstraints.data.discs import make_disc, make_discs
    from medconstraints.data.inference_files import volumes_for_inference
    from medconstraints.data.manifests import check_dataset, load_manifest
    from medconstraints.data.output_folders import check_output_dir, check_run_dir, mask_path
    from medconstraints.data.phantoms import make_cohort, make_phantom
    from medconstraints.data.slices import SliceDataset, VolumeBatchSampler
    from medconstraints.data.supervision import number_items

__all__ = [
    "BoxFileError",
    "SliceDataset",
    "VolumeBatchSampler",
    "check_dataset",
    "check_output_dir",
    "check_run_dir",
    "load_manifest",
    "make_cohort",
    "make_datalist",
    "make_disc",
    "make_discs",
    "make_phantom",
    "mask_path",
    "number_items",
    "read_boxes",
    "read_datalist",
    "read_labelled",
    "volumes_for_inference",
    "write_boxes",
]

_MODULES = {
    "SliceDataset": "slices",
    "VolumeBatchSampler": "slices",
    "check_dataset": "manifests",
    "check_output_dir": "output_folders",
    "check_run_dir": "output_folders",
    "load_manifest": "manifests",
    "make_cohort": "phantoms",
    "make_datalist": "datalists",
    "make_disc": "discs",
    "make_discs": "discs",
    "make_phantom": "phantoms",
    "mask_path": "output_folders",
    "number_items": "supervision",
    "read_datalist": "datalist_sections",
    "read_labelled": "datalist_sections",
    "volumes_for_inference": "inference_files",
}


def __getattr__(name: str) -> Any:
    # Not imported above: `python -m medconstraints.data.phantoms` would warn that the module is there already.
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
