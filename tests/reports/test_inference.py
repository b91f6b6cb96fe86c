"""The table and the page of an inference tell of every file, and escape what comes from files."""

import base64
import csv
import io
import json
import re
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medconstraints.reports.inference import finish_inference, write_flags, write_inference_page, write_inference_table
from medconstraints.reports.planes import colour_of, draw_planes

EVIL = '=cmd|"<script>alert(1)</script>.nii'


@pytest.fixture
def rows(tmp_path, rng):
    """One volume with a mask, one that failed and has a name that a spreadsheet or a browser would run."""
    image = rng.random((12, 10, 8)).astype(np.float32)
    mask = np.zeros(image.shape, np.uint8)
    mask[3:8, 0:4, 2:5] = 1
    for name, voxels in (("a.nii.gz", image), ("out/sub/a_seg.nii.gz", mask)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(voxels, np.diag([-1.0, 1.0, 2.0, 1.0])), tmp_path / name)
    facts = {"value": 1, "voxels": 60, "ml": 0.12, "centroid_mm": [-5.0, 1.5, 6.0], "pieces": 3, "at_border": True}
    content = {"classes": {"organ": facts}, "notes": "odd header", "confidence": 0.61}
    (tmp_path / "out" / "sub" / "a_seg.nii.gz.json").write_text(json.dumps(content))
    done = {"name": "sub/a.nii.gz", "state": "done", "reason": "", "mask": "sub/a_seg.nii.gz", "seconds": 1.0}
    failed = {"name": EVIL, "state": "failed", "reason": "is <b>truncated</b>", "mask": "", "seconds": 0.0}
    return [{**done, "image": str(tmp_path / "a.nii.gz")}, failed]


def test_table(tmp_path, rows):
    write_flags(rows, tmp_path / "out", None)
    path = write_inference_table(tmp_path / "out" / "volumes.csv", rows, tmp_path / "out")
    first, second = csv.DictReader(io.StringIO(path.read_text("utf-8")))
    assert (first["class"], float(first["ml"]), float(first["anterior_mm"])) == ("organ", 0.12, 1.5)
    assert (first["pieces"], first["at_border"]) == ("3", "True")
    assert first["flags"] == "organ: 3 pieces; organ: touches the border; low confidence, 0.61; odd header"
    assert second["name"] == f"'{EVIL}" and second["reason"] == "is <b>truncated</b>" and second["class"] == ""


def test_flags_stand_in_the_facts_of_each_mask(tmp_path, rows):
    write_flags(rows, tmp_path / "out", {"ml": {"1": [1.0, 2.0]}})
    facts = json.loads((tmp_path / "out" / "sub" / "a_seg.nii.gz.json").read_text("utf-8"))
    assert "organ: 0.12 ml, where the training had 1 to 2" in facts["flags"] and facts["confidence"] == 0.61


def test_page(tmp_path, rows):
    write_flags(rows, tmp_path / "out", None)
    page = write_inference_page(tmp_path / "out" / "index.html", rows, tmp_path / "out").read_text("utf-8")
    [link] = re.findall(r'href="([^"]+)"', page)
    assert (tmp_path / "out" / link).is_file() and link == "index_pages/sub/a_seg.nii.gz.html"
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page and "<b>truncated" not in page
    assert not re.search(r"(src|href)=[\"']?(http|//)", page) and str(tmp_path) not in page
    for flag in ("organ: 3 pieces", "organ: touches the border", "low confidence, 0.61", "odd header"):
        assert flag in page
    assert "1 done, 1 failed." in re.sub(r"\s+", " ", page)
    [picture] = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert Image.open(io.BytesIO(base64.b64decode(picture))).height == 160


def test_no_viewer_of_a_former_mask_is_left(tmp_path, rows):
    page = tmp_path / "out" / "index.html"
    write_inference_page(page, rows, tmp_path / "out")
    (tmp_path / "out" / "index_pages" / "b_seg.nii.html").write_text("of a former run")
    for viewer, left in ((True, ["a_seg.nii.gz.html"]), (False, [])):
        write_inference_page(page, rows, tmp_path / "out", viewer=viewer)
        assert [file.name for file in (tmp_path / "out" / "index_pages").rglob("*.html")] == left


def test_sizes_of_several_volumes_make_a_histogram(tmp_path, rows):
    assert "<svg" not in write_inference_page(tmp_path / "one.html", rows, tmp_path / "out").read_text("utf-8")
    for number, ml in enumerate((1.0, 1.1, 9.0, 9.2)):
        facts = {"classes": {"organ": {"value": 1, "voxels": 10, "ml": ml}}}
        (tmp_path / "out" / f"{number}_seg.nii.json").write_text(json.dumps(facts))
        rows.append({"name": f"{number}.nii", "state": "done", "reason": "", "mask": f"{number}_seg.nii"})
    page = write_inference_page(tmp_path / "many.html", rows, tmp_path / "out").read_text("utf-8")
    told = [int(count) for count in re.findall(r"[\d.]+ to [\d.]+: (\d+)</title>", page)]
    assert told == np.histogram([0.12, 1.0, 1.1, 9.0, 9.2], 5)[0].tolist()
    assert "organ (ml): volumes of 0.12 to 9.2" in page


@pytest.mark.parametrize(("states", "status"), [(["done"], None), (["done", "failed"], 1), (["failed"], 2)])
def test_exit_status(tmp_path, states, status):
    rows = [{"name": f"{i}.nii", "state": state, "reason": "", "mask": ""} for i, state in enumerate(states)]
    evaluator = SimpleNamespace(rows=rows, exit_status=status or 0)
    if status is None:
        finish_inference(evaluator, tmp_path, "model.pt")
    else:
        with pytest.raises(SystemExit) as stop:
            finish_inference(evaluator, tmp_path, "model.pt")
        assert stop.value.code == status
    assert (tmp_path / "index.html").is_file() and (tmp_path / "volumes.csv").is_file()


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "SRP", "AIL"])
@pytest.mark.parametrize("radiological", [True, False])
def test_planes_show_right_on_the_left_whatever_the_file(axcodes, radiological):
    """A bright block far on the patient's right, high up, and its outline, at the same place of the picture."""
    ras = np.zeros((20, 16, 12), np.float32)
    ras[14:18, 6:10, 7:10] = 100
    affine = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(axcodes), ras.shape)
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axcodes))
    stored = nib.orientations.apply_orientation(ras, turn)
    affine = nib.orientations.inv_ornt_aff(turn, ras.shape)
    png = draw_planes(stored, (stored > 0).astype(np.uint8), affine, radiological=radiological)
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    colour = np.array([int(colour_of(1)[start : start + 2], 16) for start in (1, 3, 5)])
    axial_width, coronal_width = round(160 * 20 / 16), round(160 * 20 / 12)
    for left, width in ((0, axial_width), (axial_width + 4, coronal_width)):
        rows, columns = np.nonzero((picture[:, left : left + width] == colour).all(-1))
        assert (columns.mean() < width / 2) == radiological
    assert rows.mean() < 80  # of the coronal plane: it is high up
