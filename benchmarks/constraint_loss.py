"""ConstraintLoss (size + centroid, 8 constraints) against F.cross_entropy on the same tensors: forward + backward.

And the cost of the formulations alone, from 8 to 10,000 constraints.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from timing import medians_ms, peak_bytes, steady_allocator, write

from medconstraints.formulations import (
    AugmentedLagrangian,
    Lagrangian,
    LogBarrierExtension,
    QuadraticPenalty,
    ReLULagrangian,
)
from medconstraints.losses import ConstraintLoss
from medconstraints.statistics import soft_moments, soft_size

# name, input shape: with D axes a class has 2 (1 + D) bounds of size and centroid: 8 of one class in 3D, 6 in 2D, where
# two bounds on the background's size complete them.
CASES = [("2D", (4, 2, 256, 256)), ("3D", (2, 4, 96, 96, 96))]
COUNTS = (8, 100, 1000, 10_000)


def bounds_of(shape: tuple[int, ...]) -> torch.Tensor:
    """8 bounds for each sample that are neither all satisfied nor all violated; the others are free."""
    dims = len(shape) - 2
    voxels = float(torch.tensor(shape[2:]).prod())
    bounds = torch.tensor([-torch.inf, torch.inf]).repeat(shape[0], shape[1], 1 + dims, 1)
    bounds[:, 1, 0] = torch.tensor([0.9, 1.1]) * voxels / 50
    for axis, size in enumerate(shape[2:]):
        bounds[:, 1, 1 + axis] = torch.tensor([size / 2 - 20.0, size / 2 + 20.0])
    if dims == 2:
        bounds[:, 0, 0] = torch.tensor([0.5, 0.99]) * voxels
    return bounds


def losses() -> list[dict[str, object]]:
    """Time and memory of the loss."""
    rows = []
    for name, shape in CASES:
        logits = torch.randn(shape, requires_grad=True)
        labels = torch.randint(0, shape[1], (shape[0], *shape[2:]))
        probs = torch.softmax(logits.detach(), 1).requires_grad_()
        bounds = bounds_of(shape)
        one_pass = ConstraintLoss(soft_moments, LogBarrierExtension(), include_background=True)
        from_logits = ConstraintLoss(soft_moments, LogBarrierExtension(), include_background=True, softmax=True)
        size_only = ConstraintLoss(soft_size, QuadraticPenalty(), include_background=True)
        count = int((~torch.isinf(bounds[0])).sum())

        def cross_entropy(x: torch.Tensor = logits, y: torch.Tensor = labels) -> None:
            x.grad = None
            F.cross_entropy(x, y).backward()

        def ours(x: torch.Tensor = probs, b: torch.Tensor = bounds, loss: ConstraintLoss = one_pass) -> None:
            x.grad = None
            loss(x, b).backward()

        def ours_logits(x: torch.Tensor = logits, b: torch.Tensor = bounds, loss: ConstraintLoss = from_logits) -> None:
            x.grad = None
            loss(x, b).backward()

        def size(x: torch.Tensor = probs, b: torch.Tensor = bounds[:, :, :1], loss: ConstraintLoss = size_only) -> None:
            x.grad = None
            loss(x, b).backward()

        times = medians_ms({"ce": cross_entropy, "ours": ours, "logits": ours_logits, "size": size})
        rows.append(
            {
                "case": f"{name}, size and centroid, {count} constraints",
                "shape": list(shape),
                "cross_entropy_ms": times["ce"],
                "ratio_from_probabilities": times["ours"] / times["ce"],
                "ratio_from_logits": times["logits"] / times["ce"],
                "ratio_size_alone": times["size"] / times["ce"],
                "peak_memory_over_probabilities": peak_bytes(ours) / (probs.numel() * probs.element_size()),
            }
        )
    return rows


def formulations() -> list[dict[str, object]]:
    """Time of each formulation alone, by the number of constraints of a batch of 4."""
    made = {
        "QuadraticPenalty": QuadraticPenalty,
        "LogBarrierExtension": LogBarrierExtension,
        "Lagrangian": lambda: Lagrangian(4, learning_rate=0.1),
        "ReLULagrangian": lambda: ReLULagrangian(learning_rate=0.1),
        "AugmentedLagrangian": lambda: AugmentedLagrangian(4),
    }
    rows = []
    for name, make in made.items():
        functions = {}
        for count in COUNTS:
            formulation = make()
            residual = torch.randn(4, count // 4, requires_grad=True)
            index = torch.arange(4)

            def run(f: torch.nn.Module = formulation, r: torch.Tensor = residual, i: torch.Tensor = index) -> None:
                r.grad = None
                f(r, i).sum().backward()

            functions[str(count)] = run
        times = medians_ms(functions, runs=200)
        rows.append(
            {
                "formulation": name,
                "ms_by_constraints": times,
                "ratio_10000_to_8": times["10000"] / times["8"],
            }
        )
    return rows


def main() -> None:
    """Print and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="docs/results/benchmark_constraint_loss.json")
    parser.add_argument("--threads", type=int, default=1, help="more threads on a shared machine make the ratios drift")
    args = parser.parse_args()
    steady_allocator()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    rows = [*losses(), *formulations()]
    for row in rows:
        shown = {key: round(value, 3) for key, value in row.items() if isinstance(value, float)}
        sys.stdout.write(f"{row.get('case', row.get('formulation'))}: {shown}\n")
    write(args.output, rows)


if __name__ == "__main__":
    main()
