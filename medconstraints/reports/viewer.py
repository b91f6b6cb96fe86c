"""A page of one volume with a viewer: slices to scroll through, the prediction, and the reference where there is one.

The viewer is NiiVue, in the folder niivue beside this file with its licence. It and the voxels stand in the page, which
so needs no network and can be passed on alone.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from medconstraints.reports.planes import colour_of, middle_of, window_of
from medconstraints.reports.render import render
from medconstraints.writing import write_text

__all__ = ["write_viewer"]

RIM = "#FF00FF"  # of the reference: no class has it, and no grey
MOST_VOXELS = 1 << 22  # of a volume in a page; of int16 about 6 MB there


def write_viewer(
    path: Path,
    image: npt.NDArray[Any],
    mask: npt.NDArray[np.uint8],
    affine: Any,
    *,
    title: str,
    class_names: Mapping[int, str],
    reference: npt.NDArray[np.uint8] | None = None,
    radiological: bool = True,
) -> Path:
    """Write the page. A volume of more than `MOST_VOXELS` is shown in blocks of voxels, which the page says.

    Args:
        path: file to write.
        image: intensities (X, Y, Z).
        mask: class numbers (X, Y, Z).
        affine: voxel index to RAS mm, (4, 4), of all.
        title: heading of the page.
        class_names: class number -> its name, of those that are not called by their number.
        reference: class numbers (X, Y, Z), of which the surfaces are shown.
        radiological: show the patient's right on the left first; the page has a switch.
    """
    block = _block(image.shape, affine)
    shown = _coarser(image, block, np.add.reduceat) / np.prod(block) if max(block) > 1 else image
    # A block has the highest class number that it meets: what is thin stays visible.
    labels = [_coarser(part, block, np.maximum.reduceat) for part in (mask, reference) if part is not None]
    placed = np.asarray(affine, dtype=np.float64) @ np.diag([*block, 1.0])
    placed[:3, 3] += np.asarray(affine, dtype=np.float64)[:3, :3] @ ((np.array(block) - 1) / 2)
    centre = middle_of(labels[0] if labels[0].any() else labels[-1])
    numbers = np.unique(np.concatenate([np.unique(part) for part in labels]))
    class_names = {number: class_names.get(number, f"class {number}") for number in numbers[numbers > 0].tolist()}
    masks = [{"name": "Prediction", "voxels": _encoded(labels[0], placed), "colours": _table(class_names)}]
    if reference is not None:
        rim = _table(class_names, RIM)
        masks.append({"name": "Reference", "voxels": _encoded(_rim(labels[1]), placed), "colours": rim})
    page = render(
        "viewer.html",
        title=title,
        block=" x ".join(map(str, block)) if max(block) > 1 else "",
        library=_library(),
        rim=RIM,
        legend=[(colour_of(number), name) for number, name in class_names.items()],
        data={
            "image": _encoded(shown, placed, window_of(shown)),
            "masks": masks,
            "centre": (placed @ [*centre, 1.0])[:3].tolist(),
            "radiological": radiological,
        },
    )
    return write_text(path, page)


@cache
def _library() -> str:
    return (Path(__file__).parent / "niivue" / "niivue.umd.js").read_text(encoding="utf-8")


def _block(shape: tuple[int, ...], affine: Any) -> list[int]:
    """Voxels along each axis that become one: the finest axis is halved until few enough are left."""
    edges = np.linalg.norm(np.asarray(affine, dtype=np.float64)[:3, :3], axis=0)
    block = np.ones(3, int)
    while np.prod(-(-np.array(shape) // block)) > MOST_VOXELS:
        block[np.argmin(np.where(np.array(shape) > block, edges * block, np.inf))] *= 2
    return block.tolist()


def _coarser(voxels: npt.NDArray[Any], block: list[int], reduce: Any) -> npt.NDArray[Any]:
    for axis, size in enumerate(block):
        if size > 1:
            voxels = reduce(voxels, np.arange(0, voxels.shape[axis], size), axis)
    return voxels


def _encoded(voxels: npt.NDArray[Any], affine: Any, window: tuple[float, float] = (0.0, 0.0)) -> str:
    """A NIfTI file as text; what is no small integer is stored in 65,536 steps."""
    kind = np.uint8 if voxels.dtype == np.uint8 else np.int16
    whole = np.abs(voxels).max() < 2**15 and np.array_equal(voxels, np.rint(voxels))
    file = nib.Nifti1Image(voxels.astype(kind if whole else np.float32), affine)
    file.set_data_dtype(kind)
    file.header.set_xyzt_units("mm")
    file.header["cal_min"], file.header["cal_max"] = window
    return base64.b64encode(gzip.compress(file.to_bytes(), 6)).decode("ascii")


def _rim(mask: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The voxels of each class that have another one, or none, beside a face."""
    padded = np.pad(mask, 1)
    inner = np.ones(mask.shape, bool)
    for axis in range(3):
        for step in (-1, 1):
            inner &= np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1] == mask
    return np.where(inner, 0, mask).astype(np.uint8)


def _table(class_names: Mapping[int, str], colour: str | None = None) -> dict[str, list[Any]]:
    """Colours of the class numbers from 0 on, or one for all, as NiiVue has them."""
    numbers = range(max(class_names, default=0) + 1)
    colours = [colour or (colour_of(number) if number else "#000000") for number in numbers]
    table: dict[str, list[Any]] = {
        channel: [int(colour[start : start + 2], 16) for colour in colours]
        for channel, start in (("R", 1), ("G", 3), ("B", 5))
    }
    return table | {
        "A": [255 if number in class_names else 0 for number in numbers],
        "labels": [class_names.get(number, "") for number in numbers],
    }
