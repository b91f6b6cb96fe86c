"""The training of a regressor of statistics: a stage with its own trainer, evaluator and folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.metrics import EpochMetric
from monai.transforms import Compose, SelectItemsd
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import ConcatDataset

from medconstraints import checks
from medconstraints.checks import plain
from medconstraints.data.cohort import ItemDataset, TransformSteps, in_order
from medconstraints.engines.prepare_batch import PrepareBatchTargets
from medconstraints.engines.training import TargetTrainer
from medconstraints.engines.validation import ValidationEvaluator
from medconstraints.handlers.lists import training_handlers, validation_handlers
from medconstraints.losses.regression import RegressionLoss
from medconstraints.networks.statistic_regressor import StatisticRegressor
from medconstraints.schedules import cosine_decay
from medconstraints.transforms.semi_supervised import statistic_transforms

__all__ = ["PrepareBatchStatistics", "RegressionEvaluator", "RegressionStage"]

PARTS = ("labelled", "held_back", "unlabelled")


class RegressionStage:
    """Trains a regressor on the segmented patients (Kervadec 2020, eq. 5.2); nothing is read before it runs.

    Writes `model.pt`, the weights with the largest R^2 on held-back patients, `last.pt`, from which a killed run goes
    on, and logs into its folder.

    Args:
        regressor: on the device.
        items: "labelled", "held_back" and "unlabelled" items, see `semi_supervised_items`.
        preprocessing: steps from an item to image and label of one size.
        augmentation: random steps behind them; the statistics are those of what comes out.
        output_dir: folder of the stage.
        epochs: of the training.
        batch_size: of the training.
        repeats: how often an epoch goes through the images.
        optimizer: parameters -> optimizer.
        spread: see `RegressionLoss`.
        val_interval: epochs between validations.
        seed: of the run.
        num_workers: of the loader.
        make_dataset: `(items, steps, further steps) -> data set`; `SliceDataset` for slices.
        settings: what must not change when the run is resumed.

    Raises:
        ValueError: a part of the items is missing.
    """

    def __init__(
        self,
        *,
        regressor: StatisticRegressor,
        items: Mapping[str, Sequence[dict[str, Any]]],
        preprocessing: TransformSteps,
        output_dir: str | Path,
        augmentation: TransformSteps = (),
        epochs: int = 200,
        batch_size: int = 10,
        repeats: int = 10,
        optimizer: Callable[..., Optimizer] = torch.optim.AdamW,
        spread: bool = True,
        val_interval: int = 5,
        seed: int = 0,
        num_workers: int = 0,
        make_dataset: Callable[..., Any] = ItemDataset,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if missing := [part for part in PARTS if part not in items]:
            raise ValueError(f"items: expected {list(PARTS)}, got none under {missing}.")
        self.regressor = regressor
        self.items = dict(items)
        self.steps = in_order(preprocessing)
        self.augmentation = in_order(augmentation)
        self.output_dir = Path(output_dir)
        self.epochs = checks.whole_number("epochs", epochs, 1)
        self.batch_size = checks.whole_number("batch_size", batch_size, 1)
        self.repeats = checks.whole_number("repeats", repeats, 1)
        self.optimizer = optimizer
        self.loss = RegressionLoss(spread=spread)
        self.val_interval = val_interval
        self.seed = seed
        self.num_workers = num_workers
        self.make_dataset = make_dataset
        self.settings = settings

    @property
    def checkpoint(self) -> Path:
        """The weights that the stage writes."""
        return self.output_dir / "model.pt"

    def dataset(self, part: str, *, augmented: bool = False) -> Any:
        """Images of a part, with their statistics where they have a label."""
        keys, steps = ["image", "case", "slice"], []
        if part != "unlabelled":
            steps = statistic_transforms(self.regressor.statistics, num_classes=self.regressor.num_classes)
            keys += self.regressor.keys
        steps.append(SelectItemsd(keys, allow_missing_keys=True))
        items = self.items[checks.choice("part", part, PARTS)]
        return self.make_dataset(items, self.steps, [*(self.augmentation if augmented else []), *steps])

    def run(self) -> None:
        """Train, or go on with a training that was killed.

        Raises:
            RuntimeError: several processes, of which each would train its own on a part of the images.
        """
        if idist.get_world_size() > 1:
            raise RuntimeError(
                "RegressionStage: expected one process; run regressor.json without torchrun first, and then "
                "segmentation.json with its regressor_dir as several."
            )
        self.regressor.fit(self.dataset("labelled"))
        evaluator = RegressionEvaluator(
            device=self.regressor.center.device,
            network=self.regressor,
            dataset=self.dataset("held_back") if len(self.items["held_back"]) else [],
            val_handlers=validation_handlers(output_dir=str(self.output_dir)),
        )
        optimizer = self.optimizer(self.regressor.parameters())
        schedule = LambdaLR(optimizer, lambda epoch: cosine_decay(epoch, self.epochs))
        TargetTrainer(
            device=self.regressor.center.device,
            max_epochs=self.epochs,
            network=self.regressor,
            optimizer=optimizer,
            loss_function=self.loss,
            dataset=ConcatDataset([self.dataset("labelled", augmented=True)] * self.repeats),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            prepare_batch=PrepareBatchStatistics(self.regressor),
            train_handlers=training_handlers(
                evaluator=evaluator,
                output_dir=str(self.output_dir),
                seed=self.seed,
                lr_scheduler=schedule,
                val_interval=self.val_interval,
                settings=self.settings,
            ),
        ).run()


class PrepareBatchStatistics(PrepareBatchTargets):
    """`prepare_batch` of a regression: image, and the statistics in standard units (B, K).

    Args:
        regressor: see `StatisticRegressor.standard`.
    """

    def __init__(self, regressor: StatisticRegressor) -> None:
        super().__init__(target_keys=regressor.keys, host_keys=regressor.keys)
        self.regressor = regressor

    def __call__(  # type: ignore[override]
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Move the image and the statistics to the device."""
        image, bounds = super().__call__(batchdata, device, non_blocking, **kwargs)
        return image, self.regressor.standard(bounds).to(device)


class RegressionEvaluator(ValidationEvaluator):
    """Share of the variance that regressed statistics explain, R^2, mean over the statistics; the key metric.

    Args:
        device: where the regressor is.
        network: the regressor.
        dataset: segmented items with the bounds that `StatisticRegressor.targets` reads.
        batch_size: of the loader, as `num_workers`.
        num_workers: see there.
        val_handlers: attached when all else is set.

    Attributes:
        state.metrics: `val_r2` after a run; 1 is perfect, 0 as good as their mean.
    """

    def __init__(
        self,
        *,
        device: str | torch.device,
        network: StatisticRegressor,
        dataset: Any,
        batch_size: int = 16,
        num_workers: int = 0,
        val_handlers: Sequence[Any] | None = None,
    ) -> None:
        super().__init__(
            device=device,
            network=network,
            dataset=dataset,
            batch_size=batch_size,
            num_workers=num_workers,
            postprocessing=Compose([]),
            prepare_batch=PrepareBatchStatistics(network),
            key_val_metric={"val_r2": EpochMetric(explained, output_transform=_pair, check_compute_fn=False)},
            val_handlers=val_handlers,
        )


def explained(predicted: Tensor, target: Tensor) -> float:
    """Mean R^2 of the statistics that vary: 1 - squared error / squared deviation from the mean.

    Where none does, as with one image, minus the mean squared error: that still tells better weights from worse.

    Args:
        predicted: (N, K).
        target: (N, K), NaN where a value is not known.

    Example:
        >>> explained(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]]))
        0.5
    """
    known = ~target.isnan()
    error = (predicted - target).square().where(known, 0.0).sum(0)
    deviation = (target - target.nanmean(0)).square().where(known, 0.0).sum(0)
    varied = deviation > 0
    if not bool(varied.any()):
        return -float(error.sum() / known.sum().clamp(min=1))
    return float((1 - error[varied] / deviation[varied]).mean())


def _pair(output: Sequence[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Values and targets (B, K) of decollated items."""
    return torch.stack([plain(item["pred"])[..., 0] for item in output]), torch.stack(
        [plain(item["label"]) for item in output]
    )
