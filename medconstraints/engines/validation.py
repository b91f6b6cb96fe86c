"""The evaluator of a segmentation, in training and for the numbers of a trained network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ignite.distributed as idist
import torch
from ignite.metrics import Metric
from monai.data import DataLoader, DistributedSampler
from monai.engines import SupervisedEvaluator, default_prepare_batch
from monai.handlers import MeanDice, from_engine
from monai.inferers import Inferer
from monai.transforms import AsDiscreted, Compose, Transform
from torch import nn
from torch.utils.data import Dataset

from medconstraints import checks

__all__ = ["ValidationEvaluator"]


class ValidationEvaluator(SupervisedEvaluator):
    """MONAI's `SupervisedEvaluator` with the mean Dice of the classes, without background, as its key metric.

    An empty data set is allowed: training without labelled validation volumes then runs no validation. In distributed
    training every process takes its own part of `dataset`, or all of it when it has fewer items than processes.

    Args:
        device: where the network is.
        network: the network.
        num_classes: channels of its output, background included; read by the default postprocessing.
        dataset: items with image and label (1, *S).
        val_data_loader: batches, in place of `dataset`.
        batch_size, num_workers: of the loader of `dataset`.
        inferer: None is MONAI's `SimpleInferer`.
        prepare_batch: as in MONAI.
        postprocessing: None takes the class of the largest output, and makes it and the label one-hot.
        key_val_metric: None is `{"val_mean_dice": MeanDice(include_background=False)}` of prediction and label.
        additional_metrics: name -> further metric.
        val_handlers: attached when all else is set.
        amp: mixed precision; None uses it on a GPU.

    Raises:
        ValueError: both or none of `dataset` and `val_data_loader`, or neither `postprocessing` nor two classes.

    Example:
        >>> items = [{"image": torch.zeros(1, 4, 4), "label": torch.zeros(1, 4, 4)}]
        >>> evaluator = ValidationEvaluator(device="cpu", network=nn.Conv2d(1, 2, 1), num_classes=2, dataset=items)
        >>> evaluator.state.key_metric_name
        'val_mean_dice'
    """

    def __init__(
        self,
        *,
        device: str | torch.device,
        network: nn.Module,
        num_classes: int | None = None,
        dataset: Dataset[Any] | Sequence[Any] | None = None,
        val_data_loader: Iterable[Any] | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        inferer: Inferer | None = None,
        prepare_batch: Callable[..., Any] = default_prepare_batch,
        postprocessing: Transform | None = None,
        key_val_metric: dict[str, Metric] | None = None,
        additional_metrics: dict[str, Metric] | None = None,
        val_handlers: Sequence[Any] | None = None,
        amp: bool | None = None,
    ) -> None:
        if (dataset is None) == (val_data_loader is None):
            raise ValueError("dataset, val_data_loader: expected exactly one of them; a data set gets its own loader.")
        device = torch.device(device)
        if key_val_metric is None:
            dice = MeanDice(include_background=False, output_transform=from_engine(["pred", "label"]))
            key_val_metric = {"val_mean_dice": dice}
        super().__init__(
            device=device,
            val_data_loader=_loader(dataset, batch_size, num_workers) if val_data_loader is None else val_data_loader,
            network=network,
            inferer=inferer,
            prepare_batch=prepare_batch,
            postprocessing=_one_hot(num_classes) if postprocessing is None else postprocessing,
            key_val_metric=key_val_metric,
            additional_metrics=additional_metrics,
            amp=device.type == "cuda" if amp is None else amp,
        )
        self._register_handlers(val_handlers or ())


def _loader(dataset: Any, batch_size: int, num_workers: int) -> DataLoader:
    processes = idist.get_world_size()
    sampler = None
    if processes > 1 and len(dataset) >= processes:
        sampler = DistributedSampler(dataset, even_divisible=False, shuffle=False)
    return DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, sampler=sampler)


def _one_hot(num_classes: int | None) -> Compose:
    count = checks.whole_number("num_classes", num_classes, 2)
    return Compose(
        [
            AsDiscreted(keys="pred", argmax=True, to_onehot=count),
            AsDiscreted(keys="label", to_onehot=count),
        ]
    )
