"""SAFLEX: a trainer that weighs and relabels augmented samples by what they do for guide images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.transforms import Randomizable
from torch import Tensor
from torch.nn import functional as F

from medconstraints import checks
from medconstraints.engines.guided import GuidedTrainer, averaged, one_hot
from medconstraints.hypergradients import frozen_statistics, guide_gradient
from medconstraints.saflex import RefinedBatch, Rules, guide_step, label_gains, refine, region_gains

__all__ = ["SaflexTrainer"]


class SaflexTrainer(GuidedTrainer):
    """Trains on each batch twice: as it is, and augmented with weights and soft labels from SAFLEX (algorithm 1).

    The augmentation is any: the items carry its result under `augmented_key`, beside the plain image, or `mixing` makes
    it of the batch. For classes each sample gets a soft label and a weight; for label maps a soft label for the region
    of each class, and a weight by whether a step down the guide gradient lowers its own loss, also one that is no
    cross-entropy. A part of the training set guides, see `GuidedTrainer`.

    A baseline that is to be compared gets the same images: twice the batch, and the guide images as training data too.

    Args:
        num_classes: K.
        rules: how labels and weights are made: "centred" or "paper", or values of `Rules`. "none" trains on the same
            batches with the labels of the augmentation: the control.
        mixing: `(image, label) -> (image, label)` of a batch and its one-hot labels, such as MONAI's `MixUp` or
            `CutMix`; None takes `augmented_key`.
        augmented_key: key of the augmented image of an item; its label map has this key with "_label" behind.
        guide_interval: iterations for which a guide gradient is used.
        batch_size: of training batches.
        guide_batch_size: None takes a quarter of `batch_size`, which costs less.
        seed: see `GuidedTrainer`; of what `mixing` draws too.
        options: the other arguments of `GuidedTrainer`. For classes the loss is `CrossEntropyLoss`, which the augmented
            samples have in any case. With label maps it gets one-hot channels that may be soft, as MONAI's
            `DiceCELoss(softmax=True)` takes them, and the augmented samples one by one.

    Raises:
        TypeError: see `GuidedTrainer`.
        ValueError: see `GuidedTrainer`, or an unknown rule.

    Attributes:
        last_refined: the `RefinedBatch` of the last iteration.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        rules: Rules | Mapping[str, Any] | str = "centred",
        mixing: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        augmented_key: str = "augmented",
        guide_interval: int = 1,
        batch_size: int = 16,
        guide_batch_size: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.num_classes = checks.whole_number("num_classes", num_classes, 2)
        self.rules = None if rules == "none" else Rules.named(rules)
        self.mixing = mixing
        self.augmented_key = augmented_key
        self.guide_interval = checks.whole_number("guide_interval", guide_interval, 1)
        self.last_refined: RefinedBatch | None = None
        self._direction: dict[str, Tensor] | None = None
        guide_batch_size = guide_batch_size or max(2, int(batch_size) // 4)
        super().__init__(batch_size=batch_size, guide_batch_size=guide_batch_size, seed=seed, **options)
        self.add_event_handler(Events.EPOCH_STARTED, self._seed_mixing, seed=seed)

    def _seed_mixing(self, engine: Engine, seed: int) -> None:
        """A resumed run mixes as the uninterrupted one."""
        if isinstance(self.mixing, Randomizable):
            self.mixing.set_random_state(seed=(seed + 1_000_003 * engine.state.epoch + idist.get_rank()) % 2**31)

    def guided_step(self, image: Tensor, label: Any) -> tuple[Tensor, Tensor, Any]:
        """See `GuidedTrainer`."""
        parameters = self.parameters()
        augmented, given = self._augmented(image, label)
        if self.rules is None:
            return self._trained(self.forward(parameters, augmented), given, None, image, label)
        with frozen_statistics(self.plain_network):
            moved, eps = guide_step(parameters, self._guide_direction(parameters))
            # The pass that is trained on drops the same units out as this one.
            with torch.no_grad(), torch.random.fork_rng():
                after = self.forward(moved, augmented)
        logits = self.forward(parameters, augmented)
        soft, weight = self._refined(logits, after, eps, augmented, given)
        return self._trained(logits, soft, weight, image, label)

    def _trained(
        self, logits: Tensor, soft: Tensor, weight: Tensor | None, image: Tensor, label: Any
    ) -> tuple[Tensor, Tensor, Any]:
        """Gradients of the plain and the augmented batch together."""
        output, target = self.forward(self.parameters(), image), self._target(label)
        loss = (self.loss_function(output, target) + self._weighted(logits, soft, weight)) / 2
        loss.backward()
        averaged([parameter.grad for parameter in self.parameters().values() if parameter.grad is not None])
        return loss, output, target

    def _augmented(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Augmented images and their labels, one-hot or mixed, (B, K) or (B, K, *S)."""
        given = one_hot(label, self.num_classes)
        if self.mixing is not None:
            # As a map over the image a class is mixed as its image is: also by the part of a patch that is inside.
            axes = [1] * (image.dim() - given.dim())
            maps = given.view(*given.shape, *axes).expand(*given.shape[:2], *image.shape[2:])
            mixed, maps = (checks.plain(value) for value in self.mixing(image, maps))
            return mixed, maps.flatten(2).mean(-1) if axes else maps
        batch: Any = self.state.batch
        if self.augmented_key not in batch:
            raise KeyError(
                f"{self.augmented_key}: expected the augmented image under this key in each item, got "
                f"{sorted(map(str, batch))}; copy the image before the augmentation (CopyItemsd), or give mixing."
            )
        augmented = checks.plain(batch[self.augmented_key]).to(image.device, non_blocking=True)
        if given.dim() > 2:
            warped = checks.plain(batch[f"{self.augmented_key}_label"]).to(image.device, non_blocking=True)
            given = one_hot(warped, self.num_classes)
        return augmented, given

    def _guide_direction(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Guide gradient v, by name; it is kept for `guide_interval` iterations, not over the end of an epoch."""
        first = (self.state.iteration - 1) % (self.state.epoch_length or 1)
        if self._direction is None or first % self.guide_interval == 0:
            image, label = self.guide_batch()
            _, v = guide_gradient(self.guide_loss_of(image, self._target(label)), parameters)
            averaged([*v.values()])
            self._direction = v
        return self._direction

    def _refined(
        self, logits: Tensor, after: Tensor, eps: float, image: Tensor, given: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Soft labels like the given ones, and weights (B,); as given where the gains are not finite."""
        rules = self.rules or Rules()
        gains, labels, share = label_gains(logits, after, eps, centred=rules.centred), given, None
        if given.dim() > 2:
            gains, share = region_gains(gains, given)
            labels = torch.eye(self.num_classes, device=gains.device).expand_as(gains)
        if not bool(gains.isfinite().all()):
            self.skipped_steps += 1
            return given, None
        found = refine(gains, labels, rules, share=share)
        soft = found.label
        if share is not None:
            soft = torch.einsum("br...,brk->bk...", given, found.label)
            if rules.weigh == "gain":
                # A step on a sample with its own loss, perhaps no cross-entropy, helps where the guide's lowers that.
                with torch.no_grad():
                    kept = (self._losses(logits, soft) >= self._losses(after, soft)).to(found.weight)
                found = found._replace(weight=kept * len(kept) / kept.sum().clamp(min=1))
        shares = given if share is None else share
        self.last_refined = RefinedBatch(_names(self.state.batch, len(image)), image, shares, found)
        return soft, found.weight

    def _losses(self, logits: Tensor, label: Tensor) -> Tensor:
        """Of each augmented sample, (B,)."""
        if logits.dim() == 2:
            return F.cross_entropy(logits, label, reduction="none")
        return torch.stack([self.loss_function(one[None], own[None]) for one, own in zip(logits, label, strict=True)])

    def _weighted(self, logits: Tensor, label: Tensor, weight: Tensor | None) -> Tensor:
        losses = self._losses(logits, label)
        return losses.mean() if weight is None else (losses * weight).mean()

    def _target(self, label: Tensor) -> Tensor:
        """Class numbers as they are, label maps as one-hot channels."""
        return label if label.dim() == 1 else one_hot(label, self.num_classes)


def _names(batch: Mapping[str, Any], count: int) -> list[str]:
    """Name of each sample: its entry "case", else the file of its image, else its place."""
    image = batch.get("image")
    files = image.meta.get("filename_or_obj") if isinstance(image, MetaTensor) else None
    names = batch.get("case") or files
    if not isinstance(names, list | tuple) or len(names) != count:
        names = range(count)
    return [Path(str(name)).name for name in names]
