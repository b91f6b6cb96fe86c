"""The evaluator of a classification, in training and for the numbers of a trained network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from ignite.metrics import Accuracy, Loss
from monai.handlers import ROCAUC, from_engine
from monai.inferers import Inferer
from monai.transforms import Activationsd, Compose, Lambdad
from torch import Tensor, nn
from torch.nn import functional as F

from medconstraints import checks
from medconstraints.engines.validation import ValidationEvaluator

__all__ = ["ClassificationEvaluator"]


class ClassificationEvaluator(ValidationEvaluator):
    """Area under the ROC curve (mean of the classes), accuracy and cross-entropy; the first is the key metric.

    Accuracy alone is coarse: with 300 images one error is a third of a per cent.

    Args:
        device: where the network is.
        network: logits (B, C) of images.
        num_classes: C.
        dataset: items with image and class number under "label".
        batch_size: of the loader, as `num_workers`.
        num_workers: see there.
        inferer: None is MONAI's `SimpleInferer`.
        val_handlers: attached when all else is set.

    Attributes:
        state.metrics: `val_auc`, `val_accuracy`, `val_cross_entropy` after a run.
    """

    def __init__(
        self,
        *,
        device: str | torch.device,
        network: nn.Module,
        num_classes: int,
        dataset: Any,
        batch_size: int = 128,
        num_workers: int = 0,
        inferer: Inferer | None = None,
        val_handlers: Sequence[Any] | None = None,
    ) -> None:
        count = checks.whole_number("num_classes", num_classes, 2)
        super().__init__(
            device=device,
            network=network,
            dataset=dataset,
            batch_size=batch_size,
            num_workers=num_workers,
            inferer=inferer,
            postprocessing=Compose(
                [
                    Activationsd("pred", softmax=True),
                    Lambdad("label", lambda label: F.one_hot(torch.as_tensor(label).long().reshape(()), count)),
                ]
            ),
            key_val_metric={"val_auc": ROCAUC(output_transform=from_engine(["pred", "label"]))},
            additional_metrics={
                "val_accuracy": Accuracy(output_transform=_classes),
                "val_cross_entropy": Loss(_negative_log, output_transform=_classes),
            },
            val_handlers=val_handlers,
        )


def _classes(output: Sequence[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Probabilities (B, C) and class numbers (B) of decollated items."""
    probs = torch.stack([torch.as_tensor(item["pred"]) for item in output]).as_subclass(Tensor)
    return probs, torch.stack([item["label"].argmax() for item in output]).as_subclass(Tensor).to(probs.device)


def _negative_log(probs: Tensor, classes: Tensor) -> Tensor:
    return F.nll_loss(probs.clamp_min(torch.finfo(probs.dtype).tiny).log(), classes)
