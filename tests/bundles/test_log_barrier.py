"""The bundle log_barrier from end to end, on tiny phantoms and discs: each formulation of sizes and centroids."""

import numpy as np
import pytest
import torch

from medconstraints.synthetic import make_discs

SHAPE = (24, 24, 16)
# All that a test depends on; the configs' own values may change.
NETWORK = {
    "_target_": "UNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": "@num_classes",
    "channels": [4, 8],
    "strides": [2],
    "dropout": 0.1,
}
TRAIN = {
    "device": "$torch.device('cpu')",
    "num_classes": 3,
    "patch_size": SHAPE,  # whole volumes: no crop changes a size
    "spacing_mm": [-1, -1, -1],
    "network_def": NETWORK,
    "epochs": 2,
    "val_interval": 1,
    "batch_size": 2,
    "num_workers": 0,
    "weak_source": "points",
    "train#preprocessing#weak_labels#radius_voxels": 2,
    "train#preprocessing#size_bounds#relative_margin": 0.25,
    "train#preprocessing#centroid_bounds#margin": 2,
    "size_weight": 0.01,
    "centroid_weight": 0.01,
    "seed": 3,
}
# toy.json: whole images of two discs.
TOY = TRAIN | {"num_classes": 2, "network_def": NETWORK | {"spatial_dims": 2}, "val_interval": 1}
BASELINES = {
    "baselines#relu_lagrangian#learning_rate": 0.01,
    "baselines#lagrangian#learning_rate": 0.01,
    "baselines#augmented_lagrangian#penalty": 0.01,
}
NAMES = ("log_barrier", "penalty", "relu_lagrangian", "lagrangian", "augmented_lagrangian")
LOSSES = ("size", "centroid")


@pytest.fixture(scope="module")
def bundle(bundles_root):
    return bundles_root / "log_barrier"


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    """Datalist of 4 + 3 + 1 images of 64 x 64 pixels."""
    counts = {"num_training": 4, "num_validation": 3, "num_test": 1}
    return make_discs(tmp_path_factory.mktemp("discs"), size=64, max_noise=30, **counts)


@pytest.fixture(scope="module")
def formulated(bundle, run_bundle, two_class_cohort, tmp_path_factory):
    """Train two epochs with a formulation, once; returns the output folder, the workflow and the residuals.

    The residuals of a loss are one list for each epoch, of (index (B,), residual (B, constraints)) of its batches.
    """
    runs = {}

    def run(name):
        if name in runs:
            return runs[name]
        output, residuals = tmp_path_factory.mktemp(name), {loss: [] for loss in LOSSES}

        def look(workflow):
            for name in LOSSES:
                loss = workflow.parser.get_parsed_content("loss").losses[name]
                loss.register_forward_hook(
                    lambda loss, given, cost, name=name: residuals[name].append(
                        (given[1]["index"], loss.last.residual.flatten(1))
                    )
                )

        options = TRAIN | {"dataset_dir": two_class_cohort.parent, "output_dir": output}
        configs, more = with_formulation(name)
        workflow = run_bundle(bundle, configs, before_run=look, **options | more)
        residuals = {loss: [found[:2], found[2:]] for loss, found in residuals.items()}
        runs[name] = output, workflow, residuals
        return runs[name]

    return run


def with_formulation(name, *overlays):
    """Configs and options that train with a formulation: the method's own, or one of the baselines."""
    if name == "log_barrier":
        return ["train", *overlays], {}
    return ["train", *overlays, "baselines"], BASELINES | {"baseline": name}


def loss_state(folder):
    return torch.load(folder / "last.pt", weights_only=True)["objects"]["loss"]


def means(batches):
    """Mean residual of each of the four samples, (4, constraints)."""
    index, residual = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert sorted(index.tolist()) == [0, 1, 2, 3]
    return residual[index.argsort()]


def multipliers_by_hand(name, epochs):
    """What the dual steps of two epochs make of the residuals (Kervadec 2020, section 3.2)."""
    table = torch.zeros(1 if name == "relu_lagrangian" else 4, epochs[0][0][1].shape[1])
    for batches in epochs:
        residual = means(batches)
        if name == "relu_lagrangian":
            residual = residual.clamp(min=0).sum(0, keepdim=True)
        table = (table + 0.01 * residual).clamp(min=0)
    return table


# Formulations


def test_every_formulation_of_the_config_is_tested(bundle, parsed, two_class_cohort):
    found = parsed(bundle, ["train", "baselines"], "baselines", dataset_dir=two_class_cohort.parent)
    assert sorted(["log_barrier", *found]) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_formulation_moves_and_is_saved(formulated, read_table, name):
    output, workflow, residuals = formulated(name)
    losses = workflow.parser.get_parsed_content("loss").losses
    size, centroid = (losses[loss].formulation for loss in LOSSES)
    assert size is not centroid or not size.has_multipliers
    assert type(size) is type(centroid)
    state, rows = loss_state(output), read_table(output / "constraints.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for loss in LOSSES:
        saved = {key: value for key, value in state.items() if key.startswith(f"losses.{loss}.")}
        if name == "penalty":
            assert saved == {}
        elif name == "log_barrier":
            assert [float(row["train_t"]) for row in rows] == pytest.approx([5.0, 5.5])
            assert float(saved[f"losses.{loss}.formulation.t"]) == pytest.approx(6.05)
        else:
            found = saved[f"losses.{loss}.formulation.multipliers"]
            # 2 classes, 1 size or 3 coordinates, a lower and an upper bound
            assert found.shape == (1 if name == "relu_lagrangian" else 4, 4 if loss == "size" else 12)
            torch.testing.assert_close(found, multipliers_by_hand(name, residuals[loss]))
            assert [float(row[f"train_multiplier_max_{loss}"]) > 0 for row in rows] == [False, True]
    assert {"last.pt", "model.pt", "tensorboard"} <= {path.name for path in output.iterdir()}


def test_formulations_end_with_different_weights(formulated):
    """The same seed and data, and no two formulations alike."""
    ends = [torch.load(formulated(name)[0] / "last.pt", weights_only=True)["objects"]["network"] for name in NAMES]
    vectors = [torch.cat([value.flatten().float() for value in end.values()]) for end in ends]
    for i, one in enumerate(vectors):
        assert all(not torch.equal(one, other) for other in vectors[:i])


def test_another_formulation_does_not_take_the_run_over(formulated, bundle, run_bundle, two_class_cohort, messages):
    output = formulated("penalty")[0]
    before = (output / "last.pt").read_bytes()
    for change, expected in (
        ({"baseline": "lagrangian"}, "baseline was 'penalty', is 'lagrangian'"),
        ({"train#preprocessing#centroid_bounds#margin": 3}, "train#preprocessing#centroid_bounds#margin was 2, is 3"),
    ):
        configs, more = with_formulation("penalty")
        options = TRAIN | {"dataset_dir": two_class_cohort.parent, "output_dir": output, "epochs": 3} | more | change
        with pytest.raises(RuntimeError, match="Failed to") as caught:
            run_bundle(bundle, configs, **options)
        assert f"last.pt: belongs to a run with other settings: {expected}" in messages(caught.value)
    assert (output / "last.pt").read_bytes() == before


def test_an_unknown_formulation_is_named(bundle, run_bundle, two_class_cohort, tmp_path, messages):
    options = {"dataset_dir": two_class_cohort.parent, "output_dir": tmp_path, "baseline": "barrier"}
    with pytest.raises(RuntimeError, match="Failed to") as caught:
        run_bundle(bundle, ["train", "baselines"], **TRAIN | options)
    assert not (tmp_path / "last.pt").exists()
    assert "'barrier'" in messages(caught.value)


# Bounds


def test_bounds_belong_to_the_augmented_label(bundle, parsed, two_class_cohort):
    """Cropped, padded and flipped: sizes and centroids are those of what the network gets."""
    keys = ["image", "label", "weak_label", "size_bounds", "centroid_bounds", "index"]
    keep = {"_target_": "SelectItemsd", "keys": keys}
    options = TRAIN | {"patch_size": [20, 28, 12], "train#preprocessing#selection": keep}
    dataset = parsed(bundle, "train", "train#dataset", dataset_dir=two_class_cohort.parent, **options)
    seen = set()
    for _ in range(3):
        for item in dataset:
            label = np.asarray(item["label"])[0]
            for cls in (1, 2):
                voxels = np.argwhere(label == cls)
                size = [0.75 * len(voxels), 1.25 * len(voxels)]
                np.testing.assert_allclose(item["size_bounds"][cls, 0], size, rtol=1e-5)
                centre = voxels.mean(0)
                seen.add(tuple(centre.round(2)))
                expected = np.stack([np.maximum(centre - 2, 0), centre + 2], axis=-1)
                np.testing.assert_allclose(item["centroid_bounds"][cls], expected, rtol=1e-4)
    assert len(seen) > 8  # 4 items of 2 classes: they moved


@pytest.mark.parametrize("fully_labelled", [0, 3])
def test_whole_labels_leave_sizes_and_centroids_free(bundle, parsed, two_class_cohort, fully_labelled):
    options = TRAIN | {"dataset_dir": two_class_cohort.parent, "fully_labelled": fully_labelled}
    for item in parsed(bundle, "train", "train#dataset", **options):
        whole = item["index"] < fully_labelled
        assert bool((item["weak_label"] >= 0).all()) == whole
        assert item["centroid_bounds"].shape == (3, 3, 2)
        for key in ("size_bounds", "centroid_bounds"):
            assert bool(torch.isinf(item[key][0]).all())
            assert bool(torch.isinf(item[key][1:]).any()) == whole


# A run that is killed


@pytest.mark.parametrize("overlay", ["", "toy"])
def test_lagrangians_resume_exactly(
    bundle, run_bundle, two_class_cohort, discs, cut_off, messages, read_table, tmp_path, overlay
):
    """Bitwise: weights, multipliers, and the tables of training and, in toy.json, of validation."""
    datalist, base = (discs, TOY) if overlay else (two_class_cohort, TRAIN)
    configs, more = with_formulation("lagrangian", *([overlay] if overlay else []))
    base = base | {"dataset_dir": datalist.parent, "epochs": 3} | more
    run_bundle(bundle, configs, output_dir=tmp_path / "whole", **base)
    with pytest.raises(RuntimeError, match="trainer") as caught:
        run_bundle(bundle, configs, output_dir=tmp_path / "cut", before_run=cut_off(2, 3), **base)
    assert "InterruptedError: cut off" in messages(caught.value)
    assert torch.load(tmp_path / "cut" / "last.pt", weights_only=True)["trainer"]["epoch"] == 1
    again = run_bundle(bundle, configs, output_dir=tmp_path / "cut", **base)
    assert again.trainer.state.epoch == 3
    one, two = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "cut"))
    for part in ("network", "loss"):
        one_part, two_part = one["objects"][part], two["objects"][part]
        assert one_part.keys() == two_part.keys()
        assert all(torch.equal(value, two_part[key]) for key, value in one_part.items())
    assert one["evaluator"] == two["evaluator"]
    for loss in LOSSES:
        assert float(one["objects"]["loss"][f"losses.{loss}.formulation.multipliers"].max()) > 0
    for name in ["constraints.csv", *["validation.csv"] * bool(overlay)]:
        whole, cut = (read_table(tmp_path / folder / name) for folder in ("whole", "cut"))
        assert [row["epoch"] for row in whole] == ["1", "2", "3"]
        assert whole == cut, name
        column = "train_stability" if name == "constraints.csv" else "stability"
        assert whole[0][column] == "" != whole[1][column]


# Overlays


@pytest.fixture(scope="module")
def toy(bundle, run_bundle, discs, tmp_path_factory):
    """Output folder, workflow, and (logits' shape, target) of each batch of two epochs."""
    output, got = tmp_path_factory.mktemp("toy"), []

    def look(workflow):
        loss = workflow.parser.get_parsed_content("loss")
        loss.register_forward_pre_hook(lambda module, given: got.append((given[0].shape, given[1])))

    options = TOY | {"dataset_dir": discs.parent, "output_dir": output}
    return output, run_bundle(bundle, ["train", "toy"], before_run=look, **options), got


def test_discs_are_learned_from_size_and_centroid_alone(toy):
    _, workflow, got = toy
    loss = workflow.parser.get_parsed_content("loss")
    assert sorted(loss.losses) == ["centroid", "size"]
    assert [loss.losses[name].logit_scale for name in LOSSES] == [5, 5]
    assert [loss.losses[name].normalization for name in LOSSES] == ["image_size", "none"]
    assert len(got) == 4
    for shape, target in got:
        assert shape == (2, 2, 64, 64)
        size, centroid = target["size_bounds"][:, 1], target["centroid_bounds"][:, 1]
        # All discs have the radius 25 / 256 of the image's side; their centres are whole pixels.
        true = size.mean(-1)
        assert true[:, 0].tolist() == pytest.approx([np.pi * 6.25**2] * 2, rel=0.05)
        torch.testing.assert_close(size, true[..., None] * torch.tensor([0.75, 1.25]))
        centre = centroid.mean(-1)
        torch.testing.assert_close(centre, centre.round())
        torch.testing.assert_close(centroid, centre[..., None] + torch.tensor([-2.0, 2.0]))


def test_validation_of_discs(toy, read_table):
    output = toy[0]
    rows, state = read_table(output / "validation.csv"), torch.load(output / "last.pt", weights_only=True)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    dice = [float(row["val_mean_dice"]) for row in rows]
    assert all(0 <= value <= 1 for value in dice)
    assert state["evaluator"]["best_metric"] == pytest.approx(max(dice))
    for row in rows:
        shares = [float(row[f"satisfied_{loss}"]) for loss in LOSSES]
        # 3 images with 2 bounds of the size, 4 of the centroid
        assert shares == [round(share * count) / count for share, count in zip(shares, (6, 12), strict=True)]
        assert float(row["satisfied"]) == pytest.approx(shares[0] / 3 + shares[1] * 2 / 3)
    assert not [key for key in rows[0] if key.startswith(("t_", "duality", "multiplier"))]


def test_full_supervision(bundle, run_bundle, two_class_cohort, tmp_path):
    """Every voxel is labelled, and nothing else is asked for: the constraints have no weight and are not computed."""
    got = []

    def look(workflow):
        loss = workflow.parser.get_parsed_content("loss")
        loss.register_forward_pre_hook(lambda module, given: got.append((module, given[1])))

    left_to_the_overlay = ("weak_source", "size_weight", "centroid_weight")
    base = {key: value for key, value in TRAIN.items() if key not in left_to_the_overlay} | {"epochs": 1}
    options = {"dataset_dir": two_class_cohort.parent, "output_dir": tmp_path}
    run_bundle(bundle, ["train", "full_supervision"], before_run=look, **base | options)
    assert len(got) == 2
    for loss, target in got:
        assert loss.weights == {"partial_ce": 1, "size": 0, "centroid": 0}
        assert loss.losses["size"].last is None
        assert bool((target["weak_label"] >= 0).all())
    assert {"last.pt", "model.pt"} <= {path.name for path in tmp_path.iterdir()}
