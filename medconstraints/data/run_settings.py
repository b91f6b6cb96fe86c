"""What a run of a bundle was really told, written beside its results; and what comes before and after a run."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from medconstraints.data.datalist_sections import fingerprints, load_datalist, read_class_names, read_datalist
from medconstraints.data.missing import MissingData
from medconstraints.data.output_folders import check_run_dir, lock_folder
from medconstraints.data.running import NOT_SETTINGS, RunCall, is_plain, leaves, resolved, running
from medconstraints.data.training_cohort import cohort_line, cohort_of
from medconstraints.data.weights_card import NEEDED, compare_with_card, read_card
from medconstraints.writing import LEFT_BEHIND, write_text

__all__ = [
    "SETTINGS_FILE",
    "read_settings",
    "run_fingerprint",
    "run_settings",
    "start_inference",
    "start_run",
    "write_settings",
]

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"
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
# What does not change the mask of a volume: where it is and goes, and what becomes of others.
FREE_IN_INFERENCE = FREE_TO_CHANGE | {
    "ckpt_path",
    "overwrite",
    "postfix",
    "radiological",
    "resume",
    "section",
    "viewer",
}
FREE_IN_TRAIN = frozenset({"handlers"})  # MONAI appends its tracking there; what they do has settings of its own
FREE_IN_PARTS = frozenset({"cache_rate", "max_epochs", "num_workers"})


def run_settings(*entries: str) -> dict[str, Any]:
    """What must be the same when a run goes on, by the name of each entry: for `ResumeHandler`.

    That is the whole config but for what decides where a run happens and how long it takes (`FREE_TO_CHANGE`,
    `FREE_IN_TRAIN`, `FREE_IN_PARTS`), and the training and the validation cases: their entries and their files.

    Args:
        entries: of the config that count, for a stage that the others do not change; none for all.
    """
    call = running()
    if call is None:
        return {}
    config = {key: value for key, value in call.parser.config.items() if key not in NOT_SETTINGS | FREE_TO_CHANGE}
    config = {key: value for key, value in config.items() if not entries or key in entries}
    config["train"] = {key: value for key, value in config.get("train", {}).items() if key not in FREE_IN_TRAIN}
    settings = {name: value for name, value in leaves(config) if name.split("#")[-1] not in FREE_IN_PARTS}
    datalist = resolved(call.parser, "datalist", call.parser.config.get("datalist"))
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
    call = running()
    if call is not None and "datalist" in call.parser.config:
        content = load_datalist(resolved(call.parser, "datalist", call.parser.config["datalist"]))
        _warn_of_shared_cases(content)
    if call is not None:
        _check_patch_size(call.parser.config)
    folder = check_run_dir(output_dir)
    write_settings(folder, **_cohort(call) if call is not None and os.environ.get("RANK", "0") == "0" else {})


def _cohort(call: RunCall) -> dict[str, Any]:
    """What the training volumes are like, which is logged, and the names of the classes."""
    datalist = resolved(call.parser, "datalist", call.parser.config.get("datalist"))
    if not isinstance(datalist, str) or not Path(datalist).is_file():
        return {}
    items = read_datalist(datalist, "training", required=False) if _has_images(datalist) else []
    classes, nonzero = (resolved(call.parser, key, call.parser.config.get(key)) for key in ("num_classes", "nonzero"))
    cohort = cohort_of(items, classes if isinstance(classes, int) else None, nonzero=nonzero is True)
    logger.info("%s; all faults: python -m medconstraints check %s", cohort_line(cohort, len(items)), datalist)
    names = {str(value): name for value, name in read_class_names(datalist).items()}
    if isinstance(classes, int) and any(int(value) >= classes for value in names):
        names = {}  # the network has other classes than the labels
    return {"cohort": cohort, "class_names": names}


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
    if (call := running()) is not None:
        _check_patch_size(call.parser.config)
    if isinstance(volumes, MissingData):
        raise volumes.error
    if weights is not None and call is not None:
        config = call.parser.config
        settings = {name: resolved(call.parser, name, config[name]) for name in NEEDED if name in config}
        if told := compare_with_card(_told_by(weights), settings):
            if as_trained:
                raise ValueError(f"{'; '.join(told)}; or --as_trained False, if that is meant.")
            logger.warning("%s", "; ".join(told))
    folder = Path(output_dir)
    if os.environ.get("RANK", "0") == "0":
        lock_folder(folder)
        (folder / SETTINGS_FILE).unlink(missing_ok=True)
        for left in folder.rglob(LEFT_BEHIND):
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
    folder: str | Path,
    weights: str | Path | None = None,
    *,
    cohort: Mapping[str, Any] | None = None,
    class_names: Mapping[str, str] | None = None,
) -> None:
    """Write the resolved settings of the run that calls it to `settings.json`.

    Keys: "bundle", "config_files", "options" as they were given, "settings", the values of all plain entries of the
    config, "cohort", "class_names", and "training", the same of the run that made the weights, where these or a file
    beside them tell.

    Args:
        folder: of the run's results.
        weights: file of weights that the run reads.
        cohort: what the training volumes are like, see `cohort_of`.
        class_names: value in a mask, as a text -> name of its class.
    """
    call = running()
    if call is None or os.environ.get("RANK", "0") != "0":
        return
    plain = {key: resolved(call.parser, key, value) for key, value in call.parser.config.items()}
    content: dict[str, Any] = {
        "bundle": call.parser.config.get("_meta_", {}).get("name"),
        "config_files": [Path(file).name for file in call.files],
        "options": call.options,
        "settings": {key: value for key, value in plain.items() if key not in NOT_SETTINGS and _is_setting(value)},
    }
    content |= {key: value for key, value in (("cohort", cohort), ("class_names", class_names)) if value}
    if weights is not None and (found := _told_by(weights)):
        content["training"] = {key: found[key] for key in ("bundle", "config_files", "settings") if key in found}
    write_text(Path(folder) / SETTINGS_FILE, json.dumps(content, indent=2, default=str) + "\n")


def _told_by(weights: str | Path) -> dict[str, Any]:
    """What weights say of their training, or, without a card, what the training left beside them."""
    return read_card(weights) or read_settings(Path(weights).parent) or {}


def trained(weights: str | Path, name: str, default: Any) -> Any:
    """A setting of the training that made the weights, where they or a file beside them tell; else the default."""
    return _told_by(weights).get("settings", {}).get(name, default)


def run_fingerprint(weights: str | Path) -> str:
    """A number that changes with the weights of an inference, or with what decides its masks; "" without weights."""
    call, file = running(), Path(weights)
    if call is None or not file.is_file():
        return ""
    config = {key: value for key, value in call.parser.config.items() if key not in NOT_SETTINGS | FREE_IN_INFERENCE}
    return sha256(file.read_bytes() + json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_settings(folder: str | Path) -> dict[str, Any] | None:
    """What `write_settings` wrote into a folder, or None if there is nothing."""
    file = Path(folder) / SETTINGS_FILE
    content: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return content


def _is_setting(value: Any) -> bool:
    """A plain value; of expressions only those that could be resolved are left."""
    return is_plain(value) and not (isinstance(value, str) and value.startswith(("$", "@", "%")))
