"""A small picture of a volume: three planes through what was segmented, with its outline."""

from __future__ import annotations

import io
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from medconstraints.volumes.grids import grid_of

__all__ = ["COLOURS", "draw_planes"]

# Okabe and Ito's palette: told apart with every common colour vision, and on grey; class k takes colour k - 1, cyclic.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2", "#999999")
# Of each plane: the axes of RAS across and upwards, and the letters of the ends: left, right, below, above.
PLANES = ((0, 1, "RL", "PA"), (0, 2, "RL", "IS"), (1, 2, "PA", "IS"))


def draw_planes(
    image: npt.NDArray[Any],
    mask: npt.NDArray[Any],
    affine: Any,
    *,
    height: int = 160,
    radiological: bool = True,
) -> bytes:
    """Axial, coronal and sagittal plane through the middle of the object, side by side, as a PNG file.

    Voxels are shown with their lengths in mm, grey values between the 1st and 99th percentile of the planes, the
    outlines of the classes in colours, and the directions of the patient as letters.

    Args:
        image: intensities (X, Y, Z).
        mask: class numbers (X, Y, Z).
        affine: voxel index to RAS mm, (4, 4), of both.
        height: of the picture, in pixels.
        radiological: show the patient's right on the left; False shows it on the right.
    """
    spacing, turn = grid_of(image.shape, affine)["spacing_mm"], nib.io_orientation(affine)
    image, mask = (nib.orientations.apply_orientation(volume, turn) for volume in (image, mask))
    inside = np.argwhere(mask > 0)
    centre = np.median(inside, 0).astype(int) if len(inside) else np.array(mask.shape) // 2
    planes = []
    for across, up, sides, ends in PLANES:
        [through] = {0, 1, 2} - {across, up}
        grey, classes = (np.take(volume, int(centre[through]), through).T[::-1] for volume in (image, mask))
        if across == 0 and radiological:
            grey, classes = grey[:, ::-1], classes[:, ::-1]
        elif across == 0:
            sides = sides[::-1]
        planes.append(_plane(grey, classes, spacing[across], spacing[up], height, sides, ends))
    picture = Image.new("RGB", (sum(plane.width for plane in planes) + 4 * (len(planes) - 1), height))
    left = 0
    for plane in planes:
        picture.paste(plane, (left, 0))
        left += plane.width + 4
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


def _plane(
    grey: npt.NDArray[Any],
    classes: npt.NDArray[Any],
    across_mm: float,
    up_mm: float,
    height: int,
    sides: str,
    ends: str,
) -> Image.Image:
    finite = np.nan_to_num(np.asarray(grey, dtype=np.float64))
    low, high = np.percentile(finite, [1, 99])
    bright = np.clip((finite - low) / max(high - low, 1e-12), 0, 1) * 255
    width = max(1, min(3 * height, round(height * grey.shape[1] * across_mm / (grey.shape[0] * up_mm))))
    plane = Image.fromarray(bright.astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR).convert("RGB")
    shown = np.asarray(Image.fromarray(classes.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST))
    pixels = np.array(plane)
    for value in np.unique(shown[shown > 0]).tolist():
        part = np.pad(shown == value, 1)
        within = part[:-2, 1:-1] & part[2:, 1:-1] & part[1:-1, :-2] & part[1:-1, 2:]
        colour = COLOURS[(value - 1) % len(COLOURS)]
        pixels[part[1:-1, 1:-1] & ~within] = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    plane = Image.fromarray(pixels)
    draw = ImageDraw.Draw(plane)
    places = [(3, height // 2 - 6), (width - 10, height // 2 - 6), (width // 2 - 3, height - 13), (width // 2 - 3, 1)]
    for letter, place in zip([*sides, *ends], places, strict=True):
        draw.text(place, letter, fill="#ffffff", stroke_width=1, stroke_fill="#000000")
    return plane
