"""MONAI's trainer for losses that say which targets they read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine
from ignite.metrics import Metric
from monai.data import DataLoader, DistributedSampler
from monai.engines import IterationEvents, SupervisedTrainer, default_prepare_batch
from monai.inferers import Inferer
from monai.transforms import Transform
from monai.utils.enums import CommonKeys
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import Dataset
from torch.utils.data import DistributedSampler as TorchDistributedSampler

from medconstraints import checks
from medconstraints.engines.prepare_batch import PrepareBatchTargets
from medconstraints.losses.base import TargetLoss
from medconstraints.transforms.collate import pad_boxes_collate

__all__ = ["TargetTrainer"]


class TargetTrainer(SupervisedTrainer):
    """MONAI's `SupervisedTrainer` that takes the targets of a batch from what its loss says it reads.

    Postprocessing and metrics find the plain label of the batch where they look for it, not the dictionary of targets
    that the loss got; without a label in the batch there is none.

    Args:
        device: where the network and the loss are; the loss is moved there.
        max_epochs: epochs of the run.
        dataset: training items; batches of them are shuffled, boxes padded, and a last batch that is not full is left
            out if there are others. In distributed training every process takes its own part.
        batch_size, num_workers: of the loader of `dataset`.
        train_data_loader: batches, dictionaries, in place of `dataset`.
        network: the network, on the device.
        optimizer: of the network's parameters.
        loss_function: `(output, target) -> scalar`; one that is no `TargetLoss`, such as MONAI's, gets the label.
        train_handlers: attached when all else is set, so that they find the network, the optimizer and the loss.
        prepare_batch: None takes `PrepareBatchTargets(loss_function)`, or MONAI's default for a loss of others.
        inferer: None is a `SimpleInferer`.
        postprocessing, key_train_metric, additional_metrics: for metrics of the training, as in MONAI.
        amp: mixed precision; None uses it on a GPU.
        amp_kwargs: arguments of `torch.autocast`, such as `{"dtype": torch.bfloat16}`.
        epoch_length, non_blocking, decollate, compile, accumulation_steps: as in MONAI.

    Raises:
        ValueError: both or none of `dataset` and `train_data_loader`, or a loader that does not divide the data among
            the processes of distributed training.

    Example:
        >>> from monai.losses import DiceLoss
        >>> network = nn.Conv2d(1, 2, 1)
        >>> trainer = TargetTrainer(
        ...     device="cpu", max_epochs=1, network=network, optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        ...     dataset=[{"image": torch.zeros(1, 4, 4), "label": torch.zeros(1, 4, 4)}],
        ...     loss_function=DiceLoss(softmax=True, to_onehot_y=True))
        >>> trainer.run()
        >>> trainer.state.epoch
        1
    """

    def __init__(
        self,
        *,
        device: str | torch.device,
        max_epochs: int,
        network: nn.Module,
        optimizer: Optimizer,
        loss_function: Callable[..., Any],
        dataset: Dataset[Any] | Sequence[Any] | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        train_data_loader: Iterable[Any] | None = None,
        train_handlers: Sequence[Any] | None = None,
        prepare_batch: Callable[..., Any] | None = None,
        inferer: Inferer | None = None,
        postprocessing: Transform | None = None,
        key_train_metric: dict[str, Metric] | None = None,
        additional_metrics: dict[str, Metric] | None = None,
        amp: bool | None = None,
        amp_kwargs: dict[str, Any] | None = None,
        epoch_length: int | None = None,
        non_blocking: bool = False,
        decollate: bool = True,
        compile: bool = False,
        accumulation_steps: int = 1,
    ) -> None:
        if (dataset is None) == (train_data_loader is None):
            raise ValueError("dataset, train_data_loader: expected exactly one of them, a data set gets its loader.")
        loader = _loader(dataset, batch_size, num_workers) if train_data_loader is None else train_data_loader
        if train_data_loader is not None and idist.get_world_size() > 1:
            sampler = train_data_loader.sampler if isinstance(train_data_loader, TorchDataLoader) else None
            if not isinstance(sampler, TorchDistributedSampler):
                raise ValueError(
                    "train_data_loader: expected one with a DistributedSampler, because several processes train; else "
                    "each would take all data. Give a dataset, whose loader divides it, or use one process."
                )
        checks.whole_number("max_epochs", max_epochs, 1)
        device = torch.device(device)
        if isinstance(loss_function, nn.Module):
            loss_function = loss_function.to(device)
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=loader,
            network=network,
            optimizer=optimizer,
            loss_function=loss_function,
            prepare_batch=prepare_batch or _preparation(loss_function),
            inferer=inferer,
            postprocessing=postprocessing,
            key_train_metric=key_train_metric,
            additional_metrics=additional_metrics,
            amp=device.type == "cuda" if amp is None else amp,
            amp_kwargs=amp_kwargs,
            epoch_length=epoch_length,
            non_blocking=non_blocking,
            decollate=decollate,
            accumulation_steps=accumulation_steps,
        )
        if compile:  # in place, where MONAI wraps: the weights keep their names
            network.compile()
        self.compile = compile
        # Before the batch is taken apart for postprocessing and metrics.
        self.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._restore_label)
        self._register_handlers(train_handlers or ())

    @staticmethod
    def _restore_label(engine: Engine) -> None:
        output: Any = engine.state.output
        if not isinstance(output[CommonKeys.LABEL], Mapping):
            return
        label = engine.state.batch.get(CommonKeys.LABEL)
        if label is None:
            del output[CommonKeys.LABEL]
        else:
            output[CommonKeys.LABEL] = label.to(output[CommonKeys.PRED].device)


def _preparation(loss: Any) -> Callable[..., Any]:
    return PrepareBatchTargets(loss) if isinstance(loss, TargetLoss) else default_prepare_batch


def _loader(dataset: Any, batch_size: int, num_workers: int) -> DataLoader:
    sampler = DistributedSampler(dataset, even_divisible=True, shuffle=True) if idist.get_world_size() > 1 else None
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        sampler=sampler,
        shuffle=sampler is None,
        drop_last=sampler is None and len(dataset) > batch_size,
        collate_fn=pad_boxes_collate,
    )
