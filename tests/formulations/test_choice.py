"""One formulation of several, by name."""

import pytest
import torch

from medconstraints.formulations import Lagrangian, QuadraticPenalty, chosen_formulation


def test_every_choice_is_a_copy_of_its_own():
    formulations = {"lagrangian": Lagrangian(2, learning_rate=1.0), "penalty": QuadraticPenalty()}
    one, two = (chosen_formulation(formulations, "lagrangian") for _ in range(2))
    one(torch.ones(1, 3), torch.tensor([1]))
    one.step()
    assert one.multipliers.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert two.multipliers.numel() == 0 and formulations["lagrangian"].multipliers.numel() == 0


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"formulation: expected one of \['a', 'b'\], got 'c'"):
        chosen_formulation({"b": QuadraticPenalty(), "a": QuadraticPenalty()}, "c")
