"""Fitted filling of boxes: known shapes, quantiles weighted by volume, refusals."""

import inspect
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medconstraints.boxes import fit_filling, label_to_boxes
from medconstraints.formulations import QuadraticPenalty
from medconstraints.losses import BoxPriorLoss
from medconstraints.transforms import box_transforms


def cuboid(shape, *blocks):
    label = np.zeros(shape, dtype=np.uint8)
    for number, *sides in blocks:
        dims = len(shape)
        label[tuple(map(slice, sides[:dims], sides[dims:]))] = number
    return label


def staircase(fill):
    """A 10 x 10 box of which `fill` of 100 pixels are set; all sides are touched."""
    label = np.zeros((12, 12), dtype=np.uint8)
    label[1, 1:11] = 1
    label[1:11, 1] = 1
    inside = [(r, c) for r in range(2, 11) for c in range(2, 11)][: fill - 19]
    for row, column in inside:
        label[row, column] = 1
    assert label.sum() == fill
    return label


def test_a_cuboid_fills_its_box():
    labels = [cuboid((9, 8, 7), (1, 1, 1, 1, 5, 6, 4), (2, 6, 2, 2, 8, 7, 6))]
    assert fit_filling(labels, num_classes=3) == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("shape", [(40, 44), (40, 44, 36)], ids=["disc", "ball"])
def test_a_ball_fills_its_known_share(shape):
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(float)
    centre = np.array([n / 2 - 0.5 for n in shape]).reshape(-1, *[1] * len(shape))
    label = (np.square(grid - centre).sum(0) < 16**2).astype(np.uint8)
    expected = np.pi / 4 if len(shape) == 2 else np.pi / 6
    ((lower, upper),) = fit_filling([label], num_classes=2)
    assert lower == upper == pytest.approx(expected, abs=0.02)


def test_a_disc_in_every_slice_of_a_cylinder():
    grid = np.stack(np.meshgrid(np.arange(40.0), np.arange(40.0), indexing="ij")) - 19.5
    disc = np.square(grid).sum(0) < 15**2
    label = np.repeat(disc[:, None], 5, 1).astype(np.uint8)
    assert fit_filling([label], num_classes=2, slice_axis=1)[0] == pytest.approx([np.pi / 4] * 2, abs=0.02)


def test_extremes_are_the_least_and_most_filled_box():
    labels = [staircase(fill) for fill in (60, 30, 90, 45)]
    assert fit_filling(labels, num_classes=2, quantiles=(0.0, 1.0)) == [[0.3, 0.9]]
    lower, upper = fit_filling(labels, num_classes=2, quantiles=(0.5, 0.5))[0]
    assert lower == upper == pytest.approx((0.45 + 0.6) / 2)


def test_bounds_widen_with_the_quantiles():
    labels = [staircase(fill) for fill in range(20, 100, 5)]
    before = [0.6, 0.6]
    for quantile in (0.4, 0.3, 0.2, 0.1, 0.0):
        lower, upper = fit_filling(labels, num_classes=2, quantiles=(quantile, 1 - quantile))[0]
        assert 0.2 <= lower <= before[0] and before[1] <= upper <= 0.95
        before = [lower, upper]


def test_a_large_box_counts_more_than_small_ones():
    """Nine full boxes of one pixel against one of 100 pixels, filled to 0.4: the median box is a full one."""
    label = np.zeros((12, 40), dtype=np.uint8)
    label[:, :12] = staircase(40)
    label[2, 14:40:3] = 1
    assert fit_filling([label], num_classes=2, mode="component", quantiles=(0.5, 0.5))[0][1] < 0.5
    assert fit_filling([label], num_classes=2, mode="component", quantiles=(0.0, 1.0)) == [[0.4, 1.0]]


def test_mode_decides_what_a_box_is():
    label = cuboid((20, 20), (1, 0, 0, 5, 5), (1, 15, 15, 20, 20))
    assert fit_filling([label], num_classes=2) == [[0.125, 0.125]]
    assert fit_filling([label], num_classes=2, mode="class") == [[0.125, 0.125]]
    assert fit_filling([label], num_classes=2, mode="component") == [[1.0, 1.0]]


def test_slack_widens_within_one():
    labels = [staircase(50)]
    assert fit_filling(labels, num_classes=2, slack=0.1) == [[0.45, 0.55]]
    assert fit_filling([staircase(100)], num_classes=2, slack=0.1) == [[0.9, 1.0]]


def test_shapes_and_types_of_labels():
    flat, solid = staircase(50), cuboid((5, 5, 5), (1, 0, 0, 0, 3, 3, 3))
    for convert in (lambda a: a, lambda a: a[None], torch.from_numpy, lambda a: a.astype(float)):
        assert fit_filling([convert(flat)], num_classes=2) == [[0.5, 0.5]]
        assert fit_filling([convert(solid)], num_classes=2) == [[1.0, 1.0]]


def test_other_classes_do_not_matter():
    labels = [staircase(50), staircase(70) * 3]
    assert fit_filling(labels, num_classes=2) == [[0.5, 0.5]]


@pytest.mark.parametrize("slice_axis", [None, 1])
def test_bounds_of_real_cases_hold_for_these_cases(data_root, slice_axis):
    """With the extreme quantiles, the truth of every case satisfies the fitted constraints in every box."""
    names = ("hippocampus_001", "hippocampus_003", "hippocampus_004", "hippocampus_006")
    labels = [np.asarray(nib.load(data_root / "hippocampus" / "labelsTr" / f"{name}.nii.gz").dataobj) for name in names]
    bounds = fit_filling(labels, num_classes=3, slice_axis=slice_axis, quantiles=(0.0, 1.0))
    assert all(0.1 < lower <= upper <= 1 for lower, upper in bounds)
    if slice_axis is not None:
        return  # several components of a slice share one constraint
    wide = [(lower - 1e-4, min(upper + 1e-4, 1)) for lower, upper in bounds]
    loss = BoxPriorLoss(QuadraticPenalty(), filling=wide, width=1)
    for label in labels:
        mask = torch.stack([torch.from_numpy(label == number) for number in range(3)])[None].float()
        boxes = label_to_boxes(label)
        if len(boxes) == 2:  # one component a class
            assert loss(mask, boxes[None]).item() == pytest.approx(0, abs=1e-9)


def test_a_class_that_no_label_has():
    with pytest.raises(ValueError, match="labels: class 2 is in none of the 2 label maps; add a case that has it"):
        fit_filling([staircase(50), staircase(60)], num_classes=3)


@pytest.mark.parametrize("quantiles", [(0.9, 0.1), (0.5, 1.5)])
def test_quantiles_are_ordered(quantiles):
    with pytest.raises(ValueError, match="quantiles: expected 0 <= lower <= upper <= 1, got"):
        fit_filling([staircase(50)], num_classes=2, quantiles=quantiles)


def test_one_default_mode():
    """What is fitted by default is what the bundle trains on by default."""
    bundle = json.loads((Path(__file__).parents[2] / "bundles/box_prior/configs/train.json").read_text())
    for function in (fit_filling, box_transforms):
        assert inspect.signature(function).parameters["mode"].default == bundle["box_mode"] == "class"
