"""Boxes follow their image: compared with boxes of the label that went the same way."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Affined,
    BorderPadd,
    CenterSpatialCropd,
    Compose,
    CropForegroundd,
    Flipd,
    Orientationd,
    RandAxisFlipd,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandRotate90d,
    RandSpatialCropd,
    Resized,
    ResizeWithPadOrCropd,
    Rotate90d,
    Rotated,
    Spacingd,
    SpatialCropd,
    SpatialPadd,
    Zoomd,
)

from medconstraints.boxes import label_to_boxes, map_boxes
from medconstraints.transforms import BoxesToGridd, LabelToBoxesd

KEYS = ("image", "label")


def rotation(x, y, z):
    """Rotation matrix from angles in degrees."""
    turns = []
    for axis, angle in enumerate(np.deg2rad([x, y, z])):
        a, b = [i for i in range(3) if i != axis]
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        turns.append(turn)
    return turns[0] @ turns[1] @ turns[2]


def affine_of(angles=(0, 0, 0), spacing=(1, 1, 1), origin=(0, 0, 0)):
    affine = np.eye(4)
    affine[:3, :3] = rotation(*angles) @ np.diag(spacing)
    affine[:3, 3] = origin
    return affine


AFFINES = {
    "identity": np.eye(4),
    "spacing": affine_of(spacing=(0.7, 1.3, 4.0), origin=(-80, 33.3, 12)),
    "LPS": np.diag([-1.0, -1.0, 2.5, 1.0]),
    "axes swapped": np.array([[0, 0, 3.0, -5], [-1.5, 0, 0, 30], [0, 2.0, 0, 12], [0, 0, 0, 1]]),
    "oblique": affine_of((11, -23, 37), (0.8, 0.9, 5.0), (120, -7, 55)),
}
affines = pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)


def cuboids(rng, shape=(18, 22, 15), count=6):
    """A label of cuboids, each of its own class, apart from each other; and their boxes."""
    label, rows = np.zeros(shape, dtype=np.uint8), []
    while len(rows) < count:
        start = np.array([rng.integers(0, n - 2) for n in shape])
        stop = np.array([rng.integers(s + 1, min(s + 8, n) + 1) for s, n in zip(start, shape, strict=True)])
        where = tuple(map(slice, start, stop))
        if not label[where].any():
            label[where] = len(rows) + 1
            rows.append([len(rows) + 1, *start.tolist(), *stop.tolist()])
    return label, rows


def item_of(label, affine, rng):
    picture = torch.from_numpy(rng.random(label.shape))[None]
    affine = torch.as_tensor(affine)
    return {
        "image": MetaTensor(picture, affine=affine.clone()),
        "label": MetaTensor(torch.from_numpy(label)[None], affine=affine.clone()),
    }


def boxes_of(label):
    """Boxes of the classes of a label, by looking for their voxels."""
    array, rows = np.asarray(label)[0], []
    for number in range(1, int(array.max()) + 1):
        where = np.argwhere(array == number)
        if len(where):
            rows.append([number, *where.min(0).tolist(), *(where.max(0) + 1).tolist()])
    return rows


def clipped(boxes, shape):
    dims = len(shape)
    start, stop = boxes[:, 1 : 1 + dims].clamp(min=0), boxes[:, 1 + dims :].minimum(torch.tensor(shape))
    return torch.cat([boxes[:, :1], start, stop], 1).tolist()


def extents(boxes):
    dims = (boxes.shape[1] - 1) // 2
    return (boxes[:, 1 + dims :] - boxes[:, 1 : 1 + dims]).tolist()


def check(out, original):
    """What is left of the boxes after clipping is what is left of the label; nothing is lost of a cut box."""
    shape = out["image"].shape[1:]
    assert clipped(out["boxes"], shape) == boxes_of(out["label"])
    assert {"image", "label", "boxes"} <= set(out) and "boxes_affine" not in out
    by_class = {row[0]: sorted(np.subtract(row[4:], row[1:4]).tolist()) for row in original}
    for number, extent in zip(out["boxes"][:, 0].tolist(), extents(out["boxes"]), strict=True):
        assert sorted(extent) == by_class[number]


SAME_RESOLUTION = {
    "nothing": [],
    "crop": [SpatialCropd(KEYS, roi_start=(3, 5, 2), roi_end=(13, 17, 11))],
    "centre crop": [CenterSpatialCropd(KEYS, (9, 9, 9))],
    "random crop": [RandSpatialCropd(KEYS, (8, 10, 7), random_size=False)],
    "random crop of random size": [RandSpatialCropd(KEYS, (5, 5, 5), random_size=True)],
    "pad": [SpatialPadd(KEYS, (30, 29, 28))],
    "uneven border": [BorderPadd(KEYS, (1, 2, 3, 4, 5, 6))],
    "pad and crop": [ResizeWithPadOrCropd(KEYS, (10, 30, 15))],
    "crop to the foreground": [CropForegroundd(KEYS, "label", margin=1)],
    "flip": [Flipd(KEYS, (0, 2))],
    "random flips": [RandFlipd(KEYS, 0.5, 0), RandFlipd(KEYS, 0.5, 1), RandAxisFlipd(KEYS, 0.5)],
    "quarter turn": [Rotate90d(KEYS, 1, (0, 2))],
    "random quarter turns": [RandRotate90d(KEYS, 0.8, 3, (0, 1)), RandRotate90d(KEYS, 0.8, 3, (1, 2))],
    "orientation RAS": [Orientationd(KEYS, "RAS", labels=None)],
    "orientation PIR": [Orientationd(KEYS, "PIR", labels=None)],
    "all": [
        Orientationd(KEYS, "SAL", labels=None),
        RandFlipd(KEYS, 0.5, 0),
        RandRotate90d(KEYS, 0.5, 3, (0, 1)),
        SpatialPadd(KEYS, (24, 12, 20)),
        BorderPadd(KEYS, 1),
        RandSpatialCropd(KEYS, (12, 11, 13), random_size=False),
        RandFlipd(KEYS, 0.5, 2),
    ],
}


@pytest.mark.parametrize("transforms", SAME_RESOLUTION.values(), ids=SAME_RESOLUTION)
def test_equals_the_boxes_of_the_transformed_label(transforms, rng):
    chain = Compose([LabelToBoxesd(), *transforms, BoxesToGridd()]).set_random_state(seed=0)
    for affine in AFFINES.values():
        label, rows = cuboids(rng)
        check(chain(item_of(label, affine, rng)), rows)


@pytest.mark.parametrize(
    "zoom",
    [
        Zoomd(KEYS, 2.0, mode="nearest", keep_size=False),
        Zoomd(KEYS, (2.0, 1.0, 3.0), mode="nearest", keep_size=False),
        Zoomd(KEYS, 2.0, mode="nearest", keep_size=True),
        Resized(KEYS, (36, 44, 30), mode="nearest"),
    ],
    ids=["by 2", "by 2, 1, 3", "by 2 in the same size", "resized"],
)
def test_zoom(zoom, rng):
    chain = Compose([LabelToBoxesd(), zoom, Flipd(KEYS, 1), BoxesToGridd()])
    for affine in AFFINES.values():
        label, _ = cuboids(rng)
        out = chain(item_of(label, affine, rng))
        assert clipped(out["boxes"], out["image"].shape[1:]) == boxes_of(out["label"])


def test_half_the_resolution(rng):
    """Cuboids on even voxels: every second voxel keeps them exact."""
    label = np.zeros((16, 20, 12), dtype=np.uint8)
    label[2:8, 4:6, 0:12] = 1
    label[10:16, 12:20, 4:6] = 2
    affine = affine_of((5, 10, -20), (1, 1, 2), (3, 2, 1))
    chain = Compose([LabelToBoxesd(), Zoomd(KEYS, 0.5, mode="nearest", keep_size=False), BoxesToGridd()])
    out = chain(item_of(label, affine, rng))
    assert out["boxes"].tolist() == boxes_of(out["label"]) == [[1, 1, 2, 0, 4, 3, 6], [2, 5, 6, 2, 8, 10, 3]]


def test_spacing_changes_the_resolution(rng):
    label, rows = cuboids(rng)
    chain = Compose([LabelToBoxesd(), Spacingd("image", (1.0, 1.0, 1.0)), BoxesToGridd()])
    out = chain(item_of(label, np.diag([2.0, 1.0, 4.0, 1.0]), rng))
    assert extents(out["boxes"]) == [
        [max(round(n * s), 1) for n, s in zip(np.subtract(row[4:], row[1:4]).tolist(), (2, 1, 4), strict=True)]
        for row in rows
    ]


def test_a_coarse_grid_keeps_at_least_a_voxel():
    boxes = torch.tensor([[1, 4, 4, 4, 5, 5, 5]])
    out = map_boxes(boxes, np.eye(4), np.diag([10.0, 10, 10, 1]))
    assert extents(out) == [[1, 1, 1]]


def test_boxes_outside_are_dropped_and_cut_ones_keep_their_extent(rng):
    label = np.zeros((20, 20, 20), dtype=np.uint8)
    label[2:6, 2:6, 2:6] = 1  # outside the crop
    label[8:14, 9:12, 4:18] = 2  # cut at both ends of the last axis
    label[9:11, 14:19, 9:11] = 3  # cut at the end of the second
    label[6:8, 8:9, 8:9] = 4  # ends where the crop starts
    chain = Compose([LabelToBoxesd(), SpatialCropd(KEYS, roi_start=(8, 7, 7), roi_end=(16, 16, 15)), BoxesToGridd()])
    out = chain(item_of(label, AFFINES["oblique"], rng))
    assert out["boxes"].tolist() == [[2, 0, 2, -3, 6, 5, 11], [3, 1, 7, 2, 3, 12, 4]]


def test_everything_dropped(rng):
    label = np.zeros((20, 20, 20), dtype=np.uint8)
    label[2:6, 2:6, 2:6] = 1
    chain = Compose([LabelToBoxesd(), SpatialCropd(KEYS, roi_start=(8, 8, 8), roi_end=(16, 16, 16)), BoxesToGridd()])
    boxes = chain(item_of(label, np.eye(4), rng))["boxes"]
    assert boxes.shape == (0, 7) and boxes.dtype == torch.int64


def test_several_patches_of_one_volume(rng):
    label, _ = cuboids(rng)
    crop = RandCropByPosNegLabeld(KEYS, "label", (8, 8, 8), num_samples=4)
    chain = Compose([LabelToBoxesd(), crop, BoxesToGridd()]).set_random_state(seed=0)
    out = chain(item_of(label, AFFINES["oblique"], rng))
    assert len(out) == 4
    for patch in out:
        assert clipped(patch["boxes"], (8, 8, 8)) == boxes_of(patch["label"])
    assert len({str(patch["boxes"].tolist()) for patch in out}) > 1


def test_flat_boxes_follow_their_slice(rng):
    label, _ = cuboids(rng)
    chain = Compose([LabelToBoxesd(slice_axis=1), Flipd(KEYS, 1), Rotate90d(KEYS, 1, (0, 2)), BoxesToGridd()])
    out = chain(item_of(label, AFFINES["oblique"], rng))
    expected = label_to_boxes(out["label"][0], slice_axis=1).tolist()
    assert sorted(out["boxes"].tolist()) == expected


def test_lazy_chains(rng):
    label, rows = cuboids(rng)
    transforms = [Flipd(KEYS, 0), SpatialCropd(KEYS, roi_start=(2, 3, 4), roi_end=(15, 15, 13)), Rotate90d(KEYS)]
    chain = Compose([LabelToBoxesd(), *transforms, BoxesToGridd()], lazy=True)
    check(chain(item_of(label, AFFINES["spacing"], rng)), rows)


def test_2d(rng):
    label = np.zeros((14, 12), dtype=np.uint8)
    label[3:9, 2:5] = 1
    label[10:13, 6:11] = 2
    item = item_of(label, affine_of((0, 0, 30), (0.5, 0.7, 1), (9, 8, 0)), rng)
    transforms = [Rotate90d(KEYS), Flipd(KEYS, 1), SpatialCropd(KEYS, roi_start=(3, 2), roi_end=(12, 12))]
    out = Compose([LabelToBoxesd(), *transforms, BoxesToGridd()])(item)
    assert clipped(out["boxes"], out["image"].shape[1:]) == boxes_of(out["label"])


@pytest.mark.parametrize(
    "transform",
    [
        Rotated(KEYS, np.deg2rad(10), mode="nearest"),
        Rotated(KEYS, (0, np.deg2rad(10), 0), mode="nearest"),
        Affined(KEYS, shear_params=(0.1, 0, 0, 0, 0, 0), mode="nearest"),
    ],
    ids=["rotation about the first axis", "rotation about the second axis", "shear"],
)
def test_a_rotation_by_10_degrees_is_refused(transform, rng):
    label, _ = cuboids(rng)
    item = transform(LabelToBoxesd()(item_of(label, AFFINES["oblique"], rng)))
    with pytest.raises(
        ValueError, match=r"got a rotation or shear, voxel-to-voxel matrix .*compute them from the trans"
    ):
        BoxesToGridd()(item)


def test_45_degrees_are_refused():
    with pytest.raises(ValueError, match="got a rotation or shear"):
        map_boxes(torch.tensor([[1, 0, 0, 0, 1, 1, 1]]), np.eye(4), affine_of((45, 0, 0)))


def test_rounding_in_the_affine_is_no_rotation():
    """Affines from files are float32 and their product is not exactly diagonal."""
    affine = AFFINES["oblique"]
    rounded = affine.astype(np.float32).astype(np.float64)
    boxes = torch.tensor([[1, 3, 400, 5, 20, 500, 9]])
    assert torch.equal(map_boxes(boxes, affine, rounded), boxes)


# map_boxes


@affines
def test_there_and_back_again(affine, rng):
    boxes = torch.from_numpy(np.array(cuboids(rng)[1]))
    step = np.array([[0, -1.0, 0, 21], [0, 0, 1, -3], [1, 0, 0, 4], [0, 0, 0, 1]])
    other = affine @ step
    assert torch.equal(map_boxes(map_boxes(boxes, affine, other), other, affine), boxes)
    assert not torch.equal(map_boxes(boxes, affine, other), boxes)


@affines
def test_one_grid(affine):
    boxes = torch.tensor([[2, -3, 0, 5, 4, 9, 40]])
    assert torch.equal(map_boxes(boxes, affine, affine), boxes)


def test_voxels_are_mapped_with_their_boxes(rng):
    """Every voxel centre inside a box lies inside the mapped box, and every one outside lies outside."""
    target = affine_of((90, 0, -90), (0.5, 1, 2), (3, -4, 7))  # other axes, other resolution
    source = affine_of((0, 0, 0), (1, 1, 1), (0.25, 0.5, -1))
    rows = torch.from_numpy(np.array(cuboids(rng)[1]))
    exact = np.linalg.solve(target, source)
    for row, out in zip(rows.numpy(), map_boxes(rows, source, target).numpy(), strict=True):
        corners = np.array([[*(np.where(pick, row[4:], row[1:4]) - 0.5), 1] for pick in np.ndindex(2, 2, 2)])
        mapped = (exact @ corners.T)[:3] + 0.5
        assert np.abs(out[1:4] - mapped.min(1)).max() < 0.5 + 1e-9 and out[0] == row[0]
        tall = mapped.max(1) - mapped.min(1) >= 1
        assert np.abs(out[4:] - mapped.max(1))[tall].max(initial=0) < 0.5 + 1e-9


def test_no_boxes():
    out = map_boxes(torch.zeros(0, 7, dtype=torch.int64), np.eye(4), np.diag([2.0, 2, 2, 1]))
    assert out.shape == (0, 7) and out.dtype == torch.int64


# Keys


def test_several_keys_of_boxes(rng):
    label, _ = cuboids(rng)
    chain = Compose(
        [
            LabelToBoxesd(boxes_key="tight"),
            LabelToBoxesd(boxes_key="loose", margin_voxels=1),
            Flipd(KEYS, 0),
            BoxesToGridd(["tight", "loose"]),
        ]
    )
    out = chain(item_of(label, np.eye(4), rng))
    assert out["tight"].tolist() == boxes_of(out["label"]) and set(out) == {"image", "label", "tight", "loose"}
    assert (out["loose"][:, 1:4] <= out["tight"][:, 1:4]).all() and (out["loose"][:, 4:] >= out["tight"][:, 4:]).all()


def test_input_is_not_changed(rng):
    label, _ = cuboids(rng)
    item = LabelToBoxesd()(item_of(label, np.eye(4), rng))
    before = item["boxes"].clone()
    BoxesToGridd()(item)
    assert "boxes_affine" in item and torch.equal(item["boxes"], before)


def test_boxes_are_mapped_once(rng):
    label, _ = cuboids(rng)
    item = BoxesToGridd()(LabelToBoxesd()(item_of(label, np.eye(4), rng)))
    with pytest.raises(ValueError, match=r"boxes: no boxes_affine beside the boxes.*map them once only"):
        BoxesToGridd()(item)


def test_an_image_without_an_affine_is_refused(rng):
    label, _ = cuboids(rng)
    item = LabelToBoxesd()(item_of(label, np.eye(4), rng))
    item["image"] = item["image"].as_tensor()
    with pytest.raises(ValueError, match="or the image is no MetaTensor"):
        BoxesToGridd()(item)


def test_missing_boxes():
    item = {"image": MetaTensor(torch.zeros(1, 4, 4, 4))}
    assert set(BoxesToGridd(allow_missing_keys=True)(item)) == {"image"}
    with pytest.raises(KeyError, match="boxes"):
        BoxesToGridd()(item)
