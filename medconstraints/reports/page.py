"""One page for many volumes: what became of each, sizes or scores, what to look at, a picture and a viewer.

An inference and an evaluation end with it. It stands in page.html.
"""

from __future__ import annotations

import base64
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from medconstraints.reports.planes import draw_planes
from medconstraints.reports.render import render
from medconstraints.reports.viewer import write_viewer
from medconstraints.reports.volumes import read_image, read_labels, require_same_grid
from medconstraints.writing import write_text

__all__ = ["Row", "pages_folder", "write_page"]

logger = logging.getLogger(__name__)

HEADER_TOLERANCE = 0.5  # mm between image and mask: headers of public data differ a little; scores use the strict check


@dataclass
class Row:
    """What the page says of one volume.

    Attributes:
        name: by which people know it.
        state: such as "done".
        image: its file, or folder of DICOM slices; None where there is nothing to show.
        mask: the prediction.
        reference: of an evaluation.
        place: path of its viewer from the folder of viewers, without an ending.
        cells: text of each column.
        reason: why there is no mask.
        flags: what a person should look at.
        class_names: class number -> name of those that are not called by their number.
    """

    name: str
    state: str
    image: Path | None = None
    mask: Path | None = None
    reference: Path | None = None
    place: str = ""
    cells: Sequence[str] = ()
    reason: str = ""
    flags: Sequence[str] = ()
    class_names: Mapping[int, str] = field(default_factory=dict)


def pages_folder(page: Path) -> Path:
    """Folder of the viewers that belong to a page.

    Example:
        >>> pages_folder(Path("masks/index.html")).as_posix()
        'masks/index_pages'
    """
    return page.with_name(f"{page.stem}_pages")


def write_page(
    path: Path,
    rows: Sequence[Row],
    *,
    title: str,
    columns: Sequence[str],
    notes: Sequence[str] = (),
    summary: Sequence[str] = (),
    measured: Mapping[str, Sequence[float]] | None = None,
    made: Mapping[str, str] | None = None,
    picture_png: bytes | None = None,
    series: str | None = None,
    radiological: bool = True,
    viewer: bool = True,
) -> Path:
    """Write the page, and beside it a folder with a viewer for each volume that has an image and a mask, and no others.

    Args:
        path: file to write.
        rows: the volumes.
        title: heading.
        columns: heading of each cell of a row.
        notes: sentences above the table.
        summary: a last row, a text for each column.
        measured: name with unit -> values, shown as histograms; of fewer than three values none is.
        made: what the page tells of how it was made.
        picture_png: a picture below the table.
        series: of DICOM folders that hold several, as they were read.
        radiological: show the patient's right on the left.
        viewer: write the viewers, of up to some 10 MB each.
    """
    shown = []
    for row in tqdm(rows, desc="pages", disable=None):  # on a terminal alone
        drawn, link = _look(row, path, series=series, radiological=radiological, viewer=viewer)
        shown.append({"row": row, "picture": drawn, "link": link})
    written = {path.parent / os.fsdecode(unquote_to_bytes(one["link"])) for one in shown}
    for file in pages_folder(path).rglob("*.html"):
        if file not in written:  # the viewer of a former mask
            file.unlink()
    bars = {name: found for name, values in (measured or {}).items() if (found := _bars(values))}
    counts = {state: sum(row.state == state for row in rows) for state in dict.fromkeys(row.state for row in rows)}
    picture = None if picture_png is None else base64.b64encode(picture_png).decode("ascii")
    page = render(
        "page.html",
        **{"title": title, "notes": notes, "counts": counts, "bars": bars, "columns": columns, "rows": shown},
        **{"summary": summary, "picture": picture, "made": made or {}},
        side="left" if radiological else "right",
        dashed=any(row.reference for row in rows),
    )
    return write_text(path, page)


def _look(row: Row, page: Path, *, series: str | None, radiological: bool, viewer: bool) -> tuple[str, str]:
    """Three planes as a data URL, and the path of the viewer; empty where there is nothing to show."""
    if row.image is None or row.mask is None:
        return "", ""
    picture, link = "", ""
    try:
        image = read_image(row.image, series=series).canonical()
        masks = {}
        for name, file in (("Prediction", row.mask), ("Reference", row.reference)):
            if file is not None:
                labels = read_labels(file, name.lower()).canonical()
                require_same_grid(labels, image, tolerance=HEADER_TOLERANCE)
                masks[name] = labels.data.astype(np.uint8)
        options: dict[str, Any] = {"reference": masks.get("Reference"), "radiological": radiological}
        png = draw_planes(image.data, masks["Prediction"], image.affine, **options)
        picture = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
        if viewer:
            file = pages_folder(page) / f"{row.place}.html"
            options |= {"title": row.name, "class_names": row.class_names}
            write_viewer(file, image.data, masks["Prediction"], image.affine, **options)
            link = quote(os.fsencode(file.relative_to(page.parent).as_posix()))
    except (OSError, ValueError, MemoryError) as error:
        logger.warning("%s: no %s (%s)", row.name, "viewer" if picture else "picture", error)
    return picture, link


def _bars(values: Sequence[float]) -> list[tuple[float, float, int]]:
    """Edges and number of volumes of each bar of a histogram; none of fewer than three values."""
    if len(values) < 3:
        return []
    counts, edges = np.histogram(values, min(10, len(values)))
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True))
