"""Signed distance maps: both backends against brute force over all pairs of voxels, and against others' transforms."""

import functools
import itertools
import math
import warnings

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage

from medconstraints.distance import Euclidean, signed_distance, signed_distance_map

BACKENDS = ("numba", "torch")
CONVENTIONS = ("boundary", "voxel", "published")
SPACINGS = {
    2: (None, (0.5, 7.5), (1.0, 3.0)),
    3: ((1.0, 1.0, 1.0), (0.5, 0.5, 7.5), (0.3, 2.0, 1.0)),
}
TOLERANCE = 1e-4  # mm


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Two threads wait for each other longer than they need for tensors of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(scope="module")
def reference(distance_reference):
    """Brute force."""
    return distance_reference


# Masks


def noise(shape, share, seed=0):
    return np.random.default_rng(seed).random(shape) < share


def blob(shape, seed=1):
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).random(shape), 1.2)
    return smooth > np.quantile(smooth, 0.7)


def empty(shape):
    return np.zeros(shape, dtype=bool)


def with_true(shape, *places):
    mask = empty(shape)
    for place in places:
        mask[place] = True
    return mask


def checkerboard(shape):
    return np.indices(shape).sum(0) % 2 == 0


EVERY = slice(None)
MASKS = {
    "2D blob": blob((8, 7)),
    "2D noise": noise((8, 7), 0.5),
    "2D one voxel": with_true((8, 7), (3, 2)),
    "2D all but one voxel": ~with_true((8, 7), (3, 2)),
    "2D line": with_true((8, 7), (5, EVERY)),
    "2D at the edge": with_true((8, 7), (slice(0, 3), slice(4, 7))),
    "2D one row": noise((1, 9), 0.4, seed=3),
    "3D blob": blob((7, 8, 6)),
    "3D sparse noise": noise((7, 8, 6), 0.02),
    "3D one voxel": with_true((7, 8, 6), (3, 2, 4)),
    "3D corner voxel": with_true((7, 8, 6), (0, 7, 0)),
    "3D all but one voxel": ~with_true((7, 8, 6), (3, 2, 4)),
    "3D plane": with_true((7, 8, 6), (EVERY, EVERY, 4)),
    "3D checkerboard": checkerboard((5, 6, 4)),
    "3D at the edges": with_true((7, 8, 6), (slice(0, 3), slice(4, 8), EVERY)),
    "3D several objects": with_true(
        (7, 8, 6), (slice(1, 3), slice(1, 4), slice(0, 2)), (5, 6, 4), (slice(4, 6), slice(0, 2), slice(3, 6))
    ),
    "3D hollow": with_true((7, 7, 7), (slice(1, 6),) * 3) & ~with_true((7, 7, 7), (slice(2, 5),) * 3),
    "3D single slice": noise((8, 7, 1), 0.3),
    "3D first axis of size 1": blob((1, 8, 7)),
}


def assert_equal(found, expected, note=""):
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE, err_msg=str(note))


# Values

ROOT = math.sqrt
STRIP, EDGE = [[0, 0, 1, 1, 1, 0]], [[1, 1, 1, 0]]
CORNER = [[1, 1], [1, 0]]
HAND = {
    "strip": (STRIP, (1, 1), "boundary", [[1.5, 0.5, -0.5, -1.5, -0.5, 0.5]]),
    "strip, voxel": (STRIP, (1, 1), "voxel", [[2, 1, -1, -2, -1, 1]]),
    "strip, published": (STRIP, (1, 1), "published", [[2, 1, 0, -1, 0, 1]]),
    "strip in mm": (STRIP, (5, 2), "boundary", [[3, 1, -1, -3, -1, 1]]),
    "strip in mm, voxel": (STRIP, (5, 2), "voxel", [[4, 2, -2, -4, -2, 2]]),
    "strip in mm, published": (STRIP, (5, 2), "published", [[4, 2, 0, -2, 0, 2]]),
    "published subtracts the smallest": (STRIP, (0.5, 2), "published", [[4, 2, -1.5, -3.5, -1.5, 2]]),
    "beyond the edge is neither": (EDGE, (1, 1), "boundary", [[-2.5, -1.5, -0.5, 0.5]]),
    "beyond the edge is neither, voxel": (EDGE, (1, 1), "voxel", [[-3, -2, -1, 1]]),
    "inside, a corner is nearest": (CORNER, (1, 1), "boundary", [[-ROOT(0.5), -0.5], [-0.5, 0.5]]),
    "inside, a corner is nearest, in mm": (CORNER, (1, 3), "boundary", [[-ROOT(2.5), -0.5], [-1.5, 0.5]]),
    "inside, a corner is nearest, voxel": (CORNER, (1, 3), "voxel", [[-ROOT(10), -1], [-3, 1]]),
    "outside, a corner is nearest": (
        [[0, 0, 0], [0, 1, 0], [0, 0, 0]],
        (1, 1),
        "boundary",
        [[ROOT(0.5), 0.5, ROOT(0.5)], [0.5, -0.5, 0.5], [ROOT(0.5), 0.5, ROOT(0.5)]],
    ),
    "knight's move": ([[1, 0, 0], [0, 0, 0]], (1, 1), "boundary", [[-0.5, 0.5, 1.5], [0.5, ROOT(0.5), ROOT(2.5)]]),
    "a pair that touches at a corner": (
        [[1, 0, 0], [0, 1, 0]],
        (1, 3),
        "boundary",
        [[-0.5, 0.5, ROOT(0.25 + 2.25)], [0.5, -0.5, 1.5]],
    ),
}


@pytest.mark.parametrize(("mask", "spacing", "convention", "expected"), HAND.values(), ids=HAND)
def test_by_hand(mask, spacing, convention, expected, reference):
    mask, expected = np.array(mask, dtype=bool), np.array(expected)
    np.testing.assert_allclose(reference.signed(mask, spacing, convention=convention), expected, rtol=0, atol=1e-12)
    for backend in BACKENDS:
        assert_equal(signed_distance(mask, spacing, convention=convention, backend=backend), expected, backend)


ONE = with_true((5, 5, 5), (2, 2, 2))
HAND_3D = {  # offset from a single voxel: distance at spacing (1, 1, 3)
    (0, 0, 0): -0.5,
    (1, 0, 0): 0.5,
    (0, 0, 1): 1.5,
    (0, 0, -2): 4.5,
    (2, 0, 0): 1.5,
    (1, 1, 0): ROOT(0.25 + 0.25),
    (1, 0, 1): ROOT(0.25 + 2.25),
    (1, -1, 1): ROOT(0.25 + 0.25 + 2.25),
    (-2, 1, 0): ROOT(2.25 + 0.25),
    (2, 2, 2): ROOT(2.25 + 2.25 + 20.25),
    (0, 1, -2): ROOT(0.25 + 20.25),
}


def test_one_voxel_by_hand(reference):
    points = np.array([*HAND_3D]) + 2
    for mask, sign in ((ONE, 1), (~ONE, -1)):
        values = [reference.signed(mask, (1, 1, 3)), signed_distance(mask, (1, 1, 3))]
        expected = sign * np.array([*HAND_3D.values()])
        for found in (
            *(value[tuple(points.T)] for value in values),
            reference.signed_to_faces(mask, (1, 1, 3), points),
        ):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_equals_the_references(mask, reference, distance_backends):
    """Brute force over pairs of voxels and over faces, scipy, SimpleITK, and both backends are all the same."""
    others = distance_backends.distance_scipy, distance_backends.distance_simpleitk
    for convention, spacing in itertools.product(CONVENTIONS, SPACINGS[mask.ndim]):
        note = convention, spacing
        expected = reference.signed(mask, spacing, convention=convention)
        for distance in others:
            other = distance_backends.signed(mask, spacing, convention=convention, distance=distance)
            np.testing.assert_allclose(other, expected, rtol=0, atol=1e-3, err_msg=str(note))
        for backend in BACKENDS:
            found = signed_distance(mask, spacing, convention=convention, backend=backend)
            assert_equal(found, expected, (*note, backend))
        if convention == "boundary":
            faces = reference.signed_to_faces(mask, spacing, reference.centres(mask.shape))
            np.testing.assert_allclose(expected, faces.reshape(mask.shape), rtol=0, atol=1e-9)
            assert (expected[mask] < 0).all() and (expected[~mask] > 0).all()
            assert_equal(signed_distance(mask, spacing), expected)  # the defaults


@pytest.mark.parametrize("name", ["3D blob", "3D plane", "3D single slice", "3D several objects"])
def test_slices(name, backend, reference):
    """Slice by slice; empty and full slices are zeros."""
    mask, spacing = MASKS[name], (0.5, 1.5, 3.0)
    for axis, convention, clip in itertools.product((0, 1, 2), CONVENTIONS, (None, 0.6, 2.0)):
        options = {"convention": convention, "slice_axis": axis, "clip_mm": clip}
        assert_equal(
            signed_distance(mask, spacing, backend=backend, **options), reference.signed(mask, spacing, **options)
        )


def test_slices_with_and_without_the_class(backend):
    mask = empty((5, 4, 3))
    mask[1:3, 1:3, 1], mask[..., 2] = True, True
    for clip in (None, 1.0):
        found = signed_distance(mask, (1, 1, 3), slice_axis=2, clip_mm=clip, backend=backend)
        assert (found[..., 0] == 0).all() and (found[..., 2] == 0).all()
        assert (found[..., 1][mask[..., 1]] < 0).all() and (found[..., 1][~mask[..., 1]] > 0).all()


@pytest.mark.parametrize("name", ["2D one voxel", "2D noise", "3D blob", "3D corner voxel", "3D hollow"])
def test_clip(name, backend, reference):
    """What is far away need not be computed, but what is near is exact."""
    mask = MASKS[name]
    for convention, spacing in itertools.product(CONVENTIONS, SPACINGS[mask.ndim]):
        exact = reference.signed(mask, spacing, convention=convention)
        for clip in (0.2, 1.0, 1.7, 8.0, 1e6):
            found = signed_distance(mask, spacing, convention=convention, clip_mm=clip, backend=backend)
            assert_equal(found, np.clip(exact, -clip, clip), (spacing, clip))


def test_clip_where_a_narrow_neighbourhood_is_not_enough(backend, reference):
    """Two far objects in a long image, and an object at each end of an axis."""
    mask = empty((40, 6))
    mask[2:5, 1:3], mask[30:36, 3:6] = True, True
    exact = reference.signed(mask, (0.5, 2.0))
    for clip, sign in itertools.product((0.3, 1.0, 2.5, 6.0, 20.0), (1, -1)):
        found = signed_distance(mask if sign > 0 else ~mask, (0.5, 2.0), clip_mm=clip, backend=backend)
        assert_equal(found, np.clip(sign * exact, -clip, clip), (clip, sign))


def test_empty_and_full_masks_are_zero(backend):
    for shape, fill, clip in itertools.product([(4, 5), (4, 5, 3), (1, 1, 4), (1, 1)], (False, True), (None, 1.0)):
        for convention, axis in itertools.product(CONVENTIONS, (None, 0) if len(shape) == 3 else (None,)):
            options = {"convention": convention, "slice_axis": axis, "clip_mm": clip, "backend": backend}
            found = signed_distance(np.full(shape, fill), (0.5, 2.0, 3.0)[: len(shape)], **options)
            assert found.dtype == np.float32 and found.shape == shape and (found == 0).all()


# Several classes


def labels(shape, num_classes, seed=0, blobs=True):
    """Class numbers below num_classes, all of them present."""
    rng = np.random.default_rng(seed)
    noise = rng.random((num_classes, *shape))
    if blobs:
        noise = np.stack([ndimage.gaussian_filter(one, 1.0) for one in noise])
    return noise.argmax(0)


LABELS = {
    "2D, 2": (labels((8, 7), 2), 2),
    "2D, 4": (labels((8, 7), 4, blobs=False), 4),
    "3D, 2": (labels((6, 7, 5), 2), 2),
    "3D, 3": (labels((6, 7, 5), 3), 3),
    "3D, 5": (labels((6, 7, 5), 5), 5),
    "3D, last class absent": (labels((6, 7, 5), 3), 4),
    "3D, class 1 absent": (np.where(labels((6, 7, 5), 4) == 1, 2, labels((6, 7, 5), 4)), 4),
    "3D, background absent": (labels((6, 7, 5), 2) + 1, 3),
    "3D, background alone": (np.zeros((6, 7, 5), dtype=int), 3),
    "3D, class 2 alone": (np.full((6, 7, 5), 2), 3),
    "3D, single slice": (labels((8, 7, 1), 3), 3),
}
OPTIONS = {
    "plain": {},
    "published": {"convention": "published"},
    "slices": {"slice_axis": 2},
    "clip": {"clip_mm": 1.2},
    "clipped slices": {"slice_axis": 0, "clip_mm": 0.6},
}


@pytest.mark.parametrize("case", LABELS)
def test_each_class_alone(case, reference):
    label, num_classes = LABELS[case]
    spacing = (0.5, 1.0, 3.0)[: label.ndim]
    for name, options in OPTIONS.items():
        if label.ndim == 2 and "slice_axis" in options:
            continue
        expected = reference.maps(label, num_classes, spacing, **options)
        for backend in BACKENDS:
            found = signed_distance_map(label, num_classes, spacing, backend=backend, **options)
            assert_equal(found, expected, (name, backend))


def test_chosen_classes(backend, reference):
    """One map for each of them, in their order; also more classes than a byte can number."""
    label, num_classes = LABELS["3D, 5"]
    for classes in ([1, 3], [3], (0,), [3, 1]):
        found = signed_distance_map(label, num_classes, (0.5, 1.0, 3.0), classes=classes, backend=backend)
        assert_equal(found, reference.maps(label, num_classes, (0.5, 1.0, 3.0))[list(classes)])
    # 43 is what is left of 299 in one byte.
    label = np.where(MASKS["3D blob"], 299, np.where(noise((7, 8, 6), 0.5), 43, 0)).astype(np.int16)
    found = signed_distance_map(label, 300, (0.5, 1.0, 3.0), classes=[299, 43, 44], backend=backend)
    expected = [reference.signed(label == number, (0.5, 1.0, 3.0)) for number in (299, 43, 44)]
    assert_equal(found, np.stack(expected))


# What is given and what comes back


def test_types_of_labels(backend, reference):
    label, num_classes = LABELS["3D, 3"]
    expected = reference.maps(label, num_classes, (1, 1, 3))
    for dtype in ("uint8", "int8", "int16", "uint16", "int64", "float32", "float64", ">i2"):
        given = label.astype(dtype)
        assert_equal(signed_distance_map(given, num_classes, (1, 1, 3), backend=backend), expected, dtype)
        np.testing.assert_array_equal(given, label.astype(dtype))  # not written to
    for dtype in (torch.uint8, torch.int32, torch.bfloat16, torch.float32):
        found = signed_distance_map(torch.from_numpy(label).to(dtype), num_classes, (1, 1, 3), backend=backend)
        assert type(found) is torch.Tensor
        assert_equal(found.numpy(), expected, dtype)
    found = signed_distance_map(MetaTensor(torch.from_numpy(label)), num_classes, (1, 1, 3), backend=backend)
    assert_equal(torch.as_tensor(found).numpy(), expected)


def test_types_of_masks(backend, reference):
    mask = MASKS["3D blob"]
    expected = reference.signed(mask, (1, 1, 3))
    for given in (mask, mask.astype(np.uint8), mask.astype(np.float32), torch.from_numpy(mask)):
        found = signed_distance(given, (1, 1, 3), backend=backend)
        assert type(found) is type(given)
        assert_equal(np.asarray(found), expected)
    assert_equal(signed_distance_map(mask, 2, (1, 1, 3), backend=backend)[1], expected)


LAYOUTS = {
    "Fortran": np.asfortranarray,
    "every second": lambda array: np.repeat(array, 2, axis=1)[:, ::2],
    "negative strides": lambda array: np.ascontiguousarray(array[::-1, :, ::-1])[::-1, :, ::-1],
    "transposed": lambda array: np.ascontiguousarray(array.transpose(2, 0, 1)).transpose(1, 2, 0),
    "read only": lambda array: np.broadcast_to(array[None], (2, *array.shape))[1],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_in_memory(layout, backend, reference):
    label, num_classes = LABELS["3D, 3"]
    given = layout(label)
    warnings.simplefilter("error")  # restored by pytest after each test
    np.testing.assert_array_equal(given, label)
    for options in ({}, {"slice_axis": 1}, {"clip_mm": 1.0}):
        expected = reference.maps(label, num_classes, (0.5, 1, 3), **options)
        assert_equal(signed_distance_map(given, num_classes, (0.5, 1, 3), backend=backend, **options), expected)
    tensor = torch.from_numpy(label).permute(2, 0, 1)
    found = signed_distance_map(tensor, num_classes, (3, 0.5, 1), backend=backend)
    assert_equal(found.numpy(), reference.maps(label, num_classes, (0.5, 1, 3)).transpose(0, 3, 1, 2))


def test_types_of_spacing(backend, reference):
    expected = reference.signed(MASKS["3D blob"], (0.5, 1.0, 3.0))
    for spacing in ([0.5, 1, 3], np.array([0.5, 1, 3]), torch.tensor([0.5, 1.0, 3.0])):
        assert_equal(signed_distance(MASKS["3D blob"], spacing, backend=backend), expected)


# Properties


@pytest.mark.parametrize("name", ["2D noise", "3D at the edges"])
def test_flips_and_transposes(name, backend):
    mask = MASKS[name]
    spacing = (0.5, 1.5, 3.0)[: mask.ndim]
    for convention in CONVENTIONS:
        call = functools.partial(signed_distance, convention=convention, backend=backend)
        found = call(mask, spacing)
        assert (found != 0).any()
        for axis in range(mask.ndim):
            np.testing.assert_allclose(call(np.flip(mask, axis), spacing), np.flip(found, axis), rtol=0, atol=1e-5)
        for order in itertools.permutations(range(mask.ndim)):
            turned = call(mask.transpose(order), [spacing[axis] for axis in order])
            np.testing.assert_allclose(turned, found.transpose(order), rtol=0, atol=1e-5)


def test_translation_in_a_padded_image(backend):
    small = blob((5, 4, 4))
    first, second = empty((10, 10, 9)), empty((10, 10, 9))
    first[2:7, 3:7, 2:6], second[4:9, 5:9, 4:8] = small, small
    one, two = (signed_distance(mask, (0.5, 1.0, 3.0), backend=backend) for mask in (first, second))
    np.testing.assert_allclose(one[:8, :8, :7], two[2:, 2:, 2:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["2D blob", "3D blob", "3D hollow"])
def test_the_complement_has_the_opposite_sign(name, backend):
    mask = MASKS[name]
    spacing = (0.5, 1.5, 3.0)[: mask.ndim]
    for convention in ("boundary", "voxel"):
        found, other = (signed_distance(m, spacing, convention=convention, backend=backend) for m in (mask, ~mask))
        np.testing.assert_allclose(found, -other, rtol=0, atol=1e-6)
        assert (found[mask] < 0).all() and (found[~mask] > 0).all()


def test_units(backend, reference):
    """Ten times the spacing, ten times the distance; very small and very large units too."""
    mask, spacing = MASKS["3D blob"], np.array([0.5, 1.5, 3.0])
    for convention, factor in itertools.product(CONVENTIONS, (10.0, 1e-4, 1e4)):
        found = signed_distance(mask, factor * spacing, convention=convention, backend=backend)
        expected = reference.signed(mask, tuple(spacing), convention=convention)
        np.testing.assert_allclose(found / factor, expected, rtol=0, atol=TOLERANCE)


def test_neighbours_differ_by_a_step_at_most(backend):
    """1-Lipschitz, across the boundary too."""
    spacing = (0.5, 1.5, 3.0)
    for name, slice_axis in itertools.product(["3D blob", "3D sparse noise", "3D several objects"], [None, 2]):
        found = signed_distance(MASKS[name], spacing, slice_axis=slice_axis, backend=backend)
        for axis in (0, 1) if slice_axis == 2 else (0, 1, 2):
            assert (np.abs(np.diff(found, axis=axis)) <= spacing[axis] + 1e-4).all()


def test_neighbours_of_a_plane_are_half_a_step_away(backend):
    for axis, step in enumerate((0.5, 1.5, 3.0)):
        mask = np.indices((6, 6, 6))[axis] < 3
        line = np.moveaxis(signed_distance(mask, (0.5, 1.5, 3.0), backend=backend), axis, -1)[2, 4]
        np.testing.assert_allclose(line, (np.arange(6) - 2.5) * step, rtol=0, atol=1e-5)


def larger(reference):
    """Rows longer than what brute force can do, far and near objects; and the exact maps at some voxels."""
    label = np.zeros((40, 33, 21), dtype=np.uint8)
    label[3:9, 4:12, 2:7], label[30:38, 25:33, 15:20], label[20, 3, 18] = 1, 2, 3
    label[ndimage.gaussian_filter(np.random.default_rng(5).random(label.shape), 2) > 0.56] = 2
    points = np.random.default_rng(6).integers(0, label.shape, (200, 3))
    exact = [reference.signed_to_faces(label == number, (0.7, 1.1, 2.5), points) for number in range(4)]
    return label, tuple(points.T), np.stack(exact)


def test_a_larger_image(backend, reference, distance_backends):
    label, points, exact = larger(reference)
    call = functools.partial(signed_distance_map, label, 4, (0.7, 1.1, 2.5))
    assert_equal(call(backend=backend)[:, *points], exact)
    for clip in (0.3, 2.0, 12.0):
        assert_equal(call(backend=backend, clip_mm=clip)[:, *points], np.clip(exact, -clip, clip), clip)
    cases = {}, {"slice_axis": 1}, {"clip_mm": 2.0}, {"clip_mm": 2.0, "slice_axis": 2}, {"convention": "voxel"}
    expected = [distance_backends.maps(label, 4, (0.7, 1.1, 2.5), **options) for options in cases]
    for threads in (1, 2):  # the threads share nothing
        torch.set_num_threads(threads)
        try:
            for options, other in zip(cases, expected, strict=True):
                assert_equal(call(backend=backend, **options), other, options)
        finally:
            torch.set_num_threads(1)


# Real volumes

REAL = {
    "hippocampus": ("hippocampus/labelsTr/*.nii.gz", 3),
    "spinal cord, thick slices": ("spinal_cord/t2s_uncropped_gmseg_manual.nii.gz", 2),
}


@pytest.mark.parametrize(("pattern", "num_classes"), REAL.values(), ids=REAL)
def test_real_volumes(data_root, pattern, num_classes, reference, rng):
    paths = sorted(data_root.glob(pattern))
    if not paths:
        pytest.skip(f"no {pattern} in MEDCONSTRAINTS_DATA")
    image = nibabel.load(paths[0])
    label, spacing = np.asarray(image.dataobj).astype(np.uint8), [float(step) for step in image.header.get_zooms()]
    found = signed_distance_map(label, num_classes, spacing, convention="voxel")
    for number in range(num_classes):
        sides = label != number, label == number
        outside, inside = (ndimage.distance_transform_edt(side, sampling=spacing) for side in sides)
        np.testing.assert_allclose(found[number], outside - inside, rtol=0, atol=1e-3)

    exact = signed_distance_map(label, num_classes, spacing)
    clipped = signed_distance_map(label, num_classes, spacing, clip_mm=10.0)
    np.testing.assert_allclose(clipped, np.clip(exact, -10, 10), rtol=0, atol=1e-3)
    anywhere = rng.integers(0, label.shape, (150, 3))
    for number in range(1, num_classes):
        mask = label == number
        points = np.concatenate([anywhere, rng.choice(np.argwhere(mask), 50)])
        # Faces lie within one voxel of the class: the rest of the volume has none.
        places = np.argwhere(mask)
        box = tuple(slice(max(low - 2, 0), high + 3) for low, high in zip(places.min(0), places.max(0), strict=True))
        where, half_sides = reference.faces(mask[box])
        where = where + [side.start for side in box]
        expected = reference.signed_to_faces(mask, spacing, points, (where, half_sides))
        np.testing.assert_allclose(exact[number][tuple(points.T)], expected, rtol=0, atol=1e-3)


# Errors

LABEL = labels((4, 5, 3), 3)


def replaced(value, dtype=None):
    label = LABEL.astype(dtype or LABEL.dtype)
    label[1, 2, 1] = value
    return label


BAD_LABELS = {
    "not whole": (replaced(1.01, "float64"), "label.*nearest"),
    "not whole, tensor": (torch.from_numpy(replaced(0.5, "float32")), "label.*nearest"),
    "NaN": (replaced(np.nan, "float32"), "label"),
    "class too large": (replaced(3), "label.*num_classes"),
    "class too large, in a byte": (replaced(3, "uint8"), "label.*num_classes"),
    "class too large, tensor": (torch.from_numpy(replaced(3)), "label.*num_classes"),
    "class 1 after a wrap in 8 bits": (replaced(257, "int16"), "label.*num_classes"),
    "class 1 after a wrap in 32 bits": (replaced(2.0**32 + 1, "float64"), "label.*num_classes"),
    "negative class": (replaced(-1), "label"),
    "empty": (np.zeros((0, 4, 3), dtype=int), "label"),
    "one axis": (np.zeros(5, dtype=int), "label"),
    "four axes": (np.zeros((1, 4, 5, 3), dtype=int), "label.*channel"),
}


@pytest.mark.parametrize(("label", "match"), BAD_LABELS.values(), ids=BAD_LABELS)
def test_bad_labels(label, match, backend):
    for classes in (None, [1]):
        with pytest.raises(ValueError, match=match):
            signed_distance_map(label, 3, classes=classes, backend=backend)


BAD_OPTIONS = {
    "NaN spacing": ({"spacing_mm": (1, math.nan, 1)}, "spacing_mm"),
    "zero spacing": ({"spacing_mm": (1, 0, 1)}, "spacing_mm"),
    "two spacings": ({"spacing_mm": (1, 1)}, "spacing_mm"),
    "slice_axis too large": ({"slice_axis": 3}, "slice_axis"),
    "negative slice_axis": ({"slice_axis": -1}, "slice_axis"),
    "clip 0": ({"clip_mm": 0}, "clip_mm"),
    "NaN clip": ({"clip_mm": math.nan}, "clip_mm"),
    "convention": ({"convention": "edge"}, "convention"),
    "backend": ({"backend": "scipy"}, "backend"),
}


@pytest.mark.parametrize(("options", "match"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options(options, match, backend):
    calls = (
        lambda **options: signed_distance_map(LABEL, 3, **options),
        lambda **options: signed_distance(LABEL == 1, **options),
        lambda **options: signed_distance(empty(LABEL.shape), **options),  # an empty mask does not excuse them
    )
    for call in calls:
        with pytest.raises(ValueError, match=match):
            call(**{"backend": backend, **options})
    if "spacing_mm" not in options:
        with pytest.raises(ValueError, match=match):
            Euclidean(**options)


def test_bad_classes_and_slices_of_a_slice():
    for num_classes, classes, match in ((1, None, "num_classes"), (3, [1, 3], "classes"), (3, [-1], "classes")):
        with pytest.raises(ValueError, match=match):
            signed_distance_map(LABEL, num_classes, classes=classes)
    with pytest.raises(ValueError, match="slice_axis"):
        signed_distance_map(LABEL[..., 0], 3, slice_axis=2)


def test_bad_masks(backend):
    for value, dtype in ((2, np.int16), (2, np.uint8), (-1, np.int16), (0.5, np.float32), (math.nan, np.float32)):
        mask = np.zeros((4, 5), dtype)
        mask[1, 2], mask[2, 2] = 1, value
        with pytest.raises(ValueError, match="mask: expected zeros and ones"):
            signed_distance(mask, backend=backend)
    for shape in ((0, 4), (4,), (1, 4, 5, 3), ()):
        with pytest.raises(ValueError, match="mask"):
            signed_distance(np.zeros(shape, dtype=bool), backend=backend)


@pytest.mark.parametrize("shape", [(3, 6, 5), (3, 5, 4, 6)], ids=["2D", "3D"])
def test_several_masks_at_once(shape, backend):
    """What a loss asks for: each mask by itself, within slices too."""
    masks = torch.rand(shape) < 0.3
    spacing = (0.5, 1.5, 3.0)[: len(shape) - 1]
    for axis in (None, 0, 1, 2) if len(shape) == 4 else (None,):
        measure = Euclidean(slice_axis=axis, convention="published", clip_mm=2.0, backend=backend)
        options = {"slice_axis": axis, "convention": "published", "clip_mm": 2.0}
        expected = torch.stack([signed_distance(mask, spacing, **options) for mask in masks])
        torch.testing.assert_close(measure.of_masks(masks, spacing), expected)
    if len(shape) == 3:  # slices of a volume are measured as within it
        assert torch.equal(Euclidean(slice_axis=2).of_masks(masks, spacing), Euclidean().of_masks(masks, spacing))
