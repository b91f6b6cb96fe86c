"""BoundaryLoss, HausdorffLoss, GeneralizedDiceLoss against cross-entropy and MONAI's losses: forward + backward."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import monai.losses
import torch
import torch.nn.functional as F
from boundary_distance_maps import ellipsoid
from timing import medians_ms, peak_bytes, steady_allocator, write

from medconstraints.distance import signed_distance_map
from medconstraints.losses import BoundaryLoss, GeneralizedDiceLoss, HausdorffLoss

# name, shape of the input
CASES = [("2D", (8, 2, 256, 256)), ("3D", (2, 2, 96, 96, 96)), ("3D, four classes", (2, 4, 96, 96, 96))]


def label_of(shape: tuple[int, ...]) -> torch.Tensor:
    """Class numbers (B, *S): a rough ellipsoid, and within it smaller ones of the further classes."""
    space = shape[2:]
    volume = space if len(space) == 3 else (*space, 3)
    label = torch.zeros(volume, dtype=torch.int64)
    for number in range(1, shape[1]):
        label[torch.from_numpy(ellipsoid(volume, 0.6 / number))] = number
    return (label if len(space) == 3 else label[..., 1]).expand(shape[0], *space).contiguous()


def backward(
    loss: Callable[[torch.Tensor, Any], torch.Tensor], logits: torch.Tensor, target: Any
) -> Callable[[], None]:
    """One forward and backward pass."""

    def run() -> None:
        logits.grad = None
        loss(logits, target).backward()

    return run


def case(name: str, shape: tuple[int, ...], runs: int) -> dict[str, Any]:
    """All losses on one input."""
    label = label_of(shape)
    one_hot = F.one_hot(label, shape[1]).movedim(-1, 1).float().contiguous()
    # A prediction near the label, with its own rough boundary, as after some epochs.
    logits = (4 * (torch.roll(one_hot, 2, -1) - 0.5) + torch.randn(shape)).requires_grad_()
    probs = torch.softmax(logits.detach(), 1).requires_grad_()
    distance_map = torch.stack([signed_distance_map(one, shape[1]) for one in label])
    both = {"label": label[:, None], "distance_map": distance_map}
    monai_dice = monai.losses.GeneralizedDiceLoss(softmax=True, to_onehot_y=True)
    quick = medians_ms(
        {
            "ce": backward(F.cross_entropy, logits, label),
            "boundary": backward(BoundaryLoss(softmax=True), logits, distance_map),
            "boundary_all": backward(BoundaryLoss(softmax=True, include_background=True), logits, distance_map),
            "boundary_probs": backward(BoundaryLoss(), probs, distance_map),
            "gdl": backward(GeneralizedDiceLoss(softmax=True), logits, label[:, None]),
            "monai_gdl": backward(monai_dice, logits, label[:, None]),
        },
        runs=runs,
    )
    monai_boundary = monai.losses.BoundaryLoss(softmax=True, include_background=False)
    monai_hausdorff = monai.losses.HausdorffDTLoss(softmax=True, include_background=False)
    slow = medians_ms(
        {
            "monai_boundary": backward(monai_boundary, logits, one_hot),
            "monai_hausdorff": backward(monai_hausdorff, logits, one_hot),
            "hausdorff": backward(
                HausdorffLoss(softmax=True, spacing_mm=(1.0,) * len(shape[2:])), logits, label[:, None]
            ),
            "hausdorff_map": backward(HausdorffLoss(softmax=True, spacing_mm=(1.0,) * len(shape[2:])), logits, both),
        },
        runs=max(3, runs // 6),
        warmup=1,
    )
    boundary = backward(BoundaryLoss(softmax=True), logits, distance_map)
    return {
        "case": name,
        "shape": list(shape),
        "cross_entropy_ms": quick["ce"],
        "ratio_boundary": quick["boundary"] / quick["ce"],
        "ratio_boundary_all_classes": quick["boundary_all"] / quick["ce"],
        "ratio_boundary_from_probabilities": quick["boundary_probs"] / quick["ce"],
        "monai_boundary_over_ours": slow["monai_boundary"] / quick["boundary"],
        "ratio_hausdorff_to_monai": slow["hausdorff"] / slow["monai_hausdorff"],
        "ratio_hausdorff_with_map_to_monai": slow["hausdorff_map"] / slow["monai_hausdorff"],
        "ratio_generalized_dice_to_monai": quick["gdl"] / quick["monai_gdl"],
        "peak_memory_over_logits": peak_bytes(boundary) / (logits.numel() * logits.element_size()),
    }


def main() -> None:
    """Print and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="docs/results/benchmark_boundary_loss.json")
    parser.add_argument("--threads", type=int, default=1, help="more threads on a shared machine make the ratios drift")
    parser.add_argument("--runs", type=int, default=40)
    args = parser.parse_args()
    steady_allocator()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    rows = []
    for name, shape in CASES:
        rows.append(case(name, shape, args.runs))
        shown = {key: round(value, 3) for key, value in rows[-1].items() if isinstance(value, float)}
        sys.stdout.write(f"{name}: {shown}\n")
    write(args.output, rows)


if __name__ == "__main__":
    main()
