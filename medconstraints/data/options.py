"""Options of a bundle's command line, checked before anything runs.

The command line of `monai.bundle` drops an option whose value is None, passes the words true, false and null on as
texts, and accepts options that name nothing.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from monai.bundle import ConfigParser

from medconstraints.data.run_settings import FREE_TO_CHANGE
from medconstraints.data.running import NOT_SETTINGS, RunCall, leaves, running

__all__ = ["check_options"]

logger = logging.getLogger(__name__)

SPELLING = {"true": "True", "false": "False", "none": "'$None'", "null": "'$None'"}
# Entries that tools and commands name, whether or not the config at hand reads them.
STRUCTURAL = frozenset({"bundle_root", "dataset_dir", "output_dir", "imports", "initialize", "run", "finalize", "seed"})


def check_options() -> None:
    """Refuse options that would be dropped or misread; the first step of every config's "initialize".

    From then on an error of a command line ends with its reason as the last line.

    Raises:
        ValueError: an option names no setting, or its value is a text where a truth value, a number, a list or None
            belongs. All faults are listed, each with what to write instead.

    Example:
        >>> check_options()                                                  # nothing to check outside a config
    """
    call = running()
    if call is None:
        return
    faults = []
    if _from_command_line():
        _reason_last()
        faults = [
            f"{word}: what follows a # is cut off before it arrives; choose a name without it"
            for word in sys.argv[1:]
            if "#" in word.partition("=")[2] or ("#" in word and not word.startswith(("-", "$", "@", "%")))
        ]
    _warn_of_overlays(call.files)
    known = _known(call)
    faults += [
        f"--{name}: a # in {value!r} would be taken for a separator; choose a name without it"
        for name, value in leaves({name: call.parser.config[name] for name in {*call.parser.config} - NOT_SETTINGS})
        if isinstance(value, str) and ("#" in value or "::" in value) and not value.startswith(("$", "@", "%"))
        if not name.split("#")[-1].startswith("_")  # a comment
    ]
    given = call.options if call.options is not None else _changed(call.parser, known)
    faults += [fault for name, value in given.items() for fault in _faults(name, value, known)]
    if call.options is not None:
        faults += [
            f"--{name}: is not used with {', '.join(Path(file).name for file in call.files)}"
            for name in call.options
            if not faults and not _is_used(name, call.parser.config)
        ]
    if faults:
        raise ValueError("; ".join(faults))


def _warn_of_overlays(files: list[str]) -> None:
    """Of two overlays that set one entry the first is as if it were not there."""
    before: dict[str, str] = {}
    for file in files[1:]:
        for key in json.loads(Path(file).read_text(encoding="utf-8")):
            lost = [other for other in before if other == key or other.startswith(f"{key}#")]
            for other in lost if key not in NOT_SETTINGS else ():
                logger.warning("%s of %s is replaced by that of %s", other, before[other], Path(file).name)
            before[key] = Path(file).name


def _known(call: RunCall) -> dict[str, Any]:
    """The config as its files have it."""
    if call.options is not None:
        known: dict[str, Any] = ConfigParser.load_config_files(call.files)
        return known
    # Which files were laid over which is unknown: the names of all their entries, "a" of "a#b".
    contents = [json.loads(Path(file).read_text(encoding="utf-8")) for file in call.files]
    return {key.split("#")[0]: value for content in contents for key, value in content.items()}


def _changed(parser: ConfigParser, known: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of the config that are in none of its files, or are texts."""
    return {
        name: value
        for name, value in parser.config.items()
        if name not in NOT_SETTINGS | FREE_TO_CHANGE and (name not in known or isinstance(value, str))
    }


def _faults(name: str, value: Any, known: Mapping[str, Any]) -> Iterator[str]:
    *path, last = name.replace("::", "#").split("#")
    place: Any = known
    for step in path:
        place = place[int(step)] if isinstance(place, list) and step.isdigit() else place
        place = place.get(step) if isinstance(place, dict) else place
    inside = (
        last in place if isinstance(place, dict) else isinstance(place, list) and last in map(str, range(len(place)))
    )
    if not inside and not (path and isinstance(place, dict) and "_target_" in place):
        near = difflib.get_close_matches(last, list(place) if isinstance(place, dict) else known, n=1)
        yield f"--{name}: names no setting{f'; did you mean --{near[0]}?' if near else ''}"
        return
    default = place.get(last) if isinstance(place, dict) else place[int(last)]
    if value is None:
        yield f"--{name} None: is dropped by MONAI before it arrives; write --{name} {SPELLING['none']}"
    elif isinstance(value, int | float) and (name.endswith(("_dir", "_path")) or name == "datalist"):
        yield f"--{name} {value}: is passed on as a number; write --{name} ./{value}"
    elif not isinstance(value, str):
        if not _fits(value, default):
            yield f"--{name}: expected {_kind(default)}, got {value!r}"
    elif value.startswith(("$", "@", "%")):
        return
    elif value.lower() in SPELLING and not (value == "none" and isinstance(default, str)):  # a choice of that name
        yield f"--{name} {value}: is passed on as a text; write --{name} {SPELLING[value.lower()]}"
    elif isinstance(default, bool | int | float | list | dict):
        yield f"--{name}: expected {_kind(default)}, got the text {value!r}"


def _fits(value: Any, default: Any) -> bool:
    """Whether a value that is no text is of the default's kind; an expression or a reference may be anything."""
    if default is None or (isinstance(default, str) and default.startswith(("$", "@", "%"))):
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, int):
        return isinstance(value, int | float) and value == int(value)
    kinds: tuple[type, ...] = (int, float) if isinstance(default, float) else (list, tuple, dict)
    return isinstance(value, kinds) and not (isinstance(default, dict) and not isinstance(value, dict))


def _kind(default: Any) -> str:
    if isinstance(default, bool):
        return "True or False"
    if isinstance(default, int | float):
        return "a whole number" if isinstance(default, int) else "a number"
    if isinstance(default, list):
        return 'a list such as "[1, 2]"'
    return "a mapping" if isinstance(default, dict) else "a text"


def _is_used(name: str, config: Mapping[str, Any]) -> bool:
    """Whether an entry, or what it stands in, is referred to anywhere; overlays may have replaced what read it."""
    path = name.replace("::", "#").split("#")
    if path[0] in STRUCTURAL:
        return True
    words = " ".join(str(value) for _, value in leaves({**config, "_meta_": None}))
    ids = ["#".join(path[:length]) for length in range(1, len(path) + 1)]
    return any(re.search(rf"[@%]{re.escape(one)}(?!\w)", words) for one in ids)


def _from_command_line() -> bool:
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    return main is not None and main.name.startswith("monai.bundle")


def _reason_last() -> None:
    """MONAI's last line is general; the reason stands somewhere in a hundred lines above it."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        traceback.print_exception(kind, error, trace)
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        print(f"\n{type(cause).__name__}: {cause}", file=sys.stderr)

    sys.excepthook = show
