"""Hypergradients against double backward, the real optimizers, and central differences of the whole pipeline."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from medconstraints.hypergradients import (
    frozen_statistics,
    guide_gradient,
    inner_gradient,
    inner_state,
    inner_step,
    mixed_product,
    step_jacobian,
    unrolled_gradient,
)

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "nesterov": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": partial(torch.optim.Adam, lr=0.01, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, weight_decay=0.1),
    "rmsprop momentum": partial(torch.optim.RMSprop, lr=0.01, momentum=0.9),
}
CLIPS = {"free": None, "clipped": 0.05}


def network(dims: int = 2, norm: str = "batch", channels: int = 4) -> nn.Module:
    """A small smooth network for 2 classes in float64, in training mode."""
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
    norms = {
        "batch": {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims],
        "instance": partial({2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dims], affine=True),
        "group": partial(nn.GroupNorm, 2),
        "layer": lambda c: nn.LayerNorm([c] + [6] * dims),
    }
    torch.manual_seed(0)
    pool = {2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[dims](1)
    return nn.Sequential(
        conv(1, channels, 3, padding=1, bias=False),
        norms[norm](channels),
        nn.SiLU(),
        conv(channels, channels, 3, padding=1, bias=False),
        norms[norm](channels),
        nn.SiLU(),
        pool,
        nn.Flatten(),
        nn.Linear(channels, 2),
    ).double()


def data(dims: int = 2, count: int = 5, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Images and soft labels."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 1, *[6] * dims, dtype=torch.float64, generator=generator)
    label = torch.randn(count, 2, dtype=torch.float64, generator=generator).softmax(1)
    return image, label


def loss_of(net: nn.Module):
    """Soft cross-entropy of a network as a function of its parameters, images and labels."""

    def loss(parameters, x, y):
        return -(y * functional_call(net, dict(parameters), (x,)).log_softmax(1)).sum(1).mean()

    return loss


def warmed(net: nn.Module, make, max_norm=None, steps: int = 3) -> torch.optim.Optimizer:
    """An optimizer after some steps on other batches."""
    optimizer = make(net.parameters())
    for seed in range(steps):
        real_step(net, optimizer, *data(dims(net), seed=10 + seed), max_norm=max_norm)
    return optimizer


def dims(net: nn.Module) -> int:
    """2 or 3."""
    return net[0].weight.dim() - 2


def real_step(net, optimizer, x, y, max_norm=None) -> None:
    """What an ordinary training loop does."""
    optimizer.zero_grad()
    loss_of(net)(dict(net.named_parameters()), x, y).backward()
    if max_norm is not None:
        nn.utils.clip_grad_norm_(net.parameters(), max_norm)
    optimizer.step()


def hypergradient(net, optimizer, x, y, guide, max_norm=None, **options) -> tuple[Tensor, Tensor]:
    """Gradient of the guide loss after one step with respect to images and labels, from the three pieces."""
    loss, parameters = loss_of(net), dict(net.named_parameters())
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    with frozen_statistics(net):
        _, gradients = inner_gradient(loss, parameters, (x, y))
        detached = {name: g.detach() for name, g in gradients.items()}
        after = inner_step(optimizer, inner_state(optimizer, parameters), detached, max_norm=max_norm).parameters
        _, v = guide_gradient(lambda p: loss(p, *guide), after)
        u = step_jacobian(optimizer, parameters, detached, v, max_norm=max_norm)
        if options.get("method", "exact") == "exact":
            options["gradients"] = gradients
        return mixed_product(loss, parameters, (x, y), u, **options)


def pipeline(net, optimizer, guide, max_norm=None):
    """Guide loss after a real step of copies, as a function of images and labels."""

    def value(x: Tensor, y: Tensor) -> float:
        twin = copy.deepcopy(net)
        other = type(optimizer)(twin.parameters(), lr=1.0)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        real_step(twin, other, x, y, max_norm=max_norm)
        with torch.no_grad():
            return float(loss_of(twin)(dict(twin.named_parameters()), *guide))

    return value


@pytest.mark.parametrize("max_norm", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_step_is_that_of_the_real_optimizer_and_its_jacobian_that_of_differences(make, max_norm):
    net = network()
    optimizer = warmed(net, make, max_norm)
    before = copy.deepcopy(optimizer.state_dict())
    parameters = dict(net.named_parameters())
    loss = loss_of(net)
    gradients = inner_gradient(loss, parameters, data(), differentiable=False)[1]
    after = inner_step(optimizer, inner_state(optimizer, parameters), gradients, max_norm=max_norm)
    torch.manual_seed(3)
    direction = {name: torch.randn_like(g) for name, g in gradients.items()}
    ahead = {name: torch.randn_like(g) for name, g in gradients.items()}
    u = step_jacobian(optimizer, parameters, gradients, direction, max_norm=max_norm)

    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)

    def stepped(shift: float) -> dict[str, Tensor]:
        twin = copy.deepcopy(net)
        other = type(optimizer)(twin.parameters(), lr=1.0)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for name, parameter in twin.named_parameters():
            parameter.grad = gradients[name] + shift * ahead[name]
        if max_norm is not None:
            nn.utils.clip_grad_norm_(twin.parameters(), max_norm)
        other.step()
        return {name: p.detach() for name, p in twin.named_parameters()}

    torch.testing.assert_close(
        {n: p.detach() for n, p in after.parameters.items()}, stepped(0.0), rtol=1e-12, atol=1e-12
    )
    high, low = stepped(1e-6), stepped(-1e-6)
    slope = sum(((high[n] - low[n]) / 2e-6 * direction[n]).sum() for n in direction)
    predicted = sum((u[n] * ahead[n]).sum() for n in u)
    torch.testing.assert_close(predicted, slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("norm", ["batch", "instance", "group", "layer"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_equals_double_backward_through_the_unrolled_step(spatial_dims, norm):
    net = network(spatial_dims, norm)
    optimizer = warmed(net, OPTIMIZERS["nesterov"])
    (x, y), guide = data(spatial_dims), data(spatial_dims, seed=2)
    found = hypergradient(net, optimizer, x, y, guide)

    x, y = x.requires_grad_(), y.requires_grad_()
    parameters, loss = dict(net.named_parameters()), loss_of(net)
    with frozen_statistics(net):
        gradients = torch.autograd.grad(loss(parameters, x, y), list(parameters.values()), create_graph=True)
        after = {}
        for (name, p), g in zip(parameters.items(), gradients, strict=True):
            g = g + 0.01 * p.detach()
            buffer = 0.9 * optimizer.state[p]["momentum_buffer"] + g
            after[name] = p.detach() - 0.1 * (g + 0.9 * buffer)
        expected = torch.autograd.grad(loss(after, *guide), [x, y])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("max_norm", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_equals_central_differences_of_the_whole_pipeline(make, max_norm):
    net = network()
    optimizer = warmed(net, make, max_norm, steps=20)
    (x, y), guide = data(), data(seed=2)
    found = hypergradient(net, optimizer, x, y, guide, max_norm)
    value = pipeline(net, optimizer, guide, max_norm)
    torch.manual_seed(4)
    for slot, given in enumerate((x, y)):
        ahead = torch.randn_like(given)
        h = 1e-5
        high, low = [(x + s * ahead, y) if slot == 0 else (x, y + s * ahead) for s in (h, -h)]
        slope = (value(*high) - value(*low)) / (2 * h)
        assert float((found[slot] * ahead).sum()) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("norm", ["batch", "instance", "group", "layer"])
def test_differences_are_near_the_exact_product_of_a_smooth_network(norm):
    net = network(norm=norm)
    optimizer = warmed(net, OPTIMIZERS["sgd"])
    (x, y), guide = data(), data(seed=2)
    exact = hypergradient(net, optimizer, x, y, guide)
    near = hypergradient(net, optimizer, x, y, guide, method="difference", length=0.01)
    for a, b in zip(exact, near, strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-3


@pytest.mark.parametrize("method", ["exact", "difference"])
def test_a_step_against_the_hypergradient_lowers_the_guide_loss(method):
    net = network(norm="group")
    optimizer = warmed(net, OPTIMIZERS["adamw"], steps=20)
    (x, y), guide = data(), data(seed=2)
    q = hypergradient(net, optimizer, x, y, guide, method=method)[0]
    value, step = pipeline(net, optimizer, guide), 0.1 / q.norm()
    assert value(x - step * q, y) < value(x, y) < value(x + step * q, y)


def test_reaches_what_warped_the_images_to_3_per_cent():
    # Bilinear sampling is not smooth on the grid: the shift is off it.
    net, guide = network(norm="group"), data(seed=2)
    optimizer = warmed(net, OPTIMIZERS["sgd"])
    x, y = data()
    x = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bicubic")

    def warped(shift: Tensor) -> Tensor:
        theta = torch.cat([torch.eye(2, dtype=torch.float64), shift[:, None]], 1).expand(len(x), 2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)

    shift = torch.tensor([0.113, -0.071], dtype=torch.float64, requires_grad=True)
    image = warped(shift)
    image.backward(hypergradient(net, optimizer, image.detach(), y, guide)[0])
    value = pipeline(net, optimizer, guide)
    for axis in range(2):
        h = 1e-4 * torch.eye(2, dtype=torch.float64)[axis]
        high, low = warped((shift + h).detach()), warped((shift - h).detach())
        slope = (value(high, y) - value(low, y)) / 2e-4
        assert float(shift.grad[axis]) == pytest.approx(slope, rel=3e-2)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_several_steps_equal_central_differences_and_one_step_the_three_pieces(make):
    net = network()
    optimizer = warmed(net, make, steps=20)
    guide = data(seed=2)
    batches = [data(seed=seed) for seed in (5, 6, 7)]
    given = [(x.clone().requires_grad_(), y) for x, y in batches]
    loss, parameters = loss_of(net), dict(net.named_parameters())
    with frozen_statistics(net):
        found = unrolled_gradient(optimizer, parameters, loss, given, lambda p: loss(p, *guide))
        one = unrolled_gradient(optimizer, parameters, loss, given[:1], lambda p: loss(p, *guide))
    torch.testing.assert_close(
        one.products[0][0], hypergradient(net, optimizer, *batches[0], guide)[0], rtol=1e-8, atol=0
    )
    assert not found.products[0][1].any()  # labels that asked for no gradient

    def value(shifts: list[Tensor]) -> float:
        twin = copy.deepcopy(net)
        other = type(optimizer)(twin.parameters(), lr=1.0)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for (x, y), shift in zip(batches, shifts, strict=True):
            real_step(twin, other, x + shift, y)
        with torch.no_grad():
            return float(loss_of(twin)(dict(twin.named_parameters()), *guide))

    torch.manual_seed(4)
    ahead = [torch.randn_like(x) for x, _ in batches]
    slope = (value([1e-5 * a for a in ahead]) - value([-1e-5 * a for a in ahead])) / 2e-5
    predicted = sum(float((product[0] * a).sum()) for product, a in zip(found.products, ahead, strict=True))
    assert predicted == pytest.approx(slope, rel=1e-5)


def test_a_batch_in_parts_gives_the_product_of_the_whole():
    net = network(norm="group")
    optimizer = warmed(net, OPTIMIZERS["adam"], steps=20)
    (x, y), guide = data(count=6), data(seed=2)
    whole = hypergradient(net, optimizer, x, y, guide)[0]
    loss, parameters = loss_of(net), dict(net.named_parameters())
    parts = [(a.requires_grad_(), b) for a, b in zip(x.split(2), y.split(2), strict=True)]
    sums = [inner_gradient(loss, parameters, part, differentiable=False)[1] for part in parts]
    gradients = {name: sum(part[name] for part in sums) / 3 for name in parameters}
    after = inner_step(optimizer, inner_state(optimizer, parameters), gradients).parameters
    _, v = guide_gradient(lambda p: loss(p, *guide), after)
    u = step_jacobian(optimizer, parameters, gradients, v)
    found = torch.cat([mixed_product(loss, parameters, part, u)[0] / 3 for part in parts])
    torch.testing.assert_close(found, whole, rtol=1e-8, atol=1e-14)


def test_statistics_come_back_to_the_bit_and_a_graph_of_before_stays_valid():
    net = network()
    x, y = data()
    net(x)
    before = copy.deepcopy(net.state_dict())
    buffers = dict(net.named_buffers())
    value = loss_of(net)(dict(net.named_parameters()), x, y)
    with frozen_statistics(net):
        net(2 * x)
        assert not torch.equal(net[1].running_mean, buffers["1.running_mean"])
    assert all(buffer is buffers[name] for name, buffer in net.named_buffers())
    value.backward()
    net.load_state_dict(before)
    with frozen_statistics(net):
        hypergradient(net, OPTIMIZERS["sgd"](net.parameters()), x, y, data(seed=2))
    torch.testing.assert_close(dict(net.state_dict()), dict(before), rtol=0, atol=0)


def test_parameters_that_nothing_reached_move_nothing_and_those_of_others_stay():
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = torch.optim.Adam([a, b], lr=0.1)
    parameters = {"a": a, "b": b, "c": c}
    gradients = {"a": torch.tensor([0.5, 0.0]), "b": torch.zeros(2), "c": torch.ones(2)}
    after = inner_step(optimizer, inner_state(optimizer, parameters), gradients).parameters
    assert after["c"] is c
    torch.testing.assert_close(after["a"].detach(), torch.tensor([0.9, 1.0]))
    u = step_jacobian(optimizer, parameters, gradients, {name: torch.ones(2) for name in parameters})
    assert all(value.isfinite().all() for value in u.values())
    assert not u["b"].any() and not u["c"].any()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda p: torch.optim.Adagrad(p), TypeError, "Adagrad"),
        (lambda p: torch.optim.Adam(p, amsgrad=True), ValueError, "amsgrad"),
        (lambda p: torch.optim.RMSprop(p, centered=True), ValueError, "centered"),
        (lambda p: torch.optim.SGD(p, lr=1.0, maximize=True), ValueError, "maximize"),
    ],
)
def test_an_unknown_step_is_refused_by_name(make, error, words):
    net = nn.Linear(1, 1)
    with pytest.raises(error, match=words):
        inner_state(make(net.parameters()), dict(net.named_parameters()))


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method: expected one of exact, difference"):
        mixed_product(lambda p: p["a"].sum(), {"a": torch.ones(1)}, (), {"a": torch.ones(1)}, method="forward")
