"""Lattice filtering against sums over all pairs of points."""

import pytest
import torch

from medconstraints.crf import PermutohedralLattice
from medconstraints.crf.mean_field import bilateral_kernel


def pairwise(features):
    """The exact Gaussian, (N, N)."""
    return torch.exp(-0.5 * torch.cdist(features, features).square())


@pytest.mark.parametrize(("dims", "least"), [(1, 0.02), (2, 0.03), (3, 0.05), (5, 0.15)])
@pytest.mark.parametrize("extent", [1.0, 6.0])
def test_against_all_pairs(dims, least, extent):
    """With normalisation, under which the lattice's constant factor does not matter; coarser in more dimensions."""
    features, values = extent * torch.rand(300, dims), torch.rand(300, 2)
    kernel = pairwise(features)
    root = kernel.sum(1, keepdim=True).rsqrt()
    found = bilateral_kernel(features)(values)
    error = (found - root * (kernel @ (root * values))).abs().mean() / found.mean()
    assert error < least


@pytest.mark.parametrize("dims", [2, 4])
def test_the_backward_pass_is_the_transpose(dims):
    lattice = PermutohedralLattice(4 * torch.rand(200, dims))
    values = torch.rand(200, 3, requires_grad=True)
    direction = torch.rand(200, 3)
    (lattice.filter(values) * direction).sum().backward()
    basis = torch.eye(200)
    matrix = lattice.filter(basis)  # column j is what the j-th point gives to all
    torch.testing.assert_close(values.grad, matrix.T @ direction, rtol=1e-4, atol=1e-4)


def test_points_at_one_place_and_far_apart():
    assert PermutohedralLattice(torch.ones(4, 3)).filter(torch.arange(4.0)[:, None]).std() < 1e-6
    far = PermutohedralLattice(torch.tensor([[0.0, 0.0], [50.0, 0.0]]))
    found = far.filter(torch.tensor([[1.0], [0.0]]))
    assert found[0] > 0.3 and found[1] == 0


def test_order_and_place_of_the_points_do_not_matter():
    features, values = 3 * torch.rand(100, 3), torch.rand(100, 1)
    found = PermutohedralLattice(features).filter(values)
    order = torch.randperm(100)
    torch.testing.assert_close(PermutohedralLattice(features[order]).filter(values[order]), found[order])


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.rand(3), r"expected \(N, d\)"),
        (torch.empty(0, 2), r"expected \(N, d\)"),
        (torch.tensor([[0.0, torch.nan]]), "expected finite positions"),
        (1e6 * torch.rand(4, 5), "too many to number"),
    ],
)
def test_bad_features(features, message):
    with pytest.raises(ValueError, match=message):
        PermutohedralLattice(features)


def test_values_of_other_points():
    with pytest.raises(ValueError, match=r"values: expected \(5, C\)"):
        PermutohedralLattice(torch.rand(5, 2)).filter(torch.rand(4, 1))
