"""Segmentation from bounding boxes: tightness, emptiness and size constraints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medconstraints import checks
from medconstraints.checks import plain
from medconstraints.formulations.base import Formulation
from medconstraints.losses.base import ConstrainedLoss, Probabilities, Residuals, one_entry
from medconstraints.losses.box_constraints import FUNCTIONS, KINDS, BoxConstraints, box_constraints
from medconstraints.statistics.box_plan import BoxPlan, plan_boxes, to_device
from medconstraints.statistics.boxes import box_sums, inside_mask

__all__ = ["BoxPriorLoss"]


class BoxPriorLoss(ConstrainedLoss):
    """Box tightness prior with emptiness and size constraints (Kervadec 2020, chapter 6, eq. 6.6).

    For every image and class, with Omega_I the voxels inside its boxes, V_I and V_O the soft size inside and outside,
    and psi the formulation:

    - tightness: a band of w lines of a box holds at least w voxels of the class, psi(w - sum_band s) (eq. 6.2);
    - size: lower |Omega_I| <= V_I <= upper |Omega_I|, one psi for each side (eq. 6.3);
    - emptiness: nothing outside the boxes, psi(V_O) (eq. 6.1), or the cross-entropy -sum_outside log(1 - s) instead.

    `normalization="relative"` (default) divides each residual by its own scale: a band's by its width, a size by
    |Omega_I|, V_O by the mean |Omega_I| of the class in the batch. Tightness is averaged over the bands of an image,
    then tightness and size over the images of the class, each weighing as much as its boxes hold voxels; emptiness is
    summed over all images and divided by the number of images with boxes; then all over the classes that have boxes.
    In this way a voxel pulls alike inside a large box, inside the small box at the end of an organ, and outside, and a
    weight means the same whatever the image size and the number of boxes. An image without a box of a class has only
    the emptiness term for it.

    `normalization="paper"` is eq. 6.6 as published: residuals in voxels, the tightness a plain sum over bands, V the
    size in the whole image, size and emptiness divided by the number of voxels of the image, sums over classes, mean
    over images. The published settings are `weights={"tightness": 1e-4}` and `filling=(0.5, 0.9)`.

    A formulation with multipliers has four constraints of each sample and class, see `residual`.

    Args:
        formulation: residual -> cost, such as `LogBarrierExtension()` or `QuadraticPenalty()`.
        width: lines per band, w, in voxels: 5 in the thesis, for boxes of a hundred pixels. The bundle `box_prior` sets
            1, for objects that are not much thicker than 5 voxels.
        filling: smallest and largest share of its boxes that an object fills, 0 <= lower <= upper <= 1, or one such
            pair for each foreground class. `medconstraints.boxes.fit_filling` fits them to a few segmented cases.
        slice_axis: None when boxes span the volume; 0, 1 or 2 when every object has one flat box per slice across that
            spatial axis. Each slice is then an image of its own (the setting of the thesis).
        weights: weight of "tightness", "size" and "emptiness"; 1 for one that is left out, 0 drops it. Read at every
            forward pass, so a schedule may change `loss.weights[name]`.
        emptiness: "constraint" or "cross_entropy".
        normalization: "relative" or "paper".
        sigmoid: apply a sigmoid to the input.
        softmax: apply a softmax over the channels of the input.
        reduction: "mean" or "sum" over images (one and the same for "relative", which is an average already), or "none"
            for the part of each sample and foreground class in that sum, (B, K).

    Raises:
        TypeError: `formulation` is none.
        ValueError: an argument is outside its range.

    Example:
        >>> from medconstraints.formulations import LogBarrierExtension
        >>> loss = BoxPriorLoss(LogBarrierExtension(), softmax=True)
        >>> boxes = torch.tensor([[[1, 2, 2, 12, 12]]])      # class 1 in rows 2..11 and columns 2..11
        >>> float(loss(torch.zeros(1, 2, 16, 16), boxes)) > 0
        True
    """

    target_keys: tuple[str, ...] = ("boxes",)
    host_keys = frozenset({"boxes", "index"})

    def __init__(
        self,
        formulation: Formulation,
        *,
        width: int = 5,
        filling: Sequence[float] | Sequence[Sequence[float]] = (0.5, 0.9),
        slice_axis: int | None = None,
        weights: Mapping[str, float] | None = None,
        emptiness: str = "constraint",
        normalization: str = "relative",
        sigmoid: bool = False,
        softmax: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__(sigmoid=sigmoid, softmax=softmax, reduction=reduction)
        if not isinstance(formulation, Formulation):
            raise TypeError(
                f"formulation: expected one such as LogBarrierExtension(), got {type(formulation).__name__}."
            )
        unknown = sorted(set(weights or {}) - set(KINDS))
        if unknown:
            raise ValueError(f"weights: {unknown} name no term; these are {list(dict.fromkeys(KINDS))}.")
        if emptiness not in ("constraint", "cross_entropy"):
            raise ValueError(f'emptiness: expected "constraint" or "cross_entropy", got {emptiness!r}.')
        if normalization not in ("relative", "paper"):
            raise ValueError(f'normalization: expected "relative" or "paper", got {normalization!r}.')
        self.formulation = formulation
        self.width = checks.whole_number("width", width, 1)
        self.filling = _checked_filling(filling)
        self.slice_axis = checks.slice_axis(slice_axis)
        given = {kind: 1.0 for kind in KINDS} | dict(weights or {})
        self.weights = {kind: checks.number(f"weights[{kind!r}]", given[kind], least=0) for kind in given}
        self.emptiness = emptiness
        self.normalization = normalization
        keys = ("boxes", "index")
        self.target_keys, self.optional_keys = (keys, ()) if formulation.needs_index else (keys[:1], keys[1:])
        self._seen: tuple[_Batch, Tensor] | None = None

    # Where boxes and bands lie is planned on the host: a break in a compiled graph.
    @torch.compiler.disable
    def forward(
        self, input: Tensor, target: Tensor | Mapping[str, Any], *, probabilities: Probabilities | None = None
    ) -> Tensor:
        """Loss of a batch.

        Args:
            input: (B, C, *S), D = 2 or 3: probabilities, or logits with `softmax` or `sigmoid`. Background first; with
                C = 1 the channel is class 1.
            target: boxes (B, N, 1 + 2 D) int, rows [class, start_1..start_D, stop_1..stop_D], half-open, class -1 =
                padding. Best on the CPU, whatever the input's device (see `plan_boxes`). Or a mapping with "boxes", and
                "index", the samples' numbers in the data set (B,), which some formulations with multipliers need.
            probabilities: of this input, shared with other losses.

        Raises:
            TypeError: the boxes are not integers.
            ValueError: shapes do not fit, or a box is not valid; the message names the sample and the row.
        """
        input = plain(input)
        with torch.autocast(input.device.type, enabled=False):
            batch = self._batch(input, target, probabilities)
            cost = self._costs(batch)
            # "relative" is a mean already.
            images = len(batch.plan.volume) if self.normalization == "paper" and self.reduction == "mean" else 1
            self._seen = batch._replace(residual=batch.residual.detach()), cost.detach() / images
            value = batch.table(cost).sum(-1) if self.reduction == "none" else cost.sum() / images
            return value.to(batch.dtype)

    def residual(
        self, input: Tensor, target: Tensor | Mapping[str, Any], *, probabilities: Probabilities | None = None
    ) -> Residuals:
        """Constraints of each sample and foreground class, (B, K, 4) as `FUNCTIONS` names them.

        All rows of one function (bands, and in slices those of all slices) make one residual: the mean of their
        max(z, 0), weighted as in the loss, so that no row makes up for another; and when all are satisfied the largest
        z, that of the row nearest to its bound. One row is its own residual. A function is free where no row counts:
        without a box, for the size of a box that the border cuts, with a weight of 0, and the emptiness as a
        cross-entropy.

        Arguments and errors as for `forward`; the gradient is kept.
        """
        with torch.autocast(plain(input).device.type, enabled=False):
            return self._constraints(self._batch(plain(input), target, probabilities))

    @property
    def last(self) -> Residuals | None:  # type: ignore[override]
        """Constraints of the last forward pass as `residual` has them, detached; None without one."""
        return None if self._seen is None else self._constraints(self._seen[0])

    def terms(self) -> dict[str, Tensor]:
        """Parts of the last forward pass, detached 0-dim tensors on its device: for logging; empty without one.

        Keys: "tightness", "size", "emptiness": weighted, they add up to the loss ("none" to the sum of its entries);
        "satisfied_tightness", "satisfied_size": share of the rows with a residual <= 0, 1 in a batch without such a
        row. The share of a term whose weight is 0 is left out.
        """
        if self._seen is None:
            return {}
        batch, cost = self._seen
        sums = batch.table(cost).sum((0, 1)).float()
        terms = {"tightness": sums[0], "size": sums[1] + sums[2], "emptiness": sums[3]}
        bands, groups = len(batch.plan.bands.width), batch.plan.volume.size
        for name, rows in (("tightness", slice(bands)), ("size", slice(bands, bands + 2 * groups))):
            if self.weights[name] > 0:
                used = batch.weight[rows] > 0
                met = (batch.residual[rows] <= 0) & used
                terms[f"satisfied_{name}"] = (met.sum() / used.sum()).nan_to_num(1.0)
        return terms

    def constraint_names(self, shape: Sequence[int], class_names: Mapping[int, str]) -> list[str]:
        """`<function>_<class>` of the residuals (K, 4) of one sample."""
        labels = [class_names.get(number, str(number)) for number in range(1, 1 + shape[0])]
        return [f"{function}_{label}" for label in labels for function in FUNCTIONS]

    def left_out(self) -> None:
        """Nothing was computed in this batch."""
        self._seen = None

    def _batch(self, input: Tensor, target: Tensor | Mapping[str, Any], probabilities: Probabilities | None) -> _Batch:
        """Name the constraints of a batch and measure their residuals."""
        shared = self.probabilities(input) if probabilities is None else probabilities
        # Of a softmax of two channels the foreground is half the work; any other part costs more than all, in the
        # gradient.
        probs = shared.channels([1]) if self.softmax and input.shape[1] == 2 else shared.all()
        plan = plan_boxes(
            plain(one_entry(target, "boxes")),
            input.shape,
            width=self.width,
            slice_axis=self.slice_axis,
            device=probs.device,
        )
        rows = box_constraints(plan, filling=self.filling, weights=self.weights, normalization=self.normalization)
        sums = box_sums(probs, plan)
        sized = sums.total if self.normalization == "paper" else sums.inside
        if self.emptiness == "constraint":
            outside = sums.total - sums.inside
        else:
            missed = plan.images(self._log_background(input, probs)).masked_fill(inside_mask(plan), 0.0)
            outside = -missed.flatten(2).sum(-1, dtype=sized.dtype)
        mass = torch.cat([sums.bands, *(value.reshape(-1) for value in (sized, sized, outside))])
        offset, scale, weight = to_device(np.stack([rows.offset, rows.scale, rows.weight]), probs.device)
        index = target.get("index") if isinstance(target, Mapping) else None
        return _Batch(
            plan=plan,
            rows=rows,
            residual=torch.addcmul(offset, scale, mass),
            weight=weight,
            cell=to_device(rows.cells(plan.volume.shape[1]), probs.device),
            index=None if index is None else torch.as_tensor(index),
            dtype=probs.dtype,
        )

    def _costs(self, batch: _Batch) -> Tensor:
        """Weighted costs of the rows, (R,), or with multipliers of the functions, (B, K, 4)."""
        if self.formulation.has_multipliers:
            constraints = self._constraints(batch)
            cost = self.formulation(constraints.residual, constraints.index) * batch.table(batch.weight)
        else:
            cost = self.formulation(batch.residual) * batch.weight
        if self.emptiness == "constraint":
            return cost
        missed = batch.residual * batch.weight  # no constraint: the row is the cost itself
        if self.formulation.has_multipliers:
            return torch.cat([cost[..., :-1], batch.table(missed)[..., -1:]], -1)
        groups = batch.plan.volume.size
        return torch.cat([cost[:-groups], missed[-groups:]])

    def _constraints(self, batch: _Batch) -> Residuals:
        """One residual for each function, see `residual`."""
        rows, shape = batch.rows, batch.shape
        cells, weight = rows.cells(shape[1]), rows.weight
        if self.emptiness == "cross_entropy":
            weight = weight * (rows.function != FUNCTIONS.index("emptiness"))
        total = np.bincount(cells, weight, minlength=int(np.prod(shape)))
        share = to_device(weight / np.where(total > 0, total, 1.0)[cells], batch.residual.device)
        free = to_device((total == 0).reshape(shape), share.device)
        violation = batch.table(batch.residual.clamp(min=0) * share)
        counted = batch.residual.masked_fill(share == 0, -torch.inf)
        worst = torch.full_like(violation, -torch.inf).view(-1).scatter_reduce(0, batch.cell, counted, "amax")
        residual = violation + worst.view(shape).clamp(max=0)
        return Residuals(residual.masked_fill(free, 0.0), free, batch.index)

    def _log_background(self, input: Tensor, probs: Tensor) -> Tensor:
        """log(1 - s) of the foreground classes, (B, K, *S), with a slope also where s is rounded to 1."""
        if not (self.sigmoid or self.softmax):
            return torch.log1p(-probs.clamp(max=1 - torch.finfo(probs.dtype).eps))
        logits = input.to(probs.dtype)
        if self.sigmoid:
            return F.logsigmoid(-logits)
        if logits.shape[1] == 2:
            return F.logsigmoid(logits[:, :1] - logits[:, 1:])
        # 1 - s_k is the sum of the other channels: their logarithms are added before any is rounded to 0.
        others = [
            torch.cat([logits[:, :k], logits[:, k + 1 :]], 1).logsumexp(1, keepdim=True)
            for k in range(1, logits.shape[1])
        ]
        return torch.cat(others, 1) - logits.logsumexp(1, keepdim=True)

    def extra_repr(self) -> str:
        """Settings shown by `repr`."""
        return (
            f"width={self.width}, filling={self.filling.tolist()}, slice_axis={self.slice_axis}, "
            f"weights={self.weights}, emptiness={self.emptiness!r}, normalization={self.normalization!r}"
        )


class _Batch(NamedTuple):
    """The constraints of one batch: their names, and on the device the residual, weight and table cell of each row."""

    plan: BoxPlan
    rows: BoxConstraints
    residual: Tensor
    weight: Tensor
    cell: Tensor
    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """Samples, foreground classes, functions."""
        images, classes = self.plan.volume.shape
        return images // self.plan.num_slices, classes, len(FUNCTIONS)

    def table(self, values: Tensor) -> Tensor:
        """Sums of the rows (R,) of each sample, class and function, (B, K, 4); a table stays one."""
        if values.dim() > 1:
            return values
        return values.new_zeros(int(np.prod(self.shape))).index_add(0, self.cell, values).view(self.shape)


def _checked_filling(filling: Any) -> np.ndarray:
    """(1, 2) or (K, 2)."""
    try:
        bounds = np.asarray(filling, dtype=np.float64).reshape(-1, 2)
    except (TypeError, ValueError):
        bounds = np.zeros((0, 2))
    if not len(bounds) or not ((bounds >= 0) & (bounds <= 1)).all() or (np.diff(bounds) < 0).any():
        raise ValueError(
            "filling: expected (lower, upper) shares of the box with 0 <= lower <= upper <= 1, or one such pair per "
            f"foreground class, got {filling!r}."
        )
    return bounds
