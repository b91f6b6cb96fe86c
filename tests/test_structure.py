"""Pieces, holes, and what should enclose what, in two and three dimensions."""

import numpy as np
import pytest

from medconstraints.structure import structure_of


def ring(gap=False, dims=2):
    """A square of class 1 around one of class 2; with a gap class 2 reaches the background."""
    label = np.zeros([9] * dims, int)
    label[(slice(1, 8),) * dims] = 1
    label[(slice(3, 6),) * dims] = 2
    if gap:
        label[(slice(1, 3), *[slice(3, 6)] * (dims - 1))] = 0
    return label


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("gap", "implausible"), [(False, 0.0), (True, 1.0)])
def test_enclosure(dims, gap, implausible):
    found = structure_of(ring(gap, dims), 3, enclosed=[[2, 1]])
    assert found == {"pieces": 0.0, "holes": 0.0, "implausible": implausible}


@pytest.mark.parametrize("dims", [2, 3])
def test_pieces_and_holes(dims):
    label = ring(dims=dims)
    label[(0,) * dims] = 1  # touches at a corner: no piece of its own
    assert structure_of(label, 3) == {"pieces": 0.0, "holes": 0.0}
    label[(0,) * dims], label[(0, 8) + (8,) * (dims - 2)] = 0, 2
    label[(4,) * dims] = 0
    assert structure_of(label, 3) == {"pieces": 1.0, "holes": 1.0}


def test_a_class_that_is_absent_breaks_nothing():
    assert structure_of(np.zeros((4, 4)), 3, enclosed=[[2, 1]]) == {"pieces": 0.0, "holes": 0.0, "implausible": 0.0}


def test_bad_input():
    with pytest.raises(ValueError, match="expected class numbers 0 to 1"):
        structure_of(ring(), 2)
    with pytest.raises(ValueError, match="pairs"):
        structure_of(ring(), 3, enclosed=[[5, 1]])
