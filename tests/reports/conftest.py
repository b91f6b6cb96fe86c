import json
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

# stored towards left, posterior, superior, with thick slices
LPS = np.array([[-0.8, 0, 0, 30], [0, -1.1, 0, 12], [0, 0, 4.0, 7], [0, 0, 0, 1]])


def save_volume(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, LPS if affine is None else affine), path)
    return path


def cuboid(shape: Sequence[int], *blocks: tuple[int, tuple[int, ...], tuple[int, ...]]) -> np.ndarray:
    """A label map with half-open blocks `(class, start, stop)`."""
    labels = np.zeros(shape, dtype=np.uint8)
    for value, start, stop in blocks:
        labels[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = value
    return labels


@pytest.fixture
def save() -> Callable[..., Path]:
    return save_volume


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Three volumes with references, and predictions of the first two: one shifted, one empty."""
    rng = np.random.default_rng(0)
    shape, items = (24, 20, 8), []
    references = [
        cuboid(shape, (1, (4, 5, 2), (14, 12, 6)), (2, (14, 5, 2), (18, 12, 5))),
        cuboid(shape, (1, (6, 3, 1), (12, 12, 7))),
        cuboid(shape, (2, (6, 3, 1), (12, 12, 7))),
    ]
    for number, labels in enumerate(references):
        name = f"case_{number:03d}.nii.gz"
        image = (rng.normal(100, 10, shape) + 60 * (labels > 0)).astype(np.float32)
        save_volume(tmp_path / "data" / "images" / name, image)
        save_volume(tmp_path / "data" / "labels" / name, labels)
        items.append({"image": f"images/{name}", "label": f"labels/{name}"})
    save_volume(tmp_path / "out" / "case_000" / "case_000_seg.nii.gz", np.roll(references[0], 2, axis=0))
    save_volume(tmp_path / "out" / "case_001" / "case_001_seg.nii.gz", np.zeros(shape, np.uint8))
    content = {"labels": {"0": "background", "1": "head", "2": "tail"}, "test": items, "two": items[:2]}
    (tmp_path / "data" / "list.json").write_text(json.dumps(content))
    return tmp_path
