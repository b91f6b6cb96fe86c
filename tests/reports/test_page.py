"""The page of an evaluation: its table, that all text is escaped, which volumes it shows, and the command."""

import json
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medconstraints.__main__ import main
from medconstraints.reports import evaluation
from medconstraints.reports.datalist import find_predictions, read_section
from medconstraints.reports.report import choose_cases, write_report

VOID = {"meta", "img", "col", "br", "link", "input", "rect"}
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


def page_of(study, results, **options):
    (study / "r.json").write_text(json.dumps(results))
    options = {"datalist": "data/list.json", "predictions": "out", "viewer": False, **options}
    write_report(section="test", results="r.json", output="r.html", picture="m.png", overwrite=True, **options)
    return (study / "r.html").read_text("utf-8")


def test_page_of_results(study, results):
    text = page_of(study, results)
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert page.all("html") == [{"lang": "en"}]
    *planes, large = page.all("img")
    assert len(planes) == 2 and "The large picture" in text  # of the volumes with a mask
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in [*planes, large])
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.all("th"))
    assert not {"link", "iframe", "a"} & {tag for tag, _ in page.tags}
    assert "http:" not in text and "https:" not in text
    cells = {"0.800", "1.60", "undefined", "0.400 (0.566)", "1.60, 1 undefined", "no prediction case_002_seg.nii.gz"}
    assert cells <= {*page.text("td")} and "2 scored, 1 failed." in page.text("li")
    measures = ("Dice", "HD95 (mm)", "prediction (ml)", "reference (ml)")
    columns = [f"{structure} {measure}" for structure in ("head", "tail") for measure in measures]
    assert page.text("button") == ["Volume", "State", *columns, "To look at"]
    assert "Settings" not in text
    for part in ("tbody", "tfoot"):  # rows have equal columns
        rows = text.split(f"<{part}>")[1].split(f"</{part}>")[0].split("<tr>")[1:]
        cells = [len([tag for tag, _ in Page("<tr>" + row.strip()).tags if tag in ("td", "th")]) for row in rows]
        assert cells == [12] * len(rows)


def test_everything_is_escaped(study, results):
    hostile = json.loads(json.dumps(results).replace('"head"', '"<b>head"'))
    hostile["provenance"]["command"] = ["python", HOSTILE]
    hostile["settings"] = {"settings": {"name": HOSTILE}}
    hostile["cases"][2]["reason"] = HOSTILE
    page = Page(page_of(study, hostile, title=HOSTILE, notes=[HOSTILE]))
    assert not {"i", "b"} & {tag for tag, _ in page.tags} and len(page.all("script")) == 1
    assert page.text("h1") == page.text("title") == [HOSTILE] and page.text("li")[1] == HOSTILE
    assert "<b>head Dice" in page.text("button") and HOSTILE in page.text("td")
    assert all("alert" in text for text in page.text("pre")[:4:3])


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
    page = Page((study / "o" / "r.html").read_text("utf-8"))
    assert page.text("h1") == ["list, test"] and page.all("img")
    assert page.text("li")[1] == "Boxes of every slice, and more."
    links = [study / "o" / link["href"] for link in page.all("a")]
    assert [link.name for link in links] == ["case_000.html", "case_001.html"] and all(map(Path.is_file, links))
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
