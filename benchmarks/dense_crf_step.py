"""The dense CRF against pydensecrf2, its memory on a volume, and its loss against a step of a U-Net.

pydensecrf2 is compared with where it is installed; it needs a compiler, and is no dependency.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from monai.networks.nets import UNet
from scipy.ndimage import gaussian_filter
from timing import extra_rss_bytes, medians_ms, steady_allocator, write

from medconstraints.crf import dense_crf
from medconstraints.losses import DenseCRFLoss, PartialCrossEntropyLoss

try:
    from pydensecrf.densecrf import DenseCRF
    from pydensecrf.utils import create_pairwise_bilateral, create_pairwise_gaussian, unary_from_softmax
except ImportError:
    DenseCRF = None


def blobs(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A smooth image, and noisy probabilities of its bright half."""
    random = np.random.default_rng(0)
    image = gaussian_filter(random.normal(size=shape), 6)
    image = (image - image.min()) / (image.max() - image.min())
    guess = np.clip(image + 0.2 * random.normal(size=shape), 0.02, 0.98)
    both = np.stack([1 - guess, guess])
    return torch.tensor(image[None], dtype=torch.float32), torch.tensor(both, dtype=torch.float32)


def reference(image: torch.Tensor, guess: torch.Tensor) -> np.ndarray:
    """Of pydensecrf, with the same kernels."""
    shape = tuple(image.shape[1:])
    crf = DenseCRF(int(np.prod(shape)), len(guess))
    crf.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(guess.flatten(1).numpy())).astype(np.float32))
    crf.addPairwiseEnergy(create_pairwise_gaussian([1.0] * len(shape), shape), compat=3)
    tones = np.ascontiguousarray(255 * image.movedim(0, -1).numpy())
    crf.addPairwiseEnergy(create_pairwise_bilateral([10.0] * len(shape), (20,), tones, chdim=len(shape)), compat=10)
    found: np.ndarray = np.array(crf.inference(5)).reshape(guess.shape)
    return found


def loss_and_step() -> dict[str, Callable[[], Any]]:
    """Forward and backward of the loss on given logits, and a step of a U-Net with partial cross-entropy."""
    image, logits = torch.stack([blobs((256, 256))[0]] * 4), torch.randn(4, 2, 256, 256, requires_grad=True)
    weak = torch.full((4, 1, 256, 256), -1.0)
    weak[..., 100:110, 100:110] = 1
    network = UNet(2, 1, 2, (16, 32, 64, 128), (2, 2, 2), norm="batch")
    optimizer = torch.optim.Adam(network.parameters())
    loss, partial = DenseCRFLoss(softmax=True), PartialCrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        partial(network(image), weak).backward()
        optimizer.step()

    return {"loss": lambda: loss(logits, image).backward(), "step": step}


def main() -> None:
    """Print and write the ratios."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--output", default="docs/results/benchmark_dense_crf_step.json")
    arguments.add_argument("--runs", type=int, default=9)
    arguments.add_argument("--threads", type=int, default=1)
    args = arguments.parse_args()
    steady_allocator()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for shape, runs in (((256, 256), args.runs), ((320, 320, 24), 3)):
        image, guess = blobs(shape)
        cases: dict[str, Callable[[], Any]] = {"ours": lambda i=image, g=guess: dense_crf(g[None], i[None])}
        row: dict[str, Any] = {"case": "mean field", "shape": shape}
        row["extra_gib"] = extra_rss_bytes(cases["ours"]) / 2**30
        if DenseCRF is not None:
            cases["pydensecrf2"] = lambda i=image, g=guess: reference(i, g)
            labels = [np.asarray(case()).reshape(guess.shape).argmax(0) for case in cases.values()]
            row["same_labels"] = float((labels[0] == labels[1]).mean())
        times = medians_ms(cases, runs=runs, warmup=1)
        if DenseCRF is not None:
            row["ratio"] = times["ours"] / times["pydensecrf2"]
        rows.append(row)
        sys.stdout.write(f"{row}\n")
    times = medians_ms(loss_and_step(), runs=args.runs, warmup=2)
    rows.append({"case": "loss", "shape": (4, 2, 256, 256), "ratio": times["loss"] / times["step"]})
    sys.stdout.write(f"{rows[-1]}\n")
    write(args.output, rows)


if __name__ == "__main__":
    main()
