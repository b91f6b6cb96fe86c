"""One step with a hypergradient against a plain step of the same network, in time and in memory.

The hypergradient's step takes the guide batch and the look-ahead too; with an augmenter also its two passes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from monai.data import Dataset
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from timing import medians_ms, peak_bytes, steady_allocator, write
from torch import Tensor

from medconstraints.augmentation import Augmenter
from medconstraints.engines import BilevelTrainer

SHAPES = {2: (128, 128), 3: (32, 48, 32)}


def step(dims: int, method: str, batch: int, *, augmented: bool) -> Callable[[], Any]:
    """One iteration; `method` "none" is a plain step on images that no augmenter changed."""
    torch.manual_seed(0)
    network = UNet(dims, 1, 3, (16, 32, 64, 128), (2, 2, 2), act="swish", norm="instance")
    augmenter = Augmenter(dims) if augmented else Shift()
    shape = SHAPES[dims]
    items = [{"image": torch.randn(1, *shape), "label": torch.randint(3, (1, *shape))} for _ in range(4 * batch)]
    trainer = BilevelTrainer(
        device="cpu",
        max_epochs=1,
        dataset=Dataset(items),
        network=network,
        optimizer=torch.optim.AdamW(network.parameters(), lr=1e-3),
        loss_function=DiceCELoss(softmax=True),
        augmenter=augmenter,
        augmenter_optimizer=torch.optim.Adam(augmenter.parameters(), lr=1e-3),
        num_classes=3,
        batch_size=batch,
        warm_up=0,
        method="exact" if method == "none" else method,
    )
    image, guide = (torch.stack([item["image"] for item in items[k : k + batch]]) for k in (0, batch))
    label = torch.stack([item["label"] for item in items[:batch]])
    target = torch.nn.functional.one_hot(label[:, 0], 3).movedim(-1, 1).float()
    trainer.guide_batch = lambda: (guide, label)  # type: ignore[method-assign]
    trainer.state.iteration, trainer.state.batch = 1, {"image": image}

    def run() -> None:
        trainer.optimizer.zero_grad()
        if method == "none":
            trainer.loss_function(network(image), target).backward()
        else:
            trainer.guided_step(image, label)
        trainer.optimizer.step()

    return run


class Shift(torch.nn.Module):
    """An augmenter that costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.zeros(()))

    def forward(self, image: Tensor, label: Tensor | None, spacing_mm: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Add one number."""
        return image + self.value, label


def main() -> None:
    """Print and write the ratios."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--output", default="docs/results/benchmark_hypergradient_step.json")
    arguments.add_argument("--runs", type=int, default=15)
    arguments.add_argument("--batch", type=int, default=4)
    arguments.add_argument("--threads", type=int, default=1)
    args = arguments.parse_args()
    steady_allocator()
    torch.set_num_threads(args.threads)
    rows = []
    for dims in (2, 3):
        cases = {
            "none": step(dims, "none", args.batch, augmented=False),
            "exact": step(dims, "exact", args.batch, augmented=False),
            "difference": step(dims, "difference", args.batch, augmented=False),
            "exact, augmenter": step(dims, "exact", args.batch, augmented=True),
            "difference, augmenter": step(dims, "difference", args.batch, augmented=True),
        }
        times = medians_ms(cases, runs=args.runs, warmup=2)
        memory = {name: peak_bytes(run) for name, run in cases.items()}
        for name, time_ms in times.items():
            row = {
                "case": f"{dims}D, {name}",
                "step_ms": time_ms,
                "ratio": time_ms / times["none"],
                "memory_ratio": memory[name] / memory["none"],
            }
            rows.append(row)
            sys.stdout.write(f"{row['case']:<26} {row['ratio']:.2f}x time, {row['memory_ratio']:.2f}x memory\n")
    write(args.output, rows)


if __name__ == "__main__":
    main()
