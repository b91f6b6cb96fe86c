"""LookaheadTrainer: cycles on a toy, what is frozen, what comes back, and what a kill leaves."""

import contextlib
import copy
import functools
import itertools

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import Dataset
from monai.handlers import MeanIoUHandler, from_engine
from monai.networks.nets import PatchDiscriminator
from torch import nn

from medconstraints.engines import LookaheadTrainer, ValidationEvaluator
from medconstraints.formulations import QuadraticPenalty
from medconstraints.handlers import training_handlers
from medconstraints.lookahead import Lookahead, LookaheadModels
from medconstraints.losses import ConstraintLoss
from medconstraints.networks import ClassSplitDiscriminator
from medconstraints.statistics import soft_outside_extent


def make_items(count, seed):
    """Rings (1) around discs (2) in noise, 32 x 32."""
    random = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(32)] * 2, indexing="ij"))
    items = []
    for number in range(count):
        centre, radius = random.uniform(11, 21, (2, 1, 1)), random.uniform(6, 9)
        distance = np.linalg.norm(grid - centre, axis=0)
        label = (distance < radius).astype(np.float32) + (distance < radius / 2)
        image = np.choose(label.astype(int), [0.0, 1.0, 0.4]) + random.normal(0, 0.45, label.shape)
        items.append(
            {
                "image": torch.tensor(image[None], dtype=torch.float32),
                "label": torch.tensor(label[None], dtype=torch.float32),
                "case": f"{seed}/{number}",
            }
        )
    return items


def make_network():
    torch.manual_seed(0)
    widths = [1, 12, 12, 12]
    layers = [
        layer for one, two in itertools.pairwise(widths) for layer in (nn.Conv2d(one, two, 5, padding=2), nn.SiLU())
    ]
    return nn.Sequential(*layers, nn.Conv2d(12, 3, 1))


@pytest.fixture(scope="module")
def trained():
    """A network after 15 steps of cross-entropy on the toy."""
    network, items = make_network(), make_items(16, 0)
    images, labels = (torch.stack([item[key] for item in items]) for key in ("image", "label"))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(15):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels[:, 0].long()).backward()
        optimizer.step()
    return network


def evaluator_of(network, items):
    metric = MeanIoUHandler(include_background=False, output_transform=from_engine(["pred", "label"]))
    return ValidationEvaluator(
        device="cpu",
        network=network,
        num_classes=3,
        dataset=Dataset(items),
        batch_size=8,
        key_val_metric={"val_mean_iou": metric},
    )


@pytest.fixture
def make_trainer(trained):
    def make(*, noise=False, search=None, lr=1e-3, discriminator=None, holdout=None, confirm=None, **options):
        torch.manual_seed(3)
        network = copy.deepcopy(trained)
        judge = discriminator or ClassSplitDiscriminator(PatchDiscriminator(2, 8, 6, num_layers_d=1, norm="instance"))
        bounds = {"beta_lower": 0.02, "beta_upper": 0.002, "patience": 3, "max_cycles": 2, **(search or {})}
        names = ["adversary", "noise"] if noise else ["adversary"]
        models = LookaheadModels({name: Lookahead(**bounds) for name in names})
        given = {
            "device": "cpu",
            "max_epochs": 8,
            "network": network,
            "optimizer": torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9),
            "discriminator": judge,
            "discriminator_optimizer": torch.optim.Adam(judge.parameters(), lr=2e-3),
            "models": models,
            "evaluator": evaluator_of(network, holdout or make_items(8, 1)),
            "confirm_evaluator": evaluator_of(network, confirm or make_items(8, 2)),
            "num_classes": 3,
            "dataset": Dataset(make_items(16, 0)),
            "batch_size": 4,
            "eval_every": 2,
            "discriminator_steps": 30,
        }
        return LookaheadTrainer(**given | options)

    return make


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_without_an_accepted_peak_the_start_comes_back_bit_by_bit(make_trainer, trained):
    trainer = make_trainer(search={"beta_upper": 0.9, "beta_lower": 0.9})
    trainer.run()
    search = trainer.models.searches["adversary"]
    assert search.start == "g0" and search.finished and trainer.models.running is None
    assert same(trainer.models.best("adversary"), trained.state_dict())
    assert same(trainer.network.state_dict(), trained.state_dict())
    assert trainer.state.epoch == 6  # two cycles of three evaluations, of a budget of eight
    events = [row["event"] for row in trainer.models.rows]
    assert events == ["start", "", "", "end", "", "", "end"]


@pytest.mark.slow
def test_the_discriminator_is_frozen_within_a_cycle_and_learns_between(make_trainer):
    seen = []
    trainer = make_trainer(search={"beta_upper": 0.9, "beta_lower": 0.9})

    def look(engine):
        weights = torch.cat([value.flatten() for value in trainer.discriminator.state_dict().values()])
        seen.append((trainer.models.searches["adversary"].cycle, weights.clone()))

    trainer.add_event_handler(Events.ITERATION_STARTED, look)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, look)
    trainer.run()
    cycles = {cycle: [weights for number, weights in seen if number == cycle] for cycle in (0, 1)}
    for weights in cycles.values():
        assert len(weights) == 12 and all(torch.equal(weights[0], other) for other in weights)
    assert not torch.equal(cycles[0][0], cycles[1][0])


def test_an_accepted_peak_is_better_on_the_confirm_part_and_starts_the_next_cycle(make_trainer, monkeypatch):
    """A peak is faked by teaching in place of judging: updates of cross-entropy, which a good start profits from."""
    trainer = make_trainer(
        lr=0.02,
        loss_weight=1.0,
        adversarial_weight=0.0,
        max_epochs=6,
        eval_every=10,
        search={"beta_lower": 0.5, "patience": 3},
        loss_function=lambda output, label: nn.functional.cross_entropy(output, label[:, 0].long()),
    )
    trainer.run()
    models, search = trainer.models, trainer.models.searches["adversary"]
    assert search.start != "g0"
    scores = models.scores["adversary"]
    assert np.mean(scores[search.start]["confirm"]) > np.mean(scores["g0"]["confirm"])
    assert np.mean(scores[search.start]["holdout"]) == pytest.approx(search.start_score)
    assert set(models.weights["adversary"]) == {"g0", search.start, *search.buffer}
    assert same(trainer.network.state_dict(), models.best("adversary"))


def test_a_peak_of_the_holdout_alone_is_not_accepted(make_trainer, trained):
    """The confirm part's labels are those of other images: nothing that is learned helps there."""
    wrong = make_items(8, 2)
    labels = [item["label"] for item in wrong]
    wrong = [{**item, "label": labels[number - 1].flip(1)} for number, item in enumerate(wrong)]
    trainer = make_trainer(
        lr=0.02,
        loss_weight=1.0,
        adversarial_weight=0.0,
        confirm=wrong,
        eval_every=10,
        search={"beta_lower": 0.5, "max_cycles": 1},
        loss_function=lambda output, label: nn.functional.cross_entropy(output, label[:, 0].long()),
    )
    trainer.run()
    assert trainer.models.rows[-1]["event"] == "rejected"
    assert trainer.models.searches["adversary"].start == "g0"
    assert same(trainer.models.best("adversary"), trained.state_dict())


@pytest.mark.slow
def test_the_control_takes_as_many_evaluations_with_updates_of_the_same_length(make_trainer, trained):
    trainer = make_trainer(noise=True, max_epochs=40, search={"beta_upper": 0.9, "beta_lower": 0.9})
    lengths, starts = [], {}

    def before(engine):
        starts["weights"] = [value.detach().clone() for value in trainer.network.parameters()]

    def after(engine):
        moved = [
            float((new - old).norm()) for new, old in zip(trainer.network.parameters(), starts["weights"], strict=True)
        ]
        lengths.append((trainer.models.running, moved))

    trainer.add_event_handler(Events.ITERATION_STARTED, before)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, after)
    trainer.run()
    counts = {name: sum(row["search"] == name for row in trainer.models.rows) for name in ("adversary", "noise")}
    assert counts["adversary"] == counts["noise"] == 7
    noise = [moved for name, moved in lengths if name == "noise"]
    assert np.allclose(noise[0], trainer.models.norms, rtol=1e-3)
    assert same(trainer.models.weights["noise"]["g0"]["network"], trained.state_dict())


@pytest.mark.parametrize("stop", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(9, marks=pytest.mark.slow)])
def test_a_killed_search_goes_on_with_the_same_numbers(make_trainer, tmp_path, stop):
    """In the first cycle, in a later one, and in the control."""

    def run(folder, until=None):
        trainer = make_trainer(noise=True, max_epochs=16, search={"beta_upper": 0.9})
        handlers = training_handlers(
            evaluator=None,
            output_dir=str(folder),
            seed=0,
            save_latest=False,
            objects={
                "models": trainer.models,
                "discriminator": trainer.discriminator,
                "discriminator_optimizer": trainer.discriminator_optimizer,
            },
        )
        handlers.attach(trainer)
        if until is not None:

            def kill(engine):
                if engine.state.epoch == until:
                    raise InterruptedError

            trainer.add_event_handler(Events.EPOCH_STARTED, kill)
        with contextlib.suppress(InterruptedError):
            trainer.run()
        return trainer

    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", until=stop + 1)
    cut = run(tmp_path / "cut")
    assert cut.models.rows == whole.models.rows
    assert same(cut.discriminator.state_dict(), whole.discriminator.state_dict())
    assert not (tmp_path / "cut/model.pt").exists()


@pytest.mark.slow
def test_alternating_training_falls_where_lookahead_stays(make_trainer):
    options = {"lr": 0.05, "max_epochs": 25, "eval_every": 4}
    plain = make_trainer(alternating=True, **options)
    plain.run()
    last = plain.models.rows[-1]["mean_iou"]
    careful = make_trainer(search={"patience": 5, "max_cycles": 5}, **options)
    careful.run()
    first = careful.models.rows[0]["mean_iou"]
    assert last < 0.5 < first <= careful.models.searches["adversary"].start_score


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"maps": "soft", "temperature": 20.0, "saturating": True}, {"loss_weight": 0.5}])
def test_the_papers_maps_and_the_hybrid_loss(make_trainer, options):
    trainer = make_trainer(
        max_epochs=2,
        loss_function=lambda output, label: nn.functional.cross_entropy(output, label[:, 0].long()),
        **options,
    )
    trainer.run()
    assert np.isfinite(trainer.models.rows[-1]["mean_iou"])


def test_spectral_normalisation_bounds_the_weights():
    judge = ClassSplitDiscriminator(PatchDiscriminator(2, 4, 6, num_layers_d=1), spectral=True)
    for _ in range(20):
        judge(torch.randn(2, 1, 16, 16), torch.rand(2, 3, 16, 16))
    for module in judge.modules():
        if isinstance(module, nn.Conv2d):
            assert float(torch.linalg.matrix_norm(module.weight.detach().flatten(1), 2)) == pytest.approx(1, abs=0.1)


ABSENT = [{**item, "label": item["label"].clamp(max=1)} for item in make_items(8, 1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"holdout": make_items(3, 1)}, "holdout: expected at least 5 patients"),
        ({"confirm": make_items(3, 2)}, "confirm: expected at least 5 patients"),
        ({"holdout": ABSENT}, r"holdout: expected .* each class in one of them, .* none with class \[2\]"),
        ({"confirm": make_items(8, 1)}, "confirm: expected patients that are not in holdout too, got 8 of both"),
        ({"holdout": make_items(8, 0)}, "holdout: expected patients that are not in training too, got 8 of both"),
        ({"adversarial_weight": 0.0}, "adversarial_weight, loss_weight: expected one above 0"),
        ({"alternating": True, "noise": True}, "alternating: has no cycles and no control"),
        ({"search": {"buffer_size": 0}}, "buffer_size"),
        ({"search": {"beta_upper": 0.0}}, "beta_upper"),
    ],
)
def test_bad_input_is_named(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**options).run()


class Judge(nn.Module):
    """Scores by one number: real maps above, predicted ones below, or the other way round."""

    def __init__(self, answer):
        super().__init__()
        self.weight, self.answer = nn.Parameter(torch.zeros(1)), answer

    def forward(self, image, maps):
        return self.answer(image, maps) + 0 * (self.weight + maps.flatten(1).sum(1))


def test_a_discriminator_that_tells_all_apart_is_reported_and_training_goes_on(make_trainer, caplog):
    """Real maps have straight borders only here: it looks at the label itself."""
    items = make_items(16, 0) + make_items(8, 1)
    known = [nn.functional.one_hot(item["label"][0].long(), 3).movedim(-1, 0).float() for item in items]

    def answer(image, maps):
        return torch.tensor([any(torch.equal(one, other) for other in known) * 2.0 - 1 for one in maps])

    with caplog.at_level("WARNING"):
        trainer = make_trainer(discriminator=Judge(answer), mirror=False, max_epochs=3)
        trainer.run()
    assert "tells all label maps apart" in caplog.text
    assert trainer.models.accuracy == 1 and trainer.models.holdout_accuracy == 1 and trainer.state.epoch == 3


@pytest.mark.slow
def test_a_discriminator_that_gets_no_better_on_the_hold_out_is_stopped_and_its_best_weights_come_back(make_trainer):
    trainer = make_trainer(discriminator_steps=400, discriminator_accuracy=1.0, discriminator_patience=2)
    accuracies, seen = iter([0.6, 0.7, 0.7, 0.65, 0.9]), []

    def check(weights):
        seen.append(copy.deepcopy(trainer.discriminator.state_dict()))
        return next(accuracies)

    trainer._holdout_accuracy = check
    trainer.models.weights["adversary"]["g0"] = trainer._snapshot()
    trainer.models.searches["adversary"].begin(0.5)
    trainer._train_discriminator()
    assert len(seen) == 4 and trainer.models.holdout_accuracy == 0.7
    assert same(trainer.discriminator.state_dict(), seen[1]) and not same(seen[1], seen[3])


def test_the_hold_out_accuracy_is_that_of_real_and_predicted_maps(make_trainer):
    trainer = make_trainer(discriminator=Judge(lambda image, maps: torch.ones(len(maps))))
    weights = [trainer.network.state_dict()] * 2
    assert trainer._holdout_accuracy(weights) == 0.5  # all real ones are right, and none of the predicted
    trainer.discriminator.answer = lambda image, maps: -torch.ones(len(maps))
    assert trainer._holdout_accuracy(weights) == 0.5


def test_mirrored_maps_stay_with_their_images(make_trainer):
    trainer, seen = make_trainer(), []
    trainer.discriminator.register_forward_pre_hook(lambda module, given: seen.append(given))
    image = torch.rand(2, 1, 32, 32)
    for _ in range(16):
        trainer._judge_batch(image, (image > 0.5).float(), (image > 0.7).long())
    shown = {tuple(given[0].flatten().tolist()) for given in seen}
    assert len(shown) == 4  # no axis, each, and both
    for (first, real), (second, fake) in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(first, second)
        assert torch.equal(real[:, 1:2], (first > 0.5).float()) and torch.equal(fake[:, 1:2], (first > 0.7).float())


def test_a_loss_of_the_discriminator_that_is_not_finite_stops_the_run(make_trainer):
    trainer = make_trainer(discriminator=Judge(lambda image, maps: torch.full((len(maps),), torch.nan)))
    with pytest.raises(RuntimeError, match="discriminator: its loss is nan"):
        trainer.run()


def test_constraints_in_place_of_the_adversary_train_no_discriminator(make_trainer):
    loss = ConstraintLoss(
        functools.partial(soft_outside_extent, pairs=[[2, 1]], along_lines=True),
        QuadraticPenalty(),
        softmax=True,
        normalization="none",
    )
    items = make_items(16, 0)
    for item in items:
        item["bounds"] = torch.tensor([[[0.0, 0.02], [0.0, 0.02]]])
    trainer = make_trainer(
        loss_function=loss, loss_weight=1.0, adversarial_weight=0.0, dataset=Dataset(items), noise=True
    )
    before = copy.deepcopy(trainer.discriminator.state_dict())
    trainer.run()
    assert same(before, trainer.discriminator.state_dict())
    assert {row["search"] for row in trainer.models.rows} == {"adversary", "noise"}
    assert loss.last is not None
