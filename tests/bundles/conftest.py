"""Running bundles in this process, on a few tiny phantoms."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigWorkflow

from medconstraints.data import make_cohort

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
    """Initialise, run and finalise; returns the workflow, whose properties hold the engines."""

    def run(bundle: Path, configs: str | Sequence[str] = "train", **overrides: Any) -> ConfigWorkflow:
        workflow = make_workflow(bundle, configs, **overrides)
        path = list(sys.path)  # MONAI puts the bundle in front
        try:
            workflow.initialize()
            workflow.run()
            workflow.finalize()
        finally:
            sys.path[:] = path
        return workflow

    return run


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
