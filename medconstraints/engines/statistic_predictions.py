"""What a regressor says of each unsegmented image: computed once, stored, and turned into bounds."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from monai.data import DataLoader, MetaTensor
from torch import Tensor

from medconstraints import checks
from medconstraints.data.datalist_sections import file_sample
from medconstraints.engines.regression import RegressionStage
from medconstraints.networks.statistic_regressor import StatisticBlock
from medconstraints.transforms.bounds import free_bounds, is_never_negative
from medconstraints.transforms.item_bounds import MM3_PER_ML
from medconstraints.writing import write_text

__all__ = ["StatisticPredictions"]

logger = logging.getLogger(__name__)

READING = ("spacing_mm", "reading", "framing")  # entries of a config that say what a regressor looks at
MARGINS = ("value", "error", "uncertainty")


class StatisticPredictions:
    """Bounds of unsegmented images from a regressor (Kervadec 2020, eq. 5.3): (1 - gamma) R to (1 + gamma) R.

    `prepare` has the regressor look at every image once and writes what it says to a file, a datalist of its own, with
    the checksum of the weights: other weights or images make it anew. The file also tells how far the regressor is off
    on held-back segmented images, from which the margin can be taken.

    Args:
        stage: the regression; nothing is read before `prepare`.
        margin: gamma.
        margin_from: "value" for `margin`; "error" for the share of R within which `coverage` of the held-back images
            lie; "uncertainty" for R -+ z spread, the spread of each image and z such that as many lie within.
        coverage: see `margin_from`.
        batch_size: of the images that the regressor sees at once.

    Raises:
        ValueError: an argument is outside its range.
    """

    def __init__(
        self,
        stage: RegressionStage,
        *,
        margin: float = 0.1,
        margin_from: str = "value",
        coverage: float = 0.9,
        batch_size: int = 16,
    ) -> None:
        self.stage = stage
        self.regressor = stage.regressor
        self.path = stage.output_dir / "predictions.json"
        self.margin = checks.number("margin", margin, least=0)
        self.margin_from = checks.choice("margin_from", margin_from, MARGINS)
        if margin_from == "uncertainty" and not stage.loss.spread:
            raise ValueError(
                "margin_from: 'uncertainty' needs a regressor that learns it; set regression#spread to True."
            )
        if not 0 < checks.number("coverage", coverage) < 1:
            raise ValueError(f"coverage: expected a share of the images, 0 to 1, got {coverage!r}.")
        self.coverage = float(coverage)
        self.batch_size = checks.whole_number("batch_size", batch_size, 1)
        self._content: dict[str, Any] | None = None
        self._rows: dict[tuple[str, int], dict[str, Any]] = {}

    def prepare(self, *, train: bool = False) -> None:
        """Read the file, or make it; in distributed training process 0 does.

        Args:
            train: train the regressor first, or go on with it where it was killed.

        Raises:
            FileNotFoundError: no weights, because the regressor was not trained.
            RuntimeError: the weights are those of another regressor.
            ValueError: nothing is unsegmented; a margin from held-back images, of which there are none; weights that
                were trained on images read otherwise; or a value that is no number.
        """
        if not len(self.stage.items["unlabelled"]):
            raise ValueError("supervision: nothing is unsegmented, so that there is nothing to bound; take 'labelled'.")
        if self.margin_from != "value" and not len(self.stage.items["held_back"]):
            raise ValueError(f"margin_from: {self.margin_from!r} needs held-back segmented images; take 'value'.")
        if train:
            self.stage.run()
        if not self.stage.checkpoint.is_file():
            raise FileNotFoundError(
                f"checkpoint: no weights of the regressor, {self.stage.checkpoint}; train it first (train.json does, "
                "and regressor.json does that alone)."
            )
        self._check_reading()
        if idist.get_rank() == 0:
            wanted = self._identity()
            if (found := _read(self.path)) is None or found.get("made_from") != wanted:
                logger.info("%s: %s", self.path.name, "made" if found is None else "made anew, it was of other weights")
                made = {**self._computed(), "made_from": wanted}
                write_text(self.path, json.dumps(made, allow_nan=False) + "\n")
        idist.barrier()
        content = _read(self.path)
        if content is None:
            raise FileNotFoundError(f"{self.path}: cannot be read back; start the run again.")
        if self.margin_from != "value" and not content["held_back"]:
            raise ValueError(
                f"margin_from: {self.margin_from!r} needs every statistic on held-back images; take 'value'."
            )
        self._content = content
        self._rows = {(row["image"], row["slice"]): row for row in content["unlabelled"]}
        for line in _told(content["held_back"]):
            logger.info("held-back images, %s", line)

    def bounds(self, item: Mapping[str, Any]) -> dict[str, Tensor]:
        """Bounds (R, M, 2) of each statistic of an item, by the key that `StatisticRegressor.blocks` gives it.

        Raises:
            RuntimeError: `prepare` was not called.
            ValueError: nothing is known of this image, or it is no longer what the regressor saw.
        """
        if self._content is None:
            raise RuntimeError("predictions: expected prepare() before the first batch.")
        case, place = str(item["case"]), int(item.get("slice", 0))
        if (row := self._rows.get((case, place))) is None:
            raise ValueError(f"{case}: {self.path.name} has no entry for its slice {place}; remove the file.")
        self._check_same(item, row)
        values, margins = np.array(row["values"]), self._margins(row)
        bounds = {}
        absent = self._may_be_absent(values - margins)
        for block in self.regressor.blocks:
            lower, upper = (_table(side[block.values], block) for side in (values - margins, values + margins))
            if is_never_negative(self.regressor.statistics[block.name]):
                lower, upper = np.maximum(lower, 0), np.maximum(upper, 0)
            found = free_bounds(block.rows.stop, block.components)
            found[block.rows.start :] = torch.from_numpy(np.stack([lower, upper], -1)).float()
            if absent is not None and block.name != absent[0] and absent[1].any():
                # Of what is no statistic of single classes, such as pairs, nobody knows which rows are concerned.
                rows = torch.from_numpy(absent[1]) if self._is_by_class(block) else torch.ones(len(block.rows)).bool()
                found[block.rows.start :][rows] = free_bounds(1, block.components)
            bounds[block.key] = found
        return bounds

    def free(self) -> dict[str, Tensor]:
        """Bounds of the same shapes that bound nothing."""
        return {block.key: free_bounds(block.rows.stop, block.components) for block in self.regressor.blocks}

    def _margins(self, row: Mapping[str, Any]) -> np.ndarray:
        content: Any = self._content
        if self.margin_from == "uncertainty":
            return np.array(row["spread"]) * [entry["spread_factor"] for entry in content["held_back"].values()]
        if self.margin_from == "error":
            return np.abs(row["values"]) * [entry["relative_margin"] for entry in content["held_back"].values()]
        return np.abs(row["values"]) * self.margin

    def _may_be_absent(self, lower: np.ndarray) -> tuple[str, np.ndarray] | None:
        """Name of the size among the statistics, and the classes without a voxel for sure: these have no place."""
        for block in self.regressor.blocks:
            if self._is_size(block):
                return block.name, _table(lower[block.values], block)[:, 0] < 1
        return None

    def _check_same(self, item: Mapping[str, Any], row: Mapping[str, Any]) -> None:
        """A crop has another size than the image, and after a flip a class is elsewhere."""
        image = item["image"]
        if tuple(image.shape[1:]) != self.regressor.image_size:
            raise ValueError(
                f"{row['image']}: expected an image of {self.regressor.image_size} voxels, as the regressor saw it, "
                f"got {tuple(image.shape[1:])}; pad or crop it alike, and not at random."
            )
        if not isinstance(image, MetaTensor) or row["affine"] is None:
            return
        then, now = (torch.as_tensor(affine, dtype=torch.float64) for affine in (row["affine"], image.affine))
        moved = not torch.allclose(then, now, atol=1e-3)
        if moved and not self._survives_flips:
            raise ValueError(
                f"{row['image']}: was turned, flipped or moved after the regressor saw it, and its statistics say "
                "where a class is; leave spatial augmentation out, or regress sizes alone."
            )
        if moved and not math.isclose(float(then.det().abs()), float(now.det().abs()), rel_tol=1e-3):
            raise ValueError(f"{row['image']}: was resampled after the regressor saw it; leave zooms out.")

    def _is_by_class(self, block: StatisticBlock) -> bool:
        """Whether a statistic has a row for each class: tried out, with one class more."""
        shape = 1, self.regressor.num_classes + 1, *[3] * len(self.regressor.image_size)
        try:
            rows = self.regressor.statistics[block.name](torch.full(shape, 1 / shape[1])).shape[1]
        except (ValueError, IndexError):
            return False
        return rows == block.rows.stop + 1

    def state_dict(self) -> dict[str, Any]:
        """What the bounds were made from, so that a training does not go on with others; nothing before `prepare`."""
        return {} if self._content is None else {"made_from": self._content["made_from"]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare.

        Raises:
            ValueError: the bounds are those of other weights or images.
        """
        if state != self.state_dict():
            raise ValueError("the regressor, or the images that it saw, are not those of this training")

    def _check_reading(self) -> None:
        """Weights that saw images of another spacing say nothing of these."""
        last = self.stage.output_dir / "last.pt"
        if not last.is_file() or not self.stage.settings:
            return
        trained = torch.load(last, map_location="cpu", weights_only=True).get("settings", {})
        for name, value in _of_reading(self.stage.settings).items():
            if name in trained and trained[name] != value:
                raise ValueError(
                    f"{name}: is {value!r}, but the regressor was trained with {trained[name]!r}; train it anew, or "
                    "set it back."
                )

    @functools.cached_property
    def _survives_flips(self) -> bool:
        """Whether a flip leaves all statistics as they are: tried out, once."""
        shape = 1, self.regressor.num_classes, *[3] * len(self.regressor.image_size)
        probs = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        return all(
            torch.allclose(statistic(probs), statistic(probs.flip(axis)))
            for statistic in self.regressor.statistics.values()
            for axis in range(2, probs.dim())
        )

    def _identity(self) -> dict[str, Any]:
        """What the file depends on."""
        images = hashlib.sha256()
        for part in ("unlabelled", "held_back"):
            for item in self.stage.items[part]:
                files = item["image"] if isinstance(item["image"], list) else [item["image"]]
                for file in [*files, *([item["label"]] if part == "held_back" else [])]:
                    images.update(str(item["case"]).encode() + file_sample(Path(str(file))))
        return {
            "checkpoint_sha256": hashlib.sha256(self.stage.checkpoint.read_bytes()).hexdigest(),
            "images_sha256": images.hexdigest(),
            "image_size": list(self.regressor.image_size),
            "values": self.regressor.names,
            "coverage": self.coverage,
            "reading": {name: str(value) for name, value in _of_reading(self.stage.settings or {}).items()},
        }

    def _computed(self) -> dict[str, Any]:
        try:
            state = torch.load(self.stage.checkpoint, map_location="cpu", weights_only=True)
            self.regressor.load_state_dict(state)
        except (KeyError, RuntimeError, ValueError) as error:
            raise RuntimeError(
                f"{self.stage.checkpoint.name}: not of this regressor ({' '.join(str(error).split())[:300]}); "
                "train it anew, or set statistics, num_classes and patch_size back."
            ) from error
        cases, values, spread, _, _ = self._seen("unlabelled")
        rows = [
            {**case, "values": value, "spread": width}
            for case, value, width in zip(cases, values.tolist(), spread.tolist(), strict=True)
        ]
        negative = sum(
            int((values[:, block.values] < 0).sum())
            for block in self.regressor.blocks
            if is_never_negative(self.regressor.statistics[block.name])
        )
        if negative:
            logger.warning("%d of %d regressed values are below 0 and taken as 0", negative, values.size)
        return {
            "description": "statistics of unsegmented images as a regressor sees them; values in this order",
            "names": self.regressor.names,
            "held_back": self._errors(),
            "unlabelled": rows,
        }

    @torch.no_grad()
    def _seen(self, part: str) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Names, values (N, K), spreads, true values (NaN where unknown) and volumes of a voxel in ml (NaN)."""
        device = self.regressor.center.device
        training = self.regressor.training
        self.regressor.eval()
        cases: list[dict[str, Any]] = []
        found: list[list[np.ndarray]] = [[], [], [], []]
        dataset = self.stage.dataset(part) if len(self.stage.items[part]) else []
        for batch in DataLoader(dataset, batch_size=self.batch_size) if len(dataset) else []:
            image = batch["image"]
            values, spread = (part.cpu().numpy() for part in self.regressor.predict(checks.plain(image).to(device)))
            places = [int(place) for place in batch.get("slice", [0] * len(image))]
            affines = image.affine.tolist() if isinstance(image, MetaTensor) else [None] * len(image)
            for name, place, affine, value in zip(batch["case"], places, affines, values, strict=True):
                if not np.isfinite(value).all():
                    raise ValueError(f"{name}: the regressor gives {value.tolist()}; its training went wrong.")
                cases.append({"image": name, "slice": place, "affine": affine})
            known = all(key in batch for key in self.regressor.keys)
            true = self.regressor.targets(batch).numpy() if known else np.full(values.shape, np.nan)
            voxels = [np.nan if affine is None else _voxel_ml(affine) for affine in affines]
            for rows, more in zip(found, (values, spread, true, np.array(voxels)), strict=True):
                rows.append(more)
        self.regressor.train(training)
        empty = np.empty((0, len(self.regressor.names)))
        values, spread, true, voxels_ml = (np.concatenate(rows) if rows else empty for rows in found)
        return cases, values, spread, true, voxels_ml

    def _errors(self) -> dict[str, Any]:
        """By value: how far the regressor is off on held-back images, and the margins that cover most of them."""
        _, values, spread, true, voxel_ml = self._seen("held_back")
        errors: dict[str, Any] = {}
        sizes = [block.values for block in self.regressor.blocks if self._is_size(block)]
        for number, name in enumerate(self.regressor.names):
            known = ~np.isnan(true[:, number])
            if not known.any():
                continue
            error = np.abs(values - true)[known, number]
            there = true[known, number] != 0
            errors[name] = {
                "images": int(known.sum()),
                "mean": float(true[known, number].mean()),
                "mean_absolute_error": float(error.mean()),
                "percent": float(100 * error.mean() / max(np.abs(true[known, number]).mean(), 1e-12)),
                "relative_margin": _quantile(
                    error[there] / np.abs(values[known, number][there]).clip(1e-6), self.coverage
                ),
                "spread_factor": _quantile(error / spread[known, number].clip(1e-12), self.coverage),
            }
            if any(block.start <= number < block.stop for block in sizes) and not np.isnan(voxel_ml).any():
                errors[name]["mean_absolute_error_ml"] = float((error * voxel_ml[known]).mean())
        return errors if len(errors) == len(self.regressor.names) else {}

    def _is_size(self, block: StatisticBlock) -> bool:
        return is_never_negative(self.regressor.statistics[block.name], size=True)


def _of_reading(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name.split("#")[0] in READING}


def _table(values: np.ndarray, block: StatisticBlock) -> np.ndarray:
    return values.reshape(len(block.rows), block.components)


def _quantile(values: np.ndarray, share: float) -> float:
    """The value below which a new one of the same kind is in a share of all cases, or the largest of few."""
    if not len(values):
        return 0.0
    return float(np.sort(values)[min(len(values), math.ceil((len(values) + 1) * share)) - 1])


def _voxel_ml(affine: Sequence[Sequence[float]]) -> float:
    return abs(float(np.linalg.det(np.array(affine)[:3, :3]))) / MM3_PER_ML


def _told(errors: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, entry in errors.items():
        ml = f", {entry['mean_absolute_error_ml']:.3g} ml" if "mean_absolute_error_ml" in entry else ""
        lines.append(f"{name}: mean error {entry['mean_absolute_error']:.4g}{ml}, {entry['percent']:.0f} % of the mean")
    return lines


def _read(path: Path) -> dict[str, Any] | None:
    """The file, or None if there is none that can be read."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content
