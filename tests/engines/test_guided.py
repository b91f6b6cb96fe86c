"""GuidedTrainer: batches that train, batches that guide, and the step that a subclass makes of them."""

import pytest
import torch
from ignite.engine import Events
from monai.data import Dataset
from torch import nn

from medconstraints.engines import GuidedTrainer


class Plain(GuidedTrainer):
    """An ordinary step that also looks at a guide batch."""

    def __init__(self, **options):
        self.seen = []
        super().__init__(**options)

    def guided_step(self, image, label):
        guide, _ = self.guide_batch()
        self.seen.append((image[:, 0, 0, 0].tolist(), guide[:, 0, 0, 0].tolist()))
        output = self.forward(self.parameters(), image)
        loss = self.loss_function(output, label)
        loss.backward()
        return loss, output, label


def items(count=10, first=0):
    return [
        {"image": torch.full((1, 1, 1), float(i)), "label": i % 2, "case": str(i)} for i in range(first, first + count)
    ]


@pytest.fixture
def make_trainer():
    def make(data=None, **options):
        network = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
        optimizer = options.pop("optimizer", torch.optim.SGD(network.parameters(), lr=0.01))
        given = {"device": "cpu", "max_epochs": 3, "batch_size": 3, "loss_function": nn.CrossEntropyLoss()}
        return Plain(
            dataset=Dataset(items() if data is None else data), network=network, optimizer=optimizer, **given | options
        )

    return make


def test_an_image_trains_or_guides_in_an_epoch_and_both_parts_change(make_trainer):
    trainer = make_trainer(guide_fraction=0.3)
    epochs = []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: epochs.append(trainer.seen) or _clear(trainer))
    trainer.run()
    parts = [tuple({i for batch in epoch for i in batch[part]} for part in (0, 1)) for epoch in epochs]
    assert all(not training & guide for training, guide in parts)
    assert len({frozenset(guide) for _, guide in parts}) > 1
    assert [len(epoch) for epoch in epochs] == [2, 2, 2]


def _clear(trainer):
    trainer.seen = []


def test_guide_images_of_their_own(make_trainer):
    trainer = make_trainer(guide_dataset=Dataset(items(4, first=100)), guide_batch_size=4)
    trainer.run()
    assert {i for _, guide in trainer.seen for i in guide} == {100, 101, 102, 103}
    assert {i for batch, _ in trainer.seen for i in batch} == set(range(10))


def test_the_step_is_that_of_an_ordinary_loop(make_trainer):
    trainer = make_trainer(max_norm=0.1)
    twin = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    twin.load_state_dict(trainer.network.state_dict())
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.01)
    trainer.run()
    for values, _ in trainer.seen:
        optimizer.zero_grad()
        image = torch.tensor(values).reshape(-1, 1, 1, 1)
        nn.functional.cross_entropy(twin(image), image.flatten().long() % 2).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        optimizer.step()
    torch.testing.assert_close(trainer.network.state_dict(), twin.state_dict())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"batch_size": 1}, ValueError, "batch_size"),
        ({"guide_batch_size": 1}, ValueError, "guide_batch_size"),
        ({"guide_dataset": Dataset([])}, ValueError, "guide_dataset: expected images, got none"),
        ({"guide_dataset": Dataset(items(3, first=9))}, ValueError, "guide_dataset: .*got 1 of both"),
        ({"guide_fraction": 0.0}, ValueError, "fraction"),
        ({"optimizer": torch.optim.Adagrad(nn.Linear(1, 1).parameters())}, TypeError, "Adagrad"),
    ],
)
def test_what_cannot_guide_is_refused_at_construction(make_trainer, options, error, words):
    with pytest.raises(error, match=words):
        make_trainer(**options)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(make_trainer):
    trainer = make_trainer()
    beside = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([beside], lr=1.0)
    for gradient in ([1.0, float("nan")], [1.0, 2.0]):
        beside.grad = torch.tensor(gradient)
        trainer.step_beside(optimizer)
    assert beside.tolist() == [0.0, -1.0]
    assert trainer.skipped_steps == 1
    trainer.run()
    assert trainer.state.metrics["skipped_steps"] == 1
