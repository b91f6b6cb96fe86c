"""The bundle boundary_loss from end to end, on tiny phantoms: each regional loss, distance loss, schedule and map."""

import csv
import re
from pathlib import Path

import monai.losses
import nibabel as nib
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medconstraints import losses
from medconstraints.distance import signed_distance_map

SHAPE = (24, 24, 16)
# All that a test depends on; the configs' own values may change.
TRAIN = {
    "device": "$torch.device('cpu')",
    "num_classes": 3,
    "patch_size": SHAPE,
    "spacing_mm": [-1, -1, -1],
    "network_def": {
        "_target_": "UNet",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": "@num_classes",
        "channels": [4, 8],
        "strides": [2],
        "dropout": 0.1,
    },
    "epochs": 2,
    "val_interval": 2,
    "batch_size": 2,
    "num_workers": 0,
    "slice_axis": None,
    "convention": "boundary",
    "clip_mm": None,
    "schedule": "rebalance",
    "alpha": 0.25,
    "alpha_increment": 0.5,
    "unit_mm": 1.0,
    "boundary_background": False,
    "seed": 3,
}
CONFIGS = ["train", "comparators"]
EVALUATE = {key: value for key, value in TRAIN.items() if key not in ("epochs", "val_interval")}
INFER = {key: TRAIN[key] for key in ("device", "num_classes", "patch_size", "spacing_mm", "network_def")}
REGIONAL = {
    "generalized_dice": losses.GeneralizedDiceLoss,
    "cross_entropy": losses.PartialCrossEntropyLoss,
    "focal": monai.losses.FocalLoss,
    "distance_weighted": losses.DistanceWeightedCrossEntropyLoss,
}
DISTANCE = {"boundary": losses.BoundaryLoss, "hausdorff": losses.HausdorffLoss}
# Weights of the regional and of the boundary loss in two epochs, alpha = 0.25 and 0.25 + 0.5.
SCHEDULES = {
    "none": [(1.0, 0.0), (1.0, 0.0)],
    "constant": [(1.0, 0.25), (1.0, 0.25)],
    "increase": [(1.0, 0.25), (1.0, 0.75)],
    "rebalance": [(0.75, 0.25), (0.25, 0.75)],
    "alone": [(0.0, 1.0), (0.0, 1.0)],
}
BATCHES = 2  # of an epoch
MAP, PARTS = (2, 3, *SHAPE), {"label", "distance_map", "spacing_mm"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Two threads wait for each other longer than they need for volumes of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bundle(bundles_root):
    return bundles_root / "boundary_loss"


@pytest.fixture(scope="module")
def dataset_dir(two_class_cohort):
    return two_class_cohort.parent


@pytest.fixture(scope="module")
def trained(bundle, run_bundle, dataset_dir, tmp_path_factory):
    """Train two epochs with some options, once; returns the output folder, the loss and what its parts got.

    That is one dictionary for each iteration: name of a part that was computed -> (its target, its weight).
    """
    runs = {}

    def run(**options):
        name = tuple(sorted(options.items()))
        if name not in runs:
            output, seen, found = tmp_path_factory.mktemp("run"), [], []

            def look(workflow):
                loss = workflow.parser.get_parsed_content("loss")
                found.append(loss)
                loss.register_forward_pre_hook(lambda *_: seen.append({}))
                for part, own in loss.losses.items():
                    own.register_forward_pre_hook(
                        lambda _, given, part=part: seen[-1].update({part: (given[1], loss.weights[part])})
                    )

            run_bundle(bundle, CONFIGS, before_run=look, dataset_dir=dataset_dir, output_dir=output, **TRAIN | options)
            runs[name] = output, found[0], seen
        return runs[name]

    return run


def state_of(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def vector_of(folder):
    return torch.cat([value.flatten().float() for value in state_of(folder)["objects"]["network"].values()])


def scalars(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def plain(tensor):
    return np.asarray(torch.as_tensor(tensor))


# One value of the config


def test_every_choice_of_the_config_is_tested(bundle, parsed, dataset_dir):
    for name, known in (("regional_losses", REGIONAL), ("distance_losses", DISTANCE)):
        found = parsed(bundle, CONFIGS, name, dataset_dir=dataset_dir)
        assert {key: type(loss) for key, loss in found.items()} == known


def test_the_focal_loss_is_the_published_sum_over_the_classes(bundle, parsed, dataset_dir):
    """Lin 2017, eq. 4: of each voxel -(1 - p)^2 log p of its own class; then the mean over the voxels."""
    focal = parsed(bundle, CONFIGS, "regional_losses", dataset_dir=dataset_dir)["focal"]
    num_classes = parsed(bundle, CONFIGS, "num_classes", dataset_dir=dataset_dir)
    logits = torch.randn(2, num_classes, 5, 4, 3)
    label = torch.randint(0, num_classes, (2, 1, 5, 4, 3))
    own = torch.softmax(logits, 1).gather(1, label)
    expected = -((1 - own) ** 2 * own.log()).mean()
    torch.testing.assert_close(focal(logits, label), expected)


@pytest.mark.parametrize("regional", REGIONAL)
def test_regional_losses(trained, regional):
    output, loss, seen = trained(regional=regional)
    assert type(loss.losses["regional"]) is REGIONAL[regional]
    assert type(loss.losses["boundary"]) is losses.BoundaryLoss
    assert len(seen) == 2 * BATCHES
    for parts in seen:
        target, distance_map = parts["regional"][0], parts["boundary"][0]
        assert distance_map.shape == MAP
        if regional == "distance_weighted":
            assert set(target) >= {"label", "distance_map"}
            target = target["label"]
        assert target.shape == (2, 1, *SHAPE)
        inside = distance_map.gather(1, target.long())
        assert bool((inside <= 0).all() and (inside < 0).any())  # the map is that of this label
    assert {"last.pt", "model.pt", "tensorboard"} <= {path.name for path in output.iterdir()}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_and_what_is_logged(trained, schedule):
    """The weights hold from the first iteration of an epoch on, and a loss of weight 0 is not computed."""
    output, _, seen = trained(schedule=schedule)
    assert len(seen) == 2 * BATCHES
    for number, parts in enumerate(seen):
        expected = dict(zip(("regional", "boundary"), SCHEDULES[schedule][number // BATCHES], strict=True))
        assert {part: weight for part, (_, weight) in parts.items()} == {
            part: weight for part, weight in expected.items() if weight
        }
    found = scalars(output)
    for column, part in enumerate(("regional", "boundary")):
        weights = [row[column] for row in SCHEDULES[schedule]]
        assert found[f"train_weight_{part}"] == pytest.approx(weights)
        assert (f"train_{part}" in found) == any(weights)
    assert bool(torch.isfinite(vector_of(output)).all())


def test_hausdorff(trained, dataset_dir):
    _, loss, seen = trained(distance="hausdorff", regional="generalized_dice")
    assert type(loss.losses["boundary"]) is losses.HausdorffLoss
    spacings = []
    for parts in seen[:BATCHES]:
        target = parts["boundary"][0]
        assert set(target) == PARTS
        assert target["distance_map"].shape == MAP
        spacings += target["spacing_mm"].tolist()
    expected = sorted(spacing for _, spacing in labels_of(dataset_dir))  # of each file its own
    np.testing.assert_allclose(sorted(map(tuple, spacings)), expected, rtol=1e-4)


def test_choices_end_with_different_weights(trained):
    """The same seed and data, and no two losses or schedules alike."""
    options = [{"regional": name} for name in REGIONAL] + [{"schedule": name} for name in SCHEDULES]
    options += [{"distance": "hausdorff", "regional": "generalized_dice"}]
    runs = {str(trained(**one)[0]): one for one in options}
    # "rebalance" and generalised Dice are the values of TRAIN: trained twice, and the same to the last digit.
    default, again = vector_of(trained(regional="generalized_dice")[0]), vector_of(trained(schedule="rebalance")[0])
    assert torch.equal(default, again)
    vectors = [vector_of(Path(output)) for output, one in runs.items() if one != {"schedule": "rebalance"}]
    assert len(vectors) == len(options) - 1
    for number, one in enumerate(vectors):
        assert all(not torch.equal(one, other) for other in vectors[:number])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"regional": "dice"}, r"'dice'"),
        ({"distance": "euclidean"}, r"'euclidean'"),
        ({"schedule": "linear"}, r"schedule: expected one of \['alone', .*\], got 'linear'"),
        ({"alpha": -1.0}, r"alpha: expected a finite number >= 0, got -1"),
        ({"convention": "edge"}, r"convention: expected one of boundary, voxel, published, got 'edge'"),
        ({"unit_mm": 0}, r"unit_mm: expected a finite number > 0"),
        ({"slice_axis": 3}, r"slice_axis: expected None, or the axis 0, 1 or 2"),
    ],
)
def test_wrong_values_are_named(bundle, run_bundle, dataset_dir, tmp_path, messages, change, words):
    with pytest.raises(RuntimeError, match="Failed to") as caught:
        run_bundle(bundle, CONFIGS, **TRAIN | {"dataset_dir": dataset_dir, "output_dir": tmp_path} | change)
    assert not (tmp_path / "last.pt").exists()
    assert re.search(words, messages(caught.value)), messages(caught.value)


# Maps


def labels_of(dataset_dir):
    """Labels of the training volumes as arrays, in RAS, and their spacings."""
    paths = sorted((dataset_dir / "labelsTr").iterdir())[:4]
    labels = [nib.as_closest_canonical(nib.load(path)) for path in paths]
    return [(np.asarray(label.dataobj), tuple(map(float, label.header.get_zooms()))) for label in labels]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"slice_axis": 2},
        {"convention": "voxel", "clip_mm": 2.5},
        {"convention": "published", "slice_axis": 0},
        {"num_classes": 4, "clip_mm": 4.0},
    ],
)
def test_maps_are_those_of_the_whole_volume(bundle, parsed, dataset_dir, options):
    """Without augmentation: 3D or 2D, of all classes, in the spacing of the oblique, flipped and permuted files."""
    change = TRAIN | {"train#preprocessing#patches": [], "train#preprocessing#intensities": []} | options
    # The Hausdorff loss reads the label and the spacing, too.
    dataset = parsed(bundle, CONFIGS, "train#dataset", dataset_dir=dataset_dir, distance="hausdorff", **change)
    assert len(dataset) == 4
    for item, (label, spacing) in zip(dataset, labels_of(dataset_dir), strict=True):
        assert np.array_equal(plain(item["label"])[0], label)
        np.testing.assert_allclose(item["spacing_mm"], spacing, rtol=1e-4)
        how = {key: change[key] for key in ("convention", "slice_axis", "clip_mm")}
        expected = signed_distance_map(label, change["num_classes"], spacing, **how)
        # Stored in half precision.
        np.testing.assert_allclose(plain(item["distance_map"]), expected, rtol=1e-3, atol=1e-3)


def test_maps_go_along_with_the_label(bundle, parsed, dataset_dir):
    """Cropped, padded and flipped: each voxel keeps a distance that it had in the volume, and padding has none."""
    options = TRAIN | {"patch_size": [20, 28, 12]}
    dataset = parsed(bundle, "train", "train#dataset", dataset_dir=dataset_dir, **options)
    whole = [signed_distance_map(label, 3, spacing) for label, spacing in labels_of(dataset_dir)]
    corners = set()
    for _ in range(3):
        for item, maps in zip(dataset, whole, strict=True):
            found, label = plain(item["distance_map"]).astype(np.float32), plain(item["label"])[0]
            assert found.shape == (3, 20, 28, 12)
            kept = found[:, :, 2:26]
            assert not found[:, :, :2].any() and not found[:, :, 26:].any()
            starts = [
                (x, z, flip)
                for flip in (1, -1)
                for x in range(5)
                for z in range(5)
                if np.allclose(maps[:, x : x + 20, :, z : z + 12][:, ::flip], kept, rtol=1e-3, atol=1e-3)
            ]
            assert len(starts) == 1
            corners.add(starts[0])
            own = np.take_along_axis(kept, label[None, :, 2:26].astype(int), axis=0)
            assert (own < 0).all()
    assert len(corners) > 6
    assert {flip for *_, flip in corners} == {1, -1}


def test_2d_maps_reach_the_losses(trained):
    """Distances within the slices of a volume, for both distance losses."""
    flat, whole = trained(slice_axis=2)[2], trained(regional="generalized_dice")[2]
    assert flat[0]["boundary"][0].shape == MAP
    assert not torch.equal(flat[0]["boundary"][0], whole[0]["boundary"][0])
    _, loss, seen = trained(slice_axis=2, distance="hausdorff")
    assert loss.losses["boundary"].measure.slice_axis == 2
    torch.testing.assert_close(seen[0]["boundary"][0]["distance_map"], flat[0]["boundary"][0])


def test_settings_of_the_boundary_loss(bundle, parsed, dataset_dir):
    def loss(**options):
        return parsed(bundle, "train", "loss", dataset_dir=dataset_dir, **TRAIN | options)

    logits, maps = torch.randn(1, 3, 4, 4, 4), torch.randn(1, 3, 4, 4, 4)
    value = [
        float(one.losses["boundary"](logits, maps))
        for one in (loss(), loss(unit_mm=10.0), loss(boundary_background=True), loss(num_classes=4))
    ]
    probs = logits.softmax(1)
    assert value[0] == pytest.approx(float((probs * maps)[:, 1:].mean()), rel=1e-4)
    assert value[1] == pytest.approx(value[0] / 10, rel=1e-4)
    assert value[2] == pytest.approx(float((probs * maps).mean()), rel=1e-4)
    assert value[3] == value[0]


# A run that is killed


def test_alpha_reaches_1_in_the_last_epoch(bundle, parsed, dataset_dir):
    options = TRAIN | {"alpha_increment": None, "alpha": 0.01, "epochs": 40}
    schedule = parsed(bundle, "train", "train#monitors", dataset_dir=dataset_dir, **options)["weights"].schedule
    assert schedule(0) == {"regional": 0.99, "boundary": 0.01}
    assert schedule(39)["boundary"] == pytest.approx(1.0)
    assert schedule(38)["boundary"] < 1
    assert 0 < schedule(39)["regional"] < 0.1


def test_a_killed_run_goes_on_exactly(bundle, run_bundle, dataset_dir, cut_off, messages, tmp_path):
    """Bitwise, and with the weights of the losses that the uninterrupted run has."""
    options = TRAIN | {"dataset_dir": dataset_dir, "epochs": 3, "val_interval": 1, "alpha_increment": None}
    run_bundle(bundle, output_dir=tmp_path / "whole", **options)
    with pytest.raises(RuntimeError, match="trainer") as caught:
        run_bundle(bundle, output_dir=tmp_path / "cut", before_run=cut_off(2, 3), **options)
    assert "InterruptedError: cut off" in messages(caught.value)
    assert state_of(tmp_path / "cut")["trainer"]["epoch"] == 1
    before = scalars(tmp_path / "cut")
    again = run_bundle(bundle, output_dir=tmp_path / "cut", **options)
    assert again.trainer.state.epoch == 3
    one, two = state_of(tmp_path / "whole"), state_of(tmp_path / "cut")
    assert all(torch.equal(value, two["objects"]["network"][key]) for key, value in one["objects"]["network"].items())
    assert one["evaluator"] == two["evaluator"]
    whole = scalars(tmp_path / "whole")
    assert whole["train_weight_boundary"] == pytest.approx([0.25, 0.625, 1.0])
    assert whole["train_weight_regional"] == pytest.approx([0.75, 0.375, 0.01])
    assert before["train_weight_boundary"] == whole["train_weight_boundary"][:1]
    assert len(whole["val_mean_dice"]) == 3
    for name in ("train_boundary", "train_regional", "train_weight_boundary", "val_mean_dice"):
        # The killed run's own file holds the first epoch, the next one the others.
        assert scalars(tmp_path / "cut")[name][-2:] == whole[name][-2:], name


@pytest.mark.parametrize(
    "change",
    [
        {"regional": "focal"},
        {"distance": "hausdorff"},
        {"schedule": "increase"},
        {"alpha": 0.5},
        {"alpha_increment": None},
        {"slice_axis": 2},
        {"convention": "voxel"},
        {"clip_mm": 5.0},
        {"unit_mm": 2.0},
        {"boundary_background": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_method_does_not_take_the_run_over(trained, bundle, run_bundle, dataset_dir, messages, change):
    output = trained(regional="generalized_dice")[0]
    before = (output / "last.pt").read_bytes()
    options = TRAIN | {"dataset_dir": dataset_dir, "output_dir": output, "epochs": 3} | change
    with pytest.raises(RuntimeError, match="Failed to") as caught:
        run_bundle(bundle, CONFIGS, **options)
    assert "last.pt: belongs to a run with other settings: " in messages(caught.value)
    assert (output / "last.pt").read_bytes() == before


# Evaluation and inference


def test_inference_writes_masks(bundle, run_bundle, trained, outcome, two_class_cohort, tmp_path):
    options = INFER | {"ckpt_path": trained(regional="generalized_dice")[0] / "model.pt"}
    run_bundle(bundle, "inference", dataset_dir=two_class_cohort, output_dir=tmp_path, **options)
    assert outcome(tmp_path) == (["phantom_006.nii.gz", "phantom_007.nii.gz"], {})
    for number in (6, 7):
        [path] = two_class_cohort.parent.glob(f"images*/phantom_00{number}.nii.gz")
        image, mask = nib.load(path), nib.load(tmp_path / f"phantom_00{number}_seg.nii.gz")
        assert mask.shape == image.shape
        assert np.array_equal(mask.affine, image.affine)
        assert mask.get_data_dtype() == np.uint8
        assert set(np.unique(mask.dataobj)) <= {0, 1, 2}


def test_evaluation_writes_metrics(bundle, run_bundle, trained, dataset_dir, tmp_path):
    options = {"ckpt_path": trained(regional="generalized_dice")[0] / "model.pt", "output_dir": tmp_path}
    run_bundle(bundle, ["train", "evaluate"], dataset_dir=dataset_dir, **EVALUATE | options)
    with (tmp_path / "metrics" / "val_mean_dice_raw.csv").open() as file:
        header, *rows = list(csv.reader(file))
    assert header == ["filename", "class0", "class1", "mean"]
    assert [Path(row[0]).name for row in rows] == ["phantom_006.nii.gz", "phantom_007.nii.gz"]
    assert all(0 <= float(value) <= 1 for row in rows for value in row[1:])
    assert not (tmp_path / "last.pt").exists()
