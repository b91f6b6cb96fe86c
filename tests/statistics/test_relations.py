"""Relations between classes: size ratio, centroid offset, mass outside the extent."""

import functools

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medconstraints.statistics import (
    is_relation,
    soft_centroid_offset,
    soft_outside_extent,
    soft_size,
    soft_size_ratio,
)

PAIRS = [(1, 2), (2, 1), (0, 2), (1, 1)]
SHAPES = {"2D": (2, 3, 6, 5), "3D": (2, 3, 4, 3, 5)}
RELATIONS = {
    "size ratio": soft_size_ratio,
    "centroid offset": soft_centroid_offset,
    "outside extent": soft_outside_extent,
    "outside extent along lines": lambda probs, pairs: soft_outside_extent(probs, pairs, along_lines=True),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
relations = pytest.mark.parametrize("relation", RELATIONS.values(), ids=RELATIONS)
lines = pytest.mark.parametrize("along_lines", [False, True], ids=["profile", "lines"])


def random_probs(shape, rng):
    """Softmax probabilities, double; no two of them are equal."""
    return torch.softmax(torch.from_numpy(rng.normal(size=shape)), 1)


def ring_and_disc(size=24, radius=(8, 5)):
    """Background, ring, and the disc that it encloses: (1, 3, size, size)."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(float(size)) - (size - 1) / 2] * 2, indexing="ij"))
    distance = grid.norm(dim=0)
    disc = (distance < radius[1]).float()
    ring = (distance < radius[0]).float() - disc
    return torch.stack([1 - ring - disc, ring, disc])[None]


# Values


@shapes
def test_size_ratio_equals_the_reference(shape, rng, constraint_reference):
    probs = random_probs(shape, rng)
    value = soft_size_ratio(probs, PAIRS)
    assert value.shape == (shape[0], len(PAIRS), 1) and value.dtype == torch.float64
    np.testing.assert_allclose(value.numpy(), constraint_reference.size_ratio(probs.numpy(), PAIRS), rtol=1e-9)


@pytest.mark.parametrize("spacing", ["voxels", "row", "per sample"])
@shapes
def test_centroid_offset_equals_the_reference(shape, spacing, rng, constraint_reference):
    probs, dims = random_probs(shape, rng), len(shape) - 2
    rows = torch.from_numpy(rng.uniform(0.3, 4, (shape[0], dims)))
    spacing = {"voxels": None, "row": (0.5, 2.0, 3.0)[:dims], "per sample": rows}[spacing]
    value = soft_centroid_offset(probs, PAIRS, spacing)
    expected = constraint_reference.centroid_offset(
        probs.numpy(), PAIRS, None if spacing is None else np.asarray(spacing)
    )
    assert value.shape == (shape[0], len(PAIRS), dims)
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-9, atol=1e-12)


@lines
@shapes
def test_outside_extent_equals_the_reference(shape, along_lines, rng, constraint_reference):
    probs = random_probs(shape, rng)
    value = soft_outside_extent(probs, PAIRS, along_lines=along_lines)
    expected = constraint_reference.outside_extent(probs.numpy(), PAIRS, along_lines)
    assert value.shape == (shape[0], len(PAIRS), len(shape) - 2)
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_a_disc_lies_within_its_ring():
    probs = ring_and_disc()
    for along_lines in (False, True):
        inside, outside = soft_outside_extent(probs, [(2, 1), (1, 2)], along_lines=along_lines)[0]
        assert inside.tolist() == pytest.approx([0, 0], abs=1e-6)
        assert (outside > 0.1).all()


def test_an_object_beside_another_one_by_hand():
    """Rows 2..5 and columns 2..5 of the second; the first is one half in its rows, and beside it in the columns."""
    probs = torch.zeros(1, 2, 10, 10)
    probs[0, 1, 2:6, 2:6] = 1
    probs[0, 0, 4:8, 7:9] = 1
    assert soft_outside_extent(probs, [(0, 1)]).flatten().tolist() == pytest.approx([0.5, 1.0])
    assert soft_outside_extent(probs, [(0, 1)], along_lines=True).flatten().tolist() == pytest.approx([1.0, 1.0])
    assert soft_centroid_offset(probs, [(0, 1)]).flatten().tolist() == pytest.approx([-2.0, -4.0])
    assert soft_size_ratio(probs, [(0, 1), (1, 0)]).flatten().tolist() == pytest.approx([0.5, 2.0])


def test_a_gap_belongs_to_the_extent():
    probs = torch.zeros(1, 2, 1, 9)
    probs[0, 1, 0, [1, 7]] = 1
    probs[0, 0, 0, 3:5] = 1
    assert soft_outside_extent(probs, [(0, 1)])[0, 0, 1].item() == pytest.approx(0)


# Symmetries


@relations
def test_order_of_the_pairs(relation, rng):
    probs = random_probs((2, 3, 6, 5), rng)
    value = relation(probs, PAIRS)
    torch.testing.assert_close(relation(probs, PAIRS[::-1]), value.flip(1))
    for row, pair in enumerate(PAIRS):
        torch.testing.assert_close(relation(probs, [pair]), value[:, row : row + 1])
    assert torch.equal(relation(probs, tuple(PAIRS)), value)


@relations
def test_class_permutation(relation, rng):
    probs, order = random_probs((2, 3, 6, 5), rng), [2, 0, 1]
    renamed = [(order.index(a), order.index(b)) for a, b in PAIRS]
    torch.testing.assert_close(relation(probs[:, order], renamed), relation(probs, PAIRS))


@relations
@pytest.mark.parametrize("dims", [(2,), (2, 3, 4)])
def test_flip(relation, dims, rng):
    probs = random_probs((2, 3, 4, 3, 5), rng)
    expected = relation(probs, PAIRS)
    if relation is soft_centroid_offset:
        expected[..., [dim - 2 for dim in dims]] *= -1
    torch.testing.assert_close(relation(probs.flip(dims), PAIRS), expected)


@relations
def test_translation(relation, rng):
    probs = random_probs((2, 3, 5, 4), rng)
    there = torch.nn.functional.pad(probs, (3, 1, 7, 2))
    torch.testing.assert_close(relation(there, PAIRS), relation(probs, PAIRS))


@relations
def test_transposed_axes(relation, rng):
    probs = random_probs((2, 3, 4, 3, 5), rng)
    other = relation(probs.permute(0, 1, 4, 3, 2), PAIRS)
    torch.testing.assert_close(other, relation(probs, PAIRS).flip(-1))


@relations
def test_samples_are_independent(relation, rng):
    probs = random_probs((3, 3, 6, 5), rng).requires_grad_()
    whole = relation(probs, PAIRS)
    for sample in range(3):
        torch.testing.assert_close(whole[sample : sample + 1], relation(probs[sample : sample + 1], PAIRS))
    (slope,) = torch.autograd.grad(whole[1].sum(), probs)
    assert (slope[[0, 2]] == 0).all() and (slope[1] != 0).any()


@lines
def test_outside_extent_is_a_share(along_lines, rng):
    value = soft_outside_extent(random_probs((4, 3, 8, 7), rng), PAIRS, along_lines=along_lines)
    assert ((value >= 0) & (value <= 1)).all()


# Empty classes


@relations
@pytest.mark.parametrize("empty", [(1,), (0, 1, 2)])
def test_empty_classes_are_finite(relation, empty):
    probs = torch.full((1, 3, 6, 5), 0.25, dtype=torch.float16)
    probs[:, list(empty)] = 0
    probs.requires_grad_()
    value = relation(probs, PAIRS)
    value.sum().backward()
    assert value.isfinite().all() and probs.grad.isfinite().all()


# Gradients and precision


@relations
@pytest.mark.parametrize("shape", [(2, 3, 3, 4), (1, 3, 2, 3, 2)], ids=["2D", "3D"])
def test_gradcheck(relation, shape, rng):
    probs = random_probs(shape, rng).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: relation(p, PAIRS), probs)
    assert torch.autograd.gradgradcheck(lambda p: relation(p, PAIRS), probs)


@relations
def test_half_precision_does_not_overflow(relation):
    probs = torch.zeros(1, 2, 320, 250, dtype=torch.float16)
    probs[0, 0, :80] = 1
    probs[0, 1, 40:, 10:] = 1  # 67,200 voxels
    probs.requires_grad_()
    value = relation(probs, [(0, 1)])
    value.sum().backward()
    assert value.dtype == torch.float32
    expected = {
        soft_size_ratio: [20_000 / 67_200],
        soft_centroid_offset: [179.5 - 39.5, 129.5 - 124.5],
        soft_outside_extent: [0.5, 0.04],
    }.get(relation, [1 - (40 * 240) / 20_000] * 2)
    assert value.flatten().tolist() == pytest.approx(expected, rel=1e-5)
    assert probs.grad.dtype == torch.float16 and probs.grad.isfinite().all()


@pytest.mark.slow
@relations
def test_half_precision_of_a_large_volume(relation):
    probs = torch.zeros(1, 2, 512, 512, 200, dtype=torch.float16)
    probs[0, 0, :256] = 1
    probs[0, 1, 128:, :, :150] = 1
    probs.requires_grad_()
    value = relation(probs, [(0, 1)])
    value.sum().backward()
    assert value.dtype == torch.float32 and probs.grad.isfinite().all()
    expected = {
        soft_size_ratio: [256 * 200 / (384 * 150)],
        soft_centroid_offset: [319.5 - 127.5, 0.0, 74.5 - 99.5],
        soft_outside_extent: [0.5, 0.0, 0.25],
    }.get(relation, [1 - 0.5 * 0.75] * 3)
    assert value.flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=2e-3)


@relations
def test_autocast_changes_nothing(relation, rng):
    probs = random_probs((2, 3, 20, 21), rng).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = relation(probs, PAIRS)
    assert inside.dtype == torch.float32 and torch.equal(inside, relation(probs, PAIRS))


# Drop-in and refusals


@pytest.mark.parametrize("relation", [soft_size_ratio, soft_centroid_offset, soft_outside_extent])
def test_is_declared_a_relation_also_within_a_partial(relation):
    assert is_relation(relation) and is_relation(functools.partial(relation, pairs=PAIRS))
    assert not is_relation(soft_size) and not is_relation(lambda probs: relation(probs, PAIRS))


@relations
def test_a_meta_tensor_gives_a_plain_tensor(relation, rng):
    probs = random_probs((2, 3, 6, 5), rng)
    value = relation(MetaTensor(probs.clone()), PAIRS)
    assert type(value) is torch.Tensor and torch.equal(value, relation(probs, PAIRS))


@pytest.mark.parametrize("relation", [soft_size_ratio, soft_outside_extent])
@pytest.mark.parametrize(
    "pairs",
    [[], [(0, 3)], [(-1, 1)], [(0, 1, 2)], [(0, 1.5)], (0, 1)],
    ids=["none", "class that does not exist", "negative", "triple", "no integer", "no list of pairs"],
)
def test_refuses_pairs_that_do_not_fit(relation, pairs):
    with pytest.raises((ValueError, TypeError), match=r"pairs: expected .*got"):
        relation(torch.ones(1, 3, 4, 4), pairs)


@relations
def test_refuses_what_is_no_probability_map(relation):
    with pytest.raises(ValueError, match="probs: expected a floating point tensor"):
        relation(torch.ones(2, 3, 4, 4, dtype=torch.int64), [(0, 1)])
