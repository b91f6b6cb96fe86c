"""Online bilevel augmentation: an augmenter that learns from what its images do for the guide loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor, nn
from torch.optim import Optimizer

from medconstraints import checks
from medconstraints.engines.guided import GuidedTrainer, averaged, one_hot
from medconstraints.hypergradients import (
    frozen_statistics,
    guide_gradient,
    inner_gradient,
    look_ahead,
    mixed_product,
    unrolled_gradient,
)

__all__ = ["BilevelTrainer"]


class BilevelTrainer(GuidedTrainer):
    """Trains a network on images of an augmenter, and the augmenter on the guide loss that follows.

    Each iteration takes an augmented training batch and the optimizer's step on it; the gradient of the guide loss
    after this step reaches the augmenter through it (`medconstraints.hypergradients`), and its optimizer steps too.
    Mounsaveng et al. 2021, section 3, whose K = J = 1 is the default. For segmentation the label map is warped with
    its image, as one-hot channels.

    Args:
        augmenter: `(image, label, spacing_mm) -> (image, label)`, such as `Augmenter`; differentiable.
        augmenter_optimizer: of its parameters.
        num_classes: of label maps; None for classes.
        unroll: K, inner steps that the gradient goes through. The batch is divided into K, one for each step.
        interval: the augmenter learns in every `interval`-th iteration.
        warm_up: iterations in which it does not; at their start Adam's and RMSprop's steps hardly depend on the size
            of a gradient.
        method: "exact" or "difference", see `mixed_product`; the latter for K = 1.
        batch_size: of training batches.
        guide_mode: see `GuidedTrainer`. The gradient does not go through the running statistics.
        options: the other arguments of `GuidedTrainer`. Networks with smooth activations (SiLU) are best: a kink has no
            second derivative. With label maps the loss gets one-hot channels that are soft at borders, as MONAI's
            `DiceCELoss(softmax=True)` takes them.

    Raises:
        TypeError: the augmenter is not differentiable.
        ValueError: see `GuidedTrainer`; `unroll` with differences, or above what the batch can be divided into.
    """

    def __init__(
        self,
        *,
        augmenter: nn.Module,
        augmenter_optimizer: Optimizer,
        num_classes: int | None = None,
        unroll: int = 1,
        interval: int = 1,
        warm_up: int = 20,
        method: str = "exact",
        batch_size: int = 16,
        guide_mode: str = "eval",
        **options: Any,
    ) -> None:
        self.augmenter = augmenter.to(options["device"])
        self.augmenter_optimizer = augmenter_optimizer
        self.num_classes = num_classes
        self.unroll = checks.whole_number("unroll", unroll, 1)
        self.interval = checks.whole_number("interval", interval, 1)
        self.warm_up = checks.whole_number("warm_up", warm_up, 0)
        self.method = checks.choice("method", method, ("exact", "difference"))
        if unroll > 1 and (method != "exact" or batch_size < 2 * unroll):
            raise ValueError(
                f"unroll: expected 1, or method 'exact' and a batch of at least two for each step, got {unroll} with "
                f"method {method!r} and batch_size {batch_size}."
            )
        _check_differentiable(augmenter, options["network"])
        super().__init__(batch_size=batch_size, guide_mode=guide_mode, **options)

    def guided_step(self, image: Tensor, label: Any) -> tuple[Tensor, Tensor, Any]:
        """See `GuidedTrainer`."""
        self.augmenter.train()
        iteration = self.state.iteration
        learns = iteration > self.warm_up and iteration % self.interval == 0
        with torch.set_grad_enabled(learns):
            image, target = self.augmenter(image, self._target(label), _spacing_mm(self.state.batch["image"]))
        made = [image, target] if target.requires_grad else [image]
        inputs = [value.detach().requires_grad_(learns and value.requires_grad) for value in (image, target)]
        parameters = self.parameters()
        if learns and self.unroll > 1:
            return self._unrolled(parameters, inputs, made)
        outputs: list[Tensor] = []

        def loss(parameters: Any, image: Tensor, target: Any) -> Tensor:
            outputs.append(self.forward(parameters, image))
            return self.loss_function(outputs[-1], target)

        twice = learns and self.method == "exact"
        value, graph = inner_gradient(loss, parameters, inputs, differentiable=twice)
        gradients = {name: gradient.detach() for name, gradient in graph.items()}
        averaged([*gradients.values()])
        output = outputs[0].detach()
        if learns:
            with frozen_statistics(self.plain_network):
                after, pulled_back = look_ahead(self.optimizer, parameters, gradients, max_norm=self.max_norm)
                self.guide_loss, v = guide_gradient(self._guide(), after)
                averaged([*v.values()])
                u = pulled_back(v)
                options: dict[str, Any] = {"gradients": graph} if twice else {}
                products = mixed_product(loss, parameters, inputs, u, method=self.method, **options)
            self._learn(made, products[: len(made)])
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]
        return value, output, inputs[1].detach()

    def _unrolled(
        self, parameters: dict[str, nn.Parameter], inputs: Sequence[Tensor], made: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Any]:
        """K inner steps on the parts of the batch; all but the last are taken here, the last by the trainer."""
        batches = list(zip(*(value.tensor_split(self.unroll) for value in inputs), strict=True))

        def loss(parameters: Any, image: Tensor, target: Any) -> Tensor:
            return self.loss_function(self.forward(parameters, image), target)

        with frozen_statistics(self.plain_network):
            found = unrolled_gradient(self.optimizer, parameters, loss, batches, self._guide(), max_norm=self.max_norm)
        self.guide_loss = found.guide
        products = [torch.cat(parts) for parts in zip(*found.products, strict=True)]
        self._learn(made, products[: len(made)])
        with torch.no_grad():  # the running statistics that the inner steps would have left
            outputs = []
            for step, (batch, gradients) in enumerate(zip(batches, found.gradients, strict=True)):
                outputs.append(self.forward(parameters, batch[0]))
                for name, parameter in parameters.items():
                    parameter.grad = gradients[name]
                if step < len(batches) - 1:
                    if self.max_norm is not None:
                        nn.utils.clip_grad_norm_(parameters.values(), self.max_norm)
                    self.optimizer.step()
        return torch.stack(found.losses).mean(), torch.cat(outputs), inputs[1].detach()

    def _learn(self, made: Sequence[Tensor], products: Sequence[Tensor]) -> None:
        torch.autograd.backward(list(made), list(products))
        self.step_beside(self.augmenter_optimizer)

    def _guide(self) -> Callable[[Any], Tensor]:
        image, label = self.guide_batch()
        return self.guide_loss_of(image, self._target(label))

    def _target(self, label: Tensor) -> Tensor:
        """Class numbers as they are, label maps (B, 1, *S) as one-hot channels."""
        if self.num_classes is None:
            return label
        return one_hot(label, self.num_classes)


def _spacing_mm(image: Tensor) -> Tensor | None:
    """Voxel spacing (B, D) of a batch from its affines; None where it has none."""
    if not isinstance(image, MetaTensor):
        return None
    dims = image.dim() - 2
    affine = torch.as_tensor(image.affine)[..., :dims, :dims].float()
    return torch.linalg.vector_norm(affine, dim=-2).expand(len(image), dims)


def _check_differentiable(augmenter: nn.Module, network: nn.Module) -> None:
    """Refuse an augmenter whose images do not depend on its parameters."""
    dims = next((p.dim() - 2 for p in network.parameters() if p.dim() > 3), 2)
    channels = next((p.shape[1] for p in network.parameters() if p.dim() == dims + 2), 1)
    # Drawn aside: the check must not change what the run draws.
    with torch.random.fork_rng():
        device = next((p.device for p in augmenter.parameters()), torch.device("cpu"))
        image, _ = augmenter(torch.rand(2, channels, *[8] * dims, device=device), None, None)
    if not image.requires_grad:
        raise TypeError(
            f"augmenter: expected images that depend on its parameters in a differentiable way, got none from "
            f"{type(augmenter).__name__}; take Augmenter, or a fixed augmentation with an ordinary trainer."
        )
