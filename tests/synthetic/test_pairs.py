"""Generated pairs as files: what is written is read back, and a generator that repeats its images is found out."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import Dataset, MetaTensor
from PIL import Image
from torch import nn

from medconstraints.data import CohortDataset
from medconstraints.synthetic import write_pairs
from medconstraints.transforms import reading_transforms


class Painter(nn.Module):
    """An image that is +1 in the foreground, -1 outside; wider channels repeat it."""

    def __init__(self, channels=1):
        super().__init__()
        self.channels, self.gain = channels, nn.Parameter(torch.ones(()))

    def forward(self, mask):
        return (1 - 2 * mask[:, :1]).expand(-1, self.channels, *mask.shape[2:]) * self.gain


def make_items(shape, channels=1, count=3):
    torch.manual_seed(0)
    items = []
    for number in range(count):
        label = torch.zeros(1, *shape)
        label[:, number : number + 3, 2:5] = 1
        affine = torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0]))
        image = MetaTensor(torch.randn(channels, *shape), affine=affine, meta={"filename_or_obj": f"case{number}.png"})
        items.append({"image": image, "label": label, "augmented_label": label.flip(1)})
    return Dataset(items)


@pytest.mark.parametrize(("shape", "channels"), [((8, 6), 1), ((8, 6), 3), ((8, 6, 4), 1), ((8, 6, 4), 2)])
def test_pairs_are_read_back_as_they_were_made(shape, channels, tmp_path):
    data = make_items(shape, channels)
    report = write_pairs(Painter(channels), data, tmp_path / "pairs", num_pairs=5, num_classes=2)
    content = json.loads((tmp_path / "pairs/datalist.json").read_text())
    assert content["synthetic"] is report["synthetic"] is True and report["pairs"] == len(content["training"]) == 5
    assert content["training"][4]["source"] == "case1.png"
    dims = len(shape)
    reading = reading_transforms(num_classes=2, spatial_dims=dims, allow_channels=True)
    dataset = CohortDataset(tmp_path / "pairs/datalist.json", "training", reading)
    for number, item in enumerate(dataset):
        expected = data[number % 3]["augmented_label"]
        assert torch.equal(torch.as_tensor(item["label"]), expected)
        assert item["image"].shape == (channels, *shape)
        assert torch.equal(torch.as_tensor(item["image"])[0] > 0, expected[0] > 0)
    if dims == 3:
        volume = nib.load(tmp_path / "pairs" / content["training"][0]["label"])
        assert np.allclose(volume.header.get_zooms(), (1, 2, 3))
    assert Image.open(tmp_path / "pairs/nearest.png").size == (shape[0] * 4, shape[1] * 2)


class Repeater(nn.Module):
    """Makes one of the training images, whatever the mask."""

    def __init__(self, image):
        super().__init__()
        self.image = nn.Parameter(torch.as_tensor(image)[None].clone())

    def forward(self, mask):
        return self.image


def test_a_generator_that_repeats_an_image_is_found_out(tmp_path):
    data = make_items((8, 6))
    report = write_pairs(Repeater(data[1]["image"]), data, tmp_path / "copy", num_pairs=3, num_classes=2)
    assert {row["nearest"] for row in report["rows"]} == {"case1.png"}
    assert report["nearest_real"] == {"least": 0, "median": 0, "largest": 0}
    assert report["nearest_to_second"] == {"least": 0, "median": 0, "largest": 0}
    reals = [torch.as_tensor(item["image"]) for item in data]
    gaps = [((a - b) ** 2).mean().sqrt() for i, a in enumerate(reals) for j, b in enumerate(reals) if i != j]
    assert report["real_to_real"]["least"] == pytest.approx(float(min(gaps)), abs=1e-4)
    other = write_pairs(Painter(), data, tmp_path / "other", num_pairs=3, num_classes=2)
    assert other["nearest_to_second"]["least"] > 0.8


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (make_items((8, 6), count=1), "dataset: expected at least two items"),
        ([make_items((8, 6))[0], make_items((8, 8))[1]], "dataset: expected images of one shape"),
        (
            [{**item, "label": item["label"] * 0} for item in make_items((8, 6))],
            "case0.png: its mask has no foreground",
        ),
    ],
)
def test_bad_input_is_refused(items, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_pairs(Painter(), Dataset([*items]), tmp_path / "pairs", num_pairs=3, num_classes=2)
    assert not list(tmp_path.rglob("*.json"))


def test_former_pairs_are_not_replaced(tmp_path):
    data = make_items((8, 6))
    write_pairs(Painter(), data, tmp_path, num_pairs=2, num_classes=2)
    with pytest.raises(FileExistsError, match="overwrite"):
        write_pairs(Painter(), data, tmp_path, num_pairs=2, num_classes=2)
    write_pairs(Painter(), data, tmp_path, num_pairs=2, num_classes=2, overwrite=True)
