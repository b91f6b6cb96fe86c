"""Changes of intensity: what 0 does, references, gradients."""

import colorsys

import numpy as np
import pytest
import torch
from scipy import ndimage

from medconstraints.augmentation import blurred, gamma_corrected, recoloured, shifted

ZERO = torch.zeros(2, dtype=torch.float64)
FUNCTIONS = {
    "contrast": lambda x, v: shifted(x, v, ZERO),
    "brightness": lambda x, v: shifted(x, ZERO, v),
    "gamma": gamma_corrected,
    "blur": lambda x, v: blurred(x, v, torch.ones(2, 2).double(), largest_mm=2.0),
    "saturation": lambda x, v: recoloured(x, v, ZERO),
    "hue": lambda x, v: recoloured(x, ZERO, 30 * v),
}


@pytest.fixture
def image():
    torch.manual_seed(0)
    return torch.rand(2, 3, 9, 8, dtype=torch.float64)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_zero_changes_nothing_and_gradients_are_right(function, image):
    torch.testing.assert_close(function(image, ZERO), image, rtol=0, atol=2e-4)
    value = torch.tensor([0.6, -0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (image.requires_grad_(), value), atol=1e-4)


def test_contrast_gamma_and_brightness(image):
    value = torch.tensor([np.log(0.4), 0.0], dtype=torch.float64)
    changed = shifted(image, value, torch.tensor([1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(changed, torch.stack([image[0] * 0.4 + 1.0, image[1]]))
    low, high = image[0].min(), image[0].max()
    corrected = gamma_corrected(image, torch.tensor([np.log(2.0), 0.0], dtype=torch.float64))
    torch.testing.assert_close(corrected[0], low + (image[0] - low) ** 2 / (high - low), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
def test_blur_equals_scipy_with_spacings(dims, rng):
    volume, spacing = rng.standard_normal((12, 13, 14)[:dims]), (0.5, 1.0, 0.8)[:dims]
    found = blurred(
        torch.tensor(volume)[None, None],
        torch.tensor([-0.7]).double(),
        torch.tensor([spacing]).double(),
        largest_mm=1.0,
    )
    sigmas = [0.7 / step for step in spacing]
    radius = [int(np.ceil(2.5 / step)) for step in spacing]
    expected = ndimage.gaussian_filter(volume, sigmas, mode="nearest", radius=radius)
    np.testing.assert_allclose(found[0, 0], expected, atol=1e-5)


def test_hue_turns_and_saturation_fades():
    red = torch.tensor([0.8, 0.3, 0.3]).reshape(1, 3, 1, 1)
    turned = recoloured(red, torch.zeros(1), torch.tensor([120.0])).flatten()
    assert colorsys.rgb_to_hsv(*turned.tolist())[0] == pytest.approx(2 / 3, abs=0.12)
    grey = recoloured(red, torch.tensor([-20.0]), torch.zeros(1)).flatten()
    torch.testing.assert_close(grey, torch.full((3,), 0.299 * 0.8 + 0.701 * 0.3), rtol=0, atol=1e-5)
