"""Proposals: the label map nearest to a prediction among those whose class sizes keep to their bounds.

For every image, min KL(y~ || s) over y~ with `lower_k <= sum_p y~_kp <= upper_k` and `sum_k y~_kp = 1` (Pathak 2015;
Kervadec, eq. 1.24 and appendix A.4). The solution is a shift of the log-probabilities of each class, one number for the
whole image (eq. A.12):

y~_kp = s_kp exp(-mu_k) / sum_j s_jp exp(-mu_j), mu = lambda_upper - lambda_lower, lambda >= 0.

Voxels with a weak label take their one-hot label, and count for the size of its class.

- "newton" solves for mu: classes one after the other by Newton's method inside a bracket, all of them together by
  Newton steps where those help (needed when several classes compete for the same voxels).
- "gradient" is the published projected gradient ascent, `lambda <- max(0, lambda + learning_rate * gradient)`, the
  gradients `V - upper` and `lower - V` in voxels (eq. A.13), with the bounds 0..0 replaced by -1..0. The published 500
  steps of 5e-5 are meant for images of 256 x 256; they may be too few for smaller images and too large for volumes,
  where the multipliers oscillate. The proposals then violate the bounds.

An image is done when each size is within `tolerance * max(1, |bound|)` voxels of the bound whose multiplier is not 0,
and violates no other bound by more. Bounds that no proposal can meet (an upper bound of 0, or one below the number of
labelled voxels; a lower bound above what is left) are replaced by what can be reached up to that tolerance, so "newton"
keeps the multipliers finite: about the log-odds of s plus log(voxels / tolerance). Bounds of several classes that
contradict each other end after a fixed number of rounds with multipliers of at most 1000.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from medconstraints import checks
from medconstraints.formulations.base import at_least_float32
from medconstraints.losses.class_label import checked_label

__all__ = ["size_proposals"]

# Shifts of log-probabilities beyond it would lose the precision of float32; only bounds that contradict each other
# (lower bounds that add up to more than the image) come near it.
_LARGEST_SHIFT = 1000.0
_ROUNDS = 50
_ROUNDS_PER_SWEEP = 10
_PIVOTS = 24
_STEPS_PER_CLASS = 40
_STEPS_PER_CHECK = 10


class _Problem(NamedTuple):
    """Images as rows of voxels, and the bounds of what the voxels without a label add to each class."""

    log_probs: Tensor  # (B, C, N)
    free: Tensor | None  # (B, 1, N) bool, False on labelled voxels; None without labels
    voxels: Tensor  # (B,) number of free voxels
    bounds: Tensor  # (B, C, 2) lower, upper
    slack: Tensor  # (B, C, 2) violation that counts as none


@torch.no_grad()
def size_proposals(
    log_probs: Tensor,
    bounds: Tensor,
    weak_label: Tensor | None = None,
    *,
    ignore_index: int = -1,
    solver: str = "newton",
    tolerance: float = 1e-4,
    learning_rate: float = 5e-5,
    max_steps: int = 500,
) -> tuple[Tensor, Tensor]:
    """Proposals y~ of the Lagrangian with proposals, without gradient; see the module.

    Args:
        log_probs: log s, (B, C, *S), of probabilities that add up to 1 over the C >= 2 channels.
        bounds: lower and upper size of each class in voxels, (B, C, 1, 2); -inf and inf are free.
        weak_label: (B, 1, *S), class number on labelled voxels, `ignore_index` elsewhere. None is no label.
        ignore_index: value of `weak_label` on voxels without a label.
        solver: "newton" or "gradient".
        tolerance: violation of a bound that counts as none, as a share of the bound, or in voxels for bounds below 1.
        learning_rate: step of "gradient".
        max_steps: largest number of steps of "gradient".

    Returns:
        y~, (B, C, *S), and the multipliers lambda of the lower and upper bounds, (B, C, 2); at least float32.

    Raises:
        ValueError: shapes do not fit, a lower bound is above its upper bound, or a label is no class.

    Example:
        >>> free = [-torch.inf, torch.inf]
        >>> bounds = torch.tensor([[[free], [[2.0, 4.0]]]])
        >>> proposals, multipliers = size_proposals(torch.full((1, 2, 4, 4), 0.5).log(), bounds)
        >>> round(float(proposals[0, 1].sum()), 2), round(float(multipliers[0, 1, 1]), 2)  # log(3)
        (4.0, 1.1)
    """
    shape, rows = log_probs.shape, at_least_float32(log_probs).flatten(2).clamp(min=-_LARGEST_SHIFT)
    size_bounds = checks.bounds(bounds, (*shape[:2], 1))[:, :, 0].to(rows)
    free, one_hot, labelled = None, None, torch.zeros_like(rows[..., 0])
    voxels = torch.full_like(labelled[:, 0], rows.shape[-1])
    if weak_label is not None:
        if 0 <= ignore_index < shape[1]:
            raise ValueError(f"ignore_index: expected a number that is no class, got {ignore_index}; -1 is usual.")
        unknown = weak_label == ignore_index
        label = checked_label(weak_label.masked_fill(unknown, 0), log_probs).long().flatten(2)
        free = unknown.to(rows.device).flatten(2)
        one_hot = torch.zeros_like(rows).scatter_(1, label, 1)
        labelled = (one_hot * ~free).sum(-1)
        voxels = free.sum((1, 2)).to(rows)
    slack = tolerance * torch.where(size_bounds.isfinite(), size_bounds.abs(), 0).clamp(min=1)
    problem = _Problem(rows, free, voxels, size_bounds - labelled[..., None], slack)
    if solver == "gradient":
        shift, multipliers = _gradient_ascent(problem, size_bounds, learning_rate, max_steps)
    else:
        shift = _newton(problem, tolerance)
        multipliers = torch.stack([-shift, shift], dim=-1).relu()
    proposals = _proposals(rows, shift)
    if free is not None and one_hot is not None:
        proposals = torch.where(free, proposals, one_hot)
    return proposals.view(shape), multipliers


def _proposals(log_probs: Tensor, shift: Tensor) -> Tensor:
    """Eq. A.12, (B, C, N)."""
    return torch.softmax(log_probs - shift[..., None], dim=1)


def _gradient_ascent(
    problem: _Problem, size_bounds: Tensor, learning_rate: float, max_steps: int
) -> tuple[Tensor, Tensor]:
    """Projected gradient ascent on the dual function (eq. A.13): mu (B, C) and lambda (B, C, 2)."""
    # An equality is nothing that the published method can handle: 0..0 becomes -1..0.
    nothing = (size_bounds == 0).all(-1)
    lower = torch.where(nothing, problem.bounds[..., 0] - 1, problem.bounds[..., 0])
    upper = problem.bounds[..., 1]
    multipliers = torch.zeros_like(problem.bounds)
    running = torch.ones_like(problem.voxels, dtype=torch.bool)
    for step in range(1, max_steps + 1):
        proposals = _proposals(problem.log_probs, multipliers[..., 1] - multipliers[..., 0])
        if problem.free is not None:
            proposals.mul_(problem.free)
        size = proposals.sum(-1)
        gradient = torch.stack([lower - size, size - upper], dim=-1)
        raised = (multipliers + learning_rate * gradient).clamp(min=0)
        moves = (raised - multipliers).abs() > learning_rate * problem.slack
        running = running & moves.flatten(1).any(1)
        multipliers = torch.where(running[:, None, None], raised, multipliers)
        # Reading the flag waits for the device.
        if step % _STEPS_PER_CHECK == 0 and not bool(running.any()):
            break
    return multipliers[..., 1] - multipliers[..., 0], multipliers


def _newton(problem: _Problem, tolerance: float) -> Tensor:
    """Maximum of the dual function over mu = lambda_upper - lambda_lower, (B, C)."""
    classes = problem.bounds.isfinite().any(-1).any(0).nonzero().flatten().tolist()
    shift = torch.zeros_like(problem.bounds[..., 0])
    if not classes:
        return shift
    # What can be reached with a finite shift: not 0 and not all of the free voxels.
    voxels = problem.voxels[:, None]
    lower = torch.minimum(problem.bounds[..., 0], voxels * (1 - tolerance / 2))
    upper = torch.maximum(problem.bounds[..., 1], problem.slack[..., 1] / 2)
    # The replacement took half of the slack.
    problem = problem._replace(bounds=torch.stack([lower, upper], dim=-1), slack=problem.slack / 2)

    worst = torch.full_like(problem.voxels, torch.inf)
    size = shared = shift
    better = torch.zeros_like(worst, dtype=torch.bool)
    for round_ in range(_ROUNDS):
        stuck = (worst > 1) if round_ % _ROUNDS_PER_SWEEP == 0 else ~better & (worst > 1)
        if bool(stuck.any()):
            swept = _sweep(problem, shift, classes)
            shift = torch.where(stuck[:, None], swept, shift)
            size, shared = _size_and_shared(problem, shift)
            worst = _excess(problem, shift, size)
        if not bool((worst > 1).any()):
            break
        joint = _joint_step(problem, shift, size, shared)
        joint_size, joint_shared = _size_and_shared(problem, joint)
        joint_worst = _excess(problem, joint, joint_size)
        # The dual function is concave: if it still rises at the end of the step, it rose all along.
        step = joint - shift
        facing = torch.where((joint > 0) | ((joint == 0) & (step < 0)), problem.bounds[..., 1], problem.bounds[..., 0])
        rises = torch.where(step != 0, step * (joint_size - facing), 0).sum(1) > 0
        better = (worst > 1) & (rises | (joint_worst <= worst / 2))
        shift = torch.where(better[:, None], joint, shift)
        size = torch.where(better[:, None], joint_size, size)
        shared = torch.where(better[:, None, None], joint_shared, shared)
        worst = torch.where(better, joint_worst, worst)
    return shift


def _size_and_shared(problem: _Problem, shift: Tensor) -> tuple[Tensor, Tensor]:
    """On the free voxels: size of each class, (B, C), and d size_k / d mu_j = sum_p y_kp y_jp for j != k, (B, C, C)."""
    proposals = _proposals(problem.log_probs, shift)
    if problem.free is not None:
        proposals.mul_(problem.free)
    shared = proposals @ proposals.mT
    return proposals.sum(-1), shared - torch.diag_embed(shared.diagonal(dim1=1, dim2=2))


def _excess(problem: _Problem, shift: Tensor, size: Tensor) -> Tensor:
    """Largest violation of the optimality conditions of each image, in units of the slack, (B,)."""
    below = (problem.bounds[..., 0] - size) / problem.slack[..., 0]
    above = (size - problem.bounds[..., 1]) / problem.slack[..., 1]
    # A multiplier that is not 0 needs a size at the bound (complementary slackness).
    excess = torch.where(shift > 0, above.abs(), torch.where(shift < 0, below.abs(), torch.maximum(below, above)))
    return torch.where(shift.abs() < _LARGEST_SHIFT, excess, 0).amax(1)


def _joint_step(problem: _Problem, shift: Tensor, size: Tensor, shared: Tensor) -> Tensor:
    """Newton step of all classes, (B, C): towards the solution for sizes that are linear in mu.

    Each class has mu > 0 and its upper size, mu < 0 and its lower size, or mu = 0 and a size in between. Classes in the
    wrong state change it, all together, later one by one, until none is (block principal pivoting).
    """
    # Tiny matrices, one round trip: quicker on the host, and float64 is there on every host.
    lower, upper, at, size, shared = (
        x.cpu().double() for x in (problem.bounds[..., 0], problem.bounds[..., 1], shift, size, shared)
    )
    coupling = torch.diag_embed(shared.sum(-1)) - shared
    # The matrix is singular when all classes move, or when those that move share no voxel with the others.
    ridge = 1e-10 * coupling.diagonal(dim1=1, dim2=2).amax(1, keepdim=True) + 1e-30
    state = torch.where(at != 0, at.sign(), (size > upper).double() - (size < lower).double())
    for turn in range(_PIVOTS):
        moving = state != 0
        goal = torch.where(state > 0, upper, torch.where(state < 0, lower, size))
        fixed = torch.where(moving, 0, -at)
        right = torch.where(moving, size - goal - (coupling @ fixed[..., None]).squeeze(-1), fixed)
        matrix = torch.where(moving[:, :, None] & moving[:, None], coupling, 0)
        matrix = matrix + torch.diag_embed(torch.where(moving, ridge, 1.0))
        step = torch.linalg.solve_ex(matrix, right[..., None])[0].squeeze(-1).nan_to_num(0, 0, 0)
        expected = size - (coupling @ step[..., None]).squeeze(-1)
        turned = torch.where(moving, 0, (expected > upper).double() - (expected < lower).double())
        wrong = (moving & ((at + step) * state < 0)) | (turned != 0)
        if not bool(wrong.any()):
            break
        if turn >= _PIVOTS // 3:
            wrong &= wrong.cumsum(1) == 1
        state = torch.where(wrong, turned, state)
    # When all classes move, one number added to all changes nothing: one of them is 0, without a change of sign.
    end = at + step
    common = end.gather(1, end.abs().argmin(1, keepdim=True))
    step = torch.where((state != 0).all(1, keepdim=True), step - common, step)
    # Damping of the kind that makes Newton's method converge for sums of log-sum-exp (generalised self-concordance):
    # what counts is how far the classes move apart.
    length = (step.amax(1, keepdim=True) - step.amin(1, keepdim=True)).mul(0.5).clamp(min=1e-30)
    moved = at + step * (torch.log1p(length) / length)
    # Else a multiplier on its way to 0 would never arrive.
    moved = torch.where((state == 0) & (moved.abs() < 0.01), 0, moved)
    return moved.clamp(-_LARGEST_SHIFT, _LARGEST_SHIFT).to(shift)


def _sweep(problem: _Problem, shift: Tensor, classes: list[int]) -> Tensor:
    """Exact solution for one class after the other, the shifts of the other classes fixed, (B, C)."""
    shift = shift.clone()
    for k in classes:
        others = [j for j in range(shift.shape[1]) if j != k]
        rest = problem.log_probs[:, others] - shift[:, others, None]
        log_odds = problem.log_probs[:, k] - (rest[:, 0] if len(others) == 1 else rest.logsumexp(1))
        lowest, highest = log_odds.amin(1), log_odds.amax(1)
        if problem.free is not None:
            # These voxels add nothing to the class.
            log_odds = log_odds.masked_fill(~problem.free[:, 0], -torch.inf)
        shift[:, k] = _class_shift(
            log_odds, lowest, highest, problem.voxels, problem.bounds[:, k], problem.slack[:, k], shift[:, k]
        )
    return shift


def _class_shift(
    log_odds: Tensor, lowest: Tensor, highest: Tensor, voxels: Tensor, bounds: Tensor, slack: Tensor, start: Tensor
) -> Tensor:
    """Shift x of one class: 0 if sum sigmoid(log_odds) keeps to its bounds, else sum sigmoid(log_odds - x) = bound.

    The root is found on the scale logit(size / voxels), which is close to a line of slope -1 far from the root. Newton
    steps that leave the bracket, or do not halve the error, are replaced by its middle.
    """
    tiny, eps = torch.finfo(log_odds.dtype).tiny, torch.finfo(log_odds.dtype).eps

    def logit(size: Tensor) -> Tensor:
        return torch.log(size.clamp(min=tiny)) - torch.log((voxels - size).maximum(voxels * eps))

    size = torch.sigmoid(log_odds).sum(-1)
    above, below = size > bounds[:, 1], size < bounds[:, 0]
    active = above | below
    target = torch.where(above, bounds[:, 1], bounds[:, 0])
    allowed = torch.where(above, slack[:, 1], slack[:, 0]) / 2
    goal = logit(target)
    # All voxels at the lowest or all at the highest log-odds have the root at the ends of the bracket.
    low = torch.where(below, lowest - goal, (lowest - goal).clamp(min=0)).clamp(min=-_LARGEST_SHIFT)
    high = torch.where(above, highest - goal, (highest - goal).clamp(max=0)).clamp(max=_LARGEST_SHIFT)
    first = torch.where((start > low) & (start < high), start, (logit(size) - goal).clamp(low, high))
    x = torch.where(active, first, 0)
    last = torch.full_like(x, torch.inf)
    for _ in range(_STEPS_PER_CLASS):
        share = torch.sigmoid(log_odds - x[:, None])
        size = share.sum(-1)
        moving = active & ((size - target).abs() > allowed)
        if not bool(moving.any()):
            break
        gap = logit(size) - goal
        low, high = torch.where(gap > 0, x, low), torch.where(gap < 0, x, high)
        slope = torch.addcmul(share, share, share, value=-1).sum(-1) * voxels / (size * (voxels - size))
        step = x + gap / slope
        usable = (step > low) & (step < high) & (gap.abs() <= last / 2)
        x = torch.where(moving, torch.where(usable, step, (low + high) / 2), x)
        last = gap.abs()
    return x
