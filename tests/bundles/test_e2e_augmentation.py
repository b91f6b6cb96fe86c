"""The bundle e2e_augmentation from end to end: pre-training, training, generated pairs, and the fixed augmentations."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from ignite.engine import Events
from PIL import Image

from medconstraints.data import CohortDataset
from medconstraints.transforms import reading_transforms

TINY = {
    "device": "$torch.device('cpu')",
    "num_classes": 3,
    "patch_size": [24, 24, 16],
    "spacing_mm": [-1, -1, -1],
    "network_def": {
        "_target_": "UNet",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": "@num_classes",
        "channels": [4, 8],
        "strides": [2],
        "act": "swish",
        "norm": "instance",
        "dropout": 0.1,
    },
    "gan_def#generator#channels": [4, 6],
    "gan_def#generator#strides": [2, [2, 2, 1]],
    "gan_def#generator#kernels": [2, 4],
    "gan_def#generator#dropout": 0.2,
    "gan_def#discriminator#channels": 4,
    "gan_def#discriminator#num_layers_d": 1,
    "batch_size": 2,
    "num_workers": 0,
    "seed": 3,
}
RUN = {**TINY, "epochs": 2, "val_interval": 1}


@pytest.fixture(scope="module")
def bundle(bundles_root):
    return bundles_root / "e2e_augmentation"


def objects(folder):
    state = torch.load(folder / "last.pt", weights_only=True)
    assert state["trainer"]["epoch"] == 2
    return state["objects"]


def same(one, two):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


@pytest.mark.parametrize("levels", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_an_exact_resume_of_everything(levels, bundle, run_bundle, two_class_cohort, cut_off, tmp_path):
    given = {"datalist": two_class_cohort, "levels": levels, "train#trainer#warm_up": 0, **RUN}
    run_bundle(bundle, output_dir=tmp_path / "whole", **given)
    with pytest.raises(Exception, match=r"cut off|Failed"):
        run_bundle(bundle, output_dir=tmp_path / "cut", before_run=cut_off(2, 3), **given)
    run_bundle(bundle, output_dir=tmp_path / "cut", **given)
    whole, cut = objects(tmp_path / "whole"), objects(tmp_path / "cut")
    wanted = {"network", "optimizer", "gan", "generator_optimizer", "discriminator_optimizer", "architecture_optimizer"}
    assert wanted <= {*whole}
    assert [name for name in whole if not same(whole[name], cut[name])] == []
    assert (tmp_path / "whole/generator.csv").read_text() == (tmp_path / "cut/generator.csv").read_text()
    logits = [value for name, value in whole["gan"].items() if name.endswith("logits")]
    assert (max(float(value.abs().max()) for value in logits) > 0) == (levels == 3)


def test_stages_from_masks_to_pairs_that_another_bundle_trains_on(
    bundle, bundles_root, run_bundle, two_class_cohort, read_table, tmp_path
):
    given = {"datalist": two_class_cohort, **TINY}
    run_bundle(bundle, ["train", "pretrain"], output_dir=tmp_path / "gan", epochs=2, **given)
    pretrained = torch.load(tmp_path / "gan/model.pt", weights_only=True)
    assert [row["epoch"] for row in read_table(tmp_path / "gan/generator.csv")] == ["1", "2"]

    begun = []

    def keep(engine):
        begun.append({name: value.clone() for name, value in engine.gan.state_dict().items()})

    def watch(workflow):
        workflow.trainer.add_event_handler(Events.EPOCH_STARTED(once=1), keep)

    run = {"epochs": 1, "val_interval": 1, "gan_checkpoint": tmp_path / "gan/model.pt"}
    run_bundle(bundle, output_dir=tmp_path / "run", before_run=watch, **given, **run)
    assert same(begun[0], pretrained)
    assert (tmp_path / "run/generated/epoch_0001.png").exists() and (tmp_path / "run/model.pt").exists()

    run = {"output_dir": tmp_path / "pairs", "gan_checkpoint": tmp_path / "run/gan.pt", "num_pairs": 3}
    run_bundle(bundle, ["train", "generate"], **given, **run)
    content = json.loads((tmp_path / "pairs/datalist.json").read_text())
    assert content["synthetic"] is True and len(content["training"]) == 3
    assert len(json.loads((tmp_path / "pairs/report.json").read_text())["rows"]) == 3
    pairs = CohortDataset(tmp_path / "pairs/datalist.json", "training", reading_transforms(num_classes=3))
    assert all(item["image"].shape == (1, 24, 24, 16) and item["label"].max() <= 2 for item in pairs)


@pytest.mark.parametrize("augmentation", ["none", "rotate", "flip", "translate", "combined"])
def test_each_fixed_augmentation(augmentation, bundle, run_bundle, two_class_cohort, tmp_path):
    given = {"datalist": two_class_cohort, "augmentation": augmentation, **TINY, "epochs": 1, "val_interval": 1}
    run = run_bundle(bundle, ["train", "baselines"], output_dir=tmp_path, **given)
    assert run.trainer.state.iteration == 2 and (tmp_path / "model.pt").exists()


def test_the_published_rates_are_told_to_leave_the_third_level_inactive(
    bundle, run_bundle, two_class_cohort, caplog, tmp_path
):
    given = {"datalist": two_class_cohort, "train#trainer#warm_up": 0, **RUN}
    run = run_bundle(bundle, ["train", "published"], output_dir=tmp_path, **given)
    [message] = [line for line in caplog.messages if "level is inactive" in line]
    assert "through_term" in message and "1.0e-08" in message
    assert 0 < run.trainer.state.metrics["through_term"] < 1e-8


def test_images_of_several_channels(bundle, run_bundle, tmp_path):
    """PNG files with the overlay for images, from training to pairs that train again."""
    random, entries = np.random.default_rng(0), []
    for number in range(8):
        label = np.zeros((16, 16), np.uint8)
        label[number : number + 6, 4:12] = 1
        pixels = (random.random((16, 16, 3)) * 100 + 100 * label[..., None]).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        Image.fromarray(label).save(tmp_path / f"{number}_mask.png")
        entries.append({"image": f"{number}.png", "label": f"{number}_mask.png"})
    (tmp_path / "datalist.json").write_text(json.dumps({"training": entries[:4], "validation": entries[4:]}))
    small = {key: value for key, value in RUN.items() if key in ("device", "epochs", "val_interval", "seed")}
    small |= {"patch_size": [16, 16], "batch_size": 2, "network_def#channels": [4, 8], "network_def#strides": [2]}
    small |= {"gan_def#generator#channels": [4, 6], "gan_def#generator#strides": [2, 2]}
    run_bundle(bundle, ["train", "images"], datalist=tmp_path / "datalist.json", output_dir=tmp_path / "run", **small)
    pairs = {"output_dir": tmp_path / "pairs", "gan_checkpoint": tmp_path / "run/gan.pt", "num_pairs": 4}
    small = {key: value for key, value in small.items() if key not in ("epochs", "val_interval", "batch_size")}
    run_bundle(bundle, ["train", "images", "generate"], datalist=tmp_path / "datalist.json", **pairs, **small)
    assert len([*(tmp_path / "pairs/images").glob("*.png")]) == 4


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: content.pop("validation"), "guide_dataset: expected images, got none"),
        (lambda content: content.update(validation=content["validation"][:1]), "at least two images of each part"),
    ],
)
def test_too_few_validation_images_are_named(
    edit, message, bundle, run_bundle, two_class_cohort, copy_cohort, messages, tmp_path
):
    datalist = copy_cohort(two_class_cohort, tmp_path / "data", lambda folder, content: edit(content))
    with pytest.raises(Exception) as caught:
        run_bundle(bundle, datalist=datalist, output_dir=tmp_path / "run", **RUN)
    assert message in messages(caught.value)


@pytest.mark.slow
def test_two_processes_train_one_network_and_one_generator(bundle, two_class_cohort, copy_cohort, tmp_path):
    def more(folder, content):
        content["validation"] += content["test"]

    datalist = copy_cohort(two_class_cohort, tmp_path / "data", more)
    (tmp_path / "tiny.json").write_text(json.dumps({k: v for k, v in TINY.items() if k != "device"}))
    files = [
        *(str(bundle / "configs" / f"{name}.json") for name in ("train", "multi_gpu_train")),
        str(tmp_path / "tiny.json"),
    ]
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle", "run"]
    line += ["--config_file", str(files), "--bundle_root", str(bundle), "--datalist", str(datalist)]
    line += [
        "--output_dir",
        str(tmp_path / "run"),
        "--epochs",
        "2",
        "--val_interval",
        "1",
        "--train::trainer::warm_up",
        "0",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *line], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert objects(tmp_path / "run")["network"] and (tmp_path / "run/generator.csv").exists()
