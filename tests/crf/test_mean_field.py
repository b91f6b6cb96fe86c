"""Mean field of the dense CRF: against a reference without lattice, pydensecrf2, and what must not change it."""

import numpy as np
import pytest
import torch

from medconstraints.crf import bilateral_features, dense_crf, spatial_features


def all_pairs(probabilities, image, iterations, widths, weights, spacing):
    """The same inference with sums over all pairs of voxels, in double precision."""
    places = spatial_features(image.shape[1:], spacing).double()
    tones = (image - image.min()) / (image.max() - image.min())
    features = [
        places / widths[0],
        torch.cat([places / widths[1], tones.flatten(1).T.double() / widths[2]], 1),
    ]
    kernels = []
    for one in features:
        kernel = torch.exp(-0.5 * torch.cdist(one, one).square())
        root = kernel.sum(1).rsqrt()
        kernels.append(root[:, None] * kernel * root)
    evidence = probabilities.flatten(1).T.double().clamp(min=1e-5).log()
    beliefs = evidence.softmax(1)
    for _ in range(iterations):
        message = sum(weight * kernel @ beliefs for weight, kernel in zip(weights, kernels, strict=True))
        beliefs = (evidence + message).softmax(1)
    return beliefs.T.reshape(probabilities.shape)


def noisy_disc(shape, classes=2):
    """An image of nested discs, and probabilities that guess them badly."""
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, size) for size in shape], indexing="ij"))
    label = sum((grid.norm(dim=0) < radius).long() for radius in torch.linspace(0.7, 0.3, classes - 1).tolist())
    image = label[None].float() + 0.1 * torch.randn(1, *shape)
    logits = torch.nn.functional.one_hot(label, classes).movedim(-1, 0) * 1.0 + torch.randn(classes, *shape)
    return label, image, logits.softmax(0)


@pytest.mark.parametrize("shape", [(20, 24), (9, 10, 8)])
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("spacing", [None, "mm"])
def test_against_all_pairs(shape, classes, spacing):
    spacing = (1.0, 2.0, 1.5)[: len(shape)] if spacing else None
    _, image, probabilities = noisy_disc(shape, classes)
    widths, weights = (1.0, 4.0, 0.2), (1.0, 3.0)
    expected = all_pairs(probabilities, image, 3, widths, weights, spacing)
    options = {"spatial_sigma": 1.0, "sigma": 4.0, "intensity_sigma": 0.2, "spatial_weight": 1.0, "weight": 3.0}
    found = dense_crf(probabilities[None], image[None], iterations=3, spacing_mm=spacing, **options)[0]
    assert (found.argmax(0) == expected.argmax(0)).float().mean() > 0.98
    assert (found - expected).abs().mean() < 0.03


@pytest.mark.parametrize("shape", [(48, 40), (12, 14, 10)])
def test_it_mends_a_noisy_guess(shape):
    label, image, probabilities = noisy_disc(shape)
    found = dense_crf(probabilities[None], image[None])[0]
    assert (found.argmax(0) == label).float().mean() > 0.97 > (probabilities.argmax(0) == label).float().mean()
    torch.testing.assert_close(found.sum(0), torch.ones(shape))


def test_as_pydensecrf():
    densecrf = pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 needs a compiler: install it to compare")
    utils = pytest.importorskip("pydensecrf.utils")
    label, image, probabilities = noisy_disc((96, 80), 3)
    tones = ((image - image.min()) / (image.max() - image.min()) * 255)[0].numpy()
    crf = densecrf.DenseCRF2D(label.shape[1], label.shape[0], 3)
    crf.setUnaryEnergy(np.ascontiguousarray(utils.unary_from_softmax(probabilities.numpy())).astype(np.float32))
    crf.addPairwiseGaussian(sxy=1, compat=3)
    bilateral = utils.create_pairwise_bilateral((10, 10), (20,), tones[..., None].astype(np.float32), chdim=2)
    crf.addPairwiseEnergy(bilateral, compat=10)
    expected = np.array(crf.inference(5)).reshape(3, *label.shape)
    found = dense_crf(probabilities[None], image[None])[0].numpy()
    assert (found.argmax(0) == expected.argmax(0)).mean() >= 0.999


def test_a_flip_or_other_names_of_the_classes_change_nothing():
    _, image, probabilities = noisy_disc((24, 24), 3)
    found = dense_crf(probabilities[None], image[None])
    flipped = dense_crf(probabilities[None].flip(2), image[None].flip(2)).flip(2)
    assert (found - flipped).abs().mean() < 0.02  # the lattice has no mirror symmetry of its own
    torch.testing.assert_close(dense_crf(probabilities[None, [2, 0, 1]], image[None]), found[:, [2, 0, 1]])
    torch.testing.assert_close(dense_crf(probabilities[None], 5 + 3 * image[None]), found, atol=1e-3, rtol=1e-3)


def test_images_of_a_batch_do_not_mix():
    pairs = [noisy_disc((16, 16))[1:] for _ in range(2)]
    images, guesses = (torch.stack(one) for one in zip(*pairs, strict=True))
    both = dense_crf(guesses, images)
    torch.testing.assert_close(both[1:], dense_crf(guesses[1:], images[1:]))


def test_gradients_reach_the_probabilities():
    _, image, probabilities = noisy_disc((6, 6))
    step, direction = 1e-2, torch.randn(2, 6, 6)
    free = probabilities.clone().requires_grad_()
    options = {"iterations": 2, "weight": 1.0, "spatial_weight": 0.5}
    value = (dense_crf(free[None], image[None], **options)[0] * direction).sum()
    [gradient] = torch.autograd.grad(value, free)
    shift = torch.randn_like(probabilities) * probabilities * 0.1
    ends = [
        (dense_crf((probabilities + sign * step * shift)[None], image[None], **options)[0] * direction).sum()
        for sign in (1, -1)
    ]
    assert (gradient * shift).sum().item() == pytest.approx(((ends[0] - ends[1]) / (2 * step)).item(), rel=0.02)


def test_a_constant_image_leaves_the_place_alone():
    _, _, probabilities = noisy_disc((12, 12))
    image = torch.full((1, 12, 12), 3.0)
    features = bilateral_features(image, sigma=2.0, intensity_sigma=0.1)
    torch.testing.assert_close(features, spatial_features((12, 12)) / 2)
    assert torch.isfinite(dense_crf(probabilities[None], image[None])).all()


def test_certain_probabilities_and_no_iterations():
    _, image, probabilities = noisy_disc((8, 8))
    sure = torch.nn.functional.one_hot(probabilities.argmax(0), 2).movedim(-1, 0).float()
    assert torch.isfinite(dense_crf(sure[None], image[None])).all()
    torch.testing.assert_close(dense_crf(probabilities[None], image[None], iterations=0)[0], probabilities)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spacing_mm": (0.0, 1.0)}, "spacing"),
        ({"sigma": 0}, "sigma"),
        ({"intensity_sigma": -1}, "intensity_sigma"),
        ({"iterations": -1}, "iterations"),
        ({"image": torch.rand(1, 1, 8, 9)}, r"image: expected the shape \(8, 8\)"),
        ({"image": torch.rand(2, 1, 8, 8)}, "probabilities, image"),
        ({"image": torch.full((1, 1, 8, 8), torch.nan)}, "image: expected finite intensities"),
        ({"probabilities": torch.full((1, 2, 8, 8), torch.nan)}, "probabilities: expected finite"),
    ],
)
def test_bad_input(options, message):
    given = {"probabilities": torch.rand(1, 2, 8, 8).softmax(1), "image": torch.rand(1, 1, 8, 8)} | options
    with pytest.raises(ValueError, match=message):
        dense_crf(**given)
