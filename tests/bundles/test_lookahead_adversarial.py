"""The bundle lookahead_adversarial from end to end: a start, the search and its control, and its rivals."""

import json

import pytest
import torch

from medconstraints.synthetic import make_cohort

TINY = {
    "device": "$torch.device('cpu')",
    "num_classes": 3,
    "patch_size": [24, 24, 16],
    "spacing_mm": [-1, -1, -1],
    "network_def#channels": [4, 8],
    "network_def#strides": [2],
    "batch_size": 2,
    "num_workers": 0,
    "seed": 3,
}
SEARCH = {
    **TINY,
    "epochs": 8,
    "eval_every": 1,
    "discriminator_def#body#channels": 4,
    "discriminator_def#body#num_layers_d": 1,
    "searches#adversary#patience": 2,
    "searches#adversary#max_cycles": 2,
    "train#trainer#discriminator_steps": 3,
}


@pytest.fixture(scope="module")
def bundle(bundles_root):
    return bundles_root / "lookahead_adversarial"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Datalist of 4 training, 5 hold-out, 5 confirm and 5 test phantoms."""
    counts = {"num_training": 4, "num_validation": 10, "num_test": 5}
    path = make_cohort(tmp_path_factory.mktemp("parts"), shape=(24, 24, 16), num_classes=2, **counts)
    content = json.loads(path.read_text())
    content["confirm"], content["validation"] = content["validation"][5:], content["validation"][:5]
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def start(bundle, run_bundle, cohort, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    run_bundle(bundle, ["train", "pretrain"], datalist=cohort, output_dir=folder, epochs=2, val_interval=1, **TINY)
    return folder / "model.pt"


def test_a_search_its_control_and_an_exact_resume(bundle, run_bundle, cohort, start, cut_off, read_table, tmp_path):
    given = {"datalist": cohort, "start_checkpoint": start, **SEARCH}
    run_bundle(bundle, output_dir=tmp_path / "whole", **given)
    with pytest.raises(Exception, match=r"cut off|Failed"):
        run_bundle(bundle, output_dir=tmp_path / "cut", before_run=cut_off(3, 3), **given)
    run_bundle(bundle, output_dir=tmp_path / "cut", **given)
    for name in ("cycles.csv", "report.json"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "cut" / name).read_text()
    rows = read_table(tmp_path / "whole/cycles.csv")
    assert [row["search"] for row in rows] == ["adversary"] * 5 + ["noise"] * 5
    report = json.loads((tmp_path / "whole/report.json").read_text())
    assert report["patients"] == 5 and {*report["differences"]} == {"after", "control"}
    assert (
        len(report["scores"]["before"]["val_mean_iou"]["of_classes"]) == 2
        and "val_hd95_voxels" in report["scores"]["after"]
    )
    assert {*report["structure"]} == {"before", "after", "control", "label"}
    assert report["structure"]["label"] == {"pieces": 0, "holes": 0}
    weights, first = (torch.load(path, weights_only=True) for path in (tmp_path / "whole/best.pt", start))
    assert all(torch.equal(weights[name], first[name]) for name in first) == (not report["accepted_peaks"]["adversary"])
    assert (tmp_path / "whole/cycles.png").stat().st_size > 1000 and not (tmp_path / "whole/model.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("overlays", [["alternating"], ["hybrid"], ["alternating", "hybrid"], ["published"]])
def test_what_it_is_compared_with(overlays, bundle, run_bundle, cohort, start, tmp_path):
    given = {"datalist": cohort, "start_checkpoint": start, "output_dir": tmp_path, **SEARCH, "epochs": 4}
    run_bundle(bundle, ["train", *overlays], **given)
    assert json.loads((tmp_path / "report.json").read_text())["verdict"]


@pytest.mark.parametrize("adversarial_weight", [1.0, 0.0])
def test_constraints_beside_and_in_place_of_the_adversary(
    adversarial_weight, bundle, run_bundle, cohort, start, read_table, tmp_path
):
    """Three axes, of a relation of the phantoms' two classes; without an adversary no discriminator is trained."""
    given = {"datalist": cohort, "start_checkpoint": start, "output_dir": tmp_path, **SEARCH, "epochs": 4}
    relation = {"relation#pairs": [[2, 1]], "relation_bounds": [[[0.0, 0.02]] * 3], "enclosed": [[2, 1]]}
    weight = {"train#trainer#adversarial_weight": adversarial_weight}
    workflow = run_bundle(bundle, ["train", "constraints"], **given, **relation, **weight)
    assert workflow.trainer.loss_function.losses["relation"].last is not None
    rows = read_table(tmp_path / "cycles.csv")
    assert {row["discriminator_accuracy"] == "" for row in rows[1:]} == {adversarial_weight == 0}
    assert "implausible" in json.loads((tmp_path / "report.json").read_text())["structure"]["after"]


def test_a_start_of_another_network_names_its_layers(bundle, run_bundle, cohort, start, messages, tmp_path):
    given = {"datalist": cohort, "start_checkpoint": start, **SEARCH, "network_def#channels": [6, 8]}
    with pytest.raises(RuntimeError) as caught:
        run_bundle(bundle, output_dir=tmp_path, **given)
    assert "size mismatch for model.0" in messages(caught.value)


@pytest.mark.parametrize("section", ["confirm", "validation"])
def test_a_part_that_is_too_small_is_named(section, bundle, run_bundle, cohort, start, copy_cohort, messages, tmp_path):
    datalist = copy_cohort(
        cohort, tmp_path / "data", lambda folder, content: content.update({section: content[section][:2]})
    )
    with pytest.raises(Exception) as caught:
        run_bundle(bundle, datalist=datalist, start_checkpoint=start, output_dir=tmp_path / "run", **SEARCH)
    assert f"{'holdout' if section == 'validation' else section}: expected at least 5 patients" in messages(
        caught.value
    )
