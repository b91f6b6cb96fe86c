"""Gradient of a validation loss after an optimizer's step, with respect to what made the batch of that step.

Augmentation that learns changes the batch `x` of an inner step `theta' = step(theta, g)`, `g = grad_theta L(x, theta)`,
and is judged by a guide loss at theta'. Its gradient is a product of three pieces, each a pure function here::

    v = grad L_guide(theta')                        guide_gradient
    u = (d theta' / d g)^T v                        step_jacobian
    q = d/dx <grad_theta L(x, theta), u>            mixed_product

An ordinary backward pass, `x.backward(q)`, takes q on to whatever made x: no second derivatives of it are needed, which
`grid_sample` does not have. Losses are functions `loss(parameters, *inputs) -> scalar` of a dictionary of parameters,
as `torch.func.functional_call` takes it::

    loss = lambda parameters, x, y: criterion(functional_call(network, parameters, (x,)), y)

The chain rule through one inner step is that of Mounsaveng et al. 2021, eq. 4 to 8, and of DARTS (Liu et al. 2019).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from medconstraints import checks

__all__ = [
    "InnerState",
    "frozen_statistics",
    "guide_gradient",
    "inner_gradient",
    "inner_state",
    "inner_step",
    "look_ahead",
    "mixed_product",
    "step_jacobian",
    "unrolled_gradient",
]

Parameters = Mapping[str, Tensor]
Loss = Callable[..., Tensor]

_KINDS = (SGD, Adam, AdamW, RMSprop)
_UNKNOWN_OPTIONS = ("amsgrad", "centered", "maximize")
_TINY = 1e-30


@contextmanager
def frozen_statistics(*modules: nn.Module) -> Iterator[None]:
    """Passes inside leave every buffer as it is, to the bit, and compute what they would compute.

    Running means of normalisation layers are updated by each forward pass in training mode; those of a look-ahead are
    not the network's. The modules get copies of their buffers for the while, so that a graph of before stays valid.
    """
    owners = [module for root in modules for module in root.modules()]
    saved = [dict(module._buffers) for module in owners]
    for module in owners:
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for module, buffers in zip(owners, saved, strict=True):
            module._buffers.update(buffers)


def inner_gradient(
    loss: Loss, parameters: Parameters, inputs: Sequence[Tensor] = (), *, differentiable: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss (scalar, detached) and its gradients with respect to the parameters, by name.

    Args:
        loss: `loss(parameters, *inputs)`.
        parameters: require gradients; one that the loss does not use gets zeros.
        inputs: what the loss takes besides.
        differentiable: the gradients keep their graph, for `mixed_product(gradients=...)`.
    """
    value = loss(parameters, *inputs)
    gradients = torch.autograd.grad(
        value, list(parameters.values()), create_graph=differentiable, materialize_grads=True
    )
    return value.detach(), dict(zip(parameters, gradients, strict=True))


def guide_gradient(loss: Callable[[Parameters], Tensor], parameters: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """Guide loss and its gradient v at these parameters, such as those after a step; both detached."""
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    return inner_gradient(loss, leaves, differentiable=False)


class InnerState(NamedTuple):
    """Parameters by name, and the state that their optimizer has of each."""

    parameters: dict[str, Tensor]
    moments: dict[str, dict[str, Any]]


def inner_state(optimizer: Optimizer, parameters: Parameters) -> InnerState:
    """Where the optimizer stands, for `inner_step`. Nothing is copied, nothing of it is changed later.

    Args:
        optimizer: SGD, Adam, AdamW or RMSprop of torch.
        parameters: those of the network, by name; the optimizer leaves those alone that it does not know.

    Raises:
        TypeError: another optimizer.
        ValueError: an option of it is not known here.
    """
    if type(optimizer) not in _KINDS:
        raise TypeError(
            f"optimizer: expected torch's {', '.join(kind.__name__ for kind in _KINDS)}, whose step is known here, got "
            f"{type(optimizer).__name__}; take one of them for the network that augmentation learns with."
        )
    for option, group in itertools.product(_UNKNOWN_OPTIONS, optimizer.param_groups):
        if group.get(option):
            raise ValueError(f"optimizer: expected {option}=False, got True; the derivative of its step is not known.")
    return InnerState(dict(parameters), {name: dict(optimizer.state.get(p, {})) for name, p in parameters.items()})


def inner_step(
    optimizer: Optimizer,
    state: InnerState,
    gradients: Parameters,
    *,
    parameters: Parameters | None = None,
    max_norm: float | None = None,
) -> InnerState:
    """The optimizer's next step as a differentiable function of state and gradients; it itself does not move.

    Args:
        optimizer: its options are taken: rates, momentum, weight decay.
        state: from `inner_state` or a former step.
        gradients: by name, with or without graph.
        parameters: those that the optimizer holds, by name; None: `state.parameters`, which is right for a first step.
        max_norm: gradients are scaled down to this norm, as by `torch.nn.utils.clip_grad_norm_`; None: are not.
    """
    held = state.parameters if parameters is None else parameters
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    if max_norm is not None:
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        gradients = {name: gradient * scale for name, gradient in gradients.items()}
    values, moments = dict(state.parameters), dict(state.moments)
    for name, value in state.parameters.items():
        group = groups.get(id(held[name]))
        if group is not None:
            step = _sgd if isinstance(optimizer, SGD) else _rmsprop if isinstance(optimizer, RMSprop) else _adam
            decoupled = isinstance(optimizer, AdamW) or group.get("decoupled_weight_decay", False)
            gradient, decay = gradients[name], group["weight_decay"]
            if decay and decoupled:
                value = value * (1 - group["lr"] * decay)
            elif decay:
                gradient = gradient + decay * value
            values[name], moments[name] = step(group, state.moments[name], value, gradient)
    return InnerState(values, moments)


_Stepped = tuple[Tensor, dict[str, Any]]


def _sgd(group: Mapping[str, Any], state: Mapping[str, Any], value: Tensor, gradient: Tensor) -> _Stepped:
    momentum = group["momentum"]
    if not momentum:
        return value - group["lr"] * gradient, {}
    buffer = state.get("momentum_buffer")  # the first step's is the gradient itself, undamped
    buffer = gradient if buffer is None else momentum * buffer + (1 - group["dampening"]) * gradient
    update = gradient + momentum * buffer if group["nesterov"] else buffer
    return value - group["lr"] * update, {"momentum_buffer": buffer}


def _adam(group: Mapping[str, Any], state: Mapping[str, Any], value: Tensor, gradient: Tensor) -> _Stepped:
    beta1, beta2 = group["betas"]
    step = float(state.get("step", 0)) + 1
    mean = beta1 * _moment(state, "exp_avg", value) + (1 - beta1) * gradient
    square = beta2 * _moment(state, "exp_avg_sq", value) + (1 - beta2) * gradient**2
    update = _quotient(mean, square / (1 - beta2**step), group["eps"]) / (1 - beta1**step)
    return value - group["lr"] * update, {"step": step, "exp_avg": mean, "exp_avg_sq": square}


def _rmsprop(group: Mapping[str, Any], state: Mapping[str, Any], value: Tensor, gradient: Tensor) -> _Stepped:
    square = group["alpha"] * _moment(state, "square_avg", value) + (1 - group["alpha"]) * gradient**2
    update = _quotient(gradient, square, group["eps"])
    if group["momentum"]:
        update = group["momentum"] * _moment(state, "momentum_buffer", value) + update
    return value - group["lr"] * update, {"square_avg": square, "momentum_buffer": update}


def _moment(state: Mapping[str, Any], name: str, like: Tensor) -> Tensor:
    moment = state.get(name)
    return torch.zeros_like(like) if moment is None else moment


def _quotient(numerator: Tensor, square: Tensor, eps: float) -> Tensor:
    """`numerator / (sqrt(square) + eps)`; 0, with derivative 0, where no gradient ever came and both are 0.

    There the slope is 1 / eps, 1e8: a parameter that nothing has reached yet would outweigh all others.
    """
    reached = square > 0
    return torch.where(reached, numerator / (torch.where(reached, square, 1.0).sqrt() + eps), 0.0)


def look_ahead(
    optimizer: Optimizer, parameters: Parameters, gradients: Parameters, *, max_norm: float | None = None
) -> tuple[dict[str, Tensor], Callable[[Parameters], dict[str, Tensor]]]:
    """Parameters after the optimizer's next step, and the function v -> u of its Jacobian, see `step_jacobian`.

    Args:
        optimizer: see `inner_state`; it does not move.
        parameters: those of the optimizer, by name.
        gradients: g at which the step is taken.
        max_norm: see `inner_step`.

    Raises:
        TypeError: see `inner_state`.
        ValueError: see `inner_state`.
    """
    leaves = {name: gradient.detach().requires_grad_() for name, gradient in gradients.items()}
    state = inner_state(optimizer, parameters)
    state = state._replace(parameters={name: value.detach() for name, value in parameters.items()})
    after = inner_step(optimizer, state, leaves, parameters=parameters, max_norm=max_norm).parameters
    moved = [name for name, value in after.items() if value.requires_grad]

    def pulled_back(direction: Parameters) -> dict[str, Tensor]:
        products = torch.autograd.grad(
            [after[name] for name in moved],
            list(leaves.values()),
            [direction[name] for name in moved],
            materialize_grads=True,
        )
        return dict(zip(leaves, products, strict=True))

    return {name: value.detach() for name, value in after.items()}, pulled_back


def step_jacobian(
    optimizer: Optimizer,
    parameters: Parameters,
    gradients: Parameters,
    direction: Parameters,
    *,
    max_norm: float | None = None,
) -> dict[str, Tensor]:
    """Product `u = (d theta' / d g)^T v` of the optimizer's next step, by name.

    For SGD it is -lr v, with Nesterov's momentum -lr (1 + momentum) v; for Adam, AdamW and RMSprop it follows from
    their state. In Adam's first steps, where g / |g| hardly depends on g, it is about 0: let it run in first.

    Args:
        optimizer: see `look_ahead`.
        parameters: see there.
        gradients: see there.
        direction: v.
        max_norm: see `inner_step`.
    """
    return look_ahead(optimizer, parameters, gradients, max_norm=max_norm)[1](direction)


def mixed_product(
    loss: Loss,
    parameters: Parameters,
    inputs: Sequence[Tensor],
    direction: Parameters,
    *,
    method: str = "exact",
    gradients: Parameters | None = None,
    length: float = 0.1,
) -> tuple[Tensor, ...]:
    """Product `q = d/d(inputs) <grad_theta L, u>`, one tensor for each input, of its shape.

    Args:
        loss: `loss(parameters, *inputs)`.
        parameters: theta.
        inputs: floating-point tensors; those that require no gradient get zeros.
        direction: u, by name.
        method: "exact" differentiates twice. "difference" takes central differences of `d L / d(inputs)` along u, with
            about half of the memory and a tenth less time; wrong by some per cent with smooth activations, and with
            kinked ones (ReLU, PReLU) often closer to what a step of finite length does than the exact value.
        gradients: those that `inner_gradient` made of these very parameters and inputs, for "exact"; their graph is
            used up. None: computed here.
        length: of the step along u in the space of the parameters, for "difference".

    Raises:
        ValueError: an unknown method.
    """
    checks.choice("method", method, ("exact", "difference"))
    if method == "exact":
        if gradients is None:
            leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
            _, gradients = inner_gradient(loss, leaves, inputs)
        return _with_zeros(
            inputs,
            lambda wanted: torch.autograd.grad(
                [gradients[name] for name in direction],
                wanted,
                list(direction.values()),
                materialize_grads=True,
            ),
        )
    norm = torch.stack([value.norm() for value in direction.values()]).norm()
    step = length / norm.clamp(min=_TINY)

    def slopes(sign: float) -> tuple[Tensor, ...]:
        moved = {name: value.detach().add(direction[name] * step, alpha=sign) for name, value in parameters.items()}
        with torch.random.fork_rng():  # both sides drop the same units out
            return _with_zeros(
                inputs, lambda wanted: torch.autograd.grad(loss(moved, *inputs), wanted, materialize_grads=True)
            )

    return tuple((up - down) * (norm / (2 * length)) for up, down in zip(slopes(1.0), slopes(-1.0), strict=True))


def _with_zeros(inputs: Sequence[Tensor], slopes: Callable[[list[Tensor]], Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """Gradients of those inputs that require them, zeros for the others."""
    wanted = [value for value in inputs if value.requires_grad]
    found = iter(slopes(wanted) if wanted else ())
    return tuple(next(found).detach() if value.requires_grad else torch.zeros_like(value) for value in inputs)


class Unrolled(NamedTuple):
    """What `unrolled_gradient` found.

    `guide` is the guide loss after the last step; `losses` and `gradients` are those of each inner step, with which
    `optimizer.step()` repeats it; `products` the gradients of the guide loss with respect to each step's inputs.
    """

    guide: Tensor
    losses: list[Tensor]
    gradients: list[dict[str, Tensor]]
    products: list[tuple[Tensor, ...]]


def unrolled_gradient(
    optimizer: Optimizer,
    parameters: Parameters,
    loss: Loss,
    batches: Sequence[Sequence[Tensor]],
    guide: Callable[[Parameters], Tensor],
    *,
    max_norm: float | None = None,
) -> Unrolled:
    """Exact gradient of the guide loss through several inner steps, the optimizer's state included.

    What the three pieces give for one step, for `K = len(batches)` of them (Mounsaveng et al. 2021, eq. 8); memory
    grows with K.

    Args:
        optimizer: see `inner_state`.
        parameters: those of the optimizer, by name.
        loss: `loss(parameters, *inputs)` of an inner step.
        batches: inputs of each inner step, in order; those that require gradients get them.
        guide: guide loss as a function of the parameters.
        max_norm: see `inner_step`.
    """
    state = inner_state(optimizer, parameters)
    state = state._replace(parameters={name: value.detach().requires_grad_() for name, value in parameters.items()})
    losses, gradients = [], []
    for batch in batches:
        value, gradient = inner_gradient(loss, state.parameters, batch)
        state = inner_step(optimizer, state, gradient, parameters=parameters, max_norm=max_norm)
        losses.append(value)
        gradients.append({name: g.detach() for name, g in gradient.items()})
    value = guide(state.parameters)
    flat = [given for batch in batches for given in batch]
    found = iter(_with_zeros(flat, lambda wanted: torch.autograd.grad(value, wanted, materialize_grads=True)))
    return Unrolled(value.detach(), losses, gradients, [tuple(next(found) for _ in batch) for batch in batches])
