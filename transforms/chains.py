"""Chains that every bundle would otherwise repeat: functions that return lists of transforms for `Compose`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import (
    Activationsd,
    Compose,
    CopyItemsd,
    EnsureTyped,
    Lambdad,
    LoadImage,
    MapLabelValued,
    MapTransform,
    NormalizeIntensityd,
    Orientationd,
    Spacingd,
)
from torch import Tensor

from medconstraints import checks
from medconstraints.boxes.files import MAX_LOOSENESS
from medconstraints.statistics import soft_size
from medconstraints.transforms.bounds import LEVELS, LabelToBoundsd
from medconstraints.transforms.boxes import LabelToBoxesd
from medconstraints.transforms.check_volumes import CheckVolumesd
from medconstraints.transforms.dense_crf import DenseCRFd
from medconstraints.transforms.inverted_classes import InvertedClassesd
from medconstraints.transforms.item_bounds import ItemToBoundsd
from medconstraints.transforms.load_boxes import LoadBoxesd
from medconstraints.transforms.load_points import LoadPointsd
from medconstraints.transforms.load_volume import LoadVolumed
from medconstraints.transforms.save_mask import SaveMaskd
from medconstraints.transforms.weak_label_rules import Erosion, Points, Scribble
from medconstraints.transforms.weak_labels import WeakLabeld

__all__ = [
    "bounds_transforms",
    "box_transforms",
    "class_transforms",
    "mask_transforms",
    "reading_transforms",
    "weak_label_transforms",
]

Chain = list[Callable[..., Any]]


def reading_transforms(
    *,
    num_classes: int,
    label_key: str | None = "label",
    other_label_keys: Sequence[str] = (),
    spacing_mm: Sequence[float] | None = None,
    axcodes: str = "RAS",
    spatial_dims: int = 3,
    allow_channels: bool = False,
    nonzero: bool = False,
    form: str = "best",
    series: str | None = None,
    nan_value: float | None = None,
    label_values: Sequence[int] | None = None,
) -> Chain:
    """Load, check, orient, resample and normalise the image, and the labels with it where an item has them.

    Intensities get zero mean and unit variance in each channel of each volume.

    Args:
        num_classes: classes of the label with the background.
        label_key: key of the label; None when there never is one.
        other_label_keys: keys of further label maps on the same grid, such as scribbles; their values are not checked.
        spacing_mm: voxel spacing to resample to, one value per axis after orientation; -1 keeps an axis, None all.
        axcodes: orientation of volumes.
        spatial_dims: 3, or 2 for images, which keep their orientation.
        allow_channels: accept channels as a further axis of the image's file, such as RGB, see `LoadVolumed`.
        nonzero: normalise the voxels that are not 0 alone, for images whose background was set to 0.
        form: which form of a NIfTI header counts where they differ, see `LoadVolumed`; of images and labels.
        series: series instance UID, for DICOM folders of several series.
        nan_value: what replaces NaN voxels of images, such as those outside the field of view; None refuses them.
        label_values: values of the classes in the label's file, such as [0, 255], where these are not 0, 1, 2, ...
    """
    labels = [*([label_key] if label_key is not None else []), *other_label_keys]
    keys = ["image", *labels]
    modes = ["bilinear", *["nearest"] * len(labels)]
    chain: Chain = [
        LoadVolumed("image", spatial_dims=spatial_dims, allow_channels=allow_channels, form=form, series=series),
        *([LoadVolumed(labels, spatial_dims=spatial_dims, allow_missing_keys=True, form=form)] if labels else []),
        *([] if nan_value is None else [_Applied("image", partial(_without_nan, value=float(nan_value)))]),
        *([] if label_values is None else [_renumbered(label_key, label_values)]),
        CheckVolumesd("image", label_key, num_classes=num_classes, spatial_dims=spatial_dims),
        _Applied("image", partial(_shifted, nonzero=checks.flag("nonzero", nonzero))),
    ]
    if spatial_dims == 3:
        chain.append(Orientationd(keys, axcodes=axcodes, labels=None, allow_missing_keys=True))
    if spacing_mm is not None and any(step > 0 for step in spacing_mm):
        # Half of the memory for images; labels are read at the nearest voxel, where rounding may decide.
        dtypes = [np.float32, *[np.float64] * len(labels)]
        chain.append(Spacingd(keys, pixdim=tuple(spacing_mm), mode=modes, dtype=dtypes, allow_missing_keys=True))
    normalize = NormalizeIntensityd("image", nonzero=nonzero, channel_wise=True)
    return [*chain, normalize, EnsureTyped(keys, dtype=np.float32, allow_missing_keys=True)]


class _Applied(MapTransform):
    """A function of intensities that leaves no trace: MONAI's `Lambdad` would have to be inverted."""

    def __init__(self, keys: str, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__(keys)
        self.function = function

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return {**data, **{key: self.function(data[key]) for key in self.key_iterator(dict(data))}}


def _renumbered(label_key: str | None, values: Sequence[int]) -> MapLabelValued:
    if label_key is None or len({*values}) != len(values):
        raise ValueError(f"label_values: expected one value for each class of a label, got {list(values)}.")
    return MapLabelValued(label_key, orig_labels=values, target_labels=range(len(values)), allow_missing_keys=True)


def _without_nan(image: Tensor, *, value: float) -> Tensor:
    return torch.where(image.isnan(), value, image)  # infinity stays, and is refused


def _shifted(image: Tensor, *, nonzero: bool) -> Tensor:
    """A float64 image as float32, less its mean: normalisation takes that away in any case, and contrast stays."""
    if image.dtype != torch.float64:
        return image
    used = image != 0 if nonzero else torch.ones_like(image, dtype=torch.bool)
    return torch.where(used, image - image[used].mean(), 0.0).float()


def class_transforms(*, mean: float | None = None, std: float | None = None) -> Chain:
    """Load the image of a classification (see `class_items`) as (1, *S), or (C, *S) from a file, and normalise it.

    Args:
        mean: intensity that becomes 0, that of the training set; None normalises each image by its own.
        std: intensities that become 1, of the training set too; None as above.

    Raises:
        ValueError: one of the two alone.
    """
    if (mean is None) != (std is None):
        raise ValueError(f"mean, std: expected both or none, got {mean!r} and {std!r}.")
    return [
        Lambdad("image", _class_image),
        NormalizeIntensityd("image", subtrahend=mean, divisor=std, channel_wise=mean is None),
        EnsureTyped("image", dtype=np.float32),
    ]


def _class_image(image: Any) -> Any:
    """A file by MONAI's readers, channels first; an array (*S) as it is, with one channel."""
    if isinstance(image, str | Path):
        return LoadImage(image_only=True, ensure_channel_first=True)(image)
    return np.asarray(image, dtype=np.float32)[None]


def box_transforms(
    source: str,
    *,
    slice_axis: int | None = None,
    mode: str = "class",
    margin_voxels: int = 0,
    jitter_voxels: int = 0,
    classes: dict[str, int] | None = None,
    num_classes: int | None = None,
    max_looseness: float = MAX_LOOSENESS,
) -> Chain:
    """Where boxes come from: "label", drawn around the label by `LabelToBoxesd`, or "files", the item's box file.

    `slice_axis`, `mode`, `margin_voxels` and `jitter_voxels` are those of `LabelToBoxesd`; `classes`, `num_classes` and
    `max_looseness` those of `LoadBoxesd`.
    """
    if checks.choice("source", source, ("label", "files")) == "files":
        return [LoadBoxesd("boxes", classes=classes, num_classes=num_classes, max_looseness=max_looseness)]
    return [
        LabelToBoxesd(
            "label", slice_axis=slice_axis, mode=mode, margin_voxels=margin_voxels, jitter_voxels=jitter_voxels
        )
    ]


def weak_label_transforms(
    source: str,
    *,
    radius_voxels: int = 4,
    kernel_voxels: int = 10,
    slice_axis: int | None = None,
    background: bool = False,
    unlabelled: int = 4,
    num_classes: int | None = None,
    classes: Mapping[str, int] | None = None,
    seed: int = 0,
) -> Chain:
    """Where weak labels come from; they are written to "weak_label", -1 where nothing is annotated.

    Args:
        source: "points" or "erosion", made from the label; "scribble", the strokes in the item's file of that key;
            "point_files", 3D Slicer's point list in the item's file "points"; "label", the whole label, for full
            supervision.
        radius_voxels: of `Points` and `LoadPointsd`.
        kernel_voxels: of `Erosion`.
        slice_axis: of `Points` and `Erosion`.
        background: of `Points` and `Scribble`.
        unlabelled: of `Scribble`.
        num_classes: of `Scribble` and `LoadPointsd`: other classes are refused.
        classes: of `LoadPointsd`.
        seed: of `Points`.
    """
    if checks.choice("source", source, ("points", "erosion", "scribble", "point_files", "label")) == "label":
        return [CopyItemsd("label", names="weak_label")]
    if source == "point_files":
        load = LoadPointsd("points", radius_voxels=radius_voxels, classes=classes, num_classes=num_classes)
        return [load, WeakLabeld("points", rule=_as_it_is)]
    if source == "scribble":
        rule = Scribble(unlabelled=unlabelled, background=background, num_classes=num_classes)
        return [WeakLabeld("scribble", rule=rule)]
    if source == "erosion":
        return [WeakLabeld("label", rule=Erosion(kernel_voxels, slice_axis))]
    return [WeakLabeld("label", rule=Points(radius_voxels, slice_axis, background, seed))]


def _as_it_is(annotated: Any, ignore_index: int) -> np.ndarray:
    return checks.label_array(annotated, ignore_index=ignore_index)


def bounds_transforms(
    level: str,
    *,
    num_classes: int,
    source: str = "label",
    statistic: Callable[..., Tensor] = soft_size,
    bounds_key: str = "bounds",
    margin: float | Sequence[float] | None = None,
    relative_margin: float | Sequence[float] | None = None,
    common_bounds: Any = None,
    whole_image: bool = True,
    units: str = "voxel",
) -> Chain:
    """What is known of each object, as bounds of a statistic; put it after spatial augmentation.

    Args:
        level: "individual", "common", "tags", or "none" (no label is needed), see `LabelToBoundsd`.
        num_classes: classes of the network with the background.
        source: "label", or "items" for individual sizes in the datalist, see `ItemToBoundsd`.
        statistic: of `LabelToBoundsd`.
        bounds_key: key of the bounds.
        margin: of `LabelToBoundsd`, in the statistic's unit.
        relative_margin: of `LabelToBoundsd` and `ItemToBoundsd`, a share; 0.1 when no margin is given.
        common_bounds: for "common": bounds, or the path of their .json file.
        whole_image: of `ItemToBoundsd`: False when the network gets crops that may cut an object.
        units: of both.
    """
    if checks.choice("source", source, ("label", "items")) == "label" or level == "none":
        checks.choice("level", level, (*LEVELS, "common"))
        if level == "common" and common_bounds is None:
            raise ValueError('common_bounds: expected bounds, or the path of their file, for level "common", got None.')
        return [
            LabelToBoundsd(
                bounds_key=bounds_key,
                num_classes=num_classes,
                statistic=statistic,
                level=common_bounds if level == "common" else level,
                margin=margin,
                relative_margin=relative_margin,
                units=units,
            )
        ]
    if level != "individual" or statistic is not soft_size or margin is not None:
        raise ValueError(
            f"level: sizes in the datalist are individual ones with a relative_margin, got level {level!r}, statistic "
            f'{statistic} and margin {margin!r}; use source "label" for others.'
        )
    share: Any = 0.1 if relative_margin is None else relative_margin
    return [
        ItemToBoundsd(
            bounds_key=bounds_key, num_classes=num_classes, margin=share, whole_image=whole_image, units=units
        )
    ]


def mask_transforms(
    preprocessing: Compose,
    *,
    output_dir: str | Path,
    postfix: str = "seg",
    class_values: Sequence[int] | None = None,
    num_classes: int | None = None,
    class_names: Mapping[str, str] | None = None,
    dense_crf: bool = False,
    probabilities: bool = False,
    dicom_seg: bool = False,
    series: str | None = None,
    made_by: str = "",
) -> Chain:
    """From logits to a mask in the geometry of the input file: shape, affine, codes and units are the input's.

    Args:
        preprocessing: the chain that made the network's input; it is inverted.
        output_dir: folder of the masks, `<name>_<postfix>`, uint8, see `SaveMaskd`.
        postfix: see `output_dir`; of items without a "mask".
        class_values: value of each class in the mask, such as [0, 3] for a network of one organ whose number is 3 in
            the labels of the data set; None writes 0, 1, 2, ...
        num_classes: of the network with the background: a class that is not found is told as empty. None tells of those
            that are there.
        class_names: value in the mask, as a text -> name of its class in reports.
        dense_crf: let the probabilities follow the image, see `DenseCRFd`.
        probabilities: write those of all classes beside the mask, see `save_probabilities`.
        dicom_seg: see `SaveMaskd`, as for the next two.
        series: as above.
        made_by: as above.
    """
    values = class_values if num_classes is None else class_values or range(num_classes)
    names = {int(value): str(name) for value, name in (class_names or {}).items()}
    classes = None if values is None else {value: names.get(value, str(value)) for value in values[1:]}
    renumber = []
    if class_values is not None:
        renumber = [MapLabelValued("pred", orig_labels=range(len(class_values)), target_labels=class_values)]
    return [
        *([Activationsd("pred", softmax=True), DenseCRFd("pred")] if checks.flag("dense_crf", dense_crf) else []),
        InvertedClassesd(
            "pred",
            preprocessing=preprocessing,
            softmax=not dense_crf,
            probabilities=checks.flag("probabilities", probabilities),
        ),
        *renumber,
        SaveMaskd(
            "pred",
            output_dir=output_dir,
            postfix=postfix,
            classes=classes,
            made_by=made_by,
            dicom_seg=dicom_seg,
            series=series,
        ),
    ]
