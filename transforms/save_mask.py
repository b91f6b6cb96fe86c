"""Save a mask, and what can be said of it, beside those of other volumes."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from medconstraints import checks
from medconstraints.data.output_folders import mask_path
from medconstraints.data.training_cohort import intensities_of
from medconstraints.volumes.dicom import is_dicom_volume
from medconstraints.volumes.dicom_seg import dicom_seg_path, require_highdicom, save_dicom_seg
from medconstraints.volumes.errors import VolumeError
from medconstraints.volumes.facts import facts_path, mask_facts
from medconstraints.volumes.grids import grid_of
from medconstraints.volumes.masks import probabilities_path, save_mask, save_probabilities
from medconstraints.writing import set_aside, write_text

__all__ = ["SaveMaskd"]


class SaveMaskd(MapTransform):
    """Save masks as `<output_dir>/<name>_<postfix>`, see `save_mask` and `mask_facts`; existing files are replaced.

    What lay beside a mask that is replaced, its probabilities and its DICOM Segmentation, is renamed to `.old`.

    An item of `volumes_for_inference` says under "mask" where its mask belongs. Beside each mask a JSON file of its
    name tells what it holds; and probabilities, where an item has them, see `save_probabilities`.

    Args:
        keys: masks (1, X, Y, Z) with class numbers, in the voxel order of their file, which their meta data name as
            `filename_or_obj`.
        output_dir: folder of the masks; it is made when missing.
        postfix: of items without "mask", see `mask_path`.
        classes: value in the mask -> name of each class, for the JSON file; None takes the values that are there.
        made_by: fingerprint of the run, for the JSON file, see `run_fingerprint`.
        dicom_seg: write masks of DICOM images as DICOM Segmentation too, see `save_dicom_seg`; where a series does not
            let one, the JSON file says so.
        series: series instance UID, of DICOM folders of several.

    Raises:
        ValueError: at the call, for a mask without file name, with several channels, or that does not fit its file.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        *,
        output_dir: str | Path,
        postfix: str = "seg",
        classes: Mapping[int, str] | None = None,
        made_by: str = "",
        dicom_seg: bool = False,
        series: str | None = None,
    ) -> None:
        super().__init__(keys)
        self.output_dir = Path(output_dir)
        self.postfix = postfix
        self.classes = classes
        self.made_by = made_by
        self.dicom_seg = checks.flag("dicom_seg", dicom_seg)
        self.series = series
        if dicom_seg:
            require_highdicom()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Save, and return the item as it is."""
        for key in self.key_iterator(dict(data)):
            mask = data[key]
            file = mask.meta.get("filename_or_obj") if isinstance(mask, MetaTensor) else None
            if not file:
                raise ValueError(f"{key}: no filename_or_obj in its meta data; load the image with LoadVolumed.")
            if mask.ndim != 4 or mask.shape[0] != 1:
                raise ValueError(
                    f"{key}: expected one channel (1, X, Y, Z) with class numbers, got {tuple(mask.shape)}."
                )
            values = mask.detach().cpu().numpy()[0]
            given = data.get("mask")
            path = self.output_dir / str(given) if given else mask_path(self.output_dir, file, postfix=self.postfix)
            affine = mask.meta.get("original_affine")
            classes = mask_facts(values, affine, classes=self.classes)
            notes = str(mask.meta.get("geometry_notes") or "")
            for beside in (probabilities_path(path), dicom_seg_path(path)) if path.exists() else ():
                set_aside(beside)  # of the mask that is replaced
            # The mask comes last: when the disk is full, the former one stays.
            if "probabilities" in data:
                save_probabilities(data["probabilities"], probabilities_path(path), affine=affine)
            if self.dicom_seg and is_dicom_volume(Path(file)):
                names = {part["value"]: name for name, part in classes.items()}
                seg = dicom_seg_path(path)
                try:
                    save_dicom_seg(values, file, seg, affine=affine, classes=names, series=self.series)
                except VolumeError as error:
                    notes = "; ".join(filter(None, [notes, str(error)]))
            save_mask(values, file, path, affine=affine)
            content = {"classes": classes, **grid_of(values.shape, affine), "made_by": self.made_by, "notes": notes}
            if "image" in data:  # as the network saw it
                content["intensities"] = intensities_of(np.asarray(data["image"][0].cpu()))
            if "confidence" in data:
                content["confidence"] = data["confidence"]
            write_text(facts_path(path), json.dumps(content, indent=1) + "\n")
        return dict(data)
