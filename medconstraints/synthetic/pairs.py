"""Generated images with their masks as files, for any other pipeline to train on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from nibabel import Nifti1Image
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from medconstraints import checks
from medconstraints.data.output_folders import check_output_dir

__all__ = ["write_pairs"]

WINDOW = 3.0  # intensities of zero mean and unit variance between which PNG files are grey


def write_pairs(
    generator: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    output_dir: str | Path,
    *,
    num_pairs: int,
    num_classes: int,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `num_pairs` image-mask pairs, a datalist of them, and what they are close to.

    `output_dir` gets `images/` and `labels/`, PNG files of images with one or three channels (black is three standard
    deviations below the mean, white three above) and else NIfTI; `datalist.json`, marked `"synthetic": true`, with the
    image file each mask came from as `source`; `report.json` with the nearest real image of each generated one, and
    `nearest.png`, which shows the most alike of both.

    The distance is the root mean square difference of intensities; `real_to_real` are those from each real image to its
    nearest other one. `nearest_to_second` tells copies: it is the distance to the nearest real image over that to the
    second nearest, 0 for a copy, near 1 for an image that is like no single one. A blurred image is close to all.

    Args:
        generator: one-hot masks (B, K, *S) -> images (B, C, *S), such as `MaskToImage`. Its dropout stays on.
        dataset: items with `image` (C, *S) and `label`, the real pair, and `augmented_label`, the mask to make an image
            of; all of one shape. Each look at an item may give another mask.
        output_dir: empty or new, unless `overwrite`.
        num_pairs: how many; the items take turns.
        num_classes: of the masks.
        seed: of the masks and of the dropout.
        overwrite: files of a former call are replaced.

    Returns:
        The content of `report.json`.

    Raises:
        ValueError: fewer than two items, items of several shapes, or a mask without foreground.
        FileExistsError: see `check_output_dir`.
    """
    folder = Path(output_dir)
    count = checks.whole_number("num_pairs", num_pairs, 1)
    check_output_dir(folder, overwrite=overwrite)
    if len(dataset) < 2:
        raise ValueError(f"dataset: expected at least two items to compare with, got {len(dataset)}; give more.")
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    real = [dataset[number] for number in range(len(dataset))]
    shapes = {tuple(item["image"].shape) for item in real}
    if len(shapes) > 1:
        raise ValueError(f"dataset: expected images of one shape, got {sorted(shapes)}; crop them to a patch.")
    for item in real:
        if not torch.as_tensor(item["label"]).any():
            raise ValueError(f"{_name(item)}: its mask has no foreground to make an image of; leave it out.")
    names = [_name(item) for item in real]
    reals = torch.stack([_plain(item["image"]).flatten() for item in real])
    apart = torch.cdist(reals, reals).fill_diagonal_(float("inf")).min(1).values / reals.shape[1] ** 0.5
    random = np.random.RandomState(seed)
    device = next(generator.parameters()).device
    entries, rows, shown = [], [], []
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for number in range(count):
            _seed(dataset, random.randint(2**31))
            item = dataset[number % len(dataset)]
            label = _plain(item["augmented_label"])
            mask = F.one_hot(label[0].long(), num_classes).movedim(-1, 0).to(torch.get_default_dtype())
            image = generator(mask[None].to(device))[0].cpu()
            files = _write(folder, f"pair_{number:05d}", image, label, item["image"])
            entries.append({**files, "source": _name(item)})
            distances = torch.cdist(image.flatten()[None], reals)[0] / reals.shape[1] ** 0.5
            (first, second), (nearest, _) = (found.tolist() for found in distances.topk(2, largest=False))
            rows.append({**files, "nearest": names[nearest], "rms": round(first, 4), "second_rms": round(second, 4)})
            shown.append((first / max(second, 1e-12), image, _plain(real[nearest]["image"])))
            shown = sorted(shown, key=lambda row: row[0])[:4]
    report = {
        "synthetic": True,
        "pairs": count,
        "nearest_real": _quantiles([row["rms"] for row in rows]),
        "nearest_to_second": _quantiles([row["rms"] / max(row["second_rms"], 1e-12) for row in rows]),
        "real_to_real": _quantiles(apart.tolist()),
        "rows": rows,
    }
    listed = {"name": "generated pairs", "synthetic": True, "numTraining": count, "training": entries}
    (folder / "datalist.json").write_text(json.dumps(listed, indent=1) + "\n")
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    _picture([image for _, *pair in shown for image in pair]).save(folder / "nearest.png")
    return report


def _write(folder: Path, name: str, image: Tensor, label: Tensor, like: Any) -> dict[str, str]:
    """The files of a pair, relative to the folder."""
    flat = image.dim() == 3 and len(image) in (1, 3)
    suffix = ".png" if flat else ".nii.gz"
    files = {"image": f"images/{name}{suffix}", "label": f"labels/{name}{suffix}"}
    if flat:
        Image.fromarray(_pixels(image)).save(folder / files["image"])
        Image.fromarray(label[0].byte().numpy().T).save(folder / files["label"])
        return files
    affine = like.affine.cpu().numpy() if isinstance(like, MetaTensor) else np.eye(4)
    voxels = image.movedim(0, -1).float().numpy()
    for key, array in (("image", voxels[..., 0] if len(image) == 1 else voxels), ("label", label[0].byte().numpy())):
        Nifti1Image(array, affine).to_filename(folder / files[key])
    return files


def _pixels(image: Tensor) -> np.ndarray:
    """(C, X, Y) as bytes (Y, X) or (Y, X, 3), as the readers of MONAI turn PNG files."""
    grey = ((image + WINDOW) / (2 * WINDOW)).clamp(0, 1).mul(255).round().byte()
    pixels: np.ndarray = grey.permute(2, 1, 0).numpy()
    return pixels if len(image) == 3 else pixels[..., 0]


def _picture(images: Sequence[Tensor]) -> Image.Image:
    """Generated images above the real ones that are nearest to them; middle slices of volumes."""
    flat = [image[..., image.shape[-1] // 2] if image.dim() == 4 else image for image in images]
    flat = [image if len(image) == 3 else image[:1] for image in flat]
    rows = [np.concatenate([_pixels(image) for image in flat[first::2]], 1) for first in (0, 1)]
    return Image.fromarray(np.ascontiguousarray(np.concatenate(rows, 0)))


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    found = np.quantile(values, [0, 0.5, 1])
    return {name: round(float(value), 4) for name, value in zip(("least", "median", "largest"), found, strict=True)}


def _plain(value: Any) -> Tensor:
    return torch.as_tensor(value).detach().cpu().as_subclass(Tensor)


def _name(item: Mapping[str, Any]) -> str:
    return checks.label_name(item["image"], "image")


def _seed(dataset: Any, seed: int) -> None:
    """Random transforms of a MONAI data set draw from this seed."""
    transform: Any = getattr(dataset, "transform", None)
    if hasattr(transform, "set_random_state"):
        transform.set_random_state(seed=seed)
