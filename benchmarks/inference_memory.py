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

from medconstraints.transforms import mask_transforms, reading_transforms

SPACING_MM = (2.0, 2.0, 2.0)


def segment(chain: str, image: Path, folder: Path, classes: int) -> dict[str, float]:
    """One volume by one chain: seconds, and gigabytes at most."""
    start = time.perf_counter()
    if chain == "ours":
        reading = Compose(reading_transforms(num_classes=classes, label_key=None, spacing_mm=SPACING_MM))
        writing = Compose(mask_transforms(reading, output_dir=folder))
    else:
        keys = "image"
        reading = Compose(
            [
                LoadImaged(keys),
                EnsureChannelFirstd(keys),
                Orientationd(keys, axcodes="RAS", labels=None),
                Spacingd(keys, pixdim=SPACING_MM),
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
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, classes, 3, padding=1).eval()
    batch = list_data_collate([reading({"image": str(image)})])
    with torch.no_grad():
        batch["pred"] = SlidingWindowInferer((96, 96, 96), 1, 0.25)(batch["image"], network)
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
    parser.add_argument("--output", type=Path, default=Path("benchmark_inference_memory.json"))
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make(args.make, args.shape)
        return
    if args.one:
        chain, image, folder, classes = args.one
        sys.stdout.write(json.dumps(segment(chain, Path(image), Path(folder), int(classes))) + "\n")
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "volume.nii"
        shape = [str(size) for size in args.shape]
        subprocess.run([sys.executable, __file__, "--make", str(image), "--shape", *shape], check=True)
        for classes in args.classes:
            for chain in ("ours", *(["stock"] if classes in args.stock else [])):
                line = [sys.executable, __file__, "--one", chain, str(image), str(Path(folder) / chain), str(classes)]
                done = subprocess.run(line, check=True, capture_output=True, text=True)
                found = json.loads(done.stdout.strip().splitlines()[-1])
                rows.append({"shape": list(args.shape), "classes": classes, "chain": chain, **found})
                sys.stdout.write(f"{rows[-1]}\n")
                sys.stdout.flush()
    write(args.output, rows)


if __name__ == "__main__":
    main()
