"""The run on whose behalf an expression of a config is evaluated: MONAI's parser, the config files, the options.

An expression of a config cannot ask for the config it stands in, so `running` looks for MONAI's parser among its
callers.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.scripts import create_workflow

__all__ = ["NOT_SETTINGS", "RunCall", "is_plain", "leaves", "resolved", "running"]

# Entries of a config that do not tell what is computed.
NOT_SETTINGS = frozenset({"_meta_", "imports", "initialize", "run", "finalize"})


class RunCall(NamedTuple):
    """What stands behind a run: MONAI's parser, the config files, and the options; the last two may be unknown."""

    parser: ConfigParser
    files: list[str]
    options: dict[str, Any] | None


# Files and options are on the stack while a workflow is initialised, and no longer when it runs.
_SEEN: WeakKeyDictionary[ConfigParser, tuple[list[str], dict[str, Any] | None]] = WeakKeyDictionary()


def running() -> RunCall | None:
    """The run on whose behalf an expression of a config is evaluated."""
    parser: ConfigParser | None = None
    folder, files, options = None, None, None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, ConfigParser):
            parser = owner
        elif isinstance(owner, ConfigWorkflow):
            folder = owner.config_root_path
        elif frame.f_code is create_workflow.__code__:
            files, options = frame.f_locals["config_file"], _options(frame.f_locals)
        frame = frame.f_back
    if parser is None:
        return None
    if parser in _SEEN:
        return RunCall(parser, *_SEEN[parser])
    if files is None:
        # A workflow that was made without `monai.bundle run`: any config of its folder may be part of it.
        files = sorted(map(str, Path(folder).glob("*.json"))) if folder is not None else []
        files = [file for file in files if Path(file).name != "metadata.json"]
    _SEEN[parser] = [files] if isinstance(files, str) else list(files), options
    return RunCall(parser, *_SEEN[parser])


def _options(local: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they were given; MONAI has dropped those that are None from what it merged."""
    dropped = {name: value for name, value in local["kwargs"].items() if value is None}
    own = inspect.signature(ConfigWorkflow).parameters
    return {name: value for name, value in {**local["_args"], **dropped}.items() if name not in own}


ASKING = ("$data.trained(", "$data.class_names_of(")  # what weights say of themselves


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Entries of a config that are no mappings, each with its place, such as "network_def#channels"."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{name}#{key}" if name else key)
    else:
        yield name, value


def resolved(parser: ConfigParser, name: str, value: Any) -> Any:
    """Plain values as they are, and expressions that only put other entries together, such as paths, or ask weights."""
    if (
        isinstance(value, str)
        and value.startswith(("$", "@"))
        and (value.startswith(ASKING) or ("(" not in value and "lambda" not in value))
    ):
        try:
            found = parser.get_parsed_content(name)
        except (KeyError, ValueError, RuntimeError):
            return value
        return found if is_plain(found) else value
    return value


def is_plain(value: Any) -> bool:
    """Whether a value is of JSON's kinds, and no component."""
    if isinstance(value, dict):
        return "_target_" not in value and all(is_plain(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)
