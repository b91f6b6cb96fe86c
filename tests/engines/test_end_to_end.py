"""EndToEndTrainer: the gradient that reaches the generator's architecture, and what the steps beside it do."""

import copy
import logging

import pytest
import torch
from ignite.engine import Events
from monai.data import Dataset
from monai.losses import DiceCELoss
from monai.networks.nets import PatchDiscriminator
from torch import nn
from torch.func import functional_call

from medconstraints.engines import EndToEndTrainer, MaskToImageTrainer
from medconstraints.handlers import training_handlers
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
        shown = (
            label.flatten()[torch.randperm(label.numel(), generator=generator)].view_as(label) if shuffled else label
        )
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


@pytest.mark.parametrize(
    ("optimizer", "dims"), [("SGD", 2), ("AdamW", 2), ("RMSprop", 2), pytest.param("SGD", 3, marks=pytest.mark.slow)]
)
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


def test_the_gradient_is_that_of_exact_double_backward(record, monkeypatch):
    plain = {"SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05)}
    monkeypatch.setitem(OPTIMIZERS, "SGD", plain["SGD"])
    trainer = record()
    image, label, augmented = trainer.images
    gan, network = trainer.before["gan"], trainer.before["network"]
    gan.discriminator, criterion = trainer.judge, DiceCELoss(softmax=True)
    weights, logits = gan.generator_weights(), gan.architecture()

    def made(weights, mask):
        return functional_call(gan.generator, {**weights, **logits}, (mask,))

    def stepped(loss, parameters):
        slopes = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        return {name: p - 0.05 * slope for (name, p), slope in zip(parameters.items(), slopes, strict=True)}

    first = made(weights, both(label))
    after = stepped(trainer.gan_loss.generator(gan.scores(both(label), first), first, image), weights)
    parameters = dict(network.named_parameters())
    loss = criterion(network(image), both(label)) + criterion(network(made(after, both(augmented))), both(augmented))
    after = stepped(loss, parameters)
    guide = criterion(functional_call(network, after, (trainer.guide_images[0],)), both(trainer.guide_images[1]))
    expected = torch.stack(torch.autograd.grad(guide, list(logits.values())))
    assert (sum(trainer.found) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("levels", [0, 2, 3])
def test_levels_say_which_terms_reach_the_architecture(record, levels):
    trainer = record(levels=levels)
    moved = max(float(value.detach().abs().max()) for value in trainer.gan.architecture().values())
    assert (moved > 0) == (levels > 0)
    if levels:
        direct, through = (float(term.norm()) for term in trainer.found)
        assert direct > 0 and (through > 0) == (levels == 3)
        assert trainer.state.metrics["direct_term"] > 0
    assert trainer.state.metrics["generator_loss"] > 0


def alphas(trainer):
    return torch.stack([cell.alpha for _, cell in trainer.gan.cells()]).detach()


@pytest.mark.slow
def test_alpha_moves_and_follows_the_guide_labels(make_trainer):
    found = []
    for shuffled in (False, True):
        torch.manual_seed(0)
        gan = make_gan()
        trainer = make_trainer(
            "AdamW",
            gan=gan,
            max_epochs=20,
            guide_dataset=Dataset(make_items(4, seed=1, shuffled=shuffled)),
            architecture_optimizer=torch.optim.Adam(gan.architecture().values(), lr=0.03),
        )
        trainer.run()
        found.append(alphas(trainer))
    assert min((one - 0.5).abs().max() for one in found) > 0.05
    assert (found[0] - found[1]).abs().max() > 0.05


def test_the_warm_up_is_a_training_without_levels(make_trainer):
    """What the levels look ahead at is not left behind, in running statistics neither."""
    weights = []
    for levels, warm_up in ((0, 0), (3, 100), (3, 3)):
        torch.manual_seed(2)
        network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 2, 1))
        trainer = make_trainer(network=network, levels=levels, warm_up=warm_up)
        trainer.run()  # four iterations: the last one learns with a warm-up of 3, after the images were made
        weights.append({**network.state_dict(), **trainer.gan.generator_weights()})
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
        torch.testing.assert_close(value, weights[2][name], msg=name)  # another order of sums


@pytest.mark.parametrize("spoiled", ["generator", "discriminator"])
def test_a_gan_without_finite_losses_stops_and_keeps_the_last_good_files(make_trainer, tmp_path, spoiled):
    trainer = make_trainer(
        max_epochs=3,
        train_handlers=training_handlers(evaluator=None, output_dir=str(tmp_path), seed=0),
    )
    whole = getattr(trainer.gan_loss, spoiled)
    setattr(trainer.gan_loss, spoiled, lambda *args: whole(*args) * (1.0 if trainer.state.epoch < 2 else float("nan")))
    with pytest.raises(RuntimeError, match=f"{spoiled}_loss.* in epoch 2; lower the learning rates"):
        trainer.run()
    assert torch.load(tmp_path / "last.pt", weights_only=True)["trainer"]["epoch"] == 1
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state.values())


def test_an_inactive_level_is_told_with_its_number(make_trainer, caplog):
    gan = make_gan()
    slow = torch.optim.SGD(gan.generator_weights().values(), lr=1e-9)
    with caplog.at_level(logging.WARNING):
        make_trainer(gan=gan, generator_optimizer=slow).run()
    [message] = [line for line in caplog.messages if "level is inactive" in line]
    assert "through_term" in message and "direct_term" not in message and "1.0e-08" in message


NO_FOREGROUND = [{**item, "augmented_label": torch.zeros(1, 8, 8)} for item in make_items()]
SIZES = [{**item, "label": torch.zeros(1, 6, 8)} for item in make_items()]
CLASSES = [{**item, "label": item["label"] * 2} for item in make_items()]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"guide_dataset": Dataset(make_items(1, seed=1))}, ValueError, "at least two images of each part"),
        ({"dataset": Dataset(NO_FOREGROUND)}, RuntimeError, "label: no mask of epoch 1 has foreground"),
        ({"dataset": Dataset(SIZES)}, ValueError, r"label: expected the size of its image, \(8, 8\), got \(6, 8\)"),
        ({"dataset": Dataset(CLASSES)}, ValueError, r"label: expected class numbers 0..1, got 0..2"),
        ({"num_classes": 3}, ValueError, "num_classes: expected 2, the channels that the generator takes, got 3"),
        ({"levels": 1}, ValueError, "levels: expected one of 0, 2, 3, got 1"),
        ({"generated_weight": 0}, ValueError, "generated_weight"),
        ({"generator_optimizer": torch.optim.Adagrad([nn.Parameter(torch.zeros(1))])}, TypeError, "Adagrad"),
    ],
)
def test_bad_input_is_refused(make_trainer, options, error, message):
    with pytest.raises(error, match=message):
        make_trainer(**options).run()


def test_a_batch_without_augmented_labels_says_what_to_do(make_trainer):
    items = [{key: value for key, value in item.items() if key != "augmented_label"} for item in make_items()]
    with pytest.raises(KeyError, match="augmented_label: expected this key in the batch"):
        make_trainer(dataset=Dataset(items)).run()


def test_a_gan_is_trained_alone(make_trainer):
    gan = make_gan()
    before = copy.deepcopy(gan.state_dict())
    losses = []
    trainer = MaskToImageTrainer(
        device="cpu",
        max_epochs=15,
        network=gan,
        optimizer=torch.optim.Adam(gan.generator_weights().values(), lr=0.01),
        discriminator_optimizer=torch.optim.Adam(gan.discriminator.parameters(), lr=1e-3),
        loss_function=MaskToImageLoss(),
        num_classes=2,
        dataset=Dataset(make_items()),
        batch_size=4,
    )
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda engine: losses.append(engine.state.metrics["generator_loss"])
    )
    trainer.run()
    assert losses[-1] < 0.7 * losses[0]
    moved = {name for name, value in gan.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "logits" not in name}
