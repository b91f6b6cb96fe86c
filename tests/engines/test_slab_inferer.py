"""Slab by slab is what MONAI's sliding windows are at once, but for half precision."""

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from torch import nn

from medconstraints.engines import SlabInferer

SHAPES = {
    "many windows": ((37, 20, 23), (8, 8, 8)),
    "one window": ((8, 9, 7), (8, 9, 7)),
    "smaller than the window": ((5, 20, 6), (8, 8, 9)),
    "whole axes": ((21, 10, 12), (8, -1, 12)),
    "an image": ((33, 18), (8, 8)),
}


def network_of(dims, channels=1, classes=3):
    torch.manual_seed(0)
    convolution = (nn.Conv2d if dims == 2 else nn.Conv3d)(channels, classes, 3, padding=1)
    return nn.Sequential(convolution, nn.Tanh()).eval().requires_grad_(False)


@pytest.mark.parametrize(("shape", "roi"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("mode", ["constant", "gaussian"])
def test_as_monai(shape, roi, overlap, mode):
    network = network_of(len(shape))
    image = torch.randn(1, 1, *shape)
    options = {"sw_batch_size": 3, "overlap": overlap, "mode": mode}
    expected = SlidingWindowInferer(roi, **options)(image, network)
    found = SlabInferer(roi, whole=True, large=1, **options)(image, network)
    assert found.dtype == torch.float16 and found.shape == expected.shape
    torch.testing.assert_close(found.float(), expected - expected.amax(1, keepdim=True), rtol=1e-3, atol=1e-6)
    assert torch.equal(found.amax(1), torch.zeros_like(found[:, 0]))


@pytest.mark.parametrize(("shape", "roi"), SHAPES.values(), ids=SHAPES)
def test_of_images_that_were_only_turned_the_best_class_is_kept(shape, roi):
    network = network_of(len(shape))
    image = MetaTensor(torch.randn(1, 1, *shape), applied_operations=[[{"class": "Orientation"}]])
    expected, number = SlidingWindowInferer(roi, 3)(image.as_tensor(), network).softmax(1).max(1, keepdim=True)
    found = SlabInferer(roi, 3, large=1)(image, network)
    assert torch.equal(found["classes"], number.byte())
    torch.testing.assert_close(found["probability"].float(), expected, rtol=1e-3, atol=0)
    for operations in ([], [[{"class": "Orientation"}, {"class": "SpatialResample"}]]):
        image.applied_operations = operations
        assert SlabInferer(roi, 3, large=1)(image, network).shape == (1, 3, *shape)


def test_small_volumes_and_batches_are_done_by_monai():
    network, image = network_of(3), torch.randn(1, 1, 9, 9, 9)
    expected = SlidingWindowInferer((4, 4, 4), 2)(image, network)
    assert torch.equal(SlabInferer((4, 4, 4), 2)(image, network), expected)
    twice = SlabInferer((4, 4, 4), 2, large=1)(torch.cat([image, image]), network)
    assert twice.dtype == torch.float32
    torch.testing.assert_close(twice[1], expected[0])


def test_channels_meta_data_and_further_arguments():
    network = network_of(3, channels=2)
    image = MetaTensor(torch.randn(1, 2, 20, 9, 9), meta={"filename_or_obj": "a.nii"})
    found = SlabInferer((8, 8, 8), 2, whole=True, large=1)(
        image, lambda windows, scale: network(windows) * scale, scale=2.0
    )
    expected = 2 * SlidingWindowInferer((8, 8, 8), 2)(image.as_tensor(), network)
    torch.testing.assert_close(
        found.as_tensor().float(), expected - expected.amax(1, keepdim=True), rtol=1e-3, atol=1e-6
    )
    assert found.meta["filename_or_obj"] == "a.nii"


def test_what_is_asked_of_each_window_is_left_to_monai():
    network, image = network_of(3), torch.randn(1, 1, 20, 8, 8)
    places = []
    inferer = SlabInferer((8, 8, 8), 2, large=1, with_coord=True, padding_mode="reflect")
    found = inferer(image, lambda windows, slices: places.append(slices) or network(windows))
    assert places and found.dtype == torch.float32


def test_padding_is_that_of_monai():
    network, image = network_of(3), torch.randn(1, 1, 20, 6, 7)
    options = {"sw_batch_size": 2, "padding_mode": "reflect"}
    expected = SlidingWindowInferer((8, 8, 8), **options)(image, network)
    found = SlabInferer((8, 8, 8), whole=True, large=1, **options)(image, network)
    torch.testing.assert_close(found.float(), expected - expected.amax(1, keepdim=True), rtol=1e-3, atol=1e-6)


def test_large_logits_stay_finite_and_others_do_not():
    image = torch.randn(1, 1, 20, 8, 8)
    for value, finite in ((1e6, True), (float("inf"), False), (float("nan"), False)):
        network = lambda windows, value=value: torch.cat([windows * 0, windows * 0 + value, windows * 0 - 1e6], 1)  # noqa: E731
        found = SlabInferer((8, 8, 8), 2, whole=True, large=1)(image, network)
        assert bool(found.isfinite().all()) == finite
        if finite:
            torch.testing.assert_close(found.float().softmax(1)[:, 1], torch.ones(1, 20, 8, 8))


def test_there_is_never_more_than_a_window_of_planes_in_memory(monkeypatch):
    """The largest float32 tensor that is made: the sums of as many planes as a window has."""
    made = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: made.append(zeros(*size, **options)) or made[-1])
    SlabInferer((8, 8, 8), 2, large=1)(torch.randn(1, 1, 80, 16, 16), network_of(3))
    assert sorted(tensor.numel() for tensor in made) == [8 * 16 * 16, 3 * 8 * 16 * 16]


def test_an_output_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"window's shape \(8, 8, 8\), got \(4, 4, 4\)"):
        SlabInferer((8, 8, 8), 2, large=1)(torch.randn(1, 1, 20, 8, 8), nn.AvgPool3d(2))
