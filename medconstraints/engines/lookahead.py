"""Lookahead adversarial learning: fine-tuning against a discriminator that goes back to where it was best."""

from __future__ import annotations

import copy
import itertools
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.engines import Evaluator, IterationEvents
from monai.transforms import ResizeWithPadOrCrop
from monai.utils.enums import CommonKeys
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import Optimizer

from medconstraints import checks
from medconstraints.data.guide_split import EpochSampler
from medconstraints.data.missing import MissingData
from medconstraints.engines.guided import one_hot
from medconstraints.engines.training import TargetTrainer
from medconstraints.lookahead import Lookahead, LookaheadModels, by_patient, paired_bootstrap, patients_of

__all__ = ["LookaheadTrainer", "patient_scores"]

logger = logging.getLogger(__name__)

METRIC = "val_mean_iou"
WINDOW = 20  # batches over which the discriminator's accuracy is averaged
LEAST_PATIENTS = 5  # of a part whose scores are drawn again
CHECK_EVERY = 40  # batches of the discriminator
HOLDOUT_CASES = 16  # that it is checked on


class LookaheadTrainer(TargetTrainer):
    """Fine-tunes a trained network against a discriminator in the cycles of LoAd (Jamali-Rad et al. 2020, alg. 1).

    An epoch of this engine is `eval_every` updates and one evaluation on the hold-out part. Within a cycle the
    discriminator is frozen; when the cycle is over, the network goes back to the start, its optimizer too, and the
    discriminator learns from real label maps and those of the models in the buffer.

    What the paper does not have: a peak becomes the new start only if on a `confirm` part the lower end of a paired
    bootstrap's 95 % interval over its patients is above 0, because the best of many evaluations on the hold-out is
    better there by chance. And a control: with a second search, "noise", the same controller runs again from the first
    weights with as many evaluations, and each update is random, of the mean length that the adversarial ones had.

    Args:
        network: trained already; its weights are where the search begins.
        optimizer: of the network.
        discriminator: `(image, maps) -> scores`, such as `ClassSplitDiscriminator`.
        discriminator_optimizer: of the discriminator.
        models: searches, "adversary" and for the control "noise" behind it, with what they keep.
        evaluator: of the hold-out part, with the metric "val_mean_iou" of each case and class.
        confirm_evaluator: of the confirm part, likewise.
        num_classes: of the label maps.
        dataset: training items with image and label (1, *S).
        batch_size: of updates and of the discriminator.
        max_epochs: total budget of evaluations, both searches together.
        eval_every: updates between evaluations.
        adversarial_weight: of the discriminator's judgement in the loss of an update.
        loss_function: a further loss of an update, such as cross-entropy (the hybrid of the paper's eq. 2), or
            constraints beside or in place of the adversary.
        loss_weight: of that one; 0 leaves it out, as the paper does.
        maps: what the discriminator sees of a prediction: "straight_through", one-hot samples whose gradient is that of
            the soft ones, or "soft", which it easily tells from real maps by their softness (the paper).
        temperature: of the Gumbel softmax; the paper has 20.
        saturating: minimise log(1 - D) as printed, not -log D.
        alternating: no cycles: network and discriminator step in turn until the budget is used up, and the last model
            is the result. What LoAd is compared with.
        discriminator_steps: most batches of a training of the discriminator.
        discriminator_accuracy: at which it ends, over 20 batches.
        discriminator_patience: checks on the hold-out part, one after each 40 batches, without a better accuracy after
            which it ends; the best weights come back.
        mirror: mirror the discriminator's images with their maps along axes drawn anew for each batch, without which it
            learns the training maps by heart.
        seed: of the order of the images.
        options: the other arguments of `TargetTrainer`.

    Raises:
        ValueError: an evaluator with fewer than five patients, or without one of the classes; a patient in two parts;
            searches of other names.
    """

    def __init__(
        self,
        *,
        network: nn.Module,
        optimizer: Optimizer,
        discriminator: nn.Module,
        discriminator_optimizer: Optimizer,
        models: LookaheadModels,
        evaluator: Evaluator,
        confirm_evaluator: Evaluator,
        num_classes: int,
        dataset: Any,
        batch_size: int = 4,
        eval_every: int = 1,
        adversarial_weight: float = 1.0,
        loss_function: Callable[..., Any] | None = None,
        loss_weight: float = 0.0,
        maps: str = "straight_through",
        temperature: float = 1.0,
        saturating: bool = False,
        alternating: bool = False,
        discriminator_steps: int = 200,
        discriminator_accuracy: float = 0.9,
        discriminator_patience: int = 3,
        mirror: bool = True,
        seed: int = 0,
        train_handlers: Sequence[Any] | None = None,
        **options: Any,
    ) -> None:
        if [*models.searches] not in (["adversary"], ["adversary", "noise"]):
            raise ValueError(
                f"models: expected the searches adversary, or adversary and noise, got {[*models.searches]}."
            )
        if idist.get_world_size() > 1:
            raise ValueError(
                "LookaheadTrainer: expected one process, its cycles are not divided; start it without torchrun."
            )
        if alternating and len(models.searches) > 1:
            raise ValueError("alternating: has no cycles and no control; give models the search adversary alone.")
        checks.number("adversarial_weight", adversarial_weight, least=0)
        checks.number("loss_weight", loss_weight, least=0)
        if not adversarial_weight and not (loss_weight and loss_function):
            raise ValueError(
                "adversarial_weight, loss_weight: expected one above 0, and a loss_function for the latter."
            )
        self.models, self.num_classes = models, checks.whole_number("num_classes", num_classes, 2)
        self.evaluator, self.confirm_evaluator = evaluator, confirm_evaluator
        device = torch.device(options["device"])
        self.discriminator = discriminator.to(device).requires_grad_(False)
        self.discriminator_optimizer = discriminator_optimizer
        self.adversarial_weight, self.loss_weight = adversarial_weight, loss_weight
        self.maps = checks.choice("maps", maps, ("straight_through", "soft"))
        self.temperature = checks.number("temperature", temperature, above=0)
        self.saturating, self.alternating = (
            checks.flag("saturating", saturating),
            checks.flag("alternating", alternating),
        )
        self.discriminator_steps = checks.whole_number("discriminator_steps", discriminator_steps, 1)
        self.discriminator_accuracy = checks.number("discriminator_accuracy", discriminator_accuracy, above=0.5)
        self.discriminator_patience = checks.whole_number("discriminator_patience", discriminator_patience, 1)
        self.mirror = checks.flag("mirror", mirror)
        self.dataset, self.batch_size, self.seed = dataset, checks.whole_number("batch_size", batch_size, 1), seed
        missing = isinstance(getattr(dataset, "data", dataset), MissingData)
        loader = DataLoader(dataset, batch_size=batch_size) if missing else self._loader(eval_every)
        if not missing:
            _check_disjoint(training=dataset, holdout=_dataset(evaluator), confirm=_dataset(confirm_evaluator))
        super().__init__(
            network=network,
            optimizer=optimizer,
            loss_function=loss_function or nn.CrossEntropyLoss(),
            train_data_loader=loader,
            amp=False,
            **options,
        )
        self.add_event_handler(Events.EPOCH_STARTED, self._begin)
        self.add_event_handler(Events.EPOCH_COMPLETED, self._look)
        self._register_handlers(train_handlers or ())

    def _loader(self, eval_every: int) -> DataLoader:
        """As many images as one evaluation's updates take, drawn anew for each of them."""
        count = checks.whole_number("eval_every", eval_every, 1) * self.batch_size

        def part(epoch: int) -> Sequence[int]:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
            return np.resize(order, count).tolist()

        return DataLoader(self.dataset, batch_size=self.batch_size, sampler=EpochSampler(part, seed=self.seed))

    # An update

    def _iteration(self, engine: Engine, batchdata: Any) -> dict[str, Any]:
        state: Any = engine.state
        image, target, *_ = self.prepare_batch(batchdata, state.device, self.non_blocking, **self.to_kwargs)
        image = checks.plain(image)
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        if self.models.running == "noise":
            loss, output = image.new_zeros(()), image.new_zeros(len(image), self.num_classes, *image.shape[2:])
            self._add_noise()
        else:
            output = self.network(image)
            loss = self._loss(image, output, target)
            loss.backward()
            before = [value.detach().clone() for value in self.network.parameters()]
            self.optimizer.step()
            moves = [new.detach() - old for new, old in zip(self.network.parameters(), before, strict=True)]
            self.models.norms = _running_mean(self.models.norms, [float(move.norm()) for move in moves])
            if self.alternating and self.adversarial_weight:
                self._judge_batch(image, batchdata["label"], output.detach().argmax(1, keepdim=True))
        engine.state.output = state.output = {
            CommonKeys.IMAGE: image,
            CommonKeys.LABEL: target,
            CommonKeys.PRED: output.detach(),
            CommonKeys.LOSS: loss.detach(),
        }
        for event in (
            IterationEvents.FORWARD_COMPLETED,
            IterationEvents.LOSS_COMPLETED,
            IterationEvents.BACKWARD_COMPLETED,
            IterationEvents.MODEL_COMPLETED,
        ):
            engine.fire_event(event)
        return state.output

    def _loss(self, image: Tensor, output: Tensor, target: Any) -> Tensor:
        loss = output.new_zeros(())
        if self.adversarial_weight:
            maps = F.gumbel_softmax(output, tau=self.temperature, hard=self.maps == "straight_through", dim=1)
            self.discriminator.eval()
            scores = self.discriminator(image, maps)
            adversarial = -F.softplus(scores).mean() if self.saturating else F.softplus(-scores).mean()
            loss = loss + self.adversarial_weight * adversarial
        if self.loss_weight:
            loss = loss + self.loss_weight * self.loss_function(output, target)
        return loss

    @torch.no_grad()
    def _add_noise(self) -> None:
        for value, norm in zip(self.network.parameters(), self.models.norms, strict=True):
            noise = torch.randn_like(value)
            value.add_(noise, alpha=norm / max(float(noise.norm()), 1e-12))

    # The discriminator

    def _judge_batch(self, image: Tensor, label: Any, guess: Tensor) -> float:
        """One step of the discriminator on real maps and given ones; its accuracy, the mean of both kinds."""
        self.discriminator.train().requires_grad_(True)
        maps = [one_hot(one, self.num_classes) for one in (checks.plain(label).to(image.device), guess)]
        if self.mirror:
            axes = [axis for axis in range(2, image.dim()) if bool(torch.rand(()) < 0.5)]
            image, *maps = (one.flip(axes) for one in (image, *maps))
        real, fake = (self.discriminator(image, one) for one in maps)
        loss = (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if not bool(torch.isfinite(loss)):
            raise RuntimeError(
                f"discriminator: its loss is {float(loss)}; lower its learning rate, or look for extreme intensities."
            )
        self.discriminator_optimizer.step()
        self.discriminator.requires_grad_(False)
        return float(((real > 0).float().mean() + (fake <= 0).float().mean()) / 2)

    def _train_discriminator(self) -> None:
        search = self.models.searches["adversary"]
        weights = [self.models.weights["adversary"][name]["network"] for name in search.buffer]
        self.network.eval()
        accuracies: deque[float] = deque(maxlen=WINDOW)
        steps, worse, best, kept = 0, 0, -1.0, self.discriminator.state_dict()
        while worse < self.discriminator_patience and steps < self.discriminator_steps:
            for batch in DataLoader(self.dataset, batch_size=self.batch_size, shuffle=True):
                image = checks.plain(batch["image"]).to(self.state.device)
                chosen = weights[int(torch.randint(len(weights), ()))]
                accuracies.append(self._judge_batch(image, batch["label"], self._guess(chosen, image)))
                steps += 1
                self.models.accuracy = float(np.mean(accuracies))
                if steps == WINDOW and self.models.accuracy == 1:
                    logger.warning("discriminator: tells all label maps apart at once; it has little to teach")
                enough = steps >= WINDOW and self.models.accuracy >= self.discriminator_accuracy
                last = enough or steps == self.discriminator_steps
                if last or steps % CHECK_EVERY == 0:
                    accuracy = self._holdout_accuracy(weights)
                    worse = 0 if accuracy > best else worse + 1
                    if accuracy > best:
                        best, kept = accuracy, copy.deepcopy(self.discriminator.state_dict())
                if last or worse >= self.discriminator_patience:
                    worse = self.discriminator_patience
                    break
        self.discriminator.load_state_dict(kept)
        self.models.holdout_accuracy = best
        logger.info("discriminator: %d batches, accuracy %.2f, %.2f on the hold-out", steps, self.models.accuracy, best)

    def _guess(self, weights: Mapping[str, Tensor], image: Tensor) -> Tensor:
        with torch.no_grad():
            guess: Tensor = functional_call(self.network, dict(weights), (image,)).argmax(1, keepdim=True)
        return guess

    @torch.no_grad()
    def _holdout_accuracy(self, weights: Sequence[Mapping[str, Tensor]]) -> float:
        """Of the discriminator on real maps of the hold-out part and on the models' maps of the same images."""
        self.discriminator.eval()
        shape, right = self.dataset[0]["image"].shape[1:], []
        for batch in itertools.islice(self.evaluator.data_loader, HOLDOUT_CASES):
            image, label = (_middle(batch[key], shape).to(self.state.device) for key in ("image", "label"))
            guesses = [self._guess(chosen, image) for chosen in weights]
            real, *fakes = (self.discriminator(image, one_hot(one, self.num_classes)) for one in (label, *guesses))
            told = float(np.mean([float((fake <= 0).float().mean()) for fake in fakes]))
            right.append((float((real > 0).float().mean()) + told) / 2)
        return float(np.mean(right))

    # The cycles

    def _begin(self, engine: Engine) -> None:
        """Before the first evaluation of a search: the first model's scores, and the first discriminator."""
        name = self.models.running
        if name is None or self.models.weights[name]:
            return
        search = self.models.searches[name]
        scores = {"holdout": patient_scores(self.evaluator, "holdout"), "confirm": self._confirm()}
        search.begin(float(np.mean(scores["holdout"])))
        self.models.weights[name]["g0"] = self._snapshot()
        self.models.scores[name]["g0"] = scores
        self._row(search.score, event="start")
        if name == "adversary" and self.adversarial_weight:
            self._train_discriminator()

    def _look(self, engine: Engine) -> None:
        """After the updates: evaluate, keep a peak, and end a cycle or a search that is over."""
        name = self.models.running
        if name is None:
            engine.terminate()
            return
        search, weights, scores = self.models.searches[name], self.models.weights[name], self.models.scores[name]
        found = patient_scores(self.evaluator, "holdout")
        error, _, _ = paired_bootstrap(np.subtract(found, scores[search.start]["holdout"]))
        score = float(np.mean(found))
        engine.state.metrics["holdout_mean_iou"] = score
        if self.alternating:
            self._row(score)
            weights["last"], scores["last"] = self._snapshot(), {"holdout": found}
            return
        is_peak = search.observe(score, error)
        if is_peak:
            weights["peak"], scores["peak"] = self._snapshot(), {"holdout": found}
        self._row(score, peak=is_peak)
        spent = self._is_spent(engine, name)
        if search.cycle_is_over or spent:
            self._close(engine, search)
        if search.finished or spent:
            self._next_search(engine, name)

    def _is_spent(self, engine: Engine, name: str) -> bool:
        """Whether a search has had its share of the budget; the control gets as many evaluations as the adversary."""
        counts = [sum(row["search"] == other for row in self.models.rows) - 1 for other in self.models.searches]
        if name == "noise":
            return counts[1] >= counts[0] or engine.state.epoch == engine.state.max_epochs
        return counts[0] >= max(1, (engine.state.max_epochs or 1) // len(counts))

    def _close(self, engine: Engine, search: Lookahead) -> None:
        name = str(self.models.running)
        weights, scores = self.models.weights[name], self.models.scores[name]
        end, accepted = self._snapshot(), False
        if search.peak_score is not None:
            self._restore(weights["peak"])
            scores["peak"]["confirm"] = self._confirm()
            gaps = np.subtract(scores["peak"]["confirm"], scores[search.start]["confirm"])
            _, low, high = paired_bootstrap(gaps)
            accepted = low > 0
            logger.info(
                "peak: %+.4f mean IoU on the hold-out, %+.4f [%+.4f, %+.4f] on the confirm part: %s",
                search.peak_score - search.start_score,
                gaps.mean(),
                low,
                high,
                "accepted" if accepted else "not accepted",
            )
        self.models.rows[-1]["event"] = "end" if search.peak_score is None else "accepted" if accepted else "rejected"
        cycle = search.close(accepted=accepted)
        weights[cycle.end] = {"network": end["network"]}
        if cycle.start is not None:
            weights[cycle.start], scores[cycle.start] = weights["peak"], scores["peak"]
        kept = {search.start, "g0", *search.buffer}
        for table in (weights, scores):
            for other in [model for model in table if model not in kept]:
                del table[other]
        self._restore(weights[search.start])
        if name == "adversary" and self.adversarial_weight and not search.finished:
            self._train_discriminator()

    def _next_search(self, engine: Engine, name: str) -> None:
        names = [*self.models.searches]
        following = names[names.index(name) + 1 :]
        first = self.models.searches[names[0]]
        self._restore(self.models.weights[names[0]]["g0" if following else first.start])
        self.models.running = following[0] if following else None
        if not following:
            engine.terminate()

    def _confirm(self) -> list[float]:
        return patient_scores(self.confirm_evaluator, "confirm")

    def _snapshot(self) -> dict[str, Any]:
        return copy.deepcopy({"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()})

    def _restore(self, snapshot: Mapping[str, Any]) -> None:
        self.network.load_state_dict(snapshot["network"])
        self.optimizer.load_state_dict(copy.deepcopy(snapshot["optimizer"]))

    def _row(self, score: float, *, peak: bool = False, event: str = "") -> None:
        search = self.models.searches[str(self.models.running)]
        self.models.rows.append(
            {
                "evaluation": len(self.models.rows),
                "search": str(self.models.running),
                "start": search.start,
                "cycle": search.cycle,
                "mean_iou": score,
                "start_mean_iou": search.start_score,
                "peak": peak,
                "event": event,
                "discriminator_accuracy": self.models.accuracy,
                "discriminator_holdout_accuracy": self.models.holdout_accuracy,
            }
        )


def patient_scores(evaluator: Evaluator, part: str) -> list[float]:
    """Mean IoU of each patient with one of the classes, of the network as it is: the mean over the patient's cases.

    Args:
        evaluator: with the metric "val_mean_iou", whose details are (N, K - 1), NaN where a class is not there.
        part: its name, for messages.

    Raises:
        ValueError: fewer than five patients, or a class that no case has.
    """
    evaluator.run()
    details = torch.as_tensor(evaluator.state.metric_details[METRIC]).double().cpu().numpy()
    absent = [number + 1 for number in range(details.shape[1]) if np.isnan(details[:, number]).all()]
    cases = details[~np.isnan(details).all(1)]
    patients = patients_of(_dataset(evaluator))
    if len(patients) == len(details):
        patients = [name for name, row in zip(patients, details, strict=True) if not np.isnan(row).all()]
    values = by_patient(np.nanmean(cases, 1, keepdims=True), patients)[:, 0]
    if absent or len(values) < LEAST_PATIENTS:
        raise ValueError(
            f"{part}: expected at least {LEAST_PATIENTS} patients, and each class in one of them, got {len(values)}"
            f"{f', none with class {absent}' if absent else ''}; give this section of the datalist more patients."
        )
    found: list[float] = values.tolist()
    return found


def _middle(volumes: Tensor, shape: Sequence[int]) -> Tensor:
    """The middle of volumes (B, C, *S), padded to the shape of the images that train."""
    return torch.stack([checks.plain(one) for one in map(ResizeWithPadOrCrop(shape), volumes)])


def _dataset(evaluator: Evaluator) -> Any:
    return getattr(evaluator.data_loader, "dataset", ())


def _check_disjoint(**parts: Any) -> None:
    """Refuse parts that share a patient, or where none is named an image."""
    names = {part: {*patients_of(dataset)} - {""} for part, dataset in parts.items()}
    for one, two in itertools.combinations(names, 2):
        if shared := sorted(names[one] & names[two]):
            raise ValueError(
                f"{two}: expected patients that are not in {one} too, got {len(shared)} of both, such as {shared[0]}; "
                "a part that steers or confirms must not know them."
            )


def _running_mean(mean: Sequence[float], values: Sequence[float], share: float = 0.05) -> list[float]:
    return [(1 - share) * old + share * new for old, new in zip(mean, values, strict=True)] if mean else [*values]
