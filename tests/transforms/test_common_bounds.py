"""Common bounds: sizes by hand and slice by slice, the file, the command."""

import json
import re
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch

from medconstraints.transforms.bounds import LabelToBoundsd
from medconstraints.transforms.common_bounds import fit_common_bounds, load_common_bounds, main, save_common_bounds


def staircase(counts, num=1, shape=(6, 6)):
    """A volume whose slices across the last axis have `counts` voxels of class `num`."""
    label = np.zeros((*shape, len(counts)), dtype=np.uint8)
    for number, count in enumerate(counts):
        label[..., number] = num * (np.arange(np.prod(shape)).reshape(shape) < count)
    return label


TABLE = {
    "slices": ([staircase([0, 4, 20, 10, 0])], {"slice_axis": 2}, [[3.6, 22]]),
    "volume": ([staircase([0, 4, 20, 10, 0])], {}, [[30.6, 37.4]]),
    "two cases": ([staircase([4, 20]), staircase([30, 0])], {"slice_axis": 2}, [[3.6, 33]]),
    "two volumes, one empty": ([staircase([4, 20]), staircase([0, 0])], {}, [[21.6, 26.4]]),
    "factors": ([staircase([4, 20])], {"slice_axis": 2, "factors": (0.5, 2)}, [[2, 40]]),
    "exact": ([staircase([4, 20])], {"slice_axis": 2, "factors": (1, 1)}, [[4, 20]]),
    "one voxel": ([staircase([1])], {"slice_axis": 2}, [[0.9, 1.1]]),
    "whole image": ([staircase([36])], {"slice_axis": 2}, [[32.4, 39.6]]),
    "2D labels are slices": ([staircase([4])[..., 0], staircase([9])[..., 0]], {}, [[3.6, 9.9]]),
    "a channel axis": ([staircase([4, 20])[None]], {"slice_axis": 2}, [[3.6, 22]]),
}


@pytest.mark.parametrize(("labels", "options", "expected"), TABLE.values(), ids=TABLE)
def test_sizes_by_hand(labels, options, expected):
    assert fit_common_bounds(labels, num_classes=2, **options) == pytest.approx(np.array(expected))


@pytest.mark.parametrize("slice_axis", [0, 1, 2])
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
        ([staircase([4], 3)], {}, r"labels: expected class numbers 0 to 1, got values such as \[0, 3\]; set num_clas"),
        ([staircase([4]) * -1.0], {}, "labels: expected class numbers 0 to 1"),
        ([staircase([4])], {"slice_axis": 3}, r"slice_axis: expected None or an axis 0\.\.2, got 3"),
        ([staircase([4])], {"factors": (1.1, 0.9)}, r"factors: expected 0 <= lower <= upper, got \(1\.1, 0\.9\)"),
        ([staircase([4])], {"factors": (-1, 1)}, "factors: expected 0 <= lower <= upper"),
        ([staircase([4])], {"classes": [0]}, r"classes: expected different class numbers 1 to 1, got \[0\]"),
        ([staircase([4])], {"classes": [1, 1]}, "classes: expected different class numbers"),
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


@pytest.mark.parametrize("bounds", [[[2, 1]], [[-1, 1]], [[1]], [1, 2], [], [[1, float("nan")]], [[1, float("inf")]]])
def test_what_is_no_bounds_is_not_saved(tmp_path, bounds):
    with pytest.raises(ValueError, match=r"bounds: expected one \[lower, upper\] per class, 0 <= lower <= upper, got"):
        save_common_bounds(tmp_path / "common.json", bounds, cases=[])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", r"common_bounds: common\.json is not valid JSON"),
        ("[[1, 2]]", r"common_bounds: expected common\.json to hold an object with .bounds. and .unit.: .voxel."),
        ('{"bounds": [[1, 2]]}', 'an object with "bounds" and "unit": "voxel"; write it with python -m medconstraints'),
        ('{"bounds": [[1, 2]], "unit": "mm"}', 'expected common.json to hold an object with "bounds" and "unit"'),
        ('{"bounds": [[2, 1]], "unit": "voxel"}', r"common_bounds: common\.json: expected one \[lower, upper\] per cl"),
        ('{"bounds": "ab", "unit": "voxel"}', r"common_bounds: common\.json: expected one \[lower, upper\] per class"),
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


# The command


@pytest.fixture
def datalist(tmp_path):
    """Three entries, of which the last two have a label: class 1 of 4, 20 and 10 voxels, class 2 of 2 in each slice."""
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    label = staircase([4, 20, 10])
    label[5, :2] = 2
    image = np.random.default_rng(0).random(label.shape).astype(np.float32)
    nib.save(nib.Nifti1Image(image, affine), tmp_path / "image.nii.gz")
    pairs = []
    for name, array in (("first", label), ("second", np.flip(label * (label != 1), 0))):
        nib.save(nib.Nifti1Image(np.ascontiguousarray(array), affine), tmp_path / f"{name}.nii.gz")
        pairs.append({"image": "image.nii.gz", "label": f"{name}.nii.gz"})
    path = tmp_path / "datalist.json"
    path.write_text(json.dumps({"training": [{"image": "image.nii.gz"}, *pairs], "test": ["image.nii.gz"]}))
    return path


def command(datalist, *more):
    output = datalist.parent / "common.json"
    return main(["--datalist", str(datalist), "--num-classes", "3", "--output", str(output), *more])


@pytest.mark.parametrize(
    ("more", "bounds", "cases"),
    [
        (["--slice-axis", "2"], [[3.6, 22], [1.8, 2.2]], ["first"]),
        (["--slice-axis", "2", "--cases", "2", "--factors", "1", "1"], [[4, 20], [2, 2]], ["first", "second"]),
        ([], [[30.6, 37.4], [5.4, 6.6]], ["first"]),
        (["--classes", "2"], [[5.4, 6.6]], ["first"]),
        (["--spacing-mm", "-1", "-1", "1", "--classes", "2", "--factors", "1", "1"], [[10, 10]], ["first"]),
    ],
)
def test_command_writes_and_prints_the_bounds(datalist, capsys, more, bounds, cases):
    assert command(datalist, *more) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(np.array(bounds))
    content = json.loads((datalist.parent / "common.json").read_text())
    np.testing.assert_allclose(content["bounds"], bounds)
    assert content["cases"] == [f"{case}.nii.gz" for case in cases]
    assert content["factors"] == ([1, 1] if "--factors" in more else [0.9, 1.1])


def test_command_reads_2d_images(tmp_path):
    array = staircase([7])[..., 0]
    nib.save(nib.Nifti1Image(array + np.arange(6, dtype=np.float32), np.eye(4)), tmp_path / "image.nii.gz")
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "label.nii.gz")
    path = tmp_path / "datalist.json"
    path.write_text(json.dumps({"training": [{"image": "image.nii.gz", "label": "label.nii.gz"}]}))
    assert command(path, "--num-classes", "2", "--spatial-dims", "2", "--factors", "1", "1") == 0
    assert load_common_bounds(tmp_path / "common.json") == [[7, 7]]


def test_command_keeps_an_existing_file(datalist, capsys):
    output = datalist.parent / "common.json"
    output.write_text("mine")
    assert command(datalist) == 2
    assert re.search(
        r"--output: .*common\.json exists; choose another name or add --overwrite", capsys.readouterr().err
    )
    assert output.read_text() == "mine"
    assert command(datalist, "--overwrite") == 0
    assert len(load_common_bounds(output)) == 2


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--section", "test"], r"no entry of section 'test' in .*datalist\.json has a label; give a section"),
        (["--section", "validation"], "has no section 'validation'"),
        (["--cases", "0"], "--cases: expected at least 1, got 0"),
        (["--num-classes", "4"], "class 3 is in none of the 1 label maps"),
        (["--num-classes", "2"], r"^first\.nii\.gz: has values that are no class number 0 to 1"),
        (["--slice-axis", "3"], r"slice_axis: expected None or an axis 0\.\.2, got 3"),
        (["--datalist", "absent.json"], r"no file absent\.json"),
    ],
)
def test_command_says_what_is_wrong(datalist, capsys, more, reason):
    assert command(datalist, *more) == 2
    assert re.search(reason, capsys.readouterr().err)
    assert not (datalist.parent / "common.json").exists()


def test_runs_as_a_module_without_warnings(tmp_path):
    """The package must not import the module before `python -m` runs it."""
    line = [sys.executable, "-W", "error::RuntimeWarning", "-m", "medconstraints.transforms.common_bounds", "--help"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--slice-axis" in done.stdout
