"""The bundle curriculum_size from end to end: both stages in one run and alone, and what it is compared with."""

import json

import pytest
import torch

TINY = {
    "device": "$torch.device('cpu')",
    "num_classes": 3,
    "patch_size": [24, 24, 16],
    "spacing_mm": [-1, -1, -1],
    "network_def#channels": [4, 8],
    "network_def#strides": [2],
    "regressor_def#backbone#channels": [4, 8],
    "regressor_def#features": 8,
    "regressor_epochs": 2,
    "regression#repeats": 1,
    "regression#val_interval": 1,
    "fully_labelled": 2,
    "batch_size": 1,
    "epochs": 2,
    "val_interval": 1,
    "num_workers": 0,
    "seed": 3,
}


@pytest.fixture(scope="module")
def bundle(bundles_root):
    return bundles_root / "curriculum_size"


@pytest.fixture(scope="module")
def regressor_dir(bundle, run_bundle, two_class_cohort, tmp_path_factory):
    """Folder of a regressor, trained alone."""
    folder = tmp_path_factory.mktemp("stage")
    run_bundle(bundle, ["train", "regressor"], datalist=two_class_cohort, output_dir=folder, **TINY)
    assert not (folder / "model.pt").exists()
    return folder / "regressor"


def test_both_stages_in_one_run_and_an_exact_resume(bundle, run_bundle, two_class_cohort, cut_off, tmp_path):
    # Both make the segmentation's trainer before the regressor's, as `cut_off` does: the first weights depend on it.
    whole = {"output_dir": tmp_path / "whole", "before_run": lambda workflow: workflow.trainer}
    run_bundle(bundle, datalist=two_class_cohort, **whole, **TINY)
    with pytest.raises(Exception, match=r"cut off|Failed"):
        run_bundle(bundle, datalist=two_class_cohort, output_dir=tmp_path / "cut", before_run=cut_off(2, 3), **TINY)
    run_bundle(bundle, datalist=two_class_cohort, output_dir=tmp_path / "cut", **TINY)
    for name in ("last.pt", "regressor/last.pt"):
        states = [
            torch.load(tmp_path / run / name, weights_only=True)["objects"]["network"] for run in ("whole", "cut")
        ]
        torch.testing.assert_close(*states, rtol=0, atol=0)
    content = json.loads((tmp_path / "whole/regressor/predictions.json").read_text())
    assert len(content["unlabelled"]) == 2 and content["names"] == ["size 1", "size 2"]
    assert all("mean_absolute_error_ml" in entry for entry in content["held_back"].values())


def test_stages_alone_share_a_regressor(bundle, run_bundle, two_class_cohort, regressor_dir, tmp_path):
    made = (regressor_dir / "predictions.json").stat().st_mtime_ns
    for margin_from in ("value", "error", "uncertainty"):
        given = {"regressor_dir": regressor_dir, "margin_from": margin_from, "output_dir": tmp_path / margin_from}
        workflow = run_bundle(bundle, ["train", "segmentation"], datalist=two_class_cohort, **TINY, **given)
        assert workflow.trainer.loss_function.losses["size"].last is not None
    assert (regressor_dir / "predictions.json").stat().st_mtime_ns == made


def test_the_unsegmented_half_of_a_batch_is_bounded_and_the_other_half_is_labelled(
    bundle, run_bundle, two_class_cohort, regressor_dir, tmp_path
):
    given = {**TINY, "regressor_dir": regressor_dir, "output_dir": tmp_path}
    workflow = run_bundle(bundle, ["train", "segmentation"], datalist=two_class_cohort, **given)
    batch = next(iter(workflow.trainer.data_loader))
    assert torch.isinf(batch["size_bounds"][0]).all() and torch.isfinite(batch["size_bounds"][1, 1:]).all()
    assert (batch["weak_label"][0] >= 0).all() and (batch["weak_label"][1] == -1).all()


def test_size_and_centroid(bundle, run_bundle, two_class_cohort, tmp_path):
    workflow = run_bundle(bundle, ["train", "centroid"], datalist=two_class_cohort, output_dir=tmp_path, **TINY)
    assert {*workflow.trainer.loss_function.losses} == {"ce", "size", "centroid"}
    content = json.loads((tmp_path / "regressor/predictions.json").read_text())
    assert len(content["unlabelled"][0]["values"]) == 8


@pytest.mark.parametrize("supervision", ["labelled", "oracle", "mean_teacher"])
def test_what_it_is_compared_with(supervision, bundle, run_bundle, two_class_cohort, tmp_path):
    """None of them trains a regressor."""
    overlays = ["mean_teacher"] if supervision == "mean_teacher" else []
    given = {**TINY, "output_dir": tmp_path} | ({} if overlays else {"supervision": supervision})
    workflow = run_bundle(bundle, ["train", *overlays], datalist=two_class_cohort, **given)
    assert (tmp_path / "model.pt").exists() and not (tmp_path / "regressor").exists()
    batch = next(iter(workflow.trainer.data_loader))
    assert (batch["weak_label"][1] == -1).all().item() == (supervision != "labelled")
    if overlays:
        teacher, student = workflow.evaluator.network, workflow.trainer.network
        assert teacher is not student
        saved = torch.load(tmp_path / "last.pt", weights_only=True)["objects"]["teacher"]
        torch.testing.assert_close(saved, teacher.state_dict())


def test_all_labels(bundle, run_bundle, two_class_cohort, tmp_path):
    given = {**TINY, "fully_labelled": None, "supervision": "labelled", "output_dir": tmp_path}
    workflow = run_bundle(bundle, datalist=two_class_cohort, **given)
    assert (next(iter(workflow.trainer.data_loader))["weak_label"] >= 0).all()


def test_proposals_of_a_labelled_run(bundle, run_bundle, two_class_cohort, tmp_path):
    given = {name: TINY[name] for name in ("device", "num_classes", "patch_size", "spacing_mm")}
    given |= {name: value for name, value in TINY.items() if name.startswith("network_def")}
    run_bundle(
        bundle, datalist=two_class_cohort, output_dir=tmp_path / "labelled", **(TINY | {"supervision": "labelled"})
    )
    masks = {"ckpt_path": tmp_path / "labelled/model.pt", "output_dir": tmp_path / "masks", "section": "training"}
    run_bundle(bundle, "inference", dataset_dir=two_class_cohort, **given, **masks)
    options = TINY | {"supervision": "proposals", "proposals_dir": tmp_path / "masks", "output_dir": tmp_path / "run"}
    workflow = run_bundle(bundle, datalist=two_class_cohort, **options)
    assert (next(iter(workflow.trainer.data_loader))["weak_label"] >= 0).all()


def test_slices_of_volumes(bundle, run_bundle, two_class_cohort, tmp_path):
    """The phantoms' two classes stand for those of a heart: class 3, the ventricle, is absent and so is made of 1."""
    given = {name: value for name, value in TINY.items() if name not in ("patch_size", "num_classes", "batch_size")}
    given |= {"patch_size": [24, 24], "num_classes": 3, "reading#num_classes": 3, "spacing_mm": [-1, -1, -1]}
    workflow = run_bundle(
        bundle,
        ["train", "slices"],
        datalist=two_class_cohort,
        output_dir=tmp_path,
        **given,
        **{"framing#0#orig_labels": [0, 1, 2], "framing#0#target_labels": [0, 1, 2]},
    )
    content = json.loads((tmp_path / "regressor/predictions.json").read_text())
    assert len(content["unlabelled"]) == 32 and {row["slice"] for row in content["unlabelled"]} == {*range(16)}
    assert next(iter(workflow.trainer.data_loader))["image"].shape[1:] == (1, 24, 24)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fully_labelled": 0}, "fully_labelled"),
        ({"fully_labelled": 5}, "fully_labelled: expected 1 to 4"),
        ({"supervision": "proposals"}, "phantom_002.nii.gz has none; set --proposals_dir"),
    ],
)
def test_bad_settings_are_named(options, words, bundle, run_bundle, two_class_cohort, messages, tmp_path):
    with pytest.raises(Exception) as caught:
        run_bundle(bundle, datalist=two_class_cohort, **(TINY | {"output_dir": tmp_path} | options))
    assert words in messages(caught.value)


def test_no_regressor_yet(bundle, run_bundle, two_class_cohort, messages, tmp_path):
    with pytest.raises(Exception) as caught:
        run_bundle(bundle, ["train", "segmentation"], datalist=two_class_cohort, output_dir=tmp_path, **TINY)
    assert "no weights of the regressor" in messages(caught.value)
