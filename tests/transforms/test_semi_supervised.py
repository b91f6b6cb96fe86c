"""What trains a segmented and an unsegmented item: labels, proposals, bounds, or nothing."""

import pytest
import torch

from medconstraints.statistics import soft_centroid, soft_size
from medconstraints.transforms import HybridLabeld, semi_supervised_transforms, statistic_transforms

LABEL = torch.tensor([[[0, 1, 1], [0, 0, 2]]])
IMAGE = torch.rand(1, 2, 3)
SEGMENTED = {"image": IMAGE, "label": LABEL, "fully_labelled": True}
BARE = {"image": IMAGE, "fully_labelled": False}
NOTHING = torch.full((1, 2, 3), -1.0)


READ = {name: ["weak_label", "size_bounds", "centroid_bounds"] for name in ("oracle", "labelled", "proposals")}
READ["mean_teacher"] = ["weak_label", "image"]


@pytest.mark.parametrize(
    ("item", "options", "expected"),
    [
        pytest.param(SEGMENTED, {}, LABEL, id="its label"),
        pytest.param(BARE, {}, NOTHING, id="nothing"),
        pytest.param(BARE | {"label": LABEL}, {}, NOTHING, id="a label that must not be known"),
        pytest.param(BARE | {"proposal": LABEL}, {}, LABEL, id="a proposal"),
        pytest.param(
            BARE | {"proposal": LABEL}, {"foreground_only": True}, LABEL.where(LABEL > 0, -1), id="its foreground"
        ),
        pytest.param(SEGMENTED, {"foreground_only": True}, LABEL, id="labels keep their background"),
    ],
)
def test_weak_labels(item, options, expected):
    found = HybridLabeld(**options)(item)
    assert found["weak_label"].dtype == torch.float32 and torch.equal(found["weak_label"], expected.float())
    assert "label" not in found and "proposal" not in found


def test_an_item_without_what_it_should_have():
    with pytest.raises(KeyError, match="proposal: a has none; set --proposals_dir"):
        HybridLabeld(proposals=True)(BARE | {"case": "a"})
    with pytest.raises(KeyError, match="label: expected this key"):
        HybridLabeld()(BARE | {"fully_labelled": True})


STATISTICS = {"size": soft_size, "centroid": soft_centroid}


def test_statistics_of_a_label_have_no_room_between_their_bounds():
    item = dict(SEGMENTED)
    for transform in statistic_transforms(STATISTICS, num_classes=3):
        item = transform(item)
    assert item["size_bounds"][1:].tolist() == [[[2, 2]], [[1, 1]]]
    assert item["centroid_bounds"][2].tolist() == [[1, 1], [2, 2]]


@pytest.mark.parametrize(
    ("supervision", "bounded"), [("oracle", True), ("labelled", False), ("proposals", False), ("mean_teacher", False)]
)
def test_bounds_of_an_unsegmented_item(supervision, bounded):
    transforms = semi_supervised_transforms(
        supervision, statistics=STATISTICS, num_classes=3, predictions=None, read_keys=READ[supervision], margin=0.5
    )
    item, segmented = BARE | {"label" if bounded else "proposal": LABEL}, dict(SEGMENTED)
    for transform in transforms:
        item, segmented = transform(item), transform(segmented)
    assert torch.isinf(segmented["size_bounds"]).all() and torch.isinf(segmented["centroid_bounds"]).all()
    if bounded:
        assert item["size_bounds"][1:].tolist() == [[[1, 3]], [[0.5, 1.5]]]
    else:
        assert torch.isinf(item["size_bounds"]).all() and item["size_bounds"].shape == (3, 1, 2)


def test_unknown_supervision():
    with pytest.raises(ValueError, match="supervision: expected"):
        semi_supervised_transforms("self", statistics=STATISTICS, num_classes=3, predictions=None, read_keys=[])
    for supervision, keys, message in [
        (
            "curriculum",
            READ["mean_teacher"],
            "supervision: 'curriculum' bounds size, centroid, but the loss reads",
        ),
        ("oracle", [], "supervision: 'oracle' bounds"),
        ("mean_teacher", READ["oracle"], "supervision: 'mean_teacher' needs its loss"),
    ]:
        with pytest.raises(ValueError, match=message):
            semi_supervised_transforms(
                supervision, statistics=STATISTICS, num_classes=3, predictions=None, read_keys=keys
            )
