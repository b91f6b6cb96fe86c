"""Searchable cells and the generator of them: sizes, weights, and what is refused."""

import pytest
import torch
from monai.networks.nets import PatchDiscriminator
from torch import nn

from medconstraints.networks import MaskToImage, SearchableCell, SearchableGenerator


@pytest.mark.parametrize("kernels", [(4, 6, 8), (2, 4), (2, 4, 6, 8)])
@pytest.mark.parametrize(("dims", "stride"), [(2, 2), (2, (2, 1)), (3, 2), (3, (2, 2, 1)), (3, 1)])
def test_a_cell_halves_or_doubles_the_axes_with_stride_2(dims, stride, kernels):
    steps = [stride] * dims if isinstance(stride, int) else stride
    image = torch.zeros(1, 2, *[8] * dims)
    smaller = SearchableCell(dims, 2, 3, stride=stride, kernels=kernels)(image)
    larger = SearchableCell(dims, 2, 3, stride=stride, transposed=True, kernels=kernels)(image)
    assert smaller.shape == (1, 3, *(8 // step for step in steps))
    assert larger.shape == (1, 3, *(8 * step for step in steps))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("dims", "stride"), [(2, 2), (2, (1, 2)), (3, (2, 2, 1))])
def test_a_cell_is_the_weighted_sum_of_its_operators(dims, stride, transposed):
    torch.manual_seed(0)
    cell, image = SearchableCell(dims, 3, 2, stride=stride, transposed=transposed), torch.randn(2, 3, *[8] * dims)
    cell.logits.data = torch.tensor([-1.0, 0.0, 2.0])
    expected = sum(
        1 / (1 + torch.exp(-logit)) * operator(image)
        for logit, operator in zip(cell.logits, cell.operators, strict=True)
    )
    torch.testing.assert_close(cell(image), expected)
    assert [operator.kernel_size for operator in SearchableCell(2, 1, 1).operators] == [(4, 4), (6, 6), (8, 8)]
    assert torch.equal(SearchableCell(2, 1, 2).alpha, torch.full((3,), 0.5))


@pytest.mark.parametrize(
    ("dims", "strides", "shape"), [(2, (2, 2), (8, 12)), (3, (2, 2), (8, 8, 8)), (3, ((2, 2, 1), 2), (8, 8, 2))]
)
def test_a_generator_keeps_the_size(dims, strides, shape):
    generator = SearchableGenerator(dims, 3, 2, channels=(4, 6), strides=strides, kernels=(2, 4))
    assert generator(torch.rand(2, 3, *shape)).shape == (2, 2, *shape)


def test_every_parameter_reaches_the_image():
    generator = SearchableGenerator(2, 2, 1, channels=(4, 4, 4), strides=(2, 2, 2))
    generator(torch.rand(2, 2, 16, 16)).square().sum().backward()
    # Instance norm takes a constant away: the biases before it have no effect.
    unreached = [n for n, p in generator.named_parameters() if p.grad.abs().max() < 1e-9 and not n.endswith("bias")]
    assert unreached == []


def test_architecture_and_weights_share_nothing_and_are_all():
    gan = MaskToImage(SearchableGenerator(2, 2, 1), PatchDiscriminator(2, 4, 3))
    architecture, weights = gan.architecture(), gan.generator_weights()
    assert len(architecture) == 6 and all(value.shape == (3,) for value in architecture.values())
    assert {*architecture} | {*weights} == {name for name, _ in gan.generator.named_parameters()}
    assert not {*architecture} & {*weights}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SearchableCell(2, 1, 1, kernels=(4,)), r"kernels: expected at least two even sizes, got \(4,\)"),
        (lambda: SearchableCell(2, 1, 1, kernels=(3, 4)), r"kernels: expected at least two even sizes, got \(3, 4\)"),
        (lambda: SearchableCell(3, 1, 1, stride=(2, 2)), r"stride: expected 1 or 2 for each of 3 axes"),
        (lambda: SearchableCell(2, 1, 1, stride=3), "stride: expected 1 or 2 for each of 2 axes, got 3"),
        (lambda: SearchableGenerator(2, 2, 1, channels=(4, 8), strides=(2,)), "channels, strides: .* got 2, 1"),
        (lambda: SearchableGenerator(2, 2, 1)(torch.zeros(1, 2, 12, 16)), r"mask: expected .* got \(12, 16\)"),
        (lambda: SearchableGenerator(2, 2, 1)(torch.zeros(1, 2, 8, 8)), r"mask: expected .* got \(8, 8\)"),
        (lambda: SearchableGenerator(2, 2, 1)(torch.zeros(1, 3, 16, 16)), "mask: expected 2 channels, .* got 3"),
        (lambda: MaskToImage(nn.Conv2d(2, 1, 1), nn.Identity()), "generator: expected at least one SearchableCell"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
