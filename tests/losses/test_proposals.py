"""Loss with proposals: the cross-entropy, its gradient, what is logged, and training to a size."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medconstraints.losses.proposals import ProposalLoss
from medconstraints.losses.size_proposals import size_proposals

INF = float("inf")
BOUNDS = torch.tensor([[[[-INF, INF]], [[3.0, 5.0]], [[-INF, 9.0]]], [[[-INF, INF]], [[20.0, INF]], [[0.0, 36.0]]]])


@pytest.fixture
def logits():
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def weak_label():
    label = torch.full((2, 1, 6, 6), -1)
    label[:, 0, 2, 3], label[0, 0, 0, 0] = 1, 0
    return label


@pytest.mark.parametrize(
    "options", [{}, {"solver": "gradient", "learning_rate": 0.01, "max_steps": 20}, {"logit_scale": 5.0}]
)
def test_is_the_cross_entropy_with_the_proposals(logits, weak_label, options):
    target = {"bounds": BOUNDS, "weak_label": weak_label, "index": torch.arange(2)}
    solver = {key: value for key, value in options.items() if key != "logit_scale"}
    probs = (logits.double() * options.get("logit_scale", 1)).softmax(1)
    proposals, _ = size_proposals(probs.log(), BOUNDS, weak_label, **solver)
    expected = -(proposals * probs.log()).sum(1, keepdim=True)
    for reduction, value in (("mean", expected.mean()), ("sum", expected.sum()), ("none", expected)):
        found = ProposalLoss(reduction=reduction, **options)(logits, target)
        torch.testing.assert_close(found.double(), value, atol=1e-3, rtol=1e-3)


def test_gradient_is_prediction_minus_proposal(logits, weak_label):
    logits.requires_grad_()
    ProposalLoss(reduction="sum")(logits, {"bounds": BOUNDS, "weak_label": weak_label}).backward()
    probs = logits.detach().softmax(1)
    proposals, _ = size_proposals(probs.log(), BOUNDS, weak_label)
    torch.testing.assert_close(logits.grad, probs - proposals, atol=1e-4, rtol=0)


def test_probabilities_and_logits_agree(logits):
    expected = ProposalLoss()(logits, BOUNDS)
    torch.testing.assert_close(ProposalLoss(softmax=False)(logits.softmax(1), BOUNDS), expected)


def test_slope_where_the_softmax_is_rounded_to_0():
    logits = torch.tensor([200.0, -200.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4).clone().requires_grad_()
    bounds = torch.tensor([[[[-INF, INF]], [[8.0, INF]]]])
    ProposalLoss(reduction="sum")(logits, bounds).backward()
    torch.testing.assert_close(logits.grad[0, 1], torch.full((4, 4), -0.5), atol=1e-3, rtol=0)


def test_training_reaches_the_size_and_the_labels():
    """A labelled bright voxel and a size are enough for a threshold to find the square."""
    image = 0.1 * torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    image[..., 4:9, 5:11] += 1
    label = torch.full((1, 1, 16, 16), -1)
    label[0, 0, 6, 7] = 1
    target = {"bounds": torch.tensor([[[[-INF, INF]], [[27.0, 33.0]]]]), "weak_label": label}
    network = torch.nn.Conv2d(1, 2, 1)
    torch.nn.init.zeros_(network.weight)
    loss, optimizer = ProposalLoss(), torch.optim.Adam(network.parameters(), lr=0.4)
    for _ in range(40):
        optimizer.zero_grad()
        loss(network(image), target).backward()
        optimizer.step()
    found = network(image).argmax(1)[0]
    expected = torch.zeros(16, 16)
    expected[4:9, 5:11] = 1
    assert (found == expected).float().mean() > 0.99
    assert loss.terms()["multiplier"] < 0.5


def test_terms(logits):
    loss = ProposalLoss()
    assert loss.terms() == {}
    loss(logits, BOUNDS)
    size = logits.softmax(1).sum((2, 3))
    _, multipliers = size_proposals(logits.log_softmax(1), BOUNDS)
    used = BOUNDS[:, :, 0].isfinite()
    met = [size[0, 1] >= 3, size[0, 1] <= 5, size[0, 2] <= 9, size[1, 1] >= 20, size[1, 2] >= 0, size[1, 2] <= 36]
    assert 0 < sum(met) < 6
    assert loss.terms()["satisfied"] == pytest.approx(float(sum(met)) / 6)
    torch.testing.assert_close(loss.terms()["multiplier"], multipliers[used].mean())
    loss(logits, torch.tensor([-INF, INF]).repeat(2, 3, 1, 1))
    assert {name: value.item() for name, value in loss.terms().items()} == {"multiplier": 0, "satisfied": 1}


def test_half_precision_autocast_and_metadata(logits, weak_label):
    target = {"bounds": MetaTensor(BOUNDS), "weak_label": MetaTensor(weak_label)}
    expected = ProposalLoss()(logits.half().float(), target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ProposalLoss()(MetaTensor(logits.half()), target)
    assert type(found) is torch.Tensor
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_volumes_numpy_targets_and_shared_probabilities(logits):
    expected, loss = ProposalLoss()(logits, BOUNDS), ProposalLoss()
    torch.testing.assert_close(loss(logits.unsqueeze(-1), BOUNDS), expected)
    torch.testing.assert_close(loss(logits, {"bounds": np.asarray(BOUNDS)}), expected)
    torch.testing.assert_close(loss(logits, BOUNDS, probabilities=loss.probabilities(logits)), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "adam"}, 'expected "newton" or "gradient"'),
        ({"max_steps": 0}, "max_steps: expected an integer >= 1"),
        ({"tolerance": 0.0}, "tolerance: expected"),
        ({"learning_rate": -1.0}, "learning_rate: expected a finite number > 0"),
        ({"softmax": False, "logit_scale": 5.0}, "logit_scale"),
    ],
)
def test_mistakes_in_options(options, message):
    with pytest.raises(ValueError, match=message):
        ProposalLoss(**options)


@pytest.mark.parametrize(
    ("shape", "target", "message"),
    [
        ((2, 1, 6, 6), BOUNDS[:, :1], "softmax of a single channel"),
        ((3, 6, 6), BOUNDS, "input: expected a floating point tensor"),
        ((2, 2, 6, 6), BOUNDS, "classes, background included: expected 2, got 3"),
        ((2, 3, 6, 6), {"bound": BOUNDS}, r"target: expected bounds .*got \['bound'\]"),
        ((2, 3, 6, 6), {"bounds": BOUNDS, "label": BOUNDS}, "name only these"),
    ],
)
def test_mistakes_in_input_and_target(shape, target, message):
    with pytest.raises(ValueError, match=message):
        ProposalLoss()(torch.zeros(shape), target)


def test_a_probability_of_0_stays_finite():
    probs = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    bounds = torch.tensor([[[[-torch.inf, torch.inf]], [[2.0, 2.0]]]])
    assert bool(ProposalLoss(softmax=False)(probs, bounds).isfinite())
