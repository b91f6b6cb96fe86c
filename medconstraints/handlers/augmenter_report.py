"""What an augmenter learns, to be seen while it does: numbers, histograms, pictures, and a file to draw from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from medconstraints.augmentation import Augmenter, augment, write_draws

__all__ = ["AugmenterReportHandler"]


class AugmenterReportHandler:
    """After each epoch writes `augmenter.json` and `augmented.png`, and for TensorBoard each quantity's distribution.

    The picture has a row for each of some epochs: one training image (of a volume its middle slice), then draws of it.
    TensorBoard gets the histogram of each quantity, its mean and its spread. In distributed training process 0 writes.

    Args:
        augmenter: what learns.
        output_dir: folder of the run.
        interval: epochs between the rows of the picture.
        draws: augmented images in a row.
    """

    def __init__(self, augmenter: Augmenter, output_dir: str | Path, *, interval: int = 1, draws: int = 7) -> None:
        self.augmenter, self.output_dir = augmenter, Path(output_dir)
        self.interval, self.draws = interval, draws
        self.image: Tensor | None = None
        self.rows: list[Tensor] = []

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Write all."""
        epoch = engine.state.epoch
        self.output_dir.mkdir(parents=True, exist_ok=True)
        table = write_draws(self.augmenter, self.output_dir / "augmenter.json", note={"epoch": epoch})
        with SummaryWriter(log_dir=str(self.output_dir / "tensorboard")) as writer:
            for quantity, column in zip(self.augmenter.quantities, table.T, strict=True):
                writer.add_histogram(f"augment/{quantity.name}", column, epoch)
                writer.add_scalar(f"augment_mean/{quantity.name}", column.mean(), epoch)
                writer.add_scalar(f"augment_spread/{quantity.name}", column.std(), epoch)
        if self.image is None:
            batch = engine.state.batch  # a list of items where the trainer has taken it apart
            image = batch[0]["image"][None] if isinstance(batch, list) else batch["image"][:1]
            self.image = torch.as_tensor(image).detach().float().cpu().as_subclass(Tensor).clone()
        if (epoch - 1) % self.interval == 0 or epoch == engine.state.max_epochs:
            self.rows.append(self._row(self.image, table))
            Image.fromarray(torch.cat(self.rows).numpy()).save(self.output_dir / "augmented.png")

    def state_dict(self) -> dict[str, Any]:
        """The image and the rows so far."""
        return {"image": self.image, "rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on below these rows."""
        self.image, self.rows = state["image"], list(state["rows"])

    def _row(self, image: Tensor, table: np.ndarray) -> Tensor:
        """One row of the picture (H, (1 + draws) W), or (H, (1 + draws) W, 3), as bytes."""
        many = image.expand(self.draws, *image.shape[1:])
        values = {
            quantity.name: torch.as_tensor(table[: self.draws, number], dtype=torch.float32)
            for number, quantity in enumerate(self.augmenter.quantities)
        }
        spacing = torch.ones(self.draws, image.dim() - 2)
        generator = torch.Generator().manual_seed(0)
        drawn, _ = augment(many, None, values, spacing, nodes=self.augmenter.nodes, generator=generator)
        shown = torch.cat([image, drawn])
        if shown.dim() == 5:
            shown = shown[..., shown.shape[-1] // 2]
        low, high = image.min(), image.max()
        shown = ((shown - low) / (high - low).clamp(min=1e-6)).clamp(0, 1).mul(255).byte()
        row = torch.cat([*shown], dim=-1)
        return row.movedim(0, -1) if len(row) == 3 else row[0]
