"""What a run of a bundle was really told: its options are checked first, its settings are written beside its results.

The command line of `monai.bundle` drops an option whose value is None, passes the words true, false and null on as
texts, and accepts options that name nothing. An expression of a config cannot ask for the config it stands in, so the
functions here look for MONAI's parser among their callers.
"""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.scripts import create_workflow

from medconstraints.data.datalist_sections import fingerprints, load_datalist, read_datalist
from medconstraints.data.missing import MissingData
from medconstraints.data.output_folders import check_run_dir, lock_folder
from medconstraints.data.weights_card import cohort_of, compare_with_card, read_card

__all__ = [
    "SETTINGS_FILE",
    "check_options",
    "read_settings",
    "run_settings",
    "start_inference",
    "start_run",
    "write_settings",
]

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"
SPELLING = {"true": "True", "false": "False", "none": "'$None'", "null": "'$None'"}
# Entries of a config that do not tell what is computed.
NOT_SETTINGS = frozenset({"_meta_", "imports", "initialize", "run", "finalize"})
# Entries that tools and commands name, whether or not the config at hand reads them.
STRUCTURAL = frozenset({"bundle_root", "dataset_dir", "output_dir", "imports", "initialize", "run", "finalize", "seed"})
# What may change when a run goes on: where it runs and writes, how long, and how often it looks.
FREE_TO_CHANGE = frozenset(
    {
        "bundle_root",
        "cache_rate",
        "datalist",
        "dataset_dir",
        "device",
        "distributed",
        "epochs",
        "experiment_name",
        "is_not_rank0",
        "network",
        "num_workers",
        "output_dir",
        "rank",
        "run_name",
        "save_execute_config",
        "stage",
        "tracking_uri",
        "val_interval",
        "validate",
    }
)
FREE_IN_TRAIN = frozenset({"handlers"})  # MONAI appends its tracking there; what they do has settings of its own
FREE_IN_PARTS = frozenset({"cache_rate", "max_epochs", "num_workers"})


class _Call(NamedTuple):
    """What stands behind a run: MONAI's parser, the config files, and the options; the last two may be unknown."""

    parser: ConfigParser
    files: list[str]
    options: dict[str, Any] | None


# Files and options are on the stack while a workflow is initialised, and no longer when it runs.
_SEEN: WeakKeyDictionary[ConfigParser, tuple[list[str], dict[str, Any] | None]] = WeakKeyDictionary()


def check_options() -> None:
    """Refuse options that would be dropped or misread; the first step of every config's "initialize".

    From then on an error of a command line ends with its reason as the last line.

    Raises:
        ValueError: an option names no setting, or its value is a text where a truth value, a number, a list or None
            belongs. All faults are listed, each with what to write instead.

    Example:
        >>> check_options()                                                  # nothing to check outside a config
    """
    call = _running()
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
        for name, value in _leaves({name: call.parser.config[name] for name in {*call.parser.config} - NOT_SETTINGS})
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


def run_settings(*entries: str) -> dict[str, Any]:
    """What must be the same when a run goes on, by the name of each entry: for `ResumeHandler`.

    That is the whole config but for what decides where a run happens and how long it takes (`FREE_TO_CHANGE`,
    `FREE_IN_TRAIN`, `FREE_IN_PARTS`), and the training and the validation cases: their entries and their files.

    Args:
        entries: of the config that count, for a stage that the others do not change; none for all.
    """
    call = _running()
    if call is None:
        return {}
    config = {key: value for key, value in call.parser.config.items() if key not in NOT_SETTINGS | FREE_TO_CHANGE}
    config = {key: value for key, value in config.items() if not entries or key in entries}
    config["train"] = {key: value for key, value in config.get("train", {}).items() if key not in FREE_IN_TRAIN}
    settings = {name: value for name, value in _leaves(config) if name.split("#")[-1] not in FREE_IN_PARTS}
    datalist = _resolved(call.parser, "datalist", call.parser.config.get("datalist"))
    if isinstance(datalist, str) and Path(datalist).is_file():
        for section in ("training", "validation", "guide", "unlabelled"):
            for number, case in enumerate(fingerprints(datalist, section)):
                settings[f"{section} case {number} of the datalist"] = case
    return settings


def start_run(output_dir: str | Path) -> None:
    """Before a training: refuse a folder whose weights it would replace, and write `settings.json` there.

    Raises:
        FileNotFoundError: there is no datalist.
        FileExistsError: see `check_run_dir`.
        PermissionError: the folder cannot be made or written to.
        ValueError: the strides of the network do not divide `patch_size`.
    """
    call = _running()
    if call is not None and "datalist" in call.parser.config:
        content = load_datalist(_resolved(call.parser, "datalist", call.parser.config["datalist"]))
        _warn_of_shared_cases(content)
    if call is not None:
        _check_patch_size(call.parser.config)
    folder = check_run_dir(output_dir)
    write_settings(folder, cohort=_cohort(call) if call is not None and os.environ.get("RANK", "0") == "0" else {})


def _cohort(call: _Call) -> dict[str, Any]:
    datalist = _resolved(call.parser, "datalist", call.parser.config.get("datalist"))
    if not isinstance(datalist, str) or not Path(datalist).is_file():
        return {}
    classes = _resolved(call.parser, "num_classes", call.parser.config.get("num_classes"))
    items = read_datalist(datalist, "training", required=False) if _has_images(datalist) else []
    return cohort_of(items, classes if isinstance(classes, int) else None)


def _has_images(datalist: str) -> bool:
    """Whether the entries are images, and not rows of an archive."""
    return all("image" in entry for entry in load_datalist(datalist).get("training") or () if isinstance(entry, dict))


def start_inference(
    volumes: Any, output_dir: str | Path, weights: str | Path | None = None, *, as_trained: bool = True
) -> None:
    """Before an inference: stop if the volumes are not there, keep other runs out, clear what a dead one left.

    Where torchrun started several processes, they meet here.

    Args:
        volumes: of `inference_items`.
        output_dir: folder of the masks; `finish_inference` follows when all are done.
        weights: file of weights, whose card says with which settings they were trained; None compares none.
        as_trained: refuse settings that contradict the card; False warns.

    Raises:
        OSError: the error that `inference_items` met, or another run writes to the folder.
        ValueError: the strides of the network do not divide `patch_size`, or the weights were trained with others.
    """
    if (call := _running()) is not None:
        _check_patch_size(call.parser.config)
    if isinstance(volumes, MissingData):
        raise volumes.error
    if weights is not None and call is not None:
        settings = {key: _resolved(call.parser, key, value) for key, value in call.parser.config.items()}
        if told := compare_with_card(_told_by(weights), settings):
            if as_trained:
                raise ValueError(f"{'; '.join(told)}; or --as_trained False, if that is meant.")
            logger.warning("%s", "; ".join(told))
    folder = Path(output_dir)
    if os.environ.get("RANK", "0") == "0":
        lock_folder(folder)
        (folder / SETTINGS_FILE).unlink(missing_ok=True)
        for left in folder.rglob(".part_*"):
            left.unlink(missing_ok=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        # Some have done their share hours before others have.
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))


def _warn_of_shared_cases(datalist: Mapping[str, Any]) -> None:
    """A validation volume that is trained on flatters."""
    sections = [
        [entry if isinstance(entry, dict) else {"image": entry} for entry in datalist.get(section) or ()]
        for section in ("training", "validation")
    ]
    names = [{str(entry["image"]) for entry in entries if "image" in entry} for entries in sections]  # not rows of npz
    if shared := sorted(names[0] & names[1]):
        logger.warning(
            "datalist: %d volumes, such as %s, are in training and in validation: its scores say nothing of other "
            "volumes, and the best weights are not the best",
            len(shared),
            Path(shared[0]).name,
        )


def _check_patch_size(config: Mapping[str, Any]) -> None:
    """A U-shaped network puts its levels together again: each step down must halve without rest."""
    patch, network = config.get("patch_size"), config.get("network_def")
    strides = network.get("strides") if isinstance(network, dict) else None
    if not (isinstance(patch, list) and isinstance(strides, list) and all(isinstance(one, int) for one in strides)):
        return
    factor = math.prod(strides)
    if any(isinstance(size, int) and size > 0 and size % factor for size in patch):
        raise ValueError(
            f"patch_size: expected multiples of {factor}, as the strides {strides} of network_def ask for, got {patch}."
        )


def write_settings(
    folder: str | Path, weights: str | Path | None = None, *, cohort: Mapping[str, Any] | None = None
) -> None:
    """Write the resolved settings of the run that calls it to `settings.json`.

    Keys: "bundle", "config_files", "options" as they were given, "settings", the values of all plain entries of the
    config, "cohort", and "training", the same of the run that made the weights, where these or a file beside them tell.

    Args:
        folder: of the run's results.
        weights: file of weights that the run reads.
        cohort: what the training volumes are like, see `cohort_of`.
    """
    call = _running()
    if call is None or os.environ.get("RANK", "0") != "0":
        return
    plain = {key: _resolved(call.parser, key, value) for key, value in call.parser.config.items()}
    content: dict[str, Any] = {
        "bundle": call.parser.config.get("_meta_", {}).get("name"),
        "config_files": [Path(file).name for file in call.files],
        "options": call.options,
        "settings": {key: value for key, value in plain.items() if key not in NOT_SETTINGS and _is_setting(value)},
    }
    if cohort:
        content["cohort"] = cohort
    if weights is not None and (found := _told_by(weights)):
        content["training"] = {key: found[key] for key in ("bundle", "config_files", "settings") if key in found}
    target = Path(folder) / SETTINGS_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def _told_by(weights: str | Path) -> dict[str, Any]:
    """What weights say of their training, or, without a card, what the training left beside them."""
    return read_card(weights) or read_settings(Path(weights).parent) or {}


def read_settings(folder: str | Path) -> dict[str, Any] | None:
    """What `write_settings` wrote into a folder, or None if there is nothing."""
    file = Path(folder) / SETTINGS_FILE
    content: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return content


def _running() -> _Call | None:
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
        return _Call(parser, *_SEEN[parser])
    if files is None:
        # A workflow that was made without `monai.bundle run`: any config of its folder may be part of it.
        files = sorted(map(str, Path(folder).glob("*.json"))) if folder is not None else []
        files = [file for file in files if Path(file).name != "metadata.json"]
    _SEEN[parser] = [files] if isinstance(files, str) else list(files), options
    return _Call(parser, *_SEEN[parser])


def _options(local: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they were given; MONAI has dropped those that are None from what it merged."""
    dropped = {name: value for name, value in local["kwargs"].items() if value is None}
    own = inspect.signature(ConfigWorkflow).parameters
    return {name: value for name, value in {**local["_args"], **dropped}.items() if name not in own}


def _known(call: _Call) -> dict[str, Any]:
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
    words = " ".join(str(value) for _, value in _leaves({**config, "_meta_": None}))
    ids = ["#".join(path[:length]) for length in range(1, len(path) + 1)]
    return any(re.search(rf"[@%]{re.escape(one)}(?!\w)", words) for one in ids)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}#{key}" if name else key)
    else:
        yield name, value


def _resolved(parser: ConfigParser, name: str, value: Any) -> Any:
    """Plain values as they are, and expressions that only put other entries together, such as paths."""
    if isinstance(value, str) and value.startswith(("$", "@")) and "(" not in value and "lambda" not in value:
        try:
            found = parser.get_parsed_content(name)
        except (KeyError, ValueError, RuntimeError):
            return value
        return found if _is_plain(found) else value
    return value


def _is_setting(value: Any) -> bool:
    """A plain value; of expressions only those that could be resolved are left."""
    return _is_plain(value) and not (isinstance(value, str) and value.startswith(("$", "@", "%")))


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return "_target_" not in value and all(_is_plain(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


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
