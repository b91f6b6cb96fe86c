"""What an inference run leaves to look at: a table of all files, and a page with a picture of each mask."""

from __future__ import annotations

import base64
import csv
import io
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medconstraints.data.run_settings import write_settings
from medconstraints.data.weights_card import outside_of, read_card
from medconstraints.reports.planes import draw_planes
from medconstraints.reports.render import render
from medconstraints.volumes.facts import read_facts
from medconstraints.volumes.files import read_voxels
from medconstraints.writing import write_text

__all__ = ["finish_inference", "write_inference_page", "write_inference_table"]

logger = logging.getLogger(__name__)

LOW_CONFIDENCE = 0.8  # mean probability of the chosen class within a mask
COLUMNS = (
    *("name", "state", "reason", "mask", "class", "value", "voxels", "ml", "right_mm", "anterior_mm", "superior_mm"),
    *("pieces", "at_border", "confidence", "notes"),
)


def finish_inference(evaluator: Any, output_dir: str | Path, weights: str | Path) -> None:
    """After an inference: write its settings, `volumes.csv` and `index.html`, and end with its exit status.

    Args:
        evaluator: `TolerantEvaluator`, after its run.
        output_dir: folder of the masks.
        weights: file of weights that the run read.

    Raises:
        SystemExit: 1 if a volume failed, 2 if all did; of several processes in the first.
    """
    if os.environ.get("RANK", "0") != "0":
        return  # torchrun stops all processes when one of them fails, and the first has not written yet
    folder = Path(output_dir)
    write_settings(folder, weights)
    table = write_inference_table(folder / "volumes.csv", evaluator.rows, folder)
    page = write_inference_page(folder / "index.html", evaluator.rows, folder, cohort=read_card(weights).get("cohort"))
    logger.info("masks: %s\ntable: %s\npage:  %s", folder, table, page)
    if evaluator.exit_status:
        raise SystemExit(evaluator.exit_status)


def write_inference_table(path: Path, rows: Sequence[Mapping[str, Any]], output_dir: Path) -> Path:
    """One line for each class of each mask, and one for each file without a mask, as CSV.

    A text that a spreadsheet would take for a formula gets a ' in front.

    Args:
        path: file to write.
        rows: of `TolerantEvaluator`.
        output_dir: folder of the masks, and of the facts beside them.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        facts = read_facts(output_dir / row["mask"]) if row["mask"] else {}
        shared = {key: _no_formula(str(row[key])) for key in ("name", "state", "reason", "mask")}
        shared |= {"notes": facts.get("notes", ""), "confidence": facts.get("confidence", "")}
        for name, part in facts.get("classes", {}).items() or [("", {})]:
            places = dict(zip(("right_mm", "anterior_mm", "superior_mm"), part.get("centroid_mm", ()), strict=False))
            given = {key: part[key] for key in ("value", "voxels", "ml", "pieces", "at_border") if key in part}
            writer.writerow({**shared, "class": _no_formula(name), **places, **given})
    return write_text(path, text.getvalue())


def _no_formula(text: str) -> str:
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t") else text


def flags_of(facts: Mapping[str, Any], cohort: Mapping[str, Any] | None = None) -> list[str]:
    """What a person should look at, also where the volume is unlike those of the training (`cohort_of`)."""
    parts = facts.get("classes", {})
    flags = [f"{name}: empty" for name, part in parts.items() if not part["voxels"]]
    flags += ["empty"] if facts and not parts else []
    flags += [f"{name}: {part['pieces']} pieces" for name, part in parts.items() if part.get("pieces", 1) > 1]
    flags += [f"{name}: touches the border" for name, part in parts.items() if part.get("at_border")]
    confidence = facts.get("confidence")
    flags += [f"low confidence, {confidence:.2f}"] if confidence is not None and confidence < LOW_CONFIDENCE else []
    sizes = {str(part["value"]): part["ml"] for part in parts.values()}
    flags += outside_of(cohort, facts, sizes) if cohort else []
    return flags + ([facts["notes"]] if facts.get("notes") else [])


def write_inference_page(
    path: Path, rows: Sequence[Mapping[str, Any]], output_dir: Path, *, cohort: Mapping[str, Any] | None = None
) -> Path:
    """A page for all files, that needs no network: state, sizes, flags and a picture of each, sortable.

    Args:
        path: file to write.
        rows: of `TolerantEvaluator`.
        output_dir: folder of the masks, and of the facts beside them.
        cohort: of the training, see `cohort_of`.
    """
    shown = []
    for row in rows:
        facts = read_facts(output_dir / row["mask"]) if row["mask"] else {}
        sizes = {name: part["ml"] for name, part in facts.get("classes", {}).items()}
        shown.append({**row, "sizes": sizes, "flags": flags_of(facts, cohort), "picture": _picture(row, output_dir)})
    names = list(dict.fromkeys(name for row in shown for name in row["sizes"]))
    states = {state: sum(row["state"] == state for row in shown) for state in ("done", "failed", "kept", "left out")}
    bars = {name: _bars([row["sizes"][name] for row in shown if name in row["sizes"]]) for name in names}
    title = f"Masks of {states['done'] + states['kept']} volumes"
    page = render("inference.html", title=title, rows=shown, names=names, states=states, bars=bars)
    return write_text(path, page)


def _bars(values: Sequence[float]) -> list[tuple[float, float, int]]:
    """Edges in ml and number of volumes of each bar of a histogram; none of fewer than three volumes."""
    if len(values) < 3:
        return []
    counts, edges = np.histogram(values, min(10, len(values)))
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True))


def _picture(row: Mapping[str, Any], output_dir: Path) -> str:
    """Three planes as a data URL; empty where there is no mask, or its image is not to be read."""
    if not row["mask"] or not row.get("image"):
        return ""
    try:
        image, affine = read_voxels(Path(row["image"]))
        mask, _ = read_voxels(output_dir / row["mask"])
        png = draw_planes(_three_axes(image), _three_axes(mask).astype(np.uint8), affine)
    except (OSError, ValueError, MemoryError) as error:
        logger.warning("%s: no picture (%s)", row["name"], error)
        return ""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _three_axes(voxels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return voxels.reshape([*voxels.shape, 1][:3]) if voxels.ndim < 3 else voxels.reshape(*voxels.shape[:3], -1)[..., 0]
