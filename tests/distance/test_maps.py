"""Signed distance maps: every backend against brute force over all pairs of voxels, which is itself checked first."""

import functools
import importlib.util
import itertools
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage

from medconstraints.distance import signed_distance, signed_distance_map

BACKENDS = ("numba", "torch", "scipy", "simpleitk")
CONVENTIONS = ("boundary", "voxel", "published")
SPACINGS = {
    2: (None, (0.5, 7.5), (1.0, 3.0), (0.3, 2.0)),
    3: ((1.0, 1.0, 1.0), (0.5, 0.5, 7.5), (1.0, 1.0, 3.0), (0.3, 2.0, 1.0)),
}
TOLERANCE = 1e-4  # mm


def _load_reference():
    path = Path(__file__).parents[1] / "reference" / "distance_reference.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = _load_reference()


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Two threads wait for each other longer than they need for tensors of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each backend that is installed."""
    needs = {"numba": "numba", "simpleitk": "SimpleITK"}.get(request.param)
    if needs:
        pytest.importorskip(needs)
    return request.param


conventions = pytest.mark.parametrize("convention", CONVENTIONS)


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
    "2D sparse noise": noise((8, 7), 0.06),
    "2D one voxel": with_true((8, 7), (3, 2)),
    "2D all but one voxel": ~with_true((8, 7), (3, 2)),
    "2D line": with_true((8, 7), (5, EVERY)),
    "2D checkerboard": checkerboard((6, 7)),
    "2D at the edge": with_true((8, 7), (slice(0, 3), slice(4, 7))),
    "2D one row": noise((1, 9), 0.4, seed=3),
    "2D one column": noise((9, 1), 0.4, seed=3),
    "3D blob": blob((7, 8, 6)),
    "3D noise": noise((7, 8, 6), 0.5),
    "3D sparse noise": noise((7, 8, 6), 0.02),
    "3D dense noise": noise((7, 8, 6), 0.97),
    "3D one voxel": with_true((7, 8, 6), (3, 2, 4)),
    "3D corner voxel": with_true((7, 8, 6), (0, 7, 0)),
    "3D all but one voxel": ~with_true((7, 8, 6), (3, 2, 4)),
    "3D line": with_true((7, 8, 6), (2, EVERY, 3)),
    "3D plane": with_true((7, 8, 6), (EVERY, EVERY, 4)),
    "3D checkerboard": checkerboard((5, 6, 4)),
    "3D at the edges": with_true((7, 8, 6), (slice(0, 3), slice(4, 8), EVERY)),
    "3D several objects": with_true(
        (7, 8, 6), (slice(1, 3), slice(1, 4), slice(0, 2)), (5, 6, 4), (slice(4, 6), slice(0, 2), slice(3, 6))
    ),
    "3D hollow": with_true((7, 7, 7), (slice(1, 6),) * 3) & ~with_true((7, 7, 7), (slice(2, 5),) * 3),
    "3D single slice": noise((8, 7, 1), 0.3),
    "3D first axis of size 1": blob((1, 8, 7)),
    "3D two axes of size 1": noise((1, 9, 1), 0.4, seed=3),
}
masks = pytest.mark.parametrize("name", MASKS)


@functools.cache
def expected_of(name, spacing=None, convention="boundary", slice_axis=None, clip_mm=None):
    """Brute force, once for all backends."""
    return reference.signed(MASKS[name], spacing, convention=convention, slice_axis=slice_axis, clip_mm=clip_mm)


def assert_equal(found, expected, note=""):
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE, err_msg=str(note))


# The reference itself: values by hand, and other derivations

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
def test_reference_by_hand(mask, spacing, convention, expected):
    found = reference.signed(np.array(mask), spacing, convention=convention)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("mask", "spacing", "convention", "expected"), HAND.values(), ids=HAND)
def test_by_hand(mask, spacing, convention, expected, backend):
    found = signed_distance(np.array(mask, dtype=bool), spacing, convention=convention, backend=backend)
    assert_equal(found, np.array(expected))


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


def test_one_voxel_by_hand():
    for mask, sign in ((ONE, 1), (~ONE, -1)):
        found = reference.signed(mask, (1, 1, 3))
        points = np.array([*HAND_3D]) + 2
        faces = reference.signed_to_faces(mask, (1, 1, 3), points)
        for point, to_faces, expected in zip(points, faces, HAND_3D.values(), strict=True):
            assert found[tuple(point)] == pytest.approx(sign * expected, abs=1e-12)
            assert to_faces == pytest.approx(sign * expected, abs=1e-12)


@masks
def test_reference_equals_scipy_between_centres(name):
    mask = MASKS[name]
    for spacing in SPACINGS[mask.ndim]:
        outside, inside = (ndimage.distance_transform_edt(side, sampling=spacing) for side in (~mask, mask))
        found = expected_of(name, spacing, "voxel")
        np.testing.assert_allclose(found, outside - inside, rtol=0, atol=1e-9)
        smallest = min(spacing or [1.0])
        np.testing.assert_allclose(
            expected_of(name, spacing, "published"), outside - inside + smallest * mask, rtol=0, atol=1e-9
        )


def lattice_distance(mask, spacing):
    """The point of a face nearest to a voxel's centre has coordinates that are whole multiples of half a voxel."""
    free = np.ones([2 * size + 1 for size in mask.shape], dtype=bool)
    for axis in range(mask.ndim):
        front, back = np.take(mask, range(1, mask.shape[axis]), axis), np.take(mask, range(mask.shape[axis] - 1), axis)
        for place in np.argwhere(front != back):
            # Voxel i has its centre at 2 i + 1 of the lattice, and the face behind it at 2 i + 2.
            corner = [slice(2 * p, 2 * p + 3) for p in place]
            corner[axis] = slice(2 * place[axis] + 2, 2 * place[axis] + 3)
            free[tuple(corner)] = False
    half = np.ones(mask.ndim) / 2 if spacing is None else np.array(spacing) / 2
    far = ndimage.distance_transform_edt(free, sampling=half)[(slice(1, None, 2),) * mask.ndim]
    return np.where(mask, -far, far)


@masks
def test_reference_equals_faces_and_lattice(name):
    mask = MASKS[name]
    for spacing in SPACINGS[mask.ndim]:
        found = expected_of(name, spacing)
        np.testing.assert_allclose(found, lattice_distance(mask, spacing), rtol=0, atol=1e-9)
        faces = reference.signed_to_faces(mask, spacing, reference.centres(mask.shape))
        np.testing.assert_allclose(found, faces.reshape(mask.shape), rtol=0, atol=1e-9)
        assert (found[mask] < 0).all() and (found[~mask] > 0).all()


# The package against the reference


@masks
def test_equals_the_reference(name, backend):
    mask = MASKS[name]
    for convention, spacing in itertools.product(CONVENTIONS, SPACINGS[mask.ndim]):
        found = signed_distance(mask, spacing, convention=convention, backend=backend)
        assert_equal(found, expected_of(name, spacing, convention), (convention, spacing))


@masks
def test_default_backend_and_convention(name):
    mask = MASKS[name]
    assert_equal(signed_distance(mask), expected_of(name))
    spacing = SPACINGS[mask.ndim][1]
    assert_equal(signed_distance(mask, spacing), expected_of(name, spacing))


@pytest.mark.parametrize("name", ["3D blob", "3D sparse noise", "3D plane", "3D at the edges", "3D single slice"])
@conventions
def test_slices(name, convention, backend):
    """Slice by slice; empty and full slices are zeros."""
    mask, spacing = MASKS[name], (0.5, 1.5, 3.0)
    for axis in (0, 1, 2, -1):
        found = signed_distance(mask, spacing, convention=convention, slice_axis=axis, backend=backend)
        assert_equal(found, expected_of(name, spacing, convention, axis), axis)
        rest = tuple(np.delete(spacing, axis))
        for k in range(mask.shape[axis]):
            alone = signed_distance(np.take(mask, k, axis), rest, convention=convention, backend=backend)
            assert_equal(np.take(found, k, axis), alone, (axis, k))


def test_slices_with_and_without_the_class(backend):
    mask = empty((5, 4, 3))
    mask[1:3, 1:3, 1], mask[..., 2] = True, True
    found = signed_distance(mask, (1, 1, 3), slice_axis=2, backend=backend)
    assert (found[..., 0] == 0).all() and (found[..., 2] == 0).all()
    assert (found[..., 1][mask[..., 1]] < 0).all() and (found[..., 1][~mask[..., 1]] > 0).all()


@pytest.mark.parametrize(
    "name", ["2D one voxel", "2D noise", "3D blob", "3D one voxel", "3D corner voxel", "3D hollow"]
)
@conventions
def test_clip(name, convention, backend):
    """What is far away need not be computed, but what is near is exact."""
    mask = MASKS[name]
    for spacing in SPACINGS[mask.ndim][:3]:
        exact = expected_of(name, spacing, convention)
        for clip in (0.2, 0.5, 1.0, 1.7, 3.2, 8.0, 1e6):
            found = signed_distance(mask, spacing, convention=convention, clip_mm=clip, backend=backend)
            assert_equal(found, np.clip(exact, -clip, clip), (spacing, clip))


def test_clip_where_a_narrow_neighbourhood_is_not_enough(backend):
    """Two far objects in a long image, and an object at each end of an axis."""
    mask = empty((40, 6))
    mask[2:5, 1:3], mask[30:36, 3:6] = True, True
    exact = reference.signed(mask, (0.5, 2.0))
    for clip in (0.3, 1.0, 2.5, 6.0, 20.0):
        assert_equal(
            signed_distance(mask, (0.5, 2.0), clip_mm=clip, backend=backend), np.clip(exact, -clip, clip), clip
        )
        assert_equal(
            signed_distance(~mask, (0.5, 2.0), clip_mm=clip, backend=backend), np.clip(-exact, -clip, clip), clip
        )


def test_clip_of_slices(backend):
    name, spacing = "3D several objects", (0.5, 1.5, 3.0)
    for axis, clip in itertools.product((0, 1, 2), (0.2, 1.0, 2.0)):
        found = signed_distance(MASKS[name], spacing, slice_axis=axis, clip_mm=clip, backend=backend)
        assert_equal(found, expected_of(name, spacing, "boundary", axis, clip), (axis, clip))


@conventions
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3), (6, 1), (1, 1, 4), (1, 1), (1, 1, 1)])
def test_empty_and_full_masks_are_zero(shape, convention, backend):
    options = {"convention": convention, "backend": backend}
    spacing = (0.5, 2.0, 3.0)[: len(shape)]
    for mask in (np.zeros(shape, dtype=bool), np.ones(shape, dtype=bool)):
        for more in ({}, {"clip_mm": 1.0}, {"slice_axis": 0} if len(shape) == 3 else {}):
            found = signed_distance(mask, spacing, **options, **more)
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
    "voxel": {"convention": "voxel"},
    "published": {"convention": "published"},
    "slices": {"slice_axis": -1},
    "clip": {"clip_mm": 1.2},
    "clipped slices": {"slice_axis": 0, "clip_mm": 0.6},
}


@functools.cache
def expected_maps(case, spacing, options):
    """Brute force, once for all backends."""
    return reference.maps(*LABELS[case], spacing, **OPTIONS[options])


@pytest.mark.parametrize("case", LABELS)
def test_each_class_alone(case, backend):
    label, num_classes = LABELS[case]
    spacing = (0.5, 1.0, 3.0)[: label.ndim]
    for name, options in OPTIONS.items():
        if label.ndim == 2 and "slice_axis" in options:
            continue
        found = signed_distance_map(label, num_classes, spacing, backend=backend, **options)
        assert_equal(found, expected_maps(case, spacing, name), name)
        for number in range(num_classes):
            alone = signed_distance(label == number, spacing, backend=backend, **options)
            np.testing.assert_allclose(found[number], alone, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("classes", [[1, 3], [3], (0,), [3, 1], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("options", [{}, {"clip_mm": 1.2}, {"slice_axis": 2}], ids=["plain", "clip", "slices"])
def test_chosen_classes(classes, options, backend):
    """One map for each of them, in their order."""
    label, num_classes = LABELS["3D, 5"]
    found = signed_distance_map(label, num_classes, (0.5, 1.0, 3.0), classes=classes, backend=backend, **options)
    assert_equal(found, reference.maps(label, num_classes, (0.5, 1.0, 3.0), **options)[list(classes)])


def test_many_classes(backend):
    """More than a byte can number; 43 is what is left of 299 in one."""
    label = np.where(MASKS["3D blob"], 299, np.where(MASKS["3D noise"], 43, 0)).astype(np.int16)
    found = signed_distance_map(label, 300, (0.5, 1.0, 3.0), classes=[299, 43, 44], backend=backend)
    expected = [reference.signed(label == number, (0.5, 1.0, 3.0)) for number in (299, 43, 44)]
    assert_equal(found, np.stack(expected))


def test_permuted_classes(backend):
    label, num_classes = LABELS["3D, 3"]
    order = np.array([2, 0, 1])
    found = signed_distance_map(label, num_classes, (1, 1, 3), backend=backend)
    permuted = signed_distance_map(order[label], num_classes, (1, 1, 3), backend=backend)
    np.testing.assert_allclose(permuted[order], found, rtol=0, atol=1e-6)


# What is given and what comes back


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32", "int64", "float32", "float64", ">i2"])
def test_types_of_labels(dtype, backend):
    label, num_classes = LABELS["3D, 3"]
    given = label.astype(dtype)
    found = signed_distance_map(given, num_classes, (1, 1, 3), backend=backend)
    assert_equal(found, reference.maps(label, num_classes, (1, 1, 3)))
    np.testing.assert_array_equal(given, label.astype(dtype))  # not written to


def test_bool_label(backend):
    mask = MASKS["3D blob"]
    found = signed_distance_map(mask, 2, (1, 1, 3), backend=backend)
    assert_equal(found, reference.maps(mask.astype(int), 2, (1, 1, 3)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32, torch.bool])
def test_tensors_in_tensors_out(dtype, backend):
    label = labels((6, 7, 5), 2 if dtype is torch.bool else 3)
    num_classes, tensor = int(label.max()) + 1, torch.from_numpy(label).to(dtype)
    found = signed_distance_map(tensor, num_classes, (1, 1, 3), backend=backend)
    assert isinstance(found, torch.Tensor) and found.dtype == torch.float32
    assert_equal(found.numpy(), reference.maps(label, num_classes, (1, 1, 3)))
    mask = signed_distance(tensor == 1, (1, 1, 3), backend=backend)
    assert isinstance(mask, torch.Tensor) and mask.dtype == torch.float32
    assert_equal(mask.numpy(), reference.signed(label == 1, (1, 1, 3)))


def test_meta_tensor(backend):
    label = labels((6, 7, 5), 3)
    found = signed_distance_map(MetaTensor(torch.from_numpy(label)), 3, (1, 1, 3), backend=backend)
    assert isinstance(found, torch.Tensor)
    assert_equal(torch.as_tensor(found).numpy(), reference.maps(label, 3, (1, 1, 3)))


LAYOUTS = {
    "Fortran": np.asfortranarray,
    "every second": lambda array: np.repeat(array, 2, axis=1)[:, ::2],
    "negative strides": lambda array: np.ascontiguousarray(array[::-1, :, ::-1])[::-1, :, ::-1],
    "transposed": lambda array: np.ascontiguousarray(array.transpose(2, 0, 1)).transpose(1, 2, 0),
    "read only": lambda array: np.broadcast_to(array[None], (2, *array.shape))[1],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_in_memory(layout, backend):
    label, num_classes = LABELS["3D, 3"]
    given = layout(label)
    warnings.simplefilter("error")  # restored by pytest after each test
    np.testing.assert_array_equal(given, label)
    for options in ({}, {"slice_axis": 1}, {"clip_mm": 1.0}):
        expected = reference.maps(label, num_classes, (0.5, 1, 3), **options)
        assert_equal(signed_distance_map(given, num_classes, (0.5, 1, 3), backend=backend, **options), expected)
        assert_equal(signed_distance(given == 1, (0.5, 1, 3), backend=backend, **options), expected[1])
    tensor = torch.from_numpy(label).permute(2, 0, 1)
    found = signed_distance_map(tensor, num_classes, (3, 0.5, 1), backend=backend)
    assert_equal(found.numpy(), reference.maps(label, num_classes, (0.5, 1, 3)).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("spacing", [[0.5, 1, 3], np.array([0.5, 1, 3]), torch.tensor([0.5, 1.0, 3.0])], ids=type)
def test_types_of_spacing(spacing, backend):
    expected = expected_of("3D blob", (0.5, 1.0, 3.0))
    assert_equal(signed_distance(MASKS["3D blob"], spacing, backend=backend), expected)


# Properties


@pytest.mark.parametrize("name", ["2D noise", "3D blob", "3D at the edges", "3D several objects"])
@conventions
def test_flips_and_transposes(name, convention, backend):
    mask = MASKS[name]
    spacing = (0.5, 1.5, 3.0)[: mask.ndim]
    call = functools.partial(signed_distance, convention=convention, backend=backend)
    found = call(mask, spacing)
    assert (found != 0).any()
    for axis in range(mask.ndim):
        np.testing.assert_allclose(call(np.flip(mask, axis), spacing), np.flip(found, axis), rtol=0, atol=1e-5)
    for order in itertools.permutations(range(mask.ndim)):
        turned = call(mask.transpose(order), [spacing[axis] for axis in order])
        np.testing.assert_allclose(turned, found.transpose(order), rtol=0, atol=1e-5)


@conventions
def test_translation_in_a_padded_image(convention, backend):
    small = blob((5, 4, 4))
    spacing = (0.5, 1.0, 3.0)
    first, second = empty((10, 10, 9)), empty((10, 10, 9))
    first[2:7, 3:7, 2:6], second[4:9, 5:9, 4:8] = small, small
    one, two = (signed_distance(mask, spacing, convention=convention, backend=backend) for mask in (first, second))
    np.testing.assert_allclose(one[:8, :8, :7], two[2:, 2:, 2:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("convention", ["boundary", "voxel"])
@pytest.mark.parametrize("name", ["2D blob", "2D sparse noise", "3D blob", "3D noise", "3D hollow"])
def test_the_complement_has_the_opposite_sign(name, convention, backend):
    mask = MASKS[name]
    spacing = (0.5, 1.5, 3.0)[: mask.ndim]
    found, other = (signed_distance(m, spacing, convention=convention, backend=backend) for m in (mask, ~mask))
    np.testing.assert_allclose(found, -other, rtol=0, atol=1e-6)
    assert (found[mask] < 0).all() and (found[~mask] > 0).all()


@conventions
def test_units(convention, backend):
    """Ten times the spacing, ten times the distance; very small and very large units too."""
    mask, spacing = MASKS["3D blob"], np.array([0.5, 1.5, 3.0])
    expected = expected_of("3D blob", tuple(spacing), convention)
    for factor in (10.0, 0.25, 1e-4, 1e4):
        found = signed_distance(mask, factor * spacing, convention=convention, backend=backend)
        np.testing.assert_allclose(found / factor, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "slice_axis"),
    [("2D noise", None), *itertools.product(["3D blob", "3D sparse noise", "3D several objects"], [None, 2])],
)
def test_neighbours_differ_by_a_step_at_most(name, slice_axis, backend):
    """1-Lipschitz, across the boundary too."""
    mask = MASKS[name]
    spacing = (0.5, 1.5, 3.0)[: mask.ndim]
    found = signed_distance(mask, spacing, slice_axis=slice_axis, backend=backend)
    for axis in range(mask.ndim):
        if axis != slice_axis:
            assert (np.abs(np.diff(found, axis=axis)) <= spacing[axis] + 1e-4).all()


def test_neighbours_of_a_plane_are_half_a_step_away(backend):
    for axis, step in enumerate((0.5, 1.5, 3.0)):
        mask = np.indices((6, 6, 6))[axis] < 3
        found = signed_distance(mask, (0.5, 1.5, 3.0), backend=backend)
        line = np.moveaxis(found, axis, -1)[2, 4]
        np.testing.assert_allclose(line, (np.arange(6) - 2.5) * step, rtol=0, atol=1e-5)


@functools.cache
def larger():
    """Rows longer than what brute force can do, far and near objects; and the exact maps at some voxels."""
    label = np.zeros((40, 33, 21), dtype=np.uint8)
    label[3:9, 4:12, 2:7], label[30:38, 25:33, 15:20], label[20, 3, 18] = 1, 2, 3
    label[ndimage.gaussian_filter(np.random.default_rng(5).random(label.shape), 2) > 0.56] = 2
    points = np.random.default_rng(6).integers(0, label.shape, (200, 3))
    exact = [reference.signed_to_faces(label == number, (0.7, 1.1, 2.5), points) for number in range(4)]
    return label, tuple(points.T), np.stack(exact)


def test_a_larger_image(backend):
    label, points, exact = larger()
    call = functools.partial(signed_distance_map, label, 4, (0.7, 1.1, 2.5))
    assert_equal(call(backend=backend)[:, *points], exact)
    for clip in (0.3, 2.0, 12.0):
        assert_equal(call(backend=backend, clip_mm=clip)[:, *points], np.clip(exact, -clip, clip), clip)
    for options in ({}, {"slice_axis": 1}, {"clip_mm": 2.0, "slice_axis": 2}):
        expected = call(backend="scipy", **options)
        np.testing.assert_allclose(call(backend=backend, **options), expected, rtol=0, atol=TOLERANCE, err_msg=options)
    torch.set_num_threads(2)
    try:
        for options in ({}, {"slice_axis": 1}, {"clip_mm": 2.0}):  # the threads share nothing
            one, two = call(backend="scipy", **options), call(backend=backend, **options)
            np.testing.assert_allclose(two, one, rtol=0, atol=TOLERANCE, err_msg=options)
    finally:
        torch.set_num_threads(1)
    found = call(backend=backend, convention="voxel")
    for number in range(4):
        sides = (
            ndimage.distance_transform_edt(side, sampling=(0.7, 1.1, 2.5))
            for side in (label != number, label == number)
        )
        outside, inside = sides
        assert_equal(found[number], outside - inside)


# Real volumes


def real_label(data_root, pattern):
    nibabel = pytest.importorskip("nibabel")
    paths = sorted(data_root.glob(pattern))
    if not paths:
        pytest.skip(f"no {pattern} in MEDCONSTRAINTS_DATA")
    image = nibabel.load(paths[0])
    return np.asarray(image.dataobj).astype(np.uint8), [float(step) for step in image.header.get_zooms()]


REAL = {
    "hippocampus": ("hippocampus/labelsTr/*.nii.gz", 3),
    "spinal cord, thick slices": ("spinal_cord/t2s_uncropped_gmseg_manual.nii.gz", 2),
}


@pytest.mark.parametrize(("pattern", "num_classes"), REAL.values(), ids=REAL)
def test_real_volumes(data_root, pattern, num_classes, rng):
    label, spacing = real_label(data_root, pattern)
    found = signed_distance_map(label, num_classes, spacing, convention="voxel", backend="auto")
    expected = signed_distance_map(label, num_classes, spacing, convention="voxel", backend="scipy", classes=[1])
    np.testing.assert_allclose(found[1], expected[0], rtol=0, atol=1e-3)
    for number in range(num_classes):
        outside, inside = (
            ndimage.distance_transform_edt(side, sampling=spacing) for side in (label != number, label == number)
        )
        np.testing.assert_allclose(found[number], outside - inside, rtol=0, atol=1e-3)

    exact = signed_distance_map(label, num_classes, spacing, backend="auto")
    clipped = signed_distance_map(label, num_classes, spacing, clip_mm=10.0, backend="auto")
    np.testing.assert_allclose(clipped, np.clip(exact, -10, 10), rtol=0, atol=1e-3)
    anywhere = rng.integers(0, label.shape, (150, 3))
    for number in range(1, num_classes):
        mask = label == number
        points = np.concatenate([anywhere, rng.choice(np.argwhere(mask), 50)])
        # Faces lie within one voxel of the class: the rest of the volume has none.
        box = tuple(slice(max(low - 2, 0), high + 3) for low, high in zip(*_corners(mask), strict=True))
        where, half_sides = reference.faces(mask[box])
        where = where + [side.start for side in box]
        expected = reference.signed_to_faces(mask, spacing, points, (where, half_sides))
        np.testing.assert_allclose(exact[number][tuple(points.T)], expected, rtol=0, atol=1e-3)


def _corners(mask):
    places = np.argwhere(mask)
    return places.min(0), places.max(0)


# Errors

LABEL = labels((4, 5, 3), 3)


def replaced(value, dtype=None):
    label = LABEL.astype(dtype or LABEL.dtype)
    label[1, 2, 1] = value
    return label


BAD_MAPS = {
    "not whole": (lambda: (replaced(0.5, "float32"), 3), {}, "label"),
    "nearly whole": (lambda: (replaced(1.01, "float64"), 3), {}, "label"),
    "not whole, tensor": (lambda: (torch.from_numpy(replaced(0.5, "float32")), 3), {}, "label"),
    "NaN": (lambda: (replaced(np.nan, "float32"), 3), {}, "label"),
    "infinite": (lambda: (replaced(np.inf, "float32"), 3), {}, "label"),
    "class too large": (lambda: (replaced(3), 3), {}, "label|num_classes"),
    "class 1 after a wrap in 8 bits": (lambda: (replaced(257, "int16"), 3), {}, "label|num_classes"),
    "class 1 after a wrap in 16 bits": (lambda: (replaced(2**16 + 1, "int32"), 3), {}, "label|num_classes"),
    "class 1 after a wrap in 32 bits": (lambda: (replaced(2**32 + 1, "int64"), 3), {}, "label|num_classes"),
    "class 1 after a wrap, float": (lambda: (replaced(2.0**32 + 1, "float64"), 3), {}, "label|num_classes"),
    "class far too large, float": (lambda: (replaced(1e30, "float64"), 3), {}, "label|num_classes"),
    "class too large, tensor": (lambda: (torch.from_numpy(replaced(3)), 3), {}, "label|num_classes"),
    "negative class": (lambda: (replaced(-1), 3), {}, "label"),
    "negative class, float": (lambda: (replaced(-1, "float32"), 3), {}, "label"),
    "too large where the class is not asked for": (lambda: (replaced(7), 3), {"classes": [1]}, "label|num_classes"),
    "empty": (lambda: (np.zeros((0, 4, 3), dtype=int), 3), {}, "label"),
    "one axis": (lambda: (np.zeros(5, dtype=int), 3), {}, "label"),
    "four axes": (lambda: (np.zeros((1, 4, 5, 3), dtype=int), 3), {}, "label"),
    "five axes": (lambda: (np.zeros((1, 1, 4, 5, 3), dtype=int), 3), {}, "label"),
    "no classes": (lambda: (LABEL, 0), {}, "num_classes"),
    "negative number of classes": (lambda: (LABEL, -3), {}, "num_classes"),
    "classes outside": (lambda: (LABEL, 3), {"classes": [1, 3]}, "classes"),
    "negative in classes": (lambda: (LABEL, 3), {"classes": [-1]}, "classes"),
}


@pytest.mark.parametrize(("arguments", "options", "match"), BAD_MAPS.values(), ids=BAD_MAPS)
def test_bad_labels(arguments, options, match, backend):
    with pytest.raises(ValueError, match=match):
        signed_distance_map(*arguments(), (1, 1, 3), backend=backend, **options)


def test_a_label_that_is_not_whole_says_what_to_do():
    with pytest.raises(ValueError, match=r"label.*nearest"):
        signed_distance_map(replaced(0.5, "float32"), 3)


BAD_OPTIONS = {
    "NaN spacing": ({"spacing_mm": (1, math.nan, 1)}, "spacing_mm"),
    "infinite spacing": ({"spacing_mm": (1, math.inf, 1)}, "spacing_mm"),
    "zero spacing": ({"spacing_mm": (1, 0, 1)}, "spacing_mm"),
    "negative spacing": ({"spacing_mm": (1, -1, 1)}, "spacing_mm"),
    "two spacings": ({"spacing_mm": (1, 1)}, "spacing_mm"),
    "four spacings": ({"spacing_mm": (1, 1, 1, 1)}, "spacing_mm"),
    "slice_axis too large": ({"slice_axis": 3}, "slice_axis"),
    "slice_axis too small": ({"slice_axis": -4}, "slice_axis"),
    "clip 0": ({"clip_mm": 0}, "clip_mm"),
    "negative clip": ({"clip_mm": -1.0}, "clip_mm"),
    "NaN clip": ({"clip_mm": math.nan}, "clip_mm"),
    "convention": ({"convention": "edge"}, "convention"),
    "backend": ({"backend": "matlab"}, "backend"),
}


@pytest.mark.parametrize(("options", "match"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options(options, match, backend):
    options = {"backend": backend, **options}
    with pytest.raises(ValueError, match=match):
        signed_distance_map(LABEL, 3, **options)
    with pytest.raises(ValueError, match=match):
        signed_distance(LABEL == 1, **options)
    with pytest.raises(ValueError, match=match):  # an empty mask does not excuse them
        signed_distance(empty(LABEL.shape), **options)


def test_a_slice_has_no_slices():
    for axis in (2, -3):
        with pytest.raises(ValueError, match="slice_axis"):
            signed_distance_map(LABEL[..., 0], 3, slice_axis=axis)


BAD_MASKS = {"2": 2, "-1": -1, "a half": 0.5, "NaN": math.nan, "257": 257}


@pytest.mark.parametrize("value", BAD_MASKS.values(), ids=BAD_MASKS)
def test_bad_values_of_masks(value, backend):
    mask = empty((4, 5)).astype(np.float32 if isinstance(value, float) else np.int16)
    mask[1, 2], mask[2, 2] = 1, value
    with pytest.raises(ValueError, match="mask"):
        signed_distance(mask, backend=backend)


def test_masks_of_zeros_and_ones(backend):
    for dtype in (np.uint8, np.int64, np.float32):
        assert_equal(signed_distance(MASKS["3D blob"].astype(dtype), backend=backend), expected_of("3D blob"), dtype)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4), (4,), (1, 4, 5, 3), ()])
def test_bad_shapes_of_masks(shape, backend):
    with pytest.raises(ValueError, match="mask"):
        signed_distance(np.zeros(shape, dtype=bool), backend=backend)
