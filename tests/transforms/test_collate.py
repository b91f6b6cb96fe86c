"""Collation of ragged boxes, through a data loader and back."""

import functools

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.transforms import Compose, RandCropByPosNegLabeld

from medconstraints.formulations import LogBarrierExtension
from medconstraints.losses import BoxPriorLoss
from medconstraints.transforms import BoxesToGridd, LabelToBoxesd, pad_boxes_collate


def rows(count, columns=7, number=1):
    """`count` valid boxes, each different."""
    start = torch.arange(count)[:, None].expand(-1, columns // 2)
    return torch.cat([torch.full((count, 1), number), start, start + 2], 1)


@pytest.mark.parametrize(("counts", "columns"), [((3, 1), 5), ((2, 0, 1), 7), ((0, 0), 7), ((5,), 7)])
def test_pads_to_the_largest_count(counts, columns):
    batch = pad_boxes_collate([{"boxes": rows(n, columns), "image": torch.ones(1, 4, 4) * n} for n in counts])
    boxes = batch["boxes"]
    assert boxes.shape == (len(counts), max(counts), columns) and boxes.dtype == torch.int64
    for own, count in zip(boxes, counts, strict=True):
        assert torch.equal(own[:count], rows(count, columns)) and (own[count:] == -1).all()
    assert batch["image"].flatten(1)[:, 0].tolist() == list(counts)


def test_lists_of_patches_are_flattened():
    batch = pad_boxes_collate(
        [
            [{"boxes": rows(1), "name": "a"}, {"boxes": rows(0), "name": "b"}],
            [{"boxes": rows(3), "name": "c"}],
            {"boxes": rows(2), "name": "d"},
        ]
    )
    assert batch["boxes"].shape == (4, 3, 7) and batch["name"] == ["a", "b", "c", "d"]
    assert (batch["boxes"][:, :, 0] == 1).sum(1).tolist() == [1, 0, 3, 2]


def test_other_keys():
    items = [{"tight": rows(1), "loose": rows(2)}, {"tight": rows(3), "loose": rows(0)}]
    batch = pad_boxes_collate(items, keys=("tight", "loose", "absent"))
    assert batch["tight"].shape == (2, 3, 7) and batch["loose"].shape == (2, 2, 7)


def test_items_without_boxes_collate_as_usual():
    batch = pad_boxes_collate([{"image": torch.zeros(1, 4, 4)}, {"image": torch.ones(1, 4, 4)}])
    assert batch["image"].shape == (2, 1, 4, 4) and set(batch) == {"image"}


def test_items_are_not_changed():
    items = [{"boxes": rows(1)}, {"boxes": rows(3)}]
    pad_boxes_collate(items)
    assert [len(item["boxes"]) for item in items] == [1, 3]


def test_arrays_and_lists_become_tensors():
    batch = pad_boxes_collate([{"boxes": rows(1).numpy()}, {"boxes": rows(2).tolist()}])
    assert batch["boxes"].shape == (2, 2, 7) and batch["boxes"].dtype == torch.int64


def test_meta_tensors_keep_their_meta():
    affine = torch.diag(torch.tensor([2.0, 2, 3, 1], dtype=torch.float64))
    items = [{"boxes": rows(n), "image": MetaTensor(torch.zeros(1, 4, 4, 4), affine=affine)} for n in (1, 2)]
    batch = pad_boxes_collate(items)
    assert isinstance(batch["image"], MetaTensor) and torch.equal(batch["image"].affine[0], affine)
    assert [item["boxes"].shape for item in decollate_batch(batch)] == [(2, 7), (2, 7)]


@pytest.mark.parametrize("counts", [(1, 3), (0, 0)])
def test_decollation_gives_one_item_a_sample(counts):
    batch = pad_boxes_collate([{"boxes": rows(n), "image": torch.full((1, 4, 4, 4), float(n))} for n in counts])
    items = decollate_batch(batch)
    assert len(items) == len(counts)
    for item, count in zip(items, counts, strict=True):
        assert item["boxes"].shape == (max(counts), 7) and (item["boxes"][count:] == -1).all()


@pytest.mark.filterwarnings("ignore:Num foregrounds 0")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_loader_feeds_the_loss(workers, rng):
    """Volumes with several, one and no object; two patches of each; the batch goes into the loss and back."""
    labels = []
    for number in (3, 1, 0):
        label = np.zeros((16, 16, 16), dtype=np.uint8)
        for k in range(number):
            label[5 * k : 5 * k + 3, 2:9, 4 : 8 + k] = 1
        labels.append(label)
    data = [
        {"image": MetaTensor(rng.random((1, 16, 16, 16))), "label": MetaTensor(torch.from_numpy(x)[None])}
        for x in labels
    ]
    keys = ("image", "label")
    crop = RandCropByPosNegLabeld(keys, "label", (12, 12, 12), num_samples=2, allow_smaller=False)
    chain = Compose([LabelToBoxesd(), crop, BoxesToGridd()])
    loader = DataLoader(
        Dataset(data, chain),
        batch_size=3,
        num_workers=workers,
        collate_fn=functools.partial(pad_boxes_collate, keys=("boxes",)),
    )
    (batch,) = list(loader)
    assert batch["image"].shape == (6, 1, 12, 12, 12) and batch["boxes"].shape[0] == 6
    assert (batch["boxes"][4:, :, 0] == -1).all() and (batch["boxes"][:4, :, 0] == 1).any()
    loss = BoxPriorLoss(LogBarrierExtension(), sigmoid=True)(batch["image"].float(), batch["boxes"])
    assert loss.isfinite()
    assert len(decollate_batch(batch)) == 6


def test_an_item_without_the_boxes_of_the_others_is_named():
    with pytest.raises((ValueError, KeyError), match=r"boxes.*item 1"):
        pad_boxes_collate([{"boxes": rows(1)}, {"image": torch.zeros(1)}])


def test_an_item_that_lacks_a_label_is_named():
    images = [MetaTensor(torch.zeros(1, 2, 2), meta={"filename_or_obj": f"/a/case_{i}.nii"}) for i in range(2)]
    with pytest.raises(ValueError, match=r"label: .*case_1\.nii has only \['image'\]; add it"):
        pad_boxes_collate([{"image": images[0], "label": torch.zeros(1, 2, 2)}, {"image": images[1]}])
