"""Image-aware distance: against a search written from the definition, symmetries, bounds, walls, refusals."""

import heapq
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.ndimage import binary_erosion

from medconstraints.distance.geodesic import signed_geodesic_distance

backends = pytest.mark.parametrize("backend", ["numba", "scipy"])

# name: shape, channels (0: none), spacing_mm, image_weight, slice_axis
CASES = {
    "2D": ((6, 7), 0, None, 1.0, None),
    "2D, chamfer": ((6, 7), 0, None, 0.0, None),
    "2D, anisotropic": ((7, 5), 0, (0.4, 2.5), 0.7, None),
    "2D, channels": ((6, 5), 3, (1.0, 1.5), 0.5, None),
    "2D, one channel": ((5, 5), 1, None, 2.0, None),
    "2D, one line": ((1, 12), 0, (9.0, 0.5), 3.0, None),
    "3D": ((4, 5, 4), 0, None, 1.0, None),
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


def reference(mask, image, spacing=None, *, image_weight, slice_axis=None):
    """The definition, one search for each voxel: from it over its own side, until an edge crosses the boundary."""
    image = image[None] if image.ndim == mask.ndim else image
    spacing = spacing or (1.0,) * mask.ndim
    moves = [
        move
        for move in itertools.product((-1, 0, 1), repeat=mask.ndim)
        if any(move) and (slice_axis is None or move[slice_axis] == 0)
    ]

    def edges(p):
        for move in moves:
            q = tuple(a + b for a, b in zip(p, move, strict=True))
            if all(0 <= a < n for a, n in zip(q, mask.shape, strict=True)):
                squares = [(a * s) ** 2 for a, s in zip(move, spacing, strict=True)]
                squares += [(image_weight * (channel[p] - channel[q])) ** 2 for channel in image]
                yield q, math.sqrt(sum(squares))

    def search(start):
        queue, done = [(0.0, False, start)], set()
        while queue:
            length, arrived, p = heapq.heappop(queue)
            if arrived:
                return length
            if p in done:
                continue
            done.add(p)
            for q, edge in edges(p):
                if mask[q] != mask[p]:
                    heapq.heappush(queue, (length + edge / 2, True, q))
                elif q not in done:
                    heapq.heappush(queue, (length + edge, False, q))
        return 0.0

    value = np.zeros(mask.shape)
    for p in np.ndindex(mask.shape):
        value[p] = -search(p) if mask[p] else search(p)
    return value


def boundary_distance(mask, spacing):
    """Euclidean distance to the nearest face between the sides, for each voxel over all voxels."""
    places = np.argwhere(np.ones_like(mask))
    steps = np.maximum(np.abs(places[:, None] - places[None]) - 0.5, 0) * np.asarray(spacing)
    squared = (steps**2).sum(-1)
    squared[mask.reshape(-1)[:, None] == mask.reshape(-1)[None]] = np.inf
    return np.where(mask, -1, 1) * np.sqrt(squared.min(1)).reshape(mask.shape)


# Values


@backends
@cases
def test_equals_the_definition(case, backend, rng):
    shape, channels, spacing, weight, axis = case
    mask, image = random_case(shape, channels, rng)
    assert mask.any()
    value = signed_geodesic_distance(mask, image, spacing, image_weight=weight, slice_axis=axis, backend=backend)
    assert value.dtype == np.float32 and value.shape == shape
    expected = reference(mask, image, spacing, image_weight=weight, slice_axis=axis)
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-5)


@backends
def test_both_backends_take_detours_on_larger_volumes(backend, rng):
    mask = np.zeros((14, 15, 16), bool)
    mask[4:8, 5:9, 3:10] = True
    image = rng.normal(0, 1, mask.shape)
    options = {"spacing_mm": (1.0, 0.8, 2.0), "image_weight": 3.0}
    value = signed_geodesic_distance(mask, image, **options, backend=backend)
    np.testing.assert_allclose(value, signed_geodesic_distance(mask, image, **options), atol=1e-4)
    assert (value[mask] < 0).all() and (value[~mask] > 0).all()


@backends
def test_a_wall_in_the_image_makes_what_is_behind_it_farther(backend):
    mask = np.zeros((9, 15), bool)
    mask[:, 7] = True
    image = np.zeros(mask.shape)
    image[:, 10] = 8.0
    value = signed_geodesic_distance(mask, image, image_weight=0.5, backend=backend)
    assert value[4, 3] == 3.5
    assert value[4, 11] == pytest.approx(1.5 + 2 * math.hypot(1, 4), rel=1e-6)
    # Through a hole in the wall the path is shorter than across it, and longer than without a wall.
    image[4, 10] = 0
    value = signed_geodesic_distance(mask, image, image_weight=0.5, backend=backend)
    assert value[4, 11] == 3.5
    assert 3.5 < value[6, 11] < 1.5 + 2 * math.hypot(1, 4)


@backends
def test_an_unlike_neighbour_across_the_boundary_counts_half(backend):
    mask, image = np.array([[False, True, True]]), np.array([[0.0, 3.0, 3.0]])
    value = signed_geodesic_distance(mask, image, (1.0, 4.0), image_weight=1.0, backend=backend)
    assert value.tolist() == [[2.5, -2.5, -6.5]]


@pytest.mark.parametrize(("shape", "excess"), [((11, 12), 1.0824), ((6, 7, 6), 1.1282)], ids=["2D", "3D"])
def test_without_the_image_it_is_a_chamfer_distance(shape, excess, rng):
    mask, image = random_case(shape, 0, rng, share=0.01)
    mask[2:6, 3:7] = True
    value, exact = signed_geodesic_distance(mask, image, image_weight=0.0), boundary_distance(mask, (1.0,) * len(shape))
    assert (np.sign(value) == np.sign(exact)).all()
    assert (abs(value) >= abs(exact) - 1e-5).all() and (abs(value) <= excess * abs(exact) + 1e-5).all()
    assert (abs(value) > abs(exact) + 0.01).any()


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_it_is_never_less_than_the_euclidean_distance(weight, rng):
    mask, image = random_case((5, 6, 5), 0, rng, share=0.03)
    spacing = (0.5, 1.0, 3.0)
    value = signed_geodesic_distance(mask, image, spacing, image_weight=weight)
    assert (abs(value) >= abs(boundary_distance(mask, spacing)) - 1e-5).all()


# Invariances


@backends
def test_a_constant_image_changes_nothing(backend, rng):
    mask, image = random_case((5, 6, 5), 0, rng)
    options = {"spacing_mm": (1.0, 2.0, 0.5), "backend": backend}
    plain = signed_geodesic_distance(mask, image, image_weight=0.0, **options)
    constant = signed_geodesic_distance(mask, np.full(mask.shape, 7.0), image_weight=100.0, **options)
    np.testing.assert_array_equal(constant, plain)


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1, 2)])
def test_flips(axes, rng):
    mask, image = random_case((9, 8, 10), 2, rng, share=0.02)
    options = {"spacing_mm": (1.0, 2.0, 0.5), "image_weight": 0.5}
    value = signed_geodesic_distance(mask, image, **options)
    flipped = signed_geodesic_distance(np.flip(mask, axes), np.flip(image, [a + 1 for a in axes]), **options)
    np.testing.assert_allclose(np.flip(flipped, axes), value, atol=1e-5)


@backends
@pytest.mark.parametrize("slice_axis", [None, 1])
def test_the_complement_has_the_opposite_sign(backend, slice_axis, rng):
    mask, image = random_case((7, 6, 5), 0, rng)
    options = {"image_weight": 1.0, "slice_axis": slice_axis, "backend": backend, "clip_mm": 3.0}
    value = signed_geodesic_distance(mask, image, **options)
    np.testing.assert_array_equal(signed_geodesic_distance(~mask, image, **options), -value)


def test_scaling_the_millimetres_scales_the_distance(rng):
    mask, image = random_case((7, 6, 5), 0, rng)
    value = signed_geodesic_distance(mask, image, (1.0, 1.5, 3.0), image_weight=0.7)
    scaled = signed_geodesic_distance(mask, image, (10.0, 15.0, 30.0), image_weight=7.0)
    np.testing.assert_allclose(scaled, 10 * value, rtol=1e-5)


def test_channels_are_orthogonal_to_each_other(rng):
    mask, image = random_case((7, 8), 0, rng)
    single = signed_geodesic_distance(mask, image, image_weight=1.0)
    twice = signed_geodesic_distance(mask, np.stack([0.6 * image, 0.8 * image]), image_weight=1.0)
    np.testing.assert_allclose(twice, single, rtol=1e-5)


# Slices, limits, empty and full


@backends
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("clip", [None, 2.0])
def test_slice_by_slice(axis, clip, backend, rng):
    mask, image = random_case((6, 7, 5), 2, rng, share=0.1)
    first, second = [slice(None)] * 3, [slice(None)] * 3
    first[axis], second[axis] = 1, 2
    mask[tuple(first)], mask[tuple(second)] = False, True
    spacing = (1.0, 2.0, 0.7)
    options = {"image_weight": 0.5, "clip_mm": clip, "backend": backend}
    value = signed_geodesic_distance(mask, image, spacing, slice_axis=axis, **options)
    within = spacing[:axis] + spacing[axis + 1 :]
    for number in range(mask.shape[axis]):
        plane = np.take(mask, number, axis), np.take(image, number, axis + 1)
        expected = signed_geodesic_distance(*plane, within, **options)
        np.testing.assert_allclose(np.take(value, number, axis), expected, atol=1e-5)
        assert expected.any() == (number not in (1, 2) and plane[0].any())


@backends
@pytest.mark.parametrize("slice_axis", [None, 2])
@pytest.mark.parametrize("clip", [0.01, 0.5, 1.3, 4.0, 1000.0])
def test_a_limit_is_a_clip(clip, slice_axis, backend, rng):
    mask = np.zeros((13, 12, 9), bool)
    mask[3:8, 4:10, 2:5] = True
    mask[10, 5, 4] = True
    options = {"spacing_mm": (0.7, 1.0, 2.5), "image_weight": 0.6, "slice_axis": slice_axis}
    image = rng.normal(0, 1, mask.shape)
    value = signed_geodesic_distance(mask, image, **options)
    clipped = signed_geodesic_distance(mask, image, **options, clip_mm=clip, backend=backend)
    np.testing.assert_allclose(clipped, np.clip(value, -clip, clip), atol=1e-5)


@backends
@pytest.mark.parametrize("clip", [None, 3.0])
@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize(("shape", "axis"), [((4, 5), None), ((3, 4, 5), None), ((3, 4, 5), 1)])
def test_empty_and_full_masks_give_zeros(shape, axis, fill, clip, backend, rng):
    image, mask = rng.normal(0, 1, shape), np.full(shape, fill)
    value = signed_geodesic_distance(mask, image, image_weight=1.0, slice_axis=axis, clip_mm=clip, backend=backend)
    assert not value.any() and value.dtype == np.float32


# Kinds of input


def test_tensors_give_tensors_and_numbers_pass_as_mask(rng):
    mask, image = random_case((5, 6), 0, rng)
    expected = signed_geodesic_distance(mask, image, image_weight=1.0)
    spacing = torch.ones(2)
    masks = [torch.from_numpy(mask), MetaTensor(torch.from_numpy(mask)).float(), torch.from_numpy(mask).to(torch.uint8)]
    for tensor in masks:
        value = signed_geodesic_distance(tensor, torch.from_numpy(image), spacing, image_weight=1.0)
        assert type(value) is torch.Tensor and value.dtype == torch.float32
        np.testing.assert_array_equal(value.numpy(), expected)
    np.testing.assert_array_equal(signed_geodesic_distance(mask.astype(float), image, image_weight=1.0), expected)


def test_inputs_keep_their_values(rng):
    mask, image = random_case((5, 6, 4), 2, rng)
    before = mask.copy(), image.copy()
    signed_geodesic_distance(mask, image, image_weight=1.0, clip_mm=2.0)
    np.testing.assert_array_equal(mask, before[0])
    np.testing.assert_array_equal(image, before[1])


def test_integer_images_do_not_wrap_around():
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
    "an image of another shape": ({"image": np.zeros((4, 6))}, r"image: expected the shape of the mask, \(4, 5\)"),
    "an image with two axes too many": ({"image": np.zeros((1, 1, 4, 5))}, "image: expected the shape of the mask"),
    "no channel": ({"image": np.zeros((0, 4, 5))}, "image: expected the shape of the mask"),
    "NaN in the image": ({"image": np.full((4, 5), np.nan)}, "image: expected finite values, got 20 that are NaN"),
    "an image beyond float32": ({"image": np.full((4, 5), 1e300)}, "image: expected finite values"),
    "a negative weight": ({"image_weight": -1.0}, "image_weight: expected a number >= 0"),
    "a weight that is NaN": ({"image_weight": math.nan}, "image_weight: expected a number >= 0"),
    "a weight too large": (
        {"image_weight": 1e200, "image": np.eye(4, 5)},
        "image_weight: expected a weight that gives edges below",
    ),
    "a spacing too short": ({"spacing_mm": (1.0,)}, "spacing_mm: expected 2 positive values"),
    "a spacing of zero": ({"spacing_mm": (1.0, 0.0)}, "spacing_mm: expected 2 positive values"),
    "a spacing that is NaN": ({"spacing_mm": (1.0, math.nan)}, "spacing_mm: expected 2 positive values"),
    "a limit of zero": ({"clip_mm": 0.0}, "clip_mm: expected a number > 0"),
    "a limit that is NaN": ({"clip_mm": math.nan}, "clip_mm: expected a number > 0"),
    "a limit that is infinite": ({"clip_mm": math.inf}, "clip_mm: expected a number > 0"),
    "labels as mask": ({"mask": np.full((4, 5), 2)}, "mask: expected bool, or only the values 0 and 1"),
    "probabilities as mask": ({"mask": np.full((4, 5), 0.5)}, "mask: expected bool, or only the values 0 and 1"),
    "NaN in the mask": ({"mask": np.full((4, 5), np.nan)}, "mask: expected bool, or only the values 0 and 1"),
    "a mask with channels": ({"mask": np.ones((1, 1, 4, 5), bool)}, "mask: expected .* 2 or 3 axes"),
    "a mask without voxels": ({"mask": np.ones((0, 5), bool)}, "mask: expected .* 2 or 3 axes"),
    "slices of an image": ({"slice_axis": 0}, "slice_axis: expected None, or 0, 1 or 2 for 3D volumes, got 0"),
    "an unknown backend": ({"backend": "cuda"}, 'backend: expected "auto", "numba" or "scipy"'),
}


@pytest.mark.parametrize(("changed", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(changed, message):
    arguments = {"mask": np.eye(4, 5, dtype=bool), "image": np.zeros((4, 5)), "image_weight": 1.0}
    with pytest.raises(ValueError, match=message):
        signed_geodesic_distance(**{**arguments, **changed})


# Real volumes


def test_a_real_volume(data_root):
    path = sorted((data_root / "hippocampus" / "labelsTr").glob("*.nii.gz"))[0]
    mask = np.asarray(nib.load(path).dataobj) > 0
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
