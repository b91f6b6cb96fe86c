"""Bounds of labels and of datalist entries: values by hand, spacing, flips, real labels, hybrid training."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor, list_data_collate
from monai.transforms import Compose, EnsureChannelFirstd, Flipd, LoadImaged, Orientationd

from medconstraints.statistics import soft_size
from medconstraints.transforms import ItemToBoundsd
from medconstraints.transforms.bounds import (
    LabelToBoundsd,
    label_to_centroid_bounds,
    label_to_size_bounds,
)

INF = float("inf")
FREE = [-INF, INF]
# Class 1: 4 voxels around (1, 1.5); class 2: one at (2, 4); class 3: none.
LABEL = np.array([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 2]], dtype=np.uint8)
SPACING = (2.0, 0.5)


def item_of(array, spacing=None, name=None, **more):
    label = torch.as_tensor(array)[None]
    if spacing is not None:
        affine = torch.eye(4, dtype=torch.float64)
        affine[: len(spacing), : len(spacing)] = torch.diag(torch.tensor(spacing, dtype=torch.float64))
        label = MetaTensor(label, affine=affine, meta={"filename_or_obj": name} if name else None)
    return {"label": label, **more}


SIZES = {
    "individual": ({}, [[3.6, 4.4], [0.9, 1.1], [0, 0]]),
    "individual, exact": ({"margin": 0}, [[4, 4], [1, 1], [0, 0]]),
    "individual, clipped at 0": ({"margin": 1.5}, [[0, 10], [0, 2.5], [0, 0]]),
    "common": ({"level": "common", "common": [[3, 9], [0.5, 2], [5, 6]]}, [[3, 9], [0.5, 2], [0, 0]]),
    "tags": ({"level": "tags"}, [[1, 15], [1, 15], [0, 0]]),
    "none": ({"level": "none"}, [FREE] * 3),
    "individual, mm": ({"spacing_mm": SPACING}, [[3.6, 4.4], [0.9, 1.1], [0, 0]]),
    "individual, larger mm": ({"spacing_mm": (2, 3)}, [[21.6, 26.4], [5.4, 6.6], [0, 0]]),
    "tags, mm": ({"level": "tags", "spacing_mm": (2, 3)}, [[6, 90], [6, 90], [0, 0]]),
    "common, mm": (
        {"level": "common", "common": [[3, 9], [0.5, 2], [5, 6]], "spacing_mm": (2, 3)},
        [[3, 9], [0.5, 2], [0, 0]],
    ),
}


@pytest.mark.parametrize(("options", "expected"), SIZES.values(), ids=SIZES)
def test_size_bounds_by_hand(options, expected):
    bounds = label_to_size_bounds(LABEL, 4, **options)
    assert bounds.dtype == torch.float32 and bounds.shape == (4, 1, 2)
    torch.testing.assert_close(bounds[:, 0], torch.tensor([FREE, *expected]))


CENTROIDS = {
    "default": ({}, [[0, 21], [0, 21.5]], [[0, 22], [0, 24]]),
    "one voxel": ({"margin_voxels": 1}, [[0, 2], [0.5, 2.5]], [[1, 3], [3, 5]]),
    "exact": ({"margin_voxels": 0}, [[1, 1], [1.5, 1.5]], [[2, 2], [4, 4]]),
    "half a voxel, mm": ({"margin_voxels": 0.5, "spacing_mm": SPACING}, [[1, 3], [0.5, 1]], [[3, 5], [1.75, 2.25]]),
}


@pytest.mark.parametrize(("options", "first", "second"), CENTROIDS.values(), ids=CENTROIDS)
def test_centroid_bounds_by_hand(options, first, second):
    bounds = label_to_centroid_bounds(LABEL, 4, **options)
    assert bounds.dtype == torch.float32
    torch.testing.assert_close(bounds, torch.tensor([[FREE] * 2, first, second, [FREE] * 2]).float())


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
    return torch.tensor(rows)


@pytest.mark.parametrize("shape", [(7, 6), (5, 4, 6)], ids=["2D", "3D"])
@pytest.mark.parametrize("density", [0.02, 0.4, 1.0])
def test_random_labels(shape, density, rng):
    for margin in (0.0, 0.3, 2.0):
        label = rng.integers(1, 4, shape) * (rng.random(shape) < density)
        torch.testing.assert_close(
            label_to_size_bounds(label, 5, margin=margin), slow_bounds(label, 5, "size", margin).float()
        )
        torch.testing.assert_close(
            label_to_centroid_bounds(label, 5, margin_voxels=margin), slow_bounds(label, 5, "centroid", margin).float()
        )


@pytest.mark.parametrize("level", ["individual", "tags"])
def test_sizes_do_not_change_with_flips_and_follow_the_classes(level, rng):
    label = rng.integers(0, 4, (6, 7, 5))
    bounds = label_to_size_bounds(label, 4, level=level)
    assert torch.equal(label_to_size_bounds(np.flip(label, 1), 4, level=level), bounds)
    assert torch.equal(label_to_size_bounds(np.array([0, 3, 1, 2])[label], 4, level=level), bounds[[0, 2, 3, 1]])


def test_centroids_flip_with_the_label(rng):
    label = rng.integers(0, 3, (6, 7))
    bounds = label_to_centroid_bounds(label, 3, margin_voxels=0.5)
    flipped = label_to_centroid_bounds(np.flip(label, 1), 3, margin_voxels=0.5)
    torch.testing.assert_close(flipped[1:, 1], 6 - bounds[1:, 1].flip(-1))
    assert torch.equal(flipped[1:, 0], bounds[1:, 0])


def test_empty_label_and_full_image():
    empty, full = np.zeros((4, 5)), np.ones((4, 5))
    for level in ("individual", "tags"):
        assert label_to_size_bounds(empty, 3, level=level)[1:].abs().max() == 0
    assert label_to_size_bounds(full, 2, level="tags")[1].tolist() == [[1, 20]]
    assert label_to_size_bounds(full, 2)[1, 0].tolist() == pytest.approx([18, 22])
    assert label_to_centroid_bounds(empty, 2).tolist() == [[FREE, FREE]] * 2


def test_the_truth_satisfies_its_bounds(rng):
    """In the units of the statistic, voxels or mm."""
    label = torch.from_numpy(rng.integers(0, 3, (6, 5, 4)))
    probs = torch.stack([label == cls for cls in range(3)])[None].float()
    for spacing in (None, (0.7, 1.1, 3.0)):
        size = soft_size(probs, spacing)[0]
        for level in ("individual", "tags", "none"):
            bounds = label_to_size_bounds(label, 3, level=level, spacing_mm=spacing)
            assert ((bounds[..., 0] <= size) & (size <= bounds[..., 1])).all()


@pytest.mark.parametrize(
    "convert",
    [
        lambda a: a.astype(np.float32),
        lambda a: a.astype(np.int64),
        lambda a: torch.from_numpy(a),
        lambda a: torch.from_numpy(a).half(),
        lambda a: MetaTensor(torch.from_numpy(a)),
    ],
    ids=["float32", "int64", "tensor", "half tensor", "MetaTensor"],
)
def test_any_type_of_label(convert):
    assert torch.equal(label_to_size_bounds(convert(LABEL), 4), label_to_size_bounds(LABEL, 4))
    assert torch.equal(label_to_centroid_bounds(convert(LABEL), 4), label_to_centroid_bounds(LABEL, 4))


@pytest.mark.parametrize("function", [label_to_size_bounds, label_to_centroid_bounds])
@pytest.mark.parametrize(
    ("label", "num_classes", "options", "words"),
    [
        (np.zeros((1, 2, 3, 4)), 2, {}, r"label: expected a 2D or 3D map without channel axis, got shape \(1, 2, 3, 4"),
        (LABEL, 2, {}, r"label: expected class numbers 0 to 1 on every voxel, got values such as \[0, 2\]; set num_c"),
        (np.array([[0, -1]]), 2, {}, r"label: expected class numbers 0 to 1 .* full label: a size needs all voxels"),
        (np.array([[0, 0.5]]), 2, {}, "label: expected class numbers 0 to 1"),
        (np.array([[0, np.nan]]), 2, {}, "label: expected class numbers 0 to 1"),
        (LABEL, 1, {}, "num_classes: expected an integer of at least 2, background included, got 1"),
        (LABEL, 4, {"spacing_mm": (1, 2, 3)}, r"spacing_mm: expected 2 positive values, one per axis of the label"),
        (LABEL, 4, {"spacing_mm": (1, 0)}, r"spacing_mm: expected 2 positive values"),
    ],
)
def test_refusals(function, label, num_classes, options, words):
    with pytest.raises(ValueError, match=words):
        function(label, num_classes, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"level": "weak"}, "level: expected one of individual, common, tags, none, got 'weak'"),
        ({"margin": -0.1}, r"margin: expected a number >= 0, got -0\.1"),
        ({"margin": float("nan")}, "margin: expected a number >= 0, got nan"),
        ({"level": "common"}, r"common: expected one \[lower, upper\] per foreground class .* got None"),
        ({"level": "common", "common": [[1, 2]]}, r"common: expected one \[lower, upper\] for each of the 3 foregro"),
        ({"level": "common", "common": [[1, 2], [2, 1], [1, 1]]}, r"common: expected .* 0 <= lower <= upper, got"),
        ({"level": "common", "common": [[1, 2], [-2, 1], [1, 1]]}, r"common: expected .* 0 <= lower <= upper, got"),
    ],
)
def test_size_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        label_to_size_bounds(LABEL, 4, **options)


def test_centroid_margin():
    with pytest.raises(ValueError, match="margin_voxels: expected a number >= 0, got -1"):
        label_to_centroid_bounds(LABEL, 4, margin_voxels=-1)


# LabelToBoundsd

COMMON = [[3, 9], [0.5, 2], [5, 6]]
TRANSFORMS = {
    "default": ({}, lambda spacing: label_to_size_bounds(LABEL, 4)),
    "margin": ({"margin": 0.3}, lambda spacing: label_to_size_bounds(LABEL, 4, margin=0.3)),
    "common": (
        {"level": "common", "common_bounds": COMMON},
        lambda spacing: label_to_size_bounds(LABEL, 4, level="common", common=COMMON),
    ),
    "tags, mm": (
        {"level": "tags", "units": "mm"},
        lambda spacing: label_to_size_bounds(LABEL, 4, level="tags", spacing_mm=spacing),
    ),
    "size, mm": ({"units": "mm"}, lambda spacing: label_to_size_bounds(LABEL, 4, spacing_mm=spacing)),
    "none": ({"level": "none"}, lambda spacing: label_to_size_bounds(LABEL, 4, level="none")),
    "centroid": (
        {"statistic": "centroid", "margin_voxels": 2},
        lambda spacing: label_to_centroid_bounds(LABEL, 4, margin_voxels=2),
    ),
    "centroid, mm": (
        {"statistic": "centroid", "units": "mm", "margin_voxels": 1},
        lambda spacing: label_to_centroid_bounds(LABEL, 4, margin_voxels=1, spacing_mm=spacing),
    ),
    "centroid, none": (
        {"statistic": "centroid", "level": "none"},
        lambda spacing: torch.tensor(FREE).expand(4, 2, 2),
    ),
}


@pytest.mark.parametrize(("options", "expected"), TRANSFORMS.values(), ids=TRANSFORMS)
def test_transform_is_its_function(options, expected):
    item = item_of(LABEL, SPACING, other="kept")
    out = LabelToBoundsd(num_classes=4, **options)(item)
    in_mm = options.get("units") == "mm"
    assert set(item) == {"label", "other"}
    assert set(out) == {"label", "other", "bounds", *(["spacing_mm"] if in_mm else [])}
    if in_mm:
        torch.testing.assert_close(out["spacing_mm"], torch.tensor(SPACING, dtype=torch.float32))
    assert type(out["bounds"]) is torch.Tensor and out["bounds"].dtype == torch.float32
    assert torch.equal(out["bounds"], expected(SPACING))


@pytest.mark.parametrize("statistic", ["size", "centroid"])
@pytest.mark.parametrize("dims", [2, 3])
def test_fully_labelled_items_are_free(statistic, dims):
    label = np.ones((3,) * dims)
    transform = LabelToBoundsd("label", "b", num_classes=3, statistic=statistic, full_key="whole")
    out = transform(item_of(label, whole=True))["b"]
    assert out.tolist() == [[FREE] * (1 if statistic == "size" else dims)] * 3
    constrained = transform(item_of(label, whole=False))["b"]
    assert constrained.shape == out.shape and torch.isfinite(constrained[1]).all()
    with pytest.raises(ValueError, match=r"whole: expected true or false, got .yes.; correct this entry"):
        transform(item_of(label, whole="yes"))


def test_spacing_follows_the_axes():
    """After reorientation the spacing is that of the new axes, and a flip does not change a size in mm."""
    label = np.zeros((4, 5, 6))
    label[1, 2:4, 1:5] = 1
    affine = torch.tensor([[0, 0, -3.0, 9], [0.5, 0, 0, 1], [0, -2.0, 0, 4], [0, 0, 0, 1]], dtype=torch.float64)
    item = {"label": MetaTensor(torch.from_numpy(label)[None], affine=affine)}
    out = LabelToBoundsd(num_classes=2, units="mm", statistic="centroid", margin_voxels=0)(item)["bounds"]
    np.testing.assert_allclose(out[1, :, 0], [1 * 0.5, 2.5 * 2, 2.5 * 3])
    chain = Compose(
        [
            Orientationd("label", axcodes="RAS", labels=None),
            Flipd("label", 0),
            LabelToBoundsd(num_classes=2, units="mm", margin=0),
        ]
    )
    assert chain(item)["bounds"][1, 0].tolist() == pytest.approx([8 * 0.5 * 2 * 3] * 2)


def test_bounds_of_a_batch_collate():
    transform = LabelToBoundsd(num_classes=4)
    batch = list_data_collate([transform(item_of(LABEL)), transform(item_of(LABEL * 0))])
    assert batch["bounds"].shape == (2, 4, 1, 2)


def common_file(tmp_path, **changes):
    path = tmp_path / "common.json"
    content = {"bounds": COMMON, "unit": "voxel", "cases": ["a.nii.gz"], "factors": [0.9, 1.1], **changes}
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("convert", [str, lambda path: path])
def test_common_bounds_from_a_file(tmp_path, convert):
    path = convert(common_file(tmp_path))
    out = LabelToBoundsd(num_classes=4, level="common", common_bounds=path)(item_of(LABEL))["bounds"]
    assert torch.equal(out, label_to_size_bounds(LABEL, 4, level="common", common=COMMON))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_classes": 1}, "num_classes: expected an integer of at least 2"),
        ({"statistic": "spread"}, 'statistic: expected "size" or "centroid", got .spread.'),
        ({"statistic": "centroid", "level": "tags"}, 'level: expected "individual" or "none" for centroids, got .tags'),
        ({"units": "cm"}, 'units: expected "voxel" or "mm", got .cm.'),
        ({"level": "common"}, 'common_bounds: expected bounds, .* exactly if level is "common", got None'),
        ({"common_bounds": COMMON}, r"common_bounds: expected bounds, .* with level 'individual'"),
        ({"level": "common", "common_bounds": COMMON[:1]}, "common_bounds: expected one .* for each of the 3 foregr"),
        ({"level": "common", "common_bounds": "a.json", "units": "mm"}, "a.json: the file counts voxels; use units"),
        ({"margin": -1}, "margin: expected a number >= 0"),
        ({"margin_voxels": -1}, "margin_voxels: expected a number >= 0"),
    ],
)
def test_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        LabelToBoundsd(**{"num_classes": 4, **options})


def test_errors_name_the_file():
    transform = LabelToBoundsd(num_classes=2)
    with pytest.raises(ValueError, match=r"^case_7\.nii\.gz: expected class numbers 0 to 1 on every voxel"):
        transform(item_of(LABEL, SPACING, "folder/case_7.nii.gz"))
    for shape in [(4, 4), (2, 4, 4), (1, 4, 4, 4, 4)]:
        with pytest.raises(ValueError, match=r"label: expected a label map \(1, \*S\) .*EnsureChannelFirstd"):
            transform({"label": torch.zeros(shape)})
    with pytest.raises(ValueError, match='label: expected a MetaTensor for units "mm", got Tensor, which has no aff'):
        LabelToBoundsd(num_classes=4, units="mm")(item_of(LABEL))


def test_missing_label():
    assert LabelToBoundsd(num_classes=2, allow_missing_keys=True)({"image": 1}) == {"image": 1}
    with pytest.raises(KeyError, match="label"):
        LabelToBoundsd(num_classes=2)({"image": 1})


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
    place = LabelToBoundsd(num_classes=num_classes, statistic="centroid", margin_voxels=2)(item)["bounds"]
    for cls in range(1, num_classes):
        count = (array == cls).sum()
        assert size[cls, 0].tolist() == pytest.approx([0.9 * count * voxel, 1.1 * count * voxel], rel=1e-5)
        np.testing.assert_allclose(place[cls].mean(-1), np.argwhere(array == cls).mean(0), rtol=1e-5)
        np.testing.assert_allclose(place[cls, :, 1] - place[cls, :, 0], 4, atol=1e-4)


# ItemToBoundsd


def sized(*, spacing=(1.0, 2.0, 5.0), shape=(1, 4, 4, 4), name=None, **entries):
    image = item_of(np.zeros(shape[1:]), spacing, name)["label"]
    return {"image": image.repeat(shape[0], *[1] * (len(shape) - 1)), **entries}


# A voxel of 10 mm^3: 100 voxels a ml. Two foreground classes.
ITEMS = {
    "sizes": ({}, {"size_ml": {"1": 3.0, "2": 2}}, [[270, 330], [180, 220]]),
    "int keys": ({}, {"size_ml": {1: 3.0, 2: 2}}, [[270, 330], [180, 220]]),
    "list": ({}, {"size_ml": [3.0, 2]}, [[270, 330], [180, 220]]),
    "unknown class": ({}, {"size_ml": {"2": 2}}, [FREE, [180, 220]]),
    "null": ({}, {"size_ml": [None, 2]}, [FREE, [180, 220]]),
    "null in a mapping": ({}, {"size_ml": {"1": None, "2": 2}}, [FREE, [180, 220]]),
    "absent class": ({}, {"size_ml": {"1": 0}}, [[0, 0], FREE]),
    "margin": ({"margin": 0.5}, {"size_ml": {"1": 3.0}}, [[150, 450], FREE]),
    "large margin": ({"margin": 2}, {"size_ml": {"1": 3.0}}, [[0, 900], FREE]),
    "mm": ({"units": "mm"}, {"size_ml": {"1": 3.0}}, [[2700, 3300], FREE]),
    "ranges": ({"margin": 7}, {"size_bounds_ml": {"1": [2.9, 3.5]}}, [[290, 350], FREE]),
    "list of ranges": ({}, {"size_bounds_ml": [None, [0, 3.5]]}, [FREE, [0, 350]]),
    "a size and a range": ({}, {"size_ml": {"2": 2}, "size_bounds_ml": {"1": [1, 4]}}, [[100, 400], [180, 220]]),
    "cropped": ({"whole_image": False}, {"size_ml": {"1": 3.0, "2": 0}}, [[-INF, 330], [-INF, 0]]),
    "cropped ranges": ({"whole_image": False}, {"size_bounds_ml": {"1": [2, 3]}}, [[-INF, 300], FREE]),
    "fully labelled": ({}, {"size_ml": {"1": 3.0}, "fully_labelled": True}, [FREE, FREE]),
    "fully labelled without sizes": ({}, {"fully_labelled": 1}, [FREE, FREE]),
    "not fully labelled": ({}, {"size_ml": {"1": 3.0}, "fully_labelled": False}, [[270, 330], FREE]),
    "neither key": ({"allow_missing_keys": True}, {}, [FREE, FREE]),
}


@pytest.mark.parametrize(("options", "entries", "expected"), ITEMS.values(), ids=ITEMS)
def test_bounds_of_known_sizes(options, entries, expected):
    item = sized(**entries)
    before = set(item)
    out = ItemToBoundsd(num_classes=3, **options)(item)
    assert set(item) == before
    assert set(out) == (before - {"size_ml", "size_bounds_ml"}) | {"bounds"}
    assert out["bounds"].dtype == torch.float32 and out["bounds"].shape == (3, 1, 2)
    torch.testing.assert_close(out["bounds"][:, 0], torch.tensor([FREE, *expected]).float())


def test_known_sizes_agree_with_the_label(rng):
    """The size of a label in ml gives the bounds that the label gives."""
    label = rng.integers(0, 3, (8, 7, 6))
    spacing = (0.9, 1.3, 2.5)
    sizes = {str(cls): float((label == cls).sum() * np.prod(spacing) / 1000) for cls in (1, 2)}
    item = item_of(label, spacing, size_ml=sizes)
    for units in ("voxel", "mm"):
        known = ItemToBoundsd(num_classes=3, units=units, image_key="label")(item)["bounds"]
        torch.testing.assert_close(known, LabelToBoundsd(num_classes=3, units=units)(item)["bounds"])


def test_known_sizes_of_oblique_images():
    turn = torch.tensor([[0.6, -0.8, 0, 1], [0.8, 0.6, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]], dtype=torch.float64)
    affine = turn @ torch.diag(torch.tensor([2.0, 1.0, 5.0, 1.0], dtype=torch.float64))
    item = {"image": MetaTensor(torch.zeros(2, 4, 4, 4), affine=affine), "size_ml": [1.0]}
    assert ItemToBoundsd(num_classes=2, margin=0)(item)["bounds"][1, 0].tolist() == pytest.approx([100, 100])


def test_known_sizes_collate_whichever_classes_they_name():
    transform = ItemToBoundsd(num_classes=3)
    batch = [transform(sized(size_ml={"1": 3.0})), transform(sized(size_bounds_ml={"2": [1, 2]}))]
    assert list_data_collate(batch)["bounds"].shape == (2, 3, 1, 2)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"size_ml": {"3": 1}}, r"^c\.nii: size_ml: expected the class numbers 1 to 2, got \['3'\]"),
        ({"size_ml": {"0": 1}}, r"size_ml: expected the class numbers 1 to 2, got \['0'\]"),
        ({"size_ml": {"liver": 1}}, "size_ml: expected the class numbers 1 to 2"),
        ({"size_ml": {"1": -1}}, r"^c\.nii: size_ml: expected ml >= 0 for class 1, got -1"),
        ({"size_ml": {"1": "3"}}, "size_ml: expected ml >= 0 for class 1, got '3'"),
        ({"size_ml": {"1": float("nan")}}, "size_ml: expected ml >= 0 for class 1, got nan"),
        ({"size_ml": {"1": True}}, "size_ml: expected ml >= 0 for class 1, got True"),
        ({"size_ml": [1.0]}, r"size_ml: expected a mapping from class .* one value per foreground class \(2\), got"),
        ({"size_ml": 3.0}, r"size_ml: expected a mapping from class number to value, or a list"),
        ({"size_bounds_ml": {"1": [3, 2]}}, r"size_bounds_ml: expected \[smallest, largest\] in ml .* got \[3, 2\]"),
        ({"size_bounds_ml": {"1": 3}}, r"size_bounds_ml: expected \[smallest, largest\] in ml for class 1"),
        ({"size_bounds_ml": {"1": [1, 2, 3]}}, r"size_bounds_ml: expected \[smallest, largest\] in ml for class 1"),
        ({"size_ml": {"1": 2}, "size_bounds_ml": {"1": [1, 3]}}, "a size or a range for class 1, got both; remove one"),
    ],
)
def test_entries_that_are_wrong(entries, words):
    with pytest.raises(ValueError, match=words):
        ItemToBoundsd(num_classes=3)(sized(name="folder/c.nii", **entries))


@pytest.mark.parametrize("units", ["voxel", "mm"])
def test_images_without_a_voxel_volume(units):
    transform = ItemToBoundsd(num_classes=2, units=units)
    with pytest.raises(TypeError, match=r"image: expected a loaded image \(MetaTensor\), got Tensor: nothing else"):
        transform({"image": torch.zeros(1, 4, 4, 4), "size_ml": [1.0]})
    with pytest.raises(TypeError, match=r"image: expected a loaded image \(MetaTensor\), got NoneType"):
        transform({"size_ml": [1.0]})
    with pytest.raises(
        ValueError, match=r"s\.png: expected a 3D image \(C, \*S\) for sizes in ml, got shape \(1, 4, 4"
    ):
        transform(sized(shape=(1, 4, 4), spacing=(1.0, 1.0), name="s.png", size_ml=[1.0]))


def test_neither_sizes_nor_ranges():
    with pytest.raises(KeyError, match=r"size_ml: expected sizes in ml under this key or 'size_bounds_ml', got \['im"):
        ItemToBoundsd(num_classes=2)(sized())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keys": ["a", "b"]}, "keys: expected one key, that of the sizes"),
        ({"num_classes": 1}, "num_classes: expected an integer of at least 2"),
        ({"margin": -1}, "margin: expected a number >= 0"),
        ({"units": "ml"}, 'units: expected "voxel" or "mm"'),
    ],
)
def test_item_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        ItemToBoundsd(**{"num_classes": 3, **options})


@pytest.mark.parametrize(("statistic", "components"), [("size", 1), ("centroid", 3)])
def test_no_label_is_needed_where_nothing_is_known(statistic, components):
    item = {"image": torch.zeros(1, 4, 5, 6)}
    bounds = LabelToBoundsd(num_classes=3, statistic=statistic, level="none")(item)["bounds"]
    assert bounds.shape == (3, components, 2) and torch.isinf(bounds).all()
    with pytest.raises(KeyError, match="label"):
        LabelToBoundsd(num_classes=3, statistic=statistic)(item)
