"""Slow reference of the box prior: loops over images, boxes and bands, voxel masks, numpy float64.

Written from Kervadec 2020, chapter 6 (eq. 6.1 to 6.6), and from the docstring of `BoxPriorLoss`. It shares no code with
the package. `probs` is an array (B, C, *S), `boxes` a list of samples, each a list of rows
[class, start_1..start_D, stop_1..stop_D]; rows of class -1 are padding.
"""

import math

import numpy as np

TIGHTNESS, SIZE, EMPTINESS = range(3)


def log_barrier(t):
    """psi_t of eq. 6.5 for one number."""

    def cost(z):
        if z <= -1 / t**2:
            return -math.log(-z) / t
        return t * z - math.log(1 / t**2) / t + 1 / t

    return cost


def quadratic(z):
    """max(z, 0)^2."""
    return max(z, 0.0) ** 2


def images_of(probs, boxes, slice_axis=None):
    """Images of a batch, sample first, slice second: list of (sample, probabilities (C, *S'), rows)."""
    found = []
    dims = probs.ndim - 2
    for sample in range(probs.shape[0]):
        rows = [list(row) for row in boxes[sample] if row[0] != -1]
        if slice_axis is None:
            found.append((sample, probs[sample], rows))
            continue
        for index in range(probs.shape[2 + slice_axis]):
            flat = []
            for row in rows:
                start, stop = row[1 : 1 + dims], row[1 + dims :]
                if start[slice_axis] == index:
                    assert stop[slice_axis] == index + 1
                    del start[slice_axis], stop[slice_axis]
                    flat.append([row[0], *start, *stop])
            found.append((sample, np.take(probs[sample], index, axis=1 + slice_axis), flat))
    return found


def visible(row, shape):
    """Part of a box within the image, as slices, and for each axis whether the border cuts the box."""
    dims = len(shape)
    slices, cut = [], []
    for axis in range(dims):
        start, stop = row[1 + axis], row[1 + dims + axis]
        cut.append(start < 0 or stop > shape[axis])
        slices.append(slice(max(start, 0), min(stop, shape[axis])))
    return tuple(slices), cut


def bands_of(row, shape, width):
    """Bands of one box: list of (slices, number of lines)."""
    slices, cut = visible(row, shape)
    if all(row[1 + len(shape) + axis] - row[1 + axis] == 1 for axis in range(len(shape))):
        return [(slices, 1)]  # one voxel: it is one band of one line
    bands = []
    for axis in range(len(shape)):
        if row[1 + len(shape) + axis] - row[1 + axis] == 1:
            continue  # one voxel thick: no bands across that axis
        if any(cut[other] for other in range(len(shape)) if other != axis):
            continue  # the lines of these bands run along a cut axis
        first = slices[axis].start
        while first < slices[axis].stop:
            last = min(first + width, slices[axis].stop)
            band = list(slices)
            band[axis] = slice(first, last)
            bands.append((tuple(band), last - first))
            first = last
    return bands


def union_of(rows, shape):
    """Voxels in any of the boxes, a bool mask."""
    mask = np.zeros(shape, dtype=bool)
    for row in rows:
        mask[visible(row, shape)[0]] = True
    return mask


def foreground_of(probs):
    """Number of foreground classes of (B, C, *S), and the channel of class 1."""
    channels = probs.shape[1]
    return (1, 0) if channels == 1 else (channels - 1, 1)


def band_table(probs, boxes, width, slice_axis=None):
    """Every band of a batch: list of (image * classes + class - 1, lines, mass, mask like probs), in no given order."""
    num_classes, first_channel = foreground_of(probs)
    numbers = np.arange(probs.size).reshape(probs.shape)
    table = []
    # The slicing of an array of voxel numbers tells where in `probs` the voxels of an image lie.
    pairs = zip(images_of(probs, boxes, slice_axis), images_of(numbers, boxes, slice_axis), strict=True)
    for image, ((_, own, rows), (_, place, _)) in enumerate(pairs):
        for row in rows:
            channel = row[0] - 1 + first_channel
            for band, lines in bands_of(row, own.shape[1:], width):
                mask = np.zeros(probs.size, dtype=bool)
                mask[place[channel][band].ravel()] = True
                mass = float(own[channel][band].astype(np.float64).sum())
                table.append((image * num_classes + row[0] - 1, lines, mass, mask.reshape(probs.shape)))
    return table


def box_prior(
    probs,
    boxes,
    cost,
    *,
    width=5,
    filling=(0.5, 0.9),
    slice_axis=None,
    weights=(1.0, 1.0, 1.0),
    emptiness="constraint",
    normalization="relative",
):
    """Weighted terms of the loss, (B, K, 3): the part of each sample, foreground class and term in the sum.

    The "relative" loss is their sum; the "paper" loss with the mean over images is their sum over the images.
    """
    probs = np.asarray(probs, dtype=np.float64)
    num_classes, first_channel = foreground_of(probs)
    bounds = np.broadcast_to(np.asarray(filling, dtype=np.float64).reshape(-1, 2), (num_classes, 2))
    images = images_of(probs, boxes, slice_axis)
    terms = np.zeros((probs.shape[0], num_classes, 3))

    # What one image and class gives before any normalisation.
    parts = {}
    for number, (_, own, rows) in enumerate(images):
        for k in range(num_classes):
            channel = own[k + first_channel]
            mine = [row for row in rows if row[0] == k + 1]
            mask = union_of(mine, channel.shape)
            parts[number, k] = {
                "boxes": len(mine),
                "volume": int(mask.sum()),
                "cut": any(any(visible(row, channel.shape)[1]) for row in mine),
                "bands": [
                    (lines, channel[band].sum()) for row in mine for band, lines in bands_of(row, mask.shape, width)
                ],
                "inside": channel[mask].sum(),
                "outside": channel[~mask].sum(),
                "cross_entropy": sum(-math.log(1 - s) for s in channel[~mask]),
            }

    volumes = {
        k: [parts[n, k]["volume"] for n in range(len(images)) if parts[n, k]["boxes"]] for k in range(num_classes)
    }
    classes_with_boxes = [k for k in range(num_classes) if volumes[k]]
    # What a class without any box in the batch takes: the means over the others.
    mean_count = np.mean([len(volumes[k]) for k in classes_with_boxes]) if classes_with_boxes else len(images)
    mean_sum = np.mean([sum(volumes[k]) for k in classes_with_boxes]) if classes_with_boxes else None
    for number, (sample, own, _) in enumerate(images):
        voxels = own[0].size
        for k in range(num_classes):
            part = parts[number, k]
            lower, upper = bounds[k]
            volume, inside, outside = part["volume"], part["inside"], part["outside"]
            if normalization == "paper":
                tight = sum(cost(lines - mass) for lines, mass in part["bands"])
                size = empty = 0.0
                if part["boxes"] and not part["cut"]:
                    size = cost(lower * volume - (inside + outside)) + cost((inside + outside) - upper * volume)
                    size /= voxels
                empty = (cost(outside) if emptiness == "constraint" else part["cross_entropy"]) / voxels
            else:
                tight = size = 0.0
                if part["boxes"]:
                    share = volume / sum(volumes[k]) / len(classes_with_boxes)
                    if part["bands"]:
                        tight = share * np.mean([cost(1 - mass / lines) for lines, mass in part["bands"]])
                    if not part["cut"]:
                        size = share * (cost(lower - inside / volume) + cost(inside / volume - upper))
                count = len(volumes[k]) or mean_count
                summed = sum(volumes[k]) or mean_sum or voxels * len(images)
                if emptiness == "constraint":
                    empty = cost(outside / (summed / count)) / count
                else:
                    empty = part["cross_entropy"] / summed
                empty /= max(len(classes_with_boxes), 1)
            terms[sample, k] += np.array([tight, size, empty]) * weights
    return terms
