"""The bundles bilevel_augmentation and saflex from end to end, on tiny phantoms and images of two classes."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

SEGMENTATION = {
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
    "epochs": 2,
    "val_interval": 1,
    "batch_size": 2,
    "num_workers": 0,
    "guide_fraction": 0.5,
    "seed": 3,
}
CLASSIFICATION = {
    "device": "$torch.device('cpu')",
    "image_mean": 0.5,
    "image_std": 0.5,
    "network_def": {
        "_target_": "ResNet",
        "block": "basic",
        "layers": [1, 1, 1, 1],
        "block_inplanes": [4, 4, 8, 8],
        "spatial_dims": 2,
        "n_input_channels": 1,
        "num_classes": "@num_classes",
        "conv1_t_size": 3,
        "conv1_t_stride": 1,
        "no_max_pool": True,
        "act": "swish",
    },
    "epochs": 1,
    "val_interval": 1,
    "batch_size": 6,
    "num_workers": 0,
    "guide_fraction": 0.25,
    "seed": 3,
}
BUNDLES = {"bilevel_augmentation": "augmenter.json", "saflex": "saflex.csv"}
each_bundle = pytest.mark.parametrize("name", BUNDLES)
BASELINES = ["none", "predefined", "magnitude", "trivial", "nnunet", "stn"]
UPSTREAMS = ["randaugment", "trivial", "nnunet", "mixup", "cutmix"]


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Datalist of 48 + 12 + 12 images in an npz file; those of class 1 have a bright square."""
    folder, random = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    labels = np.arange(72) % 2
    images = random.random((72, 12, 12)).astype(np.float32)
    images[labels == 1, 4:8, 4:8] += 1
    np.savez(folder / "all.npz", images=images, labels=labels)
    parts = {"training": slice(0, 48), "validation": slice(48, 60), "guide": slice(60, 72)}
    arrays, sections = {}, {}
    for part, rows in parts.items():
        arrays |= {f"{part}_images": images[rows], f"{part}_labels": labels[rows]}
        sections[part] = [{"npz": "all.npz", "images": f"{part}_images", "labels": f"{part}_labels"}]
    np.savez(folder / "all.npz", **arrays)
    (folder / "datalist.json").write_text(json.dumps(sections))
    return folder / "datalist.json"


@each_bundle
def test_segmentation_and_an_exact_resume(name, bundles_root, run_bundle, two_class_cohort, cut_off, tmp_path):
    given = {"datalist": two_class_cohort, **SEGMENTATION}
    run_bundle(bundles_root / name, output_dir=tmp_path / "whole", **given)
    with pytest.raises(Exception, match=r"cut off|Failed"):
        run_bundle(bundles_root / name, output_dir=tmp_path / "cut", before_run=cut_off(2, 2), **given)
    run_bundle(bundles_root / name, output_dir=tmp_path / "cut", **given)
    whole, cut = (torch.load(tmp_path / run / "last.pt", weights_only=True) for run in ("whole", "cut"))
    assert whole["trainer"] == cut["trainer"] and whole["trainer"]["epoch"] == 2
    for part in ("network", *(["augmenter"] if name == "bilevel_augmentation" else [])):
        for key, value in whole["objects"][part].items():
            assert torch.equal(value, cut["objects"][part][key]), (part, key)
    assert {"model.pt", BUNDLES[name]} <= {path.name for path in (tmp_path / "whole").iterdir()}


@pytest.mark.parametrize("guide", [False, True])
@each_bundle
def test_classification(name, guide, bundles_root, run_bundle, classes, tmp_path):
    """With a part of the training images as guide, drawn anew in each epoch, or with images of their own."""
    configs = ["train", "classification", *(["guide"] if guide else [])]
    run = run_bundle(bundles_root / name, configs, datalist=classes, output_dir=tmp_path, **CLASSIFICATION)
    assert 0 <= run.evaluator.state.metrics["val_auc"] <= 1
    assert len(run.trainer.guide_loader.dataset) == (12 if guide else 48)
    if name == "saflex":
        with (tmp_path / "saflex.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == (48 if guide else 36) and {row["label"] for row in rows} == {"0", "1"}
        assert len({row["case"] for row in rows}) == len(rows)
    else:
        assert json.loads((tmp_path / "augmenter.json").read_text())


@pytest.mark.parametrize("baseline", BASELINES)
def test_each_baseline(baseline, bundles_root, run_bundle, parsed, classes, tmp_path):
    bundle, configs = bundles_root / "bilevel_augmentation", ["train", "classification", "baselines"]
    given = {"datalist": classes, "output_dir": tmp_path, "baseline": baseline, **CLASSIFICATION}
    run = run_bundle(bundle, configs, **given)
    assert run.trainer.state.iteration == 8 and (tmp_path / "model.pt").exists()  # all 48 images train
    known = parsed(bundle, configs, "augmentations", datalist=classes, **CLASSIFICATION)
    assert set(known) == set(BASELINES)


@pytest.mark.parametrize("rules", [pytest.param("centred", marks=pytest.mark.slow), "paper", "none"])
@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_each_upstream(upstream, rules, bundles_root, run_bundle, classes, tmp_path):
    given = {"datalist": classes, "output_dir": tmp_path, "upstream": upstream, "rules": rules, **CLASSIFICATION}
    run = run_bundle(bundles_root / "saflex", ["train", "classification"], **given)
    assert run.trainer.state.iteration == 6 and (tmp_path / "saflex.csv").exists() == (rules != "none")


def test_an_unknown_upstream_is_named(bundles_root, run_bundle, classes, messages, tmp_path):
    given = {"datalist": classes, "output_dir": tmp_path, "upstream": "wrong", **CLASSIFICATION}
    with pytest.raises(RuntimeError) as caught:
        run_bundle(bundles_root / "saflex", ["train", "classification"], **given)
    assert "upstream: expected one of randaugment, trivial, nnunet, mixup, cutmix, got 'wrong'" in messages(
        caught.value
    )


@each_bundle
def test_scores_of_a_classification(name, bundles_root, run_bundle, classes, tmp_path):
    given = {"datalist": classes, **CLASSIFICATION}
    configs = ["train", "classification"]
    run_bundle(bundles_root / name, configs, output_dir=tmp_path / "run", **given)
    given = {key: value for key, value in given.items() if key not in ("epochs", "val_interval", "guide_fraction")}
    run_bundle(
        bundles_root / name,
        [*configs, "evaluate_classification"],
        output_dir=tmp_path / "scores",
        ckpt_path=tmp_path / "run" / "model.pt",
        section="validation",
        **given,
    )
    metrics = (tmp_path / "scores" / "metrics" / "metrics.csv").read_text()
    assert all(word in metrics for word in ("val_auc", "val_accuracy", "val_cross_entropy"))
    assert len((tmp_path / "scores" / "metrics" / "predictions.csv").read_text().splitlines()) == 12


@pytest.mark.slow
@each_bundle
def test_two_processes_train_one_network(name, bundles_root, classes, tmp_path):
    bundle = bundles_root / name
    (tmp_path / "tiny.json").write_text(json.dumps({k: v for k, v in CLASSIFICATION.items() if k != "device"}))
    names = ("train", "classification", "multi_gpu_train")
    files = [*(str(bundle / "configs" / f"{one}.json") for one in names), str(tmp_path / "tiny.json")]
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle", "run"]
    line += ["--config_file", str(files), "--bundle_root", str(bundle), "--datalist", str(classes)]
    line += ["--output_dir", str(tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for epochs in (1, 2):
        done = subprocess.run(
            [sys.executable, *line, "--epochs", str(epochs)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["trainer"]["epoch"] == epochs
