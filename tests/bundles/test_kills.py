"""Runs that are killed again and again, while they train and while they write, end as if nothing had happened."""

import json
import os
import random
import signal
import time
import traceback

import pytest
import torch

import medconstraints.handlers.resume as resume
from medconstraints.synthetic import make_cohort

pytestmark = pytest.mark.slow

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
        "dropout": 0.1,
    },
    "epochs": 12,
    "val_interval": 1,
    "batch_size": 2,
    "num_workers": 0,
    "seed": 3,
}
RUNS = {
    "box_prior": (["train"], {}),
    "boundary_loss": (["train"], {}),
    "size_constraint": (["train"], {}),
    "log_barrier": (["train"], {}),
    "log_barrier, Lagrangian": (["train", "baselines"], {"baseline": "augmented_lagrangian"}),
    "e2e_augmentation": (
        ["train"],
        {"gan_def#generator#channels": [4, 6], "gan_def#generator#strides": [2, 2], "train#trainer#warm_up": 2},
    ),
    "curriculum_size": (
        ["train"],
        {
            "regressor_epochs": 6,
            "regression#val_interval": 1,
            "regression#repeats": 2,
            "fully_labelled": 2,
            "regressor_def#backbone#channels": [4, 8],
            "regressor_def#features": 8,
        },
    ),
    "lookahead_adversarial": (
        ["train"],
        {"eval_every": 1, "discriminator_def#body#channels": 4, "train#trainer#discriminator_steps": 3},
    ),
}
KILLS, KILLS_WHILE_WRITING = 20, 10


def in_child(work):
    """Process number of a copy of this process that does the work and ends with status 0, or 1 after an error."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def kill_in_write(number):
    """Half a file is written the n-th time, and the process killed."""
    whole, calls = torch.save, []

    def save(state, path):
        whole(state, path)
        calls.append(path)
        if len(calls) == number:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    resume.torch.save = save


def ended(child):
    """Whether it was killed; its own errors fail the test."""
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def final(folder):
    state = torch.load(folder / "last.pt", weights_only=True)
    best = torch.load(next(folder.glob("[mb]*.pt")), weights_only=True)  # model.pt, or best.pt of a search
    state.pop("settings")
    return {name: tensor for name, tensor in resume._tensors({"last": state, "best": best})}, state["trainer"]


@pytest.fixture
def search_cohort(tmp_path):
    """Parts that are large enough for the intervals of a search."""
    path = make_cohort(
        tmp_path / "parts", shape=(24, 24, 16), num_classes=2, num_training=4, num_validation=10, num_test=5
    )
    content = json.loads(path.read_text())
    content["confirm"], content["validation"] = content["validation"][5:], content["validation"][:5]
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_killed_over_and_over(name, bundles_root, run_bundle, request, parsed, tmp_path):
    configs, options = RUNS[name]
    datalist = request.getfixturevalue("search_cohort" if name.startswith("lookahead") else "two_class_cohort")
    if name.startswith("lookahead"):
        network = parsed(bundles_root / name, "train", "network_def", **TINY)
        torch.save(network.state_dict(), tmp_path / "start.pt")
        options = {**options, "start_checkpoint": str(tmp_path / "start.pt")}
    bundle, draws = bundles_root / name.split(",")[0], random.Random(0)

    def start(folder, before=lambda: None):
        def work():
            torch.set_num_threads(1)
            before()
            run_bundle(bundle, configs, datalist=datalist, output_dir=tmp_path / folder, **TINY, **options)

        return in_child(work)

    begun = time.monotonic()
    assert not ended(start("whole"))
    seconds = time.monotonic() - begun
    killed = []
    for kind in ["time"] * KILLS + ["write"] * KILLS_WHILE_WRITING:
        number = draws.randrange(1, 6)
        child = start("cut", (lambda number=number: kill_in_write(number)) if kind == "write" else lambda: None)
        if kind == "time":
            time.sleep(draws.uniform(0.1, 0.6) * seconds)
            os.kill(child, signal.SIGKILL)
        killed += [kind] * ended(child)
        if final_epoch(tmp_path / "cut") == TINY["epochs"]:  # it is through: the next one begins anew
            assert_same(tmp_path / "whole", tmp_path / "cut")
            (tmp_path / "cut").rename(tmp_path / f"done_{len(list(tmp_path.iterdir()))}")
    assert {*killed} == {"time", "write"} and len(killed) >= (KILLS + KILLS_WHILE_WRITING) // 2
    assert not ended(start("cut"))
    assert_same(tmp_path / "whole", tmp_path / "cut")


def final_epoch(folder):
    return torch.load(folder / "last.pt", weights_only=True)["trainer"]["epoch"] if (folder / "last.pt").exists() else 0


def assert_same(one, two):
    (first, trainer), (second, other) = final(one), final(two)
    assert trainer == other and first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
