"""Data sets: manifests of public data, datalists, slices, folders that runs write to."""

from medconstraints.data.class_items import class_items
from medconstraints.data.cohort import CohortDataset, ItemDataset, cohort_items, in_order, inference_items
from medconstraints.data.datalist_sections import number_items, read_datalist, read_labelled
from medconstraints.data.guide_split import EpochSampler, GuideSplit
from medconstraints.data.inference_files import volumes_for_inference
from medconstraints.data.manifests import check_dataset, load_manifest, make_datalist
from medconstraints.data.missing import MissingData
from medconstraints.data.options import check_options
from medconstraints.data.output_folders import check_output_dir, check_run_dir, mask_path
from medconstraints.data.run_settings import (
    read_settings,
    run_fingerprint,
    run_settings,
    start_inference,
    start_run,
    trained,
    write_settings,
)
from medconstraints.data.semi_supervised import PairedDataset, semi_supervised_items
from medconstraints.data.slices import SliceDataset, VolumeBatchSampler
from medconstraints.data.weights_card import class_names_of

__all__ = [
    "CohortDataset",
    "EpochSampler",
    "GuideSplit",
    "ItemDataset",
    "MissingData",
    "PairedDataset",
    "SliceDataset",
    "VolumeBatchSampler",
    "check_dataset",
    "check_options",
    "check_output_dir",
    "check_run_dir",
    "class_items",
    "class_names_of",
    "cohort_items",
    "in_order",
    "inference_items",
    "load_manifest",
    "make_datalist",
    "mask_path",
    "number_items",
    "read_datalist",
    "read_labelled",
    "read_settings",
    "run_fingerprint",
    "run_settings",
    "semi_supervised_items",
    "start_inference",
    "start_run",
    "trained",
    "volumes_for_inference",
    "write_settings",
]
