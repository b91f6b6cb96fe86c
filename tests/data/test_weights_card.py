"""A file of weights says which settings it needs and what it was trained on, and stays a file of weights."""

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from medconstraints.data.weights_card import cohort_of, compare_with_card, outside_of, read_card, write_card
from medconstraints.volumes.grids import grid_of

CARD = {"bundle": "b", "settings": {"num_classes": 2, "patch_size": [8, 8, 8], "spacing_mm": None}}


def test_a_file_with_a_card_is_read_as_before(tmp_path):
    state = nn.Conv3d(2, 3, 3).state_dict()
    torch.save(state, tmp_path / "model.pt")
    assert read_card(tmp_path / "model.pt") == {}
    write_card(tmp_path / "model.pt", CARD)
    assert read_card(tmp_path / "model.pt") == CARD
    torch.testing.assert_close(torch.load(tmp_path / "model.pt", weights_only=True), state)
    torch.testing.assert_close(torch.load(tmp_path / "model.pt", weights_only=True, mmap=True), state)
    (tmp_path / "other.pt").write_bytes(b"no zip")
    assert read_card(tmp_path / "other.pt") == read_card(tmp_path / "missing.pt") == {}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_classes": 2, "patch_size": [8, 8, 8], "spacing_mm": [-1, -1, -1], "x": 1}, []),
        ({"num_classes": 3}, ['num_classes is 3, but the weights were trained with 2: write --num_classes "2"']),
        (
            {"spacing_mm": [1, 1, 1]},
            ["spacing_mm is [1, 1, 1], but the weights were trained with None: write --spacing_mm '$None'"],
        ),
        ({"num_classes": 3, "patch_size": [16, 8, 8]}, ["num_classes is 3", "patch_size is [16, 8, 8]"]),
    ],
)
def test_settings_that_contradict(settings, told):
    found = compare_with_card(CARD, settings)
    assert len(found) == len(told) and all(one.startswith(start) for one, start in zip(found, told, strict=True))
    assert compare_with_card({}, settings) == []


@pytest.fixture
def items(tmp_path):
    found = []
    for number, (step, side) in enumerate([(1.0, 3), (1.5, 4), (1.2, 5)]):
        label = np.zeros((10, 12, 8), np.uint8)
        label[2 : 2 + side, 2:5, 2:5] = 1
        for name, voxels in (("image", label.astype(np.float32)), ("label", label)):
            nib.save(nib.Nifti1Image(voxels, np.diag([-step, step, 2.0, 1])), tmp_path / f"{name}{number}.nii.gz")
        found.append({key: str(tmp_path / f"{key}{number}.nii.gz") for key in ("image", "label")})
    return [*found, {"image": str(tmp_path / "missing.nii.gz")}]


def test_cohort(items):
    cohort = cohort_of(items, 2)
    assert cohort["volumes"] == 3
    np.testing.assert_allclose(cohort["spacing_mm"], [[1, 1, 2], [1.5, 1.5, 2]])
    np.testing.assert_allclose(cohort["size_mm"], [[10, 12, 16], [15, 18, 16]])
    np.testing.assert_allclose(cohort["ml"]["1"], [3 * 9 * 2 / 1000, 4 * 9 * 1.5**2 * 2 / 1000])
    assert cohort_of(items, 1)["ml"] == {}  # a label of other classes
    assert cohort_of([]) == {}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, []),
        (
            {"spacing_mm": [1.2, 1.2, 5.0]},
            ["voxels of 1.2 x 1.2 x 5 mm, unlike the training's 1 x 1 x 2 to 1.5 x 1.5 x 2"],
        ),
        ({"size_mm": [200.0, 200.0, 150.0]}, ["an image of 200 x 200 x 150 mm"]),
        ({"ml": 19.0}, ["class 1: 19 ml, where the training had 0.054 to 0.162"]),
        ({"ml": 0.0}, []),  # told as empty
    ],
)
def test_what_is_unlike_the_training(items, change, told):
    grid = {"spacing_mm": [1.2, 1.2, 2.0], "size_mm": [12.0, 14.0, 16.0]} | change
    found = outside_of(cohort_of(items), grid, {"1": change.get("ml", 0.1), "2": 5.0})
    assert len(found) == len(told) and all(one.startswith(start) for one, start in zip(found, told, strict=True))


def test_a_grid_is_told_along_the_patient():
    affine = np.array([[0, 0, 3.0, 0], [-2.0, 0, 0, 0], [0, 1.5, 0, 0], [0, 0, 0, 1]])
    assert grid_of((10, 20, 30), affine) == {"spacing_mm": [3.0, 2.0, 1.5], "size_mm": [90.0, 20.0, 30.0]}
