"""SpatialTransformer: identity at the start, and a map that is learned."""

import pytest
import torch
from torch import nn

from medconstraints.networks import SpatialTransformer


@pytest.mark.parametrize("dims", [2, 3])
def test_starts_at_the_identity_with_a_gradient_for_every_value(dims):
    network = SpatialTransformer(nn.Flatten(), dims, 2)
    image = torch.randn(3, 2, *[9] * dims)
    output = network(image)
    torch.testing.assert_close(output, image.flatten(1), rtol=0, atol=1e-5)
    (output * torch.randn_like(output)).sum().backward()
    assert (network.looking[-1].bias.grad != 0).all()


@pytest.mark.slow
def test_learns_to_move_an_object_to_the_centre():
    torch.manual_seed(0)
    image = torch.zeros(4, 1, 16, 16)
    for number, (x, y) in enumerate([(2, 2), (2, 9), (9, 2), (9, 9)]):
        image[number, :, x : x + 5, y : y + 5] = 1.0
    image = nn.functional.avg_pool2d(image, 5, 1, 2)
    target = torch.zeros(16, 16)
    target[5:11, 5:11] = 1.0
    network = SpatialTransformer(nn.Flatten(), 2, 1)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (network(image) - target.flatten()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


def test_maps_are_refused():
    with pytest.raises(ValueError, match="network: expected one for classification"):
        SpatialTransformer(nn.Identity(), 2, 1)(torch.zeros(1, 1, 8, 8))
