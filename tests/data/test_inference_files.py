"""Which volumes an inference run reads and where runs write: nothing is lost, nor changed when a run cannot start."""

import json
import os
import subprocess
import sys

import pytest

from medconstraints.data import check_output_dir, check_run_dir, mask_path, volumes_for_inference
from medconstraints.volumes.facts import facts_path


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
    """Of the volumes; the other files have a reason."""
    return [item["name"] for item in items if "left_out" not in item]


def test_folder_and_file(folder):
    items = volumes_for_inference(str(folder))
    assert names(items) == ["a.nii", "b.nii.gz", "c.1.nii.gz", "mask.nrrd", "sub/d.nii.gz"]
    assert items[0] == {"image": str(folder / "a.nii"), "name": "a.nii", "mask": "a_seg.nii.gz"}
    assert [item["mask"] for item in items if "mask" in item][3:] == ["mask_seg.nrrd", "sub/d_seg.nii.gz"]
    assert {item["name"]: item["left_out"] for item in items if "left_out" in item} == {
        "notes.txt": "is no NIfTI, NRRD, MetaImage or DICOM file by its name",
        ".hidden.nii.gz": "is a hidden file",
    }
    for name in ("a.nii", "b.nii.gz"):
        [item] = volumes_for_inference(folder / name, postfix="")
        assert item == {"image": str(folder / name), "name": name, "mask": f"{name[0]}.nii.gz"}


def test_every_kind_of_file_is_a_volume_or_has_its_reason(tmp_path):
    files = {
        "CAPS.NII.GZ": "",
        "a.img": "",
        "a.hdr": "is the header of the .img file",
        "b.hdr": "",
        "c.mhd": "",
        "c.raw": "holds the voxels of the header beside it",
        "d.raw": "is no NIfTI, NRRD, MetaImage or DICOM file by its name",
        "e.zip": "is an archive, which is not opened; unpack it",
        "f.pkl": "may run code when it is opened; save it as NIfTI",
        "loop.nii": "",
        "series/1.dcm": "lies in the series",
        "series/README": "lies in the folder of a DICOM series",
        "series/beside.nii": "",
        "numbers/1.2.840": "lies in the series",
    }
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" if "840" not in name else bytes(128) + b"DICM")
    (tmp_path / "loop.nii").unlink()
    (tmp_path / "loop.nii").symlink_to("loop.nii")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "series")
    found = {item["name"]: item.get("left_out", "") for item in volumes_for_inference(tmp_path)}
    expected = {name: reason for name, reason in files.items() if reason != "lies in the series"}
    link = {"elsewhere": "is a link to a folder, which is not followed"}
    assert found == {**expected, **link, "series": "", "numbers": ""}


def test_volumes_that_would_have_one_mask_fail_and_the_others_do_not(folder, tmp_path):
    (folder / "a.nii.gz").write_bytes(b"x")
    (folder / f"{'n' * 248}.nii").write_bytes(b"x")
    items = volumes_for_inference(folder, output_dir=tmp_path / "out")
    refused = {item["name"]: item["refused"] for item in items if "refused" in item}
    reason = "a.nii and a.nii.gz would have one file, a_seg.nii.gz; rename one of them"
    assert refused.pop("a.nii") == refused.pop("a.nii.gz") == reason
    assert list(refused.values()) == ["the names of its results are longer than 255 bytes; give it a shorter one"]


def test_volumes_that_get_no_segmentation_are_told(folder, tmp_path, caplog):
    (folder / "z.dcm").write_bytes(b"x")
    volumes_for_inference(folder, output_dir=tmp_path / "out", dicom_seg=True)
    assert "dicom_seg: " in caplog.text and ", are no DICOM" in caplog.text and "z.dcm" not in caplog.text


def test_the_probabilities_of_one_volume_are_not_the_mask_of_another(folder):
    (folder / "b_probabilities.nii").write_bytes(b"x")
    items = volumes_for_inference(folder, output_dir=folder / "out", postfix="", probabilities=True)
    refused = {item["name"]: item["refused"] for item in items if "refused" in item}
    reason = "b.nii.gz and b_probabilities.nii would have one file, b_probabilities.nii.gz; rename one of them"
    assert refused == {"b.nii.gz": reason, "b_probabilities.nii": reason}


def test_masks_below_the_volumes_are_no_volumes(folder):
    (folder / "masks").mkdir()
    (folder / "masks" / "a_seg.nii.gz").write_bytes(b"x")
    assert "masks/a_seg.nii.gz" in names(volumes_for_inference(folder))
    items = volumes_for_inference(folder, output_dir=folder / "masks", overwrite=True)
    assert names(items) == ["a.nii", "b.nii.gz", "c.1.nii.gz", "mask.nrrd", "sub/d.nii.gz"]


def test_what_is_kept_is_whole_and_made_alike(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("b_seg.nii.gz", "a_seg.nii.gz"):
        (out / name).write_bytes(b"work")
    facts_path(out / "b_seg.nii.gz").write_text('{"made_by": "one"}')
    items = volumes_for_inference(folder, output_dir=out, resume=True, made_by="one")
    assert [item["name"] for item in items if "kept" in item] == ["b.nii.gz"]  # a.nii was cut off before its facts
    with pytest.raises(FileExistsError, match=r"1 of 1 masks .* such as b_seg\.nii\.gz, were made with other"):
        volumes_for_inference(folder, output_dir=out, resume=True, made_by="another")


def test_a_file_that_may_not_be_read_stops_nothing(folder, monkeypatch):
    (folder / "IM0001").write_bytes(b"x")

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("medconstraints.volumes.files.is_dicom", denied)
    monkeypatch.setattr("medconstraints.volumes.files.os.access", lambda path, mode: "IM0001" not in str(path))
    items = {item["name"]: item.get("left_out", "") for item in volumes_for_inference(folder)}
    assert items["IM0001"] == "may not be read" and items["a.nii"] == ""


def test_a_missing_folder_of_slices_is_one_failure_of_a_list(folder, datalist):
    items = volumes_for_inference(datalist({"test": ["a.nii", "gone/series"]}))
    assert [item["name"] for item in items] == ["a.nii", "series"]


def test_a_mask_must_not_replace_what_a_link_points_to(folder, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "b.nii.gz").symlink_to(folder / "b.nii.gz")
    for options in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(ValueError, match=r"the file b\.nii\.gz would replace a volume"):
            volumes_for_inference(tmp_path / "links", output_dir=folder, postfix="", **options)


def test_output_above_the_volumes_and_a_source_that_is_a_link(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    expected = ["a.nii", "b.nii.gz", "c.1.nii.gz", "mask.nrrd", "sub/d.nii.gz"]
    assert names(volumes_for_inference(folder, output_dir=tmp_path)) == expected
    for _ in range(2):  # the second time with the results of the first
        items = volumes_for_inference(tmp_path / "link", output_dir=tmp_path / "link" / "out", overwrite=True)
        assert names(items) == expected
        (folder / "out" / "a_seg.nii.gz").write_bytes(b"x")


@pytest.mark.parametrize("name", ["volumes.csv", "index.html", "settings.json", "a_seg.nii.gz.json"])
def test_no_report_replaces_a_file_unasked(folder, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"work")
    with pytest.raises(FileExistsError, match=f"such as {name}"):
        volumes_for_inference(folder, output_dir=tmp_path / "out")


def test_probabilities_are_not_replaced_unasked(folder, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    (masks / "a_seg_probabilities.nii.gz").write_bytes(b"work")
    assert volumes_for_inference(folder, output_dir=masks)
    with pytest.raises(FileExistsError, match=r"such as a_seg_probabilities\.nii\.gz"):
        volumes_for_inference(folder, output_dir=masks, probabilities=True)


def test_facts_of_two_formats_of_one_name_are_two(folder, tmp_path):
    (folder / "a.nrrd").write_bytes(b"x")
    items = volumes_for_inference(folder, output_dir=tmp_path / "out")
    masks = {item["name"]: item["mask"] for item in items if "mask" in item and "refused" not in item}
    assert (masks["a.nii"], masks["a.nrrd"]) == ("a_seg.nii.gz", "a_seg.nrrd")
    assert facts_path(tmp_path / masks["a.nii"]) != facts_path(tmp_path / masks["a.nrrd"])


def test_going_on_keeps_what_is_there(folder, tmp_path):
    (tmp_path / "out" / "sub").mkdir(parents=True)
    for name in ("b_seg.nii.gz", "sub/d_seg.nii.gz", "inference.json"):
        (tmp_path / "out" / name).write_bytes(b"work")
        facts_path(tmp_path / "out" / name).write_text("{}")
    items = volumes_for_inference(folder, output_dir=tmp_path / "out", resume=True)
    assert [item["name"] for item in items if "kept" in item] == ["b.nii.gz", "sub/d.nii.gz"]
    with pytest.raises(ValueError, match="overwrite, resume: expected one of them at most"):
        volumes_for_inference(folder, output_dir=tmp_path / "out", resume=True, overwrite=True)


def test_datalist(folder, datalist, tmp_path):
    """Dictionaries or plain paths, in the order of the list, with other keys; a missing file is found out later."""
    path = datalist(
        {
            "name": "x",
            "test": [{"image": "b.nii.gz", "label": "l.nii.gz"}, {"image": "sub/d.nii.gz"}],
            "validation": ["./a.nii"],
            "empty_name": [{"image": "missing/x.nii"}],
            "absolute": [str(tmp_path / "elsewhere" / "z.nii")],
            "same": ["sub/b.nii", "b.nii.gz", "a.nii"],
        }
    )
    expected = {"test": ["b.nii.gz", "d.nii.gz"], "validation": ["a.nii"], "empty_name": ["x.nii"]}
    expected["same"] = ["sub/b.nii", "b.nii.gz", "a.nii"]  # same names in different folders keep these
    for section, found in expected.items():
        items = volumes_for_inference(path, section=section)
        assert names(items) == found
        assert all(item["image"].startswith(str(folder)) for item in items)
    items = volumes_for_inference(path, section="absolute")
    assert items == [{"image": str(tmp_path / "elsewhere" / "z.nii"), "name": "z.nii", "mask": "z_seg.nii.gz"}]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", r"source: expected a folder, .*nowhere, which does not exist"),
        ("in/notes.txt", r"source: expected .*notes\.txt, which is none of them"),
        ("void", r"source: no volume in .*void; it holds 0 other files"),
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
        ([{"image": "a.nii"}], r"datalist: datalist\.json holds a list; expected an object with sections"),
        ({"test": []}, r"datalist: section 'test' of datalist\.json is empty"),
        ('{"test": [', r"datalist: datalist\.json is not valid JSON"),
        (
            {"test": ["a.nii", {"label": "b.nii"}]},
            r"entry 1 of 'test' in datalist\.json has no image, only",
        ),
        ({"test": [{"image": [1]}]}, r"entry 0 of 'test' in datalist\.json: expected a path under 'image'.*got \[1\]"),
        ({"test": [{"image": "a.nii", "boxes": []}]}, r"entry 0 .*: expected a path under 'boxes'.*got \[\]"),
        (
            {"test": [{"image": ["a.nii", "b.png"]}]},
            r"source: entry 0 of datalist\.json: expected one .*got \[",
        ),
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
    assert [item["image"] for item in items] == [
        [str(folder / "b.nii.gz"), str(folder / "a.nii")],
        str(folder / "c.1.nii.gz"),
    ]
    (tmp_path / "out" / "b_seg.nii.gz").write_bytes(b"")  # the first file names the mask
    with pytest.raises(FileExistsError, match="b_seg"):
        volumes_for_inference(path, output_dir=tmp_path / "out")


def test_makes_the_output_folder(folder, tmp_path):
    volumes_for_inference(folder, output_dir=tmp_path / "new" / "masks")
    assert tree(tmp_path / "new") == {"masks": False}


def test_existing_masks_are_kept(folder, tmp_path):
    present = ["c.1_seg.nii.gz", "b_seg.nii.gz"]
    masks = tmp_path / "masks"
    masks.mkdir()
    for name in [*present, "d_seg.nii.gz", "b_other.nii.gz"]:
        (masks / name).write_bytes(b"work")
    before = tree(tmp_path)
    message = rf"output_dir: {len(present)} of 15 outputs exist already in .*masks, such as b_seg\.nii\.gz; choose"
    with pytest.raises(FileExistsError, match=message):
        volumes_for_inference(folder, output_dir=masks)
    assert tree(tmp_path) == before
    assert len(names(volumes_for_inference(folder, output_dir=masks, postfix="second"))) == 5
    assert tree(tmp_path) == before
    assert len(names(volumes_for_inference(folder, output_dir=masks, overwrite=True))) == 5
    assert tree(tmp_path) == before  # only the new mask replaces the old one


def test_output_below_a_regular_file(tmp_path):
    (tmp_path / "file").write_bytes(b"work")
    for below in ("file", "file/deep/masks"):
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
    folder = tmp_path / "a" / "b"
    assert check_output_dir(str(folder), []) == folder
    (folder / "x.csv").write_bytes(b"work")
    (folder / "y").write_bytes(b"work")
    check_output_dir(folder, ["one", "two"])
    for names, words in ((["z", "y", "x.csv"], "2 of 3 outputs .* such as y;"), (None, r"2 of 2 .* such as x\.csv;")):
        with pytest.raises(FileExistsError, match=words):
            check_output_dir(folder, names)
        assert check_output_dir(folder, names, overwrite=True) == folder
    assert tree(folder) == {"x.csv": b"work", "y": b"work"}


def test_masks_among_the_volumes_are_refused(folder, tmp_path):
    """The next run would segment the masks."""
    (tmp_path / "link").symlink_to(folder)
    before = tree(tmp_path)
    for spelling, overwrite in (("in", False), ("in/sub/..", True), ("link", False)):
        with pytest.raises(ValueError, match=r"output_dir: .* is the folder of the volumes, .*; choose another folder"):
            volumes_for_inference(folder, output_dir=tmp_path / spelling, overwrite=overwrite)
    assert tree(tmp_path) == before


def test_a_mask_must_not_replace_a_volume(folder, datalist):
    (folder / "b_seg.nii.gz").write_bytes(b"a volume")
    path = datalist({"test": ["b.nii.gz", "b_seg.nii.gz"]})
    before = tree(folder)
    message = r"output_dir: the file b_seg\.nii\.gz would replace a volume of that name in .*; choose another folder"
    with pytest.raises(ValueError, match=message):
        volumes_for_inference(path, output_dir=folder, overwrite=True)
    assert tree(folder) == before
    assert len(volumes_for_inference(path, output_dir=folder, postfix="organ")) == 2
    (folder / "slice.dcm").write_bytes(b"a volume")
    with pytest.raises(ValueError, match=r"the file slice\.dcm would replace a volume"):
        volumes_for_inference(folder / "slice.dcm", output_dir=folder, postfix="", overwrite=True, dicom_seg=True)


def test_mask_path(tmp_path):
    for image, expected in {"a.nii": "a", "x/c.1.nii.gz": "c.1", "a.gz.nii": "a.gz", "v": "v"}.items():
        assert mask_path(tmp_path, image) == tmp_path / f"{expected}_seg.nii.gz"


def test_run_folder_with_foreign_weights(tmp_path):
    assert check_run_dir(tmp_path / "new" / "run") == tmp_path / "new" / "run"
    assert set(tree(tmp_path)) == {"new", "new/run", "new/run/.lock"}
    (tmp_path / "model.pt").write_bytes(b"work")
    with pytest.raises(FileExistsError, match=r"has a model\.pt but no last\.pt .*; choose another output_dir"):
        check_run_dir(tmp_path)
    (tmp_path / "last.pt").write_bytes(b"state")
    assert check_run_dir(tmp_path) == tmp_path


def test_two_trainings_into_one_folder(tmp_path):
    """The lock is that of a process, and goes with it however it ends."""
    code = (
        "import sys, time; from medconstraints.data.output_folders import check_run_dir; "
        "check_run_dir(sys.argv[1]); print('locked', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(FileExistsError, match="output_dir: another run is writing to"):
            check_run_dir(tmp_path)
    finally:
        other.kill()
        other.wait()
    assert check_run_dir(tmp_path) == check_run_dir(tmp_path) == tmp_path
