"""Slow reference of the global constraints: loops over samples, classes and voxels, numpy float64.

Written from Kervadec 2020 (chapters 2 and 3), and from the documented signs and units of the package. It shares no code
with the package. `probs` is an array (B, C, *S), `spacing` None, one row (D,) or one row per sample (B, D).
"""

import itertools
import math

import numpy as np

# Statistics


def spacing_of(spacing, sample, dims):
    """Spacing of one sample, 1 where none is given."""
    if spacing is None:
        return [1.0] * dims
    rows = np.asarray(spacing, dtype=float)
    return [float(step) for step in (rows if rows.ndim == 1 else rows[sample])]


def voxels(shape):
    """Index of every voxel of an image."""
    return itertools.product(*map(range, shape))


def each_channel(probs, components, value):
    """Array (B, C, M) of value(sample, channel), a list of M numbers."""
    batch, classes = probs.shape[:2]
    found = np.zeros((batch, classes, components))
    for sample in range(batch):
        for channel in range(classes):
            found[sample, channel] = value(sample, channel)
    return found


def size(probs, spacing=None):
    """Eq. 3.11: sum of the probabilities, times the volume of a voxel."""

    def value(sample, channel):
        total = sum(float(probs[sample, channel][voxel]) for voxel in voxels(probs.shape[2:]))
        return [total * math.prod(spacing_of(spacing, sample, probs.ndim - 2))]

    return each_channel(probs, 1, value)


def weighted_mean(weights, numbers):
    """Eq. 2.8: sum of numbers * weights over the sum of the weights; both have the shape of the image."""
    top = bottom = 0.0
    for voxel in voxels(weights.shape):
        top += float(weights[voxel]) * float(numbers[voxel])
        bottom += float(weights[voxel])
    return top / bottom


def centroid(probs, spacing=None):
    """Eq. 3.12 with 0-based coordinates, times the spacing."""
    shape = probs.shape[2:]

    def value(sample, channel):
        steps = spacing_of(spacing, sample, len(shape))
        means = []
        for axis, step in enumerate(steps):
            coordinate = np.zeros(shape)
            for voxel in voxels(shape):
                coordinate[voxel] = voxel[axis] * step
            means.append(weighted_mean(probs[sample, channel], coordinate))
        return means

    return each_channel(probs, len(shape), value)


def spread(probs, spacing=None):
    """Square root of the mean squared distance to the centroid, along each axis."""
    shape = probs.shape[2:]
    centre = centroid(probs, spacing)

    def value(sample, channel):
        steps = spacing_of(spacing, sample, len(shape))
        deviations = []
        for axis, step in enumerate(steps):
            squares = np.zeros(shape)
            for voxel in voxels(shape):
                squares[voxel] = (voxel[axis] * step - centre[sample, channel, axis]) ** 2
            deviations.append(math.sqrt(weighted_mean(probs[sample, channel], squares)))
        return deviations

    return each_channel(probs, len(shape), value)


def moments(probs, spacing=None):
    """Size, then centroid."""
    return np.concatenate([size(probs, spacing), centroid(probs, spacing)], -1)


def fraction(probs, potential):
    """Eq. 2.8 for each of the M potentials; potential (B or 1, M, *S)."""

    def value(sample, channel):
        maps = potential[sample if potential.shape[0] > 1 else 0]
        return [weighted_mean(probs[sample, channel], one) for one in maps]

    return each_channel(probs, potential.shape[1], value)


def volume_size(probs, spacing=None, volume=None):
    """Size of the volume that each slice belongs to: (B, C, 1); spacing has one number more than a slice has axes."""
    slices, dims = size(probs), probs.ndim - 2
    owner = [0] * len(slices) if volume is None else [int(number) for number in volume]
    totals = np.zeros_like(slices)
    for sample, number in enumerate(owner):
        for other, again in enumerate(owner):
            if number == again:
                totals[sample] += slices[other] * math.prod(spacing_of(spacing, other, dims + 1))
    return totals


# Relations between classes


def size_ratio(probs, pairs):
    """Size of the first over the size of the second: (B, R, 1)."""
    sizes = size(probs)
    return np.array([[[row[a, 0] / row[b, 0]] for a, b in pairs] for row in sizes])


def centroid_offset(probs, pairs, spacing=None):
    """Centroid of the second minus centroid of the first: (B, R, D)."""
    centres = centroid(probs, spacing)
    return np.array([[row[b] - row[a] for a, b in pairs] for row in centres])


def extent(line):
    """Degree to which each coordinate of a line lies between two places that the line reaches."""
    return [min(max(line[: x + 1]), max(line[x:])) for x in range(len(line))]


def outside_extent(probs, pairs, along_lines=False):
    """Share of the first class's mass outside the extent of the second along each axis: (B, R, D)."""
    batch, dims, shape = probs.shape[0], probs.ndim - 2, probs.shape[2:]
    found = np.zeros((batch, len(pairs), dims))
    for sample in range(batch):
        for row, (first, second) in enumerate(pairs):
            one, two = probs[sample, first], probs[sample, second]
            for axis in range(dims):
                outside = total = 0.0
                for voxel in voxels(shape):
                    if along_lines:
                        line = [float(two[(*voxel[:axis], x, *voxel[axis + 1 :])]) for x in range(shape[axis])]
                    else:
                        line = [float(np.max(np.take(two, x, axis=axis))) for x in range(shape[axis])]
                    outside += float(one[voxel]) * (1 - extent(line)[voxel[axis]])
                    total += float(one[voxel])
                found[sample, row, axis] = outside / total
    return found


# Costs of one residual. `multiplier` and `penalty` are those of the constraint.


def quadratic(z):
    """Eq. 2.3: [z]+^2."""
    return max(z, 0.0) ** 2


def log_barrier(z, t):
    """Eq. 3.9."""
    if z <= -1 / t**2:
        return -math.log(-z) / t
    return t * z - math.log(1 / t**2) / t + 1 / t


def lagrangian(z, multiplier):
    """Eq. 3.2."""
    return multiplier * z


def relu_lagrangian(z, multiplier):
    """Eq. 3.3: the multiplier acts on the violation alone."""
    return multiplier * max(z, 0.0)


def augmented_lagrangian(z, multiplier, penalty):
    """Powell, Hestenes and Rockafellar's term of an inequality."""
    return (max(multiplier + penalty * z, 0.0) ** 2 - multiplier**2) / (2 * penalty)


# Steps of the multipliers. `visits` is a list of (sample, residuals of that sample) of one epoch.


def mean_of_visits(visits, sample):
    """Mean residual of one sample, None where it was not visited."""
    own = [residuals for number, residuals in visits if number == sample]
    if not own:
        return None
    return [sum(column) / len(own) for column in zip(*own, strict=True)]


def lagrangian_step(multipliers, visits, learning_rate, max_multiplier=math.inf):
    """Projected gradient ascent of each sample's multipliers."""
    stepped = []
    for sample, row in enumerate(multipliers):
        mean = mean_of_visits(visits, sample)
        if mean is None:
            stepped.append(list(row))
        else:
            stepped.append(
                [min(max(old + learning_rate * z, 0.0), max_multiplier) for old, z in zip(row, mean, strict=True)]
            )
    return stepped


def relu_lagrangian_step(multipliers, visits, learning_rate):
    """Each multiplier grows by the summed violation of the data set, of each sample the mean over its visits."""
    steps = [0.0] * len(multipliers)
    for sample in {sample for sample, _ in visits}:
        own = [residuals for other, residuals in visits if other == sample]
        for k in range(len(multipliers)):
            steps[k] += sum(max(residuals[k], 0.0) for residuals in own) / len(own)
    return [old + learning_rate * step for old, step in zip(multipliers, steps, strict=True)]


def augmented_lagrangian_step(multipliers, visits, penalty):
    """First-order update of the method of multipliers."""
    return lagrangian_step(multipliers, visits, penalty)


# The loss


def constraint_loss(values, bounds, cost, *, rows=None, voxels_per_image=None, unit=1.0, reduction="mean"):
    """Cost of the statistic's values (B, C, M) against bounds (B, C, M, 2).

    `cost(z, sample, row, component, side)` gives the cost of one residual; rows: the classes that count, all of them
    if None; voxels_per_image divides the cost unless it is None.
    """
    rows = list(range(values.shape[1])) if rows is None else list(rows)
    costs = np.zeros((values.shape[0], len(rows), values.shape[2]))
    for sample in range(values.shape[0]):
        for row, channel in enumerate(rows):
            for component in range(values.shape[2]):
                f = float(values[sample, channel, component])
                lower, upper = (float(bound) for bound in bounds[sample, channel, component])
                for side, (bound, z) in enumerate([(lower, lower - f), (upper, f - upper)]):
                    if not math.isinf(bound):
                        costs[sample, row, component] += cost(z / unit, sample, row, component, side)
    costs = costs / (1 if voxels_per_image is None else voxels_per_image)
    if reduction == "none":
        return costs
    return costs.sum() if reduction == "sum" else costs.sum() / costs.size


def residuals(values, bounds, unit=1.0):
    """Residuals (B, C, M, 2): lower - f and f - upper, in units."""
    found = np.zeros(bounds.shape)
    for place in np.ndindex(*values.shape):
        found[place] = [(bounds[place][0] - values[place]) / unit, (values[place] - bounds[place][1]) / unit]
    return found


# Partial cross-entropy


def partial_cross_entropy(logits, labels, *, ignore_index=-1, weight=None, reduction="mean", average="image"):
    """Minus the log-softmax of the labelled class, over the labelled voxels; logits (B, C, *S), labels (B, 1, *S)."""
    batch, classes = logits.shape[:2]
    costs, masses = np.zeros(labels.shape), [0.0] * batch
    for sample in range(batch):
        for voxel in voxels(logits.shape[2:]):
            label = int(labels[(sample, 0, *voxel)])
            if label == ignore_index:
                continue
            own = [float(logits[(sample, channel, *voxel)]) for channel in range(classes)]
            top = max(own)
            log_sum = top + math.log(sum(math.exp(one - top) for one in own))
            factor = 1.0 if weight is None else float(weight[label])
            costs[(sample, 0, *voxel)] = factor * (log_sum - own[label])
            masses[sample] += factor
    if reduction == "none":
        return costs
    if reduction == "sum":
        return costs.sum()
    if average == "batch":
        return costs.sum() / sum(masses) if sum(masses) else 0.0
    means = [costs[sample].sum() / mass for sample, mass in enumerate(masses) if mass]
    return sum(means) / len(means) if means else 0.0
