"""Warps against scipy, and what they must keep."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from medconstraints.augmentation import affine_matrix, sampling_grid, warp


def zeros(dims):
    return torch.zeros(1, dims * (dims - 1) // 2), torch.zeros(1, dims)


@pytest.mark.parametrize("dims", [2, 3])
def test_zeros_change_nothing(dims):
    volume = torch.randn(2, 3, *range(5, 5 + dims), dtype=torch.float64)
    planes, axes = (part.double().expand(2, -1) for part in zeros(dims))
    matrix = affine_matrix(planes, axes, planes)
    torch.testing.assert_close(matrix, torch.eye(dims, dtype=torch.float64).expand(2, -1, -1))
    grid = sampling_grid(volume.shape[2:], torch.ones(2, dims).double(), matrix=matrix, translation_mm=axes)
    torch.testing.assert_close(warp(volume, grid), volume, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dims", [2, 3])
def test_equals_scipy_with_spacings_that_differ(dims, rng):
    shape, spacing = (9, 11, 8)[:dims], np.array([0.5, 1.25, 2.0])[:dims]
    volume = rng.standard_normal(shape)
    count = dims * (dims - 1) // 2
    turn, shear = rng.uniform(-20, 20, count), rng.uniform(-0.2, 0.2, count)
    scale, shift = rng.uniform(-0.2, 0.2, dims), rng.uniform(-1, 1, dims)
    matrix = affine_matrix(*(torch.tensor(value)[None] for value in (turn, scale, shear)))
    grid = sampling_grid(shape, torch.tensor(spacing)[None], matrix=matrix, translation_mm=torch.tensor(shift)[None])
    found = warp(torch.tensor(volume)[None, None], grid)[0, 0].numpy()
    to_mm, centre = np.diag(spacing), (np.array(shape) - 1) / 2
    voxel = np.linalg.inv(to_mm) @ matrix[0].numpy() @ to_mm
    offset = centre - voxel @ centre + shift / spacing
    expected = ndimage.affine_transform(volume, voxel, offset=offset, order=1, mode="nearest")
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_rotation_keeps_lengths_and_opposite_values_undo_each_other():
    turn, scale, shear = torch.tensor([[25.0, -40.0, 60.0]]), torch.tensor([[0.1, -0.2, 0.3]]), torch.full((1, 3), 0.1)
    rotation = affine_matrix(turn, 0 * scale, 0 * shear)[0]
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(3), rtol=0, atol=1e-6)
    there, back = affine_matrix(turn, scale, shear), affine_matrix(-turn, -scale, -shear)
    torch.testing.assert_close((there @ back)[0], torch.eye(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.linalg.det(there)[0].log(), scale.sum())


def test_a_displacement_in_mm_moves_by_voxels_of_the_spacing():
    volume = torch.arange(12.0).reshape(1, 1, 3, 4)
    displacement = torch.zeros(1, 2, 2, 2)
    displacement[:, 1] = 1.0  # 1 mm along the second axis, whose voxels have 0.5 mm
    grid = sampling_grid(
        (3, 4),
        torch.tensor([[2.0, 0.5]]),
        matrix=torch.eye(2)[None],
        translation_mm=torch.zeros(1, 2),
        displacement_mm=displacement,
    )
    expected = volume[..., [2, 3, 3, 3]]
    torch.testing.assert_close(warp(volume, grid), expected)


def test_one_hot_labels_stay_distributions_with_a_gradient():
    label = torch.nn.functional.one_hot(torch.randint(3, (2, 6, 7)), 3).movedim(-1, 1).double()
    shift = torch.full((2, 2), 0.3, dtype=torch.float64, requires_grad=True)
    matrix = torch.eye(2).double().expand(2, -1, -1)
    warped = warp(label, sampling_grid((6, 7), torch.ones(2, 2).double(), matrix=matrix, translation_mm=shift))
    torch.testing.assert_close(warped.sum(1), torch.ones(2, 6, 7).double())
    (warped[:, 1] * torch.randn(2, 6, 7).double()).sum().backward()
    assert shift.grad.abs().min() > 0


@pytest.mark.parametrize("dims", [2, 3])
def test_gradients(dims):
    torch.manual_seed(1)
    volume = torch.randn(2, 1, *range(4, 4 + dims), dtype=torch.float64)
    spacing = torch.rand(2, dims, dtype=torch.float64) + 0.5
    count = dims * (dims - 1) // 2

    def value(turn, scale, shear, shift, displacement):
        matrix = affine_matrix(turn, scale, shear)
        shape = volume.shape[2:]
        return warp(
            volume,
            sampling_grid(shape, spacing, matrix=matrix, translation_mm=shift, displacement_mm=displacement),
        )

    sizes = [(2, count), (2, dims), (2, count), (2, dims), (2, dims, *[2] * dims)]
    given = [0.1 * torch.randn(size, dtype=torch.float64) for size in sizes]
    assert torch.autograd.gradcheck(value, [part.requires_grad_() for part in given], eps=1e-7, atol=1e-4)
