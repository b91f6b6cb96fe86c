"""Common bounds: sizes by hand and slice by slice, the file, the command."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from medconstraints.transforms.bounds import LabelToBoundsd
from medconstraints.transforms.common_bounds import fit_common_bounds, load_common_bounds, save_common_bounds


def staircase(counts, num=1, shape=(6, 6)):
    """A volume whose slices across the last axis have `counts` voxels of class `num`."""
    label = np.zeros((*shape, len(counts)), dtype=np.uint8)
    for number, count in enumerate(counts):
        label[..., number] = num * (np.arange(np.prod(shape)).reshape(shape) < count)
    return label


TABLE = {
    "slices": ([staircase([0, 4, 20, 10, 0])], {"slice_axis": 2}, [[3.6, 22]]),
    "two cases": ([staircase([4, 20]), staircase([30, 0])], {"slice_axis": 2}, [[3.6, 33]]),
    "factors": ([staircase([4, 20])], {"slice_axis": 2, "factors": (0.5, 2)}, [[2, 40]]),
    "2D labels are slices": ([staircase([4])[..., 0], staircase([9])[..., 0]], {}, [[3.6, 9.9]]),
    "a channel axis": ([staircase([4, 20])[None]], {"slice_axis": 2}, [[3.6, 22]]),
}


@pytest.mark.parametrize(("labels", "options", "expected"), TABLE.values(), ids=TABLE)
def test_sizes_by_hand(labels, options, expected):
    assert fit_common_bounds(labels, num_classes=2, **options) == pytest.approx(np.array(expected))


@pytest.mark.parametrize("slice_axis", [0, 2])
def test_random_labels_slice_by_slice(slice_axis, rng):
    labels = [rng.integers(0, 4, (5, 6, 7)) * (rng.random((5, 6, 7)) < 0.1) for _ in range(3)]
    expected = []
    for cls in (1, 2, 3):
        counts = [int((part == cls).sum()) for label in labels for part in np.moveaxis(label, slice_axis, 0)]
        counts = [count for count in counts if count]
        expected.append([0.9 * min(counts), 1.1 * max(counts)])
    bounds = fit_common_bounds([torch.from_numpy(label) for label in labels], num_classes=4, slice_axis=slice_axis)
    np.testing.assert_allclose(bounds, expected)
    flipped = fit_common_bounds([np.flip(label, 1) for label in labels], num_classes=4, slice_axis=slice_axis)
    assert flipped == bounds
    assert fit_common_bounds(labels, num_classes=4, slice_axis=slice_axis, classes=[3, 1]) == [bounds[2], bounds[0]]


@pytest.mark.parametrize(
    ("labels", "options", "words"),
    [
        ([staircase([4])], {"num_classes": 3}, "labels: class 2 is in none of the 1 label maps; add a case that has"),
        ([staircase([4], 3)], {}, "labels: expected class numbers 0 to 1 on every voxel, got 3; correct num_classes"),
        ([staircase([4])], {"slice_axis": 3}, "slice_axis: expected None, or the axis 0, 1 or 2 .* got 3"),
        ([staircase([4])], {"factors": (1.1, 0.9)}, r"factors: expected 0 <= lower <= upper, got \(1\.1, 0\.9\)"),
        ([staircase([4])], {"classes": [0]}, r"classes: expected different class numbers 1 to 1, got \[0\]"),
        ([staircase([4])], {"classes": []}, "classes: expected different class numbers"),
    ],
)
def test_refusals(labels, options, words):
    with pytest.raises(ValueError, match=words):
        fit_common_bounds(labels, **{"num_classes": 2, **options})


REAL = {
    "hippocampus": ("hippocampus/labelsTr/hippocampus_003.nii.gz", 3),
    "heart": ("acdc/patient001/patient001_frame01_gt.nii.gz", 4),
}


@pytest.mark.parametrize(("name", "num_classes"), REAL.values(), ids=REAL)
def test_bounds_of_a_real_case_hold_in_its_slices(data_root, name, num_classes):
    path = data_root / name
    if not path.exists():
        pytest.skip(f"no {name}")
    label = np.asarray(nib.load(path).dataobj).round()
    bounds = fit_common_bounds([label], num_classes=num_classes, slice_axis=2, factors=(1, 1))
    transform = LabelToBoundsd(num_classes=num_classes, level=bounds)
    tight = np.zeros((num_classes, 2), dtype=bool)
    for number in range(label.shape[2]):
        found = transform({"label": torch.from_numpy(label[None, :, :, number])})["bounds"][:, 0].numpy()
        sizes = np.array([(label[..., number] == cls).sum() for cls in range(num_classes)])
        assert (found[:, 0] <= sizes).all() and (sizes <= found[:, 1]).all()
        tight |= (found == sizes[:, None]) & (sizes > 0)[:, None]
    assert tight[1:].all()  # the smallest and the largest slice set them


# The file


def test_saved_bounds_are_loaded(tmp_path):
    path = tmp_path / "new" / "common.json"
    save_common_bounds(path, [[3.6, 22], [1, 2]], cases=["a.nii.gz"], factors=(0.5, 2))
    assert json.loads(path.read_text()) == {
        "bounds": [[3.6, 22.0], [1.0, 2.0]],
        "unit": "voxel",
        "cases": ["a.nii.gz"],
        "factors": [0.5, 2],
    }
    assert load_common_bounds(path) == load_common_bounds(str(path)) == [[3.6, 22.0], [1.0, 2.0]]


def test_an_existing_file_is_kept(tmp_path):
    path = tmp_path / "common.json"
    save_common_bounds(path, [[1, 2]], cases=["a"])
    with pytest.raises(FileExistsError, match=r"output: .*common\.json exists; choose another name, or allow overwrit"):
        save_common_bounds(path, [[3, 4]], cases=["a"])
    assert load_common_bounds(path) == [[1, 2]]
    save_common_bounds(path, [[3, 4]], cases=["a"], overwrite=True)
    assert load_common_bounds(path) == [[3, 4]]


@pytest.mark.parametrize("bounds", [[[2, 1]], [[-1, 1]], [1, 2], [], [[1, float("nan")]]])
def test_what_is_no_bounds_is_not_saved(tmp_path, bounds):
    with pytest.raises(ValueError, match=r"bounds: expected one \[lower, upper\] per class, 0 <= lower <= upper, got"):
        save_common_bounds(tmp_path / "common.json", bounds, cases=[])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", r"common_bounds: common\.json is not valid JSON"),
        ("[[1, 2]]", r"common_bounds: expected .bounds. and .unit.: .voxel. in common\.json; write it with"),
        ('{"bounds": [[1, 2]], "unit": "mm"}', 'expected "bounds" and "unit": "voxel" in common.json'),
        ('{"bounds": [[2, 1]], "unit": "voxel"}', r"common_bounds: common\.json: expected one \[lower, upper\] per cl"),
    ],
)
def test_files_that_are_wrong(tmp_path, text, words):
    path = tmp_path / "common.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        load_common_bounds(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"common_bounds: no file .*absent\.json; write it with python -m"):
        load_common_bounds(tmp_path / "absent.json")
