"""The bundle box_prior from end to end, on tiny phantoms: train, resume, evaluate, segment, and bad input."""

import csv
import gzip
import json
import re
import shutil
import sys
from pathlib import Path

import fire
import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from nibabel import orientations
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medconstraints.boxes import label_to_boxes, write_boxes
from medconstraints.data.weights_card import read_card
from medconstraints.synthetic import make_phantom

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
SHARED = {"num_classes": 2, "patch_size": [16, 16, 16], "spacing_mm": [-1, -1, -1], "network_def": NETWORK}
TRAIN = SHARED | {
    "device": "$torch.device('cpu')",
    "epochs": 2,
    "val_interval": 1,
    "batch_size": 2,
    "num_workers": 0,
    "slice_axis": 2,
    "filling": [0.4, 0.9],
    "jitter_voxels": 1,
    "seed": 3,
}
INFER = SHARED | {"device": "$torch.device('cpu')"}


@pytest.fixture(scope="module")
def bundle(bundles_root):
    return bundles_root / "box_prior"


@pytest.fixture(scope="module")
def trained(bundle, run_bundle, cohort, tmp_path_factory):
    """Output folder of two epochs."""
    output = tmp_path_factory.mktemp("trained")
    run_bundle(bundle, dataset_dir=cohort.parent, output_dir=output, **TRAIN)
    return output


@pytest.fixture
def infer(bundle, run_bundle, trained, tmp_path):
    """Segment a folder, file or datalist with the trained weights; returns the folder of the masks."""

    def run(source, **overrides):
        options = INFER | {"output_dir": tmp_path / "masks", "ckpt_path": trained / "model.pt"} | overrides
        run_bundle(bundle, "inference", dataset_dir=source, **options)
        return Path(options["output_dir"])

    return run


@pytest.fixture
def own_cohort(cohort, tmp_path):
    """A copy of the cohort that a test may spoil, and what changes its datalist."""
    folder = tmp_path / "cohort"
    shutil.copytree(cohort.parent, folder)

    def change(edit=None):
        datalist = json.loads((folder / "datalist.json").read_text())
        if edit is not None:
            edit(datalist)
        (folder / "datalist.json").write_text(json.dumps(datalist))
        return folder

    return change


def save(path, array, affine=None):
    nib.save(nib.Nifti1Image(array, np.diag([-1.5, -2.0, 3.0, 1.0]) if affine is None else affine), path)
    return path


def chain(error):
    """Messages of an exception and of its causes, as a traceback shows them."""
    lines = []
    while error is not None:
        lines.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return "\n".join(lines)


def weights_of(folder, name="last.pt"):
    state = torch.load(folder / name, weights_only=True)
    return state["objects"]["network"] if name == "last.pt" else state


def same_weights(one, two):
    return all(torch.equal(one[name], two[name]) for name in one) and one.keys() == two.keys()


def scalars(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# Training


def test_training_writes_weights_state_and_logs(trained):
    files = {".lock", "constraints.csv", "last.pt", "model.pt", "settings.json", "tensorboard"}
    assert {path.name for path in trained.iterdir()} == files
    values = scalars(trained)
    terms = [f"train_box_prior{part}" for part in ("", "_tightness", "_size", "_emptiness")]
    shares = [f"train_box_prior_satisfied_{name}" for name in ("tightness", "size")]
    assert set(values) >= {"train_loss", "val_mean_dice", "train_t", *terms, *shares}
    for tag in (*terms, *shares, "val_mean_dice"):
        assert len(values[tag]) == 2, tag
        assert np.isfinite(values[tag]).all(), tag
    assert all(0 <= share <= 1 for tag in shares for share in values[tag])
    for i in range(2):  # the parts add up, with the weights of the config
        assert sum(values[tag][i] for tag in terms[1:]) == pytest.approx(values[terms[0]][i], rel=1e-4)


def test_best_weights_are_those_of_the_best_epoch(trained):
    values = scalars(trained)["val_mean_dice"]
    state = torch.load(trained / "last.pt", weights_only=True)
    assert state["evaluator"]["best_metric"] == pytest.approx(max(values))
    assert state["evaluator"]["best_metric_epoch"] == 1 + int(np.argmax(values))
    assert same_weights(weights_of(trained, "model.pt"), state["objects"]["network"]) == (np.argmax(values) == 1)


def test_an_interrupted_run_resumes_exactly(bundle, run_bundle, make_workflow, cohort, tmp_path):
    """Bitwise, with dropout, augmentation and jittered boxes; the restart is a new set of objects."""

    def options(name, **more):
        return TRAIN | {"dataset_dir": cohort.parent, "output_dir": tmp_path / name, "epochs": 4} | more

    run_bundle(bundle, **options("whole"))
    workflow = make_workflow(bundle, **options("cut"))
    workflow.initialize()

    def stop(engine):
        if engine.state.epoch == 3 and engine.state.iteration == 6:
            raise InterruptedError("cut off")

    workflow.trainer.add_event_handler(Events.ITERATION_COMPLETED, stop)
    with pytest.raises(RuntimeError, match="trainer") as caught:
        workflow.run()
    assert "InterruptedError: cut off" in chain(caught.value)
    assert torch.load(tmp_path / "cut" / "last.pt", weights_only=True)["trainer"]["epoch"] == 2
    again = run_bundle(bundle, **options("cut"))
    assert again.trainer.state.epoch == 4
    one, two = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "cut"))
    assert same_weights(one["objects"]["network"], two["objects"]["network"])
    assert one["evaluator"] == two["evaluator"]
    assert one["objects"]["lr_scheduler"]["last_epoch"] == two["objects"]["lr_scheduler"]["last_epoch"] == 4
    assert same_weights(*(weights_of(tmp_path / name, "model.pt") for name in ("whole", "cut")))
    # What is drawn matters: another seed ends elsewhere.
    run_bundle(bundle, **options("other", seed=4))
    assert not same_weights(one["objects"]["network"], weights_of(tmp_path / "other"))


def test_a_finished_run_stays_as_it_is(bundle, run_bundle, cohort, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    run_bundle(bundle, dataset_dir=cohort.parent, output_dir=tmp_path / "run", **TRAIN)
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_full_supervision(bundle, run_bundle, cohort, tmp_path):
    options = {key: value for key, value in TRAIN.items() if key not in ("slice_axis", "filling", "jitter_voxels")}
    run_bundle(bundle, ["train", "full_supervision"], dataset_dir=cohort.parent, output_dir=tmp_path, **options)
    values = scalars(tmp_path)
    assert len(values["val_mean_dice"]) == 2
    assert not [tag for tag in values if "box_prior" in tag]
    assert {"last.pt", "model.pt"} <= {path.name for path in tmp_path.iterdir()}


def with_box_files(folder, slice_axis):
    """Replace the training labels of a cohort by box files, in voxels of the stored images."""

    def edit(datalist):
        for entry in datalist["training"]:
            label = folder / entry.pop("label")
            array = np.asarray(nib.load(label).dataobj)
            entry["boxes"] = f"boxes/{Path(entry['image']).name}.json"
            (folder / "boxes").mkdir(exist_ok=True)
            boxes = label_to_boxes(array, slice_axis=slice_axis)
            write_boxes(folder / entry["boxes"], boxes, class_names={1: "organ"})
            label.unlink()

    return edit


@pytest.mark.parametrize("slice_axis", [2, None])
def test_box_files_without_any_label(bundle, run_bundle, cohort, own_cohort, tmp_path, slice_axis):
    """Boxes from files train as those drawn around the labels do, in every stored orientation."""
    folder = own_cohort()
    own_cohort(with_box_files(folder, slice_axis))
    options = TRAIN | {"slice_axis": slice_axis, "jitter_voxels": 0}
    run_bundle(bundle, dataset_dir=folder, output_dir=tmp_path / "files", box_source="files", **options)
    run_bundle(bundle, dataset_dir=cohort.parent, output_dir=tmp_path / "labels", box_source="label", **options)
    one, two = scalars(tmp_path / "files"), scalars(tmp_path / "labels")
    assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-3)
    assert one["val_mean_dice"] == pytest.approx(two["val_mean_dice"], abs=1e-2)


def with_slicer_files(folder):
    """Replace the training labels of a cohort by files as 3D Slicer saves them: a named ROI, no list of names."""

    def edit(datalist):
        for entry in datalist["training"]:
            label = nib.load(folder / entry.pop("label"))
            entry["boxes"] = f"{Path(entry['image']).name}.mrk.json"
            boxes = label_to_boxes(np.asarray(label.dataobj), mode="class")
            write_boxes(folder / entry["boxes"], boxes, class_names={1: "organ"}, affine=label.affine)
            content = json.loads((folder / entry["boxes"]).read_text())
            del content["classes"]
            (folder / entry["boxes"]).write_text(json.dumps(content))

    return edit


def test_class_names_on_the_command_line(bundle, own_cohort, tmp_path, monkeypatch):
    """`--classes "{'organ': 1}"`, parsed as `python -m monai.bundle run` does."""
    folder = own_cohort(with_slicer_files(own_cohort()))
    (tmp_path / "small.json").write_text(json.dumps(TRAIN | {"epochs": 1, "slice_axis": None}))
    files = [str(bundle / "configs" / "train.json"), str(tmp_path / "small.json")]
    options = {"config_file": files, "bundle_root": bundle, "dataset_dir": folder, "box_source": "files"}
    options |= {"logging_file": False, "output_dir": tmp_path / "run", "classes": "{'organ': 1}"}
    monkeypatch.setattr(sys, "path", list(sys.path))  # MONAI puts the bundle in front
    fire.Fire(monai.bundle.run, [f"--{key}={value}" for key, value in options.items()])
    assert np.isfinite(scalars(tmp_path / "run")["train_box_prior_tightness"]).all()


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (None, r"\.mrk\.json, markups\[0\]: unknown class 'organ' .*--classes \"\{'organ': 1\}\""),
        ({"organ": 2}, r"\.mrk\.json, markups\[0\]: class 2 is none of the 1 classes to box .*num_classes is 2"),
    ],
)
def test_box_files_of_other_classes(bundle, run_bundle, own_cohort, tmp_path, classes, expected):
    folder = own_cohort(with_slicer_files(own_cohort()))
    more = {} if classes is None else {"classes": classes}
    with pytest.raises(RuntimeError, match="Failed to") as caught:
        run_bundle(bundle, dataset_dir=folder, output_dir=tmp_path / "run", box_source="files", **TRAIN | more)
    assert re.search(expected, chain(caught.value)), chain(caught.value)


def test_boxes_of_two_classes(bundle, run_bundle, two_class_cohort, tmp_path):
    options = TRAIN | {"num_classes": 3, "filling": [[0.3, 0.8], [0.4, 0.9]]}
    workflow = run_bundle(bundle, dataset_dir=two_class_cohort.parent, output_dir=tmp_path, **options)
    assert workflow.network_def(torch.zeros(1, 1, 16, 16, 16)).shape[1] == 3
    assert len(scalars(tmp_path)["val_mean_dice"]) == 2


def test_loose_boxes_and_resampling(bundle, run_bundle, cohort, tmp_path):
    options = TRAIN | {"margin_voxels": 2, "spacing_mm": [1.5, 1.5, 2], "epochs": 1, "num_workers": 1}
    run_bundle(bundle, dataset_dir=cohort.parent, output_dir=tmp_path, **options)
    assert (tmp_path / "model.pt").exists()


def test_some_training_volumes_without_boxes(bundle, run_bundle, own_cohort, tmp_path):
    """A volume that was looked at and has no object tells where there is none."""
    folder = own_cohort()
    label = folder / "labelsTr" / "phantom_000.nii.gz"
    save(label, np.zeros(SHAPE, np.uint8), nib.load(label).affine)
    run_bundle(bundle, dataset_dir=folder, output_dir=tmp_path / "run", **TRAIN)
    assert np.isfinite(scalars(tmp_path / "run")["train_loss"]).all()


@pytest.mark.parametrize("validation", ["no section", "no volume", "no labels"])
def test_only_images_and_box_files(bundle, run_bundle, infer, own_cohort, volumes, tmp_path, caplog, validation):
    """Not one voxel label anywhere: nothing is validated, the latest weights are kept, and they can be used."""
    folder = own_cohort()
    own_cohort(with_box_files(folder, 2))

    def spoil(datalist):
        if validation == "no labels":
            for entry in datalist["validation"]:
                del entry["label"]
        elif validation == "no volume":
            datalist["validation"] = []
        else:
            del datalist["validation"]
        del datalist["test"]

    own_cohort(spoil)
    shutil.rmtree(folder / "labelsTr")
    output = tmp_path / "run"
    workflow = run_bundle(bundle, dataset_dir=folder, output_dir=output, box_source="files", **TRAIN)
    assert workflow.check_properties() == []
    assert "nothing is validated, model.pt gets the weights of the latest epoch" in caplog.text
    assert ("2 of 2 entries of 'validation' have no label" in caplog.text) == (validation == "no labels")
    assert same_weights(weights_of(output, "model.pt"), weights_of(output))
    assert "val_mean_dice" not in scalars(output)
    again = TRAIN | {"epochs": 3}
    assert (
        run_bundle(bundle, dataset_dir=folder, output_dir=output, box_source="files", **again).trainer.state.epoch == 3
    )
    assert same_weights(weights_of(output, "model.pt"), weights_of(output))
    assert nib.load(infer(volumes, ckpt_path=output / "model.pt") / "LPS_seg.nii.gz").shape == SHAPE


def test_weights_of_others_are_not_replaced(bundle, run_bundle, cohort, trained, tmp_path):
    shutil.copy(trained / "model.pt", tmp_path / "model.pt")
    with pytest.raises(RuntimeError, match="Failed to") as caught:
        run_bundle(bundle, dataset_dir=cohort.parent, output_dir=tmp_path, **TRAIN)
    assert "has a model.pt but no last.pt to go on from" in chain(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt"}


def test_a_run_of_other_settings_is_not_taken_over(bundle, run_bundle, own_cohort, trained, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(trained, output)
    before = (output / "last.pt").read_bytes()
    folder = own_cohort()
    for change, expected in (
        ({"seed": 4, "filling": [0.3, 0.9]}, "filling was [0.4, 0.9], is [0.3, 0.9]; seed was 3, is 4"),
        ({"slice_axis": None}, "slice_axis was 2, is None"),
    ):
        with pytest.raises(RuntimeError, match="Failed to") as caught:
            run_bundle(bundle, dataset_dir=folder, output_dir=output, **TRAIN | {"epochs": 3} | change)
        assert f"last.pt: belongs to a run with other settings: {expected}" in chain(caught.value)
    assert (output / "last.pt").read_bytes() == before
    # The same cohort in another place, longer, validated more rarely, and not cached, is the same run.
    may_differ = {"epochs": 3, "val_interval": 2, "num_workers": 1, "cache_rate": 0.5}
    assert run_bundle(bundle, dataset_dir=folder, output_dir=output, **TRAIN | may_differ).trainer.state.epoch == 3


def test_a_loss_that_is_not_finite_stops_the_run(bundle, run_bundle, cohort, tmp_path):
    with pytest.raises(RuntimeError, match="Failed to") as caught:
        run_bundle(bundle, dataset_dir=cohort.parent, output_dir=tmp_path, **TRAIN | {"learning_rate": 1e30})
    assert re.search(r"loss: NaN or infinite in epoch \d, in its terms .*box_prior", chain(caught.value))


def test_each_process_gets_the_device_of_its_local_rank(bundle, monkeypatch):
    """Not of its rank: the second machine's first process has rank 2 or 8, and its own first device."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    parser = ConfigParser()
    parser.read_config([str(bundle / "configs" / f"{name}.json") for name in ("train", "multi_gpu_train")])
    assert parser.get_parsed_content("device") == torch.device("cuda:1")
    parser.get_parsed_content("initialize#1")
    assert chosen == [torch.device("cuda:1")]


# Evaluation


def test_evaluation_writes_metrics(bundle, run_bundle, cohort, trained, tmp_path):
    options = {key: value for key, value in TRAIN.items() if key not in ("epochs", "val_interval")}
    run_bundle(
        bundle,
        ["train", "evaluate"],
        dataset_dir=cohort.parent,
        output_dir=tmp_path / "evaluation",
        ckpt_path=trained / "model.pt",
        **options,
    )
    folder = tmp_path / "evaluation" / "metrics"
    assert {"metrics.csv", "val_mean_dice_raw.csv", "val_hd95_voxels_raw.csv"} <= {p.name for p in folder.iterdir()}
    with (folder / "val_mean_dice_raw.csv").open() as file:
        header, *rows = list(csv.reader(file))
    assert header == ["filename", "class0", "mean"]
    assert [Path(row[0]).name for row in rows] == ["phantom_006.nii.gz", "phantom_007.nii.gz"]
    assert all(0 <= float(value) <= 1 for row in rows for value in row[1:])
    assert not (tmp_path / "evaluation" / "last.pt").exists()


def test_metrics_are_not_replaced_unasked(bundle, run_bundle, cohort, trained, tmp_path):
    options = {key: value for key, value in TRAIN.items() if key not in ("epochs", "val_interval")}
    options |= {"dataset_dir": cohort.parent, "output_dir": tmp_path, "ckpt_path": trained / "model.pt"}
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "metrics.csv").write_text("work")
    with pytest.raises(RuntimeError, match="Failed to") as caught:
        run_bundle(bundle, ["train", "evaluate"], **options)
    assert "1 of 1 outputs exist already" in chain(caught.value)
    assert (tmp_path / "metrics" / "metrics.csv").read_text() == "work"
    run_bundle(bundle, ["train", "evaluate"], overwrite=True, **options)
    assert "val_mean_dice" in (tmp_path / "metrics" / "metrics.csv").read_text()


# Inference


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """One phantom, stored in three orientations: a .nii and two .nii.gz files."""
    folder = tmp_path_factory.mktemp("volumes")
    for name in ("RAS.nii.gz", "LPS.nii", "PSR.nii.gz"):
        image, _, affine = make_phantom(5, shape=SHAPE, orientation=name[:3])
        save(folder / name, image, affine)
    return folder


REPORTS = ("inference.json", "settings.json", "volumes.csv", "index.html", "index_pages")


def written(folder):
    return {path.name for path in folder.iterdir() if path.name != ".lock"}


def codes(image):
    return "".join(orientations.aff2axcodes(image.affine))


@pytest.mark.parametrize("spacing_mm", [[-1, -1, -1], [1.5, 1.5, 1.5]])
def test_masks_have_the_geometry_of_their_input(infer, volumes, spacing_mm):
    masks = infer(volumes, spacing_mm=spacing_mm, as_trained=False)
    stems = [f"{code}_seg" for code in ("RAS", "LPS", "PSR")]
    assert written(masks) == {
        *REPORTS,
        *(f"{stem}{ending}" for stem in stems for ending in (".nii.gz", ".nii.gz.json")),
    }
    in_ras = []
    for path in volumes.iterdir():
        image = nib.load(path)
        mask = nib.load(masks / f"{path.name[:3]}_seg.nii.gz")
        assert mask.shape == image.shape
        assert np.array_equal(mask.affine, image.affine)
        assert codes(mask) == codes(image) == path.name[:3]
        assert mask.get_data_dtype() == np.uint8
        assert set(np.unique(mask.dataobj)) <= {0, 1}
        in_ras.append(np.asarray(nib.as_closest_canonical(mask).dataobj))
    # The network saw one volume three times.
    assert 0 < in_ras[0].mean() < 1
    if spacing_mm[0] < 0:
        assert all(np.array_equal(in_ras[0], mask) for mask in in_ras)
    else:  # resampled grids start at different corners
        assert all((in_ras[0] != mask).mean() < 0.02 for mask in in_ras)


def test_section_of_a_datalist(infer, cohort, outcome):
    masks = infer(cohort, section="validation")
    assert outcome(masks) == (["phantom_004.nii.gz", "phantom_005.nii.gz"], {})
    assert {path.name for path in masks.glob("*.nii.gz")} == {"phantom_004_seg.nii.gz", "phantom_005_seg.nii.gz"}


def test_one_volume_smaller_than_the_patch(infer, tmp_path):
    image, _, affine = make_phantom(5, shape=SHAPE)
    path = save(tmp_path / "small.nii.gz", image[8:15, :20, 4:9], affine)
    mask = nib.load(infer(path) / "small_seg.nii.gz")
    assert mask.shape == (7, 20, 5)
    assert np.array_equal(mask.affine, affine.astype(np.float32)) or np.array_equal(mask.affine, nib.load(path).affine)


@pytest.mark.parametrize("name", ["a.b.c.nii.gz", "with space.nii", "größe.nii.gz", "o'neil.nii.gz", "x.gz.nii.gz"])
def test_unusual_names(infer, volumes, tmp_path, name):
    """The mask has the name that was checked for before the run."""
    folder = tmp_path / "in put"
    folder.mkdir()
    image = nib.load(volumes / "RAS.nii.gz")
    nib.save(image, folder / name)
    masks = infer(folder)
    stem = name.removesuffix(".gz").removesuffix(".nii")
    assert written(masks) == {*REPORTS, f"{stem}_seg.nii.gz", f"{stem}_seg.nii.gz.json"}


def test_bad_files_do_not_stop_the_others(infer, volumes, outcome, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(volumes, folder)
    image, _, affine = make_phantom(5, shape=SHAPE)
    (folder / "cut.nii.gz").write_bytes((volumes / "RAS.nii.gz").read_bytes()[:2000])
    (folder / "empty.nii.gz").write_bytes(b"")
    save(folder / "series.nii.gz", np.stack([image, image], axis=-1), affine)
    spoilt = image.astype(np.float32)
    spoilt[3, 4, 5] = np.nan
    save(folder / "nan.nii.gz", spoilt, affine)
    (folder / "text.nii.gz").write_bytes(gzip.compress(b"no image"))
    names = sorted(path.name for path in folder.iterdir())
    datalist = folder / "datalist.json"
    datalist.write_text(json.dumps({"test": [*names, "missing.nii.gz"]}))
    with pytest.raises(SystemExit) as stop:
        infer(datalist)
    masks = tmp_path / "masks"
    done, reasons = outcome(masks)
    assert stop.value.code == 1 and done == ["LPS.nii", "PSR.nii.gz", "RAS.nii.gz"]
    expected = {
        "cut.nii.gz": r"VolumeError: cut\.nii\.gz: is truncated",
        "empty.nii.gz": r"VolumeError: empty\.nii\.gz: is empty \(0 bytes\)",
        "series.nii.gz": r"VolumeError: series\.nii\.gz: is 4D \(24, 24, 16, 2\)",
        "nan.nii.gz": r"VolumeError: nan\.nii\.gz.* NaN",
        "text.nii.gz": r"VolumeError: text\.nii\.gz: is not a NIfTI file",
        "missing.nii.gz": r"missing\.nii\.gz: no such file",
    }
    assert set(reasons) == set(expected)
    for name, pattern in expected.items():
        assert re.search(pattern, reasons[name]), reasons[name]
    assert len(list(masks.glob("*_seg.nii.gz"))) == 3


def test_only_bad_files_is_an_error(infer, outcome, tmp_path):
    (tmp_path / "bad.nii.gz").write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        infer(tmp_path / "bad.nii.gz")
    done, reasons = outcome(tmp_path / "masks")
    assert stop.value.code == 2 and not done and "is empty" in reasons["bad.nii.gz"]


def test_existing_masks_are_refused_before_anything_is_written(infer, volumes, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    (masks / "PSR_seg.nii.gz").write_bytes(b"work of a week")
    with pytest.raises(RuntimeError, match="Failed to") as caught:
        infer(volumes)
    assert "1 of 11 outputs exist already" in chain(caught.value)
    assert "such as PSR_seg.nii.gz" in chain(caught.value)
    assert [(path.name, path.read_bytes()) for path in masks.iterdir()] == [("PSR_seg.nii.gz", b"work of a week")]
    infer(volumes, overwrite=True)
    assert len(list(masks.glob("*_seg.nii.gz"))) == 3
    assert nib.load(masks / "PSR_seg.nii.gz").shape


def test_wrong_weights_leave_the_old_masks(infer, volumes, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    old = {name: b"old" for name in ("PSR_seg.nii.gz", "LPS_seg.nii.gz", "inference.json")}
    for name, content in old.items():
        (masks / name).write_bytes(content)
    with pytest.raises(RuntimeError, match="evaluator"):
        infer(volumes, overwrite=True, ckpt_path=tmp_path / "missing.pt")
    assert {name: (masks / name).read_bytes() for name in written(masks)} == old


def test_a_failing_volume_keeps_no_mask_that_looks_new(infer, volumes, tmp_path):
    folder, masks = tmp_path / "in", tmp_path / "masks"
    shutil.copytree(volumes, folder)
    (folder / "RAS.nii.gz").write_bytes(b"")
    masks.mkdir()
    for name in ("RAS_seg.nii.gz", "LPS_seg.nii.gz"):
        (masks / name).write_bytes(b"old")
    with pytest.raises(SystemExit):
        infer(folder, overwrite=True)
    names = {"LPS_seg.nii.gz", "LPS_seg.nii.gz.json", "PSR_seg.nii.gz", "PSR_seg.nii.gz.json", "RAS_seg.nii.gz.old"}
    assert written(masks) == {*REPORTS, *names}
    assert nib.load(masks / "LPS_seg.nii.gz").shape == SHAPE


def test_masks_do_not_go_among_the_volumes(infer, volumes):
    before = sorted(volumes.iterdir())
    with pytest.raises(RuntimeError, match="Failed to") as caught:
        infer(volumes, output_dir=volumes, overwrite=True)
    assert "is the folder of the volumes" in chain(caught.value)
    assert sorted(volumes.iterdir()) == before


def test_a_fourth_axis_of_length_one_and_header_codes(infer, volumes, tmp_path):
    image = nib.load(volumes / "PSR.nii.gz")
    stored = nib.Nifti1Image(np.asarray(image.dataobj)[..., None], image.affine)
    stored.set_qform(image.affine, 2)
    stored.set_sform(image.affine, 0)
    stored.header.set_xyzt_units("mm")
    nib.save(stored, tmp_path / "one.nii.gz")
    mask = nib.load(infer(tmp_path / "one.nii.gz") / "one_seg.nii.gz")
    assert mask.shape == stored.shape
    assert (int(mask.header["qform_code"]), int(mask.header["sform_code"])) == (2, 0)
    assert mask.header.get_xyzt_units()[0] == "mm"
    assert np.array_equal(mask.affine, nib.load(tmp_path / "one.nii.gz").affine)


@pytest.mark.parametrize(
    ("weights", "more", "expected"),
    [
        ("missing.pt", {}, "FileNotFoundError: .*missing.pt"),
        ("last.pt", {}, "Missing key"),
        ("model.pt", {"network_def": NETWORK | {"channels": [4, 6]}}, "size mismatch"),
        ("model.pt", {"num_classes": 3}, "size mismatch"),
    ],
)
def test_weights_that_do_not_fit_give_no_masks(infer, volumes, trained, tmp_path, weights, more, expected):
    with pytest.raises(RuntimeError, match="evaluator") as caught:
        infer(volumes, ckpt_path=trained / weights, as_trained=False, **more)
    assert re.search(expected, chain(caught.value))
    assert not written(tmp_path / "masks")


def test_going_on_with_other_weights_or_settings_is_refused(infer, trained, volumes, tmp_path):
    masks = infer(volumes)
    (masks / "RAS_seg.nii.gz").unlink()
    before = (masks / "LPS_seg.nii.gz").read_bytes()
    infer(volumes, resume=True)
    assert (masks / "LPS_seg.nii.gz").read_bytes() == before and (masks / "RAS_seg.nii.gz").is_file()
    state = torch.load(trained / "model.pt", weights_only=True)
    torch.save({name: value + 0 for name, value in state.items()}, tmp_path / "other.pt")
    for change in ({"ckpt_path": tmp_path / "other.pt"}, {"dense_crf": True}):
        with pytest.raises(RuntimeError) as caught:
            infer(volumes, resume=True, **change)
        assert "were made with other weights or settings" in chain(caught.value)


def test_what_contradicts_the_weights_is_refused_with_what_to_write(infer, trained, volumes, tmp_path):
    with pytest.raises(RuntimeError, match="Failed to") as caught:
        infer(volumes, patch_size=[32, 32, 16], num_classes=3)
    assert "num_classes is 3, but the weights were trained with 2: write --num_classes" in chain(caught.value)
    assert "patch_size is [32, 32, 16]" in chain(caught.value) and not written(tmp_path / "masks")
    card = read_card(trained / "model.pt")
    assert card["cohort"]["volumes"] > 0 and card["class_names"] == {"1": "organ"}


# Training: bad input


def set_label(values):
    def spoil(folder):
        label = folder / "labelsTr" / "phantom_001.nii.gz"
        save(label, values(np.asarray(nib.load(label).dataobj)), nib.load(label).affine)

    return spoil


def set_image(values):
    def spoil(folder):
        image = folder / "imagesTr" / "phantom_001.nii.gz"
        save(image, values(np.asarray(nib.load(image).dataobj, np.float32)), nib.load(image).affine)

    return spoil


def with_nan(image):
    image[0, 0, 0] = np.nan
    return image


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (
            set_label(lambda label: label[:-2]),
            r"phantom_001\.nii\.gz: has the shape \(22, 24, 16\), its image phantom_001\.nii\.gz \(24, 24, 16\)",
        ),
        (set_label(lambda label: label * 7), r"phantom_001\.nii\.gz.*values that are no class number 0 to 1: .*7"),
        (set_label(lambda label: label * 0 + 1), r"phantom_001\.nii\.gz.*has no background voxel"),
        (set_image(with_nan), r"phantom_001\.nii\.gz.*NaN"),
        (
            lambda folder: (folder / "imagesTr" / "phantom_001.nii.gz").unlink(),
            r"phantom_001\.nii\.gz: no such file",
        ),
        (
            lambda folder: (folder / "labelsTr" / "phantom_001.nii.gz").unlink(),
            r"phantom_001\.nii\.gz: no such file .*labelsTr",
        ),
        (
            lambda folder: (folder / "imagesTr" / "phantom_001.nii.gz").write_bytes(b""),
            r"phantom_001\.nii\.gz: is empty",
        ),
        (lambda folder: (folder / "datalist.json").unlink(), r"datalist: no file .*datalist\.json; set --datalist"),
        (
            lambda folder: (folder / "datalist.json").write_text('{"test": []}'),
            r"datalist\.json has no section 'training', it has \['test'\]",
        ),
    ],
    ids=[
        "label of another shape",
        "label values",
        "all foreground",
        "NaN",
        "image missing",
        "label missing",
        "image empty",
        "no datalist",
        "no training section",
    ],
)
def test_bad_training_data_is_named(bundle, run_bundle, own_cohort, tmp_path, spoil, expected):
    folder = own_cohort()
    spoil(folder)
    with pytest.raises(RuntimeError, match="Failed to") as caught:
        run_bundle(bundle, dataset_dir=folder, output_dir=tmp_path / "run", **TRAIN)
    assert re.search(expected, chain(caught.value)), chain(caught.value)
    assert not (tmp_path / "run" / "last.pt").exists()


def test_no_boxes_at_all(bundle, run_bundle, own_cohort, tmp_path):
    """Only the emptiness would be left to learn: the run stops after its first epoch and says so."""
    folder = own_cohort()
    for number in range(4):
        label = folder / "labelsTr" / f"phantom_{number:03d}.nii.gz"
        save(label, np.zeros(SHAPE, np.uint8), nib.load(label).affine)
    with pytest.raises(RuntimeError, match="Failed to") as caught:
        run_bundle(bundle, dataset_dir=folder, output_dir=tmp_path / "run", **TRAIN)
    assert "boxes: not one box in a whole epoch" in chain(caught.value)


def test_box_files_that_cannot_be_used(bundle, run_bundle, own_cohort, tmp_path):
    folder = own_cohort()
    own_cohort(with_box_files(folder, 2))
    box_file = next(iter(sorted((folder / "boxes").iterdir())))
    box_file.write_text(
        '{"coordinate_system": "voxel", "boxes": [{"class": 1, "start": [3, 3, 3], "stop": [2, 5, 5]}]}'
    )
    with pytest.raises(RuntimeError, match="Failed to") as caught:
        run_bundle(bundle, dataset_dir=folder, output_dir=tmp_path / "run", box_source="files", **TRAIN)
    assert box_file.name in chain(caught.value)
    assert "BoxFileError" in chain(caught.value)


# DeepCut


def test_deepcut(bundle, run_bundle, two_class_cohort, cut_off, tmp_path):
    """Two rounds, the second with other labels; a kill in it leaves no trace."""
    options = {key: value for key, value in TRAIN.items() if key not in ("filling", "jitter_voxels")}
    options |= {"num_classes": 3, "epochs": 3, "relabel_every": 2, "dataset_dir": two_class_cohort.parent}
    whole = run_bundle(bundle, ["train", "deepcut"], **options, output_dir=tmp_path / "whole")
    with pytest.raises(Exception, match=r"cut off|Failed"):
        run_bundle(bundle, ["train", "deepcut"], **options, output_dir=tmp_path / "cut", before_run=cut_off(3, 5))
    run_bundle(bundle, ["train", "deepcut"], **options, output_dir=tmp_path / "cut")
    states = [torch.load(tmp_path / name / "last.pt", weights_only=True)["objects"] for name in ("whole", "cut")]
    assert same_weights(states[0]["network"], states[1]["network"])
    assert {*states[0]["proposals"]} == {"0", "1", "2", "3"}
    for item in whole.trainer.proposal_dataset:
        proposal, filled = states[0]["proposals"][str(item["index"])], item["filled"][0]
        assert not ((proposal > 0) & (proposal != filled)).any()
