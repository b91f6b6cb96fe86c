"""Transform chains that every bundle would otherwise repeat: reading and normalising volumes, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from monai.transforms import (
    Activationsd,
    AsDiscreted,
    Compose,
    CopyItemsd,
    EnsureTyped,
    Invertd,
    MapLabelValued,
    NormalizeIntensityd,
    Orientationd,
    Spacingd,
)

from medconstraints.checks import flag
from medconstraints.transforms.bounds import LabelToBoundsd
from medconstraints.transforms.boxes import LabelToBoxesd
from medconstraints.transforms.check_volumes import CheckVolumesd, LoadVolumed
from medconstraints.transforms.item_bounds import ItemToBoundsd
from medconstraints.transforms.load_boxes import LoadBoxesd
from medconstraints.transforms.save_mask import SaveMaskd
from medconstraints.transforms.weak_labels import ErodeLabeld, RandomPointLabeld, ScribbleToWeakLabeld

__all__ = ["bounds_from", "boxes_from", "inference_postprocessing", "read_volumes", "weak_labels_from"]


def read_volumes(
    *,
    num_classes: int,
    label_key: str | None = "label",
    other_label_keys: Sequence[str] = (),
    spacing_mm: Sequence[float] = (-1.0, -1.0, -1.0),
    axcodes: str = "RAS",
    spatial_dims: int = 3,
    nonzero: bool = False,
) -> list[Callable[..., Any]]:
    """Load, check, orient, resample and normalise the image, and the labels with it where an item has them.

    Args:
        num_classes: classes of the label with the background.
        label_key: key of the label; None when there never is one.
        other_label_keys: keys of further label maps on the same grid, such as scribbles; their values are not checked.
        spacing_mm: voxel spacing to resample to, one value per axis after orientation; -1 keeps an axis as it is.
        axcodes: orientation of volumes.
        spatial_dims: 3, or 2 for images, which keep their orientation.
        nonzero: normalise the voxels that are not 0 alone, for images whose background was set to 0.

    Returns:
        Transforms for `Compose`. Intensities get zero mean and unit variance in each channel of each volume.
    """
    labels = [*([label_key] if label_key is not None else []), *other_label_keys]
    keys = ["image", *labels]
    modes = ["bilinear", *["nearest"] * len(labels)]
    chain: list[Callable[..., Any]] = [
        LoadVolumed(keys, spatial_dims=spatial_dims, allow_missing_keys=True),
        CheckVolumesd("image", label_key, num_classes=num_classes, spatial_dims=spatial_dims),
    ]
    if spatial_dims == 3:
        chain.append(Orientationd(keys, axcodes=axcodes, labels=None, allow_missing_keys=True))
    if any(step > 0 for step in spacing_mm):
        chain.append(Spacingd(keys, pixdim=tuple(spacing_mm), mode=modes, allow_missing_keys=True))
    normalize = NormalizeIntensityd("image", nonzero=nonzero, channel_wise=True)
    return [*chain, normalize, EnsureTyped(keys, dtype=np.float32, allow_missing_keys=True)]


def boxes_from(
    source: str,
    *,
    slice_axis: int | None = None,
    mode: str = "class",
    margin_voxels: int = 0,
    jitter_voxels: int = 0,
    classes: dict[str, int] | None = None,
    num_classes: int | None = None,
) -> list[Callable[..., Any]]:
    """Where boxes come from: drawn around a label ("label"), or read from the item's box file ("files").

    Args:
        source: "label" or "files".
        slice_axis: see `LabelToBoxesd`; None for 3D boxes.
        mode: see `LabelToBoxesd`.
        margin_voxels: see `LabelToBoxesd`.
        jitter_voxels: see `LabelToBoxesd`.
        classes: class names in box files, see `LoadBoxesd`.
        num_classes: classes of the network with the background: box files with others are refused. Labels are not
            checked here, `read_volumes` does it.

    Raises:
        ValueError: an unknown source.
    """
    if source == "label":
        return [
            LabelToBoxesd(
                "label", slice_axis=slice_axis, mode=mode, margin_voxels=margin_voxels, jitter_voxels=jitter_voxels
            )
        ]
    if source == "files":
        return [LoadBoxesd("boxes", classes=classes, num_classes=num_classes)]
    raise ValueError(f'source: expected "label" (boxes drawn around labels) or "files" (box files), got {source!r}.')


def weak_labels_from(
    source: str,
    *,
    radius_voxels: int = 4,
    kernel_voxels: int = 10,
    slice_axis: int | None = None,
    background: bool = False,
    unlabelled: int = 4,
    num_classes: int | None = None,
    seed: int = 0,
) -> list[Callable[..., Any]]:
    """Where weak labels come from; they are written to "weak_label", -1 where nothing is annotated.

    Args:
        source: "points" or "erosion", made from the label; "scribble", the strokes in the item's file of that key;
            "label", the whole label, for full supervision.
        radius_voxels: of points, see `RandomPointLabeld`.
        kernel_voxels: of the erosion, see `ErodeLabeld`.
        slice_axis: None for one point or erosion of each class in the volume, an axis for one in every slice.
        background: a point on the background too; scribbles: use the strokes on the background.
        unlabelled: value of scribble files where nothing is drawn.
        num_classes: classes of the network with the background: scribbles of others are refused.
        seed: of the points.

    Raises:
        ValueError: an unknown source.
    """
    background = flag("background", background)
    if source == "points":
        return [
            RandomPointLabeld(
                radius_voxels=radius_voxels,
                slice_axis=slice_axis,
                background=background,
                seed=seed,
            )
        ]
    if source == "erosion":
        return [ErodeLabeld(kernel_voxels=kernel_voxels, slice_axis=slice_axis)]
    if source == "scribble":
        return [ScribbleToWeakLabeld(unlabelled=unlabelled, keep_background=background, num_classes=num_classes)]
    if source == "label":
        return [CopyItemsd("label", names="weak_label")]
    raise ValueError(f'source: expected "points", "erosion", "scribble" or "label", got {source!r}.')


def bounds_from(
    level: str,
    *,
    num_classes: int,
    source: str = "label",
    statistic: str = "size",
    bounds_key: str = "bounds",
    margin: float = 0.1,
    margin_voxels: float = 20,
    common_bounds: Any = None,
    whole_image: bool = True,
    units: str = "voxel",
) -> list[Callable[..., Any]]:
    """What is known of each object, as bounds of a statistic; put it after spatial augmentation.

    Args:
        level: "none" (no bounds, and no label is needed), "tags" (present or absent), "common" or "individual", see
            `LabelToBoundsd`.
        num_classes: classes of the network with the background.
        source: "label", or "items" for sizes in the datalist (`size_ml` or `size_bounds_ml`, see `ItemToBoundsd`).
        statistic: "size" or "centroid".
        bounds_key: key of the bounds.
        margin: of individual sizes, a share.
        margin_voxels: of centroids.
        common_bounds: for "common": bounds, or the path of the file `medconstraints.transforms.common_bounds` writes.
        whole_image: False when the network gets crops that may cut an object whose size is in the datalist: then only
            the upper bound holds.
        units: "voxel" or "mm"; with "mm" and source "label" the spacing is written to "spacing_mm".

    Raises:
        ValueError: an unknown level or source, or sizes in the datalist with another level than "individual" or "none".
    """
    if source == "label" or level == "none":
        return [
            LabelToBoundsd(
                bounds_key=bounds_key,
                num_classes=num_classes,
                statistic=statistic,
                level=level,
                margin=margin,
                margin_voxels=margin_voxels,
                common_bounds=common_bounds if level == "common" else None,
                units=units,
            )
        ]
    if source != "items":
        raise ValueError(f'source: expected "label" or "items" (sizes in the datalist), got {source!r}.')
    if level != "individual" or statistic != "size":
        raise ValueError(
            f'level: sizes in the datalist are "individual" ones, got {level!r} of the statistic {statistic!r}; use '
            'source "label" for the others.'
        )
    return [
        ItemToBoundsd(
            bounds_key=bounds_key,
            num_classes=num_classes,
            margin=margin,
            whole_image=flag("whole_image", whole_image),
            units=units,
        )
    ]


def inference_postprocessing(
    preprocessing: Compose, *, output_dir: str, postfix: str = "seg", class_values: Sequence[int] | None = None
) -> list[Callable[..., Any]]:
    """From logits to a mask in the geometry of the input file: shape, affine, codes and units are the input's.

    Args:
        preprocessing: the chain that made the network's input; it is inverted.
        output_dir: folder of the masks, `<name>_<postfix>.nii.gz`, uint8.
        postfix: see `output_dir`.
        class_values: value of each class in the mask, such as [0, 3] for a network of one organ whose number is 3 in
            the labels of the data set; None writes 0, 1, 2, ...
    """
    renumber = []
    if class_values is not None:
        renumber = [MapLabelValued("pred", orig_labels=range(len(class_values)), target_labels=class_values)]
    return [
        Activationsd("pred", softmax=True),
        # Probabilities, not classes, go through the inverse resampling: linear interpolation of a mask is ragged.
        Invertd("pred", transform=preprocessing, orig_keys="image", nearest_interp=False, to_tensor=True),
        AsDiscreted("pred", argmax=True),
        *renumber,
        SaveMaskd("pred", output_dir=output_dir, postfix=postfix),
    ]
