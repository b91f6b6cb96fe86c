"""DeepCut: rounds of labels within boxes, weights drawn anew, and a kill that leaves no trace."""

import pytest
import torch
from ignite.engine import Events
from monai.data import Dataset
from torch import nn

from medconstraints.engines import BoxProposals, RelabelTrainer
from medconstraints.handlers import training_handlers
from medconstraints.losses import PartialCrossEntropyLoss


def make_items(count=4):
    """Bright discs in loose boxes."""
    grid = torch.stack(torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij"))
    items = []
    for index in range(count):
        centre = torch.tensor([6.0 + index % 3, 7.0 + index % 2]).view(2, 1, 1)
        label = (grid - centre).norm(dim=0) < 4
        filled = torch.zeros(1, 16, 16)
        filled[:, 1:13, 2:14] = 1
        image = (label.float() + 0.1 * torch.randn(16, 16))[None]
        items.append({"image": image, "filled": filled, "index": index, "label": label})
    return items


def make_trainer(folder, *, items=None, seed=0, **options):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 3, padding=1))
    items = make_items() if items is None else items
    proposals = BoxProposals(num_classes=2, crf={"sigma": 3.0, "intensity_sigma": 0.2})
    return RelabelTrainer(
        proposals=proposals,
        proposal_dataset=Dataset(items),
        every=2,
        device="cpu",
        max_epochs=5,
        network=network,
        optimizer=torch.optim.Adam(network.parameters(), lr=0.02),
        loss_function=PartialCrossEntropyLoss(),
        dataset=Dataset(items, transform=proposals),
        batch_size=2,
        train_handlers=training_handlers(
            evaluator=None, output_dir=str(folder), seed=3, objects={"proposals": proposals}
        ),
        **options,
    )


def test_the_first_round_has_the_filled_boxes_and_later_ones_better_labels(tmp_path):
    trainer, seen = make_trainer(tmp_path), []

    def look(engine):
        seen.append([engine.proposals(item)["weak_label"].clone() for item in engine.proposal_dataset])

    trainer.add_event_handler(Events.EPOCH_STARTED, look)
    trainer.run()
    items = list(trainer.proposal_dataset)
    assert all(torch.equal(one, item["filled"]) for labels in seen[:2] for one, item in zip(labels, items, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(seen[2], seen[3], strict=True))  # of one round
    assert any(not torch.equal(one, other) for one, other in zip(seen[3], seen[4], strict=True))
    wrong = []
    for labels in (seen[0], seen[2], seen[4]):
        pairs = list(zip(labels, items, strict=True))
        assert not any((one[item["filled"] == 0]).any() for one, item in pairs)
        wrong.append(sum(int((one[0] != item["label"]).sum()) for one, item in pairs))
    assert wrong[1] < wrong[0] and wrong[2] < wrong[0]


def test_each_round_begins_with_the_first_weights_and_the_optimizer_forgets(tmp_path):
    trainer, seen = make_trainer(tmp_path), {}

    def look(engine):
        seen[engine.state.epoch] = (engine.network[0].weight.detach().clone(), len(engine.optimizer.state))

    trainer.add_event_handler(Events.EPOCH_STARTED, look)
    trainer.run()
    assert [count for _, count in seen.values()] == [0, 4, 0, 4, 0]
    assert torch.equal(seen[1][0], seen[3][0]) and torch.equal(seen[1][0], seen[5][0])
    assert not torch.equal(seen[2][0], seen[3][0])


def test_a_run_that_is_cut_off_goes_on_the_same(tmp_path):
    torch.manual_seed(0)
    items = make_items()
    whole = make_trainer(tmp_path / "whole", items=items)
    whole.run()

    def stop(engine):
        if engine.state.epoch == 5:
            raise InterruptedError

    cut = make_trainer(tmp_path / "cut", items=items)
    cut.add_event_handler(Events.ITERATION_COMPLETED, stop)
    with pytest.raises(InterruptedError):
        cut.run()
    again = make_trainer(tmp_path / "cut", items=items)
    again.run()
    torch.testing.assert_close(again.network.state_dict(), whole.network.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(again.proposals.state_dict(), whole.proposals.state_dict())


def test_classes_stay_in_their_own_boxes():
    filled = torch.zeros(8, 8)
    filled[:4, :4], filled[4:, 4:] = 1, 2
    proposals = BoxProposals(num_classes=3, crf={"iterations": 0})
    found = proposals.propose(torch.randn(3, 8, 8), torch.rand(1, 8, 8), filled)
    assert not ((found > 0) & (found != filled)).any() and {*found.unique().tolist()} == {0, 1, 2}


def test_the_field_is_in_millimetres_where_the_image_tells():
    filled, logits, image = torch.ones(8, 8), torch.randn(2, 8, 8), torch.rand(1, 8, 8)
    proposals = BoxProposals(num_classes=2, crf={"sigma": 3.0, "spatial_sigma": 1.0})
    found = [proposals.propose(logits, image, filled, spacing_mm=step) for step in (None, [1.0, 1.0], [9.0, 9.0])]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("whole", [0, 1])
def test_images_without_a_box_and_boxes_that_cover_the_image(whole, tmp_path):
    items = make_items()
    items[0]["filled"] = torch.full((1, 16, 16), float(whole))
    trainer = make_trainer(tmp_path, items=items)
    trainer.run()
    assert trainer.proposals.maps[0].any() or not whole


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="every"):
        make_trainer(tmp_path).__class__(
            proposals=BoxProposals(num_classes=2), proposal_dataset=[], every=0, device="cpu", max_epochs=1
        )
    with pytest.raises(ValueError, match="num_classes"):
        BoxProposals(num_classes=1)
