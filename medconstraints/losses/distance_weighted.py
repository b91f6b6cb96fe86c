"""Cross-entropy that counts most next to the boundary of the label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from medconstraints.checks import choice, number, plain
from medconstraints.losses.base import TargetLoss
from medconstraints.losses.class_label import checked_label, class_sizes
from medconstraints.losses.distance_target import DistanceMapCheck

__all__ = ["DistanceWeightedCrossEntropyLoss"]


class DistanceWeightedCrossEntropyLoss(TargetLoss):
    """Cross-entropy with more weight near the boundary (Ronneberger 2015; Kervadec 2020, section 4.3.2).

    Mean over the voxels p of -sum_c u_c(p) log s_c(p), with u_c(p) = g_c(p) [w_c + w0 exp(-D(p)^2 / (2 sigma^2))] and
    D(p) = |phi_c(p)|, the distance in mm from p to the boundary of its own class. The mean is not divided by the
    weights. Where the maps of all classes are 0 there is no boundary: one class fills the image or the slice, or the
    voxel is padding. The second part of the weight is then 0. The maps may be of any convention: a distance of 0 beside
    another class, as "published" has it at the rims inside, is on the boundary.

    Args:
        boundary_weight: w0, weight of a voxel on the boundary.
        sigma_mm: sigma, how far the boundary reaches, in mm.
        class_weight: w_c. "frequency": the share of the class in its image (the thesis's choice, which favours large
            classes); "balanced": the inverse share, scaled to a mean of 1 over the voxels of each image, in which
            every class that is present then has the same part; one number for each class; or None for 1.
        reduction: "mean" over all voxels of the batch, "sum", or "none" for (B, 1, *S).

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> target = {"label": torch.zeros(1, 1, 2, 2), "distance_map": torch.zeros(1, 2, 2, 2)}   # no boundary
        >>> round(DistanceWeightedCrossEntropyLoss()(torch.zeros(1, 2, 2, 2), target).item(), 4)
        0.6931
    """

    target_keys = ("label", "distance_map")
    reads_meta = True  # which tell a map from a label
    class_values: Tensor | None

    def __init__(
        self,
        *,
        boundary_weight: float = 10.0,
        sigma_mm: float = 5.0,
        class_weight: str | Sequence[float] | Tensor | None = "frequency",
        reduction: str = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        values = None
        if isinstance(class_weight, str):
            choice("class_weight", class_weight, ("frequency", "balanced"))
        elif class_weight is not None:
            values = torch.as_tensor(class_weight, dtype=torch.float32)
            if values.dim() != 1 or not bool((torch.isfinite(values) & (values >= 0)).all()):
                raise ValueError(f"class_weight: expected one finite number >= 0 for each class, got {class_weight!r}.")
        self.boundary_weight = number("boundary_weight", boundary_weight, least=0.0)
        self.sigma_mm = number("sigma_mm", sigma_mm, above=0.0)
        self.mode = class_weight if isinstance(class_weight, str) else None
        self.register_buffer("class_values", values)
        self._checked_map = DistanceMapCheck()

    def forward(self, input: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        """Loss of a batch.

        Args:
            input: logits (B, C, *S), background first.
            target: mapping with "label", class numbers (B, 1, *S), and "distance_map", the signed distances of all
                classes (B, C, *S) in mm, of any floating point type.

        Raises:
            ValueError: a part is missing, shapes do not fit, a map of integers, or a label that is no class (looked at
                on the CPU only).
        """
        input = plain(input)
        if not input.is_floating_point() or input.dim() < 3 or input.shape[1] < 2:
            raise ValueError(
                f"input: expected floating point logits (B, C, *S) of two or more classes, got {input.dtype} of shape "
                f"{tuple(input.shape)}."
            )
        label, distance_map = self._parts(target, input)
        with torch.autocast(input.device.type, enabled=False):
            if input.dtype in (torch.float16, torch.bfloat16):
                input = input.float()
            label = label.to(torch.int64)
            # Quicker than F.cross_entropy without reduction, and deterministic on an accelerator too.
            cost = -torch.log_softmax(input, 1).gather(1, label) * self._weight(label, distance_map, input)
            return self.reduced(cost)

    def _weight(self, label: Tensor, distance_map: Tensor, input: Tensor) -> Tensor:
        """Factor u of each voxel's own class, (B, 1, *S)."""
        distance = distance_map.gather(1, label).to(input.dtype)
        # 0 in all maps is no distance but the mark of no boundary: in padding, slices or images that have none.
        bounded = (distance_map != 0).any(1, keepdim=True)
        near = self.boundary_weight * torch.exp(distance.square() * (-0.5 / self.sigma_mm**2)) * bounded
        classes = self._class_weights(label, input)
        return near + (1.0 if classes is None else _of_own_class(classes, label))

    def _class_weights(self, label: Tensor, input: Tensor) -> Tensor | None:
        """w, (B, C), or None for 1."""
        if self.mode is None:
            values = self.class_values
            if values is not None and len(values) != input.shape[1]:
                raise ValueError(
                    f"class_weight: expected {input.shape[1]} values, one for each channel of the input, got "
                    f"{len(values)}."
                )
            return None if values is None else values.to(input).expand(len(input), -1)
        size = class_sizes(label, input.shape[1], input.dtype)
        voxels = label[0].numel()
        if self.mode == "frequency":
            return size / voxels
        # No voxel has the weight of an absent class: any number will do.
        return voxels / ((size > 0).sum(1, keepdim=True) * size.clamp(min=1))

    def _parts(self, target: Mapping[str, Tensor], input: Tensor) -> tuple[Tensor, Tensor]:
        """Label and map, checked, on the device of the input."""
        if not isinstance(target, Mapping) or not all(isinstance(target.get(key), Tensor) for key in self.target_keys):
            got = sorted(map(str, target)) if isinstance(target, Mapping) else f"a {type(target).__name__}"
            raise ValueError(
                f'target: expected a mapping with the tensors "label" and "distance_map", got {got}; make the map with '
                "the transform SignedDistanceMapd, and give both."
            )
        distance_map = self._checked_map(target["distance_map"], input.shape)
        return checked_label(target["label"], input), distance_map.to(input.device, non_blocking=True)

    def extra_repr(self) -> str:
        """Settings shown by `repr`."""
        values = None if self.class_values is None else self.class_values.tolist()
        return (
            f"boundary_weight={self.boundary_weight:g}, sigma_mm={self.sigma_mm:g}, "
            f"class_weight={self.mode or values!r}, reduction={self.reduction!r}"
        )


def _of_own_class(values: Tensor, label: Tensor) -> Tensor:
    """Of values (B, C), the one of each voxel's class: (B, 1, *S)."""
    return values.gather(1, label.flatten(1)).view(label.shape)
