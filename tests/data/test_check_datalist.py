"""All faults of all files of a datalist, each once, by the command line."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from medconstraints.__main__ import main
from medconstraints.synthetic import make_cohort


@pytest.fixture
def cohort(tmp_path):
    make_cohort(tmp_path, num_training=4, num_validation=1, num_test=1, shape=(20, 20, 16), num_classes=2)
    return tmp_path / "datalist.json"


def lines_of(capsys, *arguments):
    status = main(["check", *arguments])
    return status, capsys.readouterr().out.splitlines()


def test_a_sound_list(cohort, capsys):
    status, lines = lines_of(capsys, "--datalist", str(cohort), "--num_classes", "3")
    assert status == 0 and lines[0] == "6 entries, 6 without a fault of their own" and lines[-1] == "no problem found"


def test_every_fault_is_told(cohort, tmp_path, capsys):
    content = json.loads(cohort.read_text())
    entries = [(section, entry) for section in ("training", "validation", "test") for entry in content[section]]
    paths = [tmp_path / entry["image"] for _, entry in entries]
    labels = [tmp_path / entry["label"] for _, entry in entries]
    paths[0].write_bytes(paths[0].read_bytes()[:300])
    stray = nib.load(labels[1])
    nib.save(nib.Nifti1Image(np.full(stray.shape, 7, np.uint8), stray.affine), labels[1])
    shutil.copy(paths[2], paths[3])
    moved = nib.load(labels[4])
    nib.save(nib.Nifti1Image(np.asarray(moved.dataobj), moved.affine + np.eye(4)[:, [1, 2, 3, 0]].T), labels[4])
    for _, entry in (entries[0], entries[-1]):
        entry["patient"] = "A"
    (tmp_path / "boxes.csv").write_text("class,start_1,start_2,start_3,stop_1,stop_2,stop_3\n1,0,0,0,99,2,2\n")
    entries[2][1]["boxes"] = "boxes.csv"
    cohort.write_text(json.dumps(content))
    output = tmp_path / "found.json"
    status, lines = lines_of(capsys, "--datalist", str(cohort), "--num_classes", "4", "--output", str(output))
    told = "\n".join(lines)
    assert status == 1
    for words in (
        f"{paths[0].name}: is truncated",
        f"{labels[1].name}: has values that are no class number 0 to 3: ",
        "has the same voxels as",
        f"{labels[4].name}: has another affine than its image",
        "boxes.csv, row 1 (line 2): reaches",
        "patient A: is in test and in training",
        "training: no label has class 3.",
    ):
        assert words in told, words
    found = json.loads(output.read_text())
    assert len(found["entries"]) == 6 and {line for line in found["faults"]} <= {*lines}
