"""AugmenterReportHandler: the files of what an augmenter learns."""

import json

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medconstraints.augmentation import Augmenter
from medconstraints.handlers import AugmenterReportHandler


@pytest.mark.parametrize("dims", [2, 3])
def test_files_distributions_and_a_resumed_picture(tmp_path, dims):
    augmenter = Augmenter(dims)
    batch = {"image": torch.rand(2, 1, *[12] * dims)}

    def run(handler, epochs, first=0):
        engine = Engine(lambda engine, data: None)
        handler.attach(engine)
        engine.add_event_handler(Events.STARTED, lambda engine: setattr(engine.state, "epoch", first))
        engine.run([batch], max_epochs=epochs)

    handler = AugmenterReportHandler(augmenter, tmp_path, interval=2, draws=3)
    run(handler, 3)
    assert json.loads((tmp_path / "augmenter.json").read_text())["epoch"] == 3
    picture = np.asarray(Image.open(tmp_path / "augmented.png"))
    assert picture.shape == (2 * 12, 4 * 12)  # epochs 1 and 3, one image and three draws
    shown = batch["image"][0, 0] if dims == 2 else batch["image"][0, 0, :, :, 6]
    low, high = batch["image"][0].min(), batch["image"][0].max()
    np.testing.assert_array_equal(picture[:12, :12], ((shown - low) / (high - low) * 255).byte())
    assert np.ptp([picture[:12, 12 * i : 12 * i + 12] for i in (1, 2, 3)], axis=0).max() > 0
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0}).Reload()
    names = {quantity.name for quantity in augmenter.quantities}
    assert set(events.Tags()["histograms"]) == {f"augment/{name}" for name in names}
    spreads = [event.value for name in names for event in events.Scalars(f"augment_spread/{name}")]
    assert len(spreads) == 3 * len(names) and min(spreads) > 0

    resumed = AugmenterReportHandler(augmenter, tmp_path, interval=2, draws=3)
    resumed.load_state_dict(torch.load(_saved(tmp_path, handler), weights_only=True))
    run(resumed, 5, first=4)
    again = np.asarray(Image.open(tmp_path / "augmented.png"))
    assert again.shape == (3 * 12, 4 * 12)
    np.testing.assert_array_equal(again[:24], picture)


def _saved(folder, handler):
    torch.save(handler.state_dict(), folder / "state.pt")
    return folder / "state.pt"
