"""The losses of a GAN that makes images of masks, against their formulas."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from medconstraints.losses import CharbonnierLoss, MaskToImageLoss


@pytest.mark.parametrize("delta", [0.01, 0.05, 1.0])
def test_charbonnier_is_a_smooth_absolute_difference(delta):
    torch.manual_seed(0)
    one, two = torch.randn(2, 1, 5, 5), torch.randn(2, 1, 5, 5)
    found = CharbonnierLoss(delta)(one, two)
    gaps = [((a - b) ** 2 + delta**2) ** 0.5 - delta for a, b in zip(one.flatten(), two.flatten(), strict=True)]
    torch.testing.assert_close(found, sum(gaps) / len(gaps))
    assert CharbonnierLoss(delta)(one, one) == 0
    assert (one - two).abs().mean() - delta <= found <= (one - two).abs().mean()


def test_charbonnier_has_both_derivatives_also_where_images_are_equal():
    image = torch.zeros(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    real = torch.eye(3, dtype=torch.float64)[None, None]
    assert gradcheck(CharbonnierLoss(), (image, real))
    assert gradgradcheck(CharbonnierLoss(), (image, real))


def test_the_losses_are_those_of_pix2pix():
    torch.manual_seed(0)
    real, fake = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    made, image = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    loss = MaskToImageLoss(reconstruction_weight=7.0)
    torch.testing.assert_close(
        loss.generator(fake, made, image), ((fake - 1) ** 2).mean() + 7 * CharbonnierLoss()(made, image)
    )
    torch.testing.assert_close(loss.discriminator(real, fake), (((real - 1) ** 2).mean() + (fake**2).mean()) / 2)


@pytest.mark.parametrize("make", [lambda: CharbonnierLoss(0.0), lambda: MaskToImageLoss(reconstruction_weight=-1)])
def test_bad_input_is_refused(make):
    with pytest.raises(ValueError, match=r"delta|reconstruction_weight"):
        make()
