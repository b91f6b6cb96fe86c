"""Running bundles in this process, on a few tiny phantoms."""

import csv
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow

from medconstraints.synthetic import make_cohort

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def bundles_root() -> Path:
    """The folder of the bundles."""
    return ROOT / "bundles"


@pytest.fixture(scope="session")
def make_workflow() -> Callable[..., ConfigWorkflow]:
    """`python -m monai.bundle run` without the import of torch: configs of a bundle, and overrides of their ids."""

    def make(
        bundle: Path, configs: str | Sequence[str] = "train", *, tracking: str | None = None, **overrides: Any
    ) -> ConfigWorkflow:
        names = [configs] if isinstance(configs, str) else list(configs)
        kind = "inference" if names[0] == "inference" else "train"
        return ConfigWorkflow(
            workflow_type=kind,
            config_file=[str(bundle / "configs" / f"{name}.json") for name in names],
            tracking=tracking,
            logging_file=False,  # logging.conf would replace pytest's handlers
            **({"bundle_root": str(bundle)} | {key: _plain(value) for key, value in overrides.items()}),
        )

    return make


@pytest.fixture(scope="session")
def run_bundle(make_workflow: Callable[..., ConfigWorkflow]) -> Callable[..., ConfigWorkflow]:
    """Initialise, run and finalise; returns the workflow, whose properties hold the engines.

    `before_run` is called with the workflow when all is there and nothing has run.
    """

    def run(
        bundle: Path,
        configs: str | Sequence[str] = "train",
        *,
        before_run: Callable[[ConfigWorkflow], Any] | None = None,
        **overrides: Any,
    ) -> ConfigWorkflow:
        workflow = make_workflow(bundle, configs, **overrides)
        path = list(sys.path)  # MONAI puts the bundle in front
        try:
            workflow.initialize()
            if before_run is not None:
                before_run(workflow)
            workflow.run()
            workflow.finalize()
        finally:
            sys.path[:] = path
        return workflow

    return run


@pytest.fixture(scope="session")
def parsed(make_workflow: Callable[..., ConfigWorkflow]) -> Callable[..., Any]:
    """One id of a training config, parsed and not run: `parsed(bundle, "train", "train#dataset", ...)`."""

    def get(bundle: Path, configs: str | Sequence[str], wanted: str, **overrides: Any) -> Any:
        workflow = make_workflow(bundle, configs, **overrides)
        workflow.parser.parse(reset=True)
        return workflow.parser.get_parsed_content(wanted)

    return get


@pytest.fixture(scope="session")
def cut_off() -> Callable[[int, int], Callable[[ConfigWorkflow], None]]:
    """For `before_run`: the run is killed in an epoch, after an iteration (counted from the start of the run)."""

    def at(epoch: int, iteration: int) -> Callable[[ConfigWorkflow], None]:
        def stop(engine: Engine) -> None:
            if engine.state.epoch == epoch and engine.state.iteration == iteration:
                raise InterruptedError("cut off")

        return lambda workflow: workflow.trainer.add_event_handler(Events.ITERATION_COMPLETED, stop)

    return at


@pytest.fixture(scope="session")
def messages() -> Callable[[BaseException | None], str]:
    """Messages of an exception and of its causes, as a traceback shows them."""

    def chain(error: BaseException | None) -> str:
        lines = []
        while error is not None:
            lines.append(f"{type(error).__name__}: {error}")
            error = error.__cause__ or error.__context__
        return "\n".join(lines)

    return chain


@pytest.fixture(scope="session")
def outcome() -> Callable[[Path], tuple[list[str], dict[str, str]]]:
    """Of the folder of an inference: the names of the volumes done, and the reasons of those that failed."""

    def read(folder: Path) -> tuple[list[str], dict[str, str]]:
        rows = json.loads((folder / "inference.json").read_text())["volumes"]
        failed = {row["name"]: row["reason"] for row in rows if row["state"] == "failed"}
        return [row["name"] for row in rows if row["state"] == "done"], failed

    return read


@pytest.fixture(scope="session")
def read_table() -> Callable[[Path], list[dict[str, str]]]:
    """Rows of a CSV file."""

    def read(path: Path) -> list[dict[str, str]]:
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    return read


@pytest.fixture(scope="session")
def copy_cohort() -> Callable[..., Path]:
    """Copy a cohort into a new folder and spoil it: `edit(folder, content)` changes its files and its datalist."""

    def copy(datalist: Path, folder: Path, edit: Callable[[Path, dict[str, Any]], Any]) -> Path:
        shutil.copytree(datalist.parent, folder)
        content = json.loads(datalist.read_text())
        edit(folder, content)
        (folder / datalist.name).write_text(json.dumps(content))
        return folder / datalist.name

    return copy


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datalist of 4 + 2 + 2 phantoms with one organ: stored as RAS, LPS, RAS, LAS, PSR, RAS, LPS, RAS."""
    return _cohort(tmp_path_factory.mktemp("cohort"), num_classes=1)


@pytest.fixture(scope="session")
def two_class_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with two classes."""
    return _cohort(tmp_path_factory.mktemp("two_class_cohort"), num_classes=2)


def _cohort(folder: Path, num_classes: int) -> Path:
    counts = {"num_training": 4, "num_validation": 2, "num_test": 2}
    return make_cohort(folder, shape=(24, 24, 16), num_classes=num_classes, **counts)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
