"""Centroid, spread and moments: against the slow reference and scipy, symmetries, units, precision, empty classes."""

import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage

from medconstraints.statistics import soft_centroid, soft_moments, soft_size, soft_spread

SHAPES = {
    "2D": (2, 3, 6, 5),
    "3D": (2, 2, 4, 5, 3),
    "one voxel thick": (2, 2, 1, 6, 1),
}
STATISTICS = {"centroid": soft_centroid, "spread": soft_spread, "moments": soft_moments}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
statistics = pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS)
spacings = pytest.mark.parametrize("spacing", ["voxels", "tuple", "per sample"])


def random_probs(shape, rng):
    """Probabilities away from 0 and 1, double."""
    return torch.from_numpy(rng.uniform(0.05, 0.95, shape))


def spacing_of(kind, shape, rng):
    """None, one row or one row per sample."""
    dims = len(shape) - 2
    return {
        "voxels": None,
        "tuple": (0.5, 2.0, 3.0)[:dims],
        "per sample": torch.from_numpy(rng.uniform(0.3, 4, (shape[0], dims))),
    }[kind]


def numbers_of(spacing):
    """The spacing as the reference takes it."""
    return None if spacing is None else np.asarray(spacing)


def box_mask(shape, start, stop, dtype=torch.float32):
    """A batch of one sample and one class: 1 inside the box."""
    mask = torch.zeros(1, 1, *shape, dtype=dtype)
    mask[(0, 0, *(slice(a, b) for a, b in zip(start, stop, strict=True)))] = 1
    return mask


# Values


@spacings
@shapes
@pytest.mark.parametrize("name", STATISTICS)
def test_equals_the_reference(name, shape, spacing, rng, constraint_reference):
    probs, spacing = random_probs(shape, rng), spacing_of(spacing, shape, rng)
    value = STATISTICS[name](probs, spacing)
    expected = getattr(constraint_reference, name)(probs.numpy(), numbers_of(spacing))
    assert value.shape == expected.shape and value.dtype == torch.float64
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(9, 8), (6, 7, 8)], ids=["2D", "3D"])
def test_one_hot_masks_have_the_centroid_of_scipy(shape, rng):
    labels = rng.integers(0, 3, (2, *shape))
    masks = np.stack([labels == k for k in range(3)], 1)
    centroid = soft_centroid(torch.from_numpy(masks).float())
    for sample in range(2):
        for channel in range(3):
            expected = ndimage.center_of_mass(masks[sample, channel])
            assert centroid[sample, channel].tolist() == pytest.approx(expected, rel=1e-5)


def test_a_box_by_hand():
    """Voxels 2..5 and 7: the centroid is 3.5 and 7, the deviation that of 4 and of 1 points."""
    mask = box_mask((9, 10), (2, 7), (6, 8))
    assert soft_centroid(mask).flatten().tolist() == pytest.approx([3.5, 7.0])
    assert soft_spread(mask).flatten().tolist() == pytest.approx([math.sqrt(15 / 12), 0.0], abs=1e-3)
    assert soft_moments(mask, (0.5, 2.0)).flatten().tolist() == pytest.approx([4.0, 1.75, 14.0])


@pytest.mark.parametrize("axis", [0, 2])
def test_a_plane_lies_at_its_coordinate(axis):
    for place in (0, 3):
        mask = torch.zeros(1, 1, 4, 5, 6)
        mask.select(2 + axis, place).fill_(1)
        expected = [1.5, 2.0, 2.5]
        expected[axis] = place
        assert soft_centroid(mask).flatten().tolist() == pytest.approx(expected)


def test_moments_are_the_size_and_the_centroid(rng):
    probs, spacing = random_probs((2, 2, 4, 5, 3), rng), (0.5, 2.0, 3.0)
    both = torch.cat([soft_size(probs, spacing), soft_centroid(probs, spacing)], -1)
    torch.testing.assert_close(soft_moments(probs, spacing), both)


# Symmetries


@pytest.mark.parametrize("dims", [(2,), (2, 3, 4)])
def test_flip(dims, rng):
    probs = random_probs((2, 2, 4, 5, 6), rng)
    expected = soft_centroid(probs)
    for dim in dims:
        expected[..., dim - 2] = probs.shape[dim] - 1 - expected[..., dim - 2]
    torch.testing.assert_close(soft_centroid(probs.flip(dims)), expected)
    torch.testing.assert_close(soft_spread(probs.flip(dims)), soft_spread(probs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_translation(dtype, rng):
    """A small object far from the origin: E[x^2] - E[x]^2 would lose its digits."""
    small = random_probs((1, 2, 5, 6), rng).to(dtype)
    there = torch.nn.functional.pad(small, (700, 20, 900, 10))
    tight = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    shifted = soft_centroid(small) + torch.tensor([900, 700], dtype=dtype)
    torch.testing.assert_close(soft_centroid(there), shifted, **tight)
    torch.testing.assert_close(soft_spread(there), soft_spread(small), **tight)


@statistics
def test_transposed_axes(statistic, rng):
    probs = random_probs((2, 2, 4, 5, 6), rng)
    value, other = statistic(probs), statistic(probs.permute(0, 1, 4, 3, 2))
    first = value.shape[-1] - 3  # the size comes before the coordinates
    torch.testing.assert_close(other, torch.cat([value[..., :first], value[..., first:].flip(-1)], -1))


@statistics
def test_class_permutation(statistic, rng):
    probs = random_probs((2, 3, 6, 5), rng)
    torch.testing.assert_close(statistic(probs[:, [2, 0, 1]]), statistic(probs)[:, [2, 0, 1]])


@statistics
def test_samples_are_independent(statistic, rng):
    probs, spacing = random_probs((3, 2, 6, 5), rng), torch.from_numpy(rng.uniform(0.3, 4, (3, 2)))
    whole = statistic(probs.requires_grad_(), spacing)
    for sample in range(3):
        alone = statistic(probs[sample : sample + 1], spacing[sample : sample + 1])
        torch.testing.assert_close(whole[sample : sample + 1], alone)
    (slope,) = torch.autograd.grad(whole[1].sum(), probs)
    assert (slope[[0, 2]] == 0).all() and (slope[1] != 0).any()


@pytest.mark.parametrize("statistic", [soft_centroid, soft_spread])
def test_follows_the_spacing(statistic, rng):
    probs = random_probs((2, 2, 4, 5, 3), rng)
    torch.testing.assert_close(statistic(probs, (1.5, 1.5, 1.5)), 1.5 * statistic(probs))
    factors = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(statistic(probs, factors), factors * statistic(probs))


@pytest.mark.parametrize("statistic", [soft_centroid, soft_spread])
def test_does_not_depend_on_the_mass(statistic, rng):
    probs = random_probs((2, 2, 6, 5), rng).float()
    torch.testing.assert_close(statistic(probs * 1e-3), statistic(probs), rtol=1e-4, atol=1e-4)


# Empty, full, one voxel


@statistics
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_empty_class_is_finite(statistic, dtype):
    probs, spacing = torch.zeros(2, 2, 6, 5, dtype=dtype), (0.5, 2.0)
    probs[0, 1, 2:4, 1:3] = 1  # an empty class beside a class, and an empty sample
    probs.requires_grad_()
    value = statistic(probs, spacing)
    value.sum().backward()
    assert value.isfinite().all() and probs.grad.isfinite().all()
    alone = statistic(probs[:1, 1:].detach(), spacing)
    torch.testing.assert_close(value[:1, 1:].detach(), alone)


@statistics
@pytest.mark.parametrize("mass", [1e-30, 1e-6])
def test_a_nearly_empty_class_is_finite(statistic, mass):
    probs = torch.full((1, 1, 6, 5), mass, requires_grad=True)
    value = statistic(probs)
    value.sum().backward()
    assert value.isfinite().all() and probs.grad.isfinite().all()
    assert (value >= 0).all() and (value[..., -2:] <= 5).all()  # a coordinate never leaves the image


@statistics
def test_one_voxel_is_finite(statistic):
    """No spread at all: the slope of the root must not be infinite."""
    probs = torch.zeros(1, 1, 6, 5)
    probs[0, 0, 4, 2] = 1
    probs.requires_grad_()
    value = statistic(probs)
    value.sum().backward()
    assert probs.grad.isfinite().all()
    expected = [0.0, 0.0] if statistic is soft_spread else [1.0, 4.0, 2.0][-value.shape[-1] :]
    assert value.flatten().tolist() == pytest.approx(expected, abs=1e-3)


# Gradients


@statistics
@pytest.mark.parametrize("shape", [(2, 2, 4, 3), (2, 1, 3, 2, 3)], ids=["2D", "3D"])
def test_gradcheck(statistic, shape, rng):
    probs, spacing = random_probs(shape, rng).requires_grad_(), spacing_of("per sample", shape, rng)
    assert torch.autograd.gradcheck(lambda p: statistic(p, spacing), probs)


@statistics
def test_gradgradcheck(statistic, rng):
    probs = random_probs((2, 1, 3, 3), rng).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda p: statistic(p, (0.5, 2.0)), probs)


def test_slope_of_the_centroid(rng):
    """(x_p - c) / mass."""
    probs = random_probs((1, 1, 5, 4), rng).requires_grad_()
    centroid = soft_centroid(probs)
    (slope,) = torch.autograd.grad(centroid[0, 0, 0], probs)
    rows = torch.arange(5, dtype=torch.float64).view(5, 1)
    expected = (rows - centroid[0, 0, 0].detach()) / probs.detach().sum()
    torch.testing.assert_close(slope[0, 0], expected.expand(5, 4))


# Precision


@statistics
def test_half_precision_does_not_overflow(statistic):
    """Mass 10,000 at coordinates up to 199: their sum is far above 65,504."""
    probs = box_mask((200, 180), (100, 80), (200, 180), torch.float16).requires_grad_()
    value = statistic(probs)
    value.sum().backward()
    deviation = math.sqrt((100**2 - 1) / 12)
    expected = [deviation, deviation] if statistic is soft_spread else [10_000, 149.5, 129.5][-value.shape[-1] :]
    assert value.dtype == torch.float32
    assert value.flatten().tolist() == pytest.approx(expected, rel=1e-5)
    assert probs.grad.dtype == torch.float16 and probs.grad.isfinite().all()


@pytest.mark.slow
@statistics
def test_half_precision_of_a_large_volume(statistic):
    """Two classes in 512 x 512 x 200: a box, and all voxels at 1/2."""
    shape, start, stop = (512, 512, 200), (100, 20, 50), (500, 300, 190)
    probs = torch.cat(
        [torch.full((1, 1, *shape), 0.5, dtype=torch.float16), box_mask(shape, start, stop, torch.float16)], 1
    )
    probs.requires_grad_()
    value = statistic(probs)
    value.sum().backward()
    extents = [shape, tuple(b - a for a, b in zip(start, stop, strict=True))]
    centres = [[255.5, 255.5, 99.5], [(a + b - 1) / 2 for a, b in zip(start, stop, strict=True)]]
    sizes = [0.5 * math.prod(shape), math.prod(extents[1])]
    for channel in range(2):
        expected = [sizes[channel], *centres[channel]]
        if statistic is soft_spread:
            expected = [math.sqrt((n**2 - 1) / 12) for n in extents[channel]]
        own = value[0, channel].tolist()
        assert own == pytest.approx(expected[-len(own) :], rel=1e-5)
    assert value.dtype == torch.float32 and probs.grad.isfinite().all()


@statistics
def test_autocast_changes_nothing(statistic, rng):
    probs = random_probs((2, 3, 40, 41), rng).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = statistic(probs, (0.7, 1.3))
    assert inside.dtype == torch.float32 and torch.equal(inside, statistic(probs, (0.7, 1.3)))


@statistics
def test_float32_keeps_its_digits(statistic, rng):
    probs = torch.from_numpy(rng.random((1, 1, 128, 128, 64), dtype=np.float32))
    torch.testing.assert_close(statistic(probs).double(), statistic(probs.double()), rtol=1e-5, atol=0)


# Drop-in and refusals


@statistics
def test_a_meta_tensor_gives_a_plain_tensor(statistic, rng):
    probs = random_probs((2, 2, 6, 5), rng)
    value = statistic(MetaTensor(probs.clone()), MetaTensor(torch.tensor([0.5, 2.0])))
    assert type(value) is torch.Tensor and torch.equal(value, statistic(probs, torch.tensor([0.5, 2.0])))


@pytest.mark.parametrize("statistic", [soft_centroid, soft_spread])
@pytest.mark.parametrize(
    ("probs", "words"),
    [
        (torch.ones(2, 3), "probs: expected a floating point tensor"),
        (torch.ones(1, 2, 4, 4, dtype=torch.int64), "probs: expected a floating point .*got torch.int64 of shape"),
    ],
)
def test_refuses_what_is_no_probability_map(statistic, probs, words):
    with pytest.raises(ValueError, match=words):
        statistic(probs)


@statistics
@pytest.mark.parametrize("spacing", [(1.0,), (1.0, 0.0), (1.0, float("nan")), torch.ones(3, 2)])
def test_refuses_a_spacing_that_does_not_fit(statistic, spacing):
    with pytest.raises(ValueError, match="spacing_mm: expected 2 positive values, or one row of 2 for each of the 2"):
        statistic(torch.ones(2, 1, 4, 4), spacing)
