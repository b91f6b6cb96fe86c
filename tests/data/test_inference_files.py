"""Which volumes an inference run reads and where runs write: nothing is lost, nor changed when a run cannot start."""

import json
import os

import pytest

from medconstraints.data import check_output_dir, check_run_dir, mask_path, volumes_for_inference


@pytest.fixture
def folder(tmp_path):
    """Volumes, in an order that is not that of their names, and files that are none."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name in ("b.nii.gz", "a.nii", "c.1.nii.gz", ".hidden.nii.gz", "notes.txt", "mask.nrrd", "sub/d.nii.gz"):
        (folder / name).write_bytes(b"x")
    return folder


@pytest.fixture
def datalist(folder):
    def write(content):
        path = folder / "datalist.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def tree(folder):
    return {str(p.relative_to(folder)): p.is_file() and p.read_bytes() for p in folder.rglob("*")}


def names(items):
    assert all(set(item) == {"image"} and isinstance(item["image"], str) for item in items)
    return [os.path.basename(item["image"]) for item in items]


@pytest.mark.parametrize("as_type", [str, lambda path: path])
def test_folder(folder, as_type):
    items = volumes_for_inference(as_type(folder))
    assert names(items) == ["a.nii", "b.nii.gz", "c.1.nii.gz"]
    assert items[0]["image"] == str(folder / "a.nii")


@pytest.mark.parametrize("name", ["a.nii", "b.nii.gz"])
def test_one_file(folder, name):
    assert volumes_for_inference(folder / name) == [{"image": str(folder / name)}]


@pytest.mark.parametrize(
    ("section", "expected"), [("test", ["b.nii.gz", "d.nii.gz"]), ("validation", ["a.nii"]), ("empty_name", ["x.nii"])]
)
def test_datalist(folder, datalist, section, expected):
    """Dictionaries or plain paths, in the order of the list, with other keys; a missing file is found out later."""
    path = datalist(
        {
            "name": "x",
            "test": [{"image": "b.nii.gz", "label": "l.nii.gz"}, {"image": "sub/d.nii.gz"}],
            "validation": ["./a.nii"],
            "empty_name": [{"image": "missing/x.nii"}],
        }
    )
    items = volumes_for_inference(path, section=section)
    assert names(items) == expected
    assert all(item["image"].startswith(str(folder)) for item in items)


def test_absolute_paths_in_a_datalist(folder, datalist, tmp_path):
    path = datalist({"test": [str(tmp_path / "elsewhere" / "z.nii")]})
    assert volumes_for_inference(path) == [{"image": str(tmp_path / "elsewhere" / "z.nii")}]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", r"source: expected a folder .*nowhere, which does not exist"),
        ("nowhere.nii.gz", r"source: expected .*nowhere\.nii\.gz, which does not exist"),
        ("nowhere.json", r"source: expected .*nowhere\.json, which does not exist"),
        ("in/notes.txt", r"source: expected .*notes\.txt, which is none of them"),
        ("in/mask.nrrd", r"source: expected .*mask\.nrrd, which is none of them"),
        ("void", r"source: no \.nii or \.nii\.gz file in .*void; convert DICOM"),
    ],
)
def test_no_volumes(folder, tmp_path, source, message):
    (tmp_path / "void").mkdir()
    before = tree(tmp_path)
    with pytest.raises(FileNotFoundError, match=message):
        volumes_for_inference(tmp_path / source, output_dir=tmp_path / "out")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"training": [], "n": 3}, r"datalist: datalist\.json has no section 'test', it has \['training'\]"),
        ({"test": {"image": "a.nii"}}, r"datalist: datalist\.json has no section 'test', it has \[\]"),
        ([{"image": "a.nii"}], r"datalist: datalist\.json holds a list; expected an object with sections"),
        ({"test": []}, r"datalist: section 'test' of datalist\.json is empty"),
        ('{"test": [', r"datalist: datalist\.json is not valid JSON"),
        (
            {"test": ["a.nii", {"label": "b.nii"}]},
            r"entry 1 of 'test' in datalist\.json has no image, only",
        ),
        ({"test": [None]}, r"datalist: entry 0 of 'test' in datalist\.json: expected a path under 'image'.*got None"),
        ({"test": [{"image": [1]}]}, r"entry 0 of 'test' in datalist\.json: expected a path under 'image'.*got \[1\]"),
        ({"test": [{"image": "a.nii", "boxes": []}]}, r"entry 0 .*: expected a path under 'boxes'.*got \[\]"),
        (
            {"test": [{"image": ["a.nii", "b.nrrd"]}]},
            r"source: entry 0 of datalist\.json: expected one .*got \[",
        ),
        ({"test": ["a.nii", {"image": "mask.nrrd"}]}, r"source: entry 1 of datalist\.json: expected one .*mask\.nrrd"),
    ],
)
def test_unusable_datalists(datalist, tmp_path, content, message):
    path = datalist(content)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=message):
        volumes_for_inference(path, output_dir=tmp_path / "out")
    assert tree(tmp_path) == before


def test_files_of_several_channels(folder, datalist, tmp_path):
    path = datalist({"test": [{"image": ["b.nii.gz", "a.nii"]}, {"image": ["c.1.nii.gz"]}]})
    items = volumes_for_inference(path, output_dir=tmp_path / "out")
    assert items == [
        {"image": [str(folder / "b.nii.gz"), str(folder / "a.nii")]},
        {"image": str(folder / "c.1.nii.gz")},
    ]
    (tmp_path / "out" / "b_seg.nii.gz").write_bytes(b"")  # the first file names the mask
    with pytest.raises(FileExistsError, match="b_seg"):
        volumes_for_inference(path, output_dir=tmp_path / "out")


def test_masks_of_one_name_are_refused(folder, datalist, tmp_path):
    path = datalist({"test": ["sub/b.nii", "b.nii.gz", "a.nii"]})
    with pytest.raises(ValueError, match=r"several volumes are called \['b'\], their masks would overwrite each other"):
        volumes_for_inference(path, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_makes_the_output_folder(folder, tmp_path):
    volumes_for_inference(folder, output_dir=tmp_path / "new" / "masks")
    assert tree(tmp_path / "new") == {"masks": False}


@pytest.mark.parametrize("present", [["b_seg.nii.gz"], ["c.1_seg.nii.gz", "b_seg.nii.gz"]])
def test_existing_masks_are_kept(folder, tmp_path, present):
    masks = tmp_path / "masks"
    masks.mkdir()
    for name in [*present, "d_seg.nii.gz", "b_other.nii.gz"]:
        (masks / name).write_bytes(b"work")
    before = tree(tmp_path)
    message = rf"output_dir: {len(present)} of 4 outputs exist already in .*masks, such as b_seg\.nii\.gz; choose"
    with pytest.raises(FileExistsError, match=message):
        volumes_for_inference(folder, output_dir=masks)
    assert tree(tmp_path) == before
    assert len(volumes_for_inference(folder, output_dir=masks, postfix="second")) == 3
    assert tree(tmp_path) == before
    assert len(volumes_for_inference(folder, output_dir=masks, overwrite=True)) == 3
    assert tree(tmp_path) == before  # only the new mask replaces the old one


@pytest.mark.parametrize("below", ["file", "file/masks", "file/deep/masks"])
def test_output_below_a_regular_file(tmp_path, below):
    (tmp_path / "file").write_bytes(b"work")
    with pytest.raises(PermissionError, match=r"output_dir: cannot write to .*file.*; choose another folder"):
        check_output_dir(tmp_path / below, ["a.nii.gz"])
    assert tree(tmp_path) == {"file": b"work"}


def test_output_folder_that_cannot_be_written(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    try:
        for target in (folder, folder / "below"):
            with pytest.raises(PermissionError, match=r"output_dir: cannot write to .*locked.*Permission denied"):
                check_output_dir(target, ["a.nii.gz"])
        assert not list(folder.iterdir())
    finally:
        folder.chmod(0o700)


def test_check_output_dir(tmp_path):
    """Returns the folder, leaves nothing in it, and does not mind files of other names."""
    assert check_output_dir(str(tmp_path / "a" / "b"), []) == tmp_path / "a" / "b"
    (tmp_path / "a" / "b" / "other").write_bytes(b"work")
    check_output_dir(tmp_path / "a" / "b", ["one", "two"])
    assert tree(tmp_path) == {"a": False, "a/b": False, "a/b/other": b"work"}


@pytest.mark.parametrize(("names", "first"), [(["x", "y"], "x"), (["y", "x"], "y"), (["z", "y"], "y")])
def test_message_names_the_first_file(tmp_path, names, first):
    for name in ("x", "y"):
        (tmp_path / name).write_bytes(b"work")
    with pytest.raises(FileExistsError, match=f"such as {first};"):
        check_output_dir(tmp_path, names)
    kept = {"x": b"work", "y": b"work"}
    assert tree(tmp_path) == kept
    assert check_output_dir(tmp_path, names, overwrite=True) == tmp_path
    assert tree(tmp_path) == kept


def test_any_file_counts_without_names(tmp_path):
    check_output_dir(tmp_path)
    (tmp_path / "x.csv").write_bytes(b"work")
    with pytest.raises(FileExistsError, match=r"1 of 1 outputs exist already in .*, such as x\.csv; .*overwrite"):
        check_output_dir(tmp_path)
    assert check_output_dir(tmp_path, overwrite=True) == tmp_path
    assert tree(tmp_path) == {"x.csv": b"work"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("spelling", ["in", "in/../in", "in/sub/.."])
def test_masks_among_the_volumes_are_refused(folder, tmp_path, overwrite, spelling):
    """The next run would segment the masks."""
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"output_dir: .* is the folder of the volumes, .*; choose another folder"):
        volumes_for_inference(folder, output_dir=tmp_path / spelling, overwrite=overwrite)
    assert tree(tmp_path) == before


def test_a_link_to_the_folder_of_the_volumes_is_that_folder(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ValueError, match="is the folder of the volumes"):
        volumes_for_inference(folder, output_dir=tmp_path / "link")


def test_a_mask_must_not_replace_a_volume(folder, datalist):
    (folder / "b_seg.nii.gz").write_bytes(b"a volume")
    path = datalist({"test": ["b.nii.gz", "b_seg.nii.gz"]})
    before = tree(folder)
    message = r"output_dir: the mask b_seg\.nii\.gz would replace a volume of that name in .*; choose another folder"
    with pytest.raises(ValueError, match=message):
        volumes_for_inference(path, output_dir=folder, overwrite=True)
    assert tree(folder) == before
    assert len(volumes_for_inference(path, output_dir=folder, postfix="organ")) == 2


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("a.nii", "a_seg.nii.gz"),
        ("x/c.1.nii.gz", "c.1_seg.nii.gz"),
        ("a.gz.nii", "a.gz_seg.nii.gz"),
        ("v", "v_seg.nii.gz"),
    ],
)
def test_mask_path(tmp_path, image, expected):
    assert mask_path(tmp_path, image) == tmp_path / expected


def test_run_folder_with_foreign_weights(tmp_path):
    assert check_run_dir(tmp_path / "new" / "run") == tmp_path / "new" / "run"
    assert tree(tmp_path) == {"new": False, "new/run": False}
    (tmp_path / "model.pt").write_bytes(b"work")
    with pytest.raises(FileExistsError, match=r"has a model\.pt but no last\.pt .*; choose another output_dir"):
        check_run_dir(tmp_path)
    (tmp_path / "last.pt").write_bytes(b"state")
    assert check_run_dir(tmp_path) == tmp_path
