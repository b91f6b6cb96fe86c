"""Slices: in place, beside their labels, held once, and batched by volume in an order that a resumed run repeats."""

import json
import logging

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import DataLoader, MetaTensor
from monai.data.utils import set_rnd
from monai.transforms import CopyItemsd, Lambdad, RandFlipd, RandGaussianNoised

from medconstraints.data.slices import SliceDataset, VolumeBatchSampler
from medconstraints.handlers import EpochSeedHandler
from medconstraints.transforms import LoadVolumed

SHAPES = [(6, 5, 4), (7, 6, 3), (4, 8, 9)]


def entry(number, shape, **more):
    """A volume whose voxels all differ, and a label that is a function of them."""
    image = torch.arange(float(np.prod(shape))).reshape(1, *shape) + 10_000 * number
    return {"image": torch.cat([image, -image]), "label": (image % 7).to(torch.uint8), **more}


@pytest.fixture
def volumes():
    return [entry(number, shape, case=f"case {number}") for number, shape in enumerate(SHAPES)]


@pytest.mark.parametrize("slice_axis", [0, 1, 2])
def test_slices_put_together_are_the_volumes(volumes, slice_axis):
    dataset = SliceDataset(volumes, None, slice_axis=slice_axis)
    assert len(dataset) == sum(shape[slice_axis] for shape in SHAPES)
    assert dataset.num_volumes == 3
    for number, (volume, shape) in enumerate(zip(volumes, SHAPES, strict=True)):
        items = [dataset[i] for i in dataset.slices_of_volume[number]]
        assert [item["slice"] for item in items] == list(range(shape[slice_axis]))
        assert {item["volume"] for item in items} == {number} and {item["case"] for item in items} == {f"case {number}"}
        for key in ("image", "label"):
            whole = torch.stack([item[key] for item in items], dim=slice_axis + 1)
            assert whole.dtype == volume[key].dtype
            torch.testing.assert_close(whole, volume[key], rtol=0, atol=0)
    assert [dataset[i]["index"] for i in range(len(dataset))] == list(range(len(dataset)))
    assert dataset[-1]["index"] == len(dataset) - 1
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_image_and_label_stay_aligned_under_random_flips(volumes):
    flips = RandFlipd(["image", "label"], prob=0.5, spatial_axis=0)
    dataset = SliceDataset(volumes, None, flips)
    flipped = 0
    for plain in SliceDataset(volumes, None):
        item = dataset[plain["index"]]
        np.testing.assert_array_equal(np.asarray(item["label"]), np.asarray(item["image"][:1]) % 7)
        flipped += not np.array_equal(item["image"], plain["image"])
    assert 0 < flipped < len(dataset)


def test_real_frame(data_root):
    case = json.loads((data_root / "acdc.json").read_text())["training"][0]
    keys = ("image", "label", "scribble")
    paths = {key: str(data_root / case[key]) for key in keys}
    dataset = SliceDataset([{**case, **paths}], LoadVolumed(keys, dtype=None))
    stored = {key: np.asarray(nib.load(path).dataobj) for key, path in paths.items()}
    assert len(dataset) == stored["image"].shape[2] > 5
    for key in keys:
        np.testing.assert_array_equal(np.stack([item[key][0] for item in dataset], -1), stored[key])
        assert not any(isinstance(item[key], MetaTensor) for item in dataset)
    batch = next(iter(DataLoader(dataset, batch_sampler=VolumeBatchSampler(dataset))))
    assert batch["image"].shape == (len(dataset), 1, *stored["image"].shape[:2])
    assert batch["patient"] == [case["patient"]] * len(dataset)
    seen = (batch["scribble"] != 4) & (batch["scribble"] != 0)
    assert (batch["scribble"] == batch["label"])[seen].float().mean() > 0.95, "scribbles lie on their organs"


def test_volume_transform_runs_once_and_is_forgotten(volumes):
    calls = []
    dataset = SliceDataset(volumes, lambda item: calls.append(item["case"]) or item)
    for _ in range(2):
        list(dataset)
    assert calls == ["case 0", "case 1", "case 2"]


def test_lists_of_transforms(volumes):
    double, add = Lambdad("image", lambda x: 2 * x), Lambdad("image", lambda x: x + 1)
    dataset = SliceDataset(volumes, [double, add], [double])
    torch.testing.assert_close(dataset[1]["image"], 2 * (2 * volumes[0]["image"][..., 1] + 1))


def test_entries_that_collate_go_with_each_slice(caplog):
    bounds = torch.tensor([[[0.0, torch.inf]], [[3.0, 9.0]]])
    others = {
        "patient": "p7",
        "size": 3,
        "weight": 0.5,
        "is_labelled": True,
        "bounds": bounds,
        "spacing_mm": np.array([1.0, 2.0]),
        "gain": np.float32(2),
        "scribble": "scribble.nii.gz",
        "history": [1, 2],
        "nothing": None,
        "names": np.array(["a", "b"]),
        "distance": torch.zeros(2, 16, 16, 16),
    }
    with caplog.at_level(logging.WARNING):
        dataset = SliceDataset([entry(0, (4, 4, 3), **others)], None)
    assert "left out of the slices: ['distance']; name them in keys" in caplog.text
    batch = next(iter(DataLoader(dataset, batch_size=3)))
    expected = {"patient", "size", "weight", "is_labelled", "bounds", "spacing_mm", "gain", "scribble"}
    assert set(batch) == expected | {"image", "label", "index", "volume", "slice"}
    assert batch["patient"] == ["p7"] * 3 and batch["scribble"] == ["scribble.nii.gz"] * 3
    torch.testing.assert_close(batch["bounds"], bounds.expand(3, -1, -1, -1))
    assert batch["spacing_mm"].tolist() == [[1.0, 2.0]] * 3
    assert batch["index"].dtype == torch.int64 and batch["slice"].tolist() == [0, 1, 2]
    assert batch["gain"].tolist() == [2.0] * 3 and batch["is_labelled"].tolist() == [True] * 3


def test_meta_tensors_and_arrays_become_plain_tensors():
    array = np.arange(24, dtype=np.int16).reshape(1, 2, 3, 4)
    both = {"image": MetaTensor(array, affine=torch.eye(4)), "label": array[:, ::-1], "start": MetaTensor([1, 2])}
    item = SliceDataset([both], None)[3]
    assert {type(item[key]) for key in both} == {torch.Tensor}
    assert item["label"].tolist() == array[:, ::-1, :, 3].tolist() and item["label"].dtype == torch.int16


def test_slices_are_held_once_and_not_changed_from_outside(volumes):
    def spoil(item):
        item["image"].zero_()
        item["bounds"].zero_()
        return item

    volumes = [volume | {"bounds": torch.ones(2)} for volume in volumes]
    dataset = SliceDataset(volumes, None, spoil)
    held = [tensor.data_ptr() for slices in dataset._slices for tensor in slices.values()]
    for _ in range(2):
        assert all(item["image"].abs().sum() == 0 for item in dataset)
    assert [tensor.data_ptr() for slices in dataset._slices for tensor in slices.values()] == held
    size = sum(tensor.untyped_storage().nbytes() for slices in dataset._slices for tensor in slices.values())
    assert size == sum(volume[key].nbytes for volume in volumes for key in ("image", "label"))
    dataset.transform = lambda item: item
    torch.testing.assert_close(dataset[0]["image"], volumes[0]["image"][..., 0])
    assert dataset[0]["bounds"].tolist() == [1, 1]


def test_set_rnd_reaches_the_random_transform(volumes):
    dataset = SliceDataset(volumes, None, [RandGaussianNoised("image", prob=1.0)])
    draws = []
    for seed in (3, 3, 4):
        assert set_rnd(dataset, seed=seed) == seed + 1, "one random transform found"
        draws.append(torch.stack([torch.as_tensor(dataset[i]["image"]) for i in (0, 1)]))
    torch.testing.assert_close(draws[0], draws[1], rtol=0, atol=0)
    assert not torch.equal(draws[0], draws[2])
    noise = draws[0] - torch.stack([volumes[0]["image"][..., i] for i in (0, 1)])
    assert not torch.equal(noise[0], noise[1]), "slices get noise of their own"


def test_dropped_slices_leave_no_gap_in_the_index(volumes):
    volumes[1]["label"] = torch.zeros_like(volumes[1]["label"])
    volumes[2]["label"][..., [0, 4]] = 0
    dataset = SliceDataset(volumes, None, drop=lambda item: not item["label"].any())
    assert dataset.slices_of_volume == [range(4), range(4, 4), range(4, 11)]
    items = list(dataset)
    assert [item["index"] for item in items] == list(range(11))
    assert [item["slice"] for item in items[4:]] == [1, 2, 3, 5, 6, 7, 8]
    for item in items[4:]:
        torch.testing.assert_close(item["image"], volumes[2]["image"][..., item["slice"]])
    assert list(VolumeBatchSampler(dataset, shuffle=False)) == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10]]
    by_place = SliceDataset(volumes, None, drop=lambda item: item["slice"] > 0 or item["volume"] == 1)
    assert [(item["case"], item["slice"]) for item in by_place] == [("case 0", 0), ("case 2", 0)]


def test_progress_is_logged(caplog):
    with caplog.at_level(logging.INFO):
        SliceDataset([{"image": torch.zeros(1, 64, 64, 2)}] * 64, None)
    assert "cut 50 of 64 volumes" in caplog.text and "128 slices of 64 volumes in 2 MiB" in caplog.text


@pytest.mark.parametrize(
    ("entries", "options", "error", "message"),
    [
        ([], {}, ValueError, "data: expected at least one entry, got none"),
        (
            [{"image": torch.zeros(1, 4, 4)}],
            {},
            ValueError,
            r"expected a volume \(C, X, Y, Z\) under 'image', got \(1, 4",
        ),
        ([{"image": [1, 2]}], {}, ValueError, r"entry 0 of data: expected a volume .* under 'image', got list"),
        (
            [{"image": "a.nii"}],
            {},
            ValueError,
            r"entry 0 of data: expected loaded volumes under \['image', .* load them",
        ),
        ([{"image": torch.zeros(1, 4, 4, 0)}], {}, ValueError, "expected loaded volumes"),
        ([{"img": torch.zeros(1, 4, 4, 2)}], {}, ValueError, r"expected loaded volumes .* got \['img'\]"),
        (
            [{"image": torch.zeros(1, 4, 4, 2), "label": torch.zeros(1, 4, 5, 2)}],
            {},
            ValueError,
            "expected volumes of one spatial shape, got .* resample or pad",
        ),
        (
            [{"image": torch.zeros(1, 4, 4, 2), "slice": 3}],
            {},
            ValueError,
            r"belong to the slices, got \['slice'\]; rename",
        ),
        ([{"image": torch.zeros(1, 4, 4, 2)}], {"slice_axis": -1}, ValueError, r"slice_axis: expected .* got -1"),
        ([{"image": torch.zeros(1, 4, 4, 2)}], {"slice_axis": None}, ValueError, r"slice_axis: expected .* got None"),
        (
            [{"image": torch.zeros(1, 4, 4, 2)}],
            {"drop": lambda item: True},
            ValueError,
            "drop: expected to keep some slices",
        ),
        ([[1]], {}, TypeError, "entry 0 of data: expected a dictionary after volume_transform, got list"),
    ],
)
def test_wrong_data(entries, options, error, message):
    with pytest.raises(error, match=message):
        SliceDataset(entries, lambda item: item, **options)


def order(sampler, dataset):
    return [dataset[batch[0]]["volume"] for batch in sampler]


def test_batches_are_whole_volumes(volumes):
    dataset = SliceDataset(volumes, None)
    sampler = VolumeBatchSampler(dataset, seed=1)
    assert len(sampler) == 3
    for epoch in range(4):
        sampler.set_epoch(epoch)
        assert sorted(sampler) == [[0, 1, 2, 3], [4, 5, 6], [*range(7, 16)]]
    for batch in DataLoader(dataset, batch_sampler=sampler):
        volume = batch["volume"].unique().item()
        torch.testing.assert_close(batch["image"].movedim(0, -1), volumes[volume]["image"])
        assert len(set(batch["volume"].tolist())) == 1


def test_order_is_a_function_of_seed_and_epoch():
    dataset = SliceDataset([entry(number, (2, 2, 2)) for number in range(12)], None)
    orders = {}
    for seed in (0, 1):
        for epoch in (0, 1, 2):
            sampler = VolumeBatchSampler(dataset, seed=seed)
            sampler.set_epoch(epoch)
            orders[seed, epoch] = order(sampler, dataset)
            assert order(sampler, dataset) == orders[seed, epoch]
    assert len({tuple(value) for value in orders.values()}) == 6
    assert order(VolumeBatchSampler(dataset, shuffle=False), dataset) == list(range(12))


def test_resumed_run_gets_the_batches_of_the_whole_run():
    dataset = SliceDataset([entry(number, (2, 2, 2)) for number in range(8)], None)

    def run(start):
        seen = []
        trainer = Engine(lambda engine, batch: seen.append((engine.state.epoch, batch["volume"][0].item())))
        sampler = VolumeBatchSampler(dataset, seed=5)
        EpochSeedHandler(0).attach(trainer)
        loader = DataLoader(dataset, batch_sampler=sampler)
        if start:
            trainer.load_state_dict({"epoch": start, "max_epochs": 4, "epoch_length": len(loader)})
        trainer.run(loader, max_epochs=4)
        return seen

    whole = run(0)
    assert len(whole) == 32
    epochs = [[volume for epoch, volume in whole if epoch == number] for number in (1, 2, 3, 4)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert run(2) == whole[16:]


@pytest.mark.parametrize("shuffle", [False, True])
def test_large_volumes_give_random_subsets(volumes, shuffle):
    dataset = SliceDataset(volumes, None)
    sampler = VolumeBatchSampler(dataset, max_slices=4, shuffle=shuffle)
    drawn = set()
    for epoch in range(20):
        sampler.set_epoch(epoch)
        batches = sorted(sampler)
        assert batches == sorted(sampler), "the same epoch, the same subset"
        assert batches[:2] == [[0, 1, 2, 3], [4, 5, 6]]
        assert batches[2] == sorted(set(batches[2])) and len(batches[2]) == 4
        drawn.update(batches[2])
    assert drawn == set(range(7, 16))


def test_wrong_samplers(volumes):
    dataset = SliceDataset(volumes, None)
    with pytest.raises(TypeError, match="dataset: expected a SliceDataset, got list"):
        VolumeBatchSampler(volumes)
    with pytest.raises(ValueError, match="max_slices: expected an integer >= 1, got 0"):
        VolumeBatchSampler(dataset, max_slices=0)
    with pytest.raises(ValueError, match="seed: expected an integer >= 0, got -1"):
        VolumeBatchSampler(dataset, seed=-1)


def test_a_key_that_an_entry_lacks():
    with pytest.raises(ValueError, match=r"b\.nii: its entry of the datalist has no 'label'"):
        SliceDataset([{"image": "/a/b.nii"}], [CopyItemsd("label", names="copy")])
