"""LearnedAugmentd: what an augmenter drew, as an ordinary random transform."""

import json

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose

from medconstraints.augmentation import Augmenter, augment, read_draws, write_draws
from medconstraints.transforms import LearnedAugmentd


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(2)
    augmenter = Augmenter(3, families=["affine", "elastic", "intensity"], spread_floor=0.5)
    write_draws(augmenter, tmp_path / "augmenter.json", count=50)
    return tmp_path / "augmenter.json"


def item(spacing=(1.0, 2.0, 0.5)):
    volume = torch.zeros(1, 10, 9, 8)
    volume[:, 3:7, 2:6, 2:6] = 1.0
    affine = torch.diag(torch.tensor([*spacing, 1.0]))
    return {"image": MetaTensor(volume, affine=affine), "label": MetaTensor(volume.clone(), affine=affine), "name": "a"}


def test_draws_are_those_of_the_augmenter_and_leave_the_random_state(tmp_path):
    augmenter = Augmenter(2, limits={"rotation": 5.0})
    torch.manual_seed(0)
    state = torch.get_rng_state()
    table = write_draws(augmenter, tmp_path / "a.json", count=300, note={"epoch": 3})
    assert torch.equal(torch.get_rng_state(), state)
    draws = read_draws(tmp_path / "a.json")
    assert draws.names == tuple(q.name for q in augmenter.quantities) and draws.spatial_dims == 2
    np.testing.assert_allclose(draws.table, table, rtol=1e-4)
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["epoch"] == 3
    rotation = content["quantities"][0]
    assert (rotation["name"], rotation["unit"], rotation["limit"]) == ("rotation_01", "degrees", 5.0)
    assert rotation["spread"] == pytest.approx(table[:, 0].std())
    assert not list(tmp_path.glob("*.part"))


def test_equals_augment_with_the_row_that_was_drawn(path):
    transform = LearnedAugmentd(["image"], path)
    transform.set_random_state(seed=4)
    random = np.random.RandomState(4)
    random.rand()
    row, seed = random.randint(50), int(random.randint(2**31))
    draws = read_draws(path)
    values = {n: torch.tensor([v], dtype=torch.float32) for n, v in zip(draws.names, draws.table[row], strict=True)}
    image = item()["image"].as_tensor()[None]
    generator = torch.Generator().manual_seed(seed)
    expected, _ = augment(image, None, values, torch.tensor([[1.0, 2.0, 0.5]]), generator=generator)
    torch.testing.assert_close(transform(item())["image"].as_tensor(), expected[0])


def test_label_and_image_move_together_and_the_label_keeps_its_classes(path):
    transform = Compose([LearnedAugmentd(["image", "label"], path, mode=["bilinear", "nearest"])])
    transform.set_random_state(seed=1)
    overlaps = []
    for _ in range(10):
        given = item()
        found = transform(given)
        assert set(found["label"].unique().tolist()) <= {0.0, 1.0}
        assert isinstance(found["label"], MetaTensor) and torch.equal(found["label"].affine, given["label"].affine)
        moved = (found["label"] != given["label"]).any()
        inside = found["image"][found["label"] > 0].mean() - found["image"][found["label"] == 0].mean()
        overlaps.append((bool(moved), float(inside)))
        assert torch.equal(given["image"], item()["image"])
    assert sum(moved for moved, _ in overlaps) > 5
    assert all(inside > 0 for _, inside in overlaps)


def test_prob_and_missing_keys(path):
    never = LearnedAugmentd(["image", "other"], path, prob=0.0, allow_missing_keys=True)
    assert torch.equal(never(item())["image"], item()["image"])
    with pytest.raises(KeyError, match="other"):
        LearnedAugmentd(["other"], path)(item())


def test_wrong_files_images_and_modes_are_refused(path, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"augmenter\.json"):
        LearnedAugmentd("image", tmp_path / "none.json")
    for content in ("[1]", "{", '{"draws": [[1.0]]}', json.dumps({**json.loads(path.read_text()), "draws": [[1.0]]})):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=r"bad\.json"):
            LearnedAugmentd("image", tmp_path / "bad.json")
    with pytest.raises(ValueError, match="mode"):
        LearnedAugmentd("image", path, mode="bicubic")
    with pytest.raises(ValueError, match="3 spatial axes"):
        LearnedAugmentd("image", path)({"image": torch.zeros(1, 4, 4)})
