"""PrepareBatchTargets and RestoreLabelHandler: what the network and the loss get, and what postprocessing sees."""

import pytest
import torch
from ignite.engine import Events
from monai.transforms import Compose, Lambdad

from medconstraints.engines import PrepareBatchTargets
from medconstraints.handlers import RestoreLabelHandler

# A tensor on the device "meta" has no data: it shows what was moved on a machine without accelerator.
AWAY = torch.device("meta")


@pytest.fixture
def batch():
    return {
        "image": torch.zeros(2, 1, 4, 4),
        "boxes": torch.tensor([[[1, 0, 0, 2, 2]], [[-1] * 5]]),
        "distance": torch.ones(2, 2, 4, 4),
        "label": torch.zeros(2, 1, 4, 4),
    }


def test_boxes_stay_on_the_host(batch):
    image, targets = PrepareBatchTargets(["boxes", "distance"])(batch, AWAY, True)
    assert image.device == targets["distance"].device == AWAY
    assert targets["boxes"] is batch["boxes"]
    assert set(targets) == {"boxes", "distance"}


@pytest.mark.parametrize(
    ("target_keys", "host_keys", "moved"),
    [
        (("boxes",), ("boxes",), set()),
        (("boxes",), (), {"boxes"}),
        (("boxes", "distance"), ("distance",), {"boxes"}),
        (("distance",), ("boxes",), {"distance"}),
        ((), (), set()),
    ],
)
def test_targets_move_unless_they_are_host_keys(batch, target_keys, host_keys, moved):
    _, targets = PrepareBatchTargets(target_keys, host_keys=host_keys)(batch, AWAY)
    assert set(targets) == set(target_keys)
    assert {key for key, value in targets.items() if value.device == AWAY} == moved


def test_image_options_do_not_reach_the_targets(batch):
    image, targets = PrepareBatchTargets(["distance"])(batch, "cpu", False, dtype=torch.float64)
    assert image.dtype == torch.float64
    assert targets["distance"].dtype == torch.float32


def test_other_image_key(batch):
    batch["scan"] = batch.pop("image")
    image, _ = PrepareBatchTargets(image_key="scan")(batch, "cpu")
    assert image is batch["scan"]


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (["boxes"], r"no \['boxes'\], it has \['distance', 'image', 'label'\]; add the transform"),
        (["image"], r"no \['image'\], it has"),
        (["image", "boxes"], r"no \['image', 'boxes'\], it has"),
    ],
)
def test_missing_keys_are_named(batch, removed, message):
    for key in removed:
        del batch[key]
    with pytest.raises(KeyError, match=message):
        PrepareBatchTargets()(batch, "cpu")


def test_without_the_handler_the_targets_are_the_label(make_trainer, items):
    """Why RestoreLabelHandler exists: the trainer's output carries the target dictionary as its label."""
    trainer = make_trainer(items[:2])
    trainer.run()
    assert set(trainer.state.output[0]["label"]) == {"boxes"}


def test_label_is_back_before_decollation(make_trainer, items):
    outputs = []
    trainer = make_trainer(items, handlers=[RestoreLabelHandler()])
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: outputs.extend(engine.state.output))
    trainer.run()
    assert len(outputs) == 5  # decollated: one dictionary per item
    for item, output in zip(items, outputs, strict=True):
        assert torch.equal(output["label"], item["label"])
        assert output["pred"].shape == (1, 2, 2)


def test_postprocessing_and_metrics_read_the_label(make_trainer, items):
    postprocessing = Compose([Lambdad("label", lambda label: label + 10)])
    trainer = make_trainer(items[:2], handlers=[RestoreLabelHandler()], postprocessing=postprocessing)
    trainer.run()
    assert [int(output["label"].max()) for output in trainer.state.output] == [10, 11]


def test_without_a_label_there_is_none(make_trainer, items):
    for item in items:
        del item["label"]
    trainer = make_trainer(items[:2], handlers=[RestoreLabelHandler()])
    trainer.run()
    assert [sorted(output) for output in trainer.state.output] == [["image", "loss", "pred"]] * 2


def test_other_label_key(make_trainer, items):
    for item in items:
        item["mask"] = item.pop("label")
    trainer = make_trainer(items[:2], handlers=[RestoreLabelHandler("mask")])
    trainer.run()
    assert [int(output["label"].max()) for output in trainer.state.output] == [0, 1]
