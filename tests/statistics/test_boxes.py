"""Sums over boxes and bands: against the slow reference, in many layouts, precisions and symmetries."""

import itertools

import numpy as np
import pytest
import torch

from medconstraints.statistics import box_sums, inside_mask, plan_boxes

PAD2, PAD3 = [-1] * 5, [-1] * 7
MANY = {
    "2D, many on top of each other": ((1, 2, 24, 24), [[[1, k, k, 24 - k, 23 - k] for k in range(10)]], 4, None),
    "slices 1, many on top of each other": (
        (1, 2, 14, 3, 14),
        [[[1, k // 2, 1, 0, 14, 2, 14 - k // 3] for k in range(12)]],
        3,
        1,
    ),
}

# name: shape of the probabilities, rows of each sample, width, slice_axis
CASES = {
    "2D, last band of one line": ((1, 2, 12, 10), [[[1, 1, 2, 12, 9]]], 5, None),
    "2D, one channel, whole image, width above": ((1, 1, 7, 8), [[[1, 0, 0, 7, 8]]], 50, None),
    "2D, padding between": (
        (2, 3, 8, 9),
        [[PAD2, [2, 1, 1, 4, 5], PAD2], [[1, 0, 0, 3, 3], PAD2, [2, 5, 5, 8, 9]]],
        2,
        None,
    ),
    "2D, two touch": ((1, 2, 12, 12), [[[1, 1, 2, 5, 8], [1, 5, 2, 9, 8]]], 3, None),
    "2D, four corners overlap": (
        (1, 2, 10, 10),
        [[[1, 0, 0, 6, 6], [1, 4, 4, 10, 10], [1, 0, 4, 6, 10], [1, 4, 0, 10, 6]]],
        2,
        None,
    ),
    "2D, identical": ((1, 2, 9, 9), [[[1, 2, 2, 7, 6], [1, 2, 2, 7, 6], [1, 2, 2, 7, 6]]], 2, None),
    "2D, classes overlap": (
        (2, 4, 10, 11),
        [[[1, 1, 1, 8, 8], [2, 3, 3, 10, 11], [3, 0, 0, 4, 9]], [PAD2, [3, 2, 2, 3, 9], PAD2]],
        3,
        None,
    ),
    "2D, one voxel and one line": ((1, 2, 6, 8), [[[1, 2, 3, 3, 4], [1, 2, 1, 3, 8], [1, 0, 0, 6, 1]]], 3, None),
    "2D, cut on two sides and overlapping": ((1, 2, 9, 9), [[[1, -1, 2, 5, 12], [1, 2, 3, 8, 8]]], 2, None),
    "2D, cut to one line": ((1, 2, 9, 9), [[[1, -4, 2, 1, 7]]], 2, None),
    "2D, only padding": ((2, 3, 6, 7), [[PAD2, PAD2], [PAD2, PAD2]], 3, None),
    "3D, classes and overlaps": (
        (2, 3, 9, 8, 7),
        [
            [[1, 0, 0, 0, 6, 6, 6], [1, 3, 3, 3, 9, 8, 7], [2, 1, 1, 1, 5, 7, 6]],
            [[2, 0, 0, 0, 5, 5, 5], [2, 2, 2, 2, 7, 7, 7], [2, 3, 1, 2, 6, 4, 5]],
        ],
        2,
        None,
    ),
    "3D, flat, column, voxel": (
        (1, 2, 6, 7, 8),
        [[[1, 2, 1, 0, 3, 6, 8], [1, 4, 1, 0, 5, 2, 8], [1, 5, 5, 5, 6, 6, 6]]],
        2,
        None,
    ),
    "3D, cut along one axis": ((1, 2, 6, 7, 8), [[[1, -2, 1, 1, 4, 6, 7]]], 2, None),
    "3D, no boxes": ((1, 3, 4, 5, 6), [[]], 2, None),
    "slices 0": (
        (2, 3, 4, 7, 8),
        [[[1, 0, 1, 1, 1, 6, 7], [1, 0, 3, 3, 1, 7, 8], [2, 3, 0, 0, 4, 7, 8]], [[2, 1, 2, 2, 2, 3, 3], PAD3, PAD3]],
        2,
        0,
    ),
    "slices 1": ((1, 2, 7, 4, 8), [[[1, 1, 0, 1, 6, 1, 7], [1, -2, 3, 2, 4, 4, 7]]], 3, 1),
    "slices 2, one channel": ((2, 1, 7, 8, 4), [[[1, 1, 1, 0, 6, 7, 1]], [[1, 0, 0, 3, 7, 8, 4]]], 3, 2),
    **MANY,
}


def tensor_of(rows, dims):
    """Padded boxes (B, N, 1 + 2 D)."""
    boxes = torch.full((len(rows), max(map(len, rows)), 1 + 2 * dims), -1)
    for sample, own in enumerate(rows):
        if own:
            boxes[sample, : len(own)] = torch.tensor(own)
    return boxes


def planned(shape, rows, width=5, slice_axis=None):
    return plan_boxes(tensor_of(rows, len(shape) - 2), shape, width=width, slice_axis=slice_axis)


def bands_and_sums(plan, sums):
    """Sorted (group, lines, mass): the order of the bands is no promise."""
    columns = zip(plan.bands.group.tolist(), plan.bands.width.tolist(), sums.bands.tolist(), strict=True)
    return np.array(sorted(columns)).reshape(-1, 3)


# Values and gradients


def assert_equals_the_reference(shape, rows, width, slice_axis, rng, reference):
    probs = torch.from_numpy(rng.random(shape)).requires_grad_()
    plan = planned(shape, rows, width, slice_axis)
    sums, mask = box_sums(probs, plan), inside_mask(plan)
    array = probs.detach().numpy()
    table = reference.band_table(array, rows, width, slice_axis)
    np.testing.assert_allclose(
        bands_and_sums(plan, sums), np.array(sorted(row[:3] for row in table)).reshape(-1, 3), atol=1e-10
    )
    masks = []
    for band in sums.bands:
        (grad,) = torch.autograd.grad(band, probs, retain_graph=True)
        assert ((grad == 0) | (grad == 1)).all()
        masks.append(grad.bool().numpy().tobytes())
    assert sorted(masks) == sorted(own.tobytes() for *_, own in table)

    images = reference.images_of(array, rows, slice_axis)
    num_classes, first = reference.foreground_of(array)
    assert plan.shape == images[0][1].shape[1:] and mask.shape[:2] == (len(images), num_classes)
    (grad,) = torch.autograd.grad(sums.inside.sum() + 2 * sums.total.sum(), probs)
    where = reference.images_of(grad.numpy(), rows, slice_axis)
    for image, (_, own, own_rows) in enumerate(images):
        for k in range(num_classes):
            channel, mine = own[k + first], [row for row in own_rows if row[0] == k + 1]
            union = reference.union_of(mine, channel.shape)
            np.testing.assert_array_equal(mask[image, k].numpy(), union)
            np.testing.assert_array_equal(where[image][1][k + first], 2.0 + union)
            assert sums.total[image, k].item() == pytest.approx(channel.sum(), abs=1e-9)
            assert sums.inside[image, k].item() == pytest.approx(channel[union].sum(), abs=1e-9)
            assert plan.cut[image, k] == any(any(reference.visible(row, channel.shape)[1]) for row in mine)
            assert plan.volume[image, k] == union.sum()
    assert (grad[:, :first] == 0).all()


@pytest.mark.parametrize(("shape", "rows", "width", "slice_axis"), CASES.values(), ids=CASES)
def test_equals_the_reference(shape, rows, width, slice_axis, rng, box_prior_reference):
    assert_equals_the_reference(shape, rows, width, slice_axis, rng, box_prior_reference)


def test_random_boxes(rng, box_prior_reference):
    """Layouts that nobody thought of."""
    for _ in range(30):
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
        assert_equals_the_reference(shape, rows, int(rng.integers(1, 6)), slice_axis, rng, box_prior_reference)


def test_few_overlaps_are_corrected_and_many_left_to_a_mask():
    assert planned(*CASES["2D, four corners overlap"]).slots.sign.abs().sum() == 4 + 6 + 4 + 1
    assert all(planned(*case).slots.sign is None for case in MANY.values())
    apart = [[[1, 4 * i, 4 * j, 4 * i + 3, 4 * j + 3] for i in range(8) for j in range(8)]]
    sign = planned((1, 2, 32, 32), apart).slots.sign
    assert sign.shape == (1, 1, 64) and (sign == 1).all()


def test_every_line_lies_in_exactly_one_band():
    for width, extent in itertools.product([1, 2, 3, 5, 11, 12, 100], [2, 3, 5, 10, 12]):
        plan = planned((1, 2, 14, 3), [[[1, 1, 0, 1 + extent, 3]]], width)
        rows = torch.zeros(1, 2, 14, 3, dtype=torch.float64, requires_grad=True)
        across = plan.bands.width.tolist()[: -(-extent // width)]
        assert sum(across) == extent and set(across[:-1]) <= {width} and 1 <= across[-1] <= width
        (grad,) = torch.autograd.grad(box_sums(rows, plan).bands[: len(across)].sum(), rows)
        expected = torch.zeros_like(grad)
        expected[0, 1, 1 : 1 + extent] = 1
        assert torch.equal(grad, expected)


@pytest.mark.parametrize(
    ("row", "axes"),
    [
        ([1, 1, 1, 1, 5, 6, 7], [0, 1, 2]),
        ([1, -1, 1, 1, 5, 6, 7], [0]),
        ([1, 1, 1, 1, 5, 6, 9], [2]),
        ([1, -1, 1, 1, 5, 6, 9], []),
        ([1, 2, 1, 1, 3, 6, 7], [1, 2]),
        ([1, 2, 3, 1, 3, 4, 7], [2]),
        ([1, 2, 3, 4, 3, 4, 5], [0]),
    ],
)
def test_axes_that_have_bands(row, axes):
    """Only lines that run along uncut axes are evidence; a single voxel is one band."""
    plan = planned((1, 2, 6, 7, 8), [[row]], width=100)
    lines = [min(row[4 + axis], plan.shape[axis]) - max(row[1 + axis], 0) for axis in axes]
    assert plan.bands.width.tolist() == lines


# Precision


@pytest.mark.parametrize("slice_axis", [None, 2])
def test_exact_in_a_large_volume(slice_axis, rng):
    shape = (1, 2, 256, 256, 64)
    values = rng.random(shape, dtype=np.float32)
    rows = [[1, 3, 5, 2, 251, 250, 62]] if slice_axis is None else [[1, 3, 5, z, 251, 250, z + 1] for z in (0, 32)]
    plan = planned(shape, [rows], 5, slice_axis)
    sums = box_sums(torch.from_numpy(values), plan)
    volume = values[0, 1]
    if slice_axis is None:
        inside = volume[3:251, 5:250, 2:62].astype(np.float64)
        expected = [inside[k : k + 5].sum() for k in range(0, 248, 5)]
        expected += [inside[:, k : k + 5].sum() for k in range(0, 245, 5)]
        expected += [inside[:, :, k : k + 5].sum() for k in range(0, 60, 5)]
        assert sums.inside.item() == pytest.approx(inside.sum(), abs=1e-4)
    else:
        slices = [volume[3:251, 5:250, z].astype(np.float64) for z in (0, 32)]
        expected = [s[k : k + 5].sum() for s in slices for k in range(0, 248, 5)]
        expected += [s[:, k : k + 5].sum() for s in slices for k in range(0, 245, 5)]
    assert sums.total.sum().item() == pytest.approx(volume.sum(dtype=np.float64), abs=1e-4)
    assert all(values.dtype == torch.float64 for values in sums)
    np.testing.assert_allclose(np.sort(sums.bands.numpy()), np.sort(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["2D, classes overlap", "2D, cut on two sides and overlapping", "slices 1", "2D, many on top of each other"]
)
def test_second_and_forward_derivatives(name, rng):
    """What bilevel methods take: double backward and forward mode."""
    plan = planned(*CASES[name])
    probs = torch.from_numpy(rng.random(CASES[name][0])).requires_grad_()

    def squares(values):
        return sum(part.square().sum() for part in box_sums(values, plan))

    assert torch.autograd.gradcheck(squares, probs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(squares, probs, check_fwd_over_rev=True, fast_mode=True)


def test_gradcheck_of_every_entry(rng):
    probs = torch.from_numpy(rng.random((1, 3, 5, 4, 3))).requires_grad_()
    plan = planned(probs.shape, [[[1, 0, 1, 0, 4, 4, 3], [1, 2, 0, 1, 5, 3, 3], [2, -1, 0, 0, 3, 4, 2]]], 2)
    assert torch.autograd.gradcheck(lambda p: tuple(box_sums(p, plan)), probs)


@pytest.mark.parametrize("name", ["3D, classes and overlaps", "slices 0", "2D, many on top of each other"])
def test_lower_precision(name, rng):
    """Sums of half precision are those of its values in double; gradients have the type of the input."""
    plan = planned(*CASES[name])
    factors = [torch.from_numpy(rng.normal(size=part.shape)) for part in box_sums(torch.zeros(CASES[name][0]), plan)]
    grads = {}
    for dtype in (torch.float16, torch.float32, torch.float64):
        probs = torch.from_numpy(rng.random(CASES[name][0])).to(dtype).requires_grad_()
        sums = box_sums(probs, plan)
        assert all(map(torch.equal, sums, box_sums(probs.detach().double(), plan)))
        sum((part * factor).sum() for part, factor in zip(sums, factors, strict=True)).backward()
        assert probs.grad.dtype == dtype
        grads[dtype] = probs.grad.double()
    torch.testing.assert_close(grads[torch.float32], grads[torch.float64], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads[torch.float16], grads[torch.float64], rtol=2e-3, atol=2e-3)


def test_half_precision_does_not_overflow():
    probs = torch.ones(1, 1, 64, 64, 32, dtype=torch.float16)  # 131,072 voxels
    sums = box_sums(probs, planned(probs.shape, [[[1, 0, 0, 0, 64, 64, 32]]]))
    assert sums.total.item() == sums.inside.item() == 131_072.0


@pytest.mark.parametrize("name", ["3D, classes and overlaps", "slices 1"])
def test_autocast_and_memory_layout_are_no_matter(name, rng):
    values, plan = torch.from_numpy(rng.random(CASES[name][0])).float(), planned(*CASES[name])
    results = []
    for enabled, layout in ((False, torch.contiguous_format), (True, torch.channels_last_3d)):
        probs = values.clone(memory_format=layout).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            sums = box_sums(probs, plan)
            sum(part.square().sum() for part in sums).backward()  # where matrix products would lose their digits
        results.append((*sums, probs.grad, inside_mask(plan)))
    assert all(map(torch.equal, *results))


def test_the_background_may_be_left_out(rng):
    shape, rows, width, slice_axis = CASES["3D, classes and overlaps"]
    probs, plan = torch.from_numpy(rng.random(shape)).requires_grad_(), planned(shape, rows, width, slice_axis)
    foreground = probs.detach()[:, 1:].requires_grad_()
    for values in (probs, foreground):
        sum(part.square().sum() for part in box_sums(values, plan)).backward()
    assert torch.equal(foreground.grad, probs.grad[:, 1:])


# Symmetries


@pytest.mark.parametrize(
    ("name", "axis"), [("2D, cut on two sides and overlapping", 1), ("3D, classes and overlaps", 2), ("slices 1", 1)]
)
def test_flip_of_image_and_boxes(name, axis, rng):
    """With one line a band, nothing depends on the end a box is counted from."""
    shape, rows, _, slice_axis = CASES[name]
    dims, mirrored = len(shape) - 2, [[[*row] for row in sample] for sample in rows]
    for row in itertools.chain(*mirrored):
        start, stop = row[1 + axis], row[1 + dims + axis]
        row[1 + axis], row[1 + dims + axis] = shape[2 + axis] - stop, shape[2 + axis] - start
    probs = torch.from_numpy(rng.random(shape))
    own = box_sums(probs, planned(shape, rows, 1, slice_axis))
    other = box_sums(probs.flip(2 + axis), planned(shape, mirrored, 1, slice_axis))
    for part, flipped in zip(own, other, strict=True):
        np.testing.assert_allclose(np.sort(part.flatten()), np.sort(flipped.flatten()), atol=1e-9)


def test_order_of_the_rows_is_no_matter(rng):
    shape, rows, width, _ = CASES["2D, four corners overlap"]
    probs = torch.from_numpy(rng.random(shape))
    plans = [planned(shape, [list(order)], width) for order in itertools.permutations(rows[0])]
    for plan in plans[1:]:
        own, first = box_sums(probs, plan), box_sums(probs, plans[0])
        np.testing.assert_allclose(bands_and_sums(plan, own), bands_and_sums(plans[0], first))
        torch.testing.assert_close(own.inside, first.inside)


# Refusals

SHAPE = (2, 3, 8, 9)
GOOD = [1, 0, 0, 4, 4]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([0, 1, 1, 4, 4], r"has a class outside 1\.\.2; class 0 is the background and -1 marks padding"),
        ([3, 1, 1, 4, 4], r"has a class outside 1\.\.2"),
        ([-5, 1, 1, 4, 4], r"has a class outside 1\.\.2"),
        ([1, 4, 1, 4, 4], "is empty or inverted; each stop must be above its start"),
        ([1, 8, 1, 10, 4], r"lies outside the image of shape \(8, 9\)"),
        ([1, -5, 1, 0, 4], r"lies outside the image of shape \(8, 9\).*BoxesToGridd"),
    ],
)
def test_a_bad_row_is_named(bad, words):
    boxes = torch.tensor([[GOOD, GOOD, PAD2], [GOOD, PAD2, bad]])
    with pytest.raises(ValueError, match=rf"boxes: row 2 of sample 1, \[{', '.join(map(str, bad))}\], {words}"):
        plan_boxes(boxes, SHAPE, width=5)


@pytest.mark.parametrize("row", [[1, 0, 0, 2, 4, 4, 4], [1, 0, 0, -3, 4, 4, 1]], ids=["thick", "thick but for a cut"])
def test_a_box_thicker_than_its_slice_is_named(row):
    boxes = torch.tensor([[[1, 0, 0, 2, 4, 4, 3]], [row]])
    with pytest.raises(ValueError, match=r"row 0 of sample 1, .*is not one voxel thick along slice_axis 2; draw a"):
        plan_boxes(boxes, (2, 2, 8, 8, 8), width=5, slice_axis=2)


@pytest.mark.parametrize(
    "boxes", [torch.zeros(2, 1, 5), torch.ones(2, 1, 5, dtype=torch.bool), [[GOOD]]], ids=["float", "bool", "list"]
)
def test_only_integer_tensors(boxes):
    with pytest.raises(TypeError, match=r"boxes: expected an integer tensor .*round voxel coordinates first"):
        plan_boxes(boxes, SHAPE, width=5)


def test_any_integer_type():
    for dtype in (torch.uint8, torch.int16, torch.int32):
        plan = plan_boxes(torch.tensor([[GOOD], [GOOD]], dtype=dtype), SHAPE, width=5)
        assert plan.volume.tolist() == [[16.0, 0.0], [16.0, 0.0]]


@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 1, 7), (2, 5)], ids=["B=1", "3D rows", "2 axes"])
def test_shape_of_the_boxes(shape):
    with pytest.raises(ValueError, match=r"boxes: expected shape \(2, N, 5\), .*for 2D images.*pad_boxes_collate"):
        plan_boxes(torch.full(shape, -1), SHAPE, width=5)


@pytest.mark.parametrize(
    ("argument", "shape", "values"), [("width", SHAPE, {"width": 0}), ("slice_axis", SHAPE, {"slice_axis": 0})]
)
def test_refused_arguments(argument, shape, values):
    with pytest.raises(ValueError, match=f"{argument}: expected"):
        plan_boxes(torch.zeros(2, 0, 5, dtype=torch.int64), shape, **{"width": 5, **values})


def test_probabilities_of_another_shape():
    plan = plan_boxes(torch.full((2, 1, 5), -1), SHAPE, width=5)
    for shape in ((2, 4, 8, 9), (2, 3, 9, 8)):
        with pytest.raises(ValueError, match="probs: expected floating point"):
            box_sums(torch.zeros(shape), plan)


def test_boxes_are_not_changed():
    boxes = torch.tensor([[[1, -2, 1, 4, 20]], [PAD2]])
    before = boxes.clone()
    plan_boxes(boxes, SHAPE, width=5)
    assert torch.equal(boxes, before)
