"""The cases of a datalist as a data set: what an entry lacks is said by the volume's name, cached or not."""

import json
import time

import pytest
import torch
from monai.transforms import (
    CopyItemsd,
    Lambdad,
    Rand3DElasticd,
    RandGridDistortiond,
    RandSimulateLowResolutiond,
    Transposed,
)

from medconstraints.data import CohortDataset, SliceDataset, in_order
from medconstraints.transforms import SignedDistanceMapd


@pytest.fixture
def datalist(tmp_path):
    entries = [{"image": f"images/case_{i}.nii.gz", "label": "a"} for i in range(6)]
    del entries[1]["label"]
    (tmp_path / "datalist.json").write_text(json.dumps({"training": entries}))
    return tmp_path / "datalist.json"


@pytest.mark.parametrize("cache_rate", [0.0, 1.0])
def test_a_key_that_an_entry_lacks(datalist, cache_rate):
    def items():
        dataset = CohortDataset(datalist, "training", CopyItemsd("label", names="copy"), cache_rate=cache_rate)
        return [dataset[i] for i in range(6)]

    with pytest.raises(ValueError, match=r"case_1\.nii\.gz: its entry of the datalist has no 'label', only \['image'"):
        items()


def test_a_key_that_an_entry_of_slices_lacks():
    with pytest.raises(ValueError, match=r"b\.nii: its entry of the datalist has no 'label'"):
        SliceDataset([{"image": "/a/b.nii"}], [CopyItemsd("label", names="copy")])


def test_no_thread_works_on_after_a_failure(datalist):
    """A process that ends while they do is aborted, with status 134."""
    started, ended = [], []

    def load(path):
        started.append(path)
        if path.endswith("case_0.nii.gz"):
            raise OSError("gone")
        time.sleep(0.05)
        ended.append(path)
        return torch.zeros(1)

    with pytest.raises(RuntimeError):
        CohortDataset(datalist, "training", Lambdad("image", load), num_workers=2)
    assert len(started) == len(ended) + 1 < 6  # the others were not begun


DEFORMATIONS = {
    "elastic": lambda keys: Rand3DElasticd(keys, sigma_range=(5, 7), magnitude_range=(1, 2), prob=1),
    "grid": lambda keys: RandGridDistortiond(keys, prob=1),
    "axes": lambda keys: Transposed(keys, indices=(0, 2, 1, 3)),
    "resolution": lambda keys: RandSimulateLowResolutiond(keys, prob=1),
}


@pytest.mark.parametrize("make", DEFORMATIONS.values(), ids=DEFORMATIONS)
def test_a_map_is_not_deformed_without_a_trace(make):
    distances = SignedDistanceMapd(num_classes=2)
    for keys in (["image", "distance_map"], ["image", "label"]):
        with pytest.raises(ValueError, match=r"after the distance map was made, and leaves no trace"):
            in_order({"maps": distances, "flips": [abs], "deformation": {"inner": [make(keys)]}})
        in_order([make(keys), distances])
    in_order([distances, make(["image"])])  # only the image
