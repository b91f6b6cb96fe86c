"""Sums over boxes and bands: against the slow reference, in many layouts, precisions and symmetries."""

import itertools

import numpy as np
import pytest
import torch

from medconstraints.formulations import LogBarrierExtension
from medconstraints.losses import BoxPriorLoss
from medconstraints.statistics import box_sums, inside_mask, plan_boxes

PAD2, PAD3 = [-1] * 5, [-1] * 7

# name: shape of the probabilities, rows of each sample, width, slice_axis
CASES = {
    "2D": ((1, 2, 12, 10), [[[1, 2, 3, 9, 8]]], 3, None),
    "2D, one channel": ((1, 1, 12, 10), [[[1, 2, 3, 9, 8]]], 3, None),
    "2D, one line a band": ((1, 2, 9, 9), [[[1, 1, 2, 6, 8]]], 1, None),
    "2D, widths that divide": ((1, 2, 12, 10), [[[1, 0, 2, 6, 8]]], 3, None),
    "2D, last band of one line": ((1, 2, 12, 10), [[[1, 1, 2, 12, 9]]], 5, None),
    "2D, width above the box": ((1, 2, 12, 10), [[[1, 2, 3, 6, 8]]], 50, None),
    "2D, whole image": ((1, 2, 7, 8), [[[1, 0, 0, 7, 8]]], 5, None),
    "2D, padding between": (
        (2, 3, 8, 9),
        [[PAD2, [2, 1, 1, 4, 5], PAD2], [[1, 0, 0, 3, 3], PAD2, [2, 5, 5, 8, 9]]],
        2,
        None,
    ),
    "2D, several apart": ((1, 2, 16, 16), [[[1, 1, 1, 5, 6], [1, 8, 9, 15, 16], [1, 0, 10, 3, 13]]], 2, None),
    "2D, two overlap": ((1, 2, 12, 12), [[[1, 1, 2, 7, 8], [1, 4, 5, 11, 12]]], 3, None),
    "2D, two touch": ((1, 2, 12, 12), [[[1, 1, 2, 5, 8], [1, 5, 2, 9, 8]]], 3, None),
    "2D, three overlap in one place": ((1, 2, 9, 9), [[[1, 0, 0, 5, 5], [1, 2, 2, 8, 8], [1, 3, 1, 6, 7]]], 2, None),
    "2D, four corners overlap": (
        (1, 2, 10, 10),
        [[[1, 0, 0, 6, 6], [1, 4, 4, 10, 10], [1, 0, 4, 6, 10], [1, 4, 0, 10, 6]]],
        2,
        None,
    ),
    "2D, identical": ((1, 2, 9, 9), [[[1, 2, 2, 7, 6], [1, 2, 2, 7, 6], [1, 2, 2, 7, 6]]], 2, None),
    "2D, nested": ((1, 2, 12, 12), [[[1, 1, 1, 11, 11], [1, 3, 3, 9, 9], [1, 5, 5, 7, 7]]], 3, None),
    "2D, classes overlap": (
        (2, 4, 10, 11),
        [[[1, 1, 1, 8, 8], [2, 3, 3, 10, 11], [3, 0, 0, 4, 9]], [PAD2, [3, 2, 2, 3, 9], PAD2]],
        3,
        None,
    ),
    "2D, many on top of each other": ((1, 2, 24, 24), [[[1, k, k, 24 - k, 23 - k] for k in range(10)]], 4, None),
    "2D, one voxel": ((1, 2, 6, 6), [[[1, 2, 3, 3, 4]]], 5, None),
    "2D, one line": ((1, 2, 6, 8), [[[1, 2, 1, 3, 8], [1, 0, 0, 6, 1]]], 3, None),
    "2D, one-voxel image": ((1, 2, 1, 1), [[[1, 0, 0, 1, 1]]], 5, None),
    "2D, cut at the start": ((1, 2, 9, 9), [[[1, -3, 2, 5, 7]]], 2, None),
    "2D, cut at the end": ((1, 2, 9, 9), [[[1, 3, 2, 5, 11]]], 2, None),
    "2D, cut on two sides": ((1, 2, 9, 9), [[[1, -1, 2, 5, 12]]], 2, None),
    "2D, cut to one line": ((1, 2, 9, 9), [[[1, -4, 2, 1, 7]]], 2, None),
    "2D, cut and overlapping": ((1, 2, 9, 9), [[[1, -2, 1, 4, 7], [1, 2, 3, 8, 8]]], 3, None),
    "2D, no boxes": ((2, 3, 6, 7), [[], []], 3, None),
    "2D, only padding": ((2, 3, 6, 7), [[PAD2, PAD2], [PAD2, PAD2]], 3, None),
    "3D": ((1, 2, 8, 9, 7), [[[1, 1, 2, 1, 7, 8, 6]]], 3, None),
    "3D, one channel": ((2, 1, 8, 9, 7), [[[1, 1, 2, 1, 7, 8, 6]], [[1, 0, 0, 0, 8, 9, 7]]], 5, None),
    "3D, classes and overlaps": (
        (2, 3, 9, 8, 7),
        [
            [[1, 0, 0, 0, 6, 6, 6], [1, 3, 3, 3, 9, 8, 7], [2, 1, 1, 1, 5, 7, 6]],
            [[2, 0, 0, 0, 5, 5, 5], [2, 2, 2, 2, 7, 7, 7], [2, 3, 1, 2, 6, 4, 5]],
        ],
        2,
        None,
    ),
    "3D, many on top of each other": (
        (1, 2, 12, 12, 12),
        [[[1, k // 2, 0, k, 12, 12 - k, 12] for k in range(9)]],
        4,
        None,
    ),
    "3D, flat box": ((1, 2, 6, 7, 8), [[[1, 2, 1, 0, 3, 6, 8]]], 2, None),
    "3D, one column": ((1, 2, 6, 7, 8), [[[1, 2, 1, 0, 3, 2, 8]]], 3, None),
    "3D, one voxel": ((1, 2, 6, 7, 8), [[[1, 2, 1, 0, 3, 2, 1]]], 3, None),
    "3D, cut along one axis": ((1, 2, 6, 7, 8), [[[1, -2, 1, 1, 4, 6, 7]]], 2, None),
    "3D, cut along two axes": ((1, 2, 6, 7, 8), [[[1, -2, 1, 1, 4, 9, 7]]], 2, None),
    "3D, no boxes": ((1, 3, 4, 5, 6), [[]], 2, None),
    "slices 0": (
        (2, 3, 4, 7, 8),
        [[[1, 0, 1, 1, 1, 6, 7], [1, 0, 3, 3, 1, 7, 8], [2, 3, 0, 0, 4, 7, 8]], [[2, 1, 2, 2, 2, 3, 3], PAD3, PAD3]],
        2,
        0,
    ),
    "slices 1": ((1, 2, 7, 4, 8), [[[1, 1, 0, 1, 6, 1, 7], [1, -2, 3, 2, 4, 4, 7]]], 3, 1),
    "slices 2": ((2, 1, 7, 8, 4), [[[1, 1, 1, 0, 6, 7, 1]], [[1, 0, 0, 3, 7, 8, 4]]], 3, 2),
    "slices 2, no boxes": ((1, 2, 7, 8, 4), [[]], 3, 2),
    "slices 1, many on top of each other": (
        (1, 2, 14, 3, 14),
        [[[1, k // 2, 1, 0, 14, 2, 14 - k // 3] for k in range(12)]],
        3,
        1,
    ),
}
table = pytest.mark.parametrize(("shape", "rows", "width", "slice_axis"), CASES.values(), ids=CASES)


def tensor_of(rows, dims):
    """Padded boxes (B, N, 1 + 2 D)."""
    most = max(len(sample) for sample in rows)
    boxes = torch.full((len(rows), most, 1 + 2 * dims), -1)
    for sample, own in enumerate(rows):
        if own:
            boxes[sample, : len(own)] = torch.tensor(own)
    return boxes


def planned(shape, rows, width=5, slice_axis=None):
    return plan_boxes(tensor_of(rows, len(shape) - 2), shape, width=width, slice_axis=slice_axis)


def bands_and_sums(plan, segments):
    """Sorted (group, lines, mass): the order of the bands is no promise."""
    columns = zip(plan.segment_group.tolist(), plan.segment_width.tolist(), segments.tolist(), strict=True)
    return np.array(sorted(columns)).reshape(-1, 3)


def union_mass(probs, plan):
    """Mass inside the boxes of each image and class, as the plan says to compute it."""
    _, slots = box_sums(probs, plan)
    if plan.slot_sign is not None:
        return (slots * plan.slot_sign).sum(-1)
    images = probs[:, plan.first_channel :]
    if plan.slice_axis is not None:
        images = images.movedim(2 + plan.slice_axis, 1).flatten(0, 1)
    return (images * inside_mask(plan)).flatten(2).sum(-1)


# Values


@table
def test_bands(shape, rows, width, slice_axis, rng, box_prior_reference):
    probs = rng.random(shape)
    plan = planned(shape, rows, width, slice_axis)
    segments, _ = box_sums(torch.from_numpy(probs), plan)
    expected = sorted(row[:3] for row in box_prior_reference.band_table(probs, rows, width, slice_axis))
    assert plan.num_segments == len(plan.segment_width) == len(plan.segment_group) == len(segments)
    np.testing.assert_allclose(bands_and_sums(plan, segments), np.array(expected).reshape(-1, 3), atol=1e-10)


@table
def test_gradient_of_a_band_is_its_mask(shape, rows, width, slice_axis, box_prior_reference):
    probs = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    plan = planned(shape, rows, width, slice_axis)
    segments, _ = box_sums(probs, plan)
    expected = box_prior_reference.band_table(np.zeros(shape), rows, width, slice_axis)
    masks = []
    for segment in segments:
        (grad,) = torch.autograd.grad(segment, probs, retain_graph=True)
        assert ((grad == 0) | (grad == 1)).all()
        masks.append(grad.bool().numpy().tobytes())
    assert sorted(masks) == sorted(mask.tobytes() for *_, mask in expected)


@table
def test_totals_unions_and_cuts(shape, rows, width, slice_axis, rng, box_prior_reference):
    probs = rng.random(shape)
    tensor = torch.from_numpy(probs)
    plan = planned(shape, rows, width, slice_axis)
    _, slots = box_sums(tensor, plan)
    mask, mass = inside_mask(plan), union_mass(tensor, plan)
    images = box_prior_reference.images_of(probs, rows, slice_axis)
    num_classes, first_channel = box_prior_reference.foreground_of(probs)
    assert plan.shape == images[0][1].shape[1:] and slots.shape[:2] == mask.shape[:2] == (len(images), num_classes)
    for image, (_, own, own_rows) in enumerate(images):
        for k in range(num_classes):
            channel, mine = own[k + first_channel], [row for row in own_rows if row[0] == k + 1]
            union = box_prior_reference.union_of(mine, channel.shape)
            np.testing.assert_array_equal(mask[image, k].numpy(), union)
            assert slots[image, k, 0].item() == pytest.approx(channel.sum(), abs=1e-9)
            assert mass[image, k].item() == pytest.approx(channel[union].sum(), abs=1e-9)
            cut = any(any(box_prior_reference.visible(row, channel.shape)[1]) for row in mine)
            assert plan.box_cut[image, k] == cut
            if plan.slot_sign is not None:
                assert plan.box_volume[image, k] == union.sum()
            else:
                assert plan.box_volume[image, k] >= union.sum() and (plan.box_volume[image, k] > 0) == bool(mine)


@table
def test_gradient_of_the_slots(shape, rows, width, slice_axis, rng):
    probs = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    plan = planned(shape, rows, width, slice_axis)
    factor = torch.from_numpy(rng.random(plan.starts.shape[:3]))
    _, slots = box_sums(probs, plan)
    (slots * factor).sum().backward()
    space = [n for axis, n in enumerate(shape[2:]) if axis != slice_axis]
    images = torch.zeros(factor.shape[0], shape[1], *space, dtype=torch.float64)
    for image, k, m in np.ndindex(*factor.shape):
        index = tuple(map(slice, plan.starts[image, k, m].tolist(), plan.stops[image, k, m].tolist()))
        images[(image, k + plan.first_channel, *index)] += factor[image, k, m]
    if slice_axis is not None:
        images = images.unflatten(0, (shape[0], -1)).movedim(1, 2 + slice_axis)
    torch.testing.assert_close(probs.grad, images)


@pytest.mark.parametrize(
    ("name", "signed"),
    [
        ("2D, three overlap in one place", True),
        ("2D, four corners overlap", True),
        ("2D, identical", True),
        ("2D, many on top of each other", False),
        ("3D, many on top of each other", False),
        ("slices 1, many on top of each other", False),
    ],
)
def test_few_overlaps_are_corrected_and_many_left_to_a_mask(name, signed):
    assert (planned(*CASES[name]).slot_sign is not None) == signed


def test_apart_boxes_need_no_correction():
    rows = [[[1, 4 * i, 4 * j, 4 * i + 3, 4 * j + 3] for i in range(8) for j in range(8)]]
    plan = planned((1, 2, 32, 32), rows)
    assert plan.starts.shape[2] == 65 and plan.slot_sign.sum() == 64


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 7, 11, 12, 100])
@pytest.mark.parametrize("extent", [2, 3, 5, 10, 11, 12])
def test_every_line_lies_in_exactly_one_band(width, extent):
    plan = planned((1, 2, 14, 3), [[[1, 1, 0, 1 + extent, 3]]], width)
    rows = torch.zeros(1, 2, 14, 3, dtype=torch.float64, requires_grad=True)
    segments, _ = box_sums(rows, plan)
    across = plan.segment_width.tolist()[: -(-extent // width)]
    assert sum(across) == extent and set(across[:-1]) <= {width} and 1 <= across[-1] <= width
    (grad,) = torch.autograd.grad(segments[: len(across)].sum(), rows)
    expected = torch.zeros_like(grad)
    expected[0, 1, 1 : 1 + extent] = 1
    assert torch.equal(grad, expected)


@pytest.mark.parametrize(
    ("row", "axes"),
    [
        ([1, 1, 1, 1, 5, 6, 7], {0, 1, 2}),
        ([1, -1, 1, 1, 5, 6, 7], {0}),
        ([1, 1, 1, 1, 5, 6, 9], {2}),
        ([1, -1, 1, 1, 5, 6, 9], set()),
        ([1, -1, -1, -1, 5, 6, 9], set()),
        ([1, 2, 1, 1, 3, 6, 7], {1, 2}),
        ([1, 2, 3, 1, 3, 4, 7], {2}),
        ([1, 2, 3, 4, 3, 4, 5], set()),
    ],
)
def test_axes_that_have_bands(row, axes):
    """Only lines that run along uncut axes are evidence; a band takes lines of one axis."""
    shape = (1, 2, 6, 7, 8)
    plan = planned(shape, [[row]], width=1)
    probs = torch.zeros(shape, requires_grad=True)
    segments, _ = box_sums(probs, plan)
    thin = set()
    for segment in segments:
        (grad,) = torch.autograd.grad(segment, probs, retain_graph=True)
        where = grad[0, 1].nonzero()
        extent = where.max(0).values - where.min(0).values + 1
        full = [min(row[4 + a], shape[2 + a]) - max(row[1 + a], 0) for a in range(3)]
        (axis,) = [a for a in range(3) if extent[a] == 1 and full[a] > 1]
        thin.add(axis)
    assert thin == axes


def test_background_channel_is_never_read(rng):
    probs = torch.from_numpy(rng.random((1, 3, 6, 7))).requires_grad_()
    plan = planned((1, 3, 6, 7), [[[1, 1, 1, 5, 5], [2, 0, 0, 3, 7]]], 2)
    segments, slots = box_sums(probs, plan)
    (grad,) = torch.autograd.grad(segments.sum() + slots.sum(), probs)
    assert (grad[:, 0] == 0).all() and (grad[:, 1:] > 0).all()


# Precision


@pytest.mark.parametrize("slice_axis", [None, 2])
def test_exact_in_a_large_volume(slice_axis, rng):
    shape = (1, 2, 256, 256, 128)
    values = rng.random(shape, dtype=np.float32)
    rows = [[1, 3, 5, 2, 251, 250, 126]] if slice_axis is None else [[1, 3, 5, z, 251, 250, z + 1] for z in (0, 64)]
    plan = planned(shape, [rows], 5, slice_axis)
    segments, slots = box_sums(torch.from_numpy(values), plan)
    volume = values[0, 1]
    if slice_axis is None:
        inside = volume[3:251, 5:250, 2:126].astype(np.float64)
        expected = [inside[k : k + 5].sum() for k in range(0, 248, 5)]
        expected += [inside[:, k : k + 5].sum() for k in range(0, 245, 5)]
        expected += [inside[:, :, k : k + 5].sum() for k in range(0, 124, 5)]
        assert slots[0, 0, 0].item() == pytest.approx(volume.sum(dtype=np.float64), abs=1e-4)
        assert slots[0, 0, 1].item() == pytest.approx(inside.sum(), abs=1e-4)
    else:
        slices = [volume[3:251, 5:250, z].astype(np.float64) for z in (0, 64)]
        expected = [s[k : k + 5].sum() for s in slices for k in range(0, 248, 5)]
        expected += [s[:, k : k + 5].sum() for s in slices for k in range(0, 245, 5)]
        assert slots[64, 0, 0].item() == pytest.approx(volume[:, :, 64].sum(dtype=np.float64), abs=1e-4)
    assert segments.dtype == slots.dtype == torch.float64
    np.testing.assert_allclose(np.sort(segments.numpy()), np.sort(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["2D, three overlap in one place", "3D, classes and overlaps", "slices 0", "slices 2"])
def test_gradcheck(name, rng):
    shape, rows, width, slice_axis = CASES[name]
    small = (shape[0], shape[1], *shape[2:])
    probs = torch.from_numpy(rng.random(small)).requires_grad_()
    plan = planned(small, rows, width, slice_axis)
    assert torch.autograd.gradcheck(lambda p: box_sums(p, plan), probs, fast_mode=True)


def test_gradcheck_of_every_entry(rng):
    probs = torch.from_numpy(rng.random((1, 3, 5, 4, 3))).requires_grad_()
    plan = planned(probs.shape, [[[1, 0, 1, 0, 4, 4, 3], [1, 2, 0, 1, 5, 3, 3], [2, -1, 0, 0, 3, 4, 2]]], 2)
    assert torch.autograd.gradcheck(lambda p: box_sums(p, plan), probs)


DERIVATIVES = [
    ((2, 3, 5, 6), [[[1, 0, 1, 4, 4], [2, 1, 1, 3, 6]], [[1, 1, 0, 4, 3]]], None),
    ((1, 2, 4, 5, 3), [[[1, 0, 1, 0, 3, 4, 3]]], None),
    ((1, 3, 4, 5, 3), [[[1, 0, 1, 1, 3, 4, 2], [2, 1, 1, 2, 4, 5, 3]]], 2),
]


@pytest.mark.parametrize(("shape", "rows", "slice_axis"), DERIVATIVES)
def test_second_and_forward_derivatives(shape, rows, slice_axis, rng):
    """What bilevel methods take: double backward and forward mode."""
    probs = torch.from_numpy(rng.random(shape)).requires_grad_()
    plan = planned(shape, rows, 2, slice_axis)

    def squares(values):
        segments, slots = box_sums(values, plan)
        return segments.square().sum() + slots.square().sum()

    assert torch.autograd.gradcheck(squares, probs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(squares, probs, check_fwd_over_rev=True)


@pytest.mark.parametrize(("shape", "rows", "slice_axis"), DERIVATIVES)
def test_torch_func(shape, rows, slice_axis, rng):
    """The whole loss inside `torch.func.grad`, where tensors may have no data of their own."""
    loss = BoxPriorLoss(LogBarrierExtension(), softmax=True, width=2, slice_axis=slice_axis)
    logits = torch.from_numpy(rng.normal(size=shape)).requires_grad_()
    width = 1 + 2 * (len(shape) - 2)
    boxes = torch.full((len(rows), max(map(len, rows)), width), -1)
    for sample, own in enumerate(rows):
        boxes[sample, : len(own)] = torch.tensor(own)
    loss(logits, boxes).backward()
    gradient = torch.func.grad(lambda values: loss(values, boxes))(logits.detach())
    torch.testing.assert_close(gradient, logits.grad)


@table
def test_float32_gradient(shape, rows, width, slice_axis, rng):
    plan = planned(shape, rows, width, slice_axis)
    factors = (
        torch.from_numpy(rng.normal(size=plan.num_segments)),
        torch.from_numpy(rng.normal(size=plan.starts.shape[:3])),
    )
    grads = []
    for dtype in (torch.float32, torch.float64):
        probs = torch.zeros(shape, dtype=dtype, requires_grad=True)
        sums = box_sums(probs, plan)
        sum((s * f).sum() for s, f in zip(sums, factors, strict=True)).backward()
        assert probs.grad.dtype == dtype and probs.grad.shape == shape
        grads.append(probs.grad.double())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["3D, classes and overlaps", "slices 0", "2D, many on top of each other"])
def test_half_precision_is_summed_exactly(dtype, name, rng):
    shape, rows, width, slice_axis = CASES[name]
    probs = torch.from_numpy(rng.random(shape)).to(dtype).requires_grad_()
    plan = planned(shape, rows, width, slice_axis)
    sums = box_sums(probs, plan)
    for own, exact in zip(sums, box_sums(probs.detach().double(), plan), strict=True):
        assert torch.equal(own, exact)
    sum(s.sum() for s in sums).backward()
    assert probs.grad.dtype == dtype and probs.grad.isfinite().all()


def test_half_precision_does_not_overflow():
    probs = torch.ones(1, 1, 64, 64, 32, dtype=torch.float16)  # 131,072 voxels
    _, slots = box_sums(probs, planned(probs.shape, [[[1, 0, 0, 0, 64, 64, 32]]]))
    assert slots.flatten().tolist() == [131_072.0, 131_072.0]


@pytest.mark.parametrize("name", ["2D, classes overlap", "3D, classes and overlaps", "slices 1"])
def test_autocast_changes_nothing(name, rng):
    values, plan = torch.from_numpy(rng.random(CASES[name][0])).float(), planned(*CASES[name])
    results = []
    for enabled in (False, True):
        probs = values.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            segments, slots = box_sums(probs, plan)
            loss = segments.square().sum() + slots.square().sum()
            loss.backward()  # within autocast, where matrix products would lose their digits
        results.append((segments.detach(), slots.detach(), probs.grad, inside_mask(plan)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("layout", ["channels last", "transposed", "expanded"])
def test_memory_layout_is_no_matter(layout, rng):
    shape, rows, width, slice_axis = CASES["3D, classes and overlaps"]
    probs, plan = torch.from_numpy(rng.random(shape)), planned(shape, rows, width, slice_axis)
    if layout == "channels last":
        other = probs.contiguous(memory_format=torch.channels_last_3d)
    elif layout == "transposed":
        other = probs.transpose(2, 4).contiguous().transpose(2, 4)
    else:
        probs = probs[:1].expand(shape)
        other = probs.clone()
    assert all(torch.equal(a, b) for a, b in zip(box_sums(probs, plan), box_sums(other, plan), strict=True))


# Symmetries


def flipped(rows, shape, axis):
    """Rows in an image that is flipped along a spatial axis."""
    dims, out = len(shape) - 2, []
    for sample in rows:
        own = [list(row) for row in sample]
        for row in own:
            if row[0] > 0:
                start, stop = row[1 + axis], row[1 + dims + axis]
                row[1 + axis], row[1 + dims + axis] = shape[2 + axis] - stop, shape[2 + axis] - start
        out.append(own)
    return out


@pytest.mark.parametrize(
    ("name", "axis"),
    [("2D, widths that divide", 0), ("2D, cut and overlapping", 1), ("3D, classes and overlaps", 2), ("slices 1", 1)],
)
def test_flip_of_image_and_boxes(name, axis, rng):
    """With one line a band, nothing depends on the end a box is counted from."""
    shape, rows, _, slice_axis = CASES[name]
    probs = torch.from_numpy(rng.random(shape))
    plain = planned(shape, rows, 1, slice_axis)
    turned = planned(shape, flipped(rows, shape, axis), 1, slice_axis)
    own, other = box_sums(probs, plain)[0], box_sums(probs.flip(2 + axis), turned)[0]
    np.testing.assert_allclose(np.sort(own.numpy()), np.sort(other.numpy()))
    masses = union_mass(probs, plain), union_mass(probs.flip(2 + axis), turned)
    np.testing.assert_allclose(np.sort(masses[0].flatten().numpy()), np.sort(masses[1].flatten().numpy()), atol=1e-9)


def test_permutation_of_classes(rng):
    shape, rows, width, _ = CASES["2D, classes overlap"]
    order = {1: 3, 2: 1, 3: 2, -1: -1}
    moved = [[[order[row[0]], *row[1:]] for row in sample] for sample in rows]
    probs = torch.from_numpy(rng.random(shape))
    changed = probs.clone()
    for old in (1, 2, 3):
        changed[:, order[old]] = probs[:, old]
    own, other = (
        union_mass(probs, planned(*CASES["2D, classes overlap"])),
        union_mass(changed, planned(shape, moved, width)),
    )
    assert torch.equal(own[:, [1, 2, 0]], other)


def test_order_of_the_rows_is_no_matter(rng):
    shape, rows, width, _ = CASES["2D, four corners overlap"]
    probs = torch.from_numpy(rng.random(shape))
    plans = [planned(shape, [list(order)], width) for order in itertools.permutations(rows[0])]
    sums = [bands_and_sums(plan, box_sums(probs, plan)[0]) for plan in plans]
    for other in sums[1:]:
        np.testing.assert_allclose(other, sums[0])
    torch.testing.assert_close(union_mass(probs, plans[0]), union_mass(probs, plans[-1]))


def test_random_boxes(rng, box_prior_reference):
    """Layouts that nobody thought of."""
    for _ in range(40):
        dims = int(rng.integers(2, 4))
        shape = (int(rng.integers(1, 3)), int(rng.integers(1, 4)), *rng.integers(3, 10, dims).tolist())
        slice_axis = int(rng.integers(0, 3)) if dims == 3 and rng.random() < 0.5 else None
        rows = []
        for _ in range(shape[0]):
            own = []
            for _ in range(rng.integers(0, 6)):
                start = [int(rng.integers(-2, n)) for n in shape[2:]]
                stop = [int(rng.integers(max(s, 0) + 1, n + 3)) for s, n in zip(start, shape[2:], strict=True)]
                if slice_axis is not None:
                    start[slice_axis] = max(start[slice_axis], 0)
                    stop[slice_axis] = start[slice_axis] + 1
                own.append([int(rng.integers(1, max(shape[1], 2))), *start, *stop])
            rows.append(own)
        width, probs = int(rng.integers(1, 6)), rng.random(shape)
        plan = planned(shape, rows, width, slice_axis)
        segments, _ = box_sums(torch.from_numpy(probs), plan)
        expected = sorted(row[:3] for row in box_prior_reference.band_table(probs, rows, width, slice_axis))
        np.testing.assert_allclose(bands_and_sums(plan, segments), np.array(expected).reshape(-1, 3), atol=1e-10)
        mass = union_mass(torch.from_numpy(probs), plan)
        num_classes, first = box_prior_reference.foreground_of(probs)
        for image, (_, own, own_rows) in enumerate(box_prior_reference.images_of(probs, rows, slice_axis)):
            for k in range(num_classes):
                union = box_prior_reference.union_of([r for r in own_rows if r[0] == k + 1], own.shape[1:])
                assert mass[image, k].item() == pytest.approx(own[k + first][union].sum(), abs=1e-9)


# Refusals

SHAPE = (2, 3, 8, 9)
GOOD = [1, 0, 0, 4, 4]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([0, 1, 1, 4, 4], r"has a class outside 1\.\.2; class 0 is the background and -1 marks padding"),
        ([3, 1, 1, 4, 4], r"has a class outside 1\.\.2"),
        ([1, 4, 1, 4, 4], "is empty or inverted; each stop must be above its start"),
        ([1, 5, 1, 4, 4], "is empty or inverted"),
        ([1, 8, 1, 10, 4], r"lies outside the image of shape \(8, 9\)"),
        ([1, -5, 1, 0, 4], r"lies outside the image of shape \(8, 9\).*BoxesToGridd"),
    ],
)
def test_a_bad_row_is_named(bad, words):
    boxes = torch.tensor([[GOOD, GOOD, PAD2], [GOOD, PAD2, bad]])
    with pytest.raises(ValueError, match=rf"boxes: row 2 of sample 1, \[{', '.join(map(str, bad))}\], {words}"):
        plan_boxes(boxes, SHAPE)


def test_a_box_thicker_than_its_slice_is_named():
    boxes = torch.tensor([[[1, 0, 0, 2, 4, 4, 3]], [[1, 0, 0, 2, 4, 4, 4]]])
    with pytest.raises(
        ValueError, match=r"row 0 of sample 1, .*is not one voxel thick along slice_axis 2; draw a flat"
    ):
        plan_boxes(boxes, (2, 2, 8, 8, 8), slice_axis=2)


def test_a_class_below_the_padding_is_refused():
    with pytest.raises(ValueError, match=r"row 0 of sample 0, .*has a class outside 1\.\.2"):
        plan_boxes(torch.tensor([[[-5, 0, 0, 4, 4]], [GOOD]]), SHAPE)


def test_a_thick_box_is_not_flat_because_the_border_cuts_it():
    with pytest.raises(ValueError, match=r"row 0 of sample 0, .*is not one voxel thick"):
        plan_boxes(torch.tensor([[[1, 0, 0, -3, 4, 4, 1]]]), (1, 2, 8, 8, 8), slice_axis=2)


@pytest.mark.parametrize(
    "boxes",
    [torch.zeros(2, 1, 5), torch.zeros(2, 1, 5, dtype=torch.float16), torch.ones(2, 1, 5, dtype=torch.bool), [[GOOD]]],
    ids=["float32", "float16", "bool", "list"],
)
def test_only_integer_tensors(boxes):
    with pytest.raises(TypeError, match=r"boxes: expected an integer tensor .*round voxel coordinates first"):
        plan_boxes(boxes, SHAPE)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_type(dtype):
    plan = plan_boxes(torch.tensor([[GOOD], [GOOD]], dtype=dtype), SHAPE)
    assert plan.box_volume.tolist() == [[16.0, 0.0], [16.0, 0.0]]


@pytest.mark.parametrize(
    "shape", [(1, 1, 5), (3, 1, 5), (2, 1, 7), (2, 5), (2, 1, 1, 5)], ids=["B=1", "B=3", "3D rows", "2 axes", "4 axes"]
)
def test_shape_of_the_boxes(shape):
    with pytest.raises(ValueError, match=r"boxes: expected shape \(2, N, 5\), .*for 2D images.*pad_boxes_collate"):
        plan_boxes(torch.full(shape, -1), SHAPE)


@pytest.mark.parametrize("width", [0, -1, 2.5])
def test_width_is_a_positive_integer(width):
    with pytest.raises(ValueError, match=f"width: expected an integer >= 1 .*got {width}"):
        plan_boxes(torch.zeros(2, 0, 5, dtype=torch.int64), SHAPE, width=width)


@pytest.mark.parametrize(("shape", "axis"), [((1, 2, 8, 9), 0), ((1, 2, 8, 9, 7), 3), ((1, 2, 8, 9, 7), -1)])
def test_slice_axis_exists(shape, axis):
    rows = torch.zeros(1, 0, 2 * len(shape) - 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"slice_axis: expected None, or 0, 1 or 2 for 3D volumes, got {axis}"):
        plan_boxes(rows, shape, slice_axis=axis)


def test_boxes_are_not_changed():
    boxes = torch.tensor([[[1, -2, 1, 4, 20]], [PAD2]])
    before = boxes.clone()
    plan_boxes(boxes, SHAPE)
    assert torch.equal(boxes, before)
