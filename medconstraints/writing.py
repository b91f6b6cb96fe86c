"""Files that are whole or not there: written beside their place and moved there."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["LEFT_BEHIND", "set_aside", "write_text", "write_whole"]

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


def set_aside(path: Path) -> bool:
    """Rename a file of a former run to `<name>.old`: it must not look like one of this run. Returns if it was there."""
    if not os.path.exists(path):  # false for a name that is too long, where Path.exists raises
        return False
    os.replace(path, path.with_name(f"{path.name}.old"))
    return True
