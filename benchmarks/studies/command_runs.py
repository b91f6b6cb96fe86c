"""Trainings of a study as command lines: each is run once, told in `commands.txt`, and its validation Dice kept."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["bundle_run", "call", "finished", "train"]

DICE = re.compile(r"Epoch\[(\d+)\] Metrics -- val_mean_dice: ([\d.]+)")


def bundle_run(bundle: str, configs: Sequence[str]) -> list[str]:
    """Start of a command line of a bundle."""
    files = ",".join(f"'{bundle}/configs/{name}.json'" for name in configs)
    return ["python", "-m", "monai.bundle", "run", "--bundle_root", bundle, "--config_file", f"[{files}]"]


def call(line: Sequence[str], name: str) -> None:
    """Run a command line on one thread; what it says goes to `logs`."""
    for folder in ("logs", "done"):
        Path(folder).mkdir(exist_ok=True)
    with open("commands.txt", "a") as file:
        file.write(shlex.join(line) + "\n")
    with open(f"logs/{name}.txt", "w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *line[1:]], check=True, stdout=log, stderr=log, env=environment)


def train(bundle: str, configs: Sequence[str], options: str, name: str) -> dict[str, Any]:
    """A training into `runs/<name>`, unless it is there: its command, seconds, and validation Dice of each epoch."""
    done = Path(f"done/{name}.json")
    if not done.exists():
        line, start = [*bundle_run(bundle, configs), "--output_dir", f"runs/{name}", *shlex.split(options)], time.time()
        call(line, name)
        dice = [float(value) for _, value in DICE.findall(Path(f"logs/{name}.txt").read_text())]
        told = {"command": shlex.join(line), "seconds": round(time.time() - start, 1), "dice": dice}
        done.write_text(json.dumps(told) + "\n")
        sys.stdout.write(f"{name}: {told['seconds']} s, {dice[-4:]}\n")
        sys.stdout.flush()
    return finished(name)


def finished(name: str) -> dict[str, Any]:
    """What `train` kept, with the settings that the run was told."""
    told = json.loads(Path(f"runs/{name}/settings.json").read_text())
    return json.loads(Path(f"done/{name}.json").read_text()) | {key: told[key] for key in ("config_files", "options")}
