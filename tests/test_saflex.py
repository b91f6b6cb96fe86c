"""Gains against gradients of each sample, labels and weights against loops, and what a step on them really does."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from medconstraints.hypergradients import frozen_statistics, guide_gradient
from medconstraints.saflex import Rules, guide_step, label_gains, proxy_logits, refine, region_gains

CLASSES = 3


def network_of(norm):
    torch.manual_seed(0)
    layers = {"group": nn.GroupNorm(2, 6), "batch": nn.BatchNorm2d(6)}
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        layers[norm],
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, CLASSES),
    ).double()


class Case:
    """A network, a batch of eight and a guide batch; all in double precision."""

    def __init__(self, network, shape=(1, 6, 6)):
        generator = torch.Generator().manual_seed(1)
        self.network = network
        self.image, self.guide = (
            torch.randn(count, *shape, dtype=torch.float64, generator=generator) for count in (8, 12)
        )
        self.label = torch.randint(0, CLASSES, (8,), generator=generator)
        self.guide_label = torch.randint(0, CLASSES, (12,), generator=generator)
        self.parameters = dict(network.named_parameters())

    def forward(self, parameters, image):
        return functional_call(self.network, parameters, (image,))

    def guide_loss(self, parameters):
        return F.cross_entropy(self.forward(parameters, self.guide), self.guide_label)

    def gains(self, *, centred, length=1e-5):
        with frozen_statistics(self.network), torch.no_grad():
            logits = self.forward(self.parameters, self.image)
            moved, eps = guide_step(self.parameters, self.direction(), length=length)
            return label_gains(logits, self.forward(moved, self.image), eps, centred=centred)

    def direction(self):
        with torch.enable_grad(), frozen_statistics(self.network):
            return guide_gradient(self.guide_loss, self.parameters)[1]


@pytest.fixture(params=["group", "batch"])
def case(request):
    return Case(network_of(request.param))


def inner_product(gradients, direction):
    return sum(float((g * v).sum()) for g, v in zip(gradients, direction.values(), strict=True))


def test_gains_are_inner_products_with_the_gradient_of_each_sample(case):
    v, found = case.direction(), case.gains(centred=False)
    with frozen_statistics(case.network):
        log_probs = torch.log_softmax(case.forward(case.parameters, case.image), 1)
        for b, k in itertools.product(range(8), range(CLASSES)):
            gradients = torch.autograd.grad(log_probs[b, k], [*case.parameters.values()], retain_graph=True)
            assert float(found[b, k]) == pytest.approx(-inner_product(gradients, v), rel=1e-2, abs=1e-3)


@pytest.mark.parametrize(("norm", "error"), [("group", 2e-3), ("batch", 2e-2)])
def test_the_step_of_the_default_length_is_short_enough(norm, error):
    case = Case(network_of(norm))
    near, default = case.gains(centred=True, length=1e-5), case.gains(centred=True, length=1e-3)
    assert float((near - default).norm() / near.norm()) < error


def test_a_gain_predicts_the_change_of_the_guide_loss():
    """Of a step of SGD on one sample with one label."""
    case = Case(network_of("group"))
    gains, rate = case.gains(centred=False), 1e-4
    before = float(case.guide_loss(case.parameters))
    pairs = []
    for b, k in itertools.product(range(8), range(CLASSES)):
        loss = F.cross_entropy(case.forward(case.parameters, case.image[b : b + 1]), torch.tensor([k]))
        gradients = torch.autograd.grad(loss, [*case.parameters.values()])
        after = {n: p - rate * g for (n, p), g in zip(case.parameters.items(), gradients, strict=True)}
        pairs.append((float(gains[b, k]), (before - float(case.guide_loss(after))) / rate))
    predicted, real = np.array(pairs).T
    assert np.corrcoef(predicted, real)[0, 1] > 0.999 and np.abs(predicted / real - 1)[np.abs(real) > 0.05].max() < 0.05


def test_gains_weighed_by_the_prediction_add_up_to_nothing(case):
    """So the largest one is never negative."""
    with frozen_statistics(case.network):
        probs = torch.softmax(case.forward(case.parameters, case.image), 1).float()
    for centred in (False, True):
        gains = case.gains(centred=centred)
        assert float((probs * gains).sum(1).abs().max()) < 1e-4 * float(gains.abs().max())
        assert (gains.amax(1) >= 0).all()


def test_centred_gains_do_not_know_which_class_the_guide_images_have_more_of(case):
    """A shift of a logit that is the same for all samples is no gain of any."""
    logits, moved = torch.randn(2, 8, CLASSES)
    shift = torch.randn(1, CLASSES)
    assert torch.allclose(label_gains(logits, moved + shift, 0.1), label_gains(logits, moved, 0.1), atol=1e-4)
    assert not torch.allclose(
        label_gains(logits, moved + shift, 0.1, centred=False), label_gains(logits, moved, 0.1, centred=False), atol=0.1
    )
    constant = torch.randn(8, 1)
    for centred in (False, True):  # a number added to all logits of a sample, before or after the step, is none either
        own = label_gains(logits + constant, moved + constant, 0.1, centred=centred)
        assert torch.allclose(own, label_gains(logits, moved, 0.1, centred=centred), atol=1e-4)


# Labels and weights


def by_hand(gains, label, rules, share=None):
    """Labels, weights and gains with loops; `share` of regions."""
    gains, label = gains.double().numpy(), label.double().numpy()
    regions = share is not None
    if not regions:
        gains, label, share = gains[:, None], label[:, None], np.ones((len(gains), 1))
    scale = math.sqrt(np.mean(gains**2)) if rules.scaled else 1.0
    labels, kept, gain = [], [], []
    for b in range(len(gains)):
        own, total = 0.0, 0.0
        labels.append([])
        for r in range(gains.shape[1]):
            pi = gains[b, r] / scale
            wanted = (pi + rules.keep * label[b, r]) / rules.temperature
            soft = np.exp(wanted - wanted.max())
            soft /= soft.sum()
            labels[-1].append(soft)
            own += float(share[b, r]) * sum(soft * pi)
            total += float(share[b, r]) * sum(pi)
        gain.append(own)
        kept.append((own if rules.weigh == "gain" else total) >= 0)
    weights = np.array(kept) * len(kept) / max(sum(kept), 1)
    labels = np.array(labels)
    return labels if regions else labels[:, 0], weights, np.array(gain)


RULES = {
    "centred": Rules(),
    "sum": Rules(weigh="sum"),
    "unscaled": Rules(scaled=False, keep=0.2, temperature=0.5),
    "flips": Rules(keep=0.0),
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("mixed", [False, True])
def test_labels_and_weights(rules, mixed):
    generator = torch.Generator().manual_seed(2)
    logits, moved = torch.randn(2, 16, 4, generator=generator)
    gains = label_gains(logits, moved, 1.0, centred=False)
    label = F.one_hot(torch.randint(0, 4, (16,), generator=generator), 4).float()
    label = (label + label.flip(0)) / 2 if mixed else label
    found = refine(gains, label, rules)
    for own, expected in zip(found, by_hand(gains, label, rules), strict=True):
        np.testing.assert_allclose(own.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert 0 < int((found.weight == 0).sum()) < 16 or rules.weigh == "gain"
    if rules == RULES["flips"]:
        assert (found.weight == 1).all()  # the largest gain is never negative: nothing is dropped
    if rules == Rules():  # gains of another unit
        assert torch.allclose(refine(7.5 * gains, label, rules).label, found.label, atol=1e-5)


def test_regions_have_a_label_each_and_a_sample_one_weight():
    generator = torch.Generator().manual_seed(3)
    gains = torch.randn(5, 3, 4, 6, generator=generator)
    numbers = torch.randint(0, 3, (5, 4, 6), generator=generator)
    numbers[0][numbers[0] == 2] = 0
    label = F.one_hot(numbers, 3).movedim(-1, 1).float()
    means, share = region_gains(gains, label)
    for b, r in itertools.product(range(5), range(3)):
        inside = numbers[b] == r
        expected = gains[b][:, inside].mean(1) if inside.any() else torch.zeros(3)
        torch.testing.assert_close(means[b, r], expected)
        assert float(share[b, r]) == pytest.approx(float(inside.float().mean()))
    eye = torch.eye(3).expand(5, 3, 3)
    for own, expected in zip(refine(means, eye, share=share), by_hand(means, eye, Rules(), share.numpy()), strict=True):
        np.testing.assert_allclose(own.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_the_papers_rules_draw_gumbel_noise():
    """Of equal gains each label wins as often, and the label's own more often by its penalty."""
    torch.manual_seed(0)
    rules = Rules.named("paper")
    assert (rules.centred, rules.scaled, rules.weigh, rules.temperature, rules.noise) == (
        False,
        False,
        "sum",
        0.01,
        1.0,
    )
    label = torch.tensor([[1.0, 0.0, 0.0]]).expand(20000, 3)
    won = refine(torch.zeros(20000, 3), label, rules).label.argmax(1).bincount(minlength=3) / 20000
    expected = torch.softmax(torch.tensor([rules.keep, 0.0, 0.0]), 0)  # the Gumbel-max trick
    torch.testing.assert_close(won, expected, atol=0.02, rtol=0)


def test_contrastive_batches_are_classes_of_their_own():
    """Gains of the logits of a batch against itself predict what a step on one pair does."""
    case = Case(network_of("group"))
    two = case.image + 0.3 * torch.randn(8, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def logits_of(parameters):
        return proxy_logits(case.forward(parameters, case.image), case.forward(parameters, two), temperature=0.5)

    v = case.direction()
    with torch.no_grad():
        moved, eps = guide_step(case.parameters, v, length=1e-5)
        gains = label_gains(logits_of(case.parameters), logits_of(moved), eps, centred=False)
    log_probs = torch.log_softmax(logits_of(case.parameters), 1)
    for b, k in ((0, 0), (3, 3), (3, 5)):
        gradients = torch.autograd.grad(log_probs[b, k], [*case.parameters.values()], retain_graph=True)
        assert float(gains[b, k]) == pytest.approx(-inner_product(gradients, v), rel=1e-2, abs=1e-4)
    assert refine(gains, torch.eye(8)).label.shape == (8, 8)


def test_a_small_table_finds_its_wrong_labels():
    """Rows of features and a linear model: most rows whose label was turned are dropped or turned back."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(400, 5, generator=generator)
    truth = (rows @ torch.tensor([2.0, -1.0, 0.5, 0.0, 1.0]) > 0).long()
    label, wrong = truth.clone(), torch.rand(200, generator=generator) < 0.3
    label[:200][wrong] = 1 - label[:200][wrong]
    model = nn.Linear(5, 2)
    parameters = dict(model.named_parameters())

    def guide(parameters):
        return F.cross_entropy(functional_call(model, parameters, (rows[200:],)), truth[200:])

    _, v = guide_gradient(guide, parameters)
    with torch.no_grad():
        moved, eps = guide_step(parameters, v)
        logits, after = (functional_call(model, p, (rows[:200],)) for p in (parameters, moved))
    found = refine(label_gains(logits, after, eps), F.one_hot(label[:200], 2).float())
    changed = (found.weight == 0) | (found.label.argmax(1) != label[:200])
    assert changed[wrong].float().mean() > changed[~wrong].float().mean() + 0.4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: refine(torch.zeros(1, 3), torch.zeros(1, 3)), "at least two samples"),
        (lambda: refine(torch.zeros(4, 3), torch.zeros(4, 2)), r"\(4, 3\) and \(4, 2\)"),
        (lambda: Rules.named("best"), "rules: expected one of centred, paper, got 'best'"),
        (lambda: Rules.named({"temperature": 0.0}), "temperature: expected a finite number > 0"),
        (lambda: Rules.named({"keep": -1.0}), "keep: expected a finite number >= 0"),
        (lambda: Rules.named({"weigh": "mean"}), "weigh: expected one of gain, sum"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
