"""Write a cohort of synthetic cases: NIfTI files and a datalist in the style of the Medical Segmentation Decathlon."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from nibabel import Nifti1Image

from medconstraints import checks

__all__ = ["require", "write_cohort"]

Made = tuple[np.ndarray, np.ndarray, np.ndarray]  # image, label, affine


def require(condition: Any, name: str, expected: str, value: object) -> None:
    """ValueError that names an argument outside its range."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {value!r}.")


def write_cohort(
    output_dir: str | Path,
    make: Callable[[int, np.random.Generator], Made],
    about: Mapping[str, Any],
    *,
    file_name: str,
    counts: Mapping[str, int],
    seed: int,
    overwrite: bool,
) -> Path:
    """Write the cases that a function makes, `imagesTr/NAME` and `labelsTr/NAME`, and then a ``datalist.json``.

    Case i depends on ``seed`` and i, never on the counts, and its files carry no time: the same call writes the same
    bytes. No datalist stands while its files change.

    Args:
        output_dir: folder, made if needed.
        make: number of a case and its generator -> image, label, affine (4, 4).
        about: what the datalist says besides: name, description, labels, parameters.
        file_name: name of a file with a place for the number, such as "disc_{:04d}.nii"; .gz compresses.
        counts: section -> number of its cases; the first section needs at least one.
        seed: at least 0.
        overwrite: replace the datalist, and all files of such names.

    Returns:
        Path of the datalist, for ``monai.data.load_decathlon_datalist(path, True, "training")``.

    Raises:
        FileExistsError: there is a datalist already and ``overwrite`` is False.
        ValueError: a count or the seed is out of its range, or ``make`` raises it.
    """
    for number, (section, count) in enumerate(counts.items()):
        checks.whole_number(f"num_{section}", count, int(number == 0))
    checks.whole_number("seed", seed, 0)
    folder, datalist = Path(output_dir), Path(output_dir, "datalist.json")
    if datalist.exists() and not checks.flag("overwrite", overwrite):
        raise FileExistsError(f"output_dir: {folder} holds a datalist.json; name another folder, or set overwrite.")
    cases: list[dict[str, str]] = []
    for index in range(sum(counts.values())):
        # Made, and its options checked, before anything is replaced.
        image, label, affine = make(index, np.random.default_rng([seed, index]))
        datalist.unlink(missing_ok=True)
        cases.append({kind: f"{kind}sTr/{file_name.format(index)}" for kind in ("image", "label")})
        for path, array in zip(cases[-1].values(), (image, label), strict=True):
            _write(folder / path, array, affine)
    written = {folder / path for case in cases for path in case.values()}
    for stale in set(folder.glob(f"*sTr/{file_name.split('{')[0]}*{''.join(Path(file_name).suffixes)}")) - written:
        stale.unlink()
    rest = iter(cases)
    sections = {section: [next(rest) for _ in range(count)] for section, count in counts.items()}
    content = {**about, "licence": "CC0-1.0", **sections}
    datalist.write_text(json.dumps(content, indent=2, default=float) + "\n", encoding="utf-8")
    return datalist


def _write(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    volume = Nifti1Image(array, affine)
    volume.set_sform(affine, code="scanner")
    volume.set_qform(affine, code="scanner")
    volume.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = volume.to_bytes()
    path.write_bytes(gzip.compress(content, 6, mtime=0) if path.suffix == ".gz" else content)
