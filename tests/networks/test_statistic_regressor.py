"""The regressor's values in standard units and in those of the statistics, for several statistics and relations."""

import functools

import pytest
import torch
from torch import nn

from medconstraints.networks import StatisticRegressor, statistic_blocks
from medconstraints.statistics import soft_centroid, soft_mean_intensity, soft_size, soft_size_ratio
from medconstraints.transforms import label_to_bounds

RATIO = functools.partial(soft_size_ratio, pairs=[[1, 2]])
STATISTICS = {"size": soft_size, "centroid": soft_centroid, "ratio": RATIO}


def regressor_of(statistics, shape=(6, 5), classes=3):
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(30, 4))
    return StatisticRegressor(backbone, features=4, statistics=statistics, num_classes=classes, image_size=shape)


def items_of(labels, statistics):
    return [
        {f"{name}_bounds": label_to_bounds(label, 3, one, relative_margin=0) for name, one in statistics.items()}
        for label in labels
    ]


@pytest.fixture
def labels(rng):
    found = rng.integers(0, 3, (4, 6, 5))
    found[0][found[0] == 2] = 0  # a class that one image lacks
    return found


def test_values_are_those_of_the_labels(labels):
    """NaN for the centroid and the ratio of what is absent, 0 for its size."""
    regressor = regressor_of(STATISTICS)
    assert regressor.names == [
        "size 1",
        "size 2",
        *(f"centroid {c} {axis}" for c in (1, 2) for axis in (0, 1)),
        "ratio 0",
    ]
    for label, item in zip(labels, items_of(labels, STATISTICS), strict=True):
        [values] = regressor.targets({key: item[key][None] for key in regressor.keys}).tolist()
        expected = [float((label == cls).sum()) for cls in (1, 2)]
        for cls in (1, 2):
            places = torch.tensor(label == cls).nonzero().double()
            expected += places.mean(0).tolist()
        expected.append(expected[0] / expected[1] if expected[1] else float("nan"))
        assert values == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_standard_units_and_back(labels):
    items = items_of(labels, STATISTICS)
    regressor = regressor_of(STATISTICS)
    regressor.fit(items)
    batch = {key: torch.stack([item[key] for item in items]) for key in regressor.keys}
    standard, values = regressor.standard(batch), regressor.targets(batch)
    torch.testing.assert_close(standard.nanmean(0), torch.zeros(7), atol=1e-5, rtol=0)
    image = torch.rand(4, 1, 6, 5)
    predicted, spread = regressor.predict(image)
    raw = regressor(image)
    torch.testing.assert_close((predicted - regressor.center) / regressor.scale, raw[..., 0])
    torch.testing.assert_close(spread, raw[..., 1].mul(0.5).exp() * regressor.scale)
    torch.testing.assert_close(standard * regressor.scale + regressor.center, values, equal_nan=True)


def test_one_image_or_a_constant_value_leaves_the_scale(labels):
    regressor = regressor_of({"size": soft_size})
    regressor.fit(items_of(labels[1:2], {"size": soft_size}))
    assert regressor.scale.tolist() == [1, 1]


def test_units_are_part_of_the_weights(labels):
    first, second = regressor_of(STATISTICS), regressor_of(STATISTICS)
    first.fit(items_of(labels, STATISTICS))
    second.load_state_dict(first.state_dict())
    image = torch.rand(2, 1, 6, 5)
    torch.testing.assert_close(first.predict(image), second.predict(image))


def test_what_is_refused(labels):
    with pytest.raises(ValueError, match="statistics: expected at least one"):
        statistic_blocks({}, num_classes=2, spatial_dims=2)
    with pytest.raises(ValueError, match=r"'grey' needs \['image'\]"):
        statistic_blocks({"grey": soft_mean_intensity}, num_classes=2, spatial_dims=2)
    with pytest.raises(ValueError, match=r"expected images of \(6, 5\) voxels, got \(6, 6\)"):
        regressor_of({"size": soft_size})(torch.rand(1, 1, 6, 6))
    absent = {"centroid": soft_centroid}
    with pytest.raises(ValueError, match=r"no segmented image has a value for \['centroid 2 0', 'centroid 2 1'\]"):
        regressor_of(absent).fit(items_of(labels[:1], absent))
