"""Files that are whole or not there: written beside their place and moved there."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["LEFT_BEHIND", "write_text", "write_whole"]

LEFT_BEHIND = ".part_*"  # what a run that was killed while it wrote leaves


def write_whole(path: Path, write: Callable[[Path], Any]) -> Path:
    """Write a file beside its place and move it there: what stood there stays until the new one is whole.

    Args:
        path: the file; its folder is made when missing.
        write: gets the name to write to, which has the ending of `path`.

    Raises:
        OSError: what `write` raises; a full disk is told as such, with the file's name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / f".part_{secrets.token_hex(6)}{''.join(path.suffixes[-2:])}"
    try:
        write(beside)
        os.replace(beside, path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            message = f"the disk is full, {path.name} was not written"
            raise OSError(errno.ENOSPC, message, str(path.parent)) from None  # the last line of a command is the cause
        raise
    finally:
        beside.unlink(missing_ok=True)
    return path


def write_text(path: Path, text: str) -> Path:
    """The same for text in UTF-8; of file names that are none, what does not fit becomes a question mark."""
    return write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8", errors="replace"))
