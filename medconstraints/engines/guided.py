"""A trainer whose steps are judged by guide images: the part that augmentation learning methods share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.engines import IterationEvents
from monai.utils.enums import CommonKeys
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from medconstraints import checks
from medconstraints.data.guide_split import EpochSampler, GuideSplit
from medconstraints.data.missing import MissingData
from medconstraints.engines.training import TargetTrainer
from medconstraints.hypergradients import inner_state

__all__ = ["GuidedTrainer", "averaged", "one_hot"]


class GuidedTrainer(TargetTrainer):
    """Base of trainers that look at guide images beside each training batch.

    The guide images are a part of the training set that is drawn anew in each epoch (`GuideSplit`), or a data set of
    their own; no image trains and guides in the same epoch. A subclass writes `guided_step`, which sets the gradients
    of the network's parameters; the optimizer then steps. Passes are in full precision: second derivatives overflow in
    half.

    Args:
        device: where the network and the loss are.
        max_epochs: epochs of the run.
        dataset: training items, dictionaries of image and label, with their entries under `data`, as MONAI's data sets.
        network: the network.
        optimizer: of the network; SGD, Adam, AdamW or RMSprop of torch.
        loss_function: `(output, label) -> scalar`.
        batch_size: of training batches.
        guide_batch_size: of guide batches; None takes `batch_size`.
        guide_fraction: share of the patients that guides, see `GuideSplit`.
        redraw: see `GuideSplit`.
        guide_dataset: images that only guide, in place of a part of `dataset`.
        guide_mode: of the network when its loss on guide images is taken. "eval" is what inference will do: running
            statistics and no dropout. In "train" batch normalisation takes the statistics of the guide batch, and does
            not see that its contrast or brightness is another than that of the images that train.
        seed: of the parts and of the order in which images come.
        num_workers: of each loader.
        max_norm: the norm to which gradients are scaled down, None for none.
        train_handlers: attached when all else is set.
        decollate: see MONAI.

    Raises:
        TypeError: the optimizer's step is not known, see `inner_state`.
        ValueError: see `GuideSplit`; a guide data set is empty or has images of the training set; a batch of one, also
            because a part has no second image in a process.

    Attributes:
        skipped_steps: steps of what learns beside the network that were left out, because its gradient was not finite.
    """

    def __init__(
        self,
        *,
        device: str | torch.device,
        max_epochs: int,
        dataset: Any,
        network: nn.Module,
        optimizer: Optimizer,
        loss_function: Callable[..., Any],
        batch_size: int = 16,
        guide_batch_size: int | None = None,
        guide_fraction: float = 0.2,
        redraw: bool = True,
        guide_dataset: Any = None,
        guide_mode: str = "train",
        seed: int = 0,
        num_workers: int = 0,
        max_norm: float | None = None,
        train_handlers: Sequence[Any] | None = None,
        decollate: bool = True,
    ) -> None:
        checks.whole_number("batch_size", batch_size, 2)  # statistics of a batch of one say nothing
        inner_state(optimizer, {})
        self.max_norm = max_norm
        self.guide_mode = checks.choice("guide_mode", guide_mode, ("train", "eval"))
        self.skipped_steps = 0
        guide_size = checks.whole_number("guide_batch_size", guide_batch_size or batch_size, 2)
        if isinstance(_items(dataset), MissingData):
            training = guide = DataLoader(dataset, batch_size=batch_size)
        else:
            if guide_dataset is None:
                guide_dataset = dataset
                parts = GuideSplit(_items(dataset), fraction=guide_fraction, seed=seed, redraw=redraw).parts
            else:
                _check_disjoint(_items(dataset), _items(guide_dataset))
                everything = list(range(len(dataset))), list(range(len(guide_dataset)))

                def parts(epoch: int) -> tuple[list[int], list[int]]:
                    return everything

            sampler = EpochSampler(lambda epoch: parts(epoch)[0], seed=seed)
            training = _loader(dataset, sampler, batch_size, num_workers)
            sampler = EpochSampler(lambda epoch: parts(epoch)[1], seed=seed + 1)
            guide = _loader(guide_dataset, sampler, guide_size, num_workers)
        self.guide_loader = guide
        self._guide_batches: Iterator[Any] | None = None
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            network=network,
            optimizer=optimizer,
            loss_function=loss_function,
            train_data_loader=training,
            decollate=decollate,
            amp=False,
        )
        self.add_event_handler(Events.EPOCH_COMPLETED, self._forget_guide)
        self._register_handlers(train_handlers or ())

    def guided_step(self, image: Tensor, label: Any) -> tuple[Tensor, Tensor, Any]:
        """Gradients of a training batch, set in the network's parameters.

        Args:
            image: the batch's images.
            label: what the loss takes, on the device.

        Returns:
            Loss, output of the network, and the label that the loss got.
        """
        raise NotImplementedError

    def _iteration(self, engine: Engine, batchdata: Any) -> dict[str, Any]:
        state: Any = engine.state
        image, label = self._prepared(batchdata)
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss, output, target = self.guided_step(image, label)
        engine.state.output = state.output = {
            CommonKeys.IMAGE: image,
            CommonKeys.LABEL: target,
            CommonKeys.PRED: output.detach(),
            CommonKeys.LOSS: loss.detach(),
        }
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        engine.fire_event(IterationEvents.LOSS_COMPLETED)
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm)
        self.optimizer.step()
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return state.output

    def parameters(self) -> dict[str, nn.Parameter]:
        """The network's trainable parameters by name, without the wrapper of distributed training."""
        return {name: value for name, value in self.plain_network.named_parameters() if value.requires_grad}

    @property
    def plain_network(self) -> nn.Module:
        """The network without the wrapper of distributed training, whose gradients are averaged by `averaged`."""
        return self.network.module if isinstance(self.network, DistributedDataParallel) else self.network

    def forward(self, parameters: Mapping[str, Tensor], image: Tensor) -> Tensor:
        """Output of the network with these parameters."""
        return functional_call(self.plain_network, dict(parameters), (image,))

    def guide_batch(self) -> tuple[Tensor, Any]:
        """The next guide images and labels of the epoch, on the device; after the last ones the first come again."""
        for _ in range(2):
            if self._guide_batches is None:
                sampler: Any = self.guide_loader.sampler
                sampler.set_epoch(self.state.epoch)
                self._guide_batches = iter(self.guide_loader)
            batch = next(self._guide_batches, None)
            if batch is not None:
                return self._prepared(batch)
            self._guide_batches = None
        raise ValueError("guide images: expected at least one full batch, got none; lower guide_batch_size.")

    def guide_loss_of(self, image: Tensor, target: Any) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """Loss of guide images as a function of the parameters, in the mode that was asked for."""

        def loss(parameters: Mapping[str, Tensor]) -> Tensor:
            modes = {module: module.training for module in self.plain_network.modules()}
            self.plain_network.train(self.guide_mode == "train")
            try:
                return self.loss_function(self.forward(parameters, image), target)
            finally:
                for module, training in modes.items():
                    module.training = training

        return loss

    def step_beside(self, optimizer: Optimizer) -> None:
        """Step of an optimizer of something else that learns; left out and counted when a gradient is not finite."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        averaged(gradients)
        if bool(torch.stack([gradient.isfinite().all() for gradient in gradients]).all()):
            optimizer.step()
        else:
            self.skipped_steps += 1
        optimizer.zero_grad(set_to_none=True)

    def _prepared(self, batch: Any) -> tuple[Tensor, Any]:
        image, label, *_ = self.prepare_batch(batch, self.state.device, self.non_blocking, **self.to_kwargs)
        return checks.plain(image), checks.plain(label)

    def _forget_guide(self, engine: Engine) -> None:
        self._guide_batches = None
        if self.skipped_steps:
            engine.state.metrics["skipped_steps"] = self.skipped_steps


def averaged(tensors: Sequence[Tensor]) -> None:
    """Mean over the processes of distributed training, in place."""
    if idist.get_world_size() > 1:
        for tensor in tensors:
            tensor.copy_(idist.all_reduce(tensor, op="SUM") / idist.get_world_size())


def one_hot(label: Tensor, num_classes: int) -> Tensor:
    """Class numbers (B,) or label maps (B, 1, *S) as (B, K) or (B, K, *S).

    Raises:
        ValueError: a value outside 0..num_classes - 1, looked at on the CPU.
    """
    numbers = (label if label.dim() == 1 else label[:, 0]).long()
    if checks.readable(label) and not 0 <= int(numbers.min()) <= int(numbers.max()) < num_classes:
        raise ValueError(
            f"label: expected class numbers 0..{num_classes - 1}, got {int(numbers.min())}..{int(numbers.max())}; "
            "correct num_classes, or map the labels."
        )
    return F.one_hot(numbers, num_classes).movedim(-1, 1).to(torch.get_default_dtype())


def _items(dataset: Any) -> Any:
    return getattr(dataset, "data", dataset)


def _loader(dataset: Any, sampler: EpochSampler, batch_size: int, num_workers: int) -> DataLoader:
    size = min(batch_size, len(sampler))
    if size < 2:
        raise ValueError(
            f"dataset: expected at least two images of each part in each process, got {len(sampler)}; give more, take "
            "fewer processes, or change guide_fraction."
        )
    return DataLoader(dataset, batch_size=size, sampler=sampler, drop_last=True, num_workers=num_workers)


def _check_disjoint(training: Any, guide: Any) -> None:
    if not len(guide):
        raise ValueError("guide_dataset: expected images, got none; give some, or guide_fraction in its place.")
    classes = {item.get("label") for item in guide if isinstance(item.get("label"), int)}
    if len(classes) == 1:
        raise ValueError(f"guide_dataset: expected several classes, got class {classes.pop()} alone; add the others.")
    names = [{str(item.get("case", item["image"])) for item in items if _is_named(item)} for items in (training, guide)]
    if shared := names[0] & names[1]:
        raise ValueError(
            f"guide_dataset: expected images that do not train, got {len(shared)} of both; leave them out of one."
        )


def _is_named(item: Mapping[str, Any]) -> bool:
    return "case" in item or isinstance(item["image"], str)
