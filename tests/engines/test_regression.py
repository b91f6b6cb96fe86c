"""A regressor learns sizes and places of discs, and what it says of further images becomes their bounds."""

import json
import math
from functools import partial

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.networks.nets import ResNet
from monai.transforms import Flipd, RandFlipd, Zoomd

from medconstraints.data import semi_supervised_items
from medconstraints.engines import RegressionStage, StatisticPredictions
from medconstraints.engines.regression import explained
from medconstraints.networks import StatisticRegressor
from medconstraints.statistics import soft_centroid, soft_centroid_offset, soft_size
from medconstraints.transforms import PredictedBoundsd, reading_transforms

SIDE = 24
BOTH = {"size": soft_size, "centroid": soft_centroid}
READING = reading_transforms(num_classes=2, spatial_dims=2)


@pytest.fixture(scope="module")
def datalist(tmp_path_factory):
    """40 images to train on and 12 held back, of bright rectangles of different sizes and places."""
    folder, rng = tmp_path_factory.mktemp("rectangles"), np.random.default_rng(0)
    content = {"training": [], "validation": []}
    for number in range(52):
        (height, width), image = rng.integers(3, 12, 2), rng.normal(0, 5, (SIDE, SIDE))
        top, left = rng.integers(0, SIDE - height), rng.integers(0, SIDE - width)
        label = np.zeros((SIDE, SIDE), np.uint8)
        label[top : top + height, left : left + width] = 1
        entry = {"image": f"image_{number}.nii", "label": f"label_{number}.nii"}
        nib.save(nib.Nifti1Image((image + 100 * label).astype(np.float32), np.eye(4)), folder / entry["image"])
        nib.save(nib.Nifti1Image(label, np.eye(4)), folder / entry["label"])
        content["training" if number < 40 else "validation"].append(entry)
    (folder / "datalist.json").write_text(json.dumps(content))
    return folder / "datalist.json"


def stage_of(datalist, folder, *, statistics=None, seed=0, **options):
    torch.manual_seed(seed)
    body = {"layers": [1, 1, 1, 1], "block_inplanes": [8, 8, 8, 8], "spatial_dims": 2, "n_input_channels": 1}
    backbone = ResNet("basic", conv1_t_size=3, conv1_t_stride=1, no_max_pool=True, num_classes=8, **body)
    network = StatisticRegressor(
        backbone, features=8, statistics=statistics or {"size": soft_size}, num_classes=2, image_size=(SIDE, SIDE)
    )
    given = {"epochs": 4, "repeats": 2, "batch_size": 8, "val_interval": 2, **options}
    optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=5e-3)  # noqa: E731
    return RegressionStage(
        regressor=network,
        items=semi_supervised_items(datalist, fully_labelled=24),
        preprocessing=READING,
        output_dir=folder,
        optimizer=optimizer,
        **given,
    )


@pytest.fixture(scope="module")
def trained(datalist, tmp_path_factory):
    """Folder of a regressor of sizes and centroids."""
    folder = tmp_path_factory.mktemp("regressor")
    stage_of(datalist, folder, statistics=BOTH, epochs=2, augmentation=[RandFlipd(["image", "label"], prob=0.5)]).run()
    return folder


def rows_of(folder):
    return json.loads((folder / "predictions.json").read_text())


@pytest.mark.slow
def test_it_learns_sizes(datalist, tmp_path):
    stage = stage_of(datalist, tmp_path, epochs=8)
    stage.run()
    StatisticPredictions(stage).prepare()
    found = rows_of(tmp_path)["held_back"]["size 1"]
    assert found["percent"] < 25  # as good as the mean would be about 50


@pytest.mark.slow
def test_a_run_that_is_cut_off_goes_on_the_same(datalist, tmp_path):
    stage_of(datalist, tmp_path / "whole", epochs=2).run()
    stage = stage_of(datalist, tmp_path / "cut", epochs=2)
    forward, calls = stage.regressor.forward, []

    def cut_off(image):
        calls.append(stage.regressor.training)
        if sum(calls) == 8:  # in the second epoch, of six batches
            raise InterruptedError
        return forward(image)

    stage.regressor.forward = cut_off
    with pytest.raises(InterruptedError):
        stage.run()
    stage_of(datalist, tmp_path / "cut", epochs=2, seed=5).run()
    states = [torch.load(tmp_path / name / "last.pt", weights_only=True)["objects"] for name in ("whole", "cut")]
    torch.testing.assert_close(states[0]["network"], states[1]["network"], rtol=0, atol=0)


def test_predictions_are_made_once_and_anew_for_other_weights(datalist, trained, tmp_path):
    stage = stage_of(datalist, trained, statistics=BOTH)
    predictions = StatisticPredictions(stage)
    predictions.prepare()
    file = trained / "predictions.json"
    made = file.stat().st_mtime_ns
    StatisticPredictions(stage_of(datalist, trained, statistics=BOTH)).prepare()
    assert file.stat().st_mtime_ns == made
    content = rows_of(trained)
    assert len(content["unlabelled"]) == 16 and content["names"] == stage.regressor.names
    state = torch.load(trained / "model.pt", weights_only=True)
    state["head.bias"] += 1
    (tmp_path / "other").mkdir()
    torch.save(state, tmp_path / "other/model.pt")
    (tmp_path / "other/predictions.json").write_text(file.read_text())
    StatisticPredictions(stage_of(datalist, tmp_path / "other", statistics=BOTH)).prepare()
    changed = rows_of(tmp_path / "other")
    assert changed["made_from"]["checkpoint_sha256"] != content["made_from"]["checkpoint_sha256"]
    shift = np.array(changed["unlabelled"][3]["values"]) - content["unlabelled"][3]["values"]
    np.testing.assert_allclose(shift[:1], stage.regressor.scale[:1], rtol=1e-3)


@pytest.mark.parametrize("margin_from", ["value", "error", "uncertainty"])
def test_bounds(datalist, trained, margin_from):
    stage = stage_of(datalist, trained, statistics=BOTH)
    predictions = StatisticPredictions(stage, margin=0.2, margin_from=margin_from, coverage=0.8)
    predictions.prepare()
    content = rows_of(trained)
    values = np.array(content["unlabelled"][0]["values"])
    held_back = content["held_back"].values()
    width = {
        "value": 0.2 * abs(values),
        "error": abs(values) * [entry["relative_margin"] for entry in held_back],
        "uncertainty": np.array(content["unlabelled"][0]["spread"]) * [entry["spread_factor"] for entry in held_back],
    }[margin_from]
    bounds = PredictedBoundsd(predictions)(stage.dataset("unlabelled")[0] | {"fully_labelled": False})
    found = torch.cat([bounds["size_bounds"][1], bounds["centroid_bounds"][1]])
    expected = np.maximum(np.stack([values - width, values + width], -1), 0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert torch.isinf(bounds["size_bounds"][0]).all()
    free = PredictedBoundsd(predictions)({"fully_labelled": True})
    assert all(torch.isinf(free[key]).all() and free[key].shape == bounds[key].shape for key in stage.regressor.keys)


@pytest.mark.parametrize("margin_from", ["error", "uncertainty"])
def test_fitted_margins_cover_the_share_of_held_back_images_that_was_asked_for(datalist, trained, margin_from):
    stage = stage_of(datalist, trained, statistics={**BOTH})
    for coverage, least in ((0.5, 7), (0.8, 11)):  # ceil(13 * share) of 12
        predictions = StatisticPredictions(stage, margin_from=margin_from, coverage=coverage)
        predictions.prepare()
        _, values, spread, true, _ = predictions._seen("held_back")
        margins = np.stack(
            [
                predictions._margins({"values": value, "spread": width})
                for value, width in zip(values, spread, strict=True)
            ]
        )
        inside = (np.abs(values - true) <= margins + 1e-6).sum(0)
        assert (inside >= least).all() and (inside <= least + 1).all()


def test_a_class_that_may_be_absent_has_no_place(datalist, trained):
    stage = stage_of(datalist, trained, statistics=BOTH)
    predictions = StatisticPredictions(stage, margin=1.0)  # sizes from 0
    predictions.prepare()
    bounds = predictions.bounds(stage.dataset("unlabelled")[0])
    assert bounds["size_bounds"][1, 0, 0] == 0 and torch.isinf(bounds["centroid_bounds"]).all()


def test_of_a_statistic_of_pairs_nothing_is_known_where_a_class_may_be_absent(datalist, tmp_path):
    between = partial(soft_centroid_offset, pairs=[[1, 0]])
    stage = stage_of(datalist, tmp_path, statistics={"size": soft_size, "between": between}, epochs=1)
    stage.run()
    for margin, free in ((1.0, True), (0.0, False)):
        predictions = StatisticPredictions(stage, margin=margin)
        predictions.prepare()
        bounds = predictions.bounds(stage.dataset("unlabelled")[0])
        assert (bounds["size_bounds"][1, 0, 0] < 1) == free == bool(torch.isinf(bounds["between_bounds"]).all())


def test_what_the_regressor_did_not_see_is_refused(datalist, trained):
    both = stage_of(datalist, trained, statistics=BOTH)
    predictions = StatisticPredictions(both)
    with pytest.raises(RuntimeError, match="prepare"):
        predictions.bounds({"case": "a"})
    predictions.prepare()
    item = both.dataset("unlabelled")[0]
    with pytest.raises(ValueError, match=r"a\.nii: predictions\.json has no entry for its slice 0"):
        predictions.bounds(item | {"case": "a.nii"})
    with pytest.raises(ValueError, match=r"expected an image of \(24, 24\) voxels.*got \(20, 24\)"):
        predictions.bounds(item | {"image": item["image"][:, :20]})
    with pytest.raises(ValueError, match="was turned, flipped or moved"):
        predictions.bounds(Flipd("image", spatial_axis=0)(item))
    predictions.bounds(item)


def test_a_flip_leaves_a_size_and_a_zoom_does_not(datalist, tmp_path):
    stage = stage_of(datalist, tmp_path, epochs=1)
    stage.run()
    predictions = StatisticPredictions(stage)
    predictions.prepare()
    item = stage.dataset("unlabelled")[0]
    torch.testing.assert_close(predictions.bounds(Flipd("image", spatial_axis=0)(item)), predictions.bounds(item))
    with pytest.raises(ValueError, match="was resampled"):
        predictions.bounds(Zoomd("image", zoom=1.5)(item))


def test_results_that_are_missing_or_of_another_regressor(datalist, trained, tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match="no weights of the regressor"):
        StatisticPredictions(stage_of(datalist, tmp_path)).prepare()
    (tmp_path / "model.pt").write_bytes((trained / "model.pt").read_bytes())
    with pytest.raises(RuntimeError, match=r"model\.pt: not of this regressor"):
        StatisticPredictions(stage_of(datalist, tmp_path)).prepare()
    stage = stage_of(datalist, tmp_path, epochs=1)
    stage.items["held_back"] = []
    torch.save(stage.regressor.state_dict(), tmp_path / "model.pt")
    StatisticPredictions(stage, margin=0.1).prepare()
    stage.run = lambda: pytest.fail("trained although it cannot be used")
    with pytest.raises(ValueError, match="margin_from: 'error' needs held-back"):
        StatisticPredictions(stage, margin_from="error").prepare(train=True)
    stage.items["unlabelled"] = []
    with pytest.raises(ValueError, match="nothing is unsegmented"):
        StatisticPredictions(stage).prepare(train=True)


def test_weights_trained_on_images_read_otherwise_are_refused(datalist, tmp_path):
    told = {"spacing_mm": [1, 1], "reading#axcodes": "RAS", "seed": 0}
    stage_of(datalist, tmp_path, epochs=1, settings=told).run()
    predictions = StatisticPredictions(stage_of(datalist, tmp_path, epochs=1, settings={**told, "seed": 1}))
    assert predictions.state_dict() == {}
    predictions.prepare()
    state = predictions.state_dict()
    assert state["made_from"]["reading"] == {"spacing_mm": "[1, 1]", "reading#axcodes": "RAS"}
    predictions.load_state_dict(state)
    with pytest.raises(ValueError, match="are not those of this training"):
        predictions.load_state_dict({"made_from": {**state["made_from"], "checkpoint_sha256": "other"}})
    other = stage_of(datalist, tmp_path, epochs=1, settings={**told, "spacing_mm": [2, 2]})
    with pytest.raises(ValueError, match=r"spacing_mm: is \[2, 2\], but the regressor was trained with \[1, 1\]"):
        StatisticPredictions(other).prepare()


def test_several_processes_are_refused(datalist, tmp_path, monkeypatch):
    monkeypatch.setattr("medconstraints.engines.regression.idist.get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match=r"expected one process; run regressor\.json"):
        stage_of(datalist, tmp_path).run()


def test_negative_and_broken_values(datalist, tmp_path, caplog):
    stage = stage_of(datalist, tmp_path)
    state = stage.regressor.state_dict()
    torch.save(state | {"center": torch.tensor([-50.0])}, tmp_path / "model.pt")
    predictions = StatisticPredictions(stage)
    with caplog.at_level("WARNING"):
        predictions.prepare()
    assert "16 of 16 regressed values are below 0" in caplog.text
    assert predictions.bounds(stage.dataset("unlabelled")[0])["size_bounds"][1].tolist() == [[0, 0]]
    torch.save(state | {"center": torch.tensor([math.nan])}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"image_24.nii: the regressor gives \[nan\]"):
        StatisticPredictions(stage).prepare()


def test_bad_arguments(datalist, tmp_path):
    stage = stage_of(datalist, tmp_path)
    for options, message in [
        ({"margin_from": "width"}, "margin_from: expected"),
        ({"margin": -1}, "margin"),
        ({"coverage": 1}, "coverage: expected a share"),
    ]:
        with pytest.raises(ValueError, match=message):
            StatisticPredictions(stage, **options)
    with pytest.raises(ValueError, match="'uncertainty' needs a regressor that learns it"):
        StatisticPredictions(stage_of(datalist, tmp_path, spread=False), margin_from="uncertainty")
    with pytest.raises(ValueError, match=r"items: expected.*none under \['held_back'\]"):
        RegressionStage(
            regressor=stage.regressor, items={"labelled": [], "unlabelled": []}, preprocessing=[], output_dir=tmp_path
        )


def test_explained_variance():
    target = torch.tensor([[1.0, 5.0], [2.0, 5.0], [6.0, torch.nan]])
    assert explained(target.nan_to_num(9), target) == 1  # what does not vary, or is not known, does not count
    assert explained(torch.full((3, 2), 3.0), target) == 0
    # Of what does not vary, as one image, the better of two is still the better.
    assert explained(torch.zeros(2, 1), torch.ones(2, 1)) == -1
    assert explained(torch.full((1, 1), 0.5), torch.ones(1, 1)) == -0.25
