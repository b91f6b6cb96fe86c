"""A small picture of a volume: three planes through what was segmented, with outlines."""

from __future__ import annotations

import io
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from medconstraints.volumes.grids import grid_of

__all__ = ["colour_of", "draw_planes", "middle_of", "window_of"]

# Okabe and Ito's palette: told apart with every common colour vision, and on grey.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2", "#999999")
# Of each plane: the axes of RAS across and upwards, and the letters of the ends: left, right, below, above.
PLANES = ((0, 1, "RL", "PA"), (0, 2, "RL", "IS"), (1, 2, "PA", "IS"))
DASH = 3  # pixels


def colour_of(number: int) -> str:
    """Colour of a class in every picture, #RRGGBB; they come again after the eighth class."""
    return COLOURS[(number - 1) % len(COLOURS)]


def window_of(image: npt.NDArray[Any]) -> tuple[float, float]:
    """Intensities shown as black and white: the 1st and 99th percentile."""
    low, high = np.percentile(image, [1, 99])
    return float(low), float(max(high, low + 1e-6))


def middle_of(mask: npt.NDArray[Any]) -> list[int]:
    """Along each axis the voxel that has as much of the foreground before it as behind it; of none the middle."""
    inside, centre = mask > 0, []
    for axis, size in enumerate(mask.shape):
        counts = np.moveaxis(inside, axis, 0).sum((1, 2)).cumsum()
        centre.append(int(np.searchsorted(counts, counts[-1] / 2)) if counts[-1] else size // 2)
    return centre


def draw_planes(
    image: npt.NDArray[Any],
    mask: npt.NDArray[Any],
    affine: Any,
    *,
    reference: npt.NDArray[Any] | None = None,
    height: int = 160,
    radiological: bool = True,
) -> bytes:
    """Axial, coronal and sagittal plane through the middle of the object, side by side, as a PNG file.

    Voxels are shown with their lengths in mm, grey values by `window_of`, the outlines of the classes in colours, that
    of the reference in dashes of black and white, and the directions of the patient as letters. Of an image that is one
    slice that slice is shown.

    Args:
        image: intensities (X, Y, Z).
        mask: class numbers (X, Y, Z).
        affine: voxel index to RAS mm, (4, 4), of all.
        reference: class numbers (X, Y, Z).
        height: of the picture, in pixels.
        radiological: show the patient's right on the left; False shows it on the right.
    """
    spacing, turn = grid_of(image.shape, affine)["spacing_mm"], nib.io_orientation(affine)
    reference = np.zeros_like(mask) if reference is None else reference
    volumes = [nib.orientations.apply_orientation(volume, turn) for volume in (image, mask, reference)]
    shape = volumes[0].shape
    centre = middle_of(volumes[1] if mask.any() else volumes[2])
    flat = [plane for plane in PLANES if [shape[axis] > 1 for axis in plane[:2]] == [True, True]]
    planes = []
    for across, up, sides, ends in flat if len(flat) == 1 else PLANES:
        [through] = {0, 1, 2} - {across, up}
        cut = [np.moveaxis(volume, through, 0)[centre[through]].T[::-1] for volume in volumes]
        if across == 0 and radiological:
            cut = [plane[:, ::-1] for plane in cut]
        elif across == 0:
            sides = sides[::-1]
        width = round(height * shape[across] * spacing[across] / (shape[up] * spacing[up]))
        planes.append(_plane(cut, (max(1, min(3 * height, width)), height), [*sides, *ends]))
    picture = Image.new("RGB", (sum(plane.width for plane in planes) + 4 * (len(planes) - 1), height))
    left = 0
    for plane in planes:
        picture.paste(plane, (left, 0))
        left += plane.width + 4
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


def _plane(
    cut: list[npt.NDArray[Any]],
    size: tuple[int, int],
    letters: list[str],
) -> Image.Image:
    grey, mask, reference = cut
    finite = np.nan_to_num(np.asarray(grey, dtype=np.float64))
    low, high = window_of(finite)
    bright = Image.fromarray((np.clip((finite - low) / (high - low), 0, 1) * 255).astype(np.uint8))
    pixels = np.array(bright.resize(size, Image.Resampling.BILINEAR).convert("RGB"))
    dashes = np.where(np.add.outer(*map(np.arange, size[::-1])) // DASH % 2, 255, 0).astype(np.uint8)
    for _, outline in _outlines(reference, size):
        pixels[outline] = dashes[outline][:, None]
    for number, outline in _outlines(mask, size):
        colour = colour_of(number)
        pixels[outline] = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    plane = Image.fromarray(pixels)
    draw, (width, height) = ImageDraw.Draw(plane), size
    places = [(3, height // 2 - 6), (width - 10, height // 2 - 6), (width // 2 - 3, height - 13), (width // 2 - 3, 1)]
    for letter, place in zip(letters, places, strict=True):
        draw.text(place, letter, fill="#ffffff", stroke_width=1, stroke_fill="#000000")
    return plane


def _outlines(mask: npt.NDArray[Any], size: tuple[int, int]) -> list[tuple[int, npt.NDArray[np.bool_]]]:
    """Number of each class and the pixels of its rim, a pixel wide."""
    shown = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST))
    rims = []
    for number in np.unique(shown[shown > 0]).tolist():
        part = np.pad(shown == number, 1)
        within = part[:-2, 1:-1] & part[2:, 1:-1] & part[1:-1, :-2] & part[1:-1, 2:]
        rims.append((number, part[1:-1, 1:-1] & ~within))
    return rims
