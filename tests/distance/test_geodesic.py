"""Distances along an image: against a search written from the definition, symmetries, bounds, walls, refusals."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.ndimage import binary_erosion

from medconstraints.distance import Geodesic, geodesic_distance, grow_label, signed_distance, signed_geodesic_distance

# name: shape, channels (0: none), spacing_mm, image_weight, slice_axis
CASES = {
    "2D": ((6, 7), 0, None, 1.0, None),
    "2D, chamfer": ((6, 7), 0, None, 0.0, None),
    "2D, anisotropic, channels": ((7, 5), 3, (0.4, 2.5), 0.7, None),
    "2D, one line": ((1, 12), 1, (9.0, 0.5), 3.0, None),
    "3D, anisotropic": ((5, 4, 3), 0, (0.5, 0.9, 4.0), 0.3, None),
    "3D, channels": ((4, 3, 4), 2, (1.0, 1.0, 3.0), 0.8, None),
    "3D, one voxel thick": ((5, 1, 6), 0, (1.0, 7.0, 2.0), 1.0, None),
    "3D, edges far longer than steps": ((4, 4, 4), 0, None, 1e6, None),
    "slices across 0": ((3, 5, 4), 0, (5.0, 1.0, 0.7), 1.0, 0),
    "slices across 1": ((5, 3, 4), 0, (1.0, 0.1, 0.7), 1.0, 1),
    "slices across 2, channels": ((5, 4, 3), 2, None, 0.4, 2),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def random_case(shape, channels, rng, share=0.15):
    """A ragged object and an image without any order."""
    image = rng.normal(0, 1, (channels, *shape) if channels else shape)
    return rng.random(shape) < share, image


# Signed distances of a mask


@cases
def test_equals_the_definition(case, rng, distance_reference):
    shape, channels, spacing, weight, axis = case
    mask, image = random_case(shape, channels, rng)
    assert mask.any()
    value = signed_geodesic_distance(mask, image, spacing, image_weight=weight, slice_axis=axis)
    assert value.dtype == np.float32 and value.shape == shape
    expected = distance_reference.signed_geodesic(mask, image, spacing, image_weight=weight, slice_axis=axis)
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-5)


def test_larger_volumes_equal_scipy(rng, distance_backends):
    """Paths that take detours; from the boundary, and from seeds."""
    mask = np.zeros((14, 15, 16), bool)
    mask[4:8, 5:9, 3:10] = True
    image, spacing = rng.normal(0, 1, mask.shape), (1.0, 0.8, 2.0)
    value = signed_geodesic_distance(mask, image, spacing, image_weight=3.0)
    assert (value[mask] < 0).all() and (value[~mask] > 0).all()
    # From the voxels that have a neighbour on the other side; those values are tested above.
    deep = [binary_erosion(side, np.ones((3, 3, 3)), border_value=1) for side in (mask, ~mask)]
    starts = np.where(deep[0] | deep[1], np.inf, np.abs(value))
    again = distance_backends.path_lengths(starts, mask, image, spacing, 3.0)
    np.testing.assert_allclose(np.abs(value), again, atol=1e-4)
    seeds = np.where(rng.random(mask.shape) < 0.01, rng.integers(0, 2, mask.shape), -1)
    found = geodesic_distance(seeds, image, 2, spacing, image_weight=3.0)
    for number in range(2):
        starts = np.where(seeds == number, 0.0, np.inf)
        expected = distance_backends.path_lengths(starts, np.ones_like(mask), image, spacing, 3.0)
        np.testing.assert_allclose(found[number], expected, atol=1e-4)


def test_a_wall_in_the_image_makes_what_is_behind_it_farther():
    mask = np.zeros((9, 15), bool)
    mask[:, 7] = True
    image = np.zeros(mask.shape)
    image[:, 10] = 8.0
    value = signed_geodesic_distance(mask, image, image_weight=0.5)
    assert value[4, 3] == 3.5
    assert value[4, 11] == pytest.approx(1.5 + 2 * math.hypot(1, 4), rel=1e-6)
    # Through a hole in the wall the path is shorter than across it, and longer than without a wall.
    image[4, 10] = 0
    value = signed_geodesic_distance(mask, image, image_weight=0.5)
    assert value[4, 11] == 3.5
    assert 3.5 < value[6, 11] < 1.5 + 2 * math.hypot(1, 4)


def test_an_unlike_neighbour_across_the_boundary_counts_half():
    mask, image = np.array([[False, True, True]]), np.array([[0.0, 3.0, 3.0]])
    value = signed_geodesic_distance(mask, image, (1.0, 4.0), image_weight=1.0)
    assert value.tolist() == [[2.5, -2.5, -6.5]]


@pytest.mark.parametrize(("shape", "excess"), [((11, 12), 1.0824), ((6, 7, 6), 1.1282)], ids=["2D", "3D"])
def test_it_is_a_chamfer_distance_at_least(shape, excess, rng):
    mask, image = random_case(shape, 0, rng, share=0.01)
    mask[2:6, 3:7] = True
    value, exact = signed_geodesic_distance(mask, image, image_weight=0.0), signed_distance(mask)
    assert (np.sign(value) == np.sign(exact)).all()
    assert (abs(value) >= abs(exact) - 1e-5).all() and (abs(value) <= excess * abs(exact) + 1e-5).all()
    assert (abs(value) > abs(exact) + 0.01).any()
    spacing = (0.5, 1.0, 3.0)[: len(shape)]
    value = signed_geodesic_distance(mask, image, spacing, image_weight=2.0)
    assert (abs(value) >= abs(signed_distance(mask, spacing)) - 1e-5).all()


# Invariances


def test_invariances(rng):
    """A constant image, flips, the complement, millimetres, and orthogonal channels."""
    mask, image = random_case((7, 6, 5), 2, rng)
    spacing = (1.0, 2.0, 0.5)
    value = signed_geodesic_distance(mask, image, spacing, image_weight=0.7)
    for axes in ((0,), (1,), (2,), (0, 1, 2)):
        moved = np.flip(mask, axes), np.flip(image, [a + 1 for a in axes])
        flipped = signed_geodesic_distance(*moved, spacing, image_weight=0.7)
        np.testing.assert_allclose(np.flip(flipped, axes), value, atol=1e-5)
    np.testing.assert_array_equal(signed_geodesic_distance(~mask, image, spacing, image_weight=0.7), -value)
    scaled = signed_geodesic_distance(mask, image, (10.0, 20.0, 5.0), image_weight=7.0)
    np.testing.assert_allclose(scaled, 10 * value, rtol=1e-5)
    twice = signed_geodesic_distance(mask, np.stack([0.6 * image[0], 0.8 * image[0]]), spacing, image_weight=0.7)
    single = signed_geodesic_distance(mask, image[0], spacing, image_weight=0.7)
    np.testing.assert_allclose(twice, single, rtol=1e-5)
    chamfer = signed_geodesic_distance(mask, image, spacing, image_weight=0.0)
    constant = signed_geodesic_distance(mask, np.full(mask.shape, 7.0), spacing, image_weight=100.0)
    np.testing.assert_array_equal(constant, chamfer)


# Slices, limits, empty and full


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("clip", [None, 2.0])
def test_slice_by_slice(axis, clip, rng):
    mask, image = random_case((6, 7, 5), 2, rng, share=0.1)
    first, second = [slice(None)] * 3, [slice(None)] * 3
    first[axis], second[axis] = 1, 2
    mask[tuple(first)], mask[tuple(second)] = False, True
    spacing = (1.0, 2.0, 0.7)
    options = {"image_weight": 0.5, "clip_mm": clip}
    value = signed_geodesic_distance(mask, image, spacing, slice_axis=axis, **options)
    within = spacing[:axis] + spacing[axis + 1 :]
    for number in range(mask.shape[axis]):
        plane = np.take(mask, number, axis), np.take(image, number, axis + 1)
        expected = signed_geodesic_distance(*plane, within, **options)
        np.testing.assert_allclose(np.take(value, number, axis), expected, atol=1e-5)
        assert expected.any() == (number not in (1, 2) and plane[0].any())


@pytest.mark.parametrize("slice_axis", [None, 2])
@pytest.mark.parametrize("clip", [0.01, 1.3, 4.0, 1000.0])
def test_a_limit_is_a_clip(clip, slice_axis, rng):
    mask = np.zeros((13, 12, 9), bool)
    mask[3:8, 4:10, 2:5] = True
    mask[10, 5, 4] = True
    options = {"spacing_mm": (0.7, 1.0, 2.5), "image_weight": 0.6, "slice_axis": slice_axis}
    image = rng.normal(0, 1, mask.shape)
    value = signed_geodesic_distance(mask, image, **options)
    clipped = signed_geodesic_distance(mask, image, **options, clip_mm=clip)
    np.testing.assert_allclose(clipped, np.clip(value, -clip, clip), atol=1e-5)
    seeds = np.where(rng.random(mask.shape) < 0.02, mask, -1)
    value = geodesic_distance(seeds, image, 2, **options)
    clipped = geodesic_distance(seeds, image, 2, **options, clip_mm=clip)
    np.testing.assert_allclose(clipped, np.minimum(value, clip), atol=1e-5)


def test_empty_and_full_masks_give_zeros(rng):
    for (shape, axis), fill, clip in itertools.product(
        [((4, 5), None), ((3, 4, 5), None), ((3, 4, 5), 1)], (False, True), (None, 3.0)
    ):
        mask, options = np.full(shape, fill), {"image_weight": 1.0, "slice_axis": axis, "clip_mm": clip}
        value = signed_geodesic_distance(mask, rng.normal(0, 1, shape), **options)
        assert not value.any() and value.dtype == np.float32


# Growing from seeds


@pytest.mark.parametrize("case", [*CASES.values()][::2], ids=[*CASES][::2])
def test_from_seeds_equals_the_definition(case, rng, distance_reference):
    shape, channels, spacing, weight, axis = case
    image = random_case(shape, channels, rng)[1]
    seeds = np.where(rng.random(shape) < 0.15, rng.integers(0, 3, shape), -1)
    seeds[seeds == 1] = -1  # a class without a seed
    seeds.flat[[3, -2]] = 0, 2
    options = {"image_weight": weight, "slice_axis": axis}
    value = geodesic_distance(seeds, image, 3, spacing, **options)
    assert value.dtype == np.float32 and np.isinf(value[1]).all() and (value[0][seeds == 0] == 0).all()
    expected = distance_reference.geodesic(seeds, image, 3, spacing, **options)
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-5)
    grown = grow_label(seeds, image, 3, spacing, **options)
    assert grown.dtype == seeds.dtype and (grown[seeds >= 0] == seeds[seeds >= 0]).all()
    nearest = expected.min(0)
    np.testing.assert_allclose(np.take_along_axis(expected, grown[None], 0)[0], nearest, rtol=1e-5, atol=1e-5)
    reached = grow_label(seeds, image, 3, spacing, **options, reach_mm=1.0)
    np.testing.assert_array_equal(reached, np.where((nearest >= 1.0) & (seeds < 0), 0, grown))


def test_a_label_grows_up_to_the_edges_of_the_image():
    """Points in two organs that look alike: each organ is filled, as far as its edge is one."""
    image = np.zeros((12, 20))
    image[2:10, 2:9], image[2:10, 11:18] = 1, 1
    seeds = np.full(image.shape, 255)
    seeds[5, 3], seeds[5, 16], seeds[0, 0] = 1, 2, 0
    grown = grow_label(torch.from_numpy(seeds), image, 3, image_weight=50.0, ignore_index=255)
    expected = np.zeros(image.shape, int)
    expected[2:10, 2:9], expected[2:10, 11:18] = 1, 2
    assert type(grown) is torch.Tensor and grown.tolist() == expected.tolist()
    # Without a background point the reach is what ends the growth; without both everything is filled.
    seeds[0, 0] = 255
    options = {"image_weight": 50.0, "ignore_index": 255}
    assert grow_label(seeds, image, 3, reach_mm=30.0, **options).tolist() == expected.tolist()
    assert (grow_label(seeds, image, 3, **options) > 0).all()


def test_slices_without_seeds_are_background(rng):
    seeds = np.full((4, 5, 3), -1)
    seeds[1, 1, 0], seeds[3, 3, 2] = 1, 0
    grown = grow_label(seeds, rng.normal(size=seeds.shape), 2, image_weight=1.0, slice_axis=2)
    assert (grown[..., 0] == 1).all() and (grown[..., 1:] == 0).all()


def test_maps_of_a_weak_label(rng):
    """The boundary between seeds lies half way along the path between them; a whole label is measured as it is."""
    image = torch.zeros(1, 1, 10)
    seeds = torch.full((1, 10), -1)
    seeds[0, 1], seeds[0, 8] = 0, 1
    maps = Geodesic(image_weight=1.0).of_label(seeds, image, 2, (1.0, 2.0), [0, 1])
    assert maps[1].tolist() == [[9.0, 7.0, 5.0, 3.0, 1.0, -1.0, -3.0, -5.0, -7.0, -9.0]]
    assert torch.equal(maps[0], -maps[1])
    label, image = torch.from_numpy(rng.integers(0, 3, (6, 5, 4))), torch.from_numpy(rng.normal(size=(2, 6, 5, 4)))
    measure = Geodesic(image_weight=0.5, clip_mm=2.0, reach_mm=0.1)
    expected = [signed_geodesic_distance(label == n, image, (1, 1, 3), image_weight=0.5, clip_mm=2.0) for n in (2, 0)]
    assert torch.equal(measure.of_label(label, image, 3, (1, 1, 3), [2, 0]), torch.stack(expected))


# Kinds of input


def test_kinds_of_input(rng):
    """Tensors give tensors, numbers pass as masks, integers do not wrap around, nothing is written to."""
    mask, image = random_case((5, 6), 0, rng)
    before = mask.copy(), image.copy()
    expected = signed_geodesic_distance(mask, image, image_weight=1.0)
    tensor = torch.from_numpy(mask)
    for given in (tensor, MetaTensor(tensor).float(), tensor.to(torch.uint8)):
        value = signed_geodesic_distance(given, torch.from_numpy(image), torch.ones(2), image_weight=1.0)
        assert type(value) is torch.Tensor and value.dtype == torch.float32
        np.testing.assert_array_equal(value.numpy(), expected)
    np.testing.assert_array_equal(signed_geodesic_distance(mask.astype(float), image, image_weight=1.0), expected)
    assert (mask == before[0]).all() and (image == before[1]).all()
    mask, image = np.array([[True, False, False]]), np.array([[0, 0, 200]], np.uint8)
    value = signed_geodesic_distance(mask, image, image_weight=1.0)
    assert value[0, 2] == pytest.approx(0.5 + math.hypot(1, 200), rel=1e-6)


def test_threads_do_not_disturb_each_other(rng):
    mask, image = random_case((20, 20, 20), 0, rng, share=0.01)
    expected = signed_geodesic_distance(mask, image, image_weight=1.0)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: signed_geodesic_distance(mask, image, image_weight=1.0), range(8)))
    for value in found:
        np.testing.assert_array_equal(value, expected)


# Refusals


REFUSED = {
    "an image of another shape": ({"image": np.zeros((4, 6))}, r"image: expected the shape .*\(4, 5\)"),
    "no channel": ({"image": np.zeros((0, 4, 5))}, "image: expected the shape"),
    "NaN in the image": ({"image": np.full((4, 5), np.nan)}, "image: expected finite values, got 20"),
    "an image beyond float32": ({"image": np.full((4, 5), 1e300)}, "image: expected finite values"),
    "a negative weight": ({"image_weight": -1.0}, "image_weight: expected a finite number >= 0"),
    "a weight too large": ({"image_weight": 1e200, "image": np.eye(4, 5)}, "image_weight: expected edges below"),
    "a spacing too short": ({"spacing_mm": (1.0,)}, "spacing_mm: expected 2 positive finite values"),
    "a limit of zero": ({"clip_mm": 0.0}, "clip_mm: expected a finite number > 0"),
    "an infinite limit": ({"clip_mm": math.inf}, "clip_mm: expected a finite number > 0"),
    "labels as mask": ({"mask": np.full((4, 5), 2)}, "mask: expected zeros and ones"),
    "probabilities as mask": ({"mask": np.full((4, 5), 0.5)}, "mask: expected zeros and ones"),
    "a mask with channels": ({"mask": np.ones((1, 1, 4, 5), bool)}, "mask: expected .*channel"),
    "slices of an image": ({"slice_axis": 0}, "slice_axis: expected None"),
}


@pytest.mark.parametrize(("changed", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(changed, message):
    arguments = {"mask": np.eye(4, 5, dtype=bool), "image": np.zeros((4, 5)), "image_weight": 1.0} | changed
    with pytest.raises(ValueError, match=message):
        signed_geodesic_distance(**arguments)


def test_refusals_of_seeds_and_options():
    image = np.zeros((4, 5))
    for seeds, words in (
        (np.full((4, 5), 3), "seeds: expected class numbers 0 to 2"),
        (np.zeros((1, 1, 4, 5)), "seeds"),
    ):
        for function in (geodesic_distance, grow_label):
            with pytest.raises(ValueError, match=words):
                function(seeds, image, 3, image_weight=1.0)
    with pytest.raises(ValueError, match="ignore_index: expected no class number"):
        geodesic_distance(np.zeros((4, 5)), image, 3, image_weight=1.0, ignore_index=0)
    for options in ({"image_weight": -1.0}, {"clip_mm": 0}, {"reach_mm": math.nan}, {"slice_axis": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Geodesic(**{"image_weight": 1.0} | options)


# Real volumes


def test_a_real_volume(data_root):
    path = sorted((data_root / "hippocampus" / "labelsTr").glob("*.nii.gz"))[0]
    label = np.asarray(nib.load(path).dataobj)
    mask = label > 0
    image = np.asarray(nib.load(data_root / "hippocampus" / "imagesTr" / path.name).dataobj, np.float32)
    image /= np.percentile(image, 99)
    spacing = nib.load(path).header.get_zooms()
    chamfer, value = (
        signed_geodesic_distance(mask, image, spacing, image_weight=weight, clip_mm=10.0) for weight in (0.0, 20.0)
    )
    assert (value[mask] < 0).all() and (value[~mask] > 0).all() and abs(value).max() == 10
    assert (abs(value) >= abs(chamfer)).all() and (abs(value) > abs(chamfer) + 0.5).mean() > 0.2
    rim = mask & ~binary_erosion(mask, border_value=1)
    assert np.median(-chamfer[rim]) == 0.5 < np.median(-value[rim])
