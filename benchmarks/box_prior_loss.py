"""BoxPriorLoss against F.cross_entropy on the same tensors: time of forward + backward, and peak memory."""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from timing import medians_ms, peak_bytes, steady_allocator, write

from medconstraints.formulations import LogBarrierExtension
from medconstraints.losses import BoxPriorLoss

# name, input shape, box extent, boxes per sample, width, slice axis
CASES = [
    ("2D, w = 5, 64 x 82", (4, 2, 256, 256), (64, 82), 1, 5, None),
    ("2D, w = 1, 63 x 63", (4, 2, 256, 256), (63, 63), 1, 1, None),
    ("2D, w = 1, 251 x 251", (4, 2, 256, 256), (251, 251), 1, 1, None),
    ("3D, w = 5, three boxes", (2, 3, 96, 96, 96), (40, 45, 50), 3, 5, None),
    ("3D, w = 5, thirty boxes", (2, 3, 96, 96, 96), (12, 14, 16), 30, 5, None),
    ("3D, w = 5, a box per slice", (2, 3, 96, 96, 96), (40, 1, 50), 96, 5, 1),
]


def random_boxes(shape: tuple[int, ...], extent: tuple[int, ...], count: int, slice_axis: int | None) -> torch.Tensor:
    """Boxes of one extent at random places; one per slice along `slice_axis`, else free. Classes take turns."""
    rows = torch.empty(shape[0], count, 1 + 2 * len(extent), dtype=torch.int64)
    rows[..., 0] = 1 + torch.arange(count) % (shape[1] - 1)
    for axis, (size, length) in enumerate(zip(shape[2:], extent, strict=True)):
        start = torch.randint(0, size - length + 1, (shape[0], count))
        if axis == slice_axis:
            start = torch.arange(count).expand(shape[0], -1)
        rows[..., 1 + axis], rows[..., 1 + len(extent) + axis] = start, start + length
    return rows


def main() -> None:
    """Print and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="docs/results/benchmark_box_prior_loss.json")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1, help="more threads on a shared machine make the ratios drift")
    args = parser.parse_args()
    steady_allocator()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    rows = []
    for name, shape, extent, count, width, slice_axis in CASES:
        boxes = random_boxes(shape, extent, count, slice_axis)
        logits = torch.randn(shape, device=args.device, requires_grad=True)
        labels = torch.randint(0, shape[1], (shape[0], *shape[2:]), device=args.device)
        probs = torch.softmax(logits.detach(), 1).requires_grad_()
        settings = {"width": width, "slice_axis": slice_axis}
        on_logits = BoxPriorLoss(LogBarrierExtension(), softmax=True, **settings)
        on_probs = BoxPriorLoss(LogBarrierExtension(), **settings)

        def cross_entropy(x: torch.Tensor = logits, y: torch.Tensor = labels) -> None:
            x.grad = None
            F.cross_entropy(x, y).backward()

        def ours_logits(x: torch.Tensor = logits, b: torch.Tensor = boxes, loss: BoxPriorLoss = on_logits) -> None:
            x.grad = None
            loss(x, b).backward()

        def ours_probs(x: torch.Tensor = probs, b: torch.Tensor = boxes, loss: BoxPriorLoss = on_probs) -> None:
            x.grad = None
            loss(x, b).backward()

        times = medians_ms({"ce": cross_entropy, "logits": ours_logits, "probs": ours_probs}, runs=args.runs)
        row = {
            "case": name,
            "shape": list(shape),
            "cross_entropy_ms": times["ce"],
            "ratio_from_logits": times["logits"] / times["ce"],
            "ratio_from_probabilities": times["probs"] / times["ce"],
        }
        if args.device == "cpu":
            row["peak_memory_over_probabilities"] = peak_bytes(ours_probs) / (probs.numel() * probs.element_size())
        rows.append(row)
        sys.stdout.write(
            f"{name:<28} from logits {row['ratio_from_logits']:.2f}x  from probabilities "
            f"{row['ratio_from_probabilities']:.2f}x  memory {row.get('peak_memory_over_probabilities', 0):.2f}x\n"
        )
    write(args.output, rows)


if __name__ == "__main__":
    main()
