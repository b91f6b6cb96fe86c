"""Bounds of sizes that a datalist has: in ml, by class, as ranges, for hybrid training."""

import pytest
import torch
from monai.data import MetaTensor, list_data_collate

from medconstraints.transforms import ItemToBoundsd, LabelToBoundsd

INF = float("inf")
FREE = [-INF, INF]


def sized(*, spacing=(1.0, 2.0, 5.0), shape=(1, 4, 4, 4), **entries):
    affine = torch.diag(torch.tensor([*spacing, *[1.0] * (4 - len(spacing))], dtype=torch.float64))
    meta = {"filename_or_obj": "folder/c.nii"}
    return {"image": MetaTensor(torch.zeros(shape), affine=affine, meta=meta), **entries}


# A voxel of 10 mm^3: 100 voxels a ml. Two foreground classes.
ITEMS = {
    "sizes": ({}, {"size_ml": {"1": 3.0, 2: 2}}, [[270, 330], [180, 220]]),
    "list": ({}, {"size_ml": [3.0, 2]}, [[270, 330], [180, 220]]),
    "unknown class": ({}, {"size_ml": {"2": 2}}, [FREE, [180, 220]]),
    "null": ({}, {"size_ml": [None, 2]}, [FREE, [180, 220]]),
    "null in a mapping": ({}, {"size_ml": {"1": None, "2": 2}}, [FREE, [180, 220]]),
    "absent class": ({}, {"size_ml": {"1": 0}}, [[0, 0], FREE]),
    "large margin": ({"margin": 2}, {"size_ml": {"1": 3.0}}, [[0, 900], FREE]),
    "mm": ({"units": "mm"}, {"size_ml": {"1": 3.0}}, [[2700, 3300], FREE]),
    "ranges": ({"margin": 7}, {"size_bounds_ml": [None, [0, 3.5]]}, [FREE, [0, 350]]),
    "a size and a range": ({}, {"size_ml": {"2": 2}, "size_bounds_ml": {"1": [1, 4]}}, [[100, 400], [180, 220]]),
    "cropped": ({"whole_image": False}, {"size_ml": {"1": 3.0, "2": 0}}, [[-INF, 330], [-INF, 0]]),
    "cropped ranges": ({"whole_image": False}, {"size_bounds_ml": {"1": [2, 3]}}, [[-INF, 300], FREE]),
    "fully labelled": ({}, {"size_ml": {"1": 3.0}, "fully_labelled": True}, [FREE, FREE]),
    "fully labelled without sizes": ({}, {"fully_labelled": 1}, [FREE, FREE]),
    "neither key": ({"allow_missing_keys": True}, {}, [FREE, FREE]),
}


@pytest.mark.parametrize(("options", "entries", "expected"), ITEMS.values(), ids=ITEMS)
def test_bounds_of_known_sizes(options, entries, expected):
    item = sized(**entries)
    before = set(item)
    out = ItemToBoundsd(num_classes=3, **options)(item)
    assert set(item) == before
    assert set(out) == (before - {"size_ml", "size_bounds_ml"}) | {"bounds"}
    assert out["bounds"].dtype == torch.float32
    torch.testing.assert_close(out["bounds"], torch.tensor([FREE, *expected])[:, None].float())


def test_known_sizes_agree_with_the_label(rng):
    """The size of a label in ml gives the bounds that the label gives, oblique axes or not, and collates."""
    label = rng.integers(0, 3, (8, 7, 6))
    turn = torch.tensor([[0.6, -0.8, 0, 1], [0.8, 0.6, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]], dtype=torch.float64)
    affine = turn @ torch.diag(torch.tensor([0.9, 1.3, 2.5, 1.0], dtype=torch.float64))
    sizes = {str(cls): float((label == cls).sum() * 0.9 * 1.3 * 2.5 / 1000) for cls in (1, 2)}
    item = {"label": MetaTensor(torch.from_numpy(label)[None], affine=affine), "size_ml": sizes}
    for units in ("voxel", "mm"):
        transform = ItemToBoundsd(num_classes=3, units=units, image_key="label")
        known = transform(item)
        torch.testing.assert_close(known["bounds"], LabelToBoundsd(num_classes=3, units=units)(item)["bounds"])
        other = transform({**item, "size_ml": {"2": 1.0}})
        assert list_data_collate([known, other])["bounds"].shape == (2, 3, 1, 2)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"size_ml": {"3": 1}}, r"^c\.nii: size_ml: expected the class numbers 1 to 2, got \['3'\]"),
        ({"size_ml": {"0": 1}}, r"size_ml: expected the class numbers 1 to 2, got \['0'\]"),
        ({"size_ml": {"1": -1}}, r"^c\.nii: size_ml of class 1 in ml: expected a finite number >= 0, got -1"),
        ({"size_ml": {"1": "3"}}, "size_ml of class 1 in ml: expected a finite number >= 0, got '3'"),
        ({"size_ml": {"1": float("nan")}}, "size_ml of class 1 in ml: expected a finite number >= 0, got nan"),
        ({"size_ml": [1.0]}, r"size_ml: expected a mapping from class .* one value per foreground class \(2\), got"),
        ({"size_ml": 3.0}, r"size_ml: expected a mapping from class number to value, or a list"),
        (
            {"size_bounds_ml": {"1": [3, 2]}},
            "size_bounds_ml of class 1 in ml: expected a finite number >= 3, got 2",
        ),
        ({"size_bounds_ml": {"1": 3}}, r"size_bounds_ml of class 1 in ml: expected \[smallest, largest\], got 3"),
        ({"size_ml": {"1": 2}, "size_bounds_ml": {"1": [1, 3]}}, "a size or a range for class 1, got both; remove one"),
    ],
)
def test_entries_that_are_wrong(entries, words):
    with pytest.raises(ValueError, match=words):
        ItemToBoundsd(num_classes=3)(sized(**entries))


def test_images_without_a_voxel_volume():
    for units in ("voxel", "mm"):
        transform = ItemToBoundsd(num_classes=2, units=units)
        with pytest.raises(ValueError, match=r"image: expected a MetaTensor, whose affine tells the mill.* got Tensor"):
            transform({"image": torch.zeros(1, 4, 4, 4), "size_ml": [1.0]})
        with pytest.raises(ValueError, match=r"c\.nii: expected a 3D image \(C, \*S\) for sizes in ml, got shape \(1"):
            transform(sized(shape=(1, 4, 4), spacing=(1.0, 1.0), size_ml=[1.0]))
    with pytest.raises(KeyError, match=r"size_ml: expected sizes in ml under this key or 'size_bounds_ml', got \['im"):
        transform(sized())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keys": ["a", "b"]}, "keys: expected one key"),
        ({"num_classes": 1}, "num_classes: expected an integer >= 2"),
        ({"margin": -1}, "margin: expected a finite number >= 0"),
        ({"units": "ml"}, "units: expected one of voxel, mm"),
    ],
)
def test_item_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        ItemToBoundsd(**{"num_classes": 3, **options})
