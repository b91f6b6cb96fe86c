"""Every loss, statistic and formulation compiled, under autocast and under `torch.func`, against itself run eagerly."""

import functools

import pytest
import torch

from medconstraints.distance import Euclidean
from medconstraints.formulations import (
    AugmentedLagrangian,
    Lagrangian,
    LogBarrierExtension,
    QuadraticPenalty,
    ReLULagrangian,
)
from medconstraints.losses import (
    BoundaryLoss,
    BoxPriorLoss,
    CombinedLoss,
    ConstraintLoss,
    DistanceWeightedCrossEntropyLoss,
    GeneralizedDiceLoss,
    HausdorffLoss,
    PartialCrossEntropyLoss,
    ProposalLoss,
)
from medconstraints.statistics import (
    soft_centroid,
    soft_centroid_offset,
    soft_mean_intensity,
    soft_moments,
    soft_outside_extent,
    soft_size,
    soft_size_ratio,
    soft_spread,
    soft_volume_size,
)

SHAPE = (3, 3, 8, 6)
INDEX = torch.arange(3)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def made(name):
    """Loss and target; random, but the same at each call."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 3, (3, 1, 8, 6), generator=generator)
    weak = label.where(torch.rand(label.shape, generator=generator) < 0.2, torch.tensor(-1))
    maps = torch.randn(SHAPE, generator=generator)
    bounds = torch.tensor([[5.0, 9.0], [3.0, 4.0], [10.0, 30.0]]).view(1, 3, 1, 2).repeat(3, 1, 1, 1)
    none = [-1, 0, 0, 0, 0]
    boxes = torch.tensor([[[1, 1, 1, 6, 5], [2, 0, 2, 4, 6]], [[1, 2, 0, 8, 3], none], [none, none]])
    indexed = {"bounds": bounds, "index": INDEX}
    barrier = LogBarrierExtension()
    losses = {
        "partial cross-entropy": (PartialCrossEntropyLoss(), weak),
        "generalised Dice": (GeneralizedDiceLoss(softmax=True), label),
        "boundary": (BoundaryLoss(softmax=True), maps),
        "distance-weighted": (DistanceWeightedCrossEntropyLoss(), {"label": label, "distance_map": maps}),
        "Hausdorff": (HausdorffLoss(softmax=True, spacing_mm=(1.0, 2.0), measure=Euclidean()), label),
        "proposals": (ProposalLoss(softmax=True), {"bounds": bounds}),
        "size": (ConstraintLoss(soft_size, QuadraticPenalty(), softmax=True), bounds),
        "size, barrier": (ConstraintLoss(soft_size, barrier, softmax=True), bounds),
        "size, Lagrangian": (
            ConstraintLoss(soft_size, Lagrangian(3, learning_rate=1.0, initial=0.5), softmax=True),
            indexed,
        ),
        "size, ReLU": (
            ConstraintLoss(soft_size, ReLULagrangian(learning_rate=1.0, initial=0.5), softmax=True),
            indexed,
        ),
        "size, augmented": (ConstraintLoss(soft_size, AugmentedLagrangian(3), softmax=True), indexed),
        "volumes": (
            ConstraintLoss(soft_volume_size, QuadraticPenalty(), softmax=True),
            {"bounds": bounds, "volume": torch.tensor([0, 1, 0])},
        ),
        "boxes": (BoxPriorLoss(barrier, softmax=True), boxes),
        "boxes, Lagrangian": (
            BoxPriorLoss(Lagrangian(3, learning_rate=1.0, initial=0.5), softmax=True),
            {"boxes": boxes, "index": INDEX},
        ),
        "boxes, cross-entropy": (BoxPriorLoss(barrier, softmax=True, emptiness="cross_entropy"), boxes),
        "sum": (
            CombinedLoss(
                {"ce": PartialCrossEntropyLoss(), "size": ConstraintLoss(soft_size, barrier, softmax=True)},
            ),
            {"weak_label": weak, "bounds": bounds},
        ),
    }
    return losses[name]


LOSSES = [
    "partial cross-entropy",
    "generalised Dice",
    "boundary",
    "distance-weighted",
    "Hausdorff",
    "proposals",
    "size",
    "size, barrier",
    "size, Lagrangian",
    "size, ReLU",
    "size, augmented",
    "volumes",
    "boxes",
    "boxes, Lagrangian",
    "boxes, cross-entropy",
    "sum",
]
ON_THE_HOST = {"Hausdorff", "proposals", "boxes", "boxes, Lagrangian", "boxes, cross-entropy"}  # parts of them
each_loss = pytest.mark.parametrize("name", LOSSES)


def logits_of(dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)


def value_and_gradient(function, logits):
    logits = logits.clone().requires_grad_()
    value = function(logits)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


@pytest.mark.slow
@each_loss
def test_compiled(name):
    loss, target = made(name)
    expected = value_and_gradient(lambda x: loss(x, target), logits_of())
    loss, target = made(name)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=name not in ON_THE_HOST)
    for _ in range(2):
        torch.testing.assert_close(value_and_gradient(lambda x: compiled(x, target), logits_of()), expected)


@each_loss
def test_func_grad(name):
    loss, target = made(name)
    _, expected = value_and_gradient(lambda x: loss(x, target), logits_of())
    found = torch.func.grad(lambda x: loss(x, target))(logits_of())
    torch.testing.assert_close(found, expected)


LOOK_AT_VALUES = {"Hausdorff", "proposals", "partial cross-entropy", "sum"}  # of each batch, on the host


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in LOOK_AT_VALUES])
def test_vmap_of_func_grad(name):
    """A gradient for each of several outputs, as ensembles take them."""
    loss, target = made(name)
    gradient = torch.func.grad(lambda x: loss(x, target))
    several = torch.stack([logits_of(), 0.5 * logits_of()])
    loss.eval()  # what observes residuals would observe those of another level
    torch.testing.assert_close(torch.func.vmap(gradient)(several), torch.stack([gradient(one) for one in several]))


@each_loss
def test_autocast(name):
    loss, target = made(name)
    logits = logits_of(torch.bfloat16)
    value, _ = value_and_gradient(lambda x: loss(x, target), logits.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under, gradient = value_and_gradient(lambda x: loss(x, target), logits)
    torch.testing.assert_close(under.float(), value, rtol=1e-4, atol=1e-5)
    assert gradient.isfinite().all()


WITHOUT_ACTIVATION = {
    "generalised Dice": lambda: GeneralizedDiceLoss(),
    "boundary": lambda: BoundaryLoss(),
    "Hausdorff": lambda: HausdorffLoss(spacing_mm=(1.0, 2.0)),
    "size": lambda: ConstraintLoss(soft_size, QuadraticPenalty()),
    "boxes": lambda: BoxPriorLoss(LogBarrierExtension()),
}


@pytest.mark.parametrize("name", WITHOUT_ACTIVATION)
def test_logits_without_an_activation_are_refused(name):
    """In the first batch; what is within rounding of 0..1 passes, and later batches are not looked at."""
    target = made(name)[1]
    for probs in (logits_of(), torch.full(SHAPE, 1.1), torch.full(SHAPE, -0.1)):
        with pytest.raises(ValueError, match=r"input: expected probabilities, 0 to 1, .* give softmax=True"):
            WITHOUT_ACTIVATION[name]()(probs, target)
    loss = WITHOUT_ACTIVATION[name]()
    for probs in (torch.softmax(logits_of(), 1), torch.softmax(logits_of(), 1).bfloat16().float() * 1.001, logits_of()):
        assert loss(probs, target).isfinite()


STATISTICS = {
    "size": soft_size,
    "size in mm": functools.partial(soft_size, spacing_mm=(1.0, 2.0)),
    "volumes": functools.partial(soft_volume_size, volume=torch.tensor([0, 1, 0])),
    "centroid": soft_centroid,
    "spread": soft_spread,
    "moments": soft_moments,
    "intensity": functools.partial(soft_mean_intensity, image=torch.rand(3, 1, 8, 6)),
    "size ratio": functools.partial(soft_size_ratio, pairs=[(1, 2)]),
    "offset": functools.partial(soft_centroid_offset, pairs=[(1, 2)]),
    "outside": functools.partial(soft_outside_extent, pairs=[(1, 2)]),
}


@pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS)
def test_a_statistic_compiles_whole(statistic):
    probs = torch.softmax(logits_of(), 1)
    whole = torch.compile(statistic, backend="aot_eager", fullgraph=True)
    expected = value_and_gradient(lambda x: statistic(x).sum(), probs)
    torch.testing.assert_close(value_and_gradient(lambda x: whole(x).sum(), probs), expected)


FORMULATIONS = {
    "penalty": QuadraticPenalty,
    "barrier": LogBarrierExtension,
    "Lagrangian": lambda: Lagrangian(3, learning_rate=0.5, initial=0.5),
    "ReLU": lambda: ReLULagrangian(learning_rate=0.5, initial=0.5),
    "augmented": lambda: AugmentedLagrangian(3),
}


@pytest.mark.parametrize("make", FORMULATIONS.values(), ids=FORMULATIONS)
def test_a_formulation_compiles_whole(make):
    residual, formulation, other = torch.randn(3, 2, 1, 2), make(), make()
    whole = torch.compile(other, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        expected = value_and_gradient(lambda z: formulation(z, INDEX).sum(), residual)
        torch.testing.assert_close(value_and_gradient(lambda z: whole(z, INDEX).sum(), residual), expected)
        formulation.step()
        other.step()
    assert str(formulation.state_dict()) == str(other.state_dict())
