"""A file of weights says which settings it needs and what its classes are called, and stays a file of weights."""

import numpy as np
import pytest
import torch
from torch import nn

from medconstraints.data.weights_card import class_names_of, compare_with_card, read_card, write_card
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


def test_names_of_the_classes(tmp_path):
    for name, card in (("named.pt", {**CARD, "class_names": {"1": "knee"}}), ("plain.pt", CARD)):
        torch.save({}, tmp_path / name)
        write_card(tmp_path / name, card)
    assert class_names_of(tmp_path / "named.pt") == {"1": "knee"}
    assert class_names_of(tmp_path / "plain.pt") is class_names_of(tmp_path / "missing.pt") is None


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


def test_a_grid_is_told_along_the_patient():
    affine = np.array([[0, 0, 3.0, 0], [-2.0, 0, 0, 0], [0, 1.5, 0, 0], [0, 0, 0, 1]])
    assert grid_of((10, 20, 30), affine) == {"spacing_mm": [3.0, 2.0, 1.5], "size_mm": [90.0, 20.0, 30.0]}
