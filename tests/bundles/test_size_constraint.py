"""The bundle size_constraint from end to end, on tiny phantoms: what is known of the sizes, and what is annotated."""

import re
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medconstraints.commands import fit_common_bounds
from medconstraints.losses import ConstraintLoss, ProposalLoss

SHAPE = (24, 24, 16)
VOXELS = 24 * 24 * 16
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
    "epochs": 1,
    "val_interval": 1,
    "batch_size": 2,
    "num_workers": 0,
    "weak_source": "points",
    "radius_voxels": 2,
    "train#preprocessing#weak_labels#background": False,
    "fully_labelled": 0,
    "level": "individual",
    "size_source": "label",
    "size_margin": 0.25,
    "size_weight": 0.01,
    "logit_scale": 1.0,
    "seed": 3,
}
# acdc.json: slices of one organ, the third of three, resampled to 12 x 12 pixels and padded.
ACDC = TRAIN | {
    "num_classes": 2,
    "patch_size": [16, 16],
    "spacing_mm": [2, 2, -1],
    "network_def": NETWORK | {"spatial_dims": 2},
    "batch_size": 16,
    "weak_source": "erosion",
    "train#preprocessing#weak_labels#kernel_voxels": 3,
}
FREE = [-np.inf, np.inf]


@pytest.fixture(scope="module")
def bundle(bundles_root):
    return bundles_root / "size_constraint"


@pytest.fixture(scope="module")
def some_absent(two_class_cohort, copy_cohort, tmp_path_factory):
    """Four training volumes; the last one lacks class 2. The second patient has the second and the third volume."""

    def edit(folder, content):
        change(folder / content["training"][3]["label"], lambda label: label * (label < 2))
        for entry, patient in zip(content["training"], ("a", "b", "b", "c"), strict=True):
            entry["patient"] = patient

    return copy_cohort(two_class_cohort, tmp_path_factory.mktemp("absent") / "cohort", edit)


@pytest.fixture(scope="module")
def three_organs(two_class_cohort, copy_cohort, tmp_path_factory):
    """A cohort whose labels have four classes, as those of ACDC: class 2 becomes 3, the lower part of class 1 is 2."""

    def edit(folder, content):
        for path in sorted((folder / "labelsTr").iterdir()):
            change(path, renumbered)

    return copy_cohort(two_class_cohort, tmp_path_factory.mktemp("three_organs") / "cohort", edit)


def renumbered(label):
    third, lower = label == 2, np.arange(label.shape[0]) < label.shape[0] // 2
    return np.where(third, 3, np.where(lower[:, None, None] & (label == 1), 2, label)).astype(np.uint8)


def change(path, values):
    """Replace the values of a volume, in the geometry of its file."""
    image = nib.load(path)
    nib.save(nib.Nifti1Image(values(np.asarray(image.dataobj)), image.affine), path)


def labels_of(datalist):
    """Labels of the training volumes as arrays, in RAS."""
    paths = sorted((datalist.parent / "labelsTr").iterdir())[:4]
    return [np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj) for path in paths]


def sizes_of(datalist, classes=3):
    return np.array([np.bincount(label.ravel(), minlength=classes) for label in labels_of(datalist)])


def plain(tensor):
    return np.asarray(torch.as_tensor(tensor))


def weak_labels(dataset):
    return {int(item["index"]): plain(item["weak_label"])[0] for item in dataset}


@pytest.fixture(scope="module")
def train(bundle, run_bundle, tmp_path_factory):
    """Run a training; returns its output folder and (loss, logits, target) of each batch of the sizes."""

    def run(datalist, configs="train", output=None, before_run=None, base=TRAIN, **overrides):
        output = output or tmp_path_factory.mktemp("run")
        got = []

        def look(workflow):
            losses = workflow.parser.get_parsed_content("loss").losses
            loss = losses["proposals" if "proposals" in losses else "size"]
            loss.register_forward_pre_hook(lambda module, given: got.append((module, *given)))
            if before_run is not None:
                before_run(workflow)

        run_bundle(
            bundle,
            configs,
            dataset_dir=datalist.parent,
            output_dir=output,
            before_run=look,
            **base | overrides,
        )
        return output, got

    return run


def bounds_by_index(got):
    """Index of the item -> bounds (C, 2), from what the loss got."""
    bounds = {}
    for _, _, target in got:
        for index, rows in zip(target["index"].tolist(), target["bounds"], strict=True):
            assert rows.shape[1:] == (1, 2)
            bounds[index] = plain(rows)[:, 0]
    return bounds


def expected_bounds(level, sizes, common=((0, 0), (0, 0))):
    """(items, 3, 2), from the counted sizes (items, 3)."""
    present = sizes > 0
    bounds = {
        "none": np.tile(np.array(FREE), (*sizes.shape, 1)),
        "tags": np.stack([present, present * VOXELS], axis=-1) * 1.0,
        "common": present[..., None] * np.array([[0, 0], *common]),
        "individual": np.stack([0.75 * sizes, 1.25 * sizes], axis=-1),
    }["individual" if level == "volume" else level]
    bounds[:, 0] = FREE
    return bounds


# What is known of the sizes


@pytest.fixture(scope="module")
def at_level(train, some_absent, tmp_path_factory):
    """Train once at each level; level -> output folder, what the loss got, the common bounds."""
    folder = tmp_path_factory.mktemp("common")
    common = folder / "common_bounds.json"
    fit_common_bounds(datalist=str(some_absent), num_classes=3, output=str(common))
    runs = {}

    def run(level):
        if level not in runs:
            runs[level] = train(some_absent, level=level, common_bounds=common if level == "common" else None)
        return runs[level]

    return run


@pytest.mark.parametrize("level", ["none", "tags", "common", "individual"])
def test_bounds_that_reach_the_loss(at_level, some_absent, read_table, level):
    output, got = at_level(level)
    sizes = sizes_of(some_absent)
    assert sizes[3, 2] == 0
    common = [[0.9 * sizes[0, cls], 1.1 * sizes[0, cls]] for cls in (1, 2)]
    bounds, expected = bounds_by_index(got), expected_bounds(level, sizes, common)
    assert sorted(bounds) == [0, 1, 2, 3]
    for index, rows in bounds.items():
        np.testing.assert_allclose(rows, expected[index], rtol=1e-5)
    [row] = read_table(output / "constraints.csv")
    assert row["epoch"] == "1"
    assert (row["train_satisfied"] == "") == (level == "none"), row
    assert {"last.pt", "model.pt"} <= {path.name for path in output.iterdir()}


def test_the_size_moves_the_weights(at_level):
    """The bounds are not only there: without them the same run ends with other weights."""
    one, two = (torch.load(at_level(level)[0] / "last.pt", weights_only=True) for level in ("none", "individual"))
    assert any(
        not torch.equal(one["objects"]["network"][name], two["objects"]["network"][name])
        for name in one["objects"]["network"]
    )


def test_a_run_of_another_level_is_not_taken_over(at_level, train, some_absent, messages):
    output, _ = at_level("individual")
    before = (output / "last.pt").read_bytes()
    with pytest.raises(RuntimeError, match="Failed to") as caught:
        train(some_absent, output=output, level="tags", epochs=2)
    expected = "last.pt: belongs to a run with other settings: level was 'individual', is 'tags'"
    assert expected in messages(caught.value)
    assert (output / "last.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("configs", "other"),
    [(["train", "proposals"], {}), (["train", "acdc"], {"train#preprocessing#weak_labels#kernel_voxels": 6})],
    ids=["proposals", "kernel_voxels"],
)
def test_a_run_of_another_method_is_not_taken_over(train, some_absent, three_organs, tmp_path, configs, other):
    slices = "acdc" in configs
    start = partial(train, three_organs if slices else some_absent, output=tmp_path, base=ACDC if slices else TRAIN)
    start(configs if slices else "train")
    with pytest.raises(RuntimeError, match="Failed to"):
        start(configs, epochs=2, **other)


def test_sizes_of_the_datalist_and_scribbles(train, some_absent, copy_cohort, tmp_path):
    """Not one training label: strokes say where, millilitres in the datalist how much."""
    sizes = sizes_of(some_absent)

    def edit(folder, content):
        with_scribbles(folder, content)
        for number, entry in enumerate(content["training"]):
            label = folder / entry.pop("label")
            voxel_ml = abs(np.linalg.det(nib.load(label).affine[:3, :3])) / 1000
            entry["size_ml"] = {"1": sizes[number, 1] * voxel_ml, "2": sizes[number, 2] * voxel_ml}
            label.unlink()
        entry = content["training"][0]  # a range for one class, nothing for the other
        entry["size_bounds_ml"] = {"2": [0.5 * entry["size_ml"]["2"], 0.8 * entry.pop("size_ml")["2"]]}

    datalist = copy_cohort(some_absent, tmp_path / "cohort", edit)
    _, got = train(datalist, weak_source="scribble", size_source="items")
    bounds = bounds_by_index(got)
    assert sorted(bounds) == [0, 1, 2, 3]
    np.testing.assert_allclose(bounds[0], [FREE, FREE, [0.5 * sizes[0, 2], 0.8 * sizes[0, 2]]], rtol=1e-4)
    for index in (1, 2, 3):
        np.testing.assert_allclose(bounds[index], expected_bounds("individual", sizes)[index], rtol=1e-4)


# What is annotated


def strokes(label):
    """A scribble of a label: 4 almost everywhere, every fifth voxel of the classes and of a part of the background."""
    picked = np.arange(label.size).reshape(label.shape) % 5 == 0
    picked &= (label > 0) | (np.arange(label.shape[0]) < 3)[:, None, None]
    return np.where(picked, label, 4).astype(np.uint8)


def with_scribbles(folder, content):
    (folder / "scribbles").mkdir()
    for entry in content["training"]:
        label = nib.load(folder / entry["label"])
        entry["scribble"] = f"scribbles/{Path(entry['label']).name}"
        nib.save(nib.Nifti1Image(strokes(np.asarray(label.dataobj)), label.affine), folder / entry["scribble"])


@pytest.fixture(scope="module")
def scribbled(some_absent, copy_cohort, tmp_path_factory):
    return copy_cohort(some_absent, tmp_path_factory.mktemp("scribbled") / "cohort", with_scribbles)


def read_scribbles(datalist):
    paths = sorted((datalist.parent / "scribbles").iterdir())
    return [np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj).astype(int) for path in paths]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("source", ["points", "erosion", "label", "scribble"])
def test_what_is_annotated(bundle, parsed, scribbled, source, background):
    """Without augmentation, so that the weak label lies on the label."""
    options = TRAIN | {
        "weak_source": source,
        "train#preprocessing#weak_labels#background": background,
        "train#preprocessing#patches": [],
        "train#preprocessing#intensities": [],
    }
    found = weak_labels(parsed(bundle, "train", "train#dataset", dataset_dir=scribbled.parent, **options))
    scribbles = read_scribbles(scribbled)
    for number, label in enumerate(labels_of(scribbled)):
        weak, classes = found[number], {1, 2} if number < 3 else {1}
        annotated = weak != -1
        assert np.array_equal(weak[annotated], label[annotated])  # nothing is annotated as what it is not
        if source == "label":
            assert annotated.all()
        elif source == "scribble":
            drawn = (scribbles[number] < 4) & (background | (scribbles[number] > 0))
            assert 0 < drawn.sum() < VOXELS
            assert np.array_equal(annotated, drawn)
        else:
            zero = {0} if background and source == "points" else set()
            assert set(np.unique(weak).astype(int)) == {-1, *zero, *classes}
            for cls in classes:
                assert 0 < (weak == cls).sum() < (label == cls).sum()
        if source == "points":  # balls of a radius of at most 2
            assert all((weak == cls).sum() <= 33 for cls in (0, *classes))


def test_scribbles_of_other_classes_are_named(bundle, parsed, scribbled, messages):
    options = TRAIN | {"weak_source": "scribble", "num_classes": 2, "reading#num_classes": 3}
    with pytest.raises(RuntimeError, match="Failed to") as caught:
        parsed(bundle, "train", "train#dataset", dataset_dir=scribbled.parent, **options)
    expected = r"phantom_\d+\.nii\.gz: has values that are neither a class number 0 to 1 nor unlabelled=4: .*2"
    assert re.search(expected, messages(caught.value)), messages(caught.value)


@pytest.mark.parametrize("weak_source", ["points", "erosion", "scribble"])
def test_some_patients_labelled_in_full(train, bundle, parsed, scribbled, weak_source):
    """The first two patients have three volumes: their whole labels train, and their sizes need no bounds."""
    options = {"fully_labelled": 2, "weak_source": weak_source}
    if weak_source == "points":
        _, got = train(scribbled, **options)
        bounds = bounds_by_index(got)
        assert all(np.array_equal(bounds[index], [FREE] * 3) for index in (0, 1, 2))
        np.testing.assert_allclose(bounds[3], expected_bounds("individual", sizes_of(scribbled))[3], rtol=1e-5)
    whole = TRAIN | options | {"train#preprocessing#patches": [], "train#preprocessing#intensities": []}
    found = weak_labels(parsed(bundle, "train", "train#dataset", dataset_dir=scribbled.parent, **whole))
    for number, label in enumerate(labels_of(scribbled)):
        assert np.array_equal(found[number], label) == (number < 3)


@pytest.mark.parametrize(
    ("options", "annotated"),
    [
        ({"weak_source": "label"}, VOXELS),
        ({"fully_labelled": 3}, VOXELS),
        ({"train#preprocessing#weak_labels#background": True}, None),
        ({"weak_source": "scribble", "train#preprocessing#weak_labels#background": True}, None),
    ],
    ids=["label", "hybrid", "points", "scribble"],
)
def test_what_padding_adds_is_not_annotated(bundle, parsed, scribbled, options, annotated):
    """The patch is larger than the volumes; the image is zero in the margin, and nothing is said about it."""
    options = TRAIN | options | {"patch_size": [32, 28, 16]}
    small = TRAIN | options | {"patch_size": SHAPE}
    dataset = parsed(bundle, "train", "train#dataset", dataset_dir=scribbled.parent, **options)
    without = parsed(bundle, "train", "train#dataset", dataset_dir=scribbled.parent, **small)
    for item, other in zip(dataset, without, strict=True):
        weak, same = plain(item["weak_label"])[0], plain(other["weak_label"])[0]
        assert weak.shape == (32, 28, 16)
        assert (weak == 0).sum() > 0  # the background of the volume itself is
        for value in (0, 1, 2):
            assert (weak == value).sum() == (same == value).sum()
        assert annotated is None or (weak != -1).sum() == annotated
        margin = np.ones(weak.shape, bool)
        margin[4:28, 2:26] = False
        assert (weak[margin] == -1).all()


# Nothing but images, strokes and, if at all, millilitres


def without_labels(folder, content):
    with_scribbles(folder, content)
    for entry in content["training"]:
        label = folder / entry.pop("label")
        voxel_ml = abs(np.linalg.det(nib.load(label).affine[:3, :3])) / 1000
        entry["size_ml"] = {"1": 400 * voxel_ml}  # 400 voxels of the file
        label.unlink()


def test_strokes_alone(train, some_absent, copy_cohort, tmp_path):
    """The baseline of every comparison: partial cross-entropy, and no bounds."""
    datalist = copy_cohort(some_absent, tmp_path / "cohort", without_labels)
    _, got = train(datalist, weak_source="scribble", level="none")
    assert all(np.array_equal(rows, [FREE] * 3) for rows in bounds_by_index(got).values())


@pytest.mark.parametrize("whole_image", [True, False])
def test_a_crop_has_no_lower_bound_in_millilitres(bundle, parsed, some_absent, copy_cohort, tmp_path, whole_image):
    """Of an object of 400 voxels a patch of 512 may hold nothing."""
    datalist = copy_cohort(some_absent, tmp_path / "cohort", without_labels)
    options = TRAIN | {"weak_source": "scribble", "size_source": "items", "patch_size": [8, 8, 8]}
    options |= {"whole_image": whole_image, "dataset_dir": datalist.parent}
    for item in parsed(bundle, "train", "train#dataset", **options):
        expected = [300 if whole_image else -np.inf, 500]
        np.testing.assert_allclose(plain(item["bounds"])[:, 0], [FREE, expected, FREE], rtol=1e-4)


def test_volumes_in_millilitres(train, three_organs, copy_cohort, tmp_path):
    """Slices with the size of their whole volume, counted in voxels of the resampled volume."""
    datalist = copy_cohort(three_organs, tmp_path / "cohort", without_labels)
    options = {"level": "volume", "weak_source": "scribble", "size_source": "items"}
    _, got = train(datalist, ["train", "acdc"], base=ACDC, **options)
    for _, _, target in got:
        pairs = plain(target["bounds"])[:, 1, 0]
        assert (pairs == pairs[0]).all()
        # Spacings of the phantoms differ by up to 5 % from 1 mm, those of the slices are 2 mm in the plane.
        np.testing.assert_allclose(pairs[0], [75, 125], rtol=0.1)
        assert pairs[0, 0] / pairs[0, 1] == pytest.approx(0.6)


# Where nothing can be learned


@pytest.mark.parametrize("level", ["individual", "none"])
def test_no_object_in_any_training_label(train, two_class_cohort, copy_cohort, messages, tmp_path, level):
    """No voxel is annotated: the run stops after its first epoch and says so."""

    def edit(folder, content):
        for entry in content["training"]:
            change(folder / entry["label"], np.zeros_like)

    datalist = copy_cohort(two_class_cohort, tmp_path / "cohort", edit)
    with pytest.raises(RuntimeError, match="Failed to") as caught:
        train(datalist, level=level)
    assert "weak_label: not one annotated voxel in a whole epoch" in messages(caught.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"level": "sizes"}, r"level: expected one of individual, tags, none, common, got 'sizes'"),
        ({"level": "common"}, r'common_bounds: expected bounds, or the path of their file, for level "common"'),
        ({"level": "common", "common_bounds": "no.json"}, r"common_bounds: no file no\.json; write it with"),
        (
            {"level": "tags", "size_source": "items"},
            r"level: sizes in the datalist are individual ones .* got level 'tags'",
        ),
        ({"size_source": "report"}, r"source: expected one of label, items, got 'report'"),
        ({"size_source": "items"}, r"size_ml: expected sizes in ml under this key or 'size_bounds_ml', got .*'image'"),
        ({"weak_source": "clicks"}, r"source: expected one of points, .*, point_files, label, got 'clicks'"),
        ({"weak_source": "scribble"}, r"ValueError: .*\.nii\.gz: its entry of the datalist has no 'scribble', only .*"),
        ({"fully_labelled": 5}, r"fully_labelled: expected an integer 0\.\.4, the number of patients, got 5"),
        ({"fully_labelled": -1}, r"fully_labelled: expected an integer 0\.\.4, the number of patients, got -1"),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_bad_options_are_named(train, two_class_cohort, tmp_path, messages, options, expected):
    with pytest.raises(RuntimeError, match="Failed to") as caught:
        train(two_class_cohort, output=tmp_path, **options)
    assert re.search(expected, messages(caught.value)), messages(caught.value)
    assert not (tmp_path / "model.pt").exists()


# A run that is killed


@pytest.mark.parametrize("overlay", ["", pytest.param("acdc", marks=pytest.mark.slow)])
def test_the_table_of_a_resumed_run(train, three_organs, some_absent, cut_off, messages, read_table, tmp_path, overlay):
    """One row for each epoch, the same as in the uninterrupted run; whole volumes in an order of their own."""
    base = (ACDC | {"level": "volume"} if overlay else TRAIN) | {"epochs": 3}
    start = partial(train, three_organs if overlay else some_absent, ["train", *([overlay] * bool(overlay))], base=base)
    _, got = start(output=tmp_path / "whole")
    last = 4 if overlay else 2  # iterations of an epoch
    with pytest.raises(RuntimeError, match="trainer") as caught:
        start(output=tmp_path / "cut", before_run=cut_off(2, 2 * last - 1))
    assert "InterruptedError: cut off" in messages(caught.value)
    assert [row["epoch"] for row in read_table(tmp_path / "cut" / "constraints.csv")] == ["1"]
    start(output=tmp_path / "cut")
    one, two = (read_table(tmp_path / name / "constraints.csv") for name in ("whole", "cut"))
    assert [row["epoch"] for row in one] == ["1", "2", "3"]
    assert one == two
    assert one[0]["train_stability"] == "" != one[1]["train_stability"]
    assert len({row["train_violation"] for row in one}) == 3
    orders = {tuple(int(target["index"][0]) for _, _, target in got[i * last : (i + 1) * last]) for i in range(3)}
    assert len(orders) > 1  # not one order of the volumes in all epochs
    states = [torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "cut")]
    assert all(
        torch.equal(value, states[1]["objects"]["network"][key])
        for key, value in states[0]["objects"]["network"].items()
    )


# Overlays


@pytest.fixture(scope="module")
def acdc(train, three_organs):
    return partial(train, three_organs, ["train", "acdc"], base=ACDC)


def third_organ(bundle, parsed, datalist):
    """Sizes of the third organ as acdc.json resamples it: (volume, slice)."""
    overrides = ACDC | {"level": "none", "weak_source": "label"}
    options = {"dataset_dir": datalist.parent, **overrides}
    dataset = parsed(bundle, ["train", "acdc"], "train#dataset", **options)
    labels = torch.stack([dataset[i]["weak_label"] for i in range(len(dataset))])
    assert {0, 1} <= set(labels.unique().tolist()) <= {-1, 0, 1}
    return (labels == 1).sum((1, 2, 3)).reshape(4, SHAPE[2]).numpy()


def test_slices_of_one_organ(acdc, bundle, parsed, three_organs):
    _, got = acdc(level="individual")
    sizes = third_organ(bundle, parsed, three_organs)
    # Resampled from 1 mm to 2 mm pixels.
    true = np.array([(label == 3).sum() for label in labels_of(three_organs)])
    assert sizes.sum() * 4 == pytest.approx(true.sum(), rel=0.1)
    bounds = bounds_by_index(got)
    assert sorted(bounds) == list(range(4 * SHAPE[2]))
    for index, rows in bounds.items():
        size = sizes.ravel()[index]
        np.testing.assert_allclose(rows, [FREE, [0.75 * size, 1.25 * size]], rtol=1e-5)
    assert all(logits.shape == (16, 2, 16, 16) for _, logits, _ in got)


def test_batches_are_whole_volumes(acdc, bundle, parsed, three_organs):
    _, got = acdc(level="volume")
    sizes = third_organ(bundle, parsed, three_organs)
    assert len(got) == 4
    volumes = []
    for loss, logits, target in got:
        assert isinstance(loss, ConstraintLoss)
        assert logits.shape == (SHAPE[2], 2, 16, 16)
        [volume] = {index // SHAPE[2] for index in target["index"].tolist()}
        assert target["index"].tolist() == list(range(volume * SHAPE[2], (volume + 1) * SHAPE[2]))
        size = sizes[volume].sum()
        for rows in target["bounds"]:
            np.testing.assert_allclose(plain(rows)[:, 0], [FREE, [0.75 * size, 1.25 * size]], rtol=1e-5)
        # The residual of each slice is that of the volume's size.
        residual = loss.residual(logits.detach(), target).residual
        predicted = logits.detach().softmax(1)[:, 1].sum()
        expected = torch.stack([0.75 * size - predicted, predicted - 1.25 * size]).expand(SHAPE[2], 1, 1, 2)
        torch.testing.assert_close(residual, expected, rtol=1e-3, atol=1e-2)
        volumes.append(volume)
    assert sorted(volumes) == [0, 1, 2, 3]


def test_scribbles_of_one_organ(bundle, parsed, three_organs, copy_cohort, tmp_path):
    """Strokes on the other organs are strokes on the background, 4 stays unlabelled."""
    datalist = copy_cohort(three_organs, tmp_path / "cohort", with_scribbles)
    options = ACDC | {"weak_source": "scribble", "level": "none", "spacing_mm": [-1, -1, -1], "patch_size": [24, 24]}
    for background in (False, True):
        options |= {"train#preprocessing#weak_labels#background": background, "dataset_dir": datalist.parent}
        dataset = parsed(bundle, ["train", "acdc"], "train#dataset", **options)
        weak = torch.stack([dataset[i]["weak_label"] for i in range(len(dataset))]).numpy()
        strokes_on = [np.bincount(scribble.ravel(), minlength=5) for scribble in read_scribbles(datalist)]
        other, third = np.sum([counts[:3].sum() for counts in strokes_on]), np.sum([c[3] for c in strokes_on])
        assert other > 0 < third
        assert (weak == 1).sum() == third
        assert (weak == 0).sum() == (other if background else 0)
        assert set(np.unique(weak)) <= {-1, 0, 1}


@pytest.mark.parametrize("source", ["scribble", "label"])
def test_what_padding_adds_to_slices_is_not_annotated(bundle, parsed, three_organs, copy_cohort, tmp_path, source):
    datalist = copy_cohort(three_organs, tmp_path / "cohort", with_scribbles)
    options = ACDC | {"weak_source": source, "level": "none", "spacing_mm": [-1, -1, -1], "patch_size": [28, 28]}
    options |= {"train#preprocessing#weak_labels#background": True, "dataset_dir": datalist.parent}
    dataset = parsed(bundle, ["train", "acdc"], "train#dataset", **options)
    margin = np.ones((28, 28), bool)
    margin[2:26, 2:26] = False
    for weak in (plain(dataset[i]["weak_label"])[0] for i in range(len(dataset))):
        assert (weak == 0).any()
        assert (weak[margin] == -1).all()


@pytest.mark.parametrize("configs", [["train", "proposals"], ["train", "acdc", "proposals"]], ids=" ".join)
def test_proposals(train, three_organs, some_absent, configs):
    """The Lagrangian with proposals takes the bounds and the weak label, and nothing else."""
    slices = "acdc" in configs
    output, got = train(
        three_organs if slices else some_absent, configs, base=ACDC if slices else TRAIN, epochs=2, level="individual"
    )
    assert all(isinstance(loss, ProposalLoss) for loss, _, _ in got)
    assert all(set(target) >= {"bounds", "weak_label"} for _, _, target in got)
    assert all(bool(target["bounds"][:, 1:].isfinite().all()) for _, _, target in got)
    assert torch.load(output / "last.pt", weights_only=True)["trainer"]["epoch"] == 2
    assert not (output / "constraints.csv").exists()


@pytest.mark.parametrize(
    "configs", [["train", "full_supervision"], ["train", "acdc", "full_supervision"]], ids=" ".join
)
def test_full_supervision(bundle, run_bundle, three_organs, two_class_cohort, tmp_path, configs):
    """Every voxel is labelled, and no size is asked for."""
    slices, got = "acdc" in configs, []
    whole = {"spacing_mm": [-1, -1, -1], "patch_size": [24, 24]}  # nothing is padded
    datalist, base = (three_organs, ACDC | whole) if slices else (two_class_cohort, TRAIN)
    base = {key: value for key, value in base.items() if key != "weak_source"}

    def look(workflow):
        loss = workflow.parser.get_parsed_content("loss")
        loss.register_forward_pre_hook(lambda module, given: got.append((module, given[1])))

    options = {"dataset_dir": datalist.parent, "output_dir": tmp_path}
    run_bundle(bundle, configs, before_run=look, **options, **base)
    for loss, target in got:
        assert [*loss.losses] == ["partial_ce"]
        assert bool((target["weak_label"] >= 0).all())
    assert {"last.pt", "model.pt"} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "constraints.csv").exists()


# The dense CRF


def test_the_energy_of_a_dense_crf_beside_the_others(bundle, run_bundle, two_class_cohort, tmp_path):
    options = {"dataset_dir": two_class_cohort.parent, "output_dir": tmp_path, **TRAIN}
    workflow = run_bundle(bundle, ["train", "crf"], **options)
    loss = workflow.trainer.loss_function
    assert [*loss.losses] == ["partial_ce", "size", "crf"] and loss.weights["crf"] == 0.1
    assert 0 < loss.losses["crf"](torch.randn(1, 3, 8, 8, 8), torch.rand(1, 1, 8, 8, 8)) < 1


def test_masks_that_follow_the_image(bundle, run_bundle, two_class_cohort, tmp_path):
    """By one value of inference.json; a network that is not trained leaves much to mend."""
    masks = []
    for dense_crf in (False, True):
        folder = tmp_path / str(dense_crf)
        options = {"dataset_dir": two_class_cohort, "output_dir": folder, "dense_crf": dense_crf}
        options |= {"patch_size": [24, 24, 16], "as_trained": False}
        run_bundle(bundle, "inference", device="$torch.device('cpu')", **options)
        masks.append([nib.load(path).get_fdata() for path in sorted(folder.glob("*.nii.gz"))])
    assert len(masks[0]) == len(masks[1]) == 2
    assert all((one != other).any() for one, other in zip(*masks, strict=True))


# Masks of one organ


@pytest.mark.parametrize("spacing_mm", [[-1, -1, -1], [2, 2, -1]])
def test_masks_of_one_organ(bundle, run_bundle, three_organs, tmp_path, spacing_mm):
    """With a network that says "bright": 3 where the input is bright, 0 elsewhere and outside the crop."""
    network = {"_target_": "torch.nn.Conv2d", "in_channels": 1, "out_channels": "@num_classes", "kernel_size": 1}
    weights = {"weight": torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1), "bias": torch.zeros(2)}
    torch.save(weights, tmp_path / "model.pt")
    patch, masks = [16, 20] if spacing_mm[0] < 0 else [16, 16], tmp_path / "masks"
    run_bundle(
        bundle,
        ["inference", "inference_acdc"],
        dataset_dir=three_organs,
        output_dir=masks,
        ckpt_path=tmp_path / "model.pt",
        device="$torch.device('cpu')",
        network_def=network,
        patch_size=patch,
        spacing_mm=spacing_mm,
    )
    files = sorted(masks.glob("*.nii.gz"))
    assert [path.name for path in files] == ["phantom_006_seg.nii.gz", "phantom_007_seg.nii.gz"]
    for path in files:
        mask, image = nib.load(path), nib.load(three_organs.parent / "imagesTr" / path.name.replace("_seg", ""))
        assert mask.shape == image.shape
        assert np.array_equal(mask.affine, image.affine)
        assert set(np.unique(mask.dataobj)) == {0, 3}
        found, given = (np.asarray(nib.as_closest_canonical(volume).dataobj) for volume in (mask, image))
        expected = 3 * (given > given.mean())
        if spacing_mm[0] < 0:
            outside = np.ones(SHAPE, bool)
            outside[4:20, 2:22] = False
            assert np.array_equal(found, np.where(outside, 0, expected))
        else:
            assert (found == expected).mean() > 0.8
