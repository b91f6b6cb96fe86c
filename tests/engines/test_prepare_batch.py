"""PrepareBatchTargets: what the network and the loss get."""

import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from medconstraints.engines import PrepareBatchTargets
from medconstraints.losses.base import TargetLoss

# A tensor on the device "meta" has no data: it shows what was moved on a machine without accelerator.
AWAY = torch.device("meta")


class BoxesAndMap(TargetLoss):
    target_keys = ("boxes", "distance")
    optional_keys = ("spacing_mm", "index")
    host_keys = frozenset({"boxes", "index"})


@pytest.fixture
def batch():
    return {
        "image": MetaTensor(torch.zeros(2, 1, 4, 4), meta={"filename_or_obj": ["/data/a.nii.gz", "/data/b.nii.gz"]}),
        "boxes": torch.tensor([[[1, 0, 0, 2, 2]], [[-1] * 5]]),
        "distance": torch.ones(2, 2, 4, 4),
        "index": torch.tensor([3, 4]),
        "label": torch.zeros(2, 1, 4, 4),
    }


def test_the_loss_says_what_is_read_and_what_stays_on_the_host(batch):
    image, targets = PrepareBatchTargets(BoxesAndMap())(batch, AWAY, True)
    assert list(targets) == ["boxes", "distance", "index"]  # spacing_mm is optional, and is not there
    assert image.device == targets["distance"].device == AWAY
    assert targets["boxes"] is batch["boxes"]
    assert targets["index"] is batch["index"]


@pytest.mark.parametrize(
    ("options", "moved"),
    [
        ({"target_keys": ["boxes"]}, {"boxes"}),
        ({"target_keys": ["boxes", "distance"], "host_keys": ["distance"]}, {"boxes"}),
        ({"loss": BoxesAndMap(), "host_keys": []}, {"boxes", "distance", "index"}),
        ({"target_keys": []}, set()),
    ],
)
def test_keys_can_be_given(batch, options, moved):
    _, targets = PrepareBatchTargets(**options)(batch, AWAY)
    assert {key for key, value in targets.items() if value.device == AWAY} == moved


def test_image_options_do_not_reach_the_targets(batch):
    image, targets = PrepareBatchTargets(BoxesAndMap())(batch, "cpu", False, dtype=torch.float64)
    assert image.dtype == torch.float64
    assert targets["distance"].dtype == torch.float32


def test_other_image_key(batch):
    batch["scan"] = batch.pop("image")
    image, _ = PrepareBatchTargets(BoxesAndMap(), image_key="scan")(batch, "cpu")
    assert image is batch["scan"]


@pytest.mark.parametrize(
    ("removed", "words"),
    [(["boxes"], ["a.nii.gz, b.nii.gz", "no ['boxes']", "'label'"]), (["image", "boxes"], ["no ['image', 'boxes']"])],
)
def test_missing_keys_are_named_with_the_volumes(batch, removed, words):
    for key in removed:
        del batch[key]
    with pytest.raises(KeyError) as error:
        PrepareBatchTargets(BoxesAndMap())(batch, "cpu")
    assert all(word in error.value.args[0] for word in words)


def test_a_loss_that_does_not_say_what_it_reads_is_refused():
    with pytest.raises(TypeError, match=r"target_keys.*got MSELoss"):
        PrepareBatchTargets(nn.MSELoss())
    with pytest.raises(ValueError, match="loss, target_keys"):
        PrepareBatchTargets()
