"""Training of a GAN that makes images of masks, alone or as a part of a larger step."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from monai.utils.enums import CommonKeys
from torch import Tensor
from torch.optim import Optimizer

from medconstraints import checks
from medconstraints.engines.guided import averaged, one_hot
from medconstraints.engines.training import TargetTrainer
from medconstraints.hypergradients import inner_gradient
from medconstraints.losses import MaskToImageLoss
from medconstraints.networks import MaskToImage

__all__ = ["EpochMeans", "MaskToImageTrainer", "check_pair", "discriminator_step"]


class MaskToImageTrainer(TargetTrainer):
    """Trains generator and discriminator of a `MaskToImage` on pairs of image and label map (pix2pix, Isola et al.).

    Its cells keep their weights alpha: how they are learned is `EndToEndTrainer`'s. The mean losses of an epoch are in
    `state.metrics`, "generator_loss" and "discriminator_loss".

    Args:
        network: generator and discriminator.
        optimizer: of `network.generator_weights()`.
        discriminator_optimizer: of `network.discriminator`.
        loss_function: of both.
        num_classes: of the label maps.
        options: the other arguments of `TargetTrainer`, such as `dataset` and `batch_size`.

    Raises:
        ValueError: the generator takes another number of classes; see also `TargetTrainer`.
        RuntimeError: after an epoch with losses that are not finite, or without foreground; nothing of it is saved.
    """

    def __init__(
        self,
        *,
        network: MaskToImage,
        optimizer: Optimizer,
        discriminator_optimizer: Optimizer,
        loss_function: MaskToImageLoss,
        num_classes: int,
        **options: Any,
    ) -> None:
        check_classes(network, num_classes)
        self.discriminator_optimizer, self.num_classes = discriminator_optimizer, num_classes
        self.means = EpochMeans()
        handlers = [self.means, *(options.pop("train_handlers", None) or ())]
        super().__init__(
            network=network,
            optimizer=optimizer,
            loss_function=loss_function,
            amp=False,
            train_handlers=handlers,
            **options,
        )

    def _iteration(self, engine: Engine, batchdata: Any) -> dict[str, Any]:
        state: Any = engine.state
        image, label, *_ = self.prepare_batch(batchdata, state.device, self.non_blocking, **self.to_kwargs)
        image, label = checks.plain(image), checks.plain(label)
        check_pair(image, label)
        gan: Any = self.network
        gan.train()
        mask = one_hot(label, self.num_classes)
        made, weights = gan.generator(mask), gan.generator_weights()
        judged = discriminator_step(gan, self.loss_function, self.discriminator_optimizer, mask, image, made.detach())

        def loss(weights: Any) -> Tensor:
            return self.loss_function.generator(gan.scores(mask, made), made, image)

        value, gradients = inner_gradient(loss, weights, differentiable=False)
        averaged([*gradients.values()])
        for name, weight in weights.items():
            weight.grad = gradients[name]
        engine.state.output = state.output = {
            CommonKeys.IMAGE: image,
            CommonKeys.LABEL: mask,
            CommonKeys.PRED: made.detach(),
            CommonKeys.LOSS: value,
        }
        for event in (
            IterationEvents.FORWARD_COMPLETED,
            IterationEvents.LOSS_COMPLETED,
            IterationEvents.BACKWARD_COMPLETED,
        ):
            engine.fire_event(event)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.means.add(generator_loss=value, discriminator_loss=judged, foreground=mask[:, 1:].sum())
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return state.output


class EpochMeans:
    """Handler that puts the means of numbers of each iteration into `state.metrics` after the epoch.

    They are summed on the device, and the host waits for them once per epoch.

    Raises:
        RuntimeError: after the epoch, when a GAN's loss is not finite or no mask had foreground. It stands before the
            handlers that save, so that the files of the last sound epoch stay.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._publish)

    def add(self, **values: Tensor) -> None:
        """Numbers of an iteration, scalars."""
        for name, value in values.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def _reset(self, engine: Engine) -> None:
        self._sums, self._counts = {}, {}

    def _publish(self, engine: Engine) -> None:
        if not self._sums:
            return
        sums = list(self._sums.values())
        averaged(sums)
        means = dict(zip(self._sums, torch.stack(sums).tolist(), strict=True))
        means = {name: value / self._counts[name] for name, value in means.items()}
        bad = [name for name in ("generator_loss", "discriminator_loss") if not abs(means[name]) < float("inf")]
        if bad:
            raise RuntimeError(
                f"{', '.join(bad)}: NaN or infinite in epoch {engine.state.epoch}; lower the learning rates of "
                "generator and discriminator, or look for extreme intensities. Nothing of this epoch was saved."
            )
        if means.pop("foreground") == 0:
            raise RuntimeError(
                f"label: no mask of epoch {engine.state.epoch} has foreground, so that there is nothing to make images "
                "of; correct the labels, or the patches and the augmentation that cut the foreground off."
            )
        engine.state.metrics.update(means)


def discriminator_step(
    gan: MaskToImage, loss: MaskToImageLoss, optimizer: Optimizer, mask: Tensor, image: Tensor, made: Tensor
) -> Tensor:
    """One step of the discriminator on real pairs and made ones; its loss, detached.

    Args:
        gan: both networks.
        loss: of both.
        optimizer: of the discriminator.
        mask: one-hot, (B, K, *S).
        image: of these masks, (B, C, *S).
        made: generated of these masks, detached.
    """
    value = loss.discriminator(gan.scores(mask, image), gan.scores(mask, made))
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    averaged([p.grad for p in gan.discriminator.parameters() if p.grad is not None])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value.detach()


def check_classes(gan: MaskToImage, num_classes: int) -> None:
    """Refuse a generator that takes another number of classes."""
    checks.whole_number("num_classes", num_classes, 2)
    channels = getattr(gan.generator, "in_channels", num_classes)
    if channels != num_classes:
        raise ValueError(
            f"num_classes: expected {channels}, the channels that the generator takes, got {num_classes}; give it one "
            "channel for each class, the background included."
        )


def check_pair(image: Tensor, label: Tensor) -> None:
    """Refuse an image and a mask of different size."""
    if image.shape[2:] != label.shape[2:] or len(image) != len(label):
        raise ValueError(
            f"label: expected the size of its image, {tuple(image.shape[2:])}, got {tuple(label.shape[2:])}; resample "
            "one to the other."
        )
