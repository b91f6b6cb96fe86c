"""The Hausdorff loss: MONAI's values, a slow reference, spacings, given maps, refusals."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.losses import HausdorffDTLoss
from monai.networks import one_hot

from medconstraints.distance.maps import signed_distance
from medconstraints.distance.provenance import RECORD, record
from medconstraints.losses.combined import CombinedLoss
from medconstraints.losses.hausdorff import HausdorffLoss

VOXEL = {"convention": "voxel", "spacing_mm": (1, 1)}
SHAPES = [(9, 7), (7, 6, 5)]
SPACING = {2: (0.7, 1.9), 3: (0.7, 1.3, 2.9)}


def random_logits(shape, dtype=torch.float32, seed=0):
    """Blobs of some voxels, so that distances differ."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for axis in range(2, len(shape)):
        noise = noise + noise.roll(1, axis) + noise.roll(2, axis)
    return noise.to(dtype)


def random_label(shape, classes, seed=1):
    return random_logits((shape[0], classes, *shape[2:]), seed=seed).argmax(1, keepdim=True)


def case(spatial, classes, samples=3):
    """Sample 0 lacks class 1 in the label; the last sample is background alone."""
    label = random_label((samples, 1, *spatial), classes)
    label[0][label[0] == 1] = 0
    label[-1] = 0
    return random_logits((samples, classes, *spatial)), label


# A slow reference


def reference_distance(mask, spacing, convention="boundary"):
    """Unsigned distance of each voxel, from all pairs of voxels of both sides."""
    distance = np.zeros(mask.shape)
    if mask.all() or not mask.any():
        return distance
    for p in np.ndindex(mask.shape):
        best = math.inf
        for q in np.ndindex(mask.shape):
            if mask[p] == mask[q]:
                continue
            steps = [abs(a - b) for a, b in zip(p, q, strict=True)]
            if convention == "boundary":
                steps = [max(step - 0.5, 0.0) for step in steps]
            best = min(best, math.sqrt(sum((n * s) ** 2 for n, s in zip(steps, spacing, strict=True))))
        distance[p] = best - min(spacing) if convention == "published" and mask[p] else best
    return distance


def reference_loss(probs, truth, spacings, *, alpha=2.0, first=1, convention="boundary", slice_axis=None, clip=None):
    """(B, K), with loops over samples, classes and slices."""
    probs, truth = probs.double().numpy(), truth.double().numpy()
    samples, classes = probs.shape[:2]
    value = np.zeros((samples, classes - first))
    for b, c in itertools.product(range(samples), range(first, classes)):
        weight = np.zeros(probs.shape[2:])
        for mask in (probs[b, c] > 0.5, truth[b, c] > 0.5):
            spacing = list(spacings[b])
            if slice_axis is None:
                distance = reference_distance(mask, spacing, convention)
            else:
                del spacing[slice_axis]
                slices = [reference_distance(part, spacing, convention) for part in np.moveaxis(mask, slice_axis, 0)]
                distance = np.moveaxis(np.stack(slices), 0, slice_axis)
            weight += np.minimum(distance, math.inf if clip is None else clip) ** alpha
        value[b, c - first] = ((probs[b, c] - truth[b, c]) ** 2 * weight).mean()
    return torch.from_numpy(value)


def label_map(label, classes, spacings, **options):
    """Signed distances (B, C, *S) of the label."""
    return torch.stack(
        [
            torch.stack([signed_distance(one == number, row, **options) for number in range(classes)])
            for one, row in zip(label[:, 0], spacings, strict=True)
        ]
    )


@pytest.mark.parametrize(
    ("spatial", "options"),
    [
        ((7, 6), {}),
        ((7, 6), {"convention": "voxel", "alpha": 1.0}),
        ((5, 4, 5), {"alpha": 1.5}),
        ((5, 4, 5), {"convention": "voxel"}),
        ((5, 4, 5), {"convention": "published", "clip_mm": 2.0}),
        ((5, 4, 5), {"slice_axis": 0}),
        ((5, 4, 5), {"slice_axis": 2, "clip_mm": 1.5}),
    ],
)
@pytest.mark.parametrize("given", ["spacing", "map"])
def test_against_the_slow_reference(spatial, options, given):
    """Every sample has its own, anisotropic spacing."""
    logits, label = case(spatial, 3)
    probs = logits.softmax(1)
    spacings = [tuple(k * s for s in SPACING[len(spatial)]) for k in (1.0, 0.5, 3.0)]
    names = {"clip": options.get("clip_mm"), **{k: v for k, v in options.items() if k != "clip_mm"}}
    expected = reference_loss(probs, one_hot(label, 3), spacings, **names)
    target = {"label": label, "spacing_mm": torch.tensor(spacings)}
    if given == "map":
        maps = {k: v for k, v in options.items() if k != "alpha"}
        target["distance_map"] = label_map(label, 3, spacings, **maps)
    value = HausdorffLoss(softmax=True, reduction="none", **options)(logits, target)
    assert value.shape == (3, 2) and (expected > 0).any()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-9)


# As MONAI's class


@pytest.mark.parametrize("spatial", SHAPES)
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("include_background", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("batch", [False, True])
def test_is_the_loss_of_monai_at_unit_spacing(spatial, classes, include_background, reduction, batch):
    logits, label = case(spatial, classes)
    words = {"include_background": include_background, "reduction": reduction, "batch": batch, "softmax": True}
    values, grads = [], []
    voxels = {"convention": "voxel", "spacing_mm": (1,) * len(spatial)}
    for loss in (HausdorffLoss(**words, **voxels), HausdorffDTLoss(**words, to_onehot_y=True)):
        own = logits.clone().requires_grad_()
        values.append(loss(own, label).squeeze())
        values[-1].sum().backward()
        grads.append(own.grad)
    assert (values[1] > 0).any()
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "words",
    [
        {"sigmoid": True},
        {"softmax": True, "to_onehot_y": True},
        {"other_act": functools.partial(torch.softmax, dim=1)},
        {"other_act": torch.tanh, "include_background": True},
        {"sigmoid": True, "alpha": 1.0},
        {"sigmoid": True, "alpha": 0.7},
    ],
)
def test_words_of_monai(words):
    logits, label = case((9, 7), 3)
    target = label if words.get("to_onehot_y") else one_hot(label, 3)
    torch.testing.assert_close(
        HausdorffLoss(**words, **VOXEL)(logits, target), HausdorffDTLoss(**words)(logits, target), rtol=1e-5, atol=0
    )


@pytest.mark.filterwarnings("ignore:single channel")
def test_a_single_channel_is_the_foreground():
    logits, label = random_logits((2, 1, 9, 7)), random_label((2, 1, 9, 7), 2)
    for words in ({}, {"to_onehot_y": True}, {"include_background": True}):
        value = HausdorffLoss(sigmoid=True, **words, **VOXEL)(logits, label)
        torch.testing.assert_close(value, HausdorffDTLoss(sigmoid=True)(logits, label.float()), rtol=1e-5, atol=0)


def test_masks_may_overlap_and_be_soft():
    logits, masks = random_logits((2, 3, 9, 7)), random_logits((2, 3, 9, 7), seed=1).sigmoid()
    value = HausdorffLoss(sigmoid=True, **VOXEL)(logits, masks)
    torch.testing.assert_close(value, HausdorffDTLoss(sigmoid=True)(logits, masks), rtol=1e-5, atol=0)


def test_reduction_none_has_a_value_per_sample_and_class():
    logits, label = case((9, 7), 4)
    words = {"softmax": True, "spacing_mm": (1, 1)}
    rows = HausdorffLoss(reduction="none", **words)(logits, label)
    assert rows.shape == (3, 3)
    torch.testing.assert_close(HausdorffLoss(**words)(logits, label), rows.mean())
    torch.testing.assert_close(HausdorffLoss(reduction="sum", **words)(logits, label), rows.sum())
    of_batch = HausdorffLoss(reduction="none", batch=True, **words)(logits, label)
    torch.testing.assert_close(of_batch, rows.mean(0))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32, torch.float64])
def test_class_numbers_of_any_type(dtype):
    logits, label = case((9, 7), 3)
    loss = HausdorffLoss(softmax=True, spacing_mm=(1, 1))
    assert torch.equal(loss(logits, label.to(dtype)), loss(logits, one_hot(label, 3)))


# Spacings


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("convention", ["boundary", "voxel", "published"])
def test_scales_with_the_spacing_to_the_alpha(alpha, convention):
    logits, label = case((7, 6, 5), 3)
    small, large = (
        HausdorffLoss(softmax=True, alpha=alpha, convention=convention, spacing_mm=[k * s for s in SPACING[3]])
        for k in (1, 2.5)
    )
    torch.testing.assert_close(large(logits, label), 2.5**alpha * small(logits, label), rtol=1e-4, atol=0)


def rotated(spacing):
    """An oblique affine (4, 4)."""
    turns = torch.linalg.qr(torch.tensor([[3.0, 1.0, 2.0], [-1.0, 4.0, 1.0], [2.0, -1.0, 5.0]], dtype=torch.float64)).Q
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, :3] = turns * torch.tensor([*spacing, 1.0][:3], dtype=torch.float64)
    affine[:3, 3] = torch.tensor([5.0, -7.0, 11.0])
    return affine


@pytest.mark.parametrize("spatial", SHAPES)
def test_spacing_of_the_affine(spatial):
    logits, label = case(spatial, 3)
    spacing = SPACING[len(spatial)]
    spacings = [spacing, spacing[::-1], spacing]
    loss = HausdorffLoss(softmax=True)
    same = HausdorffLoss(softmax=True, spacing_mm=spacing)(logits, label)
    each = loss(logits, {"label": label, "spacing_mm": spacings})
    unit = HausdorffLoss(softmax=True, spacing_mm=(1,) * len(spatial))(logits, label)
    assert not torch.isclose(same, each) and not torch.isclose(same, unit)
    torch.testing.assert_close(loss(logits, MetaTensor(label, affine=rotated(spacing))), same)
    affines = torch.stack([rotated(row) for row in spacings])
    torch.testing.assert_close(loss(logits, MetaTensor(label, affine=affines)), each)
    torch.testing.assert_close(loss(logits, {"label": MetaTensor(label, affine=affines)}), each)


def test_affine_of_a_2d_image():
    logits, label = case((9, 7), 3)
    own = MetaTensor(label, meta={"affine": torch.diag(torch.tensor([0.7, 1.9, 1.0]))})
    same = HausdorffLoss(softmax=True, spacing_mm=(0.7, 1.9))(logits, label)
    torch.testing.assert_close(HausdorffLoss(softmax=True)(logits, own), same)


def made_map(label, affine, spacing, classes=3):
    """Map (B, C, *S) with the meta data of `SignedDistanceMapd`, the same for all samples."""
    signed = label_map(label, classes, [spacing] * len(label))
    return MetaTensor(signed, affine=affine, meta={RECORD: record(affine, spacing, 1.0)})


def test_which_spacing_counts():
    """The map's, then the target's, then the constructor's, then the affine's of the label."""
    logits, label = case((9, 7), 3)
    meta = MetaTensor(label, affine=rotated((3.0, 4.0)))
    own = HausdorffLoss(softmax=True, spacing_mm=(0.7, 1.9))
    assert torch.equal(own(logits, meta), own(logits, label))
    given = own(logits, {"label": meta, "spacing_mm": (1.0, 2.0)})
    assert torch.equal(given, HausdorffLoss(softmax=True, spacing_mm=(1.0, 2.0))(logits, label))
    assert not torch.isclose(given, own(logits, label))
    signed = made_map(label, rotated((5.0, 0.5)), (5.0, 0.5))
    value = own(logits, {"label": meta, "spacing_mm": (1.0, 2.0), "distance_map": signed})
    torch.testing.assert_close(value, HausdorffLoss(softmax=True, spacing_mm=(5.0, 0.5))(logits, label))
    assert not torch.isclose(value, given)
    # Without the record of how it was made, a map tells no spacing.
    bare = {"label": meta, "spacing_mm": (5.0, 0.5), "distance_map": MetaTensor(signed.as_tensor())}
    torch.testing.assert_close(own(logits, bare), value)


@pytest.mark.parametrize("spatial", SHAPES)
@pytest.mark.parametrize("mapping", [False, True])
def test_a_plain_label_needs_a_spacing(spatial, mapping):
    """No millimetre is taken for granted."""
    logits, label = case(spatial, 3)
    words = (
        r"^spacing_mm: expected the voxel spacing, got a plain label without one; give \"spacing_mm\" with the target.*"
        rf"spacing_mm=\({', '.join(['1.0'] * len(spatial))}\) to count in voxels"
    )
    with pytest.raises(ValueError, match=words):
        HausdorffLoss(softmax=True)(logits, {"label": label} if mapping else label)
    with pytest.raises(ValueError, match="spacing_mm: expected the voxel spacing, got a plain label"):
        HausdorffLoss(softmax=True)(logits, {"label": label, "distance_map": torch.zeros(logits.shape)})


MOVES = {
    "quarter turn": (lambda x: x.transpose(2, 4).flip(2), [[0, 0, 1], [0, 1, 0], [-1, 0, 0]]),
    "other order": (lambda x: x.movedim(4, 2), [[0, 1, 0], [0, 0, 1], [1, 0, 0]]),
    "flip": (lambda x: x.flip(3), [[1, 0, 0], [0, -1, 0], [0, 0, 1]]),
}


@pytest.mark.parametrize(("move", "steps"), MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("combined", [False, True])
def test_a_spacing_beside_a_turned_map_may_be_stale(move, steps, combined):
    """The map follows the turn, the number beside it does not."""
    logits, label = case((6, 5, 4), 3)
    spacing = torch.tensor(SPACING[3])
    expected = HausdorffLoss(softmax=True, spacing_mm=SPACING[3])(logits, label)
    signed = made_map(label, rotated(SPACING[3]), SPACING[3])
    turned = MetaTensor(move(signed.as_tensor()), meta=dict(signed.meta))
    now = rotated(SPACING[3])
    now[:3, :3] = now[:3, :3] @ torch.tensor(steps, dtype=torch.float64)
    turned.affine = now
    target = {"label": move(label), "distance_map": turned, "spacing_mm": spacing.expand(3, -1)}
    loss = HausdorffLoss(softmax=True)
    if combined:
        loss = CombinedLoss({"hausdorff": loss}, keys={"hausdorff": {key: key for key in target}})
    torch.testing.assert_close(loss(move(logits), target), expected, rtol=1e-5, atol=0)
    stale = target | {"distance_map": turned.as_tensor()}  # without its meta data the number counts
    assert torch.isclose(loss(move(logits), stale), expected, rtol=1e-3) == (steps[0][0] == 1)


def test_spacing_of_the_slice_axis_is_not_used():
    logits, label = case((7, 6, 5), 3)
    thin, thick = (HausdorffLoss(softmax=True, slice_axis=2, spacing_mm=(1.0, 2.0, z)) for z in (1.0, 9.0))
    assert torch.equal(thin(logits, label), thick(logits, label))
    assert torch.equal(
        thin(logits, label), HausdorffLoss(softmax=True, slice_axis=-1, spacing_mm=(1, 2, 3))(logits, label)
    )
    slices = logits.movedim(-1, 1).flatten(0, 1), label.movedim(-1, 1).flatten(0, 1)
    torch.testing.assert_close(
        thin(logits, label), HausdorffLoss(softmax=True, spacing_mm=(1.0, 2.0))(*slices), rtol=1e-5, atol=0
    )


# The label's map


def test_a_given_map_is_used():
    logits, label = case((9, 7), 3)
    loss = HausdorffLoss(softmax=True, spacing_mm=(1, 1))
    none, ten = torch.zeros(3, 3, 9, 7), torch.full((3, 3, 9, 7), -10.0)
    difference = loss(logits, {"label": label, "distance_map": ten}) - loss(
        logits, {"label": label, "distance_map": none}
    )
    error = (logits.softmax(1) - one_hot(label, 3))[:, 1:].square().mean()
    torch.testing.assert_close(difference, 100 * error)


def test_a_given_map_is_clipped_and_may_be_in_half_precision():
    logits, label = case((9, 7), 3)
    signed = label_map(label, 3, [(1.0, 1.0)] * 3)
    assert signed.abs().max() > 1.5
    loss = HausdorffLoss(softmax=True, clip_mm=1.5, spacing_mm=(1, 1))
    value = loss(logits, {"label": label, "distance_map": signed})
    torch.testing.assert_close(value, loss(logits, label))
    half = loss(logits, {"label": label, "distance_map": signed.half()})
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, value, rtol=2e-3, atol=0)


def test_how_many_masks_are_measured(monkeypatch):
    calls = []

    def counting(mask, *args, **options):
        calls.append(mask.shape)
        return signed_distance(mask, *args, **options)

    monkeypatch.setattr("medconstraints.losses.hausdorff.signed_distance", counting)
    logits, label = case((5, 4, 3), 3)
    loss = HausdorffLoss(softmax=True, spacing_mm=(1, 1, 1))
    loss(logits, {"label": label, "distance_map": torch.zeros(3, 3, 5, 4, 3)})
    assert calls == [(5, 4, 3)] * 6  # 3 samples, 2 classes
    loss(logits, label)
    assert len(calls) == 6 + 12
    # Images and slices go in one call, of both label and prediction.
    HausdorffLoss(softmax=True, slice_axis=1, spacing_mm=(1, 1, 1))(logits, label)
    HausdorffLoss(softmax=True, spacing_mm=(1, 1))(logits[..., 0], label[..., 0])
    assert calls[18:] == [(12 * 4, 5, 3), (12, 5, 4)]


@pytest.mark.parametrize("key", ["distance_map", "phi"])
def test_in_a_combined_loss(key):
    logits, label = case((7, 6, 5), 3)
    spacing = torch.tensor([SPACING[3]] * 3)
    signed = label_map(label, 3, spacing.tolist())
    own = HausdorffLoss(softmax=True, spacing_mm=SPACING[3])
    keys = {"hausdorff": {"label": "label", "distance_map": key}}
    loss = CombinedLoss({"hausdorff": own}, keys=keys, weights={"hausdorff": 0.1})
    value = loss(logits, {"label": MetaTensor(label), key: MetaTensor(signed)})
    torch.testing.assert_close(value, 0.1 * own(logits, label))
    keys["hausdorff"]["spacing_mm"] = "spacing"
    loss = CombinedLoss({"hausdorff": HausdorffLoss(softmax=True)}, keys=keys)
    torch.testing.assert_close(loss(logits, {"label": label, key: signed, "spacing": spacing}), own(logits, label))


@pytest.mark.parametrize("keys", ["label", {"label": "label"}], ids=["alone", "as a part"])
def test_a_label_in_a_combined_loss_keeps_its_affine(keys):
    logits, label = case((6, 5, 4), 3)
    meta = MetaTensor(label, affine=torch.diag(torch.tensor([1.0, 1.0, 5.0, 1.0])))
    own = HausdorffLoss(softmax=True)
    value = CombinedLoss({"hausdorff": own}, keys={"hausdorff": keys})(MetaTensor(logits), {"label": meta})
    assert type(value) is torch.Tensor
    assert torch.equal(value, own(logits, meta))
    assert torch.equal(value, HausdorffLoss(softmax=True, spacing_mm=(1, 1, 5))(logits, label))
    assert not torch.isclose(value, HausdorffLoss(softmax=True, spacing_mm=(1, 1, 1))(logits, label))


# Invariances, empty masks


@pytest.mark.parametrize("axes", [(2,), (3,), (4,), (2, 3, 4)])
def test_flip(axes):
    logits, label = case((7, 6, 5), 3)
    loss = HausdorffLoss(softmax=True, spacing_mm=SPACING[3])
    torch.testing.assert_close(loss(logits.flip(axes), label.flip(axes)), loss(logits, label), rtol=1e-5, atol=0)


def test_permutations_of_classes_samples_and_axes():
    logits, label = case((7, 6, 5), 3)
    loss = HausdorffLoss(softmax=True, include_background=True, reduction="none", spacing_mm=SPACING[3])
    value, order, masks = loss(logits, label), [2, 0, 1], one_hot(label, 3)
    torch.testing.assert_close(loss(logits[:, order], masks[:, order]), value[:, order])
    torch.testing.assert_close(loss(logits[order], label[order]), value[order])
    turned = HausdorffLoss(softmax=True, include_background=True, reduction="none", spacing_mm=SPACING[3][::-1])
    torch.testing.assert_close(turned(logits.transpose(2, 4), label.transpose(2, 4)), value, rtol=1e-5, atol=0)


def test_a_right_prediction_costs_nothing():
    _, label = case((9, 7), 3)
    assert HausdorffLoss(spacing_mm=(1, 1))(one_hot(label, 3), label).item() == 0


@pytest.mark.parametrize("level", [0.0, 0.3])
def test_an_empty_prediction_is_pulled_by_the_label_alone(level):
    label = torch.zeros(1, 1, 6, 6)
    label[..., 2:5, 1:5] = 1
    probs = torch.full((1, 1, 6, 6), level, requires_grad=True)
    value = HausdorffLoss(spacing_mm=(1, 1))(probs, label)
    value.backward()
    distance = torch.from_numpy(reference_distance(label[0, 0].numpy() > 0, (1.0, 1.0))).float()
    torch.testing.assert_close(value, ((level - label) ** 2 * distance**2).mean())
    assert (probs.grad[label > 0] < 0).all()


@pytest.mark.parametrize("number", [0.0, 1.0])
def test_no_boundary_at_all_gives_zero(number):
    """Label and prediction are each empty or full, as in MONAI's class."""
    probs = torch.full((2, 1, 6, 6), 0.2, requires_grad=True)
    value = HausdorffLoss(spacing_mm=(1, 1))(probs, torch.full((2, 1, 6, 6), number))
    value.backward()
    assert value.item() == 0 and (probs.grad == 0).all()


def test_descent_removes_a_distant_voxel_first():
    """Of two wrong voxels the one far from the label has the larger gradient."""
    label = torch.zeros(1, 1, 12, 12)
    label[..., 1:4, 1:4] = 1
    probs = label.clone()
    probs[..., 2, 4] = probs[..., 10, 10] = 1
    probs.requires_grad_()
    HausdorffLoss(spacing_mm=(1, 1))(probs, label).backward()
    assert probs.grad[0, 0, 10, 10] > 10 * probs.grad[0, 0, 2, 4] > 0
    assert probs.grad.count_nonzero() == 2


# Numerics


@pytest.mark.parametrize("options", [{}, {"slice_axis": 1, "alpha": 1.5}, {"include_background": True, "batch": True}])
def test_gradcheck(options):
    """Far from 1/2 the sides of the voxels are fixed, and the distances are constants."""
    label, wrong = (random_label((2, 1, 3, 2, 3), 3, seed=seed) for seed in (1, 5))
    logits = (3 * one_hot(wrong, 3)).double() + 0.1 * random_logits((2, 3, 3, 2, 3), torch.float64)
    loss = HausdorffLoss(softmax=True, spacing_mm=(1.0, 2.0, 0.5), reduction="none", **options)
    assert (logits.softmax(1) - 0.5).abs().min() > 1e-3
    assert torch.autograd.gradcheck(lambda x: loss(x, label), logits.requires_grad_())


def test_distances_carry_no_gradient():
    logits, label = case((9, 7), 3)
    signed = label_map(label, 3, [(1.0, 1.0)] * 3).requires_grad_()
    own = logits.clone().requires_grad_()
    HausdorffLoss(softmax=True, spacing_mm=(1, 1))(own, {"label": label, "distance_map": signed}).backward()
    assert signed.grad is None and own.grad.isfinite().all() and (own.grad != 0).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_half_precision_does_not_overflow(dtype, reduction):
    """Distances up to 890 mm, squared 792,100."""
    label = torch.zeros(1, 1, 300, 4)
    label[..., :2, :] = 1
    logits = torch.zeros(1, 1, 300, 4, dtype=dtype)
    logits[..., 298:, :] = 1
    logits.requires_grad_()
    value = HausdorffLoss(reduction=reduction, spacing_mm=(3.0, 1.0))(logits, label)
    value.backward()
    distance = 3 * (torch.arange(300) - 1.5).abs()
    weight = distance.square() + distance.flip(0).square()
    expected = float(weight[[0, 1, 298, 299]].sum() / 300)
    assert value.dtype == torch.float32 and logits.grad.dtype == dtype and logits.grad.isfinite().all()
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_autocast_changes_nothing():
    logits, label = case((9, 7), 3)
    loss = HausdorffLoss(softmax=True, spacing_mm=(1, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(logits, label)
    assert inside.dtype == torch.float32 and torch.equal(inside, loss(logits, label))


def test_meta_tensors_give_a_plain_tensor_and_nothing_is_changed():
    logits, label = case((9, 7), 3)
    signed = label_map(label, 3, [(1.0, 1.0)] * 3)
    before = [tensor.clone() for tensor in (logits, label, signed)]
    image = MetaTensor(logits.clone()).requires_grad_()
    value = HausdorffLoss(softmax=True)(image, {"label": MetaTensor(label), "distance_map": MetaTensor(signed)})
    assert type(value) is torch.Tensor
    value.backward()
    assert image.grad.isfinite().all()
    HausdorffLoss(softmax=True, spacing_mm=(1, 1))(logits, {"label": label, "distance_map": signed})
    assert all(torch.equal(a, b) for a, b in zip((logits, label, signed), before, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["auto", "torch", "numba"])
def test_on_an_accelerator(backend):
    logits, label = case((9, 8, 7), 3)
    loss = HausdorffLoss(softmax=True, spacing_mm=SPACING[3], backend=backend)
    value = loss(logits.cuda(), label.cuda())
    assert value.is_cuda
    torch.testing.assert_close(value.cpu(), HausdorffLoss(softmax=True, spacing_mm=SPACING[3])(logits, label))
    assert loss(logits.cuda(), label.cuda() + 1).isnan()


# Refusals


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"alpha": 0.0}, ValueError, r"alpha: expected a finite number > 0, got 0\.0"),
        ({"alpha": -1.0}, ValueError, "alpha: expected .*got -1"),
        ({"alpha": math.nan}, ValueError, "alpha: expected .*got nan"),
        ({"softmax": True, "sigmoid": True}, ValueError, "sigmoid, softmax: expected at most one"),
        ({"softmax": True, "other_act": torch.tanh}, ValueError, "other_act: expected at most one activation"),
        ({"other_act": "tanh"}, TypeError, "other_act: expected None or a function .*got str"),
        ({"reduction": "average"}, ValueError, "average"),
        ({"convention": "centre"}, ValueError, "convention: expected .*got 'centre'"),
        ({"backend": "cupy"}, ValueError, "backend: expected .*got 'cupy'"),
        ({"clip_mm": 0.0}, ValueError, r"clip_mm: expected .*got 0\.0"),
        ({"clip_mm": math.nan}, ValueError, "clip_mm: expected .*got nan"),
        ({"slice_axis": 3}, ValueError, "slice_axis: expected .*got 3"),
        ({"spacing_mm": (1.0,)}, ValueError, r"spacing_mm: expected .*got \(1\.0,\)"),
        ({"spacing_mm": (1.0, 0.0)}, ValueError, "spacing_mm: expected .*got"),
        ({"spacing_mm": 1.0}, ValueError, r"spacing_mm: expected .*got 1\.0"),
        ({"spacing_mm": [[1.0, 1.0]]}, ValueError, r"spacing_mm: expected .*got \[\[1"),
    ],
)
def test_refuses_senseless_settings(options, error, words):
    with pytest.raises(error, match=words):
        HausdorffLoss(**options)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"segmentation": torch.zeros(2, 1, 6, 5)}, r"target: expected a label, .*\"label\".*got \['segmentation'\]"),
        ({"label": [[0]]}, r"target: expected a label, .*got \['label'\]"),
        (3.0, "target: expected a label, .*got float"),
        (torch.zeros(2, 6, 5), r"label: expected class numbers .*\(2, 1, 6, 5\).*or.*\(2, 3, 6, 5\), got \(2, 6, 5\)"),
        (torch.zeros(2, 2, 6, 5), r"label: expected class numbers .*got \(2, 2, 6, 5\)"),
        (torch.zeros(1, 1, 6, 5), r"label: expected class numbers .*got \(1, 1, 6, 5\)"),
        (torch.full((2, 1, 6, 5), 0.5), r"label: expected whole class numbers 0\.\.2, got 0\.5; .*nearest"),
        (torch.full((2, 1, 6, 5), math.nan), r"label: expected whole class numbers 0\.\.2, got nan"),
        (torch.full((2, 1, 6, 5), 3), r"label: expected whole class numbers 0\.\.2, got 3"),
        (torch.full((2, 1, 6, 5), -1), r"label: expected whole class numbers 0\.\.2, got -1"),
        (torch.full((2, 3, 6, 5), 2), r"label: expected masks with values in 0\.\.1, got 2"),
    ],
)
def test_refuses_what_is_no_label(target, words):
    with pytest.raises(ValueError, match=words):
        HausdorffLoss(softmax=True, spacing_mm=(1, 1))(torch.zeros(2, 3, 6, 5), target)


def test_refuses_masks_where_class_numbers_are_announced():
    with pytest.raises(ValueError, match=r"label: expected .*\(2, 1, 6, 5\), got \(2, 3, 6, 5\);.*to_onehot_y=False"):
        HausdorffLoss(softmax=True, to_onehot_y=True, spacing_mm=(1, 1))(
            torch.zeros(2, 3, 6, 5), torch.zeros(2, 3, 6, 5)
        )


@pytest.mark.parametrize(
    ("signed", "words"),
    [
        (torch.zeros(2, 2, 6, 5), r"each channel of the input, \(2, 3, 6, 5\), got \(2, 2, 6, 5\); .*num_classes"),
        (torch.zeros(1, 3, 6, 5), r"each channel of the input, \(2, 3, 6, 5\), got \(1, 3, 6, 5\)"),
        (torch.zeros(2, 3, 5, 6), r"each channel of the input, \(2, 3, 6, 5\), got \(2, 3, 5, 6\); .*crop, flip"),
        (torch.zeros(2, 3, 6, 5).int(), r"floating point, got torch\.int32; a label is turned into one by Signed"),
        (torch.zeros(2, 3, 6, 5).to(torch.int8), r"floating point, got torch\.int8; .*DecodeDistanceMapd"),
        (torch.ones(2, 3, 6, 5), r"got zeros and ones as of a label; make it with SignedDistanceMapd"),
    ],
)
@pytest.mark.parametrize("key", ["distance_map", "phi"])
def test_refuses_another_map(signed, words, key):
    target = {"label": torch.zeros(2, 1, 6, 5), key: signed}
    loss = HausdorffLoss(spacing_mm=(1, 1))
    if key == "phi":  # the loss knows it by its own name
        loss = CombinedLoss({"own": loss}, keys={"own": {"label": "label", "distance_map": "phi"}})
    with pytest.raises(ValueError, match=rf"^distance_map: expected a distance map .*{words}"):
        loss(torch.zeros(2, 3, 6, 5), target)


def test_refuses_a_resampled_map():
    kept = record(torch.eye(4), (1.0, 1.0), 1.0)
    signed = MetaTensor(torch.zeros(2, 3, 6, 5), affine=torch.eye(4), meta={RECORD: kept})
    target = {"label": torch.zeros(2, 1, 6, 5), "distance_map": signed}
    assert HausdorffLoss()(torch.zeros(2, 3, 6, 5), target) == 0
    signed.affine = torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="distance_map: this distance map was resampled"):
        HausdorffLoss()(torch.zeros(2, 3, 6, 5), target)


@pytest.mark.parametrize(
    "spacing",
    [
        (1.0, 1.0, 1.0),
        (1.0, 0.0),
        (1.0, math.nan),
        (1.0, math.inf),
        (-1.0, 1.0),
        "ab",
        2.0,
        torch.ones(3, 2),
        torch.ones(2, 3),
        [[1.0, 1.0], [1.0]],
    ],
)
def test_refuses_another_spacing(spacing):
    with pytest.raises(
        ValueError, match=r"spacing_mm: expected 2 finite values > 0, or one row of 2 for each of the 2"
    ):
        HausdorffLoss()(torch.zeros(2, 3, 6, 5), {"label": torch.zeros(2, 1, 6, 5), "spacing_mm": spacing})


def test_refuses_a_spacing_of_other_axes():
    with pytest.raises(ValueError, match=r"spacing_mm: expected 2 finite values .*got \(1\.0, 1\.0, 1\.0\)"):
        HausdorffLoss(spacing_mm=(1.0, 1.0, 1.0))(torch.zeros(2, 3, 6, 5), torch.zeros(2, 1, 6, 5))


def test_refuses_slices_of_slices():
    with pytest.raises(ValueError, match="slice_axis: expected None for 2D images"):
        HausdorffLoss(slice_axis=0)(torch.zeros(2, 3, 6, 5), torch.zeros(2, 1, 6, 5))


def test_refuses_an_activation_that_changes_the_shape():
    with pytest.raises(ValueError, match=r"other_act: expected a function that keeps the shape, got \(2, 6, 5\)"):
        HausdorffLoss(other_act=lambda x: x.sum(1), spacing_mm=(1, 1))(torch.zeros(2, 3, 6, 5), torch.zeros(2, 1, 6, 5))


def test_options_are_keywords():
    with pytest.raises(TypeError, match="positional"):
        HausdorffLoss(2.0)


def test_repr():
    text = repr(HausdorffLoss(alpha=1.5, slice_axis=2))
    assert "alpha=1.5" in text and "slice_axis=2" in text and "convention='boundary'" in text
