"""What SAFLEX made of samples, as table, picture, metrics and warning."""

import csv

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.engines import IterationEvents
from PIL import Image

from medconstraints.handlers import SaflexReportHandler
from medconstraints.saflex import Refined, RefinedBatch


def batch_of(cases, given, label, weight, gain, shape=(1, 6, 5)):
    """Samples of two classes; `given` and `label` are class numbers."""
    soft = torch.full((len(cases), 2), 0.1)
    soft[range(len(cases)), label] = 0.9
    one_hot = torch.eye(2)[given]
    refined = Refined(soft, torch.tensor(weight), torch.tensor(gain))
    return RefinedBatch(cases, torch.randn(len(cases), *shape), one_hot, refined)


@pytest.fixture
def run(tmp_path):
    """Epochs of batches through an engine with the handler; the metrics of the last one."""

    def through(epochs, **options):
        waiting = []

        def iteration(engine, batch):
            engine.last_refined = waiting.pop(0)
            engine.fire_event(IterationEvents.BACKWARD_COMPLETED)

        engine = Engine(iteration)
        engine.register_events(*IterationEvents)
        SaflexReportHandler(tmp_path / "run", **options).attach(engine)
        waiting += [batch for epoch in epochs for batch in epoch]
        engine.run([None] * len(epochs[0]), max_epochs=len(epochs))
        return engine.state.metrics

    return through


FIRST = batch_of(["a", "b", "c"], [0, 1, 1], [0, 0, 1], [1.5, 1.5, 0.0], [0.2, 0.7, -0.4])
SECOND = batch_of(["d", "e"], [0, 0], [0, 0], [1.0, 1.0], [0.1, 0.3])


def test_table_picture_and_metrics(run, tmp_path):
    metrics = run([[SECOND, SECOND], [FIRST, SECOND]])
    assert metrics == pytest.approx({"saflex_kept": 4 / 5, "saflex_relabelled": 1 / 5})
    with (tmp_path / "run" / "saflex.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == ["a", "b", "c", "d", "e"] and {row["epoch"] for row in rows} == {"2"}
    assert rows[1] == {
        "epoch": "2",
        "case": "b",
        "label": "1",
        "new_label": "0",
        "probability": "0.9",
        "weight": "1.5",
        "gain": "0.7",
    }
    picture = np.asarray(Image.open(tmp_path / "run" / "saflex.png"))
    assert picture.shape == (2 * (96 + 36), 96) and picture.std() > 10  # one dropped above one relabelled


def test_a_class_that_loses_its_weight_is_warned_of(run, caplog):
    weights = [1.0] * 2 + [0.0] * 9 + [1.0]
    lost = batch_of([str(n) for n in range(12)], [0] * 2 + [1] * 10, [0] * 2 + [1] * 10, weights, [0.1] * 12)
    run([[lost]])
    assert "of class 1 10 % of the augmented samples are left" in caplog.text and "class 0" not in caplog.text


def test_volumes_and_regions(run, tmp_path):
    """A label for the region of each class; of a volume the middle slice is shown."""
    label = torch.tensor([[[0.9, 0.1, 0.0], [0.0, 0.2, 0.8], [0.0, 0.0, 1.0]]])
    refined = Refined(label, torch.tensor([0.0]), torch.tensor([-0.5]))
    given = torch.tensor([[0.7, 0.3, 0.0]])  # class 2 is absent
    metrics = run([[RefinedBatch(["v"], torch.randn(1, 1, 6, 5, 4), given, refined)]])
    assert metrics == pytest.approx({"saflex_kept": 0.0, "saflex_relabelled": 0.5})
    with (tmp_path / "run" / "saflex.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["label"], row["new_label"], row["probability"]) == ("0 1", "0 2", "0.8")
    assert (tmp_path / "run" / "saflex.png").exists()


def test_nothing_to_tell(run, tmp_path):
    """The control refines nothing."""
    assert run([[None, None]]) == {} and not (tmp_path / "run").exists()
