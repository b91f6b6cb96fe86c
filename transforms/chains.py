"""Transform chains that every bundle would otherwise repeat: reading and normalising volumes, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from monai.transforms import (
    Activationsd,
    AsDiscreted,
    Compose,
    EnsureTyped,
    Invertd,
    NormalizeIntensityd,
    Orientationd,
    Spacingd,
)

from medconstraints.transforms.boxes import LabelToBoxesd
from medconstraints.transforms.check_volumes import CheckVolumesd, LoadVolumed
from medconstraints.transforms.load_boxes import LoadBoxesd
from medconstraints.transforms.save_mask import SaveMaskd

__all__ = ["boxes_from", "inference_postprocessing", "read_volumes"]


def read_volumes(
    *,
    num_classes: int,
    label_key: str | None = "label",
    spacing_mm: Sequence[float] = (-1.0, -1.0, -1.0),
    axcodes: str = "RAS",
) -> list[Callable[..., Any]]:
    """Load, check, orient, resample and normalise the image, and the label with it where an item has one.

    Args:
        num_classes: classes of the label with the background.
        label_key: key of the label; None when there never is one.
        spacing_mm: voxel spacing to resample to, one value per axis after orientation; -1 keeps an axis as it is.
        axcodes: orientation.

    Returns:
        Transforms for `Compose`. Intensities get zero mean and unit variance in each volume.
    """
    keys = ["image"] if label_key is None else ["image", label_key]
    modes = ["bilinear", "nearest"][: len(keys)]
    chain: list[Callable[..., Any]] = [
        LoadVolumed(keys, allow_missing_keys=True),
        CheckVolumesd("image", label_key, num_classes=num_classes),
        Orientationd(keys, axcodes=axcodes, labels=None, allow_missing_keys=True),
    ]
    if any(step > 0 for step in spacing_mm):
        chain.append(Spacingd(keys, pixdim=tuple(spacing_mm), mode=modes, allow_missing_keys=True))
    return [*chain, NormalizeIntensityd("image"), EnsureTyped(keys, dtype=np.float32, allow_missing_keys=True)]


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


def inference_postprocessing(
    preprocessing: Compose, *, output_dir: str, postfix: str = "seg"
) -> list[Callable[..., Any]]:
    """From logits to a mask in the geometry of the input file: shape, affine, codes and units are the input's.

    Args:
        preprocessing: the chain that made the network's input; it is inverted.
        output_dir: folder of the masks, `<name>_<postfix>.nii.gz`, uint8.
        postfix: see `output_dir`.
    """
    return [
        Activationsd("pred", softmax=True),
        # Probabilities, not classes, go through the inverse resampling: linear interpolation of a mask is ragged.
        Invertd("pred", transform=preprocessing, orig_keys="image", nearest_interp=False, to_tensor=True),
        AsDiscreted("pred", argmax=True),
        SaveMaskd("pred", output_dir=output_dir, postfix=postfix),
    ]
