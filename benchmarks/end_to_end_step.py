"""One step of end-to-end augmentation against one plain step of the segmentation plus one of the GAN.

Both take the same batch; the step of end-to-end augmentation takes the generated and the guide batch besides.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from monai.data import Dataset
from monai.losses import DiceCELoss
from monai.networks.nets import PatchDiscriminator, UNet
from timing import medians_ms, peak_bytes, steady_allocator, write

from medconstraints.engines import EndToEndTrainer
from medconstraints.engines.guided import one_hot
from medconstraints.engines.mask_to_image import discriminator_step
from medconstraints.losses import MaskToImageLoss
from medconstraints.networks import MaskToImage, SearchableGenerator

CASES = {"segmentation and GAN": None, "levels 0": 0, "levels 2": 2, "levels 3": 3}


def step(shape: tuple[int, ...], batch: int, levels: int | None) -> Callable[[], Any]:
    """One iteration after another; `levels` None is the two plain steps."""
    torch.manual_seed(0)
    dims, kernels = len(shape), (4, 6, 8) if len(shape) == 2 else (2, 4, 6)
    network = UNet(dims, 1, 2, (16, 32, 64, 128), (2, 2, 2), act="swish", norm="instance")
    generator = SearchableGenerator(dims, 2, 1, channels=(16, 32, 64), strides=(2, 2, 2), kernels=kernels)
    judge = PatchDiscriminator(dims, 16, 3, num_layers_d=2, activation="swish", norm="instance")
    gan, gan_loss, loss = MaskToImage(generator, judge), MaskToImageLoss(), DiceCELoss(softmax=True)
    image, label = torch.randn(batch, 1, *shape), torch.randint(2, (batch, 1, *shape))
    optimizers = [
        torch.optim.AdamW(network.parameters(), lr=1e-3),
        torch.optim.Adam(gan.generator_weights().values(), lr=2e-4, betas=(0.5, 0.999)),
        torch.optim.Adam(gan.discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999)),
    ]
    if levels is None:
        weights = list(gan.generator_weights().values())

        def plain() -> None:
            mask = one_hot(label, 2)
            made = gan.generator(mask)
            discriminator_step(gan, gan_loss, optimizers[2], mask, image, made.detach())
            fooled = gan_loss.generator(gan.scores(mask, made), made, image)
            for weight, slope in zip(weights, torch.autograd.grad(fooled, weights), strict=True):
                weight.grad = slope
            optimizers[1].step()
            optimizers[0].zero_grad()
            loss(network(image), mask).backward()
            optimizers[0].step()

        return plain
    trainer = EndToEndTrainer(
        device="cpu",
        max_epochs=1,
        dataset=Dataset([{"image": image[0], "label": label[0], "case": str(i)} for i in range(4 * batch)]),
        guide_dataset=Dataset([{"image": image[0], "label": label[0], "case": f"guide {i}"} for i in range(batch)]),
        network=network,
        optimizer=optimizers[0],
        loss_function=loss,
        gan=gan,
        gan_loss=gan_loss,
        generator_optimizer=optimizers[1],
        discriminator_optimizer=optimizers[2],
        architecture_optimizer=torch.optim.Adam(gan.architecture().values(), lr=0.01),
        num_classes=2,
        levels=levels,
        batch_size=batch,
        warm_up=0,
    )
    trainer.guide_batch = lambda: (image, label)  # type: ignore[method-assign]
    trainer.state.batch = {"augmented_label": label.flip(-1)}

    def run() -> None:
        trainer.state.iteration += 1
        trainer.optimizer.zero_grad()
        trainer.guided_step(image, label)
        trainer.optimizer.step()

    return run


def main() -> None:
    """Print and write the ratios."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--output", default="docs/results/benchmark_end_to_end_step.json")
    arguments.add_argument("--runs", type=int, default=15)
    arguments.add_argument("--threads", type=int, default=2)
    args = arguments.parse_args()
    steady_allocator()
    torch.set_num_threads(args.threads)
    rows = []
    for shape, batch in (((64, 64), 4), ((128, 128), 4), ((32, 48, 32), 2)):
        cases = {case: step(shape, batch, levels) for case, levels in CASES.items()}
        times = medians_ms(cases, runs=args.runs, warmup=2)
        peaks = {case: peak_bytes(function) for case, function in cases.items()}
        for case in CASES:
            first = next(iter(CASES))
            row = {
                "shape": shape,
                "batch": batch,
                "case": case,
                "seconds_per_1000": times[case],
                "ratio": times[case] / times[first],
                "memory_ratio": peaks[case] / peaks[first],
            }
            rows.append(row)
            sys.stdout.write(f"{shape!s:<14} {case:<22} {row['ratio']:.2f}x time {row['memory_ratio']:.2f}x memory\n")
    write(args.output, rows)


if __name__ == "__main__":
    main()
