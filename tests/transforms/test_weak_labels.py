"""Weak labels: against erosion and discs voxel by voxel, on real labels and scribbles, for hybrid training."""

import itertools
import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, MapLabelValued, RandAffined, Rotate90d
from scipy import ndimage

from medconstraints.transforms import VolumeError
from medconstraints.transforms.weak_label_maps import erode_label, random_point_label
from medconstraints.transforms.weak_labels import (
    ErodeLabeld,
    RandomPointLabeld,
    ScribbleToWeakLabeld,
    is_fully_labelled,
)

ODD_SIDES = {9: [9, 6, 4, 3, 2, 1], 5: [5, 4, 3, 2, 1], 3: [3, 2, 1], 10: [10, 7, 5, 4, 3, 2, 1], 1: [1]}


def slices_of(shape, slice_axis):
    """Index of the volume, or of each slice."""
    if slice_axis is None:
        return [(slice(None),) * len(shape)]
    return [tuple(i if a == slice_axis else slice(None) for a in range(len(shape))) for i in range(shape[slice_axis])]


def slow_erosion(label, sides, slice_axis):
    """Reference: for each voxel look at its whole box; smaller boxes until a voxel is left."""
    weak = np.full(label.shape, -1)
    for index, cls in itertools.product(slices_of(label.shape, slice_axis), np.unique(label[label > 0])):
        mask = np.pad(label[index] == cls, 16)
        for side in sides:
            before, after = side // 2, side - side // 2
            kept = [v for v in np.argwhere(mask) if mask[tuple(slice(x - before, x + after) for x in v)].all()]
            if kept:
                break
        part = weak[index]
        for voxel in kept:
            part[tuple(voxel - 16)] = cls
    return weak


def disc(shape, radius, centre=None):
    grid = np.indices(shape)
    centre = np.array([n // 2 for n in shape] if centre is None else centre).reshape(-1, *[1] * len(shape))
    return np.square(grid - centre).sum(0) <= radius**2


@pytest.fixture
def label(rng):
    """Two ragged classes in (18, 16, 9)."""
    array = np.zeros((18, 16, 9), dtype=np.uint8)
    array[2:9, 3:14, 1:8] = 1
    array[9:16, 5:12, 2:7] = 2
    array[rng.random(array.shape) < 0.01] = 0
    return array


# Erosion


@pytest.mark.parametrize("slice_axis", [None, 0, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5, 9, 10])
def test_erosion_voxel_by_voxel(label, kernel, slice_axis):
    weak = erode_label(label, kernel_voxels=kernel, slice_axis=slice_axis)
    assert weak.dtype == np.int32
    np.testing.assert_array_equal(weak, slow_erosion(label, ODD_SIDES[kernel], slice_axis))


@pytest.mark.parametrize("slice_axis", [None, 1])
def test_erosion_of_2d_labels(rng, slice_axis):
    for density in (0.3, 0.9):
        array = rng.integers(1, 3, (9, 13)).repeat(2, 0) * (rng.random((18, 13)) < density)
        expected = slow_erosion(array, [5, 4, 3, 2, 1], slice_axis)
        np.testing.assert_array_equal(erode_label(array, kernel_voxels=5, slice_axis=slice_axis), expected)


def test_the_kernel_shrinks_as_agreed():
    """A square of n pixels is left with (n - k + 1)^2 by the first k of the series that fits it."""
    series = [10, 7, 5, 4, 3, 2, 1]
    for n in range(1, 12):
        array = np.zeros((16, 16), dtype=int)
        array[2 : 2 + n, 2 : 2 + n] = 1
        side = next(k for k in series if k <= n)
        assert (erode_label(array) == 1).sum() == (n - side + 1) ** 2


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_erosion_flips_with_the_label(axis):
    """With odd boxes; an even one has no middle."""
    label = np.where(disc((12, 13, 14), 4), 1, 0)  # the box fits at once
    flipped = erode_label(np.flip(label, axis), kernel_voxels=3)
    np.testing.assert_array_equal(np.flip(flipped, axis), erode_label(label, kernel_voxels=3))
    assert (flipped == 1).sum() > 1


def test_erosion_permutes_with_the_classes(label):
    weak = erode_label(label)
    assert set(np.unique(weak)) == {-1, 1, 2}
    swapped = np.select([weak == 1, weak == 2], [2, 1], -1)
    np.testing.assert_array_equal(erode_label(np.array([0, 2, 1])[label]), swapped)


@pytest.mark.parametrize("dims", [2, 3])
def test_whole_image_one_class_is_eroded_from_its_border(dims):
    weak = erode_label(np.full((7,) * dims, 2), kernel_voxels=3)
    inner = np.full((7,) * dims, -1)
    inner[(slice(1, -1),) * dims] = 2
    np.testing.assert_array_equal(weak, inner)


FUNCTIONS = {"erosion": erode_label, "point": random_point_label}


@pytest.mark.parametrize("slice_axis", [None, 0, 1])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 4)], ids=["2D", "3D"])
def test_empty_label_and_one_voxel(function, shape, slice_axis):
    array = np.zeros(shape, dtype=np.uint8)
    assert (function(array, slice_axis=slice_axis) == -1).all()
    corner = (0,) * len(shape)
    array[corner] = 3
    weak = function(array, slice_axis=slice_axis)
    assert weak[corner] == 3 and (weak != -1).sum() == 1


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_other_ignored_values(function, label):
    """Voxels without annotation are no class, and those of the weak label get the same value."""
    partial = np.where(np.arange(9) == 4, 255, label)
    weak = function(partial, ignore_index=255)
    assert set(np.unique(weak)) == {1, 2, 255} and (weak[..., 4] == 255).all()
    kept = weak != 255
    np.testing.assert_array_equal(weak[kept], label[kept])
    same = function(np.where(np.arange(9) == 4, -1, label.astype(int)))
    if function is erode_label:
        np.testing.assert_array_equal(np.where(weak == 255, -1, weak), same)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize(
    "convert",
    [
        lambda a: a.astype(np.float32),
        lambda a: torch.from_numpy(a),
        lambda a: torch.from_numpy(a).half(),
        lambda a: MetaTensor(torch.from_numpy(a)),
        lambda a: np.asfortranarray(a),
    ],
    ids=["float32", "tensor", "half tensor", "MetaTensor", "Fortran order"],
)
def test_any_type_of_label(function, convert, label):
    np.testing.assert_array_equal(function(convert(label)), function(label))


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize(
    ("array", "options", "words"),
    [
        (np.zeros(4), {}, r"label: expected a 2D or 3D map without channel axis, got shape \(4,\)"),
        (np.zeros((1, 2, 3, 4)), {}, "label: expected a 2D or 3D map without channel axis"),
        (np.array([[0, -2]]), {}, r"label: expected whole class numbers >= 0 or ignore_index=-1, got -2; set ignore"),
        (np.array([[0, 0.5]]), {}, "label: expected whole class numbers .* got 0.5"),
        (np.array([[0, np.nan]]), {}, "label: expected whole class numbers .* got nan"),
        (np.array([[0, np.inf]]), {}, "label: expected whole class numbers .* got inf"),
        (np.zeros((4, 4)), {"slice_axis": 2}, r"slice_axis: expected None or an axis 0\.\.1, got 2"),
        (np.zeros((4, 4)), {"slice_axis": -1}, r"slice_axis: expected None or an axis 0\.\.1, got -1"),
        (np.zeros((4, 4)), {"ignore_index": 0}, "ignore_index: expected an integer that is no class.* got 0"),
    ],
)
def test_refusals(function, array, options, words):
    with pytest.raises(ValueError, match=words):
        function(array, **options)


@pytest.mark.parametrize(
    ("function", "name", "value", "low"),
    [
        (erode_label, "kernel_voxels", 0, 1),
        (erode_label, "kernel_voxels", 2.5, 1),
        (random_point_label, "radius_voxels", -1, 0),
        (random_point_label, "radius_voxels", 0.5, 0),
    ],
)
def test_sizes_are_whole_numbers(function, name, value, low):
    with pytest.raises(ValueError, match=f"{name}: expected an integer >= {low}, got {value}"):
        function(np.zeros((4, 4)), **{name: value})
    transform = ErodeLabeld if function is erode_label else RandomPointLabeld
    with pytest.raises(ValueError, match=f"{name}: expected an integer >= {low}, got {value}"):
        transform(**{name: value})


# Random points


def largest_disc(mask, centre, radius):
    """Reference: try radii squared from the largest on; the first disc wholly inside the mask and the image."""
    padded = np.pad(mask, radius + 1)
    distance = np.square(np.indices(padded.shape) - np.array(centre).reshape(-1, *[1] * mask.ndim) - radius - 1).sum(0)
    for squared in range(radius**2, -1, -1):
        found = distance <= squared
        if padded[found].all():
            return found[(slice(radius + 1, -radius - 1),) * mask.ndim]
    raise AssertionError("the centre is not in the mask")


@pytest.mark.parametrize("slice_axis", [None, 0, 2])
@pytest.mark.parametrize("radius", [0, 1, 2, 4])
def test_discs_are_the_largest_inside_their_class(label, radius, slice_axis):
    for seed in range(3):
        weak = random_point_label(label, radius_voxels=radius, slice_axis=slice_axis, background=True, seed=seed)
        for index, cls in itertools.product(slices_of(label.shape, slice_axis), (0, 1, 2)):
            mask, found = label[index] == cls, weak[index] == cls
            assert found.any() == mask.any()
            if found.any():  # the middle of a disc is the mean of its voxels
                centre = np.argwhere(found).mean(0)
                np.testing.assert_array_equal(found, largest_disc(mask, centre, radius))


@pytest.mark.parametrize("shape", [(40, 44), (30, 28, 26)], ids=["disc", "ball"])
def test_a_disc_in_the_middle_of_a_large_object_has_the_full_radius(shape):
    inside = disc(shape, 12)
    counts = set()
    for seed in range(20):
        weak = random_point_label(inside, seed=seed) == 1
        assert inside[weak].all()
        counts.add(int(weak.sum()))
    assert max(counts) == disc((11,) * len(shape), 4).sum()
    assert len(counts) > 1  # those near the rim are smaller


def test_a_disc_meets_no_border_of_the_image():
    whole = np.ones((7, 7), dtype=int)
    seen = {}
    for seed in range(800):
        weak = random_point_label(whole, radius_voxels=2, seed=seed) == 1
        seen.setdefault(tuple(np.argwhere(weak).mean(0)), int(weak.sum()))
    for (row, column), count in seen.items():
        depth = min(row, column, 6 - row, 6 - column)
        assert count == {0: 1, 1: 9, 2: 13, 3: 13}[depth]
    assert set(seen) == set(itertools.product(range(7), range(7)))  # each voxel can be drawn


def test_points_are_uniform_over_the_class():
    array = np.zeros((3, 8), dtype=int)
    array[1, :6] = 1
    picks = [int(np.argmax(random_point_label(array, radius_voxels=0, seed=s)[1])) for s in range(1200)]
    counts = np.bincount(picks, minlength=8)
    assert counts[6:].sum() == 0
    assert np.abs(counts[:6] - 200).max() < 55  # 4 standard deviations


def test_one_label_gets_one_set_of_points(label):
    """At every call, after other draws, and in every process."""
    transform = RandomPointLabeld(slice_axis=2)
    first = transform({"label": torch.from_numpy(label)[None]})["weak_label"]
    transform({"label": torch.from_numpy(np.flip(label, 0).copy())[None]})
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    assert torch.equal(transform({"label": torch.from_numpy(label)[None].float()})["weak_label"], first)
    assert torch.equal(
        Compose([transform]).set_random_state(seed=3)({"label": torch.from_numpy(label)[None]})["weak_label"], first
    )
    moved = RandomPointLabeld(slice_axis=2, seed=1)({"label": torch.from_numpy(label)[None]})["weak_label"]
    assert not torch.equal(moved, first)


@pytest.mark.slow
def test_points_do_not_depend_on_the_process():
    code = (
        "import numpy as np, json; from medconstraints.transforms.weak_label_maps import random_point_label as f;"
        "a = np.zeros((30, 30)); a[4:25, 6:28] = 1; print(json.dumps(f(a, background=True).tolist()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    array = np.zeros((30, 30))
    array[4:25, 6:28] = 1
    assert json.loads(done.stdout) == random_point_label(array, background=True).tolist()


@pytest.mark.parametrize("slice_axis", [None, 2])
def test_background_does_not_move_the_other_points(label, slice_axis):
    without = random_point_label(label, slice_axis=slice_axis)
    with_it = random_point_label(label, slice_axis=slice_axis, background=True)
    assert not (without == 0).any() and (with_it == 0).any()
    np.testing.assert_array_equal(np.where(with_it == 0, -1, with_it), without)


def test_background_in_a_label_without_objects():
    weak = random_point_label(np.zeros((20, 20)), background=True)
    assert 1 <= (weak == 0).sum() <= 49


# The dictionary transforms

TRANSFORMS = {
    "erosion": (ErodeLabeld(kernel_voxels=3), lambda a: erode_label(a, kernel_voxels=3)),
    "erosion by slice": (
        ErodeLabeld(kernel_voxels=4, slice_axis=1, ignore_index=255),
        lambda a: erode_label(a, kernel_voxels=4, slice_axis=1, ignore_index=255),
    ),
    "point": (
        RandomPointLabeld(radius_voxels=2, slice_axis=2, background=True, seed=5),
        lambda a: random_point_label(a, radius_voxels=2, slice_axis=2, background=True, seed=5),
    ),
}


@pytest.mark.parametrize(("transform", "function"), TRANSFORMS.values(), ids=TRANSFORMS)
def test_weak_label_is_like_its_label(label, transform, function):
    affine = torch.diag(torch.tensor([-2.0, 1.5, 3.0, 1.0], dtype=torch.float64))
    given = MetaTensor(torch.from_numpy(label)[None], affine=affine, meta={"filename_or_obj": "a/case.nii.gz"})
    item = {"label": given, "other": "kept"}
    out = transform(item)
    assert set(item) == {"label", "other"} and set(out) == {"label", "other", "weak_label"}
    weak = out["weak_label"]
    assert isinstance(weak, MetaTensor) and weak.dtype == torch.float32 and weak.shape == given.shape
    assert torch.equal(weak.affine, affine) and weak.meta["filename_or_obj"] == "a/case.nii.gz"
    np.testing.assert_array_equal(weak[0].numpy(), function(label))
    plain = transform({"label": torch.from_numpy(label)[None]})["weak_label"]
    assert type(plain) is torch.Tensor and torch.equal(plain, weak.as_tensor())


def test_weak_label_follows_spatial_transforms(label):
    """Annotated voxels stay on their objects, and no value is invented."""
    keys = ["label", "weak_label"]
    moves = [
        Rotate90d(keys),
        RandAffined(keys, prob=1, rotate_range=0.4, scale_range=0.2, mode="nearest", padding_mode="border"),
    ]
    chain = Compose([ErodeLabeld(kernel_voxels=3), *moves]).set_random_state(seed=1)
    out = chain({"label": MetaTensor(torch.from_numpy(label)[None])})
    weak, moved = out["weak_label"].as_tensor(), out["label"].as_tensor()
    assert weak.dtype == torch.float32 and set(weak.unique().tolist()) == {-1, 1, 2}
    assert torch.equal(weak[weak > 0], moved[weak > 0].float())


@pytest.mark.parametrize(
    "transform", [ErodeLabeld(), RandomPointLabeld(), ScribbleToWeakLabeld("scribble")], ids=lambda t: type(t).__name__
)
@pytest.mark.parametrize(
    ("value", "full"), [(True, True), (1, True), (torch.tensor(True), True), (False, False), (0, False)]
)
def test_fully_labelled_items_keep_their_label(label, transform, value, full):
    maps = {"label": torch.from_numpy(label)[None], "scribble": torch.full((1, *label.shape), 4)}
    weak = transform({**maps, "fully_labelled": value})["weak_label"]
    assert weak.dtype == torch.float32
    assert torch.equal(weak, maps["label"].float()) == full
    assert ((weak == -1).sum() > 0) == (not full)


@pytest.mark.parametrize("value", ["false", "true", 2, None])
def test_fully_labelled_is_true_or_false(value):
    with pytest.raises(ValueError, match=r"whole: expected true or false, got .*; correct this entry"):
        is_fully_labelled({"whole": value}, "whole")
    assert is_fully_labelled({}, "whole") is False


EMPTY = {
    "erosion": (ErodeLabeld, 0, {}),
    "point": (RandomPointLabeld, 0, {}),
    "scribble": (lambda **k: ScribbleToWeakLabeld("label", **k), 4, {}),
    "background only": (lambda **k: ScribbleToWeakLabeld("label", keep_background=False, **k), 0, {}),
}


@pytest.mark.parametrize(("make", "value", "_"), EMPTY.values(), ids=EMPTY)
def test_nothing_annotated(make, value, _):
    given = MetaTensor(torch.full((1, 5, 6, 4), value), meta={"filename_or_obj": "folder/case_7.nii.gz"})
    assert (make()({"label": given})["weak_label"] == -1).all()
    with pytest.raises(VolumeError, match=r"^case_7\.nii\.gz: no voxel of its weak label is annotated; leave this"):
        make(allow_empty=False)({"label": given})
    full = make(allow_empty=False)({"label": given, "fully_labelled": True})["weak_label"]
    assert (full == value).all()  # "all background" is a full annotation


def test_background_points_count_as_annotation():
    item = {"label": torch.zeros(1, 8, 8)}
    assert (RandomPointLabeld(background=True, allow_empty=False)(item)["weak_label"] == 0).any()


def test_errors_name_the_file(label):
    broken = MetaTensor(torch.from_numpy(label)[None] * 0.5, meta={"filename_or_obj": "folder/case_7.nii.gz"})
    with pytest.raises(ValueError, match=r"^case_7\.nii\.gz: expected whole class numbers >= 0 .* got 0\.5"):
        ErodeLabeld()({"label": broken})
    with pytest.raises(ValueError, match=r"^case_7\.nii\.gz: expected a map \(1, \*S\) with one channel, got shape"):
        RandomPointLabeld()({"label": broken[0]})


def test_missing_keys():
    for transform in (ErodeLabeld, RandomPointLabeld, ScribbleToWeakLabeld):
        assert transform(allow_missing_keys=True)({"image": 1}) == {"image": 1}
        with pytest.raises(KeyError, match=r"label|scribble"):
            transform()({"image": 1})
    with pytest.raises(KeyError, match="label: expected the full label under this key, because fully_labelled is true"):
        ScribbleToWeakLabeld()({"scribble": torch.zeros(1, 4, 4), "fully_labelled": True})


# Scribbles

STROKES = [[0, 4, 3], [4, 2, 1]]
SCRIBBLES = {
    "default": ({}, [[0, -1, 3], [-1, 2, 1]]),
    "without background": ({"keep_background": False}, [[-1, -1, 3], [-1, 2, 1]]),
    "other ignored value": ({"ignore_index": 255}, [[0, 255, 3], [255, 2, 1]]),
    "checked": ({"num_classes": 4}, [[0, -1, 3], [-1, 2, 1]]),
    "zero is not annotated": ({"unlabelled": 0, "num_classes": 5}, [[-1, 4, 3], [4, 2, 1]]),
}


@pytest.mark.parametrize(("options", "expected"), SCRIBBLES.values(), ids=SCRIBBLES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
def test_scribbles(options, expected, dtype):
    out = ScribbleToWeakLabeld(**options)({"scribble": torch.tensor([STROKES], dtype=dtype)})
    assert out["weak_label"].tolist() == [expected] and out["weak_label"].dtype == torch.float32


def test_scribbles_of_some_classes():
    """What the docstring says of MapLabelValued: others become background strokes, at once and in any order."""
    item = {"scribble": MetaTensor(torch.tensor([STROKES])), "label": torch.tensor([[[0, 1, 3], [2, 2, 1]]])}
    chain = Compose(
        [
            MapLabelValued(["label", "scribble"], orig_labels=[1, 2, 3], target_labels=[0, 0, 1]),
            ScribbleToWeakLabeld(num_classes=2),
        ]
    )
    out = chain(item)
    assert out["weak_label"].tolist() == [[[0, -1, 1], [-1, 0, 0]]]
    assert out["label"].tolist() == [[[0, 0, 1], [0, 0, 0]]]


@pytest.mark.parametrize("wrong", [3, -3, 0.5, float("nan"), float("inf")])
def test_scribbles_of_unknown_classes(wrong):
    strokes = MetaTensor(torch.tensor([[[0, 4, 1, wrong]]]), meta={"filename_or_obj": "x/s_3.nii.gz"})
    words = rf"^s_3\.nii\.gz: has values that are neither a class number 0 to 2 nor unlabelled=4: {wrong:g}; set unl"
    with pytest.raises(VolumeError, match=words):
        ScribbleToWeakLabeld(num_classes=3)({"scribble": strokes})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_classes": 5}, r"unlabelled: expected a value that is none of the 5 classes 0\.\.4, got 4; look which"),
        ({"num_classes": 1}, "num_classes: expected at least 2, background included, got 1"),
        ({"ignore_index": 0}, "ignore_index: expected an integer that is no class"),
    ],
)
def test_scribble_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        ScribbleToWeakLabeld(**options)


# Real files


def load(path):
    return Compose([LoadImaged("label"), EnsureChannelFirstd("label")])({"label": str(path)})


def test_real_hippocampus_label(data_root):
    path = data_root / "hippocampus" / "labelsTr" / "hippocampus_003.nii.gz"
    array = np.asarray(nib.load(path).dataobj)
    item = load(path)
    eroded = ErodeLabeld(kernel_voxels=5)(item)["weak_label"]
    np.testing.assert_allclose(eroded.affine.numpy(), nib.load(path).affine)
    for cls in (1, 2):
        left = eroded[0].numpy() == cls
        expected = next(
            e for k in (5, 4, 3, 2, 1) if (e := ndimage.binary_erosion(array == cls, np.ones((k, k, k)))).any()
        )
        np.testing.assert_array_equal(left, expected)
    weak = RandomPointLabeld(slice_axis=2)(item)["weak_label"][0].numpy()
    kept = weak != -1
    np.testing.assert_array_equal(weak[kept], array[kept])
    for cls in (1, 2):
        np.testing.assert_array_equal((weak == cls).any(axis=(0, 1)), (array == cls).any(axis=(0, 1)))
        assert (weak == cls).sum(axis=(0, 1)).max() <= 49


def test_real_cardiac_label_and_scribbles(data_root):
    stem = data_root / "acdc" / "patient001" / "patient001_frame01"
    path = stem.with_name(stem.name + "_gt.nii.gz")
    if not path.exists():
        pytest.skip("no ACDC data")
    array = np.asarray(nib.load(path).dataobj).round()
    eroded = ErodeLabeld(slice_axis=2)(load(path))["weak_label"][0].numpy()
    kept = eroded != -1
    np.testing.assert_array_equal(eroded[kept], array[kept])
    for cls in (1, 2, 3):
        np.testing.assert_array_equal((eroded == cls).any(axis=(0, 1)), (array == cls).any(axis=(0, 1)))
    assert 0 < kept.sum() < 0.5 * (array > 0).sum()
    scribble = stem.with_name(stem.name + "_scribble.nii.gz")
    item = load(scribble)
    raw = np.asarray(nib.load(scribble).dataobj).round().astype(int)
    weak = ScribbleToWeakLabeld("label", num_classes=4, allow_empty=False)(item)["weak_label"][0].numpy()
    np.testing.assert_array_equal(weak, np.where(raw == 4, -1, raw))
    assert set(np.unique(weak)) == {-1, 0, 1, 2, 3}
