"""class_items: entries of a classification."""

import json

import numpy as np
import pytest

from medconstraints.data import class_items


@pytest.fixture
def datalist(tmp_path):
    def make(*entries):
        np.savez(tmp_path / "a.npz", images=np.arange(8).reshape(2, 2, 2), labels=np.array([[1], [0]]), few=np.zeros(1))
        path = tmp_path / "datalist.json"
        path.write_text(json.dumps({"training": list(entries)}))
        return path

    return make


def test_rows_of_arrays_and_files_become_items(datalist, tmp_path):
    path = datalist(
        {"npz": "a.npz", "images": "images", "labels": "labels"}, {"image": "x.png", "class": 2, "patient": "p"}
    )
    items = class_items(path, "training", num_classes=3)
    assert [item["label"] for item in items] == [1, 0, 2]
    assert items[1]["image"].tolist() == [[4, 5], [6, 7]]
    assert items[1]["case"] == "images[1]"
    assert items[2]["image"] == str(tmp_path / "x.png") and items[2]["patient"] == "p"


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"image": "x.png"}, "entry 0 .*expected image and class"),
        ({"image": "x.png", "class": 3}, r"expected classes 0..2, got \[3\]"),
        ({"image": "x.png", "class": "1"}, r"got \['1'\]"),
        ({"npz": "b.npz", "images": "images", "labels": "labels"}, "no file"),
        ({"npz": "a.npz", "images": "pictures", "labels": "labels"}, r"no arrays \['pictures'\]"),
        ({"npz": "a.npz", "images": "images", "labels": "few"}, "got 1 for 2"),
    ],
)
def test_wrong_entries_are_refused(datalist, entry, words):
    with pytest.raises(ValueError, match=words):
        class_items(datalist(entry), "training", num_classes=3)


def test_an_empty_section_is_refused_and_a_missing_list_shows_at_the_first_look(datalist, tmp_path):
    with pytest.raises(ValueError, match="section 'test'"):
        class_items(datalist(), "test", num_classes=2)
    missing = class_items(tmp_path / "none.json", "training", num_classes=2)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        missing[0]
