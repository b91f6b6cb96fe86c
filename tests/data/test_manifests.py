"""Manifests: every file in data_manifests/ is valid, checks find planted faults, datalists keep patients together."""

import copy
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from monai.data import load_decathlon_datalist
from PIL import Image

from medconstraints.__main__ import main
from medconstraints.data import check_dataset, load_manifest, make_datalist
from medconstraints.data.manifests import file_problems, find_cases

FOLDER = Path(__file__).resolve().parents[2] / "data_manifests"
MANIFESTS = sorted(path for path in FOLDER.glob("*.json") if path.name != "schema.json")
NUM_CASES = 6


@pytest.fixture
def manifest():
    """The hippocampus manifest, asking for as many cases as `copy_of_set` has."""
    loaded = load_manifest(FOLDER / "hippocampus.json")
    loaded["checks"]["cases"] = NUM_CASES
    return loaded


@pytest.fixture
def copy_of_set(tmp_path, rng):
    """A small set in the layout of the hippocampus data, without any fault."""
    root = tmp_path / "Task04_Hippocampus"
    for case in range(NUM_CASES):
        label = rng.integers(0, 3, size=(6, 7, 5)).astype(np.uint8)
        write_volume(root / f"imagesTr/hippocampus_{case:03}.nii.gz", label * 100.0)
        write_volume(root / f"labelsTr/hippocampus_{case:03}.nii.gz", label)
    return root


def write_volume(path, array, spacing_mm=(1.0, 1.0, 1.0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([*spacing_mm, 1.0])), path)


def plan(**layout_and_checks):
    """A manifest with only what the functions read."""
    base = load_manifest(FOLDER / "hippocampus.json")
    base["checks"] = {"cases": None, "patients": None, "shape": None, "spacing_mm": None}
    return {**base, **layout_and_checks}


# --- the files -------------------------------------------------------------------------------------------------------


def test_the_expected_sets_are_there():
    expected = "acdc atlas brats drive hippocampus isic isles jsrt medmnist ph2 promise12 wmh"
    assert {path.stem for path in MANIFESTS} >= set(expected.split())


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_every_manifest_is_valid(path):
    loaded = load_manifest(path)
    assert loaded["name"] == path.stem
    ranges = [loaded["checks"][key] for key in ("shape", "spacing_mm") if loaded["checks"][key] is not None]
    assert all(len(r) == loaded["dimensions"] and all(low <= high for low, high in r) for r in ranges)
    images = [entry for entry in loaded["layout"] if entry["key"] == "image"]
    assert [entry.get("channel", 0) for entry in images] == list(range(len(images)))
    if loaded["task"] == "segmentation":
        assert loaded["layout"][0]["key"] == "image", "the first pattern identifies a case"
        assert len(images) == len(loaded["modality"]) or loaded["modality"][0].startswith("RGB")
    for split in loaded["splits"]:
        total = split["training"] + (split["validation"] or 0) + (split["test"] or 0)
        size = loaded["checks"]["patients" if split["unit"] == "patient" else "cases"]
        assert size is None or total <= size, split["name"]
    licence = loaded["licence"]
    if licence["weights_may_be_shipped"]:
        assert licence["commercial_use"] is True and licence["name"]


def test_a_broken_manifest_is_refused_with_every_fault(tmp_path):
    broken = json.loads((FOLDER / "hippocampus.json").read_text())
    broken.pop("citation")
    broken.update(dimensions=4, licens={})
    broken["licence"].update(commercial_use="maybe")
    broken["layout"][0].pop("pattern")
    broken["labels"].update(one="x")
    (tmp_path / "schema.json").write_text((FOLDER / "schema.json").read_text())
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=r"broken\.json is no valid manifest") as error:
        load_manifest(tmp_path / "broken.json")
    for fault in (
        "'citation' is a required property",
        "dimensions: 4 is not one of",
        "licence.commercial_use: 'maybe' is not one of",
        "layout.0: 'pattern' is a required property",
        "'licens' was unexpected",
        "labels: 'one' does not match",
    ):
        assert fault in str(error.value)


# --- patterns --------------------------------------------------------------------------------------------------------

# One name that a case of each set has; the layouts are descriptions, these are names seen in code that reads the sets.
NAMES = {
    "acdc": ("training/patient007/patient007_frame01.nii.gz", "training/patient007/patient007_frame01_gt.nii.gz"),
    "promise12": ("TrainingData_Part1/Case00.mhd", "TrainingData_Part1/Case00_segmentation.mhd"),
    "atlas": ("c0001/031768_t1w_deface_stx.nii.gz", "c0001/031768_LesionSmooth_stx.nii.gz"),
    "wmh": ("Amsterdam/GE3T/100/pre/FLAIR.nii.gz", "Amsterdam/GE3T/100/wmh.nii.gz"),
    "isles": (
        "TRAINING/case_1/SMIR.Brain.XX.O.CT.345562/SMIR.Brain.XX.O.CT.345562.nii",
        "TRAINING/case_1/SMIR.Brain.XX.O.OT.345568/SMIR.Brain.XX.O.OT.345568.nii",
    ),
    "brats": (
        "BraTS20_Training_001/BraTS20_Training_001_t1.nii.gz",
        "BraTS20_Training_001/BraTS20_Training_001_seg.nii.gz",
    ),
    "ph2": ("IMD002/IMD002_Dermoscopic_Image/IMD002.bmp", "IMD002/IMD002_lesion/IMD002_lesion.bmp"),
    "isic": (
        "ISIC2018_Task1-2_Training_Input/ISIC_0000000.jpg",
        "ISIC2018_Task1_Training_GroundTruth/ISIC_0000000_segmentation.png",
    ),
    "jsrt": ("All247images/JPCLN001.IMG", "scratch/fold1/masks/left lung/JPCLN001.gif"),
    "drive": ("training/images/21_training.tif", "training/1st_manual/21_manual1.gif"),
}


def test_an_image_and_its_label_make_one_case(tmp_path):
    for name, (image, label) in NAMES.items():
        for file in (image, label):
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).touch()
        layout = load_manifest(FOLDER / f"{name}.json")["layout"]
        (case,) = find_cases(layout, tmp_path / name)
        matched = {}
        for entry, files in zip(layout, case.files, strict=True):
            matched.update({file.relative_to(tmp_path / name).as_posix(): entry["key"] for file in files})
        assert matched == {image: "image", label: "label"}, name


def test_patterns(tmp_path):
    cases = [
        ("a/{case}.nii", "a/12.nii", True),
        ("a/{case}.nii", "a/1_2.nii", False),
        ("a/{case}.nii", "a/b/12.nii", False),
        ("a/{case}.nii", "a/12xnii", False),
        ("{p}/{p}_x", "7/7_x", True),
        ("{p}/{p}_x", "7/8_x", False),
        ("**/{p}.nii", "7.nii", True),
        ("**/{p}.nii", "a/b/7.nii", True),
        ("{p}*.nii", "7_t1.nii", True),
        ("{p}/*.nii", "7/8/9.nii", False),
    ]
    for number, (pattern, name, matches) in enumerate(cases):
        (tmp_path / str(number) / name).parent.mkdir(parents=True)
        (tmp_path / str(number) / name).touch()
        found = find_cases([{"key": "image", "pattern": pattern}], tmp_path / str(number))
        assert bool(found) == matches, (pattern, name)


def test_a_further_placeholder_allows_several_files(tmp_path):
    layout = load_manifest(FOLDER / "atlas.json")["layout"]
    for file in (
        "1_t1w_stx.nii.gz",
        "1_LesionSmooth_stx.nii.gz",
        "1_LesionSmooth_1_stx.nii.gz",
        "1_LesionSmooth_2_stx.nii.gz",
    ):
        (tmp_path / file).touch()
    (case,) = find_cases(layout, tmp_path)
    assert not list(file_problems(layout, case))
    assert [len(files) for files in case.files] == [1, 1, 2]
    (entry,) = make_datalist(plan(layout=layout), tmp_path, fractions=(1, 0, 0))["training"]
    assert entry == {
        "image": "1_t1w_stx.nii.gz",
        "label": "1_LesionSmooth_stx.nii.gz",
        "label_part": ["1_LesionSmooth_1_stx.nii.gz", "1_LesionSmooth_2_stx.nii.gz"],
        "patient": "1",
    }


# --- checks ----------------------------------------------------------------------------------------------------------


def test_a_complete_copy_has_no_problems(manifest, copy_of_set):
    assert check_dataset(manifest, copy_of_set) == []


def test_missing_files_are_found(manifest, copy_of_set):
    (copy_of_set / "labelsTr/hippocampus_002.nii.gz").unlink()
    assert check_dataset(manifest, copy_of_set) == [
        "case 002: image without label, expected labelsTr/hippocampus_{case}.nii.gz",
        f"expected {NUM_CASES} cases, found {NUM_CASES - 1} with all their files",
    ]
    (copy_of_set / "imagesTr/hippocampus_003.nii.gz").unlink()
    assert check_dataset(manifest, copy_of_set)[1].startswith("case 003: label without image")


def test_a_label_value_without_name_is_found(manifest, copy_of_set):
    write_volume(copy_of_set / "labelsTr/hippocampus_003.nii.gz", np.full((6, 7, 5), 4, np.uint8))
    (problem,) = check_dataset(manifest, copy_of_set)
    assert problem == "case 003: labelsTr/hippocampus_003.nii.gz has values [4], the manifest names [0, 1, 2]"
    assert check_dataset(manifest, copy_of_set, read_labels=False) == []


def test_labels_between_the_values_are_found_and_float_labels_are_fine(manifest, copy_of_set):
    path = copy_of_set / "labelsTr/hippocampus_003.nii.gz"
    write_volume(path, np.full((6, 7, 5), 2.0, np.float32))
    assert check_dataset(manifest, copy_of_set) == []
    write_volume(path, np.full((6, 7, 5), 0.5, np.float32))
    assert "has values [0.5]" in check_dataset(manifest, copy_of_set)[0]


def test_labels_of_another_shape_or_spacing_are_found(manifest, copy_of_set):
    write_volume(copy_of_set / "labelsTr/hippocampus_001.nii.gz", np.zeros((6, 7, 4), np.uint8))
    write_volume(copy_of_set / "labelsTr/hippocampus_003.nii.gz", np.zeros((6, 7, 5), np.uint8), (1, 1, 2))
    shape, spacing = check_dataset(manifest, copy_of_set)
    assert shape.startswith("case 001: labelsTr/hippocampus_001.nii.gz has shape and spacing ((6, 7, 4)")
    assert "(1.0, 1.0, 2.0)" in spacing


def test_spacing_and_shape_ranges(manifest, copy_of_set):
    write_volume(copy_of_set / "imagesTr/hippocampus_001.nii.gz", np.zeros((6, 7, 5)), (1, 1, 1.2))
    write_volume(copy_of_set / "labelsTr/hippocampus_001.nii.gz", np.zeros((6, 7, 5), np.uint8), (1, 1, 1.2))
    (problem,) = check_dataset(manifest, copy_of_set)
    assert "has spacing_mm (1.0, 1.0, 1.2), expected within [[1, 1], [1, 1], [1, 1]]" in problem
    manifest["checks"].update(shape=[[6, 6], [7, 7], [5, 6]], spacing_mm=None)
    assert check_dataset(manifest, copy_of_set) == []
    manifest["checks"]["shape"] = [[6, 6], [7, 7], [6, 6]]
    assert len(check_dataset(manifest, copy_of_set)) == NUM_CASES


def test_a_truncated_file_is_reported_and_the_rest_is_checked(manifest, copy_of_set):
    path = copy_of_set / "labelsTr/hippocampus_000.nii.gz"
    path.write_bytes(path.read_bytes()[:-40])
    (copy_of_set / "imagesTr/hippocampus_004.nii.gz").write_text("not an image")
    problems = check_dataset(manifest, copy_of_set)
    assert [p[:8] for p in problems] == ["case 000", "case 004"]
    assert all("could not be read" in p for p in problems)


def test_two_files_for_one_place_are_found(tmp_path):
    layout = [{"key": "image", "pattern": "**/{case}.nii.gz", "what": ""}]
    for folder in ("a", "b"):
        write_volume(tmp_path / folder / "1.nii.gz", np.zeros((2, 2, 2)))
    (problem,) = check_dataset(plan(layout=layout), tmp_path)
    assert problem == "case 1: 2 files match **/{case}.nii.gz, one belongs there"


def test_an_empty_and_an_absent_folder(manifest, tmp_path):
    assert check_dataset(manifest, tmp_path)[0].startswith("no case found, expected files like imagesTr/")
    with pytest.raises(FileNotFoundError, match="root: expected the folder of the data set"):
        check_dataset(manifest, tmp_path / "absent")


@pytest.mark.parametrize(("mode", "high"), [("1", 1), ("RGB", (255, 255, 255))])
def test_picture_masks_of_every_mode(tmp_path, mode, high):
    plan_2d = plan(layout=load_manifest(FOLDER / "ph2.json")["layout"], labels={"0": "background", "255": "lesion"})
    for file in NAMES["ph2"]:
        (tmp_path / file).parent.mkdir(parents=True)
        Image.new(mode if "lesion" in file else "RGB", (9, 5), high if "lesion" in file else 0).save(tmp_path / file)
    assert check_dataset(plan_2d, tmp_path) == []
    assert "has values [255]" in check_dataset({**plan_2d, "labels": {"0": "background"}}, tmp_path)[0]


def test_metaimages(tmp_path):
    promise = load_manifest(FOLDER / "promise12.json")
    promise["checks"].update(cases=1, patients=1)
    for name, value in (("Case00", 7), ("Case00_segmentation", 1)):
        image = sitk.Image(256, 320, 15, sitk.sitkUInt8) + value
        image.SetSpacing((0.5, 0.5, 3.6))
        sitk.WriteImage(image, str(tmp_path / f"{name}.mhd"))
    assert check_dataset(promise, tmp_path) == []
    image.SetSpacing((0.5, 0.5, 5.0))
    sitk.WriteImage(image + 1, str(tmp_path / "Case00_segmentation.mhd"))
    assert len(check_dataset(promise, tmp_path)) == 2


def test_array_archives(tmp_path):
    medmnist = load_manifest(FOLDER / "medmnist.json")
    parts = {"train": 4708, "val": 524, "test": 624}
    arrays = {f"{p}_{w}": np.zeros(n, np.uint8) for p, n in parts.items() for w in ("images", "labels")}
    np.savez(tmp_path / "pneumoniamnist.npz", **arrays)
    assert check_dataset(medmnist, tmp_path) == []
    arrays["val_images"] = arrays["val_images"][1:]
    del arrays["test_labels"]
    np.savez(tmp_path / "pneumoniamnist.npz", **arrays)
    assert check_dataset(medmnist, tmp_path) == [
        "pneumoniamnist.npz: val_images has 523 rows, expected 524",
        "pneumoniamnist.npz has no array test_labels",
    ]
    with pytest.raises(ValueError, match="it is a classification set"):
        make_datalist(medmnist, tmp_path, fractions=(1, 0, 0))


# --- datalists -------------------------------------------------------------------------------------------------------


def frames(root, num_patients):
    """Empty files in the layout of ACDC: two frames for each patient."""
    for patient in range(1, num_patients + 1):
        folder = root / f"patient{patient:03}"
        folder.mkdir(parents=True)
        for frame in ("01", "12"):
            for end in ("", "_gt"):
                (folder / f"patient{patient:03}_frame{frame}{end}.nii.gz").touch()


def patients_of(datalist, part):
    return {entry["patient"] for entry in datalist[part]}


def test_frames_of_a_patient_stay_together(tmp_path):
    frames(tmp_path, 10)
    lists = make_datalist(load_manifest(FOLDER / "acdc.json"), tmp_path, seed=1, fractions=(0.6, 0.2, 0.2))
    parts = [patients_of(lists, part) for part in ("training", "validation", "test")]
    assert [len(part) for part in parts] == [6, 2, 2]
    assert len(set.union(*parts)) == 10
    assert (lists["numTraining"], lists["numValidation"], lists["numTest"]) == (12, 4, 4)


def test_a_seed_gives_the_same_list_and_another_seed_another(tmp_path):
    frames(tmp_path, 10)
    acdc = load_manifest(FOLDER / "acdc.json")
    first, again, other = (make_datalist(acdc, tmp_path, seed=s, fractions=(0.5, 0.5, 0)) for s in (3, 3, 4))
    assert first == again
    assert first["training"] != other["training"]


def test_the_split_of_a_paper_and_what_it_leaves_over(tmp_path):
    frames(tmp_path, 100)
    acdc = load_manifest(FOLDER / "acdc.json")
    lists = make_datalist(acdc, tmp_path, split="thesis")
    assert [len(patients_of(lists, part)) for part in ("training", "validation", "test")] == [75, 25, 0]
    acdc["splits"][0]["training"] = 70
    lists = make_datalist(acdc, tmp_path, split="thesis")
    assert [len(patients_of(lists, part)) for part in ("training", "validation", "test")] == [70, 25, 0]


def test_channels_are_listed_in_order(tmp_path):
    brats = load_manifest(FOLDER / "brats.json")
    folder = tmp_path / "BraTS20_Training_001"
    folder.mkdir()
    for modality in ("flair", "t1", "t1ce", "t2", "seg"):
        (folder / f"BraTS20_Training_001_{modality}.nii.gz").touch()
    (entry,) = make_datalist(brats, tmp_path, fractions=(1, 0, 0))["training"]
    assert [name.split("_")[-1] for name in entry["image"]] == ["t1.nii.gz", "t1ce.nii.gz", "t2.nii.gz", "flair.nii.gz"]
    assert entry["label"].endswith("_seg.nii.gz")


def test_arguments_that_do_not_fit(manifest, copy_of_set, tmp_path):
    for arguments, message in (
        ({}, "expected one of the two"),
        ({"fractions": (1, 0, 0), "split": "x"}, "expected one of the two"),
        ({"fractions": (0.5, 0.5)}, "three shares that sum to one"),
        ({"fractions": (0.5, 0.4, 0.2)}, "three shares that sum to one"),
        ({"fractions": (1.5, -0.5, 0)}, "three shares that sum to one"),
        ({"fractions": (0.98, 0.01, 0.01)}, "fractions: 6 patients are too few"),
        ({"split": "thesis"}, "hippocampus has none, give fractions"),
    ):
        with pytest.raises(ValueError, match=message):
            make_datalist(manifest, copy_of_set, **arguments)
    frames(tmp_path / "acdc", 3)
    with pytest.raises(ValueError, match="needs 100 patients, here are 3"):
        make_datalist(load_manifest(FOLDER / "acdc.json"), tmp_path / "acdc", split="thesis")


def test_incomplete_cases_are_not_dropped_silently(manifest, copy_of_set, tmp_path):
    (copy_of_set / "labelsTr/hippocampus_002.nii.gz").unlink()
    with pytest.raises(ValueError, match="case 002: image without label"):
        make_datalist(manifest, copy_of_set, fractions=(1, 0, 0))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no case of hippocampus"):
        make_datalist(manifest, tmp_path / "empty", fractions=(1, 0, 0))


# --- command line and real data --------------------------------------------------------------------------------------


def test_commands(manifest, copy_of_set, tmp_path, capsys):
    (tmp_path / "schema.json").write_text((FOLDER / "schema.json").read_text())
    path, output = tmp_path / "small.json", tmp_path / "datalist.json"
    path.write_text(json.dumps(manifest))
    both = ["--manifest", str(path), "--root", str(copy_of_set)]
    assert main(["check_dataset", *both]) == 0
    assert capsys.readouterr().out == "no problem found\n"

    line = ["make_datalist", *both, "--output", str(output)]
    assert main([*line, "--fractions", "0.5,0.5,0"]) == 0
    assert capsys.readouterr().out == "3 training, 3 validation, 0 test\n"
    rows = load_decathlon_datalist(str(output), data_list_key="validation", base_dir=str(copy_of_set))
    assert len(rows) == 3
    assert all(Path(row[key]).is_file() for row in rows for key in ("image", "label"))
    before = output.read_text()
    for more, reason in (
        (["--fractions", "[1,0,0]"], "exists; choose another name or add --overwrite"),
        (["--fractions", "[1,1,1]", "--overwrite"], "three shares"),
    ):
        assert main([*line, *more]) == 2
        assert reason in capsys.readouterr().err
        assert output.read_text() == before
    assert main([*line, "--fractions", "[1, 0, 0]", "--seed", "3", "--overwrite"]) == 0
    assert main(["check-dataset", "--manifest", "missing.json", "--root", "."]) == 2

    (copy_of_set / "labelsTr/hippocampus_002.nii.gz").unlink()
    assert main(["check_dataset", *both, "--read_labels", "False"]) == 1
    assert "case 002: image without label" in capsys.readouterr().out


def test_real_hippocampus(data_root):
    manifest = load_manifest(FOLDER / "hippocampus.json")
    root = data_root / "hippocampus"
    if not root.is_dir():
        pytest.skip("no hippocampus/ in MEDCONSTRAINTS_DATA")
    cases = len(list((root / "imagesTr").glob("hippocampus_*.nii.gz")))
    smaller = copy.deepcopy(manifest)
    smaller["checks"]["cases"] = cases
    assert check_dataset(smaller, root) == []
    if cases != manifest["checks"]["cases"]:
        assert check_dataset(manifest, root, read_labels=False) == [
            f"expected 260 cases, found {cases} with all their files"
        ]
    lists = make_datalist(manifest, root, fractions=(0.8, 0.1, 0.1))
    assert lists["numTraining"] + lists["numValidation"] + lists["numTest"] == cases
