"""One adversarial update of lookahead against one supervised step of the same network on the same batch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import PatchDiscriminator, UNet
from timing import medians_ms, peak_bytes, steady_allocator, write
from torch.nn import functional as F

from medconstraints.networks import ClassSplitDiscriminator


def steps(shape: tuple[int, ...], batch: int) -> dict[str, Callable[[], Any]]:
    """Both steps on one network."""
    torch.manual_seed(0)
    dims = len(shape)
    network = UNet(dims, 1, 3, (16, 32, 64, 128), (2, 2, 2), norm="batch")
    judge = ClassSplitDiscriminator(PatchDiscriminator(dims, 16, 6, num_layers_d=3, norm="instance"))
    judge.requires_grad_(False)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)
    loss = DiceCELoss(softmax=True, to_onehot_y=True)
    image, label = torch.randn(batch, 1, *shape), torch.randint(3, (batch, 1, *shape)).float()

    def supervised() -> None:
        optimizer.zero_grad()
        loss(network(image), label).backward()
        optimizer.step()

    def adversarial() -> None:
        optimizer.zero_grad()
        maps = F.gumbel_softmax(network(image), tau=1.0, hard=True, dim=1)
        F.softplus(-judge(image, maps)).mean().backward()
        optimizer.step()

    return {"supervised": supervised, "adversarial": adversarial}


def main() -> None:
    """Print and write the ratios."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--output", default="docs/results/benchmark_lookahead_step.json")
    arguments.add_argument("--runs", type=int, default=15)
    arguments.add_argument("--threads", type=int, default=1)
    args = arguments.parse_args()
    steady_allocator()
    torch.set_num_threads(args.threads)
    rows = []
    for shape, batch in (((96, 96), 4), ((192, 192), 4), ((48, 64, 48), 2)):
        both = steps(shape, batch)
        times = medians_ms(both, runs=args.runs, warmup=2)
        peaks = {case: peak_bytes(function) for case, function in both.items()}
        row = {
            "shape": shape,
            "batch": batch,
            "ratio": times["adversarial"] / times["supervised"],
            "memory_ratio": peaks["adversarial"] / peaks["supervised"],
        }
        rows.append(row)
        sys.stdout.write(f"{shape!s:<14} {row['ratio']:.2f}x time {row['memory_ratio']:.2f}x memory\n")
    write(args.output, rows)


if __name__ == "__main__":
    main()
