"""SAFLEX: weights and soft labels of augmented samples, chosen by what a step on them does for a guide loss.

A step on a sample with soft label y and weight w lowers the guide loss, to first order, by w <y, Pi> with
`Pi_k = -<grad_theta log f_k(x), v>`, f the softmax of the network and v the gradient of the guide loss (SAFLEX,
section 3, theorem 1). So the best label is where Pi is largest, and a sample is worth keeping where <y, Pi> >= 0.

Pi comes from one more pass without a graph, at parameters a small step down v: `label_gains`. `refine` makes labels and
weights of it. Both take any logits, also those of a batch against itself, as contrastive losses have them
(`proxy_logits`), and of every voxel (`region_gains`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from medconstraints import checks

__all__ = ["Refined", "RefinedBatch", "Rules", "guide_step", "label_gains", "proxy_logits", "refine", "region_gains"]

_TINY = 1e-30


def guide_step(
    parameters: Mapping[str, Tensor], direction: Mapping[str, Tensor], *, length: float = 1e-3
) -> tuple[dict[str, Tensor], float]:
    """Parameters a small step down the guide gradient, and eps, the step as a multiple of it: for `label_gains`.

    Args:
        parameters: theta, by name.
        direction: v, by name.
        length: of the step in the space of the parameters, eps ||v||.
    """
    norm = float(torch.stack([value.norm() for value in direction.values()]).norm())
    eps = length / max(norm, _TINY)
    return {name: value.detach().sub(direction[name], alpha=eps) for name, value in parameters.items()}, eps


def label_gains(logits: Tensor, moved: Tensor, eps: float, *, centred: bool = True) -> Tensor:
    """Pi, (B, K, *S): by how much a step on a sample with label k lowers the guide loss, per unit of the step.

    From differences along v, wrong by less than 2e-3 with GroupNorm and 2e-2 with BatchNorm at the default length.

    Args:
        logits: z(theta), (B, K), or of each voxel (B, K, *S).
        moved: z(theta - eps v) of the same images in the same mode.
        eps: see `guide_step`.
        centred: subtract the mean over the batch from the change of each logit. Without it Pi also says which class the
            guide batch has more of, and the weights made of it save half of the loss (`docs/augmentation.md`).
    """
    slope = (moved - logits).detach().float() / eps
    if centred:
        slope = slope - slope.mean([axis for axis in range(slope.dim()) if axis != 1], keepdim=True)
    probs = torch.softmax(logits.detach().float(), 1)
    return slope - (probs * slope).sum(1, keepdim=True)


class Rules(NamedTuple):
    """How gains become labels and weights.

    Attributes:
        centred: see `label_gains`.
        scaled: divide the gains by their root mean square over the batch, so that `keep` and `noise` mean the same
            whatever the network.
        keep: beta, how much more another label has to gain than the sample's own.
        temperature: tau of the softmax that makes the label; small ones make it nearly one-hot.
        noise: factor of the Gumbel noise on the gains.
        weigh: "gain" keeps a sample where <y, Pi> >= 0; "sum", the paper's rule, where sum_k Pi_k >= 0, which changes
            with any number that is added to all logits of a sample.
    """

    centred: bool = True
    scaled: bool = True
    keep: float = 3.0
    temperature: float = 0.01
    noise: float = 0.0
    weigh: str = "gain"

    @classmethod
    def named(cls, rules: str | Mapping[str, object] | Rules) -> Rules:
        """Rules by name, "centred" (the default, as measured) or "paper" (algorithm 1), or by their values.

        Raises:
            ValueError: no such name, or a value out of its range.
        """
        if isinstance(rules, str):
            checks.choice("rules", rules, ("centred", "paper"))
            paper = cls(centred=False, scaled=False, keep=1.0, noise=1.0, weigh="sum")
            rules = cls() if rules == "centred" else paper
        found = rules if isinstance(rules, Rules) else cls(**rules)  # type: ignore[arg-type]
        checks.number("keep", found.keep, least=0)
        checks.number("temperature", found.temperature, above=0)
        checks.number("noise", found.noise, least=0)
        checks.choice("weigh", found.weigh, ("gain", "sum"))
        return found


class Refined(NamedTuple):
    """Of each sample its soft label (B, K), its weight (B,), of mean 1 unless all are 0, and its gain <y, Pi> (B,)."""

    label: Tensor
    weight: Tensor
    gain: Tensor


class RefinedBatch(NamedTuple):
    """What became of the augmented samples of a batch.

    Attributes:
        cases: name of each sample, or its place in the batch.
        image: the augmented images, (B, C, *S).
        given: label that the augmentation gave, (B, K); of a label map the shares of its classes.
        refined: see `Refined`.
    """

    cases: list[str]
    image: Tensor
    given: Tensor
    refined: Refined


def refine(gains: Tensor, label: Tensor, rules: Rules | str = "centred", *, share: Tensor | None = None) -> Refined:
    """Soft labels and weights of augmented samples (algorithm 1).

    Args:
        gains: Pi, (B, K), or of the regions of each sample (B, R, K).
        label: labels of the augmentation, one-hot or mixed, of the same shape.
        rules: see `Rules`.
        share: of each region in its sample, (B, R), with regions; they add up to 1.

    Returns:
        With regions the label is (B, R, K), weight and gain still (B,).

    Raises:
        ValueError: a batch of one, whose gains have nothing to be compared with, or shapes that differ.

    Example:
        >>> gains = torch.tensor([[2.0, -2.0], [1.0, -1.0], [-1.0, 1.0], [-2.0, 2.0]])
        >>> label = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
        >>> refine(gains, label).weight.tolist()                 # the second sample harms with its label
        [1.3333333730697632, 0.0, 1.3333333730697632, 1.3333333730697632]
    """
    rules = Rules.named(rules)
    if gains.shape != label.shape or len(gains) < 2:
        raise ValueError(
            f"gains, label: expected one shape (B, K) or (B, R, K) with at least two samples, got "
            f"{tuple(gains.shape)} and {tuple(label.shape)}."
        )
    if rules.scaled:
        gains = gains / gains.square().mean().sqrt().clamp(min=_TINY)
    wanted = gains + rules.keep * label
    if rules.noise:
        wanted = wanted - rules.noise * torch.empty_like(wanted).exponential_().log()
    soft = torch.softmax(wanted / rules.temperature, -1)
    gain, total = (soft * gains).sum(-1), gains.sum(-1)
    if share is not None:
        gain, total = (gain * share).sum(1), (total * share).sum(1)
    kept = ((gain if rules.weigh == "gain" else total) >= 0).to(gain)
    return Refined(soft, kept * len(kept) / kept.sum().clamp(min=1), gain)


def region_gains(gains: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Mean gain over the region of each class in each sample: a label map then gets one soft label for each region.

    Args:
        gains: Pi of each voxel, (B, K, *S).
        label: one-hot or soft label map, (B, K, *S).

    Returns:
        Gains (B, R, K) with R = K regions, 0 for a class that is absent, and the share of each region (B, R).
    """
    gains, label = gains.flatten(2), label.flatten(2).to(gains)
    size = label.sum(-1)
    sums = torch.einsum("brv,bkv->brk", label, gains)
    return sums / size.clamp(min=1e-6).unsqueeze(-1), size / size.sum(1, keepdim=True)


def proxy_logits(one: Tensor, two: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Contrastive logits (B, B): each sample of a batch against all of the other view, which are its classes.

    With the identity as label the cross-entropy is the contrastive loss of both views (SAFLEX, eq. 12 and 13), and
    `label_gains` and `refine` take them as they are.

    Args:
        one: features of the first view (B, F).
        two: features of the second (B, F).
        temperature: divides the cosines.
    """
    return F.normalize(one, dim=1) @ F.normalize(two, dim=1).T / temperature
