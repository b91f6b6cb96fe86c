"""Soft size: values, units, precision and refusals."""

import numpy as np
import pytest
import torch

from medconstraints.statistics import soft_size

SHAPES = {"2D": (2, 3, 9, 7), "3D": (2, 4, 5, 6, 7), "one voxel": (1, 2, 1, 1, 1)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_is_the_sum_of_each_channel(shape, rng):
    values = rng.random(shape)
    size = soft_size(torch.from_numpy(values))
    assert size.shape == (*shape[:2], 1)
    for sample in range(shape[0]):
        for channel in range(shape[1]):
            assert size[sample, channel, 0].item() == pytest.approx(values[sample, channel].sum(), rel=1e-12)


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ((0.5, 2.0, 3.0), [[72.0], [72.0]]),
        (torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]), [[24.0], [192.0]]),
    ],
    ids=["tuple", "one row per sample"],
)
def test_spacing_gives_mm(spacing, expected):
    assert soft_size(torch.ones(2, 1, 2, 3, 4), spacing)[..., 0].tolist() == expected


@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.float64, torch.float64),
        (torch.float16, torch.float32),
    ],
)
def test_half_precision_does_not_overflow(dtype, result):
    probs = torch.ones(1, 1, 300, 300, dtype=dtype, requires_grad=True)  # 90,000 > 65,504
    size = soft_size(probs)
    assert size.dtype == result and size.item() == 90_000
    size.sum().backward()
    assert probs.grad.dtype == dtype and (probs.grad == 1).all()


def test_autocast_changes_nothing(rng):
    probs = torch.from_numpy(rng.random((2, 3, 40, 41))).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = soft_size(probs, (0.7, 1.3))
    assert inside.dtype == torch.float32 and torch.equal(inside, soft_size(probs, (0.7, 1.3)))


def test_float32_keeps_its_digits_in_a_large_volume(rng):
    probs = rng.random((1, 1, 256, 256, 64), dtype=np.float32)
    exact = probs.sum(dtype=np.float64)
    assert soft_size(torch.from_numpy(probs)).item() == pytest.approx(exact, rel=1e-6)


def test_gradient(rng):
    probs = torch.from_numpy(rng.random((2, 2, 3, 4))).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: soft_size(p, (0.5, 2.0)), probs)


def test_flip_and_class_permutation(rng):
    probs = torch.from_numpy(rng.random((2, 3, 4, 5, 6)))
    torch.testing.assert_close(soft_size(probs.flip(2, 4)), soft_size(probs))
    assert torch.equal(soft_size(probs[:, [2, 0, 1]]), soft_size(probs)[:, [2, 0, 1]])


@pytest.mark.parametrize(
    ("probs", "words"),
    [
        (torch.ones(2, 3), "probs: expected a floating point tensor"),
        (torch.ones(1, 2, 4, 4, dtype=torch.int64), "got torch.int64 of shape .*apply softmax first"),
    ],
)
def test_refuses_what_is_no_probability_map(probs, words):
    with pytest.raises(ValueError, match=words):
        soft_size(probs)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, -2.0), torch.ones(3, 2)])
def test_refuses_a_spacing_that_does_not_fit(spacing):
    with pytest.raises(ValueError, match="spacing_mm: expected 2 positive values, or one row of 2 for each of the 2"):
        soft_size(torch.ones(2, 1, 4, 4), spacing)
