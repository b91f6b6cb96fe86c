"""A cohort of either kind: its list, its bytes, and what happens to what is there already."""

import json

import nibabel as nib
import pytest
from monai.data import load_decathlon_datalist

from medconstraints.synthetic import make_cohort, make_discs

KINDS = {
    "phantoms": (make_cohort, {"shape": (16, 16, 16)}, "phantom_{:03d}.nii.gz", {"filling": 0.9}),
    "discs": (make_discs, {"size": 32}, "disc_{:04d}.nii", {"target": 0}),
}


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=KINDS)
def kind(request):
    """Function, small size, file name, an option out of its range."""
    return KINDS[request.param]


def test_list_and_files(kind, tmp_path):
    make, small, name, _ = kind
    path = make(tmp_path / "new", num_training=3, num_validation=2, num_test=1, seed=3, **small)
    content = json.loads(path.read_text())
    assert {"name", "description", "labels", "licence", "training", "validation", "test"} <= set(content)
    assert set(content["labels"]) == {"0", "1"} and content["parameters"]["seed"] == 3
    for section, numbers in {"training": range(3), "validation": range(3, 5), "test": [5]}.items():
        assert [case["image"] for case in content[section]] == [f"imagesTr/{name.format(i)}" for i in numbers]
        for case in load_decathlon_datalist(str(path), True, section):
            assert nib.load(case["image"]).shape == nib.load(case["label"]).shape
    written = files(tmp_path / "new")
    assert len(written) == 13
    assert all(data[4:8] == bytes(4) for file, data in written.items() if file.endswith(".gz")), "no time in the header"


def test_cases_depend_on_seed_and_number_but_not_on_the_counts(kind, tmp_path):
    make, small, name, _ = kind
    for folder, training, seed in (("many", 5, 3), ("few", 2, 3), ("other", 2, 4)):
        make(tmp_path / folder, num_training=training, num_validation=0, num_test=1, seed=seed, **small)
    many, few, other = (files(tmp_path / folder) for folder in ("many", "few", "other"))
    volumes = [file for file in few if ".nii" in file]
    assert len(volumes) == 6 and all(few[file] == many[file] != other[file] for file in volumes)
    assert few[f"imagesTr/{name.format(0)}"] != few[f"imagesTr/{name.format(2)}"]


def test_existing_cohort_is_refused_or_replaced(kind, tmp_path, monkeypatch):
    make, small, name, wrong = kind
    counts = {"num_validation": 0, "num_test": 0, **small}
    make(tmp_path, num_training=2, **counts)
    (tmp_path / "notes.txt").write_text("mine")
    before = files(tmp_path)
    with pytest.raises(FileExistsError, match=r"output_dir: .* holds a datalist\.json; .*overwrite"):
        make(tmp_path, num_training=1, **counts)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make(tmp_path, num_training=1, overwrite=True, **wrong, **counts)
    assert files(tmp_path) == before, "a refused call changes nothing"
    make(tmp_path, num_training=1, seed=1, overwrite=True, **counts)
    after = files(tmp_path)
    first = name.format(0)
    assert set(after) == {"datalist.json", "notes.txt", f"imagesTr/{first}", f"labelsTr/{first}"}
    assert after[f"imagesTr/{first}"] != before[f"imagesTr/{first}"]

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr("pathlib.Path.write_bytes", full_disk)
    with pytest.raises(OSError, match="no space left"):
        make(tmp_path, num_training=2, overwrite=True, **counts)
    assert not (tmp_path / "datalist.json").exists(), "no list of an interrupted replacement"


def test_wrong_counts(kind, tmp_path):
    make, small, _, _ = kind
    for name, least in {"num_training": 1, "num_validation": 0, "num_test": 0, "seed": 0}.items():
        with pytest.raises(ValueError, match=f"{name}: expected an integer >= {least}, got {least - 1}"):
            make(tmp_path / "new", **{name: least - 1}, **small)
    assert not (tmp_path / "new").exists()
