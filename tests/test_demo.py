"""The demo: what it makes, and what it refuses before it starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import pytest

from medconstraints.demo import main

ROOT = Path(__file__).parents[1]


def test_refuses_a_folder_with_files(tmp_path, capsys):
    (tmp_path / "work").write_bytes(b"of a week")
    assert main(["--output", str(tmp_path), "--bundle", str(ROOT / "bundles" / "box_prior")]) == 2
    assert f"holds files already; remove the folder {tmp_path} or choose another" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


def test_refuses_a_missing_bundle(tmp_path, capsys):
    assert main(["--output", str(tmp_path / "out"), "--bundle", str(tmp_path / "nowhere")]) == 2
    assert "no configs/train.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_refuses_a_place_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_bytes(b"work")
    bundle = str(ROOT / "bundles" / "box_prior")
    for place in ("file", "file/below"):
        assert main(["--output", str(tmp_path / place), "--bundle", bundle]) == 2
        assert "file" in capsys.readouterr().err

    def locked(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path / "out"))

    monkeypatch.setattr("medconstraints.demo.make_cohort", locked)
    assert main(["--output", str(tmp_path / "out"), "--bundle", bundle]) == 2
    assert "Permission denied" in capsys.readouterr().err


@pytest.mark.slow
def test_two_epochs(tmp_path):
    """Fewer epochs than lie between two validations: there are weights all the same."""
    options = ["--epochs", "2", "--num-training", "4", "--num-test", "2"]
    output = tmp_path / "demo"
    done = subprocess.run(
        [sys.executable, "-m", "medconstraints.demo", "--output", str(output), *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert str(output / "report.html") in done.stdout
    for name in ("report.html", "montage.png", "run/model.pt", "run/last.pt"):
        assert (output / name).stat().st_size > 0, name
    masks = sorted((output / "masks").glob("*.nii.gz"))
    assert [mask.name for mask in masks] == ["phantom_008_seg.nii.gz", "phantom_009_seg.nii.gz"]
    for mask in masks:
        image = nib.load(output / "cohort" / "imagesTr" / mask.name.replace("_seg", ""))
        assert nib.load(mask).shape == image.shape
    assert "Dice" in done.stdout
    assert json.loads((output / "results.json").read_text())
    assert "phantom_009" in (output / "report.html").read_text()


@pytest.mark.slow
def test_a_failing_step_ends_with_status_1(tmp_path):
    """Its own messages come first, and say why."""
    output = tmp_path / "demo"
    done = subprocess.run(
        [sys.executable, "-m", "medconstraints.demo", "--output", str(output), "--epochs", "0"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("a step failed with exit status 1; its messages are above")
