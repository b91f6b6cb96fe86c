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

from medconstraints.distance import Euclidean, Geodesic, signed_distance
from medconstraints.distance.provenance import RECORD, record
from medconstraints.losses.combined import CombinedLoss
from medconstraints.losses.hausdorff import HausdorffLoss

VOXEL = {"measure": Euclidean(convention="voxel"), "spacing_mm": (1, 1)}
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


@pytest.fixture(scope="module")
def reference_loss(distance_reference):
    """(B, K), with loops over samples, classes and slices."""

    def compute(probs, truth, spacings, *, alpha=2.0, first=1, **options):
        probs, truth = probs.double().numpy(), truth.double().numpy()
        samples, classes = probs.shape[:2]
        value = np.zeros((samples, classes - first))
        for b, c in itertools.product(range(samples), range(first, classes)):
            masks = probs[b, c] > 0.5, truth[b, c] > 0.5
            weight = sum(np.abs(distance_reference.signed(mask, spacings[b], **options)) ** alpha for mask in masks)
            value[b, c - first] = ((probs[b, c] - truth[b, c]) ** 2 * weight).mean()
        return torch.from_numpy(value)

    return compute


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
        ((5, 4, 5), {"convention": "published", "clip_mm": 2.0}),
        ((5, 4, 5), {"slice_axis": 0}),
        ((5, 4, 5), {"slice_axis": 2, "clip_mm": 1.5}),
    ],
)
def test_against_the_slow_reference(spatial, options, reference_loss):
    """Every sample has its own, anisotropic spacing; the label's distances are computed, or given."""
    logits, label = case(spatial, 3)
    spacings = [tuple(k * s for s in SPACING[len(spatial)]) for k in (1.0, 0.5, 3.0)]
    expected = reference_loss(logits.softmax(1), one_hot(label, 3), spacings, **options)
    alpha = options.get("alpha", 2.0)
    measured = {k: v for k, v in options.items() if k != "alpha"}
    target = {"label": label, "spacing_mm": torch.tensor(spacings)}
    for given in (target, target | {"distance_map": label_map(label, 3, spacings, **measured)}):
        loss = HausdorffLoss(softmax=True, reduction="none", alpha=alpha, measure=Euclidean(**measured))
        value = loss(logits, given)
        assert value.shape == (3, 2) and (expected > 0).any()
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-9)


# As MONAI's class


@pytest.mark.parametrize("spatial", SHAPES)
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_is_the_loss_of_monai_at_unit_spacing(spatial, classes, reduction):
    logits, label = case(spatial, classes)
    for include_background, batch in itertools.product((False, True), (False, True)):
        words = {"include_background": include_background, "reduction": reduction, "batch": batch, "softmax": True}
        values, grads = [], []
        voxels = VOXEL | {"spacing_mm": (1,) * len(spatial)}
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
        {"other_act": functools.partial(torch.log_softmax, dim=1), "to_onehot_y": True, "batch": True},
        {"sigmoid": True, "alpha": 0.7},
    ],
)
def test_words_of_monai(words):
    """Also on images of a few pixels, as in MONAI's own tests."""
    for spatial, samples in (((9, 7), 3), ((2, 2), 2), ((3, 1), 1)):
        logits, label = case(spatial, 3, samples)
        target = label if words.get("to_onehot_y") else one_hot(label, 3)
        expected = HausdorffDTLoss(**words)(logits, target)
        torch.testing.assert_close(HausdorffLoss(**words, **VOXEL)(logits, target), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:single channel")
def test_masks_and_single_channels():
    """A single channel is the foreground; masks may overlap and be soft."""
    logits, label = random_logits((2, 1, 9, 7)), random_label((2, 1, 9, 7), 2)
    for words in ({}, {"to_onehot_y": True}, {"include_background": True}):
        value = HausdorffLoss(sigmoid=True, **words, **VOXEL)(logits, label)
        torch.testing.assert_close(value, HausdorffDTLoss(sigmoid=True)(logits, label.float()), rtol=1e-5, atol=0)
    logits, masks = random_logits((2, 3, 9, 7)), random_logits((2, 3, 9, 7), seed=1).sigmoid()
    value = HausdorffLoss(sigmoid=True, **VOXEL)(logits, masks)
    torch.testing.assert_close(value, HausdorffDTLoss(sigmoid=True)(logits, masks), rtol=1e-5, atol=0)


def test_reductions_and_types_of_labels():
    logits, label = case((9, 7), 4)
    words = {"softmax": True, "spacing_mm": (1, 1)}
    rows = HausdorffLoss(reduction="none", **words)(logits, label)
    assert rows.shape == (3, 3)
    torch.testing.assert_close(HausdorffLoss(**words)(logits, label), rows.mean())
    torch.testing.assert_close(HausdorffLoss(reduction="sum", **words)(logits, label), rows.sum())
    torch.testing.assert_close(HausdorffLoss(reduction="none", batch=True, **words)(logits, label), rows.mean(0))
    loss = HausdorffLoss(**words)
    for dtype in (torch.uint8, torch.int16, torch.float32, torch.float64):
        assert torch.equal(loss(logits, label.to(dtype)), loss(logits, one_hot(label, 4)))
    torch.testing.assert_close(loss(logits, label, probabilities=loss.probabilities(logits)), loss(logits, label))


# Spacings


@pytest.mark.parametrize("alpha", [0.5, 2.0, 3.0])
def test_scales_with_the_spacing_to_the_alpha(alpha):
    logits, label = case((7, 6, 5), 3)
    for convention in ("boundary", "voxel", "published"):
        measure = Euclidean(convention=convention)
        small, large = (
            HausdorffLoss(softmax=True, alpha=alpha, measure=measure, spacing_mm=[k * s for s in SPACING[3]])
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
    torch.testing.assert_close(loss(logits, {"label": MetaTensor(label, affine=affines)}), each)
    if len(spatial) == 2:  # with an affine of the plane alone
        own = MetaTensor(label, meta={"affine": torch.diag(torch.tensor([*spacing, 1.0]))})
        torch.testing.assert_close(loss(logits, own), same)


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


def test_a_plain_label_needs_a_spacing():
    """No millimetre is taken for granted."""
    for spatial in SHAPES:
        logits, label = case(spatial, 3)
        words = rf"^spacing_mm: .*a plain label.*spacing_mm=\({', '.join(['1.0'] * len(spatial))}\) to count in voxels"
        for target in (label, {"label": label}, {"label": label, "distance_map": torch.zeros(logits.shape)}):
            with pytest.raises(ValueError, match=words):
                HausdorffLoss(softmax=True)(logits, target)


MOVES = {
    "quarter turn": (lambda x: x.transpose(2, 4).flip(2), [[0, 0, 1], [0, 1, 0], [-1, 0, 0]]),
    "other order": (lambda x: x.movedim(4, 2), [[0, 1, 0], [0, 0, 1], [1, 0, 0]]),
    "flip": (lambda x: x.flip(3), [[1, 0, 0], [0, -1, 0], [0, 0, 1]]),
}


@pytest.mark.parametrize(("move", "steps"), MOVES.values(), ids=MOVES)
def test_a_spacing_beside_a_turned_map_may_be_stale(move, steps):
    """The map follows the turn, the number beside it does not; alone and in a sum."""
    logits, label = case((6, 5, 4), 3)
    expected = HausdorffLoss(softmax=True, spacing_mm=SPACING[3])(logits, label)
    signed = made_map(label, rotated(SPACING[3]), SPACING[3])
    turned = MetaTensor(move(signed.as_tensor()), meta=dict(signed.meta))
    now = rotated(SPACING[3])
    now[:3, :3] = now[:3, :3] @ torch.tensor(steps, dtype=torch.float64)
    turned.affine = now
    target = {"label": move(label), "distance_map": turned, "spacing_mm": torch.tensor(SPACING[3]).expand(3, -1)}
    for loss in (HausdorffLoss(softmax=True), CombinedLoss({"hausdorff": HausdorffLoss(softmax=True)})):
        torch.testing.assert_close(loss(move(logits), target), expected, rtol=1e-5, atol=0)
        stale = target | {"distance_map": turned.as_tensor()}  # without its meta data the number counts
        assert torch.isclose(loss(move(logits), stale), expected, rtol=1e-3) == (steps[0][0] == 1)


def test_spacing_of_the_slice_axis_is_not_used():
    logits, label = case((7, 6, 5), 3)
    slicewise = Euclidean(slice_axis=2)
    thin, thick = (HausdorffLoss(softmax=True, measure=slicewise, spacing_mm=(1.0, 2.0, z)) for z in (1.0, 9.0))
    assert torch.equal(thin(logits, label), thick(logits, label))
    slices = logits.movedim(-1, 1).flatten(0, 1), label.movedim(-1, 1).flatten(0, 1)
    for measure in (Euclidean(), slicewise):  # the measure of the volume serves its slices too
        value = HausdorffLoss(softmax=True, measure=measure, spacing_mm=(1.0, 2.0))(*slices)
        torch.testing.assert_close(thin(logits, label), value, rtol=1e-5, atol=0)


# The label's map


def test_a_given_map_is_used_and_clipped():
    logits, label = case((9, 7), 3)
    loss = HausdorffLoss(softmax=True, spacing_mm=(1, 1))
    none, ten = torch.zeros(3, 3, 9, 7), torch.full((3, 3, 9, 7), -10.0)
    values = [loss(logits, {"label": label, "distance_map": given}) for given in (none, ten)]
    error = (logits.softmax(1) - one_hot(label, 3))[:, 1:].square().mean()
    torch.testing.assert_close(values[1] - values[0], 100 * error)
    signed = label_map(label, 3, [(1.0, 1.0)] * 3)
    assert signed.abs().max() > 1.5
    loss = HausdorffLoss(softmax=True, measure=Euclidean(clip_mm=1.5), spacing_mm=(1, 1))
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

    monkeypatch.setattr("medconstraints.distance.measures.signed_distance", counting)
    logits, label = case((5, 4, 3), 3)
    loss = HausdorffLoss(softmax=True, spacing_mm=(1, 1, 1))
    loss(logits, {"label": label, "distance_map": torch.zeros(3, 3, 5, 4, 3)})
    assert calls == [(5, 4, 3)] * 6  # 3 samples, 2 classes
    loss(logits, label)
    assert len(calls) == 6 + 12
    # Images and slices go in one call, of both label and prediction.
    HausdorffLoss(softmax=True, measure=Euclidean(slice_axis=1), spacing_mm=(1, 1, 1))(logits, label)
    HausdorffLoss(softmax=True, spacing_mm=(1, 1))(logits[..., 0], label[..., 0])
    assert calls[18:] == [(12 * 4, 5, 3), (12, 5, 4)]


def test_in_a_combined_loss():
    """A label keeps its affine; a map and a spacing are taken if they are there, under other keys too."""
    logits, label = case((7, 6, 5), 3)
    spacing = torch.tensor([SPACING[3]] * 3)
    signed = label_map(label, 3, spacing.tolist())
    own = HausdorffLoss(softmax=True, spacing_mm=SPACING[3])
    assert (own.target_keys, own.optional_keys) == (("label",), ("distance_map", "spacing_mm"))
    combined = CombinedLoss({"hausdorff": HausdorffLoss(softmax=True)}, weights={"hausdorff": 0.1})
    expected = 0.1 * own(logits, label)
    torch.testing.assert_close(combined(logits, {"label": MetaTensor(label, affine=rotated(SPACING[3]))}), expected)
    torch.testing.assert_close(combined(logits, {"label": label, "spacing_mm": spacing}), expected)
    target = {"label": label, "distance_map": torch.zeros_like(signed), "phi": signed, "steps": spacing}
    renamed = {"hausdorff": {"distance_map": "phi", "spacing_mm": "steps"}}
    combined = CombinedLoss({"hausdorff": HausdorffLoss(softmax=True)}, keys=renamed)
    value = combined(MetaTensor(logits), target)
    assert type(value) is torch.Tensor
    torch.testing.assert_close(value, own(logits, label))


# Invariances, empty masks


def test_flips_and_permutations():
    logits, label = case((7, 6, 5), 3)
    words = {"softmax": True, "include_background": True, "reduction": "none"}
    loss = HausdorffLoss(**words, spacing_mm=SPACING[3])
    value, order, masks = loss(logits, label), [2, 0, 1], one_hot(label, 3)
    for axes in ((2,), (3,), (4,), (2, 3, 4)):
        torch.testing.assert_close(loss(logits.flip(axes), label.flip(axes)), value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss(logits[:, order], masks[:, order]), value[:, order])
    torch.testing.assert_close(loss(logits[order], label[order]), value[order])
    turned = HausdorffLoss(**words, spacing_mm=SPACING[3][::-1])
    torch.testing.assert_close(turned(logits.transpose(2, 4), label.transpose(2, 4)), value, rtol=1e-5, atol=0)


def test_right_and_empty_predictions(distance_reference):
    """A right one costs nothing, an empty one is pulled by the label alone, and without any boundary nothing pulls."""
    loss = HausdorffLoss(spacing_mm=(1, 1))
    _, label = case((9, 7), 3)
    assert loss(one_hot(label, 3), label).item() == 0
    label = torch.zeros(1, 1, 6, 6)
    label[..., 2:5, 1:5] = 1
    for level in (0.0, 0.3):
        probs = torch.full((1, 1, 6, 6), level, requires_grad=True)
        value = loss(probs, label)
        value.backward()
        distance = torch.from_numpy(distance_reference.signed(label[0, 0].numpy() > 0)).float()
        torch.testing.assert_close(value, ((level - label) ** 2 * distance**2).mean())
        assert (probs.grad[label > 0] < 0).all()
    for number in (0.0, 1.0):
        probs = torch.full((2, 1, 6, 6), 0.2, requires_grad=True)
        value = loss(probs, torch.full((2, 1, 6, 6), number))
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


@pytest.mark.parametrize("options", [{}, {"measure": Euclidean(slice_axis=1), "alpha": 1.5}, {"batch": True}], ids=str)
def test_gradcheck(options):
    """Far from 1/2 the sides of the voxels are fixed, and the distances are constants."""
    label, wrong = (random_label((1, 1, 3, 2, 3), 3, seed=seed) for seed in (1, 5))
    logits = (3 * one_hot(wrong, 3)).double() + 0.1 * random_logits((1, 3, 3, 2, 3), torch.float64)
    loss = HausdorffLoss(softmax=True, spacing_mm=(1.0, 2.0, 0.5), reduction="none", **options)
    assert (logits.softmax(1) - 0.5).abs().min() > 1e-3
    assert torch.autograd.gradcheck(lambda x: loss(x, label), logits.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype):
    """Distances up to 890 mm, squared 792,100."""
    label = torch.zeros(1, 1, 300, 4)
    label[..., :2, :] = 1
    logits = torch.zeros(1, 1, 300, 4, dtype=dtype)
    logits[..., 298:, :] = 1
    logits.requires_grad_()
    value = HausdorffLoss(reduction="sum", spacing_mm=(3.0, 1.0))(logits, label)
    value.backward()
    distance = 3 * (torch.arange(300) - 1.5).abs()
    weight = distance.square() + distance.flip(0).square()
    expected = float(weight[[0, 1, 298, 299]].sum() / 300)
    assert value.dtype == torch.float32 and logits.grad.dtype == dtype and logits.grad.isfinite().all()
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_kinds_of_tensors():
    """Autocast changes nothing, meta data have no part in the result, distances carry no gradient."""
    logits, label = case((9, 7), 3)
    loss, signed = HausdorffLoss(softmax=True, spacing_mm=(1, 1)), label_map(label, 3, [(1.0, 1.0)] * 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(logits, label)
    assert inside.dtype == torch.float32 and torch.equal(inside, loss(logits, label))
    before = [tensor.clone() for tensor in (logits, label, signed)]
    image, leaf = MetaTensor(logits.clone()).requires_grad_(), signed.clone().requires_grad_()
    value = HausdorffLoss(softmax=True)(image, {"label": MetaTensor(label), "distance_map": MetaTensor(leaf)})
    assert type(value) is torch.Tensor
    value.backward()
    assert image.grad.isfinite().all() and (image.grad != 0).any() and leaf.grad is None
    assert all(torch.equal(a, b) for a, b in zip((logits, label, signed), before, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["auto", "numba"])
def test_on_an_accelerator(backend):
    logits, label = case((9, 8, 7), 3)
    loss = HausdorffLoss(softmax=True, spacing_mm=SPACING[3], measure=Euclidean(backend=backend))
    value = loss(logits.cuda(), label.cuda())
    assert value.is_cuda
    torch.testing.assert_close(value.cpu(), HausdorffLoss(softmax=True, spacing_mm=SPACING[3])(logits, label))
    assert loss(logits.cuda(), label.cuda() + 1).isnan()


# Refusals


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"alpha": 0.0}, ValueError, r"alpha: expected .* > 0, got 0\.0"),
        ({"alpha": math.nan}, ValueError, "alpha: expected .*got nan"),
        ({"softmax": True, "other_act": torch.tanh}, ValueError, "other_act: expected at most one activation"),
        ({"reduction": "average"}, ValueError, "average"),
        ({"measure": Geodesic(image_weight=1.0)}, TypeError, r"measure: expected Euclidean\(...\), got Geodesic"),
        ({"spacing_mm": (1.0,)}, ValueError, r"spacing_mm: expected .*got \(1\.0,\)"),
        ({"spacing_mm": (1.0, 0.0)}, ValueError, "spacing_mm: expected .*got"),
    ],
)
def test_refuses_senseless_settings(options, error, words):
    with pytest.raises(error, match=words):
        HausdorffLoss(**options)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"segmentation": torch.zeros(2, 1, 6, 5)}, r"target: expected a tensor, .*\"label\", got \['segmentation'\]"),
        (3.0, "target: expected a tensor, .*got float"),
        (torch.zeros(2, 6, 5), r"label: expected class numbers .*\(2, 1, 6, 5\).*or.*\(2, 3, 6, 5\), got \(2, 6, 5\)"),
        (torch.zeros(1, 1, 6, 5), r"label: expected class numbers .*got \(1, 1, 6, 5\)"),
        (torch.full((2, 1, 6, 5), 0.5), r"label: expected whole class numbers 0\.\.2, got 0\.5; .*nearest"),
        (torch.full((2, 1, 6, 5), math.nan), r"label: expected whole class numbers 0\.\.2, got nan"),
        (torch.full((2, 1, 6, 5), 3), r"label: expected whole class numbers 0\.\.2, got 3"),
        (torch.full((2, 3, 6, 5), 2), r"label: expected masks with values in 0\.\.1, got 2"),
    ],
)
def test_refuses_what_is_no_label(target, words):
    with pytest.raises(ValueError, match=words):
        HausdorffLoss(softmax=True, spacing_mm=(1, 1))(torch.zeros(2, 3, 6, 5), target)


def test_refuses_what_does_not_fit():
    logits, label, words = torch.zeros(2, 3, 6, 5), torch.zeros(2, 1, 6, 5), {"softmax": True, "spacing_mm": (1, 1)}
    with pytest.raises(ValueError, match=r"label: expected .*\(2, 1, 6, 5\).* to_onehot_y .*got \(2, 3, 6, 5\)"):
        HausdorffLoss(to_onehot_y=True, **words)(logits, logits)
    with pytest.raises(ValueError, match=r"other_act: expected a function that keeps the shape, got \(2, 6, 5\)"):
        HausdorffLoss(other_act=lambda x: x.sum(1), spacing_mm=(1, 1))(logits, label)
    for given in ((1.0, 1.0, 1.0), (1.0, math.nan), "ab", 2.0, torch.ones(3, 2), [[1.0, 1.0], [1.0]]):
        with pytest.raises(ValueError, match="spacing_mm: expected 2 finite values > 0, or one row of 2 for each of"):
            HausdorffLoss(softmax=True)(logits, {"label": label, "spacing_mm": given})
