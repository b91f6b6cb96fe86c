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

from medconstraints.transforms import Erosion, Points, Scribble, VolumeError, WeakLabeld

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


@pytest.mark.parametrize(("kernel", "slice_axis"), [(1, None), (3, 0), (5, None), (9, 2), (10, None), (10, 2)])
def test_erosion_voxel_by_voxel(label, kernel, slice_axis):
    weak = Erosion(kernel, slice_axis)(label)
    assert weak.dtype == np.int32
    np.testing.assert_array_equal(weak, slow_erosion(label, ODD_SIDES[kernel], slice_axis))


def test_erosion_of_2d_labels(rng):
    for density in (0.3, 0.9):
        array = rng.integers(1, 3, (9, 13)).repeat(2, 0) * (rng.random((18, 13)) < density)
        np.testing.assert_array_equal(Erosion(5)(array), slow_erosion(array, [5, 4, 3, 2, 1], None))


def test_the_kernel_shrinks_as_agreed():
    """A square of n pixels is left with (n - k + 1)^2 by the first k of the series that fits it."""
    series = [10, 7, 5, 4, 3, 2, 1]
    for n in range(1, 12):
        array = np.zeros((16, 16), dtype=int)
        array[2 : 2 + n, 2 : 2 + n] = 1
        side = next(k for k in series if k <= n)
        assert (Erosion()(array) == 1).sum() == (n - side + 1) ** 2


def test_erosion_flips_with_the_label():
    """With odd boxes; an even one has no middle."""
    label = np.where(disc((12, 13, 14), 4), 1, 0)  # the box fits at once
    for axis in range(3):
        flipped = Erosion(3)(np.flip(label, axis))
        np.testing.assert_array_equal(np.flip(flipped, axis), Erosion(3)(label))
        assert (flipped == 1).sum() > 1


def test_whole_image_one_class_is_eroded_from_its_border():
    for dims in (2, 3):
        weak = Erosion(3)(np.full((7,) * dims, 2))
        inner = np.full((7,) * dims, -1)
        inner[(slice(1, -1),) * dims] = 2
        np.testing.assert_array_equal(weak, inner)


RULES = {"erosion": Erosion, "points": Points}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_empty_label_and_one_voxel(rule):
    for shape, slice_axis in (((6, 5), None), ((6, 5, 4), None), ((6, 5, 4), 1)):
        array = np.zeros(shape, dtype=np.uint8)
        assert (rule(slice_axis=slice_axis)(array) == -1).all()
        corner = (0,) * len(shape)
        array[corner] = 3
        weak = rule(slice_axis=slice_axis)(array)
        assert weak[corner] == 3 and (weak != -1).sum() == 1


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_other_ignored_values(rule, label):
    """Voxels without annotation are no class, and those of the weak label get the same value."""
    partial = np.where(np.arange(9) == 4, 255, label)
    weak = rule()(partial, 255)
    assert set(np.unique(weak)) == {1, 2, 255} and (weak[..., 4] == 255).all()
    kept = weak != 255
    np.testing.assert_array_equal(weak[kept], label[kept])
    if rule is Erosion:
        same = rule()(np.where(np.arange(9) == 4, -1, label.astype(int)))
        np.testing.assert_array_equal(np.where(weak == 255, -1, weak), same)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_any_type_of_label(rule, label):
    tensor = torch.from_numpy(label)
    for same in (label.astype(np.float32), tensor.half(), MetaTensor(tensor), np.asfortranarray(label)):
        np.testing.assert_array_equal(rule()(same), rule()(label))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(
    ("array", "options", "words"),
    [
        (np.zeros((1, 2, 3, 4)), {}, r"label: expected a 2D or 3D map without channel axis, got shape \(1, 2, 3, 4"),
        (
            np.array([[0, -2, 0.5]]),
            {},
            r"label: expected class numbers 0 to 1, 2, .* or ignore_index=-1 .* got -2, 0\.5; c",
        ),
        (np.array([[0, np.nan, np.inf]]), {}, "label: expected class numbers .* got inf, nan"),
        (
            np.zeros((4, 4)),
            {"slice_axis": 1},
            "slice_axis: expected None, or the axis 0, 1 or 2 .* got 1 for 2 sp",
        ),
        (np.zeros((4, 4, 4)), {"slice_axis": -1}, "slice_axis: expected None, or the axis 0, 1 or 2 .* got -1"),
    ],
)
def test_refusals(rule, array, options, words):
    with pytest.raises(ValueError, match=words):
        rule(**options)(array)


@pytest.mark.parametrize(
    ("rule", "name", "value", "low"), [(Erosion, "kernel_voxels", 0, 1), (Points, "radius_voxels", 0.5, 0)]
)
def test_sizes_are_whole_numbers(rule, name, value, low):
    with pytest.raises(ValueError, match=f"{name}: expected an integer >= {low}, got {value}"):
        rule(**{name: value})


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


@pytest.mark.parametrize(("radius", "slice_axis"), [(0, None), (2, 0), (4, None), (4, 2)])
def test_discs_are_the_largest_inside_their_class(label, radius, slice_axis):
    for seed in range(3):
        weak = Points(radius, slice_axis, background=True, seed=seed)(label)
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
        weak = Points(seed=seed)(inside) == 1
        assert inside[weak].all()
        counts.add(int(weak.sum()))
    assert max(counts) == disc((11,) * len(shape), 4).sum()
    assert len(counts) > 1  # those near the rim are smaller


def test_a_disc_meets_no_border_of_the_image():
    whole = np.ones((7, 7), dtype=int)
    seen = {}
    for seed in range(800):
        weak = Points(2, seed=seed)(whole) == 1
        seen.setdefault(tuple(np.argwhere(weak).mean(0)), int(weak.sum()))
    for (row, column), count in seen.items():
        depth = min(row, column, 6 - row, 6 - column)
        assert count == {0: 1, 1: 9, 2: 13, 3: 13}[depth]
    assert set(seen) == set(itertools.product(range(7), range(7)))  # each voxel can be drawn


def test_points_are_uniform_over_the_class():
    array = np.zeros((3, 8), dtype=int)
    array[1, :6] = 1
    counts = np.bincount([int(np.argmax(Points(0, seed=s)(array)[1])) for s in range(1200)], minlength=8)
    assert counts[6:].sum() == 0
    assert np.abs(counts[:6] - 200).max() < 55  # 4 standard deviations


def test_one_label_gets_one_set_of_points(label):
    """At every call, after other draws, whatever its type, and with every random state."""
    transform, item = WeakLabeld(rule=Points(slice_axis=2)), {"label": torch.from_numpy(label)[None]}
    first = transform(item)["weak_label"]
    transform({"label": item["label"].flip(1)})
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    assert torch.equal(transform({"label": item["label"].float()})["weak_label"], first)
    assert torch.equal(Compose([transform]).set_random_state(seed=3)(item)["weak_label"], first)
    assert not torch.equal(WeakLabeld(rule=Points(slice_axis=2, seed=1))(item)["weak_label"], first)


def test_points_of_shipped_results():
    """Centres that were drawn when the weights were trained: another generator would change what tables say."""
    array = np.zeros((30, 30), dtype=np.uint8)
    array[4:25, 6:28] = 1
    weak = Points(background=True)(array)
    assert [np.argwhere(weak == cls).mean(0).tolist() for cls in (0, 1)] == [[19, 3], [21, 14]]


@pytest.mark.slow
def test_points_do_not_depend_on_the_process():
    code = (
        "import numpy as np, json; from medconstraints.transforms import Points;"
        "a = np.zeros((30, 30)); a[4:25, 6:28] = 1; print(json.dumps(Points(background=True)(a).tolist()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    array = np.zeros((30, 30))
    array[4:25, 6:28] = 1
    assert json.loads(done.stdout) == Points(background=True)(array).tolist()


@pytest.mark.parametrize("slice_axis", [None, 2])
def test_background_does_not_move_the_other_points(label, slice_axis):
    without = Points(slice_axis=slice_axis)(label)
    with_it = Points(slice_axis=slice_axis, background=True)(label)
    assert not (without == 0).any() and (with_it == 0).any()
    np.testing.assert_array_equal(np.where(with_it == 0, -1, with_it), without)


# Scribbles

STROKES = [[0, 4, 3], [4, 2, 1]]
SCRIBBLES = {
    "default": ({}, [[0, -1, 3], [-1, 2, 1]]),
    "without background": ({"background": False}, [[-1, -1, 3], [-1, 2, 1]]),
    "checked": ({"num_classes": 4}, [[0, -1, 3], [-1, 2, 1]]),
    "zero is not annotated": ({"unlabelled": 0, "num_classes": 5}, [[-1, 4, 3], [4, 2, 1]]),
}


@pytest.mark.parametrize(("options", "expected"), SCRIBBLES.values(), ids=SCRIBBLES)
def test_scribbles(options, expected):
    for dtype in (torch.uint8, torch.float32):
        weak = Scribble(**options)(torch.tensor(STROKES, dtype=dtype))
        assert weak.tolist() == expected and weak.dtype == np.int32
    other = Scribble(**options)(np.array(STROKES), 255)
    assert other.tolist() == [[255 if value == -1 else value for value in row] for row in expected]


def test_scribbles_of_some_classes():
    """What the docstring says of MapLabelValued: others become background strokes, at once and in any order."""
    item = {"scribble": MetaTensor(torch.tensor([STROKES])), "label": torch.tensor([[[0, 1, 3], [2, 2, 1]]])}
    renumber = MapLabelValued(["label", "scribble"], orig_labels=[1, 2, 3], target_labels=[0, 0, 1])
    out = Compose([renumber, WeakLabeld("scribble", rule=Scribble(num_classes=2))])(item)
    assert out["weak_label"].tolist() == [[[0, -1, 1], [-1, 0, 0]]]
    assert out["label"].tolist() == [[[0, 0, 1], [0, 0, 0]]]


def test_scribbles_of_unknown_classes():
    strokes = np.array([[0, 4, 1, 3, -3, 0.5, np.nan]])
    with pytest.raises(ValueError, match=r"neither a class number 0 to 2 nor unlabelled=4: -3, 0\.5, 3, nan; set un"):
        Scribble(num_classes=3)(strokes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_classes": 5}, r"unlabelled: expected a value that is none of the 5 classes 0\.\.4, got 4; look what"),
        ({"num_classes": 1}, "num_classes: expected an integer >= 2, got 1"),
    ],
)
def test_scribble_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        Scribble(**options)


# The dictionary transform


def named(array, name="folder/case_7.nii.gz"):
    affine = torch.diag(torch.tensor([-2.0, 1.5, 3.0, 1.0], dtype=torch.float64))
    return MetaTensor(torch.as_tensor(array)[None], affine=affine, meta={"filename_or_obj": name})


def own(label, ignore_index):
    return np.where(np.asarray(label) == 2, 2, ignore_index)


@pytest.mark.parametrize("rule", [Erosion(3), Points(2, 2, True, 5), own], ids=["erosion", "points", "own"])
def test_weak_label_is_like_its_label(label, rule):
    item = {"label": named(label), "other": "kept"}
    out = WeakLabeld(rule=rule, ignore_index=255)(item)
    assert set(item) == {"label", "other"} and set(out) == {"label", "other", "weak_label"}
    weak = out["weak_label"]
    assert isinstance(weak, MetaTensor) and weak.dtype == torch.float32 and weak.shape == (1, *label.shape)
    assert torch.equal(weak.affine, item["label"].affine) and weak.meta["filename_or_obj"] == "folder/case_7.nii.gz"
    np.testing.assert_array_equal(weak[0].numpy(), rule(label, 255))
    plain = WeakLabeld(rule=rule, ignore_index=255)({"label": torch.from_numpy(label)[None]})["weak_label"]
    assert type(plain) is torch.Tensor and torch.equal(plain, weak.as_tensor())


def test_weak_label_follows_spatial_transforms(label):
    """Annotated voxels stay on their objects, and no value is invented."""
    keys = ["label", "weak_label"]
    moves = [
        Rotate90d(keys),
        RandAffined(keys, prob=1, rotate_range=0.4, scale_range=0.2, mode="nearest", padding_mode="border"),
    ]
    chain = Compose([WeakLabeld(rule=Erosion(3)), *moves]).set_random_state(seed=1)
    out = chain({"label": MetaTensor(torch.from_numpy(label)[None])})
    weak, moved = out["weak_label"].as_tensor(), out["label"].as_tensor()
    assert weak.dtype == torch.float32 and set(weak.unique().tolist()) == {-1, 1, 2}
    assert torch.equal(weak[weak > 0], moved[weak > 0].float())


TRANSFORMS = [WeakLabeld(rule=Erosion()), WeakLabeld(rule=Points()), WeakLabeld("scribble", rule=Scribble())]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: type(transform.rule).__name__)
def test_fully_labelled_items_keep_their_label(label, transform):
    maps = {"label": torch.from_numpy(label)[None], "scribble": torch.full((1, *label.shape), 4)}
    for value in (True, 1, torch.tensor(True), False, 0):
        weak = transform({**maps, "fully_labelled": value})["weak_label"]
        assert weak.dtype == torch.float32
        assert torch.equal(weak, maps["label"].float()) == bool(value)
        assert bool((weak == -1).any()) == (not value)
    for value in ("false", 2, None):
        with pytest.raises(ValueError, match=r"fully_labelled: expected true or false, got .*; correct this entry"):
            transform({**maps, "fully_labelled": value})


EMPTY = {"erosion": (Erosion(), 0), "scribble": (Scribble(), 4), "background only": (Scribble(background=False), 0)}


@pytest.mark.parametrize(("rule", "value"), EMPTY.values(), ids=EMPTY)
def test_nothing_annotated(rule, value):
    item = {"label": named(np.full((5, 6, 4), value))}
    assert (WeakLabeld(rule=rule)(item)["weak_label"] == -1).all()
    strict = WeakLabeld(rule=rule, allow_empty=False)
    with pytest.raises(VolumeError, match=r"^case_7\.nii\.gz: no voxel of its weak label is annotated; leave this"):
        strict(item)
    assert (strict({**item, "fully_labelled": True})["weak_label"] == value).all()  # background: a full annotation


def test_background_points_count_as_annotation():
    item = {"label": torch.zeros(1, 8, 8)}
    weak = WeakLabeld(rule=Points(background=True), allow_empty=False)(item)["weak_label"]
    assert 1 <= (weak == 0).sum() <= 49


def test_errors_name_the_file(label):
    with pytest.raises(VolumeError, match=r"^case_7\.nii\.gz: expected class numbers .* got 0\.5"):
        WeakLabeld(rule=Erosion())({"label": named(label * 0.5)})
    with pytest.raises(VolumeError, match=r"^case_7\.nii\.gz: expected a label map \(1, \*S\) with one channel, got"):
        WeakLabeld(rule=Points())({"label": named(label)[0]})
    with pytest.raises(VolumeError, match=r"^case_7\.nii\.gz: has values that are neither a class number 0 to 2 nor"):
        WeakLabeld(rule=Scribble(num_classes=3))({"label": named(label + 1)})


def test_arguments_and_missing_keys():
    assert WeakLabeld(rule=Points(), allow_missing_keys=True)({"image": 1}) == {"image": 1}
    with pytest.raises(KeyError, match=r"label: expected this key in the item, got \['image'\]"):
        WeakLabeld(rule=Points())({"image": 1})
    with pytest.raises(KeyError, match="label: expected this key in the item, because fully_labelled is true"):
        WeakLabeld("scribble", rule=Scribble())({"scribble": torch.zeros(1, 4, 4), "fully_labelled": True})
    with pytest.raises(ValueError, match=r"ignore_index: expected an integer that is no class.* got 0"):
        WeakLabeld(rule=Points(), ignore_index=0)
    with pytest.raises(ValueError, match="keys: expected one key"):
        WeakLabeld(["label", "scribble"], rule=Points())
    with pytest.raises(TypeError, match="rule: expected a rule such as Points"):
        WeakLabeld(rule="points")


# Real files


def load(path):
    return Compose([LoadImaged("label"), EnsureChannelFirstd("label")])({"label": str(path)})


def test_real_hippocampus_label(data_root):
    path = data_root / "hippocampus" / "labelsTr" / "hippocampus_003.nii.gz"
    array = np.asarray(nib.load(path).dataobj)
    item = load(path)
    eroded = WeakLabeld(rule=Erosion(5))(item)["weak_label"]
    np.testing.assert_allclose(eroded.affine.numpy(), nib.load(path).affine)
    for cls in (1, 2):
        left = eroded[0].numpy() == cls
        expected = next(
            e for k in (5, 4, 3, 2, 1) if (e := ndimage.binary_erosion(array == cls, np.ones((k, k, k)))).any()
        )
        np.testing.assert_array_equal(left, expected)
    weak = WeakLabeld(rule=Points(slice_axis=2))(item)["weak_label"][0].numpy()
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
    eroded = WeakLabeld(rule=Erosion(slice_axis=2))(load(path))["weak_label"][0].numpy()
    kept = eroded != -1
    np.testing.assert_array_equal(eroded[kept], array[kept])
    for cls in (1, 2, 3):
        np.testing.assert_array_equal((eroded == cls).any(axis=(0, 1)), (array == cls).any(axis=(0, 1)))
    assert 0 < kept.sum() < 0.5 * (array > 0).sum()
    scribble = stem.with_name(stem.name + "_scribble.nii.gz")
    item = load(scribble)
    raw = np.asarray(nib.load(scribble).dataobj).round().astype(int)
    weak = WeakLabeld("label", rule=Scribble(num_classes=4), allow_empty=False)(item)["weak_label"][0].numpy()
    np.testing.assert_array_equal(weak, np.where(raw == 4, -1, raw))
    assert set(np.unique(weak)) == {-1, 0, 1, 2, 3}
