import numpy as np
import pytest
import torch
from monai.networks.nets import UNet
from scipy import ndimage
from torch import nn

from medconstraints.networks import SmoothOutput


@pytest.mark.parametrize("shape", [(2, 3, 7, 9), (1, 2, 5, 6, 7)])
def test_equals_binomial_filter(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, dtype=torch.float64)
    expected = values.numpy()
    for axis in range(2, len(shape)):
        expected = ndimage.correlate1d(expected, np.array([0.25, 0.5, 0.25]), axis=axis, mode="nearest")
    actual = SmoothOutput(nn.Identity(), spatial_dims=len(shape) - 2)(values)
    assert actual.shape == values.shape
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-12)


def test_removes_alternating_values_and_keeps_constants() -> None:
    grid = torch.stack(torch.meshgrid(*[torch.arange(8)] * 3, indexing="ij")).sum(0)
    board = (1.0 - 2.0 * (grid % 2))[None, None]
    smooth = SmoothOutput(nn.Identity())
    assert smooth(board)[..., 1:-1, 1:-1, 1:-1].abs().max() == 0
    torch.testing.assert_close(smooth(torch.full_like(board, 3.0)), torch.full_like(board, 3.0))


def test_scripts_and_trains() -> None:
    network = SmoothOutput(UNet(3, 1, 2, (4, 8), (2,)))
    x = torch.randn(1, 1, 8, 8, 8)
    network.eval()
    torch.testing.assert_close(torch.jit.script(network)(x), network(x))
    network(x).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_refuses_other_dimensions() -> None:
    with pytest.raises(ValueError, match="spatial_dims: expected 2 or 3, got 4"):
        SmoothOutput(nn.Identity(), spatial_dims=4)
