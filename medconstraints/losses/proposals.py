"""Lagrangian with proposals: learn from the nearest label maps whose sizes keep to their bounds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from medconstraints.checks import number, plain, whole_number
from medconstraints.formulations.base import at_least_float32
from medconstraints.losses.base import Probabilities, ProbabilityLoss
from medconstraints.losses.size_proposals import size_proposals

__all__ = ["ProposalLoss"]


class ProposalLoss(ProbabilityLoss):
    """Cross-entropy with proposals of the right size (Pathak 2015; Kervadec, section 1.5.4 and appendix A.4).

    At each forward pass the proposals y~ are the solution of

    min KL(y~ || s) such that lower_k <= sum_p y~_kp <= upper_k, sum_k y~_kp = 1, y~ = y on labelled voxels,

    without gradient (`size_proposals`); then the loss is the cross-entropy -sum_k y~_kp log s_kp, averaged over the
    voxels of the batch. Labelled voxels have their part in it: no partial cross-entropy is needed beside it. Without a
    label and with all bounds free the loss is the mean entropy of s, so give every image one of the two. It is a
    baseline: on an accelerator its solver makes the host wait at every step.

    Args:
        softmax: the input are logits; False takes probabilities.
        logit_scale: factor of the logits before the softmax; the thesis's "softmax temperature 5" is 5.
        ignore_index: value of the weak label on voxels without a label.
        solver: "newton", exact, or "gradient", the published projected gradient ascent; see `size_proposals`.
        tolerance: violation of a bound that counts as none, as a share of the bound, or in voxels for bounds below 1.
        learning_rate: step of "gradient".
        max_steps: largest number of steps of "gradient".
        reduction: "mean" over the voxels of the batch, "sum", or "none" for (B, 1, *S).

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> free = [-torch.inf, torch.inf]
        >>> bounds = torch.tensor([[[free], [[2.0, 4.0]]]])  # class 1: 2 to 4 of the 16 voxels
        >>> loss = ProposalLoss()
        >>> round(loss(torch.zeros(1, 2, 4, 4), bounds).item(), 4)
        0.6931
        >>> round(loss.terms()["multiplier"].item(), 4)        # log(3) for the upper, 0 for the lower bound
        0.5493
    """

    target_keys = ("bounds",)
    optional_keys = ("weak_label",)
    # Not used, but this loss can stand in for a `ConstraintLoss`.
    named_keys = ("index",)

    def __init__(
        self,
        *,
        softmax: bool = True,
        logit_scale: float = 1.0,
        ignore_index: int = -1,
        solver: str = "newton",
        tolerance: float = 1e-4,
        learning_rate: float = 5e-5,
        max_steps: int = 500,
        reduction: str = "mean",
    ) -> None:
        super().__init__(softmax=softmax, logit_scale=logit_scale, reduction=reduction)
        if solver not in ("newton", "gradient"):
            raise ValueError(f'solver: expected "newton" or "gradient", got {solver!r}.')
        if not 1e-5 <= tolerance < 1:
            raise ValueError(f"tolerance: expected a number in [1e-5, 1), got {tolerance!r}; float32 ends there.")
        self.ignore_index = int(ignore_index)
        self.solver = solver
        self.tolerance = float(tolerance)
        self.learning_rate = number("learning_rate", learning_rate, above=0)
        self.max_steps = whole_number("max_steps", max_steps, 1)
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(
        self, input: Tensor, target: Tensor | Mapping[str, Tensor], *, probabilities: Probabilities | None = None
    ) -> Tensor:
        """Loss of a batch.

        Args:
            input: logits (B, C, *S), D = 2 or 3, C >= 2, background first; probabilities with `softmax=False`.
            target: lower and upper size of each class in voxels, (B, C, 1, 2), -inf and inf are free; or a mapping with
                "bounds" and perhaps "weak_label", (B, 1, *S): class numbers, and `ignore_index` without a label.
            probabilities: not used: the logarithm of a softmax is more exact than that of its values.

        Raises:
            ValueError: shapes do not fit, a lower bound is above its upper bound, a label is no class, or the mapping
                has other entries.
        """
        bounds, weak_label = _parts(target)
        with torch.autocast(plain(input).device.type, enabled=False):
            log_probs = self._log_probabilities(plain(input))
            proposals, multipliers = size_proposals(
                log_probs.detach(),
                bounds,
                weak_label,
                ignore_index=self.ignore_index,
                solver=self.solver,
                tolerance=self.tolerance,
                learning_rate=self.learning_rate,
                max_steps=self.max_steps,
            )
            size = log_probs.detach().exp().flatten(2).sum(-1)
            self._last = size, bounds[:, :, 0].to(size), multipliers
            return self.reduced(-(proposals * log_probs).sum(1, keepdim=True))

    def terms(self) -> dict[str, Tensor]:
        """Of the last forward pass, 0-dim tensors on its device: for logging; empty without one.

        Keys: "multiplier", the mean of the multipliers lambda over the bounds that are not free, 0 without any;
        "satisfied", the share of these bounds that the prediction itself keeps, not the proposal, 1 without any.
        """
        if self._last is None:
            return {}
        size, bounds, multipliers = self._last
        used = bounds.isfinite()
        count = used.sum()
        met = torch.stack([size >= bounds[..., 0], size <= bounds[..., 1]], dim=-1)
        multiplier = (multipliers * used).sum() / count.clamp(min=1)
        return {"multiplier": multiplier, "satisfied": ((met & used).sum() / count).nan_to_num(1.0)}

    def left_out(self) -> None:
        """Forget the terms of the last batch."""
        self._last = None

    def _log_probabilities(self, input: Tensor) -> Tensor:
        """Logarithm of s, (B, C, *S): a log-softmax keeps its slope where a softmax is rounded to 0."""
        given = self.probabilities(input)  # checks
        if input.shape[1] < 2:
            raise ValueError(
                f"input: expected C >= 2 channels, background first, got shape {tuple(input.shape)}; a network with "
                "one channel needs a second one for the background."
            )
        if not self.softmax:
            return given.all().clamp(min=torch.finfo(torch.float32).tiny).log()
        return torch.log_softmax(at_least_float32(input) * self.logit_scale, dim=1)

    def extra_repr(self) -> str:
        """Settings shown by `repr`."""
        published = f", learning_rate={self.learning_rate:g}, max_steps={self.max_steps}"
        return f"solver={self.solver!r}, tolerance={self.tolerance:g}" + published * (self.solver == "gradient")


def _parts(target: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Bounds, and the weak label if there is one."""
    if isinstance(target, Tensor):
        return plain(target), None
    if not isinstance(target, Mapping) or "bounds" not in target or set(target) - {"bounds", "weak_label", "index"}:
        got = sorted(map(str, target)) if isinstance(target, Mapping) else type(target).__name__
        raise ValueError(
            'target: expected bounds (B, C, 1, 2), or a mapping with "bounds" and perhaps "weak_label", got '
            f"{got}; name only these in the target keys of this loss."
        )
    weak_label = target.get("weak_label")
    return plain(torch.as_tensor(target["bounds"])), None if weak_label is None else plain(torch.as_tensor(weak_label))
