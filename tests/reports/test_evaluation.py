"""Scores of saved masks: Dice and HD95 against slow references, volumes, geometry, settings, and what is refused."""

import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from medconstraints.__main__ import main
from medconstraints.reports import evaluation
from medconstraints.reports.evaluation import dice, evaluate_predictions, format_summary, hd95_mm

STRUCTURES = {"head": [1], "tail": [2], "whole": [1, 2]}


def run(study, section="test", **changes):
    return evaluate_predictions(
        study / "data" / "list.json", section, study / "out", **{"structures": STRUCTURES, **changes}
    )


def replace(path, data=None, affine=None):
    old = nib.load(path)
    data = np.asarray(old.dataobj) if data is None else data
    nib.save(nib.Nifti1Image(data, old.affine if affine is None else affine), path)


def surface(mask):
    padded = np.pad(mask, 1)
    inside = padded.copy()
    for axis in range(mask.ndim):
        for step in (-1, 1):
            inside &= np.roll(padded, step, axis)
    return (padded & ~inside)[(slice(1, -1),) * mask.ndim]


def slow_hd95(a, b, spacing):
    def directed(source, target):
        return np.percentile(ndimage.distance_transform_edt(~surface(target), sampling=spacing)[surface(source)], 95)

    return max(directed(a, b), directed(b, a))


def blob(rng, shape):
    noise = ndimage.gaussian_filter(rng.normal(size=shape), 1.5)
    return noise > np.quantile(noise, 0.8)


def test_dice():
    cases = {
        ("1100", "1100"): 1.0,
        ("1110", "0111"): 2 / 3,
        ("1000", "0111"): 0.0,
        ("0000", "0111"): 0.0,
        ("0111", "0000"): 0.0,
        ("0000", "0000"): 1.0,
    }
    for pair, expected in cases.items():
        assert dice(*(np.array(list(text)) == "1" for text in pair)) == pytest.approx(expected)


def test_hd95_against_distance_maps(rng):
    for shape, spacing in [((20, 18, 9), (0.8, 1.1, 4.0)), ((20, 18, 9), (3.0, 0.5, 0.5)), ((30, 25), (0.7, 2.0))]:
        a, b = blob(rng, shape), blob(rng, shape)
        assert hd95_mm(a, b, spacing) == pytest.approx(slow_hd95(a, b, spacing), rel=1e-5)
    assert hd95_mm(a[:, None], b[:, None], (2.0, 9.0, 0.5)) == hd95_mm(a, b, (2.0, 0.5)), (
        "axes of one voxel do not count"
    )


def test_hd95_is_the_larger_direction_not_the_pooled_percentile():
    a = np.zeros((60, 9), bool)
    a[2:30, 4] = True
    b = a.copy()
    b[30:34, 4] = True  # 4 of 32 voxels of b lie outside a, none of a outside b
    assert hd95_mm(a, b, (1.0, 1.0)) == pytest.approx(slow_hd95(a, b, (1.0, 1.0)))
    assert hd95_mm(a, b, (1.0, 1.0)) == hd95_mm(b, a, (1.0, 1.0)) > 2


def test_scores_and_summary_by_hand(study):
    results = run(study)
    first, second, third = results["cases"]
    assert (first["name"], first["image"]) == ("case_000", "images/case_000.nii.gz")
    # head: 10 x 7 x 4 voxels moved by 2 along the first axis, 0.8 mm a voxel
    assert first["head"]["dice"] == pytest.approx(8 / 10)
    assert first["head"]["hd95_mm"] == pytest.approx(1.6, rel=1e-5)
    voxel_ml = 0.8 * 1.1 * 4.0 / 1000
    assert first["head"]["volume_ml_reference"] == pytest.approx(280 * voxel_ml)
    assert first["whole"]["volume_ml_prediction"] == pytest.approx((280 + 84) * voxel_ml)
    assert second["head"] == {
        "dice": 0.0,
        "hd95_mm": None,
        "volume_ml_prediction": 0.0,
        "volume_ml_reference": pytest.approx(6 * 9 * 6 * voxel_ml),
    }
    assert (second["tail"]["dice"], second["tail"]["hd95_mm"]) == (1.0, None)  # absent from both
    assert "head" not in third and "case_002_seg.nii.gz" in third["reason"]
    assert results["missing"] == ["case_002"]
    head = results["summary"]["head"]
    assert head["dice_mean"] == pytest.approx(0.4)
    assert head["dice_sd"] == pytest.approx(np.std([0.8, 0.0], ddof=1))
    assert head["hd95_mm_mean"] == pytest.approx(1.6, rel=1e-5)
    assert (head["hd95_mm_sd"], head["hd95_undefined"], head["n"]) == (None, 1, 2)


def test_results_are_json_with_the_settings_of_the_run_and_without_absolute_paths(study, monkeypatch):
    monkeypatch.chdir(study)
    assert run(study)["settings"] is None
    settings = {
        "bundle": "b",
        "settings": {"slice_axis": None, "datalist": f"{study}/data/list.json", "spacing": [1, 2]},
    }
    (study / "out" / "settings.json").write_text(json.dumps(settings))
    results = run(study)
    assert results["settings"]["settings"] == {"slice_axis": None, "datalist": "data/list.json", "spacing": [1, 2]}
    assert str(study) not in json.dumps(results, allow_nan=False)
    assert set(results["provenance"]["versions"]) == {"torch", "monai", "medconstraints"}


def test_texts_lose_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases = {
        "{cwd}/data/list.json": "data/list.json",
        "/elsewhere/some one/list.json": "list.json",
        "--datalist=/elsewhere/list.json": "--datalist=list.json",
        "['/elsewhere/a.json', '{cwd}/b.json']": "['a.json', 'b.json']",
        r"C:\Users\someone\list.json": "list.json",
        "--section": "--section",
        "https://example.org/list.json": "https://example.org/list.json",
    }
    for text, expected in cases.items():
        assert evaluation._shareable(text.replace("{cwd}", str(Path.cwd()))) == expected


def test_base_dir_suffix_and_flat_folder(study, save):
    (study / "lists").mkdir()
    (study / "data" / "list.json").rename(study / "lists" / "list.json")
    reference = np.asarray(nib.load(study / "data" / "labels" / "case_000.nii.gz").dataobj)
    save(study / "flat" / "case_000_pred.nii.gz", reference.astype(np.float32))  # labels stored as floats
    results = evaluate_predictions(
        study / "lists" / "list.json",
        "two",
        study / "flat",
        structures={"head": (1,)},
        base_dir=study / "data",
        suffix="_pred",
    )
    assert results["cases"][0]["head"]["dice"] == 1.0
    assert results["cases"][0]["head"]["hd95_mm"] == 0.0
    assert results["missing"] == ["case_001"]


def test_2d_volumes_with_and_without_a_third_axis(tmp_path, save):
    labels = np.zeros((12, 10), np.uint8)
    labels[2:6, 3:7] = 1
    save(tmp_path / "a.nii.gz", labels, np.diag([2.0, 1.0, 1.0, 1.0]))
    save(tmp_path / "out" / "a_seg.nii.gz", np.roll(labels, 1, axis=0)[..., None], np.diag([2.0, 1.0, 1.0, 1.0]))
    (tmp_path / "list.json").write_text(
        json.dumps({"test": [{"image": ["a.nii.gz", "b.nii.gz"], "label": "a.nii.gz"}]})
    )
    row = evaluate_predictions(tmp_path / "list.json", "test", tmp_path / "out", structures={"x": [1]})["cases"][0]["x"]
    assert (row["dice"], row["hd95_mm"]) == (pytest.approx(0.75), pytest.approx(2.0))


def prediction_of(study):
    return study / "out" / "case_000" / "case_000_seg.nii.gz"


def move_affine(study, voxels):
    affine = nib.load(prediction_of(study)).affine.copy()
    affine[0, 3] += voxels * 0.8
    replace(prediction_of(study), affine=affine)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda s: move_affine(s, 0.02), r"case_000_seg.* and case_000.*different affines"),
        (lambda s: replace(prediction_of(s), np.zeros((24, 20, 9), np.uint8)), r"shape \(24, 20, 9\).*\(24, 20, 8\)"),
        (lambda s: replace(prediction_of(s), np.zeros((24, 20, 8, 3), np.uint8)), "expected one label map"),
        (lambda s: replace(prediction_of(s), np.full((24, 20, 8), 0.4)), "no integers"),
        (lambda s: replace(prediction_of(s), np.full((24, 20, 8), np.nan)), "no integers"),
        (lambda s: prediction_of(s).write_bytes(b"no volume"), "prediction of case_000: .* is not a NIfTI file"),
    ],
)
def test_an_unusable_prediction_does_not_stop_the_others(study, damage, words):
    move_affine(study, 5e-3)  # within the tolerance
    scored = run(study)
    move_affine(study, -5e-3)
    damage(study)
    found = run(study)
    assert re.search(words, found["cases"][0]["reason"]) and str(study) not in found["cases"][0]["reason"]
    assert found["cases"][1:] == scored["cases"][1:] and found["missing"][0] == "case_000"
    for path in (study / "out").rglob("*_seg.nii.gz"):
        path.write_bytes(prediction_of(study).read_bytes())
    if "voxels" in words or "integers" in words:
        with pytest.raises(ValueError, match=words):
            run(study)


def test_two_predictions_of_one_volume(study):
    (study / "out" / "case_000_seg.nii.gz").write_bytes(prediction_of(study).read_bytes())
    with pytest.raises(ValueError, match=r"2 files .*fit case_000"):
        run(study)


def test_hd95_of_a_sheared_grid_is_that_of_the_points(rng):
    from scipy.spatial.distance import cdist

    affine = np.array([[1.0, 0.4, 0.0, 0], [0.0, 1.2, 0.3, 0], [0.0, 0.0, 2.0, 0], [0, 0, 0, 1]])
    masks = [np.zeros((12, 12, 8), bool) for _ in range(2)]
    masks[0][3:8, 3:8, 2:5] = True
    masks[1][4:10, 2:7, 3:6] = rng.random((6, 5, 3)) > 0.2
    surfaces = []
    for mask in masks:
        padded = np.pad(mask, 1)
        inner = np.all([np.roll(padded, step, axis) for axis in range(3) for step in (-1, 1)], 0)[1:-1, 1:-1, 1:-1]
        surfaces.append(np.argwhere(mask & ~inner) @ affine[:3, :3].T)
    apart = cdist(*surfaces)
    expected = max(np.percentile(apart.min(1), 95), np.percentile(apart.min(0), 95))
    assert hd95_mm(*masks, affine=affine) == pytest.approx(expected)
    straight = np.diag([1.0, 1.2, 2.0, 1.0])
    assert hd95_mm(*masks, affine=straight) == pytest.approx(hd95_mm(*masks, [1.0, 1.2, 2.0]), rel=1e-5)


def test_unusable_input(study, tmp_path, caplog):
    datalist = study / "data" / "list.json"
    run(study, structures={"ghost": [7]})
    assert "ghost: no reference has label values [7]" in caplog.text
    with pytest.raises(ValueError, match=r"no section 'validation', it has \['test', 'two'\]"):
        run(study, "validation")
    with pytest.raises(FileNotFoundError, match="predictions: no folder"):
        evaluate_predictions(datalist, "test", study / "absent", structures=STRUCTURES)
    with pytest.raises(FileNotFoundError, match=r"named like case_000_mask\.nii\.gz.*case_000_seg.*suffix"):
        run(study, suffix="_mask")
    for structures in ({}, {"name": [1]}, {"a": 1}, {"a": []}, {"a": [1.0]}, {"a": [True]}, 3):
        with pytest.raises(ValueError, match="structures: "):
            run(study, structures=structures)
    (study / "data" / "labels" / "case_000.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="label of case_000: no file"):
        run(study)
    twice = [{"image": "a/x.nii.gz", "label": "l"}, {"image": "b/x.nii", "label": "l"}]
    for items, words in ((["a.nii.gz"], "'label', got None"), (twice, r"several images named \['x'\]")):
        (tmp_path / "list.json").write_text(json.dumps({"test": items}))
        with pytest.raises(ValueError, match=words):
            evaluate_predictions(tmp_path / "list.json", "test", tmp_path, structures=STRUCTURES)


def test_command(study, monkeypatch, capsys):
    monkeypatch.chdir(study)
    command = f"evaluation --datalist {study}/data/list.json --section test --predictions out --output r.json".split()
    assert main([*command, "--structures", json.dumps(STRUCTURES)]) == 0
    shown = capsys.readouterr().out
    assert shown == format_summary(json.loads((study / "r.json").read_text())) + "\n"
    assert len({len(line) for line in shown.splitlines()[:4]}) == 1  # aligned
    assert "case_002: no prediction" in shown
    for structures, words in (('{"a": [1]}', "r.json exists"), ("{", "expected names and values")):
        assert main([*command, "--structures", structures]) == 2
        assert words in capsys.readouterr().err
    assert main([*command, "--structures", '{"a": 1}', "--overwrite"]) == 2
    assert "expected a list" in capsys.readouterr().err
    assert main([*command, "--structures", '{"a": [1]}', "--overwrite", "True"]) == 0
