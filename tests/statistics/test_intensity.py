"""Mean intensity and fractions (eq. 2.8): slow reference and scipy, symmetries, precision, empty classes."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage

from medconstraints.statistics import soft_fraction, soft_mean_intensity

SHAPES = {"2D": (2, 3, 6, 5), "3D": (2, 2, 4, 3, 3)}
STATISTICS = {"mean intensity": soft_mean_intensity, "fraction": soft_fraction}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
statistics = pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS)
components = pytest.mark.parametrize("components", [1, 3])


def random_probs(shape, rng):
    """Probabilities away from 0 and 1, double."""
    return torch.from_numpy(rng.uniform(0.05, 0.95, shape))


def random_maps(shape, components, rng):
    """M maps of each sample, double."""
    return torch.from_numpy(rng.normal(10, 30, (shape[0], components, *shape[2:])))


# Values


@components
@shapes
@statistics
def test_equals_the_reference(statistic, shape, components, rng, constraint_reference):
    probs, maps = random_probs(shape, rng), random_maps(shape, components, rng)
    value = statistic(probs, maps)
    assert value.shape == (*shape[:2], components) and value.dtype == torch.float64
    np.testing.assert_allclose(value.numpy(), constraint_reference.fraction(probs.numpy(), maps.numpy()), rtol=1e-9)


@shapes
def test_one_potential_serves_all_samples(shape, rng, constraint_reference):
    probs, maps = random_probs(shape, rng), random_maps(shape, 2, rng)[:1]
    expected = constraint_reference.fraction(probs.numpy(), maps.numpy())
    np.testing.assert_allclose(soft_fraction(probs, maps).numpy(), expected, rtol=1e-9)
    torch.testing.assert_close(soft_fraction(probs, maps), soft_fraction(probs, maps.expand(shape[0], *maps.shape[1:])))


def test_one_hot_masks_have_the_mean_of_scipy(rng):
    labels, image = rng.integers(0, 3, (9, 8)), rng.normal(100, 20, (9, 8))
    masks = torch.from_numpy(np.stack([labels == k for k in range(3)])[None]).float()
    value = soft_mean_intensity(masks, torch.from_numpy(image)[None, None].float())
    assert value.flatten().tolist() == pytest.approx(list(ndimage.mean(image, labels, [0, 1, 2])), rel=1e-5)


# Symmetries


@statistics
def test_flip_translation_and_order(statistic, rng):
    probs, maps = random_probs((2, 3, 6, 5), rng), random_maps((2, 3, 6, 5), 2, rng)
    value = statistic(probs, maps)
    torch.testing.assert_close(statistic(probs.flip(2, 3), maps.flip(2, 3)), value)
    torch.testing.assert_close(statistic(probs.roll((2, 1), (2, 3)), maps.roll((2, 1), (2, 3))), value)
    torch.testing.assert_close(statistic(probs[:, [2, 0, 1]], maps), value[:, [2, 0, 1]])
    torch.testing.assert_close(statistic(probs, maps.flip(1)), value.flip(2))
    torch.testing.assert_close(statistic(probs.transpose(2, 3), maps.transpose(2, 3)), value)


@statistics
def test_samples_are_independent(statistic, rng):
    probs, maps = random_probs((3, 2, 6, 5), rng), random_maps((3, 2, 6, 5), 2, rng)
    whole = statistic(probs.requires_grad_(), maps)
    for sample in range(3):
        own = slice(sample, sample + 1)
        torch.testing.assert_close(whole[own], statistic(probs[own], maps[own]))
    (slope,) = torch.autograd.grad(whole[1].sum(), probs)
    assert (slope[[0, 2]] == 0).all() and (slope[1] != 0).any()


@statistics
def test_an_affine_map_of_the_intensities(statistic, rng):
    probs, maps = random_probs((2, 2, 6, 5), rng), random_maps((2, 2, 6, 5), 2, rng)
    torch.testing.assert_close(statistic(probs, 3 * maps - 40), 3 * statistic(probs, maps) - 40)


@statistics
def test_does_not_depend_on_the_mass(statistic, rng):
    probs, maps = random_probs((2, 2, 6, 5), rng).float(), random_maps((2, 2, 6, 5), 2, rng).float()
    torch.testing.assert_close(statistic(probs * 1e-3, maps), statistic(probs, maps), rtol=1e-4, atol=1e-3)


# Empty classes


@statistics
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_empty_class_is_finite(statistic, dtype):
    probs = torch.zeros(2, 2, 6, 5, dtype=dtype)
    probs[0, 1, 2:4, 1:3] = 1
    probs.requires_grad_()
    value = statistic(probs, torch.full((2, 1, 6, 5), 100.0, dtype=dtype))
    value.sum().backward()
    assert value.isfinite().all() and probs.grad.isfinite().all()
    assert value[0, 1, 0].item() == pytest.approx(100)


@statistics
@pytest.mark.parametrize("mass", [1e-30, 1e-6])
def test_a_nearly_empty_class_stays_within_the_intensities(statistic, mass):
    probs = torch.full((1, 1, 6, 5), mass, requires_grad=True)
    value = statistic(probs, torch.full((1, 1, 6, 5), 100.0))
    value.sum().backward()
    assert 0 <= value.item() <= 100.001 and probs.grad.isfinite().all()


# Gradients and precision


@statistics
@pytest.mark.parametrize("shape", [(2, 2, 4, 3), (2, 1, 3, 2, 3)], ids=["2D", "3D"])
def test_gradcheck(statistic, shape, rng):
    probs = random_probs(shape, rng).requires_grad_()
    maps = (random_maps(shape, 2, rng) / 30).requires_grad_()
    assert torch.autograd.gradcheck(statistic, (probs, maps.detach()))
    assert torch.autograd.gradgradcheck(statistic, (probs, maps.detach()))


@statistics
def test_half_precision_does_not_overflow(statistic):
    """64,000 voxels of intensity 1024."""
    probs = torch.zeros(1, 2, 400, 200, dtype=torch.float16)
    probs[0, 1, 80:] = 1
    probs[0, 0, :80] = 1
    probs.requires_grad_()
    image = torch.full((1, 1, 400, 200), 1024, dtype=torch.float16)
    image[:, :, :240] = 512
    value = statistic(probs, image)
    value.sum().backward()
    assert value.dtype == torch.float32 and value[0, 1, 0].item() == pytest.approx(768, rel=1e-5)
    assert probs.grad.dtype == torch.float16 and probs.grad.isfinite().all()


@pytest.mark.slow
@statistics
def test_half_precision_of_a_large_volume(statistic):
    probs = torch.full((1, 2, 512, 512, 200), 0.5, dtype=torch.float16)
    probs[0, 1, :128] = 1
    probs.requires_grad_()
    image = torch.full((1, 1, 512, 512, 200), 1024, dtype=torch.float16)
    image[:, :, :128] = 512
    value = statistic(probs, image)
    value.sum().backward()
    assert value.dtype == torch.float32 and probs.grad.isfinite().all()
    assert value.flatten().tolist() == pytest.approx([896.0, (128 * 512 + 192 * 1024) / 320], rel=1e-5)


@statistics
def test_autocast_changes_nothing(statistic, rng):
    probs, maps = random_probs((2, 3, 40, 41), rng).float(), random_maps((2, 3, 40, 41), 1, rng).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = statistic(probs, maps)
    assert inside.dtype == torch.float32 and torch.equal(inside, statistic(probs, maps))


# Drop-in and refusals


@statistics
def test_meta_tensors_give_a_plain_tensor(statistic, rng):
    probs, maps = random_probs((2, 2, 6, 5), rng), random_maps((2, 2, 6, 5), 1, rng)
    for one, two in ((MetaTensor(probs), maps), (probs, MetaTensor(maps)), (MetaTensor(probs), MetaTensor(maps))):
        value = statistic(one, two)
        assert type(value) is torch.Tensor and torch.equal(value, statistic(probs, maps))


@statistics
@pytest.mark.parametrize(
    ("probs", "words"),
    [
        (torch.ones(2, 3), "probs: expected a floating point tensor"),
        (torch.ones(2, 2, 4, 4, dtype=torch.int64), "probs: expected a floating point .*got torch.int64 of shape"),
    ],
)
def test_refuses_what_is_no_probability_map(statistic, probs, words):
    with pytest.raises(ValueError, match=words):
        statistic(probs, torch.ones(2, 1, 4, 4))


@pytest.mark.parametrize(("name", "argument"), [("mean intensity", "image"), ("fraction", "potential")])
@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (3, 1, 4, 4), (2, 4, 4)])
def test_refuses_a_map_that_does_not_fit(name, argument, shape):
    with pytest.raises(ValueError, match=f"{argument}: expected .*got"):
        STATISTICS[name](torch.ones(2, 2, 4, 4), torch.ones(shape))
