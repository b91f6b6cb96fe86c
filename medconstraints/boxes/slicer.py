"""3D Slicer's markups ROI (``.mrk.json``, schema 1.0.x) to a box, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medconstraints.boxes.fields import (
    CLASSES,
    Refusal,
    class_number,
    class_of_texts,
    coordinate_system,
    fit_schema,
    vector,
)
from medconstraints.boxes.geometry import AffineLike, Solid, affine_matrix, voxel_solid, with_thickness

__all__ = ["SLICER_SCHEMA", "is_placed", "roi_class", "roi_solid", "slicer_document"]

SCHEMA = (
    "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
    "markups-schema-v1.0.3.json#"
)
SLICER_SCHEMA = {
    "description": "a Slicer box file is an object with these",
    "type": "object",
    "required": ["markups"],
    "properties": {
        "@schema": {
            "pattern": r"[Mm]arkups-schema-v1\.\d+\.\d+\.json",
            "description": "expected Slicer's markups-schema-v1.x, save it with Slicer 4.11+",
        },
        "markups": {"type": "array"},
        "classes": CLASSES,
    },
}
_NUMBERS = {"type": "array", "items": {"type": "number"}, "description": "place the ROI in Slicer and save it again"}
ROI_SCHEMA = {
    "description": "place the ROI in Slicer and save it again",
    "required": ["type", "center", "size"],
    "properties": {
        "type": {"const": "ROI", "description": "keep only ROI boxes in the file"},
        "roiType": {"enum": ["Box", "BoundingBox"], "description": "draw it as a box ROI in Slicer"},
        "insideOut": {"enum": [False], "description": "it would exclude the object: switch 'inside out' off in Slicer"},
        "coordinateUnits": {
            "anyOf": [{"const": "mm"}, {"type": "array", "prefixItems": [{"const": "mm"}]}],
            "description": "save it in millimetres",
        },
        "center": _NUMBERS | {"minItems": 3, "maxItems": 3},
        "size": _NUMBERS | {"minItems": 3, "maxItems": 3, "items": {"type": "number", "minimum": 0}},
        "orientation": _NUMBERS | {"minItems": 9, "maxItems": 9},
    },
}
# Names that Slicer and its modules give by themselves, then "_1" or "-1": they say nothing about the class.
DEFAULT_NAME = re.compile(r"(R|ROI|MarkupsROI|Crop Volume ROI|Volume rendering ROI|.* cropping ROI)?([ _-]\d+)*", re.I)


def roi_solid(fields: Mapping[str, Any], ndim: int) -> tuple[str, Solid]:
    """Coordinate system ("RAS" or "LPS") of a markup, and its box."""
    if ndim != 3:
        raise Refusal("is a Slicer ROI, which is three-dimensional, but the image is 2D; use a JSON or CSV box file")
    # Hand-written files leave the centre to the only control point, as Slicer accepts; it writes null for what is not.
    roi: dict[str, Any] = {"center": _control_point(fields).get("position")}
    roi |= {key: value for key, value in fields.items() if value is not None}
    fit_schema(roi, ROI_SCHEMA)
    system = coordinate_system(roi.get("coordinateSystem", "LPS"))
    if system == "voxel":
        raise Refusal("unknown coordinate system 'voxel' for a Slicer ROI; use LPS or RAS")
    centre, size = vector(roi["center"], "center"), vector(roi["size"], "size")
    axes = vector(roi.get("orientation", np.eye(3).ravel()), "orientation").reshape(3, 3)
    if not np.allclose(axes.T @ axes, np.eye(3), rtol=0, atol=1e-3):
        raise Refusal("'orientation' is not a rotation: its columns must be orthogonal unit vectors")
    if not size.any():
        raise Refusal("is empty: its size is 0 mm in every direction; draw it again in Slicer, it may be flat in one")
    solid = Solid(centre, axes * with_thickness(size))
    return system, solid.mirrored() if system == "LPS" else solid


def roi_class(fields: Mapping[str, Any], names: Mapping[str, int], file_name: str) -> int:
    """Class of a markup: its label, else its name, its point's label or description, else the file's name.

    Slicer itself writes no node name: it takes the file's name for one, and the point's label keeps the name that the
    node had when it was drawn ("prostate-1"). MONAI's detection bundles write ``"label": {"value": 0}``.
    """
    label = fields.get("label")
    label = label.get("value") if isinstance(label, dict) else label
    if label not in (None, ""):
        return class_number(label, names)
    point = _control_point(fields)
    texts = [str(one.get(key) or "") for one, key in ((fields, "name"), (point, "label"), (point, "description"))]
    return class_of_texts(texts, names, re.sub(r"(\.mrk)?\.json$", "", file_name, flags=re.I), DEFAULT_NAME)


def is_placed(fields: Mapping[str, Any]) -> bool:
    """Whether somebody has put a markup into the volume; Slicer saves those that wait for it too."""
    return all(
        point.get("positionStatus", "defined") == "defined"
        for point in fields.get("controlPoints") or ()
        if isinstance(point, dict)
    )


def _control_point(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """First control point of a markup, empty if there is none."""
    points = fields.get("controlPoints")
    return next((point for point in points if isinstance(point, dict)), {}) if isinstance(points, list) else {}


def slicer_document(
    rows: Sequence[Sequence[int]], class_names: Mapping[int, str], affine: AffineLike
) -> dict[str, Any]:
    """Content of a ``.mrk.json`` file: one markup, in LPS as Slicer saves them, per box row."""
    if any(len(row) != 7 for row in rows):
        raise ValueError("a .mrk.json file holds three-dimensional boxes; write 2D boxes as .json.")
    matrix = affine_matrix(affine, 3, "affine")
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    axes = matrix[:3, :3] / spacing
    if not np.allclose(axes.T @ axes, np.eye(3), rtol=0, atol=1e-3):
        raise ValueError("affine is sheared: Slicer's ROI boxes are rectangular; write the boxes as .json.")
    orientation = (np.array([[-1.0], [-1.0], [1.0]]) * axes).ravel().tolist()  # RAS -> LPS
    markups = []
    for label, *sides in rows:
        start, stop = np.array(sides[:3]), np.array(sides[3:])
        name = class_names.get(label, str(label))
        centre = voxel_solid(start, stop, matrix).mirrored().centre.tolist()
        point = {"id": "1", "label": name, "description": "", "position": centre, "orientation": orientation}
        markups.append(
            {
                "name": name,
                "type": "ROI",
                "coordinateSystem": "LPS",
                "coordinateUnits": "mm",
                "locked": False,
                "roiType": "Box",
                "center": centre,
                "orientation": orientation,
                "size": (spacing * (stop - start)).tolist(),
                "insideOut": False,
                "controlPoints": [{**point, "positionStatus": "defined"}],
            }
        )
    return {"@schema": SCHEMA, "markups": markups}
