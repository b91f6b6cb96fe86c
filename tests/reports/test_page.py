"""The page of a run: its table, that all text is escaped, which volumes it shows, and the command."""

import json
from html.parser import HTMLParser

import nibabel as nib
import numpy as np
import pytest

from medconstraints.__main__ import main
from medconstraints.reports import evaluation
from medconstraints.reports.datalist import find_predictions, read_section
from medconstraints.reports.page import choose_cases, render_page

VOID = {"meta", "img", "col", "br", "link", "input"}
HOSTILE = "<script>alert('x')</script> & \"co\""


class Page(HTMLParser):
    """Collects tags and text, and checks that every element is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, tag):
        return [data for name, data in self.texts if name == tag]


@pytest.fixture
def results(study, monkeypatch):
    monkeypatch.chdir(study)
    return evaluation.evaluate_predictions("data/list.json", "test", "out", structures={"head": [1], "tail": [2]})


def columns_of(rows):
    return [sum(int(attributes.get("colspan", 1)) for attributes in row) for row in rows]


def test_page_of_results(results):
    text = render_page(results, title="T", picture_png=b"\x89PNG...")
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert page.all("html") == [{"lang": "en"}]
    (image,) = page.all("img")
    assert image["src"].startswith("data:image/png;base64,")
    assert image["alt"]
    assert all(attributes.get("scope") in ("col", "colgroup", "row") for attributes in page.all("th"))
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert "http:" not in text and "https:" not in text
    cells = {"0.800", "1.60", "undefined", "0.400 (0.566)", "1.60, 1 undefined", "no prediction case_002_seg.nii.gz"}
    assert cells <= {*page.text("td")}
    assert any(caption.startswith("2 of 3 volumes scored") for caption in page.text("caption"))
    assert "Settings" not in text
    for part in ("tbody", "tfoot"):  # rows span equal columns
        rows = text.split(f"<{part}>")[1].split(f"</{part}>")[0].split("<tr>")[1:]
        cells = [Page("<tr>" + row.strip()) for row in rows]
        assert columns_of([[a for tag, a in row.tags if tag in ("td", "th")] for row in cells]) == [9] * len(rows)


def test_everything_is_escaped(results):
    hostile = json.loads(json.dumps(results).replace("case_00", "&lt;<i>case_00").replace('"head"', '"<b>head"'))
    hostile["provenance"]["command"] = ["python", HOSTILE]
    hostile["settings"] = {"settings": {"name": HOSTILE}}
    page = Page(render_page(hostile, title=HOSTILE, notes=[HOSTILE]))
    assert not {"script", "i", "b"} & {tag for tag, _ in page.tags}
    assert page.text("h1") == page.text("title") == page.text("li") == [HOSTILE]
    assert "&lt;<i>case_000" in page.text("th")
    assert "alert" in page.text("pre")[0]


def cases_of(results, datalist="data/list.json", predictions="out", **options):
    entries = read_section(datalist, "test")
    return choose_cases(entries, find_predictions(entries, predictions), results, **options)


def test_cases_span_the_scores(results):
    assert [case.name for case in cases_of(results)] == ["case_002", "case_001", "case_000"]  # missing, 0.5, best
    assert [case.name for case in cases_of(results, max_cases=2)] == ["case_002", "case_000"]
    with pytest.raises(ValueError, match=r"no row for \['case_002'\]"):
        cases_of({**results, "cases": results["cases"][:2]})


def test_command(study, results, capsys):
    (study / "r.json").write_text(json.dumps(results))
    command = ["report", "--datalist", "data/list.json", "--section", "test", "--predictions", "out"]
    command += ["--results", "r.json", "--output", "o/r.html", "--picture", "o/m.png"]
    assert main([*command, "--boxes-axis", "2", "--notes", "Boxes of every slice, and more."]) == 0
    assert capsys.readouterr().out.split() == ["o/m.png", "o/r.html"]
    page = Page((study / "o" / "r.html").read_text())
    assert page.text("h1") == ["list, test"] and page.all("img")
    assert page.text("li")[0] == "Boxes of every slice, and more."
    before = (study / "o" / "r.html").read_bytes()
    assert main(command) == 2
    assert "--output: o/r.html exists" in capsys.readouterr().err
    (study / "r.json").write_text("{}")
    assert main([*command, "--overwrite"]) == 2
    assert "lacks ['cases', 'summary', 'provenance']" in capsys.readouterr().err
    assert (study / "o" / "r.html").read_bytes() == before


@pytest.mark.parametrize("codes", ["RAS", "PSR", "LPS"])
def test_boxes_of_slices_lie_across_an_axis_of_ras(tmp_path, codes):
    """However the image is stored, slice axis 2 gives flat boxes across its axis that runs to superior."""
    label = np.zeros((6, 7, 8), np.uint8)
    label[2:4, 1:5, 3:6] = 1
    start = nib.orientations.axcodes2ornt(tuple("RAS"))
    turn = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(tuple(codes)))
    image = nib.Nifti1Image(label, np.diag([1.0, 1.0, 2.0, 1.0])).as_reoriented(turn)
    nib.save(image, tmp_path / "image.nii.gz")
    nib.save(nib.Nifti1Image(label, np.diag([1.0, 1.0, 2.0, 1.0])), tmp_path / "label.nii.gz")
    nib.save(nib.Nifti1Image(label, np.diag([1.0, 1.0, 2.0, 1.0])), tmp_path / "image_seg.nii.gz")
    (tmp_path / "list.json").write_text(json.dumps({"test": [{"image": "image.nii.gz", "label": "label.nii.gz"}]}))
    results = {"cases": [{"name": "image"}], "summary": {}}
    (case,) = cases_of(results, tmp_path / "list.json", tmp_path, slice_axis=2)
    boxes = np.asarray(case.boxes)
    superior = next(axis for axis, code in enumerate(codes) if code in "SI")
    assert len(boxes) == 3 and ((boxes[:, 4:] - boxes[:, 1:4])[:, superior] == 1).all()
    inside = np.zeros(image.shape, bool)
    for row in boxes:
        inside[tuple(map(slice, row[1:4], row[4:]))] = True
    np.testing.assert_array_equal(inside, np.asarray(image.dataobj) == 1)
