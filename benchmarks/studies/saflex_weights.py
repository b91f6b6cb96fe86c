"""Are SAFLEX's weights better than the same weights on other samples of the same class?

A network is trained for a while on 400 chest X-rays of which 30 % have the wrong class. Then, for batch after batch, a
plain step of SGD is taken on augmented samples with the weights that SAFLEX gives them, and another with these weights
permuted within each class, from the same parameters; both are judged by the loss of a balanced batch that neither
trained nor guided. Labels stay as they are. Also told: how well the gains find the wrong labels in a class.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_roc_auc
from monai.networks.nets import ResNet
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from medconstraints.hypergradients import frozen_statistics, guide_gradient
from medconstraints.saflex import Rules, guide_step, label_gains, refine
from medconstraints.transforms import RandAugmentd

RATE, BATCH, BATCHES, ITERATIONS = 0.01, 64, 30, 150


def network_of(norm: Any) -> ResNet:
    """ResNet18 of a quarter of the width."""
    return ResNet(
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
        act="swish",
        norm=norm,
    )


def main() -> None:
    """Print and write the differences."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--data", type=Path, default=Path("data"))
    arguments.add_argument("--output", type=Path, default=Path("saflex_weights.json"))
    args = arguments.parse_args()
    torch.set_num_threads(1)
    with np.load(args.data / "medmnist" / "pneumoniamnist.npz") as arrays:
        images = torch.from_numpy((arrays["train_images"].astype(np.float32) - 147) / 42)[:, None]
        labels = torch.from_numpy(arrays["train_labels"].reshape(-1)).long()
    rows = []
    for name, norm in (("BatchNorm", "batch"), ("GroupNorm", ("group", {"num_groups": 4}))):
        for centred in (True, False):
            rows.append({"norm": name, "centred": centred, **measure(norm, centred, images, labels)})
            sys.stdout.write(f"{rows[-1]}\n")
    content = {
        "study": "saflex_weights",
        "command": "python benchmarks/studies/saflex_weights.py",
        "date": time.strftime("%Y-%m-%d"),
        "batches": BATCHES,
        "rows": rows,
    }
    args.output.write_text(json.dumps(content, indent=1) + "\n")


def measure(norm: Any, centred: bool, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean difference of the judged losses, its standard error, and the area under the curve of wrong labels."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    order = random.permutation(len(images))
    train, guide, judge = order[:400], order[400:600], order[600:1600]
    wrong = torch.from_numpy(random.random(400) < 0.3)
    given = torch.where(wrong, 1 - labels[train], labels[train])
    augment = RandAugmentd("image", magnitude=5).set_random_state(0)
    network = network_of(norm)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    network.train()

    def augmented(chosen: np.ndarray) -> Tensor:
        return torch.stack([torch.as_tensor(augment({"image": images[train[n]]})["image"]) for n in chosen])

    for _ in range(ITERATIONS):
        chosen = random.choice(400, BATCH, replace=False)
        optimizer.zero_grad()
        F.cross_entropy(network(augmented(chosen)), given[chosen]).backward()
        optimizer.step()
    parameters = dict(network.named_parameters())

    def loss_of(values: Any, image: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
        losses = F.cross_entropy(functional_call(network, values, (image,)), label, reduction="none")
        return losses.mean() if weight is None else (losses * weight).mean()

    gaps, found, truth, classes = [], [], [], []
    with frozen_statistics(network):
        for _ in range(BATCHES):
            chosen = random.choice(400, BATCH, replace=False)
            guides = random.choice(guide, BATCH, replace=False)
            _, v = guide_gradient(lambda p, g=guides: loss_of(p, images[g], labels[g]), parameters)
            image, label = augmented(chosen), given[chosen]
            moved, eps = guide_step(parameters, v)
            with torch.no_grad():
                logits, after = (functional_call(network, p, (image,)) for p in (parameters, moved))
            rules = Rules(centred=centred, keep=1e3)  # labels stay
            refined = refine(label_gains(logits, after, eps, centred=centred), F.one_hot(label, 2).float(), rules)
            permuted = refined.weight.clone()
            for number in range(2):
                own = (label == number).nonzero().flatten()
                permuted[own] = refined.weight[own[torch.from_numpy(random.permutation(len(own)))]]
            halves = [judge[labels[judge].numpy() == number] for number in range(2)]
            balanced = np.concatenate([random.choice(half, BATCH, replace=False) for half in halves])
            losses = []
            for weight in (refined.weight, permuted):
                gradients = torch.autograd.grad(loss_of(parameters, image, label, weight), [*parameters.values()])
                pairs = zip(parameters.items(), gradients, strict=True)
                stepped = {name: value.detach() - RATE * gradient for (name, value), gradient in pairs}
                with torch.no_grad():
                    losses.append(float(loss_of(stepped, images[balanced], labels[balanced])))
            gaps.append(losses[1] - losses[0])
            found.append(-refined.gain)
            truth.append(wrong[chosen])
            classes.append(label)
    mean, error = float(np.mean(gaps)), float(np.std(gaps, ddof=1) / np.sqrt(len(gaps)))
    score, is_wrong, of = torch.cat(found), torch.cat(truth).long(), torch.cat(classes)
    # Within a class: over all, the class with more wrong labels would count as found.
    curve = np.mean([compute_roc_auc(score[of == number], is_wrong[of == number]) for number in range(2)])
    return {
        "mean": mean,
        "standard_error": error,
        "in_standard_errors": mean / error,
        "auc_of_wrong_labels": float(curve),
    }


if __name__ == "__main__":
    main()
