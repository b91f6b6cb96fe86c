"""A network that tells statistics of each class from the image alone, and how sure it is of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medconstraints import checks
from medconstraints.checks import plain
from medconstraints.statistics import is_relation
from medconstraints.statistics.arguments import arguments_of

__all__ = ["StatisticBlock", "StatisticRegressor", "statistic_blocks"]

Statistics = Mapping[str, Callable[..., Tensor]]
_LARGEST = 6.0  # logarithm of a variance


class StatisticBlock(NamedTuple):
    """Where one statistic stands among all values of an image.

    Attributes:
        name: of the statistic; its bounds are at `key`.
        rows: classes of the bounds (R, M, 2) that are regressed: all but the background, or all pairs of a relation.
        components: M.
        start: number of its first value; they follow row by row.
    """

    name: str
    rows: range
    components: int
    start: int

    @property
    def key(self) -> str:
        """Of its bounds in an item or a batch."""
        return f"{self.name}_bounds"

    @property
    def values(self) -> slice:
        """Its values among all."""
        return slice(self.start, self.start + len(self.rows) * self.components)


def statistic_blocks(statistics: Statistics, *, num_classes: int, spatial_dims: int) -> list[StatisticBlock]:
    """How the values of some statistics follow each other.

    Args:
        statistics: name -> function `probs (B, C, *S) -> (B, C, M)`, or a relation, that needs nothing else.
        num_classes: C.
        spatial_dims: 2 or 3.

    Raises:
        ValueError: there is none, or one needs further arguments.

    Example:
        >>> from medconstraints.statistics import soft_centroid, soft_size
        >>> blocks = statistic_blocks({"size": soft_size, "place": soft_centroid}, num_classes=3, spatial_dims=2)
        >>> [(block.key, block.values) for block in blocks]
        [('size_bounds', slice(0, 2, None)), ('place_bounds', slice(2, 6, None))]
    """
    if not statistics:
        raise ValueError("statistics: expected at least one, such as {'size': soft_size}, got none.")
    probs = torch.full((1, num_classes, *[2] * spatial_dims), 1 / num_classes)
    blocks: list[StatisticBlock] = []
    for name, statistic in statistics.items():
        if needed := arguments_of(statistic)[0]:
            raise ValueError(f"statistics: {name!r} needs {list(needed)} beside the probabilities; choose another.")
        rows, components = statistic(probs).shape[1:]
        start = blocks[-1].values.stop if blocks else 0
        blocks.append(StatisticBlock(name, range(0 if is_relation(statistic) else 1, rows), components, start))
    return blocks


class StatisticRegressor(nn.Module):
    """Values of statistics of an image, and their spread (Kervadec 2020, eq. 5.2: R(X) with the parameters theta~).

    A backbone gives features (B, F), and a linear layer from them the values in standard units: those of the segmented
    images, which `fit` looks at, have the mean 0 and the spread 1. One learning rate then serves images of any size and
    statistics of any unit.

    Args:
        backbone: images (B, C, *S) to features (B, F), such as MONAI's `Regressor` or `SEResNext50`.
        features: F.
        statistics: see `statistic_blocks`, as the next.
        num_classes: classes of the segmentation, with the background.
        image_size: voxels along each axis; others are refused, because a crop has other sizes than the image.

    Raises:
        ValueError: see `statistic_blocks`; an image has another size.

    Example:
        >>> from medconstraints.statistics import soft_size
        >>> backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
        >>> regressor = StatisticRegressor(
        ...     backbone, features=4, statistics={"size": soft_size}, num_classes=2, image_size=(4, 4))
        >>> regressor(torch.zeros(3, 1, 4, 4)).shape
        torch.Size([3, 1, 2])
    """

    center: Tensor
    scale: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        features: int,
        statistics: Statistics,
        num_classes: int,
        image_size: Sequence[int],
    ) -> None:
        super().__init__()
        self.image_size = tuple(int(size) for size in image_size)
        self.statistics = dict(statistics)
        self.num_classes = num_classes
        self.blocks = statistic_blocks(statistics, num_classes=num_classes, spatial_dims=len(self.image_size))
        count = self.blocks[-1].values.stop
        self.backbone = backbone
        self.head = nn.Linear(checks.whole_number("features", features, 1), 2 * count)
        self.register_buffer("center", torch.zeros(count))
        self.register_buffer("scale", torch.ones(count))

    def forward(self, image: Tensor) -> Tensor:
        """Values and logarithm of their variance, in standard units.

        Args:
            image: (B, C, *S).

        Returns:
            (B, K, 2), as `blocks` say.

        Raises:
            ValueError: *S is not `image_size`.
        """
        if tuple(image.shape[2:]) != self.image_size:
            raise ValueError(
                f"image: expected images of {self.image_size} voxels, got {tuple(image.shape[2:])}; pad or crop them "
                "to one size (patch_size), as those that the regressor was trained with."
            )
        value, log_variance = self.head(plain(self.backbone(image)).flatten(1)).view(len(image), -1, 2).unbind(-1)
        # An image that weighs 400 times as much as another, or nothing, would decide alone.
        return torch.stack([value, _LARGEST * torch.tanh(log_variance / _LARGEST)], -1)

    @torch.no_grad()
    def predict(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Values (B, K) in the units of the statistics, and their standard deviations."""
        standard = self(image).float()
        return standard[..., 0] * self.scale + self.center, standard[..., 1].mul(0.5).exp() * self.scale

    def targets(self, batch: Mapping[str, Any]) -> Tensor:
        """Values (B, K) of a batch in the units of the statistics, NaN where a class has none.

        Args:
            batch: bounds of each statistic at its `key`, (B, R, M, 2), with no room between: of `LabelToBoundsd` with a
                margin of 0.
        """
        found = []
        for block in self.blocks:
            bounds = plain(torch.as_tensor(batch[block.key]))[:, block.rows.start :]
            middle = bounds.float().mean(-1)
            found.append(torch.where(torch.isfinite(bounds).all(-1), middle, torch.nan).flatten(1))
        return torch.cat(found, 1)

    def standard(self, batch: Mapping[str, Any]) -> Tensor:
        """`targets` in standard units."""
        return (self.targets(batch).to(self.center.device) - self.center) / self.scale

    def fit(self, items: Iterable[Mapping[str, Any]]) -> None:
        """Set the standard units from segmented items.

        Args:
            items: with bounds as in `targets`, without the axis of the batch.

        Raises:
            ValueError: a class is in none of them.
        """
        values = torch.cat([self.targets({key: item[key][None] for key in self.keys}) for item in items]).double()
        known = ~values.isnan()
        if missing := sorted(
            {name for name, there in zip(self.names, known.any(0).tolist(), strict=True) if not there}
        ):
            raise ValueError(
                f"statistics: no segmented image has a value for {missing}; segment more, or leave it out."
            )
        count = known.sum(0)
        center = values.nansum(0) / count
        variance = (values - center).square().nansum(0) / count
        self.center.copy_(center)
        self.scale.copy_(torch.where(variance > 0, variance.sqrt(), 1.0))

    @functools.cached_property
    def keys(self) -> list[str]:
        """Of the bounds that make targets."""
        return [block.key for block in self.blocks]

    @functools.cached_property
    def names(self) -> list[str]:
        """Of the K values: statistic, class (or pair), and component if there are several."""
        return [
            f"{block.name} {row}" + (f" {component}" if block.components > 1 else "")
            for block in self.blocks
            for row in block.rows
            for component in range(block.components)
        ]
