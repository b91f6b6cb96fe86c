"""What an inference run leaves to look at: a table of all files, and a page with a picture of each mask."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medconstraints.data.run_settings import write_settings
from medconstraints.data.training_cohort import outside_of
from medconstraints.data.weights_card import read_card
from medconstraints.reports.page import Row, write_page
from medconstraints.volumes.facts import facts_path, read_facts
from medconstraints.writing import write_text

__all__ = ["finish_inference", "flags_of", "write_flags", "write_inference_page", "write_inference_table"]

logger = logging.getLogger(__name__)

LOW_CONFIDENCE = 0.8  # mean probability of the chosen class within a mask
COLUMNS = (
    *("name", "state", "reason", "mask", "class", "value", "voxels", "ml", "right_mm", "anterior_mm", "superior_mm"),
    *("pieces", "at_border", "confidence", "flags"),
)


def finish_inference(evaluator: Any, output_dir: str | Path, weights: str | Path, **options: Any) -> None:
    """After an inference: write its settings, flags, `volumes.csv` and `index.html`, and end with its exit status.

    Args:
        evaluator: `TolerantEvaluator`, after its run.
        output_dir: folder of the masks.
        weights: file of weights that the run read.
        **options: `series`, `radiological` and `viewer` of `write_page`.

    Raises:
        SystemExit: 1 if a volume failed, 2 if all did; of several processes in the first.
    """
    if os.environ.get("RANK", "0") != "0":
        return  # torchrun stops all processes when one of them fails, and the first has not written yet
    folder = Path(output_dir)
    write_settings(folder, weights)
    write_flags(evaluator.rows, folder, read_card(weights).get("cohort"))
    table = write_inference_table(folder / "volumes.csv", evaluator.rows, folder)
    page = write_inference_page(folder / "index.html", evaluator.rows, folder, **options)
    logger.info("masks: %s\ntable: %s\npage:  %s", folder, table, page)
    if evaluator.exit_status:
        raise SystemExit(evaluator.exit_status)


def write_flags(rows: Sequence[Mapping[str, Any]], output_dir: Path, cohort: Mapping[str, Any] | None) -> None:
    """Put what a person should look at into the facts of each mask, as "flags", see `flags_of`."""
    for row in rows:
        if row["mask"] and (facts := read_facts(output_dir / row["mask"])):
            facts["flags"] = flags_of(facts, cohort)
            write_text(facts_path(output_dir / row["mask"]), json.dumps(facts, indent=1) + "\n")


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
        flags = _no_formula("; ".join(facts.get("flags", ())))
        shared |= {"flags": flags, "confidence": facts.get("confidence", "")}
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
    flags += outside_of(cohort, facts) if cohort else []
    return flags + ([facts["notes"]] if facts.get("notes") else [])


def write_inference_page(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    output_dir: Path,
    **options: Any,
) -> Path:
    """A page for all files, that needs no network: state, sizes, flags, a picture of each and a viewer; sortable.

    Args:
        path: file to write.
        rows: of `TolerantEvaluator`.
        output_dir: folder of the masks, and of the facts beside them.
        **options: `series`, `radiological` and `viewer` of `write_page`.
    """
    facts = [read_facts(output_dir / row["mask"]) if row["mask"] else {} for row in rows]
    sizes = [{name: part["ml"] for name, part in found.get("classes", {}).items()} for found in facts]
    names = list(dict.fromkeys(name for found in sizes for name in found))
    shown = [
        Row(
            name=row["name"],
            state=row["state"],
            image=Path(row["image"]) if row.get("image") else None,
            mask=output_dir / row["mask"] if row["mask"] else None,
            place=row["mask"],
            cells=[f"{size[name]:.2f}" if name in size else "" for name in names],
            reason=row["reason"],
            flags=found.get("flags", ()),
            class_names={part["value"]: name for name, part in found.get("classes", {}).items()},
        )
        for row, found, size in zip(rows, facts, sizes, strict=True)
    ]
    return write_page(
        path,
        shown,
        title=f"Masks of {sum(bool(row['mask']) for row in rows)} volumes",
        columns=[f"{name} (ml)" for name in names],
        measured={f"{name} (ml)": [found[name] for found in sizes if name in found] for name in names},
        **options,
    )
