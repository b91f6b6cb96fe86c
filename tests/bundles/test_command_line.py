"""The commands that users type, in processes of their own: two processes, and a run that is killed."""

import json
import os
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

pytestmark = pytest.mark.slow

# Laid over the configs: small and quick, whatever they say.
TINY = {
    "num_classes": 2,
    "patch_size": [16, 16, 16],
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
    "slice_axis": 2,
    "filling": [0.4, 0.9],
    "val_interval": 1,
    "batch_size": 2,
}


@pytest.fixture
def command(bundles_root, cohort, tmp_path):
    """Arguments of `python` that run configs of box_prior with TINY and options."""
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))

    def make(*configs, **options):
        bundle = bundles_root / "box_prior"
        files = [str(bundle / "configs" / f"{name}.json") for name in configs] + [str(tmp_path / "tiny.json")]
        arguments = ["-m", "monai.bundle", "run", "--config_file", str(files), "--bundle_root", str(bundle)]
        for name in ("meta", "logging"):
            suffix = "data.json" if name == "meta" else ".conf"
            arguments += [f"--{name}_file", str(bundle / "configs" / f"{name}{suffix}")]
        for key, value in {"dataset_dir": cohort.parent, **options}.items():
            arguments += [f"--{key}", str(value)]
        return arguments

    return make


@pytest.fixture
def environment(tmp_path):
    """One thread a process, no accelerator, and a home where nothing is."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(arguments, environment):
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def load(path):
    return torch.load(path, weights_only=True)


def test_two_processes_train_one_network(command, environment, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    output = tmp_path / "run"

    def train(epochs):
        return run([*torchrun, *command("train", "multi_gpu_train", output_dir=output, epochs=epochs)], environment)

    train(1)
    names = {".lock", "constraints.csv", "last.pt", "model.pt", "settings.json", "tensorboard"}
    assert {path.name for path in output.iterdir()} == names
    parser = ConfigParser({"network_def": TINY["network_def"], "num_classes": 2})
    parser.get_parsed_content("network_def").load_state_dict(load(output / "model.pt"))
    state = load(output / "last.pt")
    assert state["trainer"] == {"epoch": 1, "iteration": 1}  # 4 volumes: a batch of 2 in each process
    assert 0 <= state["evaluator"]["best_metric"] <= 1
    # One process wrote, and both resume.
    assert len(list((output / "tensorboard").glob("events*"))) <= 2
    log = train(2)
    assert log.count("resumed after epoch 1 from last.pt") == 2
    assert load(output / "last.pt")["trainer"] == {"epoch": 2, "iteration": 2}


def test_two_processes_where_one_has_no_boxes_and_nothing_is_validated(command, environment, cohort, tmp_path):
    """Neither waits for the other: one process never sees a box, and there is no validation volume to share."""
    folder = tmp_path / "cohort"
    shutil.copytree(cohort.parent, folder)
    datalist = json.loads((folder / "datalist.json").read_text())
    del datalist["validation"]
    (folder / "datalist.json").write_text(json.dumps(datalist))
    for entry in datalist["training"][1:]:
        label = nib.load(folder / entry["label"])
        empty = np.zeros(label.shape, np.uint8)
        nib.save(nib.Nifti1Image(empty, label.affine), folder / entry["label"])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = {"dataset_dir": folder, "output_dir": tmp_path / "run", "epochs": 2}
    log = run([*torchrun, *command("train", "multi_gpu_train", **options)], environment)
    assert "nothing is validated" in log
    assert load(tmp_path / "run" / "last.pt")["trainer"]["epoch"] == 2
    assert (tmp_path / "run" / "model.pt").exists()
    nothing = nib.load(folder / datalist["training"][0]["label"])
    nib.save(nib.Nifti1Image(np.zeros(nothing.shape, np.uint8), nothing.affine), nothing.get_filename())
    options["output_dir"] = tmp_path / "second"
    arguments = [sys.executable, *torchrun, *command("train", "multi_gpu_train", **options)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "boxes: not one box in a whole epoch" in done.stderr


def test_three_dimensional_boxes_by_option(command, environment, outcome, tmp_path):
    """`--slice_axis '$None'` on the command line, and segmenting with what was trained."""
    options = command("train", output_dir=tmp_path / "run", epochs=1)
    tiny = json.loads((tmp_path / "tiny.json").read_text())
    run([*options, "--slice_axis", "$None", "--jitter_voxels", "1"], environment)
    assert "slice_axis" in tiny
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["settings"]["slice_axis"] is None
    masks = command("inference", output_dir=tmp_path / "masks", ckpt_path=tmp_path / "run" / "model.pt")
    datalist = masks[masks.index("--dataset_dir") + 1] + "/datalist.json"
    masks[masks.index("--dataset_dir") + 1] = datalist
    run(masks, environment)
    assert outcome(tmp_path / "masks") == (["phantom_006.nii.gz", "phantom_007.nii.gz"], {})


def missing(folder, content):
    (folder / content["training"][0]["image"]).unlink()


def empty(folder, content):
    (folder / content["training"][0]["image"]).write_bytes(b"")


def without_label(folder, content):
    del content["training"][0]["label"]


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        (missing, {}, ["phantom_000.nii.gz", "no such file"]),
        (empty, {}, ["phantom_000.nii.gz", "is empty (0 bytes)"]),
        (without_label, {}, ["phantom_000.nii.gz", "no 'label'", "box_source"]),
        (None, {"box_source": "files"}, ["phantom_00", "no 'boxes'", "box_source"]),
        (None, {"patch_size": "[15,16,16]"}, ["patch_size: expected multiples of 2"]),
        (None, {"output_dir": "runs/a#b"}, ["runs/a#b", "what follows a # is cut off"]),
    ],
)
def test_an_expected_error_ends_with_its_reason(
    command, environment, cohort, copy_cohort, tmp_path, spoil, options, words
):
    options = {"epochs": 1, "output_dir": tmp_path / "run", **options}
    if spoil is not None:
        options["dataset_dir"] = copy_cohort(cohort, tmp_path / "cohort", spoil).parent
    arguments = [sys.executable, *command("train", **options)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr[-2000:]
    last = done.stderr.strip().splitlines()[-1]
    assert all(word in last for word in words), last


def test_a_folder_of_studies_in_two_processes_is_one_report(bundles_root, environment, outcome, tmp_path, data_root):
    """With one bad file: the exit status of both together, and the same masks as in one process."""
    images = sorted((data_root / "hippocampus" / "imagesTr").iterdir())[:5]
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for number, image in enumerate(images):
        shutil.copy(image, tmp_path / "in" / ("sub" if number % 2 else ".") / f"{number}.nii.gz")
    (tmp_path / "in" / "bad.nii").write_bytes(b"no volume")
    bundle = bundles_root / "size_constraint"
    line = ["monai.bundle", "run", "--config_file", str(bundle / "configs" / "inference.json")]
    line += ["--bundle_root", str(bundle), "--dataset_dir", str(tmp_path / "in"), "--output_dir"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for start, folder in ((["-m"], "one"), ([*torchrun, "-m"], "two")):
        done = subprocess.run(
            [sys.executable, *start, *line, str(tmp_path / folder)], env=environment, capture_output=True, timeout=300
        )
        assert done.returncode == 1
    expected = {f"sub/{number}.nii.gz" if number % 2 else f"{number}.nii.gz" for number in range(5)}
    for folder in ("one", "two"):
        names, reasons = outcome(tmp_path / folder)
        assert {*names} == expected and [*reasons] == ["bad.nii"]
    for path in (tmp_path / "one").rglob("*.nii.gz"):
        other = nib.load(tmp_path / "two" / path.relative_to(tmp_path / "one"))
        assert np.array_equal(np.asarray(nib.load(path).dataobj), np.asarray(other.dataobj))
    assert (tmp_path / "two" / "index.html").is_file() and (tmp_path / "two" / "settings.json").is_file()
