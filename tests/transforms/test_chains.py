"""Chains that the bundles share: how volumes are read and normalised."""

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose
from PIL import Image

from medconstraints.statistics import soft_centroid
from medconstraints.transforms import (
    Points,
    WeakLabeld,
    bounds_transforms,
    box_transforms,
    class_transforms,
    reading_transforms,
    weak_label_transforms,
)

SHAPE = (9, 8, 7)


@pytest.fixture
def channels(tmp_path, rng):
    """Files of two channels: another scale each, and zeros around a brain in which one voxel is 0 too."""
    brain = np.zeros(SHAPE, bool)
    brain[2:7, 1:7, 1:6] = True
    brain[4, 4, 3] = False
    paths = []
    for number, (mean, sd) in enumerate([(500.0, 30.0), (-2.0, 0.1)]):
        values = np.where(brain, rng.normal(mean, sd, SHAPE), 0).astype(np.float32)
        paths.append(str(tmp_path / f"{number}.nii.gz"))
        nib.save(nib.Nifti1Image(values, np.eye(4)), paths[-1])
    return brain, paths


@pytest.mark.parametrize("nonzero", [False, True])
def test_normalisation(channels, nonzero):
    """Zero mean and unit variance, of all voxels or of those that are not 0, in each channel by itself."""
    brain, paths = channels
    image = np.asarray(Compose(reading_transforms(num_classes=2, nonzero=nonzero))({"image": paths})["image"])
    assert image.shape == (2, *SHAPE)
    assert image.dtype == np.float32
    for channel in image:
        counted = channel[brain] if nonzero else channel.ravel()
        assert counted.mean() == pytest.approx(0, abs=1e-4)
        assert counted.std() == pytest.approx(1, abs=1e-3)
        assert (channel[~brain] == 0).all() == nonzero  # what was 0 stays 0
    default = Compose(reading_transforms(num_classes=2))({"image": paths})["image"]
    assert np.array_equal(np.asarray(default), image) == (not nonzero)


def names(chain):
    return [type(transform).__name__ for transform in chain]


def test_weak_labels_of_each_source():
    label = torch.zeros(1, 9, 9, 3)
    label[:, 2:7, 2:7] = 1
    item = {"label": label, "scribble": torch.full_like(label, 4)}
    item["scribble"][:, 3, 3], item["scribble"][:, 0, 0] = 1, 0
    found = {}
    for source in ("points", "erosion", "scribble", "label"):
        options = {"radius_voxels": 1, "kernel_voxels": 3, "slice_axis": 2, "num_classes": 2, "background": True}
        found[source] = Compose(weak_label_transforms(source, **options))(dict(item))["weak_label"]
    counts = {source: int((found[source] == 1).sum()) for source in ("erosion", "scribble", "label")}
    assert counts == {"erosion": 27, "scribble": 3, "label": 75}
    rule = Points(radius_voxels=1, slice_axis=2, background=True)
    assert torch.equal(found["points"], WeakLabeld(rule=rule)(item)["weak_label"])
    assert int((found["scribble"] == 0).sum()) == 3
    without = Compose(weak_label_transforms("scribble"))(dict(item))["weak_label"]
    assert not (without == 0).any()


def test_bounds_of_each_level():
    label = torch.zeros(1, 4, 4)
    label[:, :2] = 1
    item = {"label": label}
    common = {"common_bounds": [[3, 20]]}
    levels = {"individual": [7.2, 8.8], "tags": [1, 16], "common": [3, 20], "none": [-np.inf, np.inf]}
    for level, expected in levels.items():
        out = Compose(bounds_transforms(level, num_classes=2, bounds_key="b", **common))(dict(item))
        np.testing.assert_allclose(out["b"][1, 0], expected)
    place = bounds_transforms("individual", num_classes=2, statistic=soft_centroid, margin=1)
    assert Compose(place)(dict(item))["bounds"][1].tolist() == [[0, 1.5], [0.5, 2.5]]
    report = bounds_transforms("individual", num_classes=2, source="items", relative_margin=0.5, whole_image=False)
    image = MetaTensor(torch.zeros(1, 4, 4, 4), affine=10 * torch.eye(4))
    assert Compose(report)({"image": image, "size_ml": [4]})["bounds"][1, 0].tolist() == [-np.inf, 6]


@pytest.mark.parametrize(
    ("chain", "words"),
    [
        (
            lambda: weak_label_transforms("clicks"),
            "source: expected one of points, erosion, scribble, point_files, label",
        ),
        (lambda: box_transforms("clicks"), "source: expected one of label, files, got 'clicks'"),
        (lambda: bounds_transforms("all", num_classes=2), "level: expected one of individual, tags, none, common, got"),
        (lambda: bounds_transforms("common", num_classes=2), "common_bounds: expected bounds, or the path"),
        (lambda: bounds_transforms("tags", num_classes=2, source="items"), "level: sizes in the datalist are indiv"),
    ],
)
def test_settings_that_do_not_fit(chain, words):
    with pytest.raises(ValueError, match=words):
        chain()


def test_boxes_of_each_source():
    assert names(box_transforms("label")) == ["LabelToBoxesd"] and names(box_transforms("files")) == ["LoadBoxesd"]


@pytest.mark.parametrize("from_file", [False, True])
def test_images_of_classes(tmp_path, from_file):
    """An array has one channel, a file those that it has; normalised by the training set, or each by itself."""
    array = np.arange(48, dtype=np.uint8).reshape(6, 8)
    image = array
    if from_file:
        image = str(tmp_path / "a.png")
        Image.fromarray(array).save(image)
    item = Compose(class_transforms(mean=10.0, std=4.0))({"image": image, "label": 1, "case": "a"})
    expected = (array.T if from_file else array).astype(np.float32)  # MONAI's reader of pictures turns them
    np.testing.assert_allclose(item["image"][0].numpy(), (expected - 10) / 4)
    assert item["image"].shape[0] == 1 and (item["label"], item["case"]) == (1, "a")
    alone = Compose(class_transforms())({"image": image})["image"]
    assert abs(float(alone.mean())) < 1e-5 and abs(float(alone.std(unbiased=False)) - 1) < 1e-4
    with pytest.raises(ValueError, match="mean, std: expected both or none"):
        class_transforms(mean=1.0)


# What files may hold


def stored(path, voxels, affine=None):
    nib.save(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return str(path)


@pytest.mark.parametrize("kind", [np.float64, np.int32])
@pytest.mark.parametrize("nonzero", [False, True])
def test_large_intensities_keep_their_contrast(tmp_path, rng, kind, nonzero):
    noise = np.round(rng.normal(0, 20, (8, 8, 8)))
    voxels = (1e8 + noise).astype(kind)
    if nonzero:
        voxels[:2] = 0
    item = Compose(reading_transforms(num_classes=2, label_key=None, nonzero=nonzero))(
        {"image": stored(tmp_path / "a.nii", voxels)}
    )
    used = voxels != 0
    expected = (noise - noise[used].mean()) / noise[used].std()
    assert item["image"].dtype == torch.float32
    np.testing.assert_allclose(np.asarray(item["image"])[0][used], expected[used], atol=1e-4)


def test_nan_is_replaced_on_request(tmp_path, rng):
    voxels = rng.random((6, 6, 6)).astype(np.float32)
    voxels[0] = np.nan
    path = stored(tmp_path / "a.nii", voxels)
    with pytest.raises(RuntimeError) as caught:
        Compose(reading_transforms(num_classes=2, label_key=None))({"image": path})
    assert "has 36 NaN voxels" in str(caught.value.__cause__)
    found = Compose(reading_transforms(num_classes=2, label_key=None, nan_value=0.5))({"image": path})["image"]
    filled = np.nan_to_num(voxels, nan=0.5)
    path = stored(tmp_path / "b.nii", np.where(np.isnan(voxels), np.inf, voxels))
    with pytest.raises(RuntimeError) as caught:
        Compose(reading_transforms(num_classes=2, label_key=None, nan_value=0.5))({"image": path})
    assert "has 36 infinite voxels" in str(caught.value.__cause__)
    np.testing.assert_allclose(np.asarray(found)[0], (filled - filled.mean()) / filled.std(), atol=1e-4)


def test_values_of_a_label_are_mapped_on_request(tmp_path, rng):
    label = rng.choice([0, 2, 255], (6, 6, 6)).astype(np.uint8)
    item = {"image": stored(tmp_path / "a.nii", rng.random((6, 6, 6))), "label": stored(tmp_path / "l.nii", label)}
    found = Compose(reading_transforms(num_classes=3, label_values=[0, 255, 2]))(item)["label"]
    np.testing.assert_array_equal(np.asarray(found)[0], np.select([label == 255, label == 2], [1, 2], 0))
    with pytest.raises(ValueError, match="label_values: expected one value for each class"):
        reading_transforms(num_classes=3, label_values=[0, 255, 255])


def test_channels_on_other_grids_are_told_how_they_differ(tmp_path, rng):
    voxels = rng.random((6, 6, 6)).astype(np.float32)
    paths = [stored(tmp_path / "a.nii", voxels), stored(tmp_path / "b.nii", voxels, np.diag([1, 1, 1.2, 1]))]
    with pytest.raises(RuntimeError) as caught:
        Compose(reading_transforms(num_classes=2, label_key=None))({"image": paths})
    assert "b.nii: has another affine than a.nii: the voxel size or direction differs by up to 0.2 mm" in str(
        caught.value.__cause__
    )
