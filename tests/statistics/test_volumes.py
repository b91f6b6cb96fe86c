"""Size of a volume from its slices: against the slow reference, units, gradients, and refusals."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medconstraints.statistics import soft_size, soft_volume_size

VOLUMES = {
    "none": None,
    "mixed": [2, 0, 1, 0, 2],
}
volumes = pytest.mark.parametrize("volume", VOLUMES.values(), ids=VOLUMES)
spacings = pytest.mark.parametrize("spacing", ["pixels", "row", "per sample"])


def random_slices(rng, shape=(5, 3, 6, 4)):
    """Probabilities of slices, double."""
    return torch.from_numpy(rng.uniform(0.05, 0.95, shape))


def spacing_of(kind, rng):
    """None, one row or one row per slice."""
    rows = torch.from_numpy(rng.uniform(0.3, 4, (5, 3)))
    return {"pixels": None, "row": (0.5, 3.0, 5.0), "per sample": rows}[kind]


def tensor_of(volume):
    """The index as a tensor."""
    return None if volume is None else torch.tensor(volume)


@spacings
@volumes
def test_equals_the_reference(volume, spacing, rng, constraint_reference):
    probs, spacing = random_slices(rng), spacing_of(spacing, rng)
    value = soft_volume_size(probs, spacing, tensor_of(volume))
    expected = constraint_reference.volume_size(probs.numpy(), None if spacing is None else np.asarray(spacing), volume)
    assert value.shape == expected.shape and value.dtype == torch.float64
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-10)


def test_the_size_of_a_volume_is_that_of_its_slices(rng):
    """Cut along the last axis, the slices of a volume add up to its own size."""
    whole = torch.from_numpy(rng.random((2, 3, 6, 4, 5)))
    slices = whole.movedim(-1, 1).reshape(10, 3, 6, 4)
    owner = torch.arange(2).repeat_interleave(5)
    torch.testing.assert_close(soft_volume_size(slices, volume=owner), soft_size(whole)[owner])
    order = torch.from_numpy(rng.permutation(10))
    torch.testing.assert_close(soft_volume_size(slices[order], volume=owner[order]), soft_size(whole)[owner[order]])


def test_flip_and_class_permutation(rng):
    probs, volume = random_slices(rng), torch.tensor(VOLUMES["mixed"])
    value = soft_volume_size(probs, volume=volume)
    torch.testing.assert_close(soft_volume_size(probs.flip(2, 3), volume=volume), value)
    torch.testing.assert_close(soft_volume_size(probs[:, [2, 0, 1]], volume=volume), value[:, [2, 0, 1]])


def test_volumes_are_independent(rng):
    probs, volume = random_slices(rng).requires_grad_(), torch.tensor(VOLUMES["mixed"])
    (slope,) = torch.autograd.grad(soft_volume_size(probs, volume=volume)[4].sum(), probs)
    assert (slope[[0, 4]] == 1).all() and (slope[[1, 2, 3]] == 0).all()


@volumes
def test_gradcheck(volume, rng):
    probs, spacing = random_slices(rng, (5, 2, 2, 3)).requires_grad_(), spacing_of("per sample", rng)
    assert torch.autograd.gradcheck(lambda p: soft_volume_size(p, spacing, tensor_of(volume)), probs)
    assert torch.autograd.gradgradcheck(lambda p: soft_volume_size(p, spacing, tensor_of(volume)), probs)


def test_half_precision_does_not_overflow():
    """40,000 voxels a slice, 80,000 a volume."""
    probs = torch.ones(4, 1, 200, 200, dtype=torch.float16, requires_grad=True)
    value = soft_volume_size(probs, volume=torch.tensor([0, 0, 1, 1]))
    value.sum().backward()
    assert value.dtype == torch.float32 and value.flatten().tolist() == [80_000] * 4
    assert probs.grad.dtype == torch.float16 and (probs.grad == 2).all()


@pytest.mark.slow
def test_half_precision_of_a_large_volume():
    """200 slices of 512 x 512, two classes, one volume."""
    probs = torch.full((200, 2, 512, 512), 0.5, dtype=torch.float16)
    probs[:, 1] = 0.25
    probs.requires_grad_()
    value = soft_volume_size(probs)
    value.sum().backward()
    assert value.dtype == torch.float32 and probs.grad.isfinite().all()
    assert value[117].flatten().tolist() == pytest.approx([26_214_400.0, 13_107_200.0], rel=1e-6)
    assert (value == value[:1]).all()


def test_autocast_changes_nothing(rng):
    probs, volume = random_slices(rng).float(), torch.tensor(VOLUMES["mixed"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = soft_volume_size(probs, (0.7, 1.3, 5.0), volume)
    assert inside.dtype == torch.float32 and torch.equal(inside, soft_volume_size(probs, (0.7, 1.3, 5.0), volume))


def test_meta_tensors_give_a_plain_tensor(rng):
    probs, volume = random_slices(rng), torch.tensor(VOLUMES["mixed"])
    value = soft_volume_size(MetaTensor(probs), volume=MetaTensor(volume))
    assert type(value) is torch.Tensor and torch.equal(value, soft_volume_size(probs, volume=volume))


@pytest.mark.parametrize(
    "volume",
    [
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(5, 1, dtype=torch.int64),
        torch.zeros(5),
    ],
    ids=["too short", "two axes", "floating point"],
)
def test_refuses_an_index_that_does_not_fit(volume):
    with pytest.raises((ValueError, TypeError), match=r"volume: expected .*got"):
        soft_volume_size(torch.ones(5, 2, 4, 4), volume=volume)
