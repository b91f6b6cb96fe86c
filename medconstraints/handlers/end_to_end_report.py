"""What a generator of training images learns, to be seen while it does: numbers, pictures, and its weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

from medconstraints import checks
from medconstraints.handlers.epoch_table import EpochTable
from medconstraints.handlers.resume import save_whole
from medconstraints.networks import MaskToImage

__all__ = ["EndToEndReportHandler"]

COLUMNS = ("generator_loss", "discriminator_loss", "guide_loss", "direct_term", "through_term")


class EndToEndReportHandler:
    """After each epoch writes `generator.csv`, TensorBoard's curves of alpha, and `gan.pt`; at times a picture.

    The table has the metrics of the trainer and each cell's alpha. The picture, `generated/epoch_<number>.png`, has a
    row for each of some training images: the mask, the image made of it, the real image, the augmented mask, and the
    image made of that; of a volume the middle slice of the last axis. In distributed training process 0 writes.

    Args:
        gan: what learns.
        output_dir: folder of the run.
        num_classes: of the masks.
        interval: epochs between pictures; there is one of the last epoch too.
        rows: of the picture.
    """

    def __init__(
        self, gan: MaskToImage, output_dir: str | Path, *, num_classes: int, interval: int = 10, rows: int = 4
    ) -> None:
        self.gan, self.output_dir = gan, Path(output_dir)
        self.num_classes = checks.whole_number("num_classes", num_classes, 2)
        self.interval = checks.whole_number("interval", interval, 1)
        self.rows = checks.whole_number("rows", rows, 1)
        self.table = EpochTable(self.output_dir / "generator.csv")
        self.shown: dict[str, Tensor] = {}
        self.writer: SummaryWriter | None = None

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Write all."""
        epoch = engine.state.epoch
        alpha = {
            f"alpha/{name or 'generator'}/{number}": value
            for name, cell in self.gan.cells()
            for number, value in enumerate(cell.alpha.tolist())
        }
        metrics = {name: engine.state.metrics.get(name) for name in COLUMNS}
        self.table.write(epoch, {**metrics, **alpha})
        if self.writer is None:
            self.writer = SummaryWriter(log_dir=str(self.output_dir / "tensorboard"))
        for name, value in alpha.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()
        save_whole(self.gan.state_dict(), self.output_dir / "gan.pt")
        if not self.shown:
            self.shown = _items(engine.state.batch, self.rows)
        if epoch % self.interval == 0 or epoch == engine.state.max_epochs:
            path = self.output_dir / "generated" / f"epoch_{epoch:04d}.png"
            path.parent.mkdir(exist_ok=True)
            self._picture().save(path)

    def state_dict(self) -> dict[str, Any]:
        """The images that are shown."""
        return {"shown": self.shown}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Show these images."""
        self.shown = dict(state["shown"])

    def _picture(self) -> Image.Image:
        device = next(self.gan.parameters()).device
        real = self.shown["image"]
        masks = [self.shown[key] for key in ("label", "augmented_label") if key in self.shown]
        with torch.no_grad(), torch.random.fork_rng():  # dropout stays on, as in training; the run's draws stay too
            made = [
                self.gan(F.one_hot(mask[:, 0].long(), self.num_classes).movedim(-1, 1).float().to(device)).cpu()
                for mask in masks
            ]
        low, high = real.min(), real.max()

        def as_grey(image: Tensor) -> Tensor:
            return (image - low) / (high - low).clamp(min=1e-6)

        columns = [masks[0] / (self.num_classes - 1), as_grey(made[0]), as_grey(real)]
        for mask, image in zip(masks[1:], made[1:], strict=True):
            columns += [mask / (self.num_classes - 1), as_grey(image)]
        channels = 3 if real.shape[1] == 3 else 1
        grid = torch.cat([_flat(column[:, :channels]).expand(-1, channels, -1, -1) for column in columns], -1)
        pixels = torch.cat([*grid], -2).clamp(0, 1).mul(255).byte().movedim(0, -1).numpy()
        return Image.fromarray(pixels if channels == 3 else pixels[..., 0])


def _items(batch: Any, count: int) -> dict[str, Tensor]:
    """The first images and masks of a batch, which may have been taken apart."""
    keys: Iterable[str] = ("image", "label", "augmented_label")
    if isinstance(batch, list):
        batch = {key: torch.stack([item[key] for item in batch]) for key in keys if key in batch[0]}
    return {
        key: torch.as_tensor(batch[key][:count]).detach().float().cpu().as_subclass(Tensor).clone()
        for key in keys
        if key in batch
    }


def _flat(image: Tensor) -> Tensor:
    """(B, C, rows, columns), the middle slice of volumes; files keep the second axis upright."""
    return (image[..., image.shape[-1] // 2] if image.dim() == 5 else image).transpose(-1, -2)
