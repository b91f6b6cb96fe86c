"""Fixtures shared by all tests."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch


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
