"""Fixtures shared by all tests."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn


@pytest.fixture(scope="session", autouse=True)
def _two_threads():
    """Timings and the order of float sums do not depend on how many cores a machine has."""
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seed():
    """Each test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    """A numpy generator with a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real volumes named by MEDCONSTRAINTS_DATA; the test is skipped where there is none."""
    value = os.environ.get("MEDCONSTRAINTS_DATA")
    if not value:
        pytest.skip("MEDCONSTRAINTS_DATA is not set: no real volumes to test on")
    root = Path(value)
    if not root.is_dir():
        pytest.fail(f"MEDCONSTRAINTS_DATA names {value}, which is not a folder")
    return root


def _load_reference(name: str) -> ModuleType:
    """One of the slow references, tests/reference/<name>.py; the tests are no package, so it is loaded by its path."""
    path = Path(__file__).parent / "reference" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def box_prior_reference() -> ModuleType:
    """The slow reference of the box prior, tests/reference/box_prior_reference.py."""
    return _load_reference("box_prior_reference")


@pytest.fixture(scope="session")
def constraint_reference() -> ModuleType:
    """The slow reference of the global constraints, tests/reference/constraint_reference.py."""
    return _load_reference("constraint_reference")


@pytest.fixture(scope="session")
def distance_reference() -> ModuleType:
    """The slow reference of distance maps and paths, tests/reference/distance_reference.py."""
    return _load_reference("distance_reference")


@pytest.fixture(scope="session")
def distance_backends() -> ModuleType:
    """Distance maps and paths by others' algorithms, tests/reference/distance_backends.py."""
    return _load_reference("distance_backends")


@pytest.fixture
def tiny_network() -> Callable[..., nn.Module]:
    """Maker of the smallest network: one 1x1 convolution without bias, all weights 1, from 1 channel to `channels`."""

    def make(channels: int = 1, *, dims: int = 2) -> nn.Module:
        network = (nn.Conv2d if dims == 2 else nn.Conv3d)(1, channels, 1, bias=False)
        nn.init.ones_(network.weight)
        return network

    return make
