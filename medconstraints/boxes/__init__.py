"""Boxes: rows of integers, their files, where they come from, and how they follow an image."""

from medconstraints.boxes.batch import BoxRows, checked_boxes
from medconstraints.boxes.files import BoxFault, BoxFileError, read_boxes, write_boxes
from medconstraints.boxes.filling import fit_filling
from medconstraints.boxes.from_label import label_to_boxes, loosened_boxes
from medconstraints.boxes.grid import map_boxes
from medconstraints.boxes.points import read_points

__all__ = [
    "BoxFault",
    "BoxFileError",
    "BoxRows",
    "checked_boxes",
    "fit_filling",
    "label_to_boxes",
    "loosened_boxes",
    "map_boxes",
    "read_boxes",
    "read_points",
    "write_boxes",
]
