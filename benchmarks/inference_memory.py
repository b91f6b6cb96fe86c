"""Peak memory and time of segmenting one large volume, against MONAI's stock chain, each in a process of its own.

The stock chain is `LoadImaged`, `Orientationd`, `Spacingd`, `NormalizeIntensityd`, `SlidingWindowInferer`, `Invertd`,
`AsDiscreted` and `SaveImaged`. The network is a single convolution, so that the chains are what is measured.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.data import decollate_batch, list_data_collate
from monai.inferers import SlidingWindowInferer
from monai.transforms import (
    Activationsd,
    AsDiscreted,
    Compose,
    EnsureChannelFirstd,
    Invertd,
    LoadImaged,
    NormalizeIntensityd,
    Orientationd,
    SaveImaged,
    Spacingd,
)
from timing import write

from medconstraints.engines import SlabInferer
from medconstraints.transforms import mask_transforms, reading_transforms

WINDOW, AT_ONCE, OVERLAP = (96, 96, 96), 1, 0.25


def segment(chain: str, image: Path, folder: Path, classes: int, spacing: float) -> dict[str, float]:
    """One volume by one chain: seconds, and gigabytes at most; a spacing of 0 leaves the voxels as they are."""
    start = time.perf_counter()
    spacing_mm = [spacing or -1.0] * 3
    if chain == "ours":
        reading = Compose(reading_transforms(num_classes=classes, label_key=None, spacing_mm=spacing_mm))
        writing, inferer = Compose(mask_transforms(reading, output_dir=folder)), SlabInferer(WINDOW, AT_ONCE, OVERLAP)
    else:
        keys = "image"
        reading = Compose(
            [
                LoadImaged(keys),
                EnsureChannelFirstd(keys),
                Orientationd(keys, axcodes="RAS", labels=None),
                *([Spacingd(keys, pixdim=spacing_mm)] if spacing else []),
                NormalizeIntensityd(keys, channel_wise=True),
            ]
        )
        writing = Compose(
            [
                Activationsd("pred", softmax=True),
                Invertd("pred", transform=reading, orig_keys="image", nearest_interp=False, to_tensor=True),
                AsDiscreted("pred", argmax=True),
                SaveImaged("pred", output_dir=folder, separate_folder=False, print_log=False, resample=False),
            ]
        )
        inferer = SlidingWindowInferer(WINDOW, AT_ONCE, OVERLAP)
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, classes, 3, padding=1).eval()
    batch = list_data_collate([reading({"image": str(image)})])
    with torch.no_grad():
        batch["pred"] = inferer(batch["image"], network)
        for item in decollate_batch(batch):
            writing(item)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": time.perf_counter() - start, "peak_gb": peak / 1e6}


def make(image: Path, shape: Sequence[int]) -> None:
    """Smooth waves of intensity, slab by slab: a process inherits the peak memory of the one that started it."""
    rng = np.random.default_rng(0)
    waves = [np.sin(np.arange(size) / size * 9 + rng.random() * 6) for size in shape]
    voxels = np.empty(shape, np.int16, order="F")
    for number, height in enumerate(waves[2]):
        voxels[..., number] = 1000 * height * waves[0][:, None] * waves[1]
    nib.save(nib.Nifti1Image(voxels, np.diag([-0.7, -0.7, 0.8, 1.0])), image)


def main() -> None:
    """Run both chains and write what they took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 400))
    parser.add_argument("--classes", type=int, nargs="+", default=(3, 20))
    parser.add_argument("--stock", type=int, nargs="*", default=(3,), help="numbers of classes for the stock chain too")
    parser.add_argument("--spacing", type=float, nargs="+", default=(2.0, 0.0), help="mm of the network, 0: the file's")
    parser.add_argument("--output", type=Path, default=Path("benchmark_inference_memory.json"))
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make(args.make, args.shape)
        return
    if args.one:
        chain, image, folder, classes, spacing = args.one
        found = segment(chain, Path(image), Path(folder), int(classes), float(spacing))
        sys.stdout.write(json.dumps(found) + "\n")
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "volume.nii"
        shape = [str(size) for size in args.shape]
        subprocess.run([sys.executable, __file__, "--make", str(image), "--shape", *shape], check=True)
        for spacing, classes in product(args.spacing, args.classes):
            for chain in ("ours", *(["stock"] if classes in args.stock else [])):
                line = [sys.executable, __file__, "--one", chain, str(image), str(Path(folder) / chain)]
                line += [str(classes), str(spacing)]
                done = subprocess.run(line, check=True, capture_output=True, text=True)
                found = json.loads(done.stdout.strip().splitlines()[-1])
                case = {"shape": list(args.shape), "spacing_mm": spacing or None, "classes": classes, "chain": chain}
                rows.append({**case, **found})
                sys.stdout.write(f"{rows[-1]}\n")
                sys.stdout.flush()
    write(args.output, rows)


if __name__ == "__main__":
    main()
