"""SaflexTrainer: its step against one by hand, each upstream augmentation, and what it does with bad gains."""

import copy

import pytest
import torch
from ignite.engine import Events
from monai.data import Dataset
from monai.losses import DiceCELoss
from monai.transforms import CutMix, MixUp
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from medconstraints.engines import SaflexTrainer
from medconstraints.hypergradients import frozen_statistics
from medconstraints.saflex import label_gains, refine


def network(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(4, 2),
    )


def items(count=24, classes=True):
    generator = torch.Generator().manual_seed(0)
    found = []
    for i, image in enumerate(torch.randn(count, 1, 6, 6, generator=generator)):
        image = image + i % 2
        label = i % 2 if classes else (image > 0.5).long()
        found.append(
            {"image": image, "label": label, "augmented": image + 0.3, "augmented_label": label, "case": f"c{i}"}
        )
    return found


@pytest.fixture
def make_trainer():
    def make(**options):
        net = options.pop("network", None) or network()
        given = {
            "device": "cpu",
            "max_epochs": 2,
            "batch_size": 6,
            "dataset": Dataset(items()),
            "loss_function": nn.CrossEntropyLoss(),
            "num_classes": 2,
            "optimizer": torch.optim.SGD(net.parameters(), lr=0.1),
            "guide_fraction": 0.25,
        }
        return SaflexTrainer(network=net, **given | options)

    return make


def exact_gains(net, image, guide, guide_label):
    """Pi from the change of each logit along the guide gradient, by forward differences in double precision."""
    net = copy.deepcopy(net).double()
    parameters = {name: value.detach() for name, value in net.named_parameters()}

    def forward(parameters, image):
        with frozen_statistics(net):
            return functional_call(net, parameters, (image.double(),))

    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    loss = F.cross_entropy(forward(leaves, guide), guide_label)
    v = dict(zip(leaves, torch.autograd.grad(loss, [*leaves.values()]), strict=True))
    down = {name: value - 1e-6 * v[name] for name, value in parameters.items()}
    return label_gains(forward(parameters, image), forward(down, image), 1e-6)


def test_a_step_is_one_on_weighted_samples_with_their_labels(make_trainer):
    trainer, seen = make_trainer(max_epochs=1, decollate=False), {}
    guide_batch = trainer.guide_batch
    trainer.guide_batch = lambda: seen.setdefault("guide", guide_batch())

    def before(engine):
        seen["network"] = copy.deepcopy(engine.network).train()

    def after(engine):
        seen["after"] = [p.detach().clone() for p in engine.network.parameters()]
        seen["batch"], seen["refined"] = engine.state.batch, engine.last_refined
        engine.terminate()

    trainer.add_event_handler(Events.ITERATION_STARTED(once=1), before)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), after)
    trainer.run()
    net, batch, found = seen["network"], seen["batch"], seen["refined"]
    label = F.one_hot(torch.as_tensor(batch["label"]), 2).float()
    gains = exact_gains(net, batch["augmented"], *seen["guide"])
    expected = refine(gains.float(), label)
    torch.testing.assert_close(found.refined.label, expected.label, atol=0.05, rtol=0.05)
    assert torch.equal(found.refined.weight, expected.weight) and found.cases == batch["case"]
    augmented = F.cross_entropy(net(batch["augmented"]), found.refined.label, reduction="none")
    plain = F.cross_entropy(net(batch["image"]), torch.as_tensor(batch["label"]))
    (((augmented * found.refined.weight).mean() + plain) / 2).backward()
    for value, own in zip(net.parameters(), seen["after"], strict=True):
        torch.testing.assert_close(own, (value - 0.1 * value.grad).detach(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("mixer", [MixUp, CutMix])
def test_mixed_batches(make_trainer, mixer):
    trainer = make_trainer(mixing=mixer(6, alpha=1.0))
    labels = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: labels.append(engine.last_refined.given))
    trainer.run()
    given = torch.cat(labels)
    torch.testing.assert_close(given.sum(1), torch.ones(len(given)))
    assert ((given > 0.05) & (given < 0.95)).any() and trainer.skipped_steps == 0
    if mixer is CutMix:  # whole pixels of 36 come from the other image
        torch.testing.assert_close(given * 36, (given * 36).round())


def test_label_maps_have_a_label_for_each_region(make_trainer):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 2, 1))
    trainer = make_trainer(
        network=net,
        optimizer=torch.optim.AdamW(net.parameters(), lr=0.02),
        loss_function=DiceCELoss(softmax=True),
        dataset=Dataset(items(classes=False)),
        max_epochs=5,
    )
    losses = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.last_refined))
    trainer.run()
    assert losses[0].refined.label.shape == (6, 2, 2) and losses[0].refined.weight.shape == (6,)
    weights = torch.stack([batch.refined.weight for batch in losses])
    assert (weights == 0).any() and torch.allclose(weights.mean(1)[weights.any(1)], torch.ones(()))
    torch.testing.assert_close(losses[0].given.sum(1), torch.ones(6))


def test_a_label_map_is_kept_if_a_step_lowers_its_own_loss(make_trainer):
    """The loss that is trained, Dice here; against both losses from scratch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 2, 1))
    loss = DiceCELoss(softmax=True, lambda_ce=0.0)
    trainer = make_trainer(
        network=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        loss_function=loss,
        dataset=Dataset(items(classes=False)),
        max_epochs=1,
    )
    before, seen = copy.deepcopy(net), {}
    guide_batch = trainer.guide_batch
    trainer.guide_batch = lambda: seen.setdefault("guide", guide_batch())
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda engine: engine.terminate())
    trainer.run()
    found = trainer.last_refined
    image, label = seen["guide"]
    loss(before(image), F.one_hot(label[:, 0].long(), 2).movedim(-1, 1).float()).backward()
    after = copy.deepcopy(before)
    with torch.no_grad():
        for value, own in zip(after.parameters(), before.parameters(), strict=True):
            value -= 1e-4 * own.grad
        given = F.one_hot((found.image[:, 0] - 0.3 > 0.5).long(), 2).movedim(-1, 1).float()
        soft = torch.einsum("br...,brk->bk...", given, found.refined.label)
        lower = [
            loss(before(x[None]), y[None]) >= loss(after(x[None]), y[None])
            for x, y in zip(found.image, soft, strict=True)
        ]
    assert (found.refined.weight > 0).tolist() == [bool(one) for one in lower]


def test_dropout_is_the_same_in_both_passes(make_trainer):
    """Other masks would change logits by far more than the small step does."""
    gains = []
    for dropout in (0.0, 0.5):
        trainer = make_trainer(network=network(dropout), max_epochs=1, rules={"scaled": False})
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: gains.append(e.last_refined.refined.gain))
        trainer.run()
    assert torch.stack(gains).abs().max() < 50


def test_the_control_trains_on_the_same_batches_as_they_are(make_trainer):
    seen = []
    for rules in ("none", {"keep": 1e6, "weigh": "gain", "scaled": False}):
        trainer, batches = make_trainer(rules=rules, max_epochs=1), []
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e, b=batches: b.append(e.state.output))
        trainer.run()
        seen.append([case["image"] for batch in batches for case in batch])
        assert (trainer.last_refined is None) == (rules == "none")
    assert all(torch.equal(one, two) for one, two in zip(*seen, strict=True))


def test_a_guide_gradient_serves_several_iterations(make_trainer):
    for interval, expected in ((1, 6), (2, 4)):  # three iterations in each of two epochs
        trainer, calls = make_trainer(guide_interval=interval), []
        guide_batch = trainer.guide_batch
        trainer.guide_batch = lambda calls=calls, take=guide_batch: calls.append(1) or take()
        trainer.run()
        assert len(calls) == expected


def test_gains_that_are_not_finite_change_nothing(make_trainer):
    """Labels stay as the augmentation gave them, and it is counted."""
    trainer = make_trainer(max_epochs=1)
    moved = trainer._guide_direction
    trainer._guide_direction = lambda parameters: {name: value * torch.inf for name, value in moved(parameters).items()}
    trainer.run()
    assert trainer.skipped_steps == 3 and trainer.state.metrics["skipped_steps"] == 3
    assert all(p.isfinite().all() for p in trainer.network.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": 1}, ValueError, "num_classes: expected an integer >= 2"),
        ({"rules": "best"}, ValueError, "rules: expected one of centred, paper"),
        ({"batch_size": 1}, ValueError, "batch_size: expected an integer >= 2"),
        ({"guide_fraction": 0.01}, ValueError, "fraction: expected at least one patient in each part"),
        ({"guide_dataset": Dataset([])}, ValueError, "guide_dataset: expected images, got none"),
        ({"guide_dataset": Dataset(items()[::2])}, ValueError, "guide_dataset: expected several classes, got class 0"),
        (
            {"guide_dataset": Dataset(items()[:3])},
            ValueError,
            "guide_dataset: expected images that do not train, got 3",
        ),
    ],
)
def test_refused_at_construction(make_trainer, options, error, message):
    with pytest.raises(error, match=message):
        make_trainer(**options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda item: item | {"label": 2}, ValueError, r"label: expected class numbers 0\.\.1, got "),
        (
            lambda item: {key: item[key] for key in ("image", "label")},
            KeyError,
            "augmented: expected the augmented image",
        ),
    ],
)
def test_refused_while_training(make_trainer, change, error, message):
    with pytest.raises(error, match=message):
        make_trainer(dataset=Dataset([change(item) for item in items()[1::2]] + items()[::2])).run()
