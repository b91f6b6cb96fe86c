"""The page of one volume: what is in it, that it lies where the file lies, and that a browser draws it."""

import base64
import gzip
import json
import re

import nibabel as nib
import numpy as np
import pytest

from medconstraints.reports import viewer
from medconstraints.reports.page import Row, write_page
from medconstraints.reports.viewer import write_viewer

from .browser import browse, needs_chromium

AFFINE = np.array([[-0.8, 0, 0, 30], [0, 1.1, 0.2, 12], [0, -0.2, 4.0, 7], [0, 0, 0, 1]])
HOSTILE = "</script><script>document.title = 'run'</script>"


def data_of(page):
    return json.loads(re.search(r"^const data = (.*), form = ", page, re.MULTILINE)[1])


def volume_of(text):
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(text)))


@pytest.fixture
def case(rng):
    image = rng.normal(100, 30, (16, 12, 10)).astype(np.float32)
    mask = np.zeros(image.shape, np.uint8)
    mask[3:8, 2:7, 4:8], mask[8:10, 2:7, 4:8] = 1, 3
    return image, mask


def test_voxels_are_those_of_the_file(tmp_path, case):
    image, mask = case
    page = write_viewer(
        tmp_path / "x.html", image, mask, AFFINE, title=HOSTILE, class_names={1: HOSTILE, 3: "tail"}, reference=mask
    ).read_text("utf-8")
    assert HOSTILE not in page and "niivue" in page and not re.search(r"(src|href)=[\"']?(http|//)", page)
    data = data_of(page)
    shown = volume_of(data["image"])
    np.testing.assert_allclose(shown.affine, AFFINE, atol=1e-6)
    np.testing.assert_allclose(shown.get_fdata(), image, atol=np.ptp(image) / 60_000)
    assert shown.header["cal_min"] == pytest.approx(np.percentile(image, 1))
    predicted, surface = (np.asarray(volume_of(found["voxels"]).dataobj) for found in data["masks"])
    np.testing.assert_array_equal(predicted, mask)
    hollow = mask.copy()
    hollow[4:7, 3:6, 5:7] = 0  # the two columns of class 3 have no inside
    np.testing.assert_array_equal(surface, hollow)
    colours = data["masks"][0]["colours"]
    assert colours["labels"] == ["", HOSTILE, "", "tail"] and colours["A"] == [0, 255, 0, 255]
    inside = np.linalg.solve(AFFINE, [*data["centre"], 1])[:3].round().astype(int)
    assert mask[tuple(inside)] > 0


def test_small_integers_are_stored_as_they_are(tmp_path, case):
    image = case[0].round()
    page = write_viewer(tmp_path / "x.html", image, case[1], AFFINE, title="x", class_names={1: "a"}).read_text("utf-8")
    shown = volume_of(data_of(page)["image"])
    assert shown.get_data_dtype() == np.int16 and np.isnan(shown.header["scl_slope"])
    np.testing.assert_array_equal(np.asarray(shown.dataobj), image)


def test_a_large_volume_is_shown_in_blocks_at_its_place(tmp_path, case, monkeypatch):
    monkeypatch.setattr(viewer, "MOST_VOXELS", 300)
    image, mask = case
    mask[:], mask[15, 11, 9] = 0, 2  # one voxel in the last block
    page = write_viewer(tmp_path / "x.html", image, mask, AFFINE, title="x", class_names={2: "a"}).read_text("utf-8")
    assert "blocks of 4 x 2 x 1 voxels" in page  # the finest edges first: 0.8, 1.12, then 1.6 mm
    data = data_of(page)
    shown, found = volume_of(data["image"]), volume_of(data["masks"][0]["voxels"])
    assert shown.shape == (4, 6, 10) == found.shape
    np.testing.assert_allclose(shown.get_fdata()[1, 2, 3], image[4:8, 4:6, 3:4].mean(), atol=0.01)
    np.testing.assert_array_equal(np.argwhere(np.asarray(found.dataobj) == 2), [[3, 5, 9]])
    np.testing.assert_allclose(shown.affine @ [0, 0, 0, 1], AFFINE @ [1.5, 0.5, 0, 1], atol=1e-5)


@needs_chromium
def test_a_browser_draws_it_without_a_network(tmp_path, case):
    """The viewer runs under the page's own rules: nothing is loaded, no message is left on the console."""
    image, mask = case
    file = tmp_path / "a & <b>.html"
    write_viewer(file, image, mask, AFFINE, title=HOSTILE, class_names={1: HOSTILE, 3: "t"}, reference=mask)
    look = """
    setTimeout(() => {
      const canvas = document.querySelector("canvas"), copy = document.createElement("canvas");
      form.view.value = "0";
      form.view.dispatchEvent(new Event("change"));
      form.radiological.click();
      const pen = Object.assign(copy, {width: canvas.width, height: canvas.height}).getContext("2d");
      pen.drawImage(canvas, 0, 0);
      const seen = pen.getImageData(0, 0, copy.width, copy.height).data;
      document.body.dataset.colours = new Set(new Uint32Array(seen.buffer)).size;
    }, 5000);"""
    page, told = browse(file, tmp_path, look)
    assert told == [] and 'data-volumes="3"' in page and "<title>run" not in page
    assert re.search(r"R -?\d+\.\d, A -?\d+\.\d, S -?\d+\.\d mm; intensity \d+", page)
    assert int(re.search(r'data-colours="(\d+)"', page)[1]) > 100  # grey values and classes, not one ground


@needs_chromium
def test_a_browser_sorts_the_table(tmp_path):
    cells = {"b": ["10.00"], "a": ["9.00"], "c": []}
    rows = [Row(name, "done", cells=cell, flags=[HOSTILE]) for name, cell in cells.items()]
    file = write_page(tmp_path / "index.html", rows, title="Masks", columns=["organ (ml)"])
    orders = []
    for script in ("", "buttons[0].click();", "buttons[0].click(); buttons[0].click();", "buttons[2].click();"):
        page, told = browse(file, tmp_path, f"const buttons = document.querySelectorAll('th button'); {script}")
        assert told == [] and "<title>run" not in page
        orders.append("".join(re.findall(r'<th scope="row">(\w)</th>', page)))
    assert orders == ["bac", "abc", "cba", "cab"]
