"""Boxes of a label: against a flood fill, on real labels, with margins and jitter."""

import itertools

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged

from medconstraints.boxes import label_to_boxes
from medconstraints.transforms import LabelToBoxesd

# The third has float32 labels.
CASES = ["hippocampus_001", "hippocampus_004", "hippocampus_003"]


def box_of(number, voxels):
    voxels = np.array(voxels)
    return [number, *voxels.min(0).tolist(), *(voxels.max(0) + 1).tolist()]


def flood_fill(array, mode="component", slice_axis=None, min_voxels=1):
    """Reference: visit voxel by voxel; 8 or 26 neighbours, within a slice when there is a slice axis."""
    steps = [s for s in itertools.product((-1, 0, 1), repeat=array.ndim) if any(s)]
    if slice_axis is not None:
        steps = [s for s in steps if s[slice_axis] == 0]
    regions = {}
    left = {tuple(v) for v in np.argwhere(array > 0).tolist()}
    if mode == "class":
        for voxel in left:
            part = None if slice_axis is None else voxel[slice_axis]
            regions.setdefault((int(array[voxel]), part), []).append(voxel)
        found = [(number, voxels) for (number, _), voxels in regions.items()]
    else:
        found = []
        while left:
            seed = left.pop()
            number, region, queue = int(array[seed]), [seed], [seed]
            while queue:
                voxel = queue.pop()
                for step in steps:
                    other = tuple(v + s for v, s in zip(voxel, step, strict=True))
                    if other in left and array[other] == number:
                        left.remove(other)
                        region.append(other)
                        queue.append(other)
            found.append((number, region))
    return sorted(box_of(number, voxels) for number, voxels in found if len(voxels) >= min_voxels)


def item_of(array, affine=None):
    label = torch.as_tensor(array)[None]
    return {"label": label if affine is None else MetaTensor(label, affine=torch.as_tensor(affine))}


@pytest.mark.parametrize("mode", ["component", "class"])
@pytest.mark.parametrize("slice_axis", [None, 0, 1, 2])
def test_random_3d_labels(slice_axis, mode, rng):
    for density, min_voxels in itertools.product((0.05, 0.3, 0.7), (1, 3)):
        shape = rng.integers(1, 9, 3)
        label = rng.integers(1, 4, shape) * (rng.random(shape) < density)
        boxes = label_to_boxes(label, mode=mode, slice_axis=slice_axis, min_voxels=min_voxels)
        assert boxes.dtype == torch.int64 and boxes.shape[1] == 7
        assert boxes.tolist() == flood_fill(label, mode, slice_axis, min_voxels)


def test_random_2d_labels(rng):
    for density, mode in itertools.product((0.05, 0.3, 0.7), ("component", "class")):
        label = rng.integers(1, 4, (9, 11)) * (rng.random((9, 11)) < density)
        assert label_to_boxes(label, mode=mode).tolist() == flood_fill(label, mode)


TABLE = {
    "empty": ([[0, 0], [0, 0]], {}, []),
    "full": ([[2, 2], [2, 2]], {}, [[2, 0, 0, 2, 2]]),
    "one voxel": ([[0, 0, 0], [0, 0, 5]], {}, [[5, 1, 2, 2, 3]]),
    "diagonal neighbours are one": ([[1, 0, 0], [0, 1, 0]], {}, [[1, 0, 0, 2, 2]]),
    "a gap makes two": ([[1, 0, 1], [1, 0, 1]], {}, [[1, 0, 0, 2, 1], [1, 0, 2, 2, 3]]),
    "classes in touch are two": ([[1, 2], [1, 2]], {}, [[1, 0, 0, 2, 1], [2, 0, 1, 2, 2]]),
    "one box a class": ([[1, 0, 1], [2, 0, 0]], {"mode": "class"}, [[1, 0, 0, 1, 3], [2, 1, 0, 2, 1]]),
    "a ring is its outline": ([[1, 1, 1], [1, 0, 1], [1, 1, 1]], {}, [[1, 0, 0, 3, 3]]),
    "small ones are left out": ([[1, 0, 1], [1, 0, 0]], {"min_voxels": 2}, [[1, 0, 0, 2, 1]]),
    "sorted by class, then position": (
        [[2, 0, 1], [0, 0, 0], [1, 0, 2]],
        {},
        [[1, 0, 2, 1, 3], [1, 2, 0, 3, 1], [2, 0, 0, 1, 1], [2, 2, 2, 3, 3]],
    ),
}


@pytest.mark.parametrize(("label", "options", "expected"), TABLE.values(), ids=TABLE)
def test_table(label, options, expected):
    boxes = label_to_boxes(np.array(label), **options)
    assert boxes.shape == (len(expected), 5) and boxes.tolist() == expected


def test_any_type_of_label(rng):
    label = rng.integers(0, 3, (6, 7, 5)) * (rng.random((6, 7, 5)) < 0.2)
    tensor = torch.from_numpy(label)
    for same in (label.astype(np.float32), tensor.half(), MetaTensor(tensor), np.asfortranarray(label)):
        assert label_to_boxes(same).tolist() == flood_fill(label)


def test_a_bool_mask_is_class_one():
    assert label_to_boxes(np.eye(3, dtype=bool)).tolist() == [[1, 0, 0, 3, 3]]


@pytest.mark.parametrize(
    ("name", "mode", "slice_axis"), [(CASES[0], "component", None), (CASES[1], "component", 1), (CASES[2], "class", 1)]
)
def test_real_labels(data_root, name, mode, slice_axis):
    path = data_root / "hippocampus" / "labelsTr" / f"{name}.nii.gz"
    array = np.asarray(nib.load(path).dataobj)
    expected = flood_fill(array, mode, slice_axis)
    assert {row[0] for row in expected} == {1, 2}
    assert label_to_boxes(array, mode=mode, slice_axis=slice_axis).tolist() == expected
    chain = [
        LoadImaged("label"),
        EnsureChannelFirstd("label"),
        LabelToBoxesd(mode=mode, slice_axis=slice_axis, boxes_key="b"),
    ]
    item = Compose(chain)({"label": str(path)})
    assert item["b"].tolist() == expected
    np.testing.assert_allclose(item["b_affine"].numpy(), nib.load(path).affine)


@pytest.mark.parametrize(
    ("label", "options", "words"),
    [
        (np.zeros((1, 2, 3, 4)), {}, r"label: expected a 2D or 3D map without channel axis, got shape \(1, 2, 3, 4\)"),
        (np.zeros((4, 4)), {"mode": "instance"}, 'mode: expected "component" or "class", got .instance.'),
        (np.zeros((4, 4)), {"slice_axis": 1}, "slice_axis: expected None, or the axis .*got 1 for 2 spatial axes"),
        (np.zeros((4, 4, 4)), {"slice_axis": -1}, "slice_axis: expected None, or the axis .*got -1"),
        (np.array([[0, -1]]), {}, r"label: expected whole class numbers >= 0, got values such as \[-1, 0\]"),
        (np.array([[0, 0.5]]), {}, "label: expected whole class numbers"),
    ],
)
def test_refusals(label, options, words):
    with pytest.raises(ValueError, match=words):
        label_to_boxes(label, **options)


# LabelToBoxesd


@pytest.fixture
def label():
    """Two classes in (14, 12, 10); class 2 touches the border."""
    array = np.zeros((14, 12, 10), dtype=np.uint8)
    array[3:8, 4:7, 2:6] = 1
    array[10:14, 0:3, 7:9] = 2
    return array


EXACT = [[1, 3, 4, 2, 8, 7, 6], [2, 10, 0, 7, 14, 3, 9]]


def test_adds_boxes_and_their_grid(label):
    affine = np.array([[0.0, -2, 0, 5], [1.5, 0, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1]])
    item = {**item_of(label, affine), "other": "kept"}
    out = LabelToBoxesd()(item)
    assert set(item) == {"label", "other"} and set(out) == {"label", "other", "boxes", "boxes_affine"}
    assert out["boxes"].tolist() == EXACT and out["boxes"].dtype == torch.int64
    assert type(out["boxes"]) is torch.Tensor
    np.testing.assert_array_equal(out["boxes_affine"].numpy(), affine)
    assert out["boxes_affine"].data_ptr() != item["label"].affine.data_ptr()


def test_a_plain_label_has_no_grid(label):
    assert "boxes_affine" not in LabelToBoxesd()(item_of(label))


def test_2d_label():
    out = LabelToBoxesd()({"label": torch.tensor([[[0, 1], [0, 1]]])})
    assert out["boxes"].tolist() == [[1, 0, 1, 2, 2]]


def test_empty_label():
    out = LabelToBoxesd(margin_voxels=2, jitter_voxels=2)(item_of(np.zeros((4, 5, 6))))
    assert out["boxes"].shape == (0, 7) and out["boxes"].dtype == torch.int64


@pytest.mark.parametrize("margin", [0, 2, 100])
def test_margin_is_clipped_at_the_image(label, margin):
    out = LabelToBoxesd(margin_voxels=margin)(item_of(label))["boxes"].numpy()
    rows = np.array(EXACT)
    np.testing.assert_array_equal(out[:, 1:4], np.maximum(rows[:, 1:4] - margin, 0))
    np.testing.assert_array_equal(out[:, 4:], np.minimum(rows[:, 4:] + margin, label.shape))


def jittered(array, seed=0, **options):
    return LabelToBoxesd(seed=seed, **options)(item_of(array))["boxes"].numpy()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_flat_boxes_stay_flat(label, axis):
    exact = label_to_boxes(label, slice_axis=axis).numpy()
    out = jittered(label, slice_axis=axis, margin_voxels=2, jitter_voxels=3)
    np.testing.assert_array_equal(out[:, [0, 1 + axis, 4 + axis]], exact[:, [0, 1 + axis, 4 + axis]])
    assert (out[:, 4:] > out[:, 1:4]).all() and (out != exact).any()


def test_jitter_moves_each_side_by_all_steps_and_no_more(label):
    moves = np.array([jittered(label, seed, jitter_voxels=2)[0] - EXACT[0] for seed in range(200)])
    assert (moves[:, 0] == 0).all()
    for side in range(1, 7):  # the first box is 2 voxels or more from the border
        assert set(moves[:, side].tolist()) == {-2, -1, 0, 1, 2}
    assert len(np.unique(moves, axis=0)) > 150


def test_jittered_boxes_are_valid():
    """One-voxel objects in a small image, with a jitter larger than both."""
    array = np.zeros((3, 4), dtype=np.uint8)
    array[0, 0], array[2, 3] = 1, 1
    for seed in range(300):
        out = jittered(array, seed, jitter_voxels=6, margin_voxels=1)
        assert (out[:, 1:3] >= 0).all() and (out[:, 3:] <= array.shape).all() and (out[:, 1:3] < out[:, 3:]).all()


def test_one_label_gets_one_set_of_boxes(label):
    """Whatever was drawn before, and in whichever transform: a person draws a box once."""
    transform = LabelToBoxesd(jitter_voxels=3)
    first = transform(item_of(label))["boxes"]
    transform(item_of(np.flip(label, 0).copy()))
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    assert torch.equal(transform(item_of(label))["boxes"], first)
    assert np.array_equal(jittered(label, jitter_voxels=3), first)
    assert torch.equal(Compose([transform]).set_random_state(seed=4)(item_of(label))["boxes"], first)


def test_seeds_and_labels_differ_in_their_jitter(label):
    """In a batch of cases the errors do not all point the same way."""
    moved = np.roll(label, 1, 1)
    exact = label_to_boxes(moved).numpy()
    assert (jittered(label, 0, jitter_voxels=3) != jittered(label, 1, jitter_voxels=3)).any()
    assert ((jittered(label, jitter_voxels=3) - EXACT)[0] != (jittered(moved, jitter_voxels=3) - exact)[0]).any()


def test_min_voxels_and_mode_reach_the_boxes(label):
    label[0, 0, 0] = 1
    assert LabelToBoxesd(min_voxels=2)(item_of(label))["boxes"].tolist() == EXACT
    assert LabelToBoxesd(mode="class")(item_of(label))["boxes"].tolist()[0] == [1, 0, 0, 0, 8, 7, 6]


def test_missing_keys(label):
    assert LabelToBoxesd(allow_missing_keys=True)({"image": 1}) == {"image": 1}
    with pytest.raises(KeyError, match="label"):
        LabelToBoxesd()({"image": 1})


@pytest.mark.parametrize(("name", "value"), [("margin_voxels", -1), ("jitter_voxels", 1.5)])
def test_margin_and_jitter_are_whole_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected an integer >= 0, got {value}"):
        LabelToBoxesd(**{name: value})


@pytest.mark.parametrize("shape", [(2, 4, 4, 4), (4, 4)])
def test_one_channel_only(shape):
    with pytest.raises(
        ValueError, match=r"label: expected a label map \(1, \*S\) with one channel.*EnsureChannelFirstd"
    ):
        LabelToBoxesd()({"label": torch.zeros(shape)})
