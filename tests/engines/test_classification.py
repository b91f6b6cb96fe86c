"""ClassificationEvaluator against sums by hand."""

import pytest
import torch
from torch import nn

from medconstraints.engines import ClassificationEvaluator


class Given(nn.Module):
    """Logits that stand in the images."""

    def forward(self, image):
        return image.flatten(1)


def test_area_accuracy_and_cross_entropy():
    logits = torch.tensor([[2.0, 0.0], [1.0, 3.0], [1.0, 1.5], [0.0, 0.2]])
    labels = [0, 1, 0, 1]
    items = [{"image": row.reshape(1, 1, 2), "label": label} for row, label in zip(logits, labels, strict=True)]
    evaluator = ClassificationEvaluator(device="cpu", network=Given(), num_classes=2, dataset=items, batch_size=3)
    evaluator.run()
    metrics = evaluator.state.metrics
    # Of the four pairs of a positive and a negative image one is in the wrong order.
    assert metrics["val_auc"] == pytest.approx(0.75)
    assert metrics["val_accuracy"] == pytest.approx(0.75)
    expected = nn.functional.cross_entropy(logits, torch.tensor(labels))
    assert metrics["val_cross_entropy"] == pytest.approx(float(expected), rel=1e-5)
    assert evaluator.state.key_metric_name == "val_auc"
