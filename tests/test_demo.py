"""The demo: what it makes, and how it ends when a step fails. What it refuses stands in test_commands.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import pytest

ROOT = Path(__file__).parents[1]


def run_demo(output, *options):
    return subprocess.run(
        [sys.executable, "-m", "medconstraints", "demo", "--output_dir", str(output), *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_two_epochs(tmp_path):
    """Fewer epochs than lie between two validations: there are weights all the same."""
    output = tmp_path / "demo"
    done = run_demo(output, "--epochs", "2", "--num-training", "4", "--num-test", "2")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == str(output / "report.html")
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
    done = run_demo(tmp_path / "demo", "--epochs", "0")
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("a step failed with exit status 1; its messages are above")
