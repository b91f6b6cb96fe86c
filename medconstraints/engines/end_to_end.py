"""End-to-end augmentation: a generator of training images, judged by what they do for the segmentation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor
from torch.func import functional_call
from torch.optim import Optimizer

from medconstraints import checks
from medconstraints.engines.guided import GuidedTrainer, averaged, one_hot
from medconstraints.engines.mask_to_image import EpochMeans, check_classes, check_pair, discriminator_step
from medconstraints.hypergradients import (
    frozen_statistics,
    guide_gradient,
    inner_gradient,
    inner_state,
    look_ahead,
    mixed_product,
)
from medconstraints.losses import MaskToImageLoss
from medconstraints.networks import MaskToImage

__all__ = ["EndToEndTrainer"]

logger = logging.getLogger(__name__)


class EndToEndTrainer(GuidedTrainer):
    """Trains a segmentation on real and generated pairs, and the generator's architecture on the guide loss.

    Three nested problems, each unrolled by one step (E2EAug, algorithm 1 and section 3.4). In each iteration the
    discriminator steps; the generator's look-ahead G'(A) makes images of augmented masks; the network's look-ahead
    W'(G'(A), A) on the real pairs plus `generated_weight` times the generated ones has a guide loss, and its gradient
    with respect to A, the weights of the cells' operators, has two terms: a direct one, through the images, and one
    through the generator's step. A steps, then generator and network take the steps that were looked ahead. What A does
    through the discriminator's step is left out, as in the paper.

    Items have `image`, `label`, and `augmented_label`: the label map after an augmentation of its own, which the
    generator makes an image of. The loss gets one-hot channels, as MONAI's `DiceCELoss(softmax=True)` takes them.

    Args:
        gan: generator and discriminator.
        gan_loss: of both.
        generator_optimizer: of `gan.generator_weights()`; see `inner_state` for which.
        discriminator_optimizer: of `gan.discriminator`.
        architecture_optimizer: of `gan.architecture()`.
        num_classes: of the label maps.
        levels: 3, both terms; 2, the direct one alone; 0, none: the GAN is trained beside the segmentation, which does
            not tell it anything.
        generated_weight: lambda.
        divide_by_rate: the gradient of A is divided by the learning rate of the network's optimizer, to which it is
            proportional. Undivided it is easily smaller than the epsilon of Adam, which then does not move.
        interval: A learns in every `interval`-th iteration; the others cost as much as with `levels` 0.
        warm_up: iterations in which A does not learn; in its first steps Adam's hardly depend on the gradient.
        options: the other arguments of `GuidedTrainer`, such as `dataset`, `guide_dataset` and `network`.

    Raises:
        TypeError: an optimizer whose step is not known.
        ValueError: see `GuidedTrainer`; the generator takes another number of classes.
        RuntimeError: see `EpochMeans`.

    Attributes:
        means: of the losses of the GAN and of the norms of both terms, see `EpochMeans`; in `state.metrics` as
            "generator_loss", "discriminator_loss", "guide_loss", "direct_term" and "through_term".
    """

    def __init__(
        self,
        *,
        gan: MaskToImage,
        gan_loss: MaskToImageLoss,
        generator_optimizer: Optimizer,
        discriminator_optimizer: Optimizer,
        architecture_optimizer: Optimizer,
        num_classes: int,
        levels: int = 3,
        generated_weight: float = 1.0,
        divide_by_rate: bool = True,
        interval: int = 1,
        warm_up: int = 20,
        **options: Any,
    ) -> None:
        check_classes(gan, num_classes)
        inner_state(generator_optimizer, {})
        self.gan, self.gan_loss = gan.to(options["device"]), gan_loss.to(options["device"])
        self.generator_optimizer = generator_optimizer
        self.discriminator_optimizer = discriminator_optimizer
        self.architecture_optimizer = architecture_optimizer
        self.num_classes = num_classes
        self.levels = checks.choice("levels", levels, (0, 2, 3))
        self.generated_weight = checks.number("generated_weight", generated_weight, above=0)
        self.divide_by_rate = checks.flag("divide_by_rate", divide_by_rate)
        self.interval = checks.whole_number("interval", interval, 1)
        self.warm_up = checks.whole_number("warm_up", warm_up, 0)
        self.means, self._warned = EpochMeans(), False
        handlers = options.pop("train_handlers", None) or ()
        super().__init__(train_handlers=(), **options)
        self.means.attach(self)
        self.add_event_handler(Events.EPOCH_COMPLETED, self._warn_of_inactive_levels)
        self._register_handlers(handlers)

    def guided_step(self, image: Tensor, label: Any) -> tuple[Tensor, Tensor, Any]:
        """See `GuidedTrainer`."""
        check_pair(image, label)
        self.gan.train()
        iteration = self.state.iteration
        learns = self.levels > 0 and iteration > self.warm_up and iteration % self.interval == 0
        learns = learns and self.optimizer.param_groups[0]["lr"] > 0  # a step of no length tells nothing
        third = learns and self.levels == 3
        mask, new_mask = one_hot(label, self.num_classes), one_hot(self._augmented_label(), self.num_classes)

        # (I) the discriminator's step, and the generator's on its own loss
        weights, logits = self.gan.generator_weights(), self.gan.architecture()
        of_mask = self._made(weights, logits.values(), mask)
        judged = discriminator_step(
            self.gan, self.gan_loss, self.discriminator_optimizer, mask, image, of_mask.detach()
        )

        def generator_loss(weights: Mapping[str, Tensor], *logits: Tensor) -> Tensor:
            return self.gan_loss.generator(self.gan.scores(mask, of_mask), of_mask, image)

        fooled, generator_graph = inner_gradient(generator_loss, weights, [*logits.values()], differentiable=third)
        generator_gradients = _detached(generator_graph)
        after, pulled_back = look_ahead(self.generator_optimizer, weights, generator_gradients)

        # Images of the augmented masks: functions of A, and of the weights after that step.
        weight_leaves = [value.requires_grad_(third) for value in after.values()]
        logit_leaves = [value.detach().requires_grad_(learns) for value in logits.values()]
        with torch.set_grad_enabled(learns), frozen_statistics(self.gan.generator):
            made = self._made(after, logit_leaves, new_mask)
        generated = made.detach().requires_grad_(learns)

        # (II) the network's step on real and generated pairs
        parameters, outputs = self.parameters(), []

        def real_loss(parameters: Mapping[str, Tensor]) -> Tensor:
            outputs.append(self.forward(parameters, image))
            return self.loss_function(outputs[0], mask)

        def generated_loss(parameters: Mapping[str, Tensor], generated: Tensor) -> Tensor:
            return self.generated_weight * self.loss_function(self.forward(parameters, generated), new_mask)

        of_real, gradients = inner_gradient(real_loss, parameters, differentiable=False)
        of_generated, graph = inner_gradient(generated_loss, parameters, [generated], differentiable=learns)
        gradients = {name: value + graph[name].detach() for name, value in gradients.items()}
        averaged([*gradients.values()])

        # (III) the guide loss after both, and what A does to it
        if learns:
            with frozen_statistics(self.plain_network):
                network_after, network_pulled_back = look_ahead(
                    self.optimizer, parameters, gradients, max_norm=self.max_norm
                )
                guide_loss, v = guide_gradient(self._guide(), network_after)
                averaged([*v.values()])
                u = network_pulled_back(v)
                (q,) = mixed_product(generated_loss, parameters, [generated], u, gradients=graph)
            slopes = torch.autograd.grad(made, [*logit_leaves, *(weight_leaves if third else ())], q)
            direct, through = slopes[: len(logits)], [torch.zeros_like(value) for value in logit_leaves]
            if third:
                r = dict(zip(after, slopes[len(logits) :], strict=True))
                averaged([*r.values()])
                through = [
                    *mixed_product(
                        generator_loss, weights, [*logits.values()], pulled_back(r), gradients=generator_graph
                    )
                ]
            self._learn(logits, direct, through)
            self.means.add(guide_loss=guide_loss)

        for name, weight in weights.items():
            weight.grad = generator_gradients[name]
        self.generator_optimizer.step()
        self.generator_optimizer.zero_grad(set_to_none=True)
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]
        self.means.add(generator_loss=fooled, discriminator_loss=judged, foreground=new_mask[:, 1:].sum())
        return of_real + of_generated, outputs[0].detach(), mask

    def _learn(self, logits: Mapping[str, Tensor], direct: Any, through: Any) -> None:
        scale = 1 / self.optimizer.param_groups[0]["lr"] if self.divide_by_rate else 1.0
        for logit, one, two in zip(logits.values(), direct, through, strict=True):
            logit.grad = (one + two) * scale
        norms = [torch.stack([value.norm() for value in term]).norm() * scale for term in (direct, through)]
        self.means.add(direct_term=norms[0], through_term=norms[1])
        self.step_beside(self.architecture_optimizer)

    def _made(self, weights: Mapping[str, Tensor], logits: Any, mask: Tensor) -> Tensor:
        """Images of masks by the generator with these weights and logits."""
        architecture = dict(zip(self.gan.architecture(), logits, strict=True))
        made: Tensor = functional_call(self.gan.generator, {**weights, **architecture}, (mask,))
        return made

    def _augmented_label(self) -> Tensor:
        batch: Any = self.state.batch
        if "augmented_label" not in batch:
            raise KeyError(
                f"augmented_label: expected this key in the batch, got {sorted(map(str, batch))}; copy the label to it "
                "in the transforms, before its augmentation."
            )
        return checks.plain(batch["augmented_label"]).to(self.state.device)

    def _guide(self) -> Callable[[Any], Tensor]:
        image, label = self.guide_batch()
        return self.guide_loss_of(image, one_hot(label, self.num_classes))

    def _warn_of_inactive_levels(self, engine: Engine) -> None:
        """Say once when what A gets is smaller than what its optimizer adds to its denominator."""
        eps = self.architecture_optimizer.param_groups[0].get("eps", 0.0)
        metrics = engine.state.metrics
        terms = {2: ["direct_term"], 3: ["direct_term", "through_term"]}.get(self.levels, [])
        small = {name: metrics[name] for name in terms if name in metrics and metrics[name] < eps}
        if small and not self._warned:
            self._warned = True
            found = ", ".join(f"{name} {value:.1e}" for name, value in small.items())
            logger.warning(
                "levels: the gradient of the architecture is below the epsilon %.1e of its optimizer (norms: %s), so "
                "that the level is inactive; raise the learning rates of generator and network, or set "
                "divide_by_rate.",
                eps,
                found,
            )


def _detached(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies without graph, averaged over the processes."""
    found = {name: value.detach().clone() for name, value in gradients.items()}
    averaged([*found.values()])
    return found
