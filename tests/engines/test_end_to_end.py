"""EndToEndTrainer: the gradient that reaches the generator's architecture, and what the steps beside it do."""

import copy
import logging

import pytest
import torch
from monai.data import Dataset
from monai.losses import DiceCELoss
from monai.networks.nets import PatchDiscriminator
from torch import nn
from torch.func import functional_call

from medconstraints.engines import EndToEndTrainer
from medconstraints.losses import MaskToImageLoss
from medconstraints.networks import MaskToImage, SearchableGenerator

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.9, weight_decay=1e-3),
}


def make_gan(dims=2, dropout=0.0):
    torch.manual_seed(1)
    generator = SearchableGenerator(dims, 2, 1, channels=(3, 4), strides=(2, 2), kernels=(2, 4, 6), dropout=dropout)
    discriminator = PatchDiscriminator(dims, 3, 3, num_layers_d=1, activation="swish", norm="instance")
    return MaskToImage(generator, discriminator)


def make_network(dims=2):
    torch.manual_seed(2)
    convolution = nn.Conv2d if dims == 2 else nn.Conv3d
    return nn.Sequential(convolution(1, 4, 3, padding=1), nn.SiLU(), convolution(4, 2, 3, padding=1))


def make_items(count=8, seed=0, dims=2, shuffled=False):
    generator = torch.Generator().manual_seed(seed)
    items = []
    for number in range(count):
        label = torch.zeros(1, *[8] * dims)
        start = torch.randint(0, 4, (dims,), generator=generator).tolist()
        label[(slice(None), *(slice(begin, begin + 4) for begin in start))] = 1
        image = label * 2 - 1 + 0.3 * torch.randn(label.shape, generator=generator)
        shown = label.flatten()[torch.randperm(label.numel(), generator=generator)].view_as(label) if shuffled else label
        items.append({"image": image, "label": shown, "augmented_label": label.flip(-1), "case": f"{seed}/{number}"})
    return items


@pytest.fixture
def make_trainer():
    def make(optimizer="SGD", dims=2, *, kind=EndToEndTrainer, **options):
        gan = options.pop("gan", None) or make_gan(dims)
        network = options.pop("network", None) or make_network(dims)
        architecture_optimizer = options.pop("architecture_optimizer", None) or torch.optim.Adam(
            gan.architecture().values(), lr=0.01
        )
        given = {
            "device": "cpu",
            "max_epochs": 2,
            "batch_size": 4,
            "dataset": Dataset(make_items(dims=dims)),
            "guide_dataset": Dataset(make_items(4, seed=1, dims=dims)),
            "loss_function": DiceCELoss(softmax=True),
            "optimizer": OPTIMIZERS[optimizer](network.parameters()),
            "generator_optimizer": OPTIMIZERS[optimizer](gan.generator_weights().values()),
            "discriminator_optimizer": torch.optim.Adam(gan.discriminator.parameters(), lr=1e-3),
            "num_classes": 2,
            "warm_up": 0,
        }
        return kind(
            gan=gan,
            gan_loss=MaskToImageLoss(reconstruction_weight=10.0),
            architecture_optimizer=architecture_optimizer,
            network=network,
            **given | options,
        )

    return make


class Recorded(EndToEndTrainer):
    """Keeps what an iteration began with, and the gradient that the architecture got."""

    def guided_step(self, image, label):
        self.before = copy.deepcopy(
            {
                "gan": self.gan,
                "network": self.network,
                "generator_optimizer": self.generator_optimizer.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
        )
        self.images = image, label, self._augmented_label()
        return super().guided_step(image, label)

    def _guide(self):
        image, label = self.guide_batch()
        self.guide_images = image, label
        return self.guide_loss_of(image, torch.cat([1 - label, label], 1))

    def _learn(self, logits, direct, through):
        self.found = torch.stack(direct), torch.stack(through)
        self.judge = copy.deepcopy(self.gan.discriminator)
        super()._learn(logits, direct, through)


def both(label):
    return torch.cat([1 - label, label], 1)


def guide_loss(trainer, optimizer, shift, *, through=True):
    """Guide loss after real steps of real optimizers, from scratch, with the logits moved by `shift`.

    With `through` False the generator's step is that of unmoved logits.
    """
    image, label, augmented = trainer.images
    before = copy.deepcopy(trainer.before)
    gan, network = before["gan"], before["network"]
    gan.discriminator = trainer.judge
    logits = list(gan.architecture().values())
    moved = [logit.detach() + row for logit, row in zip(logits, shift, strict=True)]
    for logit, value in zip(logits, moved, strict=True):
        if through:
            logit.data = value
    weights = list(gan.generator_weights().values())
    step = OPTIMIZERS[optimizer](weights)
    step.load_state_dict(before["generator_optimizer"])
    made = gan.generator(both(label))
    loss = trainer.gan_loss.generator(gan.scores(both(label), made), made, image)
    for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
        weight.grad = gradient
    step.step()
    for logit, value in zip(logits, moved, strict=True):
        logit.data = value
    with torch.no_grad():
        generated = gan.generator(both(augmented))
    step = OPTIMIZERS[optimizer](network.parameters())
    step.load_state_dict(before["optimizer"])
    criterion = DiceCELoss(softmax=True)
    loss = criterion(network(image), both(label)) + trainer.generated_weight * criterion(
        network(generated), both(augmented)
    )
    step.zero_grad()
    loss.backward()
    step.step()
    with torch.no_grad():
        return criterion(network(trainer.guide_images[0]), both(trainer.guide_images[1]))


def central_differences(trainer, optimizer, length=1e-4, **options):
    shape = trainer.found[0].shape
    slopes = torch.zeros(shape)
    for position in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        shift = torch.zeros(shape)
        shift[tuple(position)] = length
        up, down = (guide_loss(trainer, optimizer, sign * shift, **options) for sign in (1, -1))
        slopes[tuple(position)] = (up - down) / (2 * length)
    return slopes


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def record(make_trainer, double):
    def make(*args, **options):
        trainer = make_trainer(*args, kind=Recorded, max_epochs=3, **options)
        trainer.run()
        return trainer

    return make


@pytest.mark.parametrize(("optimizer", "dims"), [("SGD", 2), ("AdamW", 2), ("RMSprop", 2), ("SGD", 3)])
def test_the_gradient_of_the_architecture_is_that_of_the_whole_pipeline(record, optimizer, dims):
    trainer = record(optimizer, dims)
    direct, through = trainer.found
    for found, expected in (
        (direct + through, central_differences(trainer, optimizer)),
        (direct, central_differences(trainer, optimizer, through=False)),
    ):
        assert expected.norm() > 1e-7
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert through.norm() > 1e-3 * direct.norm()
