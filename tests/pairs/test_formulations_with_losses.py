"""Every formulation with every kind of constraint and reduction: cost, and multipliers after steps, by hand."""

import functools

import numpy as np
import pytest
import torch

from medconstraints.formulations import (
    AugmentedLagrangian,
    Lagrangian,
    LogBarrierExtension,
    QuadraticPenalty,
    ReLULagrangian,
)
from medconstraints.losses import BoxPriorLoss, ConstraintLoss
from medconstraints.statistics import (
    soft_centroid,
    soft_centroid_offset,
    soft_outside_extent,
    soft_size,
    soft_size_ratio,
    soft_volume_size,
)

SHAPE, INDEX, PAIRS, VOLUME = (3, 3, 6, 5), torch.tensor([2, 0, 3]), [(1, 2), (2, 0)], [4, 1, 4]
FORMULATIONS = {
    "penalty": QuadraticPenalty,
    "barrier": LogBarrierExtension,
    "Lagrangian": lambda: Lagrangian(4, learning_rate=0.5, initial=0.25),
    "ReLU": lambda: ReLULagrangian(learning_rate=0.5, initial=0.25),
    "augmented": lambda: AugmentedLagrangian(4, penalty=2.0, initial=0.25),
}
# statistic, its reference from probabilities, whether rows are classes, entries of the target
STATISTICS = {
    "size": (soft_size, lambda reference, p: reference.size(p), True, {}),
    "centroid": (soft_centroid, lambda reference, p: reference.centroid(p), True, {}),
    "ratio": (
        functools.partial(soft_size_ratio, pairs=PAIRS),
        lambda reference, p: reference.size_ratio(p, PAIRS),
        False,
        {},
    ),
    "offset": (
        functools.partial(soft_centroid_offset, pairs=PAIRS),
        lambda reference, p: reference.centroid_offset(p, PAIRS),
        False,
        {},
    ),
    "outside": (
        functools.partial(soft_outside_extent, pairs=PAIRS),
        lambda reference, p: reference.outside_extent(p, PAIRS),
        False,
        {},
    ),
    "volumes": (
        soft_volume_size,
        lambda reference, p: reference.volume_size(p, None, VOLUME),
        True,
        {"volume": torch.tensor(VOLUME)},
    ),
}


class ByHand:
    """Cost and steps of one formulation: a multiplier for each place, of each sample or of all."""

    def __init__(self, name, reference):
        self.name, self.reference, self.multipliers, self.seen = name, reference, {}, []

    def cost(self, z, sample, place):
        shared = self.name == "ReLU"
        key = (None if shared else sample, place)
        self.seen.append((key, sample, z))
        multiplier = self.multipliers.get(key, 0.25)
        if self.name == "penalty":
            return self.reference.quadratic(z)
        if self.name == "barrier":
            return self.reference.log_barrier(z, 5.0)
        if self.name == "Lagrangian":
            return self.reference.lagrangian(z, multiplier)
        if self.name == "ReLU":
            return self.reference.relu_lagrangian(z, multiplier)
        return self.reference.augmented_lagrangian(z, multiplier, 2.0)

    def step(self):
        rate = 2.0 if self.name == "augmented" else 0.5
        for key in {key for key, _, _ in self.seen}:
            # A shared multiplier: each sample once.
            values = {}
            for other, sample, z in self.seen:
                if other == key:
                    values[sample] = max(z, 0.0) if key[0] is None else z
            self.multipliers[key] = max(0.0, self.multipliers.get(key, 0.25) + rate * sum(values.values()))
        self.seen = []


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("name", FORMULATIONS)
def test_constraints(name, statistic, reduction, rng, constraint_reference):
    function, values_of, of_classes, more = STATISTICS[statistic]
    probs = torch.from_numpy(rng.dirichlet(np.ones(3), size=(3, 6, 5))).movedim(-1, 1).contiguous()
    values = values_of(constraint_reference, probs.numpy())
    spread = np.abs(values).mean() * 0.1
    bounds = np.sort(values[..., None] + spread * rng.normal(size=(*values.shape, 2)), -1)
    once, owner = range(3), [int(number) for number in INDEX]
    if statistic == "volumes":  # slices of a volume share its bounds; the volume is one sample
        bounds[2], once = bounds[0], range(2)
        owner = VOLUME if name == "ReLU" else owner
    formulation, hand = FORMULATIONS[name](), ByHand(name, constraint_reference)
    loss = ConstraintLoss(function, formulation, reduction=reduction, normalization="none", unit=0.5)
    target = {"bounds": torch.from_numpy(bounds), "index": INDEX, **more}
    rows = [1, 2] if of_classes else [0, 1]
    for _ in range(3):
        found = loss(probs, target).item()
        costs = [
            [hand.cost(z / 0.5, owner[n], (row, k, side)) for side, z in enumerate((low - f, f - high))]
            for n in range(3)
            for row in rows
            for k, (f, (low, high)) in enumerate(zip(values[n, row], bounds[n, row], strict=True))
        ]
        totals = np.array(costs).sum(1).reshape(3, -1)[list(once)] if name not in ("Lagrangian", "augmented") else None
        if totals is None:  # a multiplier for each slice: the mean over the slices of a volume
            totals = np.array(costs).sum(1).reshape(3, -1)
            if statistic == "volumes":
                totals = np.stack([(totals[0] + totals[2]) / 2, totals[1]])
        assert found == pytest.approx(totals.mean() if reduction == "mean" else totals.sum(), rel=1e-4, abs=1e-6)
        formulation.step()
        if name != "barrier":
            hand.step()
        else:
            formulation.t.fill_(5.0)


@pytest.mark.parametrize("name", FORMULATIONS)
def test_boxes(name, rng, constraint_reference):
    """The bands of a box, its size from below and from above, and what lies outside: four constraints of a class."""
    probs = torch.from_numpy(rng.uniform(0.05, 0.95, size=(2, 1, 8, 7)))
    boxes = torch.tensor([[[1, 1, 2, 6, 6]], [[1, 0, 1, 4, 7]]])
    formulation, hand = FORMULATIONS[name](), ByHand(name, constraint_reference)
    loss = BoxPriorLoss(formulation, width=2, filling=(0.55, 0.6), weights={"tightness": 2.0, "emptiness": 0.5})
    volumes = [20, 24]
    for _ in range(3):
        found = loss(probs, {"boxes": boxes, "index": INDEX[:2]}).item()
        expected = 0.0
        for n, (_, top, left, bottom, right) in enumerate(boxes[:, 0].tolist()):
            image = probs[n, 0].numpy()
            part, share = image[top:bottom, left:right], volumes[n] / sum(volumes)
            bands = [part[i : i + 2] for i in range(0, part.shape[0], 2)]
            bands += [part[:, i : i + 2].T for i in range(0, part.shape[1], 2)]
            tight = [1 - band.sum() / len(band) for band in bands]
            inside = part.sum()
            outside = (image.sum() - inside) / (sum(volumes) / 2)
            size = [0.55 - inside / volumes[n], inside / volumes[n] - 0.6]
            if formulation.has_multipliers:
                violation = np.mean([max(z, 0) for z in tight])
                functions = [violation + min(max(tight), 0), *size, outside]
                costs = [hand.cost(z, int(INDEX[n]), k) for k, z in enumerate(functions)]
            else:
                costs = [
                    np.mean([hand.cost(z, n, "tight") for z in tight]),
                    *(hand.cost(z, n, "size") for z in size),
                    hand.cost(outside, n, "outside"),
                ]
            expected += np.dot(costs, [2 * share, share, share, 0.5 / 2])
        assert found == pytest.approx(expected, rel=1e-5)
        formulation.step()
        if name != "barrier":
            hand.step()
        else:
            formulation.t.fill_(5.0)
