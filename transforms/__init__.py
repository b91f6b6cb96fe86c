"""Transforms: from labels or box files to the targets of the losses; imported as `medconstraints.transforms`."""

from medconstraints.transforms.augmentations import (
    affine_transforms,
    nnunet_transforms,
    placement_transforms,
    upstream_mixing,
    upstream_transforms,
)
from medconstraints.transforms.bounds import LabelToBoundsd, label_to_bounds, presence_bounds
from medconstraints.transforms.boxes import BoxesToGridd, LabelToBoxesd
from medconstraints.transforms.chains import (
    bounds_transforms,
    box_transforms,
    class_transforms,
    mask_transforms,
    reading_transforms,
    weak_label_transforms,
)
from medconstraints.transforms.check_volumes import CheckVolumesd
from medconstraints.transforms.collate import pad_boxes_collate
from medconstraints.transforms.common_bounds import fit_common_bounds, load_common_bounds, save_common_bounds
from medconstraints.transforms.crop_to_box import RandCropToBoxd
from medconstraints.transforms.dense_crf import DenseCRFd
from medconstraints.transforms.distance import DecodeDistanceMapd, SignedDistanceMapd
from medconstraints.transforms.filled_boxes import FilledBoxesd, fill_boxes
from medconstraints.transforms.inverted_classes import InvertedClassesd
from medconstraints.transforms.item_bounds import ItemToBoundsd
from medconstraints.transforms.learned_augment import LearnedAugmentd
from medconstraints.transforms.load_boxes import LoadBoxesd
from medconstraints.transforms.load_points import LoadPointsd
from medconstraints.transforms.load_volume import LoadVolumed
from medconstraints.transforms.patches import intensity_transforms, patch_transforms
from medconstraints.transforms.random_ops import RandAugmentd, TrivialAugmentd
from medconstraints.transforms.save_mask import SaveMaskd
from medconstraints.transforms.semi_supervised import (
    HybridLabeld,
    PredictedBoundsd,
    semi_supervised_transforms,
    statistic_transforms,
)
from medconstraints.transforms.weak_label_rules import Erosion, Points, Scribble
from medconstraints.transforms.weak_labels import WeakLabeld
from medconstraints.volumes import VolumeError

__all__ = [
    "BoxesToGridd",
    "CheckVolumesd",
    "DecodeDistanceMapd",
    "DenseCRFd",
    "Erosion",
    "FilledBoxesd",
    "HybridLabeld",
    "InvertedClassesd",
    "ItemToBoundsd",
    "LabelToBoundsd",
    "LabelToBoxesd",
    "LearnedAugmentd",
    "LoadBoxesd",
    "LoadPointsd",
    "LoadVolumed",
    "Points",
    "PredictedBoundsd",
    "RandAugmentd",
    "RandCropToBoxd",
    "SaveMaskd",
    "Scribble",
    "SignedDistanceMapd",
    "TrivialAugmentd",
    "VolumeError",
    "WeakLabeld",
    "affine_transforms",
    "bounds_transforms",
    "box_transforms",
    "class_transforms",
    "fill_boxes",
    "fit_common_bounds",
    "intensity_transforms",
    "label_to_bounds",
    "load_common_bounds",
    "mask_transforms",
    "nnunet_transforms",
    "pad_boxes_collate",
    "patch_transforms",
    "placement_transforms",
    "presence_bounds",
    "reading_transforms",
    "save_common_bounds",
    "semi_supervised_transforms",
    "statistic_transforms",
    "upstream_mixing",
    "upstream_transforms",
    "weak_label_transforms",
]
