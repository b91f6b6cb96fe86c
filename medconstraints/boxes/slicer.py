"""3D Slicer's markups ROI (``.mrk.json``, schema 1.0.x) to a box, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medconstraints.boxes.fields import Refusal, class_number, coordinate_system, vector
from medconstraints.boxes.geometry import AffineLike, Solid, affine_matrix, voxel_solid, with_thickness

__all__ = ["check_schema", "roi_class", "roi_solid", "slicer_document"]

SCHEMA = (
    "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
    "markups-schema-v1.0.3.json#"
)
# Names that Slicer gives by itself ("R", "R_1", "ROI", then "-1" for the point): they say nothing about the class.
DEFAULT_NAME = re.compile(r"(R|ROI)?(_\d+)?(-\d+)?")


def check_schema(document: Mapping[str, Any]) -> None:
    """Refuse a document that names another schema than Slicer's 1.x; naming none is fine."""
    schema = str(document.get("@schema", SCHEMA))
    if not re.search(r"markups-schema-v1\.\d+\.\d+\.json", schema.lower()):
        raise Refusal(f"has the schema {schema!r}; expected Slicer's markups-schema-v1.x, save it with Slicer 4.11+")


def roi_solid(fields: Mapping[str, Any], ndim: int) -> tuple[str, Solid]:
    """Coordinate system ("RAS" or "LPS") of a markup, and its box."""
    if ndim != 3:
        raise Refusal("is a Slicer ROI, which is three-dimensional, but the image is 2D; use a JSON or CSV box file")
    kind = fields.get("type")
    if kind != "ROI":
        raise Refusal(f"is a {kind!r} markup, not an ROI; keep only ROI boxes in the file")
    if fields.get("roiType", "Box") != "Box":
        raise Refusal(f"has the roiType {fields['roiType']!r}; only 'Box' can be read, draw it as a box ROI in Slicer")
    if fields.get("insideOut"):
        raise Refusal("is marked 'inside out': it would exclude the object; switch that off in Slicer and save again")
    units = fields.get("coordinateUnits", "mm")
    if (units[0] if isinstance(units, list) and units else units) != "mm":
        raise Refusal(f"is in {units!r}; save it in millimetres")
    system = coordinate_system(fields.get("coordinateSystem", "LPS"))
    if system == "voxel":
        raise Refusal("unknown coordinate system 'voxel' for a Slicer ROI; use LPS or RAS")
    position = fields.get("center")
    if position is None:  # hand-written files leave it to the only control point, as Slicer accepts
        position = _control_point(fields).get("position")
    for key, value in (("center", position), ("size", fields.get("size"))):
        if value is None:
            raise Refusal(f"has no {key!r}; place the ROI in Slicer and save it again")
    centre, size = vector(position, "center", 3), vector(fields["size"], "size", 3)
    axes = np.eye(3)
    if fields.get("orientation") is not None:
        axes = vector(fields["orientation"], "orientation", 9).reshape(3, 3)
    if not np.allclose(axes.T @ axes, np.eye(3), rtol=0, atol=1e-3):
        raise Refusal("'orientation' is not a rotation: its columns must be orthogonal unit vectors")
    if (size < 0).any():
        axis = int(np.flatnonzero(size < 0)[0]) + 1
        raise Refusal(f"has the size {size[axis - 1]:g} mm along ROI axis {axis}; it must not be negative")
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
    point_label = str(point.get("label") or "")
    texts = [str(fields.get("name") or ""), point_label, re.sub(r"-\d+$", "", point_label)]
    texts = [text for text in [*texts, str(point.get("description") or "")] if text.strip()]
    for text in texts:
        if text.strip() in names or text.strip().isdecimal():
            return class_number(text, names)
    stem = re.sub(r"(\.mrk)?\.json$", "", file_name, flags=re.I)
    named = [text for text in texts if not DEFAULT_NAME.fullmatch(text)]
    if not named and stem in names:
        return names[stem]
    return class_number((named or texts or [""])[0], names)


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
