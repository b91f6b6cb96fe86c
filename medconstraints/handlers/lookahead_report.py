"""What lookahead adversarial learning came to: a table, a curve, the best weights, and a verdict."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator, IterationEvents
from PIL import Image, ImageDraw

from medconstraints.handlers.resume import save_whole
from medconstraints.lookahead import LookaheadModels, by_patient, paired_bootstrap, patients_of
from medconstraints.structure import structure_of

__all__ = ["LookaheadReportHandler"]

IOU, STRUCTURE = "val_mean_iou", "structure"
COLOURS = {"adversary": "#1f5fa8", "noise": "#a0a0a0"}
SIZE, MARGIN = (900, 420), 46


class LookaheadReportHandler:
    """Writes `cycles.csv`, `cycles.png` and `best.pt` after each epoch, and `report.json` at the end.

    The table has a row for each evaluation, the picture is the paper's figure 1 of the run. `best.pt` has the weights
    of the adversary's last accepted peak, those of the start if there is none. The report compares them, and what the
    noise control came to, with the start on patients that neither steered nor confirmed: each class's IoU and the
    evaluator's other metrics before and after, the mean difference with its 95 % interval of a paired bootstrap over
    patients, the structure of the label maps beside that of the references (`structure_of`, means of the cases), and a
    verdict.

    Args:
        models: of the trainer.
        output_dir: folder of the run.
        evaluator: of the reported part, with the metric "val_mean_iou" of each case and class, and others.
        enclosed: see `structure_of`.
    """

    def __init__(
        self,
        models: LookaheadModels,
        output_dir: str | Path,
        *,
        evaluator: Evaluator,
        enclosed: Sequence[Sequence[int]] = (),
    ) -> None:
        self.models, self.output_dir, self.evaluator = models, Path(output_dir), evaluator
        self.enclosed = enclosed

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._report)

    def __call__(self, engine: Engine) -> None:
        """Write what there is after an evaluation."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        rows = self.models.rows
        if not rows:
            return
        beside = self.output_dir / "cycles.csv.part"
        with beside.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0]], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(beside, self.output_dir / "cycles.csv")
        draw_cycles(rows).save(self.output_dir / "cycles.png")
        save_whole(self._result(), self.output_dir / "best.pt")

    def _report(self, engine: Any) -> None:
        if not self.models.rows or (self.output_dir / "report.json").exists():
            return
        network = self.evaluator.network
        last = {name: value.clone() for name, value in network.state_dict().items()}
        chosen = {"before": self.models.weights["adversary"]["g0"]["network"], "after": self._result()}
        if "noise" in self.models.searches and self.models.weights["noise"]:
            chosen["control"] = self.models.best("noise")
        found = {name: self._measured(network, weights) for name, weights in chosen.items()}
        network.load_state_dict(last)
        structure = {name: metrics.pop(STRUCTURE) for name, metrics in found.items()}
        patients = patients_of(getattr(self.evaluator.data_loader, "dataset", ()))
        of_patients = {
            name: {metric: by_patient(values, patients) for metric, values in metrics.items()}
            for name, metrics in found.items()
        }
        report: dict[str, Any] = {
            "patients": len(of_patients["before"][IOU]),
            "scores": {
                name: {
                    metric: {"mean": _mean(_of_classes(values)), "of_classes": [_mean(column) for column in values.T]}
                    for metric, values in metrics.items()
                }
                for name, metrics in of_patients.items()
            },
            "differences": {
                name: {metric: difference(values, of_patients["before"][metric]) for metric, values in metrics.items()}
                for name, metrics in of_patients.items()
                if name != "before"
            },
            "structure": {name: _means(tables["pred"]) for name, tables in structure.items()}
            | {"label": _means(structure["before"]["label"])},
            "evaluations": {
                name: sum(row["search"] == name and row["event"] != "start" for row in self.models.rows)
                for name in self.models.searches
            },
            "accepted_peaks": {name: search.peaks for name, search in self.models.searches.items()},
        }
        report["verdict"] = verdict(report)
        (self.output_dir / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        engine.logger.info(report["verdict"])

    def _measured(self, network: Any, weights: Any) -> dict[str, Any]:
        """Each metric (N, K) of the cases, NaN where it is infinite, and the structure of predictions and labels."""
        network.load_state_dict(weights)
        structure: dict[str, list[dict[str, float]]] = {"pred": [], "label": []}

        def look(engine: Any) -> None:
            for item in engine.state.output:
                for key, rows in structure.items():
                    rows.append(structure_of(item[key].argmax(0), len(item[key]), enclosed=self.enclosed))

        with self.evaluator.add_event_handler(IterationEvents.MODEL_COMPLETED, look):
            self.evaluator.run()
        found: dict[str, Any] = {STRUCTURE: structure}
        for metric, values in self.evaluator.state.metric_details.items():
            table = torch.as_tensor(values).double().cpu().numpy()
            table = table.reshape(len(table), -1)
            found[metric] = np.where(np.isfinite(table), table, np.nan)
        return found

    def _result(self) -> Any:
        weights = self.models.weights["adversary"]
        return weights["last"]["network"] if "last" in weights else self.models.best("adversary")


def difference(after: np.ndarray, before: np.ndarray) -> dict[str, Any]:
    """Mean difference of the patients, (P, K) each, with its interval; and that of each class."""
    gaps = after - before
    rows = {"all": _of_classes(gaps), **{str(number + 1): column for number, column in enumerate(gaps.T)}}
    found = {}
    for name, values in rows.items():
        values = values[np.isfinite(values)]
        if len(values):
            _, low, high = paired_bootstrap(values)
            found[name] = {"mean": float(values.mean()), "interval": [low, high], "patients": len(values)}
    return found


def _of_classes(values: np.ndarray) -> np.ndarray:
    """Mean over the classes, without the patients that have none."""
    kept: np.ndarray = np.nanmean(values[~np.isnan(values).all(1)], 1)
    return kept


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def verdict(report: dict[str, Any]) -> str:
    """One sentence: is it better, beyond what the control shows?"""
    changed = report["differences"]["after"][IOU]["all"]
    low, high = changed["interval"]
    text = f"{report['patients']} patients: mean IoU {changed['mean']:+.4f} [{low:+.4f}, {high:+.4f}]"
    control = report["differences"].get("control", {}).get(IOU, {}).get("all")
    if control is not None:
        text += (
            f", the noise control {control['mean']:+.4f} [{control['interval'][0]:+.4f}, {control['interval'][1]:+.4f}]"
        )
    if report["accepted_peaks"]["adversary"] == 0 and changed["mean"] == 0:
        return f"No peak was better on the confirm part: the result is the start. {text}."
    if low > 0 and (control is None or changed["mean"] > control["mean"]):
        return f"Better than the start: {text}."
    if high < 0:
        return f"Worse than the start: {text}."
    return f"No improvement that these patients could show: {text}."


def draw_cycles(rows: list[dict[str, Any]]) -> Image.Image:
    """Mean IoU of each evaluation, a line for each cycle; rings are accepted peaks, dots other peaks."""
    picture = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(picture)
    scores = [row["mean_iou"] for row in rows if np.isfinite(row["mean_iou"])]
    low, high = min(scores), max(scores)
    spread = max(high - low, 1e-6)
    wide, tall = SIZE[0] - 2 * MARGIN, SIZE[1] - 2 * MARGIN

    def at(number: float, score: float) -> tuple[float, float]:
        share = (max(score, low) - low) / spread
        return MARGIN + wide * number / max(len(rows) - 1, 1), MARGIN + tall * (1 - share)

    for share in (0.0, 0.5, 1.0):
        score = low + share * spread
        draw.line([at(0, score), at(len(rows) - 1, score)], fill="#e6e6e6")
        draw.text((4, at(0, score)[1] - 6), f"{score:.3f}", fill="black")
    for number, row in enumerate(rows):
        colour, point = COLOURS.get(row["search"], "black"), at(number, row["mean_iou"])
        begins = number == 0 or rows[number - 1]["event"] in ("end", "accepted", "rejected")
        if row["event"] != "start":
            before = at(number - 1, row["start_mean_iou"] if begins else rows[number - 1]["mean_iou"])
            draw.line([before, point], fill=colour, width=2)
        if row["peak"] or row["event"] == "accepted":
            radius = 7 if row["event"] == "accepted" else 4
            box = [point[0] - radius, point[1] - radius, point[0] + radius, point[1] + radius]
            draw.ellipse(box, outline="#c03020", fill=None if row["event"] == "accepted" else "#c03020", width=2)
        if row["event"] in ("end", "accepted", "rejected"):
            draw.text((point[0] - 8, SIZE[1] - MARGIN + 8), f"{row['start']},{row['cycle']}", fill=colour)
    draw.text((MARGIN, 8), "mean IoU on the hold-out; blue: adversary, grey: noise control", fill="black")
    return picture


def _mean(values: np.ndarray) -> float | None:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None
