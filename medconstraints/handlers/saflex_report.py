"""What SAFLEX made of the augmented samples, to be seen: a table, a picture, and a warning when a class is lost."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from PIL import Image, ImageDraw
from torch import Tensor

from medconstraints import checks
from medconstraints.saflex import RefinedBatch

__all__ = ["SaflexReportHandler"]

logger = logging.getLogger(__name__)

_TEXT_HEIGHT = 36
_SIDE = 96  # pixels of a picture
_LEAST_WEIGHT = 0.2


class SaflexReportHandler:
    """After each epoch writes `saflex.csv` and `saflex.png`, and warns of a class that loses most of its weight.

    The table has a row for each augmented sample of the last epoch: case, the label it was given, the label it got and
    its probability, weight, and gain. The picture shows some dropped and some relabelled samples with these reasons; of
    a volume its middle slice. The metrics `saflex_kept` and `saflex_relabelled` are shares of the samples, for classes;
    of label maps the second counts regions. A class whose weight falls below a fifth of its samples is warned of.

    Put it on a `SaflexTrainer`. In distributed training process 0 writes, of its own samples.

    Args:
        output_dir: folder of the run.
        pictures: dropped, and relabelled, samples in the picture.
    """

    def __init__(self, output_dir: str | Path, *, pictures: int = 8) -> None:
        self.output_dir = Path(output_dir)
        self.pictures = checks.whole_number("pictures", pictures, 1)
        self._batches: list[RefinedBatch] = []
        self._shown: dict[str, list[tuple[Tensor, str]]] = {}

    def attach(self, engine: Engine) -> None:
        """Attach to a `SaflexTrainer`."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._report)

    def _reset(self, engine: Engine) -> None:
        self._batches, self._shown = [], {"dropped": [], "relabelled": []}

    def _add(self, engine: Any) -> None:
        batch: RefinedBatch | None = engine.last_refined
        if batch is None:
            return
        if any(len(shown) < self.pictures for shown in self._shown.values()):
            self._show(batch)
        self._batches.append(batch._replace(image=batch.image[:0]))  # images are not kept
        engine.last_refined = None

    def _show(self, batch: RefinedBatch) -> None:
        """Keep some images and why they stand there."""
        for number, row in enumerate(_rows(batch)):
            kinds = ["dropped"] if not row["weight"] else []
            kinds += ["relabelled"] if row["new_label"] != row["label"] else []
            for kind in kinds:
                if len(self._shown[kind]) < self.pictures:
                    change = (
                        f"{row['label']} to {row['new_label']}" if kind == "relabelled" else f"label {row['label']}"
                    )
                    words = f"{kind}\nlabel {row['label']}{change}\ngain {row['gain']:.2f}"
                    self._shown[kind].append((batch.image[number].detach().float().cpu(), words))

    def _report(self, engine: Any) -> None:
        if not self._batches:
            return
        rows = [row for batch in self._batches for row in _rows(batch)]
        labels = [str(row["label"]).split() for row in rows]
        pairs = list(zip(labels, (str(row["new_label"]).split() for row in rows), strict=True))
        changed = sum(one != two for old, new in pairs for one, two in zip(old, new, strict=True))
        metrics = engine.state.metrics
        metrics["saflex_kept"] = float(np.mean([row["weight"] > 0 for row in rows]))
        metrics["saflex_relabelled"] = changed / sum(len(old) for old in labels)
        self._warn(engine.state.epoch)
        if idist.get_rank():
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with (self.output_dir / "saflex.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["epoch", *rows[0]])
            writer.writeheader()
            writer.writerows({"epoch": engine.state.epoch, **row} for row in rows)
        if any(self._shown.values()):
            _grid([shown for shown in self._shown.values() if shown]).save(self.output_dir / "saflex.png")

    def _warn(self, epoch: int) -> None:
        given = torch.cat([batch.given for batch in self._batches]).double()
        kept = torch.cat([batch.refined.weight > 0 for batch in self._batches]).double()
        before, after = given.sum(0), (given * kept.unsqueeze(1)).sum(0)
        for number, (had, has) in enumerate(zip(before.tolist(), after.tolist(), strict=True)):
            if had and has < _LEAST_WEIGHT * had:
                logger.warning(
                    "epoch %d: of class %d %.0f %% of the augmented samples are left; raise keep, take more guide "
                    "images, or look whether the guide images of this class are like those that train",
                    epoch,
                    number,
                    100 * has / had,
                )


def _rows(batch: RefinedBatch) -> list[dict[str, Any]]:
    """A row for each sample; of label maps, labels are those of the regions that are there, with spaces between."""
    label, weight, gain = (value.detach().cpu() for value in batch.refined)
    given, rows = batch.given.detach().cpu(), []
    for number, case in enumerate(batch.cases):
        if label.dim() == 2:
            old, best = str(int(given[number].argmax())), label[number].max(0)
            new, sure = str(int(best.indices)), float(best.values)
        else:
            there = (given[number] > 0).nonzero().flatten().tolist()
            best = label[number, there].max(-1)
            old, new = " ".join(map(str, there)), " ".join(map(str, best.indices.tolist()))
            sure = float(best.values.min())
        rows.append(
            {
                "case": case,
                "label": old,
                "new_label": new,
                "probability": round(sure, 4),
                "weight": round(float(weight[number]), 4),
                "gain": round(float(gain[number]), 4),
            }
        )
    return rows


def _grid(groups: list[list[tuple[Tensor, str]]]) -> Image.Image:
    """A row of pictures for each group, with words below."""
    width = max(len(group) for group in groups) * _SIDE
    picture = Image.new("L", (width, len(groups) * (_SIDE + _TEXT_HEIGHT)))
    draw = ImageDraw.Draw(picture)
    for row, group in enumerate(groups):
        for column, (image, words) in enumerate(group):
            plane = image[0] if image.dim() == 3 else image[0, ..., image.shape[-1] // 2]
            low, high = float(plane.min()), float(plane.max())
            values = ((plane - low) / max(high - low, 1e-6) * 255).to(torch.uint8).numpy()
            corner = (column * _SIDE, row * (_SIDE + _TEXT_HEIGHT))
            picture.paste(Image.fromarray(values).resize((_SIDE, _SIDE)), corner)
            draw.multiline_text((corner[0] + 2, corner[1] + _SIDE), words, fill=255, font_size=10, spacing=1)
    return picture
