"""The energy of the dense CRF as a loss, against sums over all pairs, alone and beside other losses."""

import pytest
import torch

from medconstraints.crf import bilateral_features
from medconstraints.losses import CombinedLoss, DenseCRFLoss, PartialCrossEntropyLoss


def energy(probs, image, sigma, intensity_sigma, spacing=None):
    features = bilateral_features(image, sigma=sigma, intensity_sigma=intensity_sigma, spacing_mm=spacing).double()
    kernel = torch.exp(-0.5 * torch.cdist(features, features).square())
    root = kernel.sum(1).rsqrt()
    kernel = root[:, None] * kernel * root
    values = probs.flatten(1).double()
    return sum((one @ kernel @ (1 - one)) for one in values) / values.shape[1]


@pytest.mark.parametrize(("shape", "spacing"), [((12, 14), None), ((12, 14), (1.0, 3.0)), ((6, 7, 8), None)])
def test_against_all_pairs(shape, spacing):
    probs, image = torch.rand(2, 3, *shape).softmax(1), torch.rand(2, 1, *shape)
    loss = DenseCRFLoss(sigma=3.0, intensity_sigma=0.3, spacing_mm=spacing, downsample=1)
    expected = sum(energy(one, picture, 3.0, 0.3, spacing) for one, picture in zip(probs, image, strict=True)) / 2
    assert loss(probs, image).item() == pytest.approx(expected.item(), rel=0.05)


def test_means_of_voxels_are_looked_at():
    probs, image = torch.rand(1, 2, 12, 14, 10).softmax(1), torch.rand(1, 1, 12, 14, 10)
    pooled = [torch.nn.functional.avg_pool3d(one, 2) for one in (probs, image)]
    found = DenseCRFLoss(sigma=4.0, intensity_sigma=0.3, downsample=2)(probs, image)
    torch.testing.assert_close(found, DenseCRFLoss(sigma=2.0, intensity_sigma=0.3, downsample=1)(*pooled))


def test_the_gradient_is_that_of_the_loss():
    logits, image = torch.randn(1, 2, 6, 6), torch.rand(1, 1, 6, 6)
    loss, step = DenseCRFLoss(sigma=2.0, intensity_sigma=0.3, softmax=True), 1e-2
    free, direction = logits.clone().requires_grad_(), torch.randn_like(logits)
    [gradient] = torch.autograd.grad(loss(free, image), free)
    ends = [loss(logits + sign * step * direction, image).item() for sign in (1, -1)]
    assert (gradient * direction).sum().item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=0.02)


def test_a_border_along_the_image_costs_less_than_one_across():
    image = torch.zeros(1, 1, 16, 16)
    image[..., 8:] = 1
    along = torch.cat([1 - image, image], 1)
    loss = DenseCRFLoss(sigma=3.0)
    assert loss(along, image) < 0.1 * loss(along.transpose(2, 3), image)
    assert loss(torch.cat([torch.ones_like(image), torch.zeros_like(image)], 1), image) < 1e-3  # one class everywhere


def test_beside_partial_cross_entropy():
    loss = CombinedLoss(
        {"ce": PartialCrossEntropyLoss(), "crf": DenseCRFLoss(softmax=True)}, weights={"crf": 0.5}, skip_unweighted=True
    )
    assert loss.batch_keys == ("weak_label", "image")
    target = {"weak_label": torch.randint(-1, 2, (2, 1, 8, 8)).float(), "image": torch.rand(2, 1, 8, 8)}
    input = torch.randn(2, 2, 8, 8, requires_grad=True)
    loss(input, target).backward()
    assert torch.isfinite(input.grad).all() and loss.terms()["crf"] > 0


def test_bad_input():
    with pytest.raises(ValueError, match="sigma"):
        DenseCRFLoss(sigma=0)
    with pytest.raises(ValueError, match=r"target: expected images of \(8, 8\)"):
        DenseCRFLoss()(torch.rand(1, 2, 8, 8), torch.rand(1, 1, 8, 9))


@pytest.mark.parametrize("shape", [(7, 7), (5, 7, 6)])
def test_every_voxel_counts_where_the_size_is_no_multiple(shape):
    probs = torch.rand(1, 2, *shape).softmax(1).requires_grad_()
    DenseCRFLoss(sigma=2, downsample=4)(probs, torch.rand(1, 1, *shape)).backward()
    assert (probs.grad != 0).all()
