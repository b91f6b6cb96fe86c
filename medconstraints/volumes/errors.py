"""The error of all readers."""

__all__ = ["VolumeError"]


class VolumeError(ValueError):
    """An image or label file cannot be used; the message names the file, what was found, and what to do."""
