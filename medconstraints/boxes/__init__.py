"""Boxes: rows of integers, their files, and how they follow an image."""

from medconstraints.boxes.files import BoxFileError, read_boxes, write_boxes

__all__ = ["BoxFileError", "read_boxes", "write_boxes"]
