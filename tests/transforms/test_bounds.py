"""Bounds of labels: values by hand and voxel by voxel, any statistic, spacing, flips, real labels, hybrid training."""

import json
from functools import partial

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor, list_data_collate
from monai.transforms import Compose, EnsureChannelFirstd, Flipd, LoadImaged, Orientationd

from medconstraints.statistics import (
    relation,
    soft_centroid,
    soft_centroid_offset,
    soft_fraction,
    soft_mean_intensity,
    soft_moments,
    soft_outside_extent,
    soft_size,
    soft_size_ratio,
    soft_spread,
)
from medconstraints.transforms import LabelToBoundsd, label_to_bounds, presence_bounds

INF = float("inf")
FREE = [-INF, INF]
# Class 1: 4 voxels around (1, 1.5); class 2: one at (2, 4); class 3: none.
LABEL = np.array([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 2]], dtype=np.uint8)
SPACING = (2.0, 0.5)
COMMON = [[3, 9], [0.5, 2], [5, 6]]


def item_of(array, spacing=None, name=None, **more):
    label = torch.as_tensor(array)[None]
    if spacing is not None:
        affine = torch.eye(4, dtype=torch.float64)
        affine[: len(spacing), : len(spacing)] = torch.diag(torch.tensor(spacing, dtype=torch.float64))
        label = MetaTensor(label, affine=affine, meta={"filename_or_obj": name} if name else None)
    return {"label": label, **more}


# Options of the transform, bounds of the classes 1 to 3; voxels are 2 x 0.5 mm.
BY_HAND = {
    "sizes": ({}, [[[3.6, 4.4]], [[0.9, 1.1]], [[0, 0]]]),
    "exact": ({"relative_margin": 0}, [[[4, 4]], [[1, 1]], [[0, 0]]]),
    "clipped at 0": ({"relative_margin": 1.5}, [[[0, 10]], [[0, 2.5]], [[0, 0]]]),
    "absolute": ({"margin": 2}, [[[2, 6]], [[0, 3]], [[0, 0]]]),
    "mm": ({"units": "mm", "margin": 0.5}, [[[3.5, 4.5]], [[0.5, 1.5]], [[0, 0]]]),
    "tags": ({"level": "tags"}, [[[1, 15]], [[1, 15]], [[0, 0]]]),
    "tags, mm": ({"level": "tags", "units": "mm"}, [[[1, 15]], [[1, 15]], [[0, 0]]]),
    "common": ({"level": COMMON}, [[[3, 9]], [[0.5, 2]], [[0, 0]]]),
    "common, array": ({"level": np.array(COMMON)}, [[[3, 9]], [[0.5, 2]], [[0, 0]]]),
    "none": ({"level": "none"}, [[FREE]] * 3),
    "centroid": (
        {"statistic": soft_centroid, "margin": 1},
        [[[0, 2], [0.5, 2.5]], [[1, 3], [3, 5]], [FREE, FREE]],
    ),
    "centroid, a margin for each axis": (
        {"statistic": soft_centroid, "margin": [20, 0]},
        [[[0, 21], [1.5, 1.5]], [[0, 22], [4, 4]], [FREE, FREE]],
    ),
    "centroid, mm": (
        {"statistic": soft_centroid, "margin": 0.5, "units": "mm"},
        [[[1.5, 2.5], [0.25, 1.25]], [[3.5, 4.5], [1.5, 2.5]], [FREE, FREE]],
    ),
    "centroid, common": (
        {"statistic": soft_centroid, "level": [[[0, 1], FREE]] * 3},
        [[[0, 1], FREE], [[0, 1], FREE], [FREE, FREE]],
    ),
    "centroid, none": ({"statistic": soft_centroid, "level": "none"}, [[FREE, FREE]] * 3),
    "spread": (
        {"statistic": soft_spread, "relative_margin": 0.5},
        [[[0.5, 1.5], [0.25, 0.75]], [[0, 0], [0, 0]], [FREE, FREE]],
    ),
    "moments": (
        {"statistic": soft_moments, "margin": [1, 0, 0]},
        [[[3, 5], [1, 1], [1.5, 1.5]], [[0, 2], [2, 2], [4, 4]], [FREE] * 3],
    ),
    "mean intensity": (
        {"statistic": soft_mean_intensity, "margin": 1},
        [[[-8, -6], [6, 8]], [[-15, -13], [13, 15]], [FREE, FREE]],
    ),
    "mean intensity, share": (
        {"statistic": soft_mean_intensity, "relative_margin": 0.5},
        [[[-10.5, -3.5], [3.5, 10.5]], [[-21, -7], [7, 21]], [FREE, FREE]],
    ),
}


@pytest.mark.parametrize(("options", "expected"), BY_HAND.values(), ids=BY_HAND)
def test_bounds_by_hand(options, expected):
    image = torch.arange(15.0).reshape(3, 5)  # the four voxels of class 1 have the mean 6.5, so shift them
    image = torch.where(torch.from_numpy(LABEL) == 1, image + 0.5, image)
    item = item_of(LABEL, SPACING, image=torch.stack([-image, image]), other="kept")
    out = LabelToBoundsd(num_classes=4, **options)(item)
    in_mm = options.get("units") == "mm"
    assert set(out) == {*item, "bounds", *(["spacing_mm"] if in_mm else [])} and "bounds" not in item
    assert not in_mm or out["spacing_mm"].tolist() == list(SPACING)
    bounds = out["bounds"]
    assert type(bounds) is torch.Tensor and bounds.dtype == torch.float32
    components = len(expected[0])
    torch.testing.assert_close(bounds, torch.tensor([[FREE] * components, *expected]).float())


RELATIONS = {
    "offset": (partial(soft_centroid_offset, pairs=[[1, 2], [2, 3]]), [[[0, 2], [1.5, 3.5]], [FREE, FREE]]),
    "ratio": (partial(soft_size_ratio, pairs=[[2, 1], [0, 2]]), [[[0, 1.25]], [[9, 11]]]),
    "extent": (partial(soft_outside_extent, pairs=[[2, 1]]), [[[0, 1], [0, 2]]]),
}


@pytest.mark.parametrize(("statistic", "expected"), RELATIONS.values(), ids=RELATIONS)
def test_relations_have_rows_of_pairs(statistic, expected):
    """Those with the background too; a pair with an absent class is free."""
    bounds = LabelToBoundsd(num_classes=4, statistic=statistic, margin=1)(item_of(LABEL))["bounds"]
    torch.testing.assert_close(bounds, torch.tensor(expected).float())


def test_common_bounds_of_a_relation():
    order = [[[0.0, INF], FREE], [[0.0, INF], FREE]]
    statistic = partial(soft_centroid_offset, pairs=[[1, 2], [2, 3]])
    bounds = LabelToBoundsd(num_classes=4, statistic=statistic, level=order)(item_of(LABEL))["bounds"]
    assert bounds.tolist() == [order[0], [FREE, FREE]]


def test_a_statistic_of_ones_own():
    """It gets other entries of the item under the names of its arguments."""

    def mean_depth(probs, depth, scale=2.0):
        return scale * soft_fraction(probs, depth)

    depth = torch.arange(5.0).repeat(3, 1)[None]
    item = item_of(LABEL, depth=depth)
    bounds = LabelToBoundsd(num_classes=4, statistic=mean_depth, margin=0)(item)["bounds"]
    expected = [2 * depth[0][torch.from_numpy(LABEL) == cls].mean().item() for cls in (1, 2)]
    torch.testing.assert_close(bounds[1:3, 0], torch.tensor([[value, value] for value in expected]))
    assert bounds[3].tolist() == [FREE]
    with pytest.raises(KeyError, match=r"depth: expected this argument of the statistic, got \['label'\]"):
        LabelToBoundsd(num_classes=4, statistic=mean_depth)(item_of(LABEL))


def test_a_relation_of_ones_own():
    @relation
    def distance(probs, pairs=((1, 2),)):
        first, second = (soft_centroid(probs)[:, list(classes)] for classes in zip(*pairs, strict=True))
        return (second - first).square().sum(-1, keepdim=True).sqrt()

    bounds = LabelToBoundsd(num_classes=4, statistic=distance, margin=1)(item_of(LABEL))["bounds"]
    torch.testing.assert_close(bounds, torch.tensor([[[7.25**0.5 - 1, 7.25**0.5 + 1]]]))
    with pytest.raises(ValueError, match="statistic: expected pairs of the classes"):
        label_to_bounds(LABEL, 4, relation(lambda probs: distance(probs)))


def slow_bounds(label, num_classes, statistic, margin):
    """Reference, voxel by voxel."""
    dims = label.ndim
    rows = [[FREE] * (1 if statistic == "size" else dims)]
    for cls in range(1, num_classes):
        voxels = [v for v in np.ndindex(label.shape) if label[v] == cls]
        if statistic == "size":
            rows.append([[max(len(voxels) * (1 - margin), 0), len(voxels) * (1 + margin)]])
        elif not voxels:
            rows.append([FREE] * dims)
        else:
            middle = [sum(v[d] for v in voxels) / len(voxels) for d in range(dims)]
            rows.append([[max(c - margin, 0), c + margin] for c in middle])
    return torch.tensor(rows).float()


@pytest.mark.parametrize("density", [0.02, 1.0])
@pytest.mark.parametrize("shape", [(7, 6), (5, 4, 6)], ids=["2D", "3D"])
def test_random_labels(shape, density, rng):
    for margin in (0.0, 0.3, 2.0):
        label = rng.integers(1, 4, shape) * (rng.random(shape) < density)
        size = label_to_bounds(label, 5, relative_margin=margin)
        torch.testing.assert_close(size, slow_bounds(label, 5, "size", margin))
        centroid = label_to_bounds(label, 5, soft_centroid, margin=margin)
        torch.testing.assert_close(centroid, slow_bounds(label, 5, "centroid", margin))


def test_sizes_do_not_change_with_flips_and_follow_the_classes(rng):
    label = rng.integers(0, 4, (6, 7, 5))
    bounds = label_to_bounds(label, 4)
    assert torch.equal(label_to_bounds(np.flip(label, 1), 4), bounds)
    assert torch.equal(label_to_bounds(np.array([0, 3, 1, 2])[label], 4), bounds[[0, 2, 3, 1]])


def test_empty_label_and_full_image():
    empty, full = np.zeros((4, 5)), np.ones((4, 5))
    assert label_to_bounds(empty, 3)[1:].abs().max() == presence_bounds(empty, 3, COMMON[:2])[1:].abs().max() == 0
    assert LabelToBoundsd(num_classes=2, level="tags")(item_of(full))["bounds"][1].tolist() == [[1, 20]]
    assert label_to_bounds(full, 2)[1, 0].tolist() == pytest.approx([18, 22])
    assert label_to_bounds(empty, 2, soft_centroid).tolist() == [[FREE, FREE]] * 2


STATISTICS = {
    "size": (soft_size, {}),
    "centroid": (soft_centroid, {}),
    "spread": (soft_spread, {}),
    "moments": (soft_moments, {}),
    "intensity": (soft_mean_intensity, {}),
    "ratio": (soft_size_ratio, {"pairs": [[1, 2]]}),
    "offset": (soft_centroid_offset, {"pairs": [[1, 2], [0, 1]]}),
    "extent": (soft_outside_extent, {"pairs": [[1, 2]]}),
}


@pytest.mark.parametrize(("statistic", "options"), STATISTICS.values(), ids=STATISTICS)
def test_the_truth_satisfies_its_bounds(statistic, options, rng):
    """In float32, as the loss computes it; voxels or mm."""
    item = item_of(rng.integers(0, 3, (6, 5, 4)), (0.7, 1.1, 3.0), image=torch.randn(2, 6, 5, 4))
    probs = torch.stack([item["label"][0] == cls for cls in range(3)])[None].float().as_tensor()
    more = {"image": item["image"][None]} if statistic is soft_mean_intensity else {}
    in_mm = statistic in (soft_size, soft_centroid, soft_spread, soft_moments, soft_centroid_offset)
    for spacing in (None, (0.7, 1.1, 3.0))[: 1 + in_mm]:
        given = {} if spacing is None else {"spacing_mm": spacing}
        value = statistic(probs, **options, **more, **given)[0]
        transform = LabelToBoundsd(
            num_classes=3, statistic=partial(statistic, **options), margin=1e-3, units="mm" if given else "voxel"
        )
        bounds = transform(item)["bounds"]
        assert ((bounds[..., 0] <= value) & (value <= bounds[..., 1])).all()
        assert not torch.isinf(bounds[-1]).any()


@pytest.mark.parametrize(
    "convert",
    [lambda a: torch.from_numpy(a).half(), lambda a: MetaTensor(torch.from_numpy(a)), lambda a: a.astype(np.float32)],
    ids=["half tensor", "MetaTensor", "float32"],
)
def test_any_type_of_label(convert):
    assert torch.equal(label_to_bounds(convert(LABEL), 4), label_to_bounds(LABEL, 4))


@pytest.mark.parametrize(
    ("label", "num_classes", "options", "words"),
    [
        (np.zeros((1, 2, 3, 4)), 2, {}, r"label: expected a 2D or 3D map without channel axis, got shape \(1, 2, 3, 4"),
        (LABEL, 2, {}, r"label: expected class numbers 0 to 1 on every voxel, got 2; correct num_c"),
        (np.array([[0, -1, 0.5, np.nan]]), 2, {}, r"label: expected class numbers 0 to 1 .* got -1, 0\.5, nan;"),
        (LABEL, 1, {}, "num_classes: expected an integer >= 2, got 1"),
        (LABEL, 4, {"margin": -0.1}, r"margin: expected a number >= 0, .* got \[-0\.1"),
        (LABEL, 4, {"relative_margin": float("nan")}, "relative_margin: expected a number >= 0, .* got .nan"),
        (LABEL, 4, {"margin": 1, "relative_margin": 1}, "margin: expected a margin or a relative_margin, got both"),
        (LABEL, 4, {"margin": [1, 2]}, "margin: expected one value, or one for each of 1 components, got"),
    ],
)
def test_refusals(label, num_classes, options, words):
    with pytest.raises(ValueError, match=words):
        label_to_bounds(label, num_classes, **options)


def test_fully_labelled_items_are_free():
    label = np.ones((3, 3, 3))
    for statistic, components in ((soft_size, 1), (soft_centroid, 3)):
        transform = LabelToBoundsd("label", "b", num_classes=3, statistic=statistic, full_key="whole")
        assert transform(item_of(label, whole=True))["b"].tolist() == [[FREE] * components] * 3
        assert torch.isfinite(transform(item_of(label, whole=False))["b"][1]).all()
    common = LabelToBoundsd(num_classes=2, level=[[1, 2]])(item_of(label, fully_labelled=1))["bounds"]
    assert common.tolist() == [[FREE]] * 2
    with pytest.raises(ValueError, match=r"whole: expected true or false, got .yes.; correct this entry"):
        transform(item_of(label, whole="yes"))


def test_no_label_is_needed_where_nothing_is_known():
    image = torch.zeros(2, 4, 5, 6)
    for statistic, components in ((soft_size, 1), (soft_centroid, 3), (soft_mean_intensity, 2)):
        options = {"num_classes": 3, "statistic": statistic}
        bounds = LabelToBoundsd(level="none", **options)({"image": image})["bounds"]
        assert bounds.tolist() == [[FREE] * components] * 3
        with pytest.raises(KeyError, match=r"label: expected this key in the item, got \['image'\]"):
            LabelToBoundsd(**options)({"image": image})
    assert LabelToBoundsd(num_classes=2, allow_missing_keys=True)({"image": 1}) == {"image": 1}


def test_spacing_follows_the_axes():
    """After reorientation the spacing is that of the new axes, and a flip does not change a size in mm."""
    label = np.zeros((4, 5, 6))
    label[1, 2:4, 1:5] = 1
    affine = torch.tensor([[0, 0, -3.0, 9], [0.5, 0, 0, 1], [0, -2.0, 0, 4], [0, 0, 0, 1]], dtype=torch.float64)
    item = {"label": MetaTensor(torch.from_numpy(label)[None], affine=affine)}
    out = LabelToBoundsd(num_classes=2, units="mm", statistic=soft_centroid, margin=0)(item)["bounds"]
    np.testing.assert_allclose(out[1, :, 0], [1 * 0.5, 2.5 * 2, 2.5 * 3])
    moves = [Orientationd("label", axcodes="RAS", labels=None), Flipd("label", 0)]
    chain = Compose([*moves, LabelToBoundsd(num_classes=2, units="mm", margin=0)])
    assert chain(item)["bounds"][1, 0].tolist() == pytest.approx([8 * 0.5 * 2 * 3] * 2)


def test_bounds_of_a_batch_collate():
    transform = LabelToBoundsd(num_classes=4)
    batch = list_data_collate([transform(item_of(LABEL)), transform(item_of(LABEL * 0))])
    assert batch["bounds"].shape == (2, 4, 1, 2)


def test_common_bounds_from_a_file(tmp_path):
    path = tmp_path / "common.json"
    path.write_text(json.dumps({"bounds": COMMON, "unit": "voxel", "cases": ["a"], "factors": [0.9, 1.1]}))
    for level in (path, str(path)):
        bounds = LabelToBoundsd(num_classes=4, level=level)(item_of(LABEL))["bounds"]
        assert torch.equal(bounds, presence_bounds(LABEL, 4, COMMON))
    with pytest.raises(ValueError, match=r'level: expected soft_size and units "voxel" for .*common.json: such a file'):
        LabelToBoundsd(num_classes=4, level=path, units="mm")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keys": ["label", "other"]}, "keys: expected one key"),
        ({"num_classes": 1}, "num_classes: expected an integer >= 2"),
        ({"statistic": soft_centroid, "level": "tags"}, 'level: expected "tags" for sizes alone'),
        ({"statistic": soft_mean_intensity, "units": "mm"}, "units: expected a statistic with an argument spacing_mm"),
        ({"units": "cm"}, "units: expected one of voxel, mm, got 'cm'"),
        ({"level": "common"}, "level: expected individual, tags, none, common bounds, or the path .* got 'common'"),
        ({"level": COMMON[:1]}, "level: expected .* for each of the 3 foreground classes, .* got"),
        ({"level": [[2, 1], [1, 1], [1, 1]]}, "level: expected .* lower <= upper"),
        ({"level": [[-2, 1], [1, 1], [1, 1]]}, "level: expected .* >= 0 for sizes"),
        ({"level": [[1, float("nan")], [1, 1], [1, 1]]}, "level: expected .* lower <= upper"),
        ({"statistic": partial(soft_size_ratio, pairs=[[1, 2]]), "level": COMMON}, "for each of the 1 pairs"),
        ({"statistic": soft_size_ratio}, r"statistic: expected pairs of the classes 0\.\.3, such as .*partial"),
        ({"statistic": partial(soft_size_ratio, pairs=[[1, 4]])}, r"statistic: expected pairs .* got \[\[1, 4\]\]"),
        ({"margin": -1}, "margin: expected a number >= 0"),
    ],
)
def test_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        LabelToBoundsd(**{"num_classes": 4, **options})


def test_errors_name_the_file():
    with pytest.raises(ValueError, match=r"^case_7\.nii\.gz: expected class numbers 0 to 1 on every voxel"):
        LabelToBoundsd(num_classes=2)(item_of(LABEL, SPACING, "folder/case_7.nii.gz"))
    for shape in [(4, 4), (2, 4, 4)]:
        with pytest.raises(ValueError, match=r"label: expected a label map \(1, \*S\) .*EnsureChannelFirstd"):
            LabelToBoundsd(num_classes=2)({"label": torch.zeros(shape)})
    with pytest.raises(ValueError, match="label: expected a MetaTensor, whose affine tells the millimetres, got"):
        LabelToBoundsd(num_classes=4, units="mm")(item_of(LABEL))


REAL = {
    "hippocampus": ("hippocampus/labelsTr/hippocampus_003.nii.gz", 3),
    "heart": ("acdc/patient001/patient001_frame01_gt.nii.gz", 4),
}


@pytest.mark.parametrize(("name", "num_classes"), REAL.values(), ids=REAL)
def test_real_labels(data_root, name, num_classes):
    path = data_root / name
    if not path.exists():
        pytest.skip(f"no {name}")
    array = np.asarray(nib.load(path).dataobj).round()
    item = Compose([LoadImaged("label"), EnsureChannelFirstd("label")])({"label": str(path)})
    voxel = np.prod(nib.load(path).header.get_zooms())
    size = LabelToBoundsd(num_classes=num_classes, units="mm")(item)["bounds"]
    place = LabelToBoundsd(num_classes=num_classes, statistic=soft_centroid, margin=2)(item)["bounds"]
    for cls in range(1, num_classes):
        count = (array == cls).sum()
        assert size[cls, 0].tolist() == pytest.approx([0.9 * count * voxel, 1.1 * count * voxel], rel=1e-5)
        np.testing.assert_allclose(place[cls].mean(-1), np.argwhere(array == cls).mean(0), rtol=1e-5)
        np.testing.assert_allclose(place[cls, :, 1] - place[cls, :, 0], 4, atol=1e-4)
