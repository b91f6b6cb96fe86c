"""One step of SAFLEX against the same step on the plain and the augmented batch without weights and labels.

What the guide gradient, the additional pass and the refinement cost; loading and augmenting are the same for both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from monai.data import Dataset
from monai.losses import DiceCELoss
from monai.networks.nets import ResNet, UNet
from timing import medians_ms, steady_allocator, write

from medconstraints.engines import SaflexTrainer

CASES = {"none": {}, "guide B / 4": {}, "guide B / 4, renewed every 4 steps": {"guide_interval": 4}, "guide B": {}}


def step(dims: int, case: str, batch: int) -> Callable[[], Any]:
    """One iteration after another; the guide gradient is renewed as the case says."""
    torch.manual_seed(0)
    if dims == 2:
        network: Any = ResNet(
            "basic",
            [2, 2, 2, 2],
            [64, 128, 256, 512],
            spatial_dims=2,
            n_input_channels=1,
            num_classes=2,
            conv1_t_size=3,
            conv1_t_stride=1,
            no_max_pool=True,
            widen_factor=0.25,
        )
        shape, classes, label = (28, 28), 2, torch.arange(batch) % 2
    else:
        network = UNet(3, 1, 3, (16, 32, 64, 128), (2, 2, 2), act="swish", norm="instance")
        shape, classes = (32, 48, 32), 3
        label = torch.randint(3, (batch, 1, *shape))
    image, augmented = torch.randn(2, batch, 1, *shape)
    trainer = SaflexTrainer(
        device="cpu",
        max_epochs=1,
        dataset=Dataset([{"image": image[0], "label": label[0]} for _ in range(4 * batch)]),
        network=network,
        optimizer=torch.optim.AdamW(network.parameters(), lr=1e-3),
        loss_function=torch.nn.CrossEntropyLoss() if dims == 2 else DiceCELoss(softmax=True),
        num_classes=classes,
        rules="none" if case == "none" else "centred",
        batch_size=batch,
        **CASES[case],
    )
    guide = batch if case == "guide B" else max(2, batch // 4)
    trainer.guide_batch = lambda: (image[:guide], label[:guide])  # type: ignore[method-assign]
    trainer.state.batch = {"image": image, "augmented": augmented, "augmented_label": label}
    trainer.state.epoch_length, trainer.state.iteration = 1000, 0

    def run() -> None:
        trainer.state.iteration += 1
        trainer.optimizer.zero_grad()
        trainer.guided_step(image, label)
        trainer.optimizer.step()

    return run


def main() -> None:
    """Print and write the ratios."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--output", default="docs/results/benchmark_saflex_step.json")
    arguments.add_argument("--runs", type=int, default=15)
    arguments.add_argument("--threads", type=int, default=1)
    args = arguments.parse_args()
    steady_allocator()
    torch.set_num_threads(args.threads)
    rows = []
    for dims, batch in ((2, 64), (3, 8)):
        # Four iterations in a turn: one renewal of the guide gradient among them.
        cases = {case: step(dims, case, batch) for case in CASES}
        times = medians_ms(
            {case: lambda run=run: [run() for _ in range(4)] for case, run in cases.items()}, runs=args.runs, warmup=1
        )
        for case, time_ms in times.items():
            row = {"case": f"{dims}D, {case}", "step_ms": time_ms / 4, "ratio": time_ms / times["none"]}
            rows.append(row)
            sys.stdout.write(f"{row['case']:<40} {row['ratio']:.2f}x time\n")
    write(args.output, rows)


if __name__ == "__main__":
    main()
