"""What is said of a mask agrees with counting."""

import numpy as np
import pytest
from scipy import ndimage

from medconstraints.volumes import mask_facts

AFFINE = np.array([[0.0, -1.5, 0.0, 7.0], [2.0, 0.0, 0.5, -3.0], [0.0, 0.0, 3.0, 1.0], [0.0, 0.0, 0.0, 1.0]])


def test_against_counting(rng):
    mask = np.where(ndimage.gaussian_filter(rng.random((14, 13, 12)), 1.5) > 0.52, 2, 0)
    mask[mask > 0] = rng.integers(2, 4, (mask > 0).sum())
    facts = mask_facts(mask, AFFINE)
    assert {*facts} == {"2", "3"}
    for value in (2, 3):
        places, found = np.argwhere(mask == value), facts[str(value)]
        assert found["voxels"] == len(places)
        assert found["ml"] == pytest.approx(len(places) * 9 / 1000)
        expected = (places @ AFFINE[:3, :3].T + AFFINE[:3, 3]).mean(0)
        np.testing.assert_allclose(found["centroid_mm"], expected, atol=1e-3)
        assert found["start"] == places.min(0).tolist() and found["stop"] == (places.max(0) + 1).tolist()
        assert found["pieces"] == ndimage.label(mask == value, np.ones((3, 3, 3)))[1]


@pytest.mark.parametrize(
    ("place", "shape", "expected"),
    [
        ((0, 2, 2), (5, 5, 5), True),
        ((4, 2, 2), (5, 5, 5), True),
        ((2, 2, 2), (5, 5, 5), False),
        ((2, 2, 0), (5, 5, 1), False),
    ],
)
def test_at_border(place, shape, expected):
    mask = np.zeros(shape, np.uint8)
    mask[place] = 1
    assert mask_facts(mask, np.eye(4))["1"]["at_border"] is expected


def test_classes_that_are_not_there_are_told_as_empty():
    facts = mask_facts(np.zeros((3, 3, 3), np.uint8), np.eye(4), classes={1: "left", 3: "right"})
    assert facts == {"left": {"value": 1, "voxels": 0, "ml": 0.0}, "right": {"value": 3, "voxels": 0, "ml": 0.0}}
    assert mask_facts(np.zeros((3, 3, 3), np.uint8), np.eye(4)) == {}
