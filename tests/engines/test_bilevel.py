"""BilevelTrainer: what the augmenter learns, and that the network's own training is an ordinary one."""

import copy

import pytest
import torch
from ignite.engine import Events
from monai.data import Dataset
from monai.losses import DiceCELoss
from torch import nn

from medconstraints.augmentation import Augmenter
from medconstraints.engines import BilevelTrainer


class Shift(nn.Module):
    """One number that is added to every image: the smallest augmenter."""

    def __init__(self, value=0.0):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, image, label=None, spacing_mm=None):
        return image + self.value, label


def network(norm=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4) if norm else nn.Identity(),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )


def items(count=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 6, 6, generator=generator)
    return [{"image": image + i % 2, "label": i % 2, "case": f"{seed}/{i}"} for i, image in enumerate(images)]


@pytest.fixture
def make_trainer():
    def make(**options):
        net = options.pop("network", None) or network()
        augmenter = options.pop("augmenter", None) or Shift()
        given = {
            "device": "cpu",
            "max_epochs": 2,
            "batch_size": 6,
            "dataset": Dataset(items()),
            "loss_function": nn.CrossEntropyLoss(),
            "optimizer": torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
            "augmenter_optimizer": torch.optim.SGD(augmenter.parameters(), lr=1.0),
            "warm_up": 0,
        }
        return BilevelTrainer(network=net, augmenter=augmenter, **given | options)

    return make


def guide_loss_after(trainer, state, images, labels, guide, shift):
    """The guide loss that follows the real steps on shifted batches, from scratch."""
    net = copy.deepcopy(state["network"])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    for image, label in zip(images, labels, strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(image + shift), label).backward()
        if trainer.max_norm:
            nn.utils.clip_grad_norm_(net.parameters(), trainer.max_norm)
        optimizer.step()
    with torch.no_grad():
        net.train(trainer.guide_mode == "train")
        return float(nn.functional.cross_entropy(net(guide[0]), guide[1]))


@pytest.mark.parametrize("guide_mode", ["train", "eval"])
@pytest.mark.parametrize(
    "options", [{}, {"unroll": 3}, {"max_norm": 0.1}, {"unroll": 2, "max_norm": 0.1}, {"method": "difference"}]
)
def test_the_augmenter_moves_by_the_slope_of_the_guide_loss_after_the_step(make_trainer, options, guide_mode):
    torch.set_default_dtype(torch.float64)
    try:
        data = [{**item, "image": item["image"].double()} for item in items()]
        net = network()
        if guide_mode == "eval":  # no gradient goes through the running statistics
            net[1].momentum = 0.0
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
        options = {"network": net, "optimizer": optimizer, "guide_mode": guide_mode, **options}
        trainer = make_trainer(dataset=Dataset(data), max_epochs=1, **options)
        state = {"network": copy.deepcopy(trainer.network)}
        image = torch.stack([item["image"] for item in data[:6]])
        label = torch.tensor([item["label"] for item in data[:6]])
        guide = torch.stack([item["image"] for item in data[6:]]), torch.tensor([item["label"] for item in data[6:]])
        trainer.guide_batch = lambda: guide
        trainer.state.iteration, trainer.state.batch = 1, {"image": image}
        trainer.network.train()
        trainer.guided_step(image, label)
        parts = options.get("unroll", 1)
        images, labels = image.tensor_split(parts), label.tensor_split(parts)
        high, low = (guide_loss_after(trainer, state, images, labels, guide, h) for h in (1e-5, -1e-5))
        tolerance = 1e-2 if options.get("method") == "difference" else 1e-5
        assert -float(trainer.augmenter.value) == pytest.approx((high - low) / 2e-5, rel=tolerance)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("unroll", [1, 2])
def test_the_network_is_trained_as_by_an_ordinary_loop(make_trainer, unroll):
    trainer = make_trainer(augmenter_optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.0), unroll=unroll)
    twin = copy.deepcopy(trainer.network)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    batches = []
    step = trainer.guided_step
    trainer.guided_step = lambda image, label: batches.append((image, label)) or step(image, label)
    trainer.augmenter_optimizer.param_groups[0]["params"][0].grad = None
    trainer.step_beside = lambda optimizer: None
    trainer.run()
    for image, label in batches:
        for part, classes in zip(image.tensor_split(unroll), label.tensor_split(unroll), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(twin(part), classes).backward()
            optimizer.step()
    torch.testing.assert_close(trainer.network.state_dict(), twin.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_known_shift_is_found(make_trainer):
    # The guide images are brighter by 2; an augmenter that adds 2 makes the training images like them.
    guide = [{**item, "image": item["image"] + 2.0} for item in items(seed=1)]
    augmenter = Shift()
    trainer = make_trainer(
        network=network(norm=False),  # batch statistics would take the shift out of what trains
        guide_dataset=Dataset(guide),
        augmenter=augmenter,
        augmenter_optimizer=torch.optim.Adam(augmenter.parameters(), lr=0.05),
        max_epochs=30,
    )
    trainer.run()
    assert 1.0 < float(augmenter.value) < 3.0


def test_the_augmenter_waits_for_the_warm_up_and_its_interval(make_trainer):
    trainer = make_trainer(warm_up=3, interval=2, max_epochs=3)
    values = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: values.append(float(trainer.augmenter.value)))
    trainer.run()
    moved = [i for i, (a, b) in enumerate(zip([0.0, *values], values, strict=False), 1) if a != b]
    assert moved == [i for i in range(4, len(values) + 1) if i % 2 == 0]


@pytest.mark.parametrize("dims", [2, 3])
def test_label_maps_are_warped_with_their_images(dims):
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
    net = nn.Sequential(conv(1, 4, 3, padding=1), nn.SiLU(), conv(4, 2, 1))
    augmenter = Augmenter(dims, families=["affine", "intensity"])
    before = copy.deepcopy(augmenter.state_dict())
    data = [{"image": torch.randn(1, *[8] * dims), "label": torch.randint(2, (1, *[8] * dims))} for _ in range(8)]
    trainer = BilevelTrainer(
        device="cpu",
        max_epochs=1,
        dataset=Dataset(data),
        network=net,
        optimizer=torch.optim.AdamW(net.parameters(), lr=0.01),
        loss_function=DiceCELoss(softmax=True),
        augmenter=augmenter,
        augmenter_optimizer=torch.optim.Adam(augmenter.parameters(), lr=0.1),
        num_classes=2,
        batch_size=3,
        guide_fraction=0.25,
        warm_up=0,
    )
    trainer.run()
    assert not torch.equal(before["mlp.0.weight"], augmenter.state_dict()["mlp.0.weight"])
    assert trainer.skipped_steps == 0
    assert trainer.state.output[0]["label"].shape == (2, *[8] * dims)


class Fixed(nn.Module):
    """Has a parameter that its images do not depend on."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))

    def forward(self, image, label=None, spacing_mm=None):
        return image.flip(-1), label


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"augmenter": Fixed()}, TypeError, "augmenter: .*Fixed"),
        ({"unroll": 2, "method": "difference"}, ValueError, "unroll"),
        ({"unroll": 4}, ValueError, "unroll: .*batch_size 6"),
        ({"method": "forward"}, ValueError, "method"),
        ({"interval": 0}, ValueError, "interval"),
    ],
)
def test_what_cannot_learn_is_refused_at_construction(make_trainer, options, error, words):
    with pytest.raises(error, match=words):
        make_trainer(**options)
