"""Patients are divided into segmented and unsegmented ones, never over both, and every batch has both."""

import json
from collections import Counter

import pytest

from medconstraints.data import MissingData, PairedDataset, semi_supervised_items


def entry(name, patient=None, label=True):
    found = {"image": f"{name}.nii.gz"}
    return found | ({"label": f"{name}_gt.nii.gz"} if label else {}) | ({"patient": patient} if patient else {})


TWO_PHASES = [entry(f"{name}_{phase}", name) for name in "abc" for phase in ("ED", "ES")]


@pytest.fixture
def datalist(tmp_path):
    def write(**sections):
        (tmp_path / "list.json").write_text(json.dumps(sections))
        return tmp_path / "list.json"

    return write


@pytest.mark.parametrize(
    ("training", "count", "labelled", "unlabelled"),
    [
        pytest.param(TWO_PHASES, 1, ["a_ED", "a_ES"], ["b_ED", "b_ES", "c_ED", "c_ES"], id="a patient stays whole"),
        pytest.param(TWO_PHASES, None, [f"{n}_{p}" for n in "abc" for p in ("ED", "ES")], [], id="all with labels"),
        pytest.param([entry("x"), entry("y")], 1, ["x"], ["y"], id="without names each image is a patient"),
        pytest.param([entry("x", label=False), entry("y"), entry("z")], 1, ["y"], ["x", "z"], id="first with a label"),
        pytest.param([entry("x", label=False), entry("y")], None, ["y"], ["x"], id="who has labels"),
    ],
)
def test_parts(datalist, training, count, labelled, unlabelled):
    path = datalist(training=training)
    parts = semi_supervised_items(path, fully_labelled=count)
    assert parts.pop("held_back") == []
    names = {part: [item["case"].split(".")[0] for item in items] for part, items in parts.items()}
    assert names == {"labelled": labelled, "unlabelled": unlabelled}
    assert all(item["fully_labelled"] and "label" in item for item in parts["labelled"])
    assert not any(item["fully_labelled"] or "label" in item for item in parts["unlabelled"])
    assert sorted(item["index"] for items in parts.values() for item in items) == [*range(len(training))]


def test_a_section_of_unsegmented_images_and_held_back_ones(datalist):
    path = datalist(training=[entry("x")], unlabelled=["u.nii"], validation=[entry("v"), entry("w", label=False)])
    parts = semi_supervised_items(path)
    [item] = parts["unlabelled"]
    assert (item["case"], item["index"]) == ("u.nii", 1)
    assert [item["case"] for item in parts["held_back"]] == ["v.nii.gz"]


def test_labels_for_an_oracle_and_masks_for_proposals(datalist, tmp_path):
    path = datalist(training=TWO_PHASES)
    kept = semi_supervised_items(path, fully_labelled=1, supervision="oracle")["unlabelled"]
    assert kept[0]["label"].endswith("b_ED_gt.nii.gz")
    options = {"fully_labelled": 1, "supervision": "proposals", "proposals_dir": tmp_path}
    with pytest.raises(FileNotFoundError, match=r"proposals_dir.*b_ED_seg.nii.gz"):
        semi_supervised_items(path, **options)["unlabelled"][0]
    for item in kept:
        (tmp_path / f"{item['case'].split('.')[0]}_seg.nii.gz").touch()
    found = semi_supervised_items(path, **options)["unlabelled"]
    assert found[0]["proposal"] == str(tmp_path / "b_ED_seg.nii.gz") and "label" not in found[0]


@pytest.mark.parametrize(
    ("sections", "options", "message"),
    [
        ({"training": TWO_PHASES}, {"fully_labelled": 0}, "fully_labelled: expected.*got 0"),
        ({"training": TWO_PHASES}, {"fully_labelled": 4}, "fully_labelled: expected 1 to 3.*got 4"),
        ({"training": [entry("x", label=False)]}, {}, "fully_labelled: expected 1 to 0"),
        ({"training": [entry("a1", "a"), entry("a2", "a", label=False)]}, {}, "such as a, some entries"),
        ({"training": TWO_PHASES, "unlabelled": [entry("a_3", "a")]}, {}, 'such as a, are in "training" and in "unlab'),
        ({"training": TWO_PHASES, "validation": [entry("c_3", "c")]}, {}, 'such as c, are in "training" and in "valid'),
        ({"training": [entry("x")], "unlabelled": ["u.nii"]}, {"supervision": "oracle"}, "u.nii has no label"),
    ],
)
def test_what_cannot_be_divided(datalist, sections, options, message):
    with pytest.raises(ValueError, match=message):
        semi_supervised_items(datalist(**sections), **options)


def test_no_datalist_yet(tmp_path):
    assert all(isinstance(part, MissingData) for part in semi_supervised_items(tmp_path / "none.json").values())


@pytest.mark.parametrize(("labelled", "unlabelled"), [(2, 5), (5, 2), (3, 0)])
@pytest.mark.parametrize("use_unlabelled", [True, False])
def test_an_epoch_goes_through_the_larger_part_once(labelled, unlabelled, use_unlabelled):
    parts = [("labelled", n) for n in range(labelled)], [("unlabelled", n) for n in range(unlabelled)]
    pairs = list(PairedDataset(*parts, use_unlabelled=use_unlabelled))
    assert len(pairs) == max(labelled, unlabelled)
    used = use_unlabelled and unlabelled > 0
    assert all((first[0], second[0]) == ("labelled", "unlabelled" if used else "labelled") for first, second in pairs)
    counts = Counter(item for pair in pairs for item in pair)
    assert {*counts} == {*parts[0], *(parts[1] if used else [])}
    for part in parts:  # as often as each other
        assert max(counts[item] for item in part or [0]) - min(counts[item] for item in part or [0]) <= 1


def test_nothing_segmented():
    with pytest.raises(ValueError, match="labelled: expected at least one"):
        PairedDataset([], [1])


def test_what_is_remembered_of_an_item_is_that_of_its_part():
    labelled, unlabelled = ([{"index": number} for number in range(count)] for count in (2, 3))
    seen = [item["index"] for pair in PairedDataset(labelled, unlabelled) for item in pair]
    assert len({*seen}) == 5 and {index % 2 for index in seen[1::2]} == {1}
    alone = [item["index"] for pair in PairedDataset(labelled, unlabelled, use_unlabelled=False) for item in pair]
    assert {*alone} == {*seen[::2]}


def test_proposals_of_one_name_are_refused(datalist):
    path = datalist(training=[entry("a/x"), entry("b/t1"), entry("c/t1")])
    with pytest.raises(ValueError, match=r"several images would have the mask t1_seg\.nii\.gz"):
        semi_supervised_items(path, fully_labelled=1, supervision="proposals", proposals_dir="masks")
