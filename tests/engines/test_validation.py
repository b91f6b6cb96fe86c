"""ValidationEvaluator: the mean Dice of the classes, its options, and an empty data set."""

import pytest
import torch
from monai.data import DataLoader
from monai.handlers import HausdorffDistance, from_engine
from monai.transforms import Compose, Lambdad
from torch import nn

from medconstraints.engines import ValidationEvaluator


class Shifted(nn.Module):
    """Predicts the classes of the image, one of four voxels of class 1 missed."""

    def forward(self, x):
        classes = x[:, 0].long().clone()
        classes[:, 0, 0] = 0
        return torch.nn.functional.one_hot(classes, 3).movedim(-1, 1).float()


def item():
    label = torch.zeros(1, 4, 4)
    label[:, :2, :2], label[:, 3] = 1, 2
    return {"image": label.clone(), "label": label}


def make(**more):
    return ValidationEvaluator(
        **({"device": "cpu", "network": Shifted(), "num_classes": 3, "dataset": [item()]} | more)
    )


def test_key_metric_is_the_dice_of_the_foreground():
    evaluator = make()
    evaluator.run()
    assert evaluator.state.metrics["val_mean_dice"] == pytest.approx((2 * 3 / 7 + 1) / 2)
    assert evaluator.state.best_metric == evaluator.state.metrics["val_mean_dice"]
    assert evaluator.amp is False


def test_further_metrics_and_own_postprocessing():
    distance = HausdorffDistance(include_background=False, output_transform=from_engine(["pred", "label"]))
    evaluator = make(additional_metrics={"val_hd": distance})
    evaluator.run()
    assert set(evaluator.state.metrics) == {"val_mean_dice", "val_hd"}
    seen = []
    own = Compose([Lambdad("pred", lambda pred: seen.append(1) or pred[:1]), Lambdad("label", lambda label: label > 0)])
    evaluator = make(num_classes=None, postprocessing=own)
    evaluator.run()
    assert seen == [1]


def test_batches_of_a_loader_or_a_size():
    loader = DataLoader([item(), item()], batch_size=2)
    for evaluator in (make(dataset=None, val_data_loader=loader), make(dataset=[item(), item()], batch_size=2)):
        evaluator.run()
        assert evaluator.state.iteration == 1


def test_an_empty_data_set_is_allowed():
    assert make(dataset=[]).state.epoch_length == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": None}, "dataset, val_data_loader"),
        ({"val_data_loader": []}, "dataset, val_data_loader"),
        ({"num_classes": 1}, "num_classes.*>= 2"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
