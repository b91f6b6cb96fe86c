"""Two parts of one data set, drawn anew in each epoch: most items train, the others guide what augmentation learns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import numpy as np
from torch.utils.data import DistributedSampler

from medconstraints import checks

__all__ = ["EpochSampler", "GuideSplit"]

_TRIES = 100  # draws until the guide part has more than one class


class GuideSplit:
    """Items of a data set that train in an epoch, and those that guide; all items of a patient are in one part.

    Both are a function of seed and epoch alone, so that a resumed run goes on with the parts of the uninterrupted one.
    Mounsaveng et al. 2021, section 4.2: 20 % of the training set, drawn anew in each epoch.

    Args:
        items: entries of the data set. Those with the same value of `group_key` stay together; one without is its own
            group. Whole numbers under `label_key` are classes: the guide part then has at least two of them.
        fraction: share of the groups that guides, in (0, 1).
        seed: of the draws.
        redraw: draw again in each epoch; False keeps the parts of epoch 0.
        group_key: key of the patient's name.
        label_key: key of the class.

    Raises:
        ValueError: `fraction` out of range or too small for one group in each part, or a guide part of one class.

    Example:
        >>> split = GuideSplit([{"image": name} for name in "abcde"], fraction=0.4)
        >>> training, guide = split.parts(epoch=1)
        >>> len(training), len(guide), sorted(training + guide)
        (3, 2, [0, 1, 2, 3, 4])
    """

    def __init__(
        self,
        items: Sequence[Mapping[str, Any]],
        *,
        fraction: float = 0.2,
        seed: int = 0,
        redraw: bool = True,
        group_key: str = "patient",
        label_key: str = "label",
    ) -> None:
        if not 0 < fraction < 1:
            raise ValueError(f"fraction: expected a number between 0 and 1, got {fraction!r}; the paper takes 0.2.")
        names = [str(item.get(group_key, f"item {number}")) for number, item in enumerate(items)]
        groups: dict[str, list[int]] = {}
        for number, name in enumerate(names):
            groups.setdefault(name, []).append(number)
        self.groups = list(groups.values())
        self.size = round(fraction * len(self.groups))
        if not 1 <= self.size < len(self.groups):
            raise ValueError(
                f"fraction: expected at least one patient in each part, got {self.size} of {len(self.groups)} patients "
                f"to guide with fraction {fraction}; change it, or give more patients."
            )
        labels = [item.get(label_key) for item in items]
        self.labels = np.array(labels) if all(isinstance(label, int | np.integer) for label in labels) else None
        self.seed, self.redraw = int(seed), checks.flag("redraw", redraw)
        self.parts(0)

    def parts(self, epoch: int) -> tuple[list[int], list[int]]:
        """Numbers of the items that train and of those that guide in an epoch, each in increasing order."""
        random = np.random.default_rng([self.seed, epoch if self.redraw else 0])
        for _ in range(_TRIES):
            order = random.permutation(len(self.groups))
            guide = sorted(item for group in order[: self.size] for item in self.groups[group])
            if self.labels is None or len(np.unique(self.labels[guide])) > 1:
                return sorted(item for group in order[self.size :] for item in self.groups[group]), guide
        raise ValueError(
            f"fraction: expected a guide part with at least two classes, got one in each of {_TRIES} draws of "
            f"{self.size} patients; raise it, or give patients of each class."
        )


class EpochSampler(DistributedSampler[Any]):
    """Shuffled numbers of the items of an epoch; each process of distributed training takes its own.

    Every epoch has as many as epoch 0: where it has others, the last ones are left out, or some come twice.

    Args:
        part: function of the epoch that gives the items, such as one part of `GuideSplit.parts`.
        seed: of the order.
    """

    def __init__(self, part: Callable[[int], Sequence[int]], *, seed: int = 0) -> None:
        self.part, self.order_seed = part, int(seed)
        count, processes = len(part(0)), idist.get_world_size()
        numbers: Any = range(count)
        super().__init__(numbers, processes, idist.get_rank(), drop_last=count >= processes)

    def __iter__(self) -> Iterator[int]:
        part = self.part(self.epoch)
        random = np.random.default_rng([self.order_seed, self.epoch, 1])
        total = self.num_samples * self.num_replicas
        shuffled = np.tile(random.permutation(part), math.ceil(total / len(part)))[:total]
        return iter(shuffled[self.rank :: self.num_replicas].tolist())
