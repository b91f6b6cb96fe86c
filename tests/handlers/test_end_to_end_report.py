"""EndToEndReportHandler: table, curves, weights and pictures of a generator that learns."""

import csv

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.networks.nets import PatchDiscriminator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medconstraints.handlers import EndToEndReportHandler
from medconstraints.networks import MaskToImage, SearchableGenerator


@pytest.mark.parametrize("taken_apart", [False, True])
@pytest.mark.parametrize(("dims", "channels"), [(2, 1), (2, 3), (3, 1)])
def test_files_of_a_run_and_of_a_resumed_one(tmp_path, dims, channels, taken_apart):
    torch.manual_seed(0)
    generator = SearchableGenerator(dims, 3, channels, channels=(2, 4), strides=(2, 2), kernels=(2, 4), dropout=0.5)
    gan = MaskToImage(generator, PatchDiscriminator(dims, 2, 3 + channels, num_layers_d=1))
    shape = [12, 8, 8][:dims]
    batch = {
        "image": torch.rand(3, channels, *shape),
        "label": torch.randint(0, 3, (3, 1, *shape)).float(),
        "augmented_label": torch.randint(0, 3, (3, 1, *shape)).float(),
    }

    def run(handler, epochs, first=0):
        def step(engine, _):
            engine.state.metrics["generator_loss"] = float(engine.state.epoch)
            if taken_apart:
                engine.state.batch = [{key: value[i] for key, value in batch.items()} for i in range(3)]

        engine = Engine(step)
        handler.attach(engine)
        engine.add_event_handler(Events.STARTED, lambda engine: setattr(engine.state, "epoch", first))
        engine.run([batch], max_epochs=epochs)

    def make():
        return EndToEndReportHandler(gan, tmp_path, num_classes=3, interval=2, rows=2)

    handler, drawn = make(), torch.random.get_rng_state()
    run(handler, 3)
    assert torch.equal(drawn, torch.random.get_rng_state())  # the run draws what it would without pictures
    rows = [*csv.DictReader((tmp_path / "generator.csv").open())]
    assert [row["generator_loss"] for row in rows] == ["1.0", "2.0", "3.0"]
    assert {float(value) for name, value in rows[-1].items() if name.startswith("alpha/")} == {0.5}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert len(events.Tags()["scalars"]) == 4 * 2 and len(events.Scalars("alpha/encoder.0.0/1")) == 3
    assert sorted(path.name for path in (tmp_path / "generated").iterdir()) == ["epoch_0002.png", "epoch_0003.png"]
    picture = np.asarray(Image.open(tmp_path / "generated/epoch_0002.png"))
    assert picture.shape[:2] == (2 * 8, 5 * 12) and (picture.ndim == 3) == (channels == 3)
    label = batch["label"][0, 0] if dims == 2 else batch["label"][0, 0, :, :, 4]
    grey = picture if picture.ndim == 2 else picture[..., 0]
    np.testing.assert_array_equal(grey[:8, :12], (label / 2 * 255).byte().T)
    again = MaskToImage(generator, gan.discriminator)
    again.load_state_dict(torch.load(tmp_path / "gan.pt", weights_only=True))

    torch.save(handler.state_dict(), tmp_path / "state.pt")
    resumed = make()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run(resumed, 4, first=3)
    assert len([*csv.DictReader((tmp_path / "generator.csv").open())]) == 4
    last = np.asarray(Image.open(tmp_path / "generated/epoch_0004.png"))
    np.testing.assert_array_equal(last[:, :12], picture[:, :12])
