"""What a mean teacher says of each batch, as one of its targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from medconstraints import checks
from medconstraints.engines.prepare_batch import PrepareBatchTargets
from medconstraints.losses.base import TargetLoss

__all__ = ["PrepareBatchTeacher"]


class PrepareBatchTeacher(PrepareBatchTargets):
    """`prepare_batch` that adds the probabilities of a teacher under "teacher" (Tarvainen and Valpola 2017).

    The teacher is a moving average of the trained network, such as the `ema_model` of ignite's `EMAHandler`, and sees
    the images with noise of its own.

    Args:
        loss: a `CombinedLoss` with a `ConsistencyLoss`.
        teacher: network, on the device.
        noise: standard deviation of Gaussian noise on the teacher's images.

    Raises:
        ValueError: the loss does not read "teacher", or the noise is below 0.
    """

    def __init__(self, loss: TargetLoss, teacher: nn.Module, *, noise: float = 0.1) -> None:
        if "teacher" not in loss.target_keys:
            raise ValueError(
                f"loss: expected one that reads 'teacher', such as ConsistencyLoss, got {loss.target_keys}."
            )
        super().__init__(loss, target_keys=[key for key in loss.target_keys if key != "teacher"])
        self.teacher = teacher
        self.noise = checks.number("noise", noise, least=0)

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Move image and targets to the device, and ask the teacher."""
        image, targets = super().__call__(batchdata, device, non_blocking, **kwargs)
        with torch.no_grad():
            seen = checks.plain(image)
            targets["teacher"] = self.teacher(seen + self.noise * torch.randn_like(seen)).float().softmax(1)
        return image, targets
