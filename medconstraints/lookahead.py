"""The cycles of lookahead adversarial learning: when to go on, where to go back to, and whose label maps to keep.

Algorithm 1 of Jamali-Rad et al. 2020 (LoAd), without networks: a trainer tells each score and asks what follows. The
printed algorithm does not put the score back when it goes back to the start, and would end every second cycle at once;
here it does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from medconstraints import checks
from medconstraints.data.missing import MissingData

__all__ = ["Cycle", "Lookahead", "LookaheadModels", "by_patient", "paired_bootstrap", "patients_of"]

_KEPT = ("running", "weights", "scores", "rows", "norms", "accuracy", "holdout_accuracy")
LEAST_MARGIN = 1e-3  # of a peak, where the bootstrap's error is smaller: the paper's 0.1 % mIoU


class Cycle(NamedTuple):
    """What a cycle came to: the name of its last model, and that of a new start if its peak was accepted."""

    end: str
    start: str | None


@dataclass
class Lookahead:
    """State of a search: begin, observe a score after each update, and close each cycle that is over.

    Args:
        beta_lower: a cycle is over when the score is no longer above that of its start minus this.
        beta_upper: a peak is above the score of its start by more than this; None takes the error that comes with each
            score, at least 0.001.
        patience: Gamma, scores of a cycle.
        max_cycles: Psi, cycles from one start without a new one after which the search is finished. With a fixed
            `beta_upper` and scores up to 1 there are at most `max_cycles * (1 + floor((1 - first) / beta_upper))`.
        buffer_size: B_max, models whose label maps the discriminator learns to tell: the start and the last ends.

    Attributes:
        start: name of the model that cycles begin with: g0, and g1, g2, ... for accepted peaks.
        start_score: its score.
        score: the last one.
        peak_score: the best of the cycle that counts as a peak, or None.
        buffer: names of models, the oldest first; the last of the j-th cycle from g1 is "g1,j".

    Raises:
        ValueError: a bound that is not above 0, or a buffer of fewer than two.

    Example:
        >>> search = Lookahead(beta_lower=0.05, beta_upper=0.01, patience=2, max_cycles=1)
        >>> search.begin(0.8)
        >>> [search.observe(score) for score in (0.79, 0.82)], search.cycle_is_over
        ([False, True], True)
        >>> search.close(accepted=True), search.start, search.buffer
        (Cycle(end='g0,0', start='g1'), 'g1', ['g1', 'g0,0'])
    """

    beta_lower: float = 0.05
    beta_upper: float | None = None
    patience: int = 50
    max_cycles: int = 50
    buffer_size: int = 3
    start: str = field(default="", init=False)
    start_score: float = field(default=0.0, init=False)
    score: float = field(default=0.0, init=False)
    peak_score: float | None = field(default=None, init=False)
    peaks: int = field(default=0, init=False)
    cycle: int = field(default=0, init=False)
    fruitless: int = field(default=0, init=False)
    observed: int = field(default=0, init=False)
    buffer: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        checks.number("beta_lower", self.beta_lower, above=0)
        if self.beta_upper is not None:
            checks.number("beta_upper", self.beta_upper, above=0)
        checks.whole_number("patience", self.patience, 1)
        checks.whole_number("max_cycles", self.max_cycles, 1)
        checks.whole_number("buffer_size", self.buffer_size, 2)

    def begin(self, score: float) -> None:
        """The score of the first model, g0."""
        self.start, self.start_score, self.score = "g0", _finite(score), float(score)
        self.buffer = ["g0"]

    def observe(self, score: float, error: float = 0.0) -> bool:
        """The score after an update; True if the model is the best peak of its cycle so far, which is to be kept.

        Args:
            score: of the model, such as mean IoU.
            error: standard error of its difference from the start, for `beta_upper=None`.
        """
        self.score = float(score) if np.isfinite(score) else -np.inf  # a broken model ends its cycle
        self.observed += 1
        margin = max(error, LEAST_MARGIN) if self.beta_upper is None else self.beta_upper
        best = self.start_score + margin if self.peak_score is None else self.peak_score
        if self.score > best:
            self.peak_score = self.score
            return True
        return False

    @property
    def cycle_is_over(self) -> bool:
        """Whether the score fell to the lower bound, or patience is at its end."""
        return self.score <= self.start_score - self.beta_lower or self.observed >= self.patience

    def close(self, *, accepted: bool) -> Cycle:
        """End the cycle: a new start if its peak is accepted, else the old one, and the buffer that goes with it.

        Raises:
            ValueError: a peak is accepted that there was not.
        """
        if accepted and self.peak_score is None:
            raise ValueError("accepted: expected False, this cycle had no peak; look at peak_score first.")
        end = f"{self.start},{self.cycle}"
        if accepted and self.peak_score is not None:
            self.peaks += 1
            self.start, self.start_score = f"g{self.peaks}", self.peak_score
            self.buffer, self.cycle, self.fruitless = [self.start, end], 0, 0
        else:
            ends = [name for name in self.buffer if "," in name]
            if len(self.buffer) >= self.buffer_size:
                self.buffer.remove(ends[0])
            self.buffer.append(end)
            self.cycle += 1
            self.fruitless += 1
        self.score, self.peak_score, self.observed = self.start_score, None, 0
        return Cycle(end, self.start if accepted else None)

    @property
    def finished(self) -> bool:
        """Whether `max_cycles` cycles brought no new start."""
        return self.fruitless >= self.max_cycles

    def state_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; the arguments stay as they were given."""
        given = ("beta_lower", "beta_upper", "patience", "max_cycles", "buffer_size")
        for name, value in state.items():
            if name not in given:
                setattr(self, name, list(value) if name == "buffer" else value)


class LookaheadModels:
    """What a search keeps besides its counters: weights by name, scores of cases, and a row for each evaluation.

    The discriminator learns from label maps of the models in the buffer. Their weights are kept here, and the maps are
    made when a batch needs them: that takes `buffer_size` times the weights, whatever the data.

    Args:
        searches: name -> search; None leaves one out.

    Attributes:
        running: name of the search that runs, None when all are done.
        weights: search -> model -> state of network and optimizer.
        scores: search -> model -> part -> score of each patient.
        rows: evaluations so far, for `cycles.csv`.
        norms: mean lengths of the adversary's updates, one for each parameter.
        accuracy: of the discriminator at the end of its last training, on its last batches.
        holdout_accuracy: likewise, on the hold-out part.
    """

    def __init__(self, searches: Mapping[str, Lookahead | None]) -> None:
        self.searches = {name: search for name, search in searches.items() if search is not None}
        self.running: str | None = next(iter(self.searches))
        self.weights: dict[str, dict[str, Any]] = {name: {} for name in self.searches}
        self.scores: dict[str, dict[str, dict[str, list[float]]]] = {name: {} for name in self.searches}
        self.rows: list[dict[str, Any]] = []
        self.norms: list[float] = []
        self.accuracy: float | None = None
        self.holdout_accuracy: float | None = None

    def best(self, search: str) -> dict[str, Tensor]:
        """Weights of the network that the search came to: its start, the first one if nothing was accepted."""
        found: dict[str, Tensor] = self.weights[search][self.searches[search].start]["network"]
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything, of types that `torch.load(weights_only=True)` reads."""
        return {
            "searches": {name: search.state_dict() for name, search in self.searches.items()},
            **{name: getattr(self, name) for name in _KEPT},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name, search in self.searches.items():
            search.load_state_dict(state["searches"][name])
        for name in _KEPT:
            setattr(self, name, state[name])


def paired_bootstrap(differences: np.ndarray, *, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Standard error of the mean of paired differences over patients, and the ends of its 95 % interval.

    Args:
        differences: one for each patient, (N,), see `by_patient`; without NaN.
        draws: bootstrap samples of patients.
        seed: of the draws.
    """
    values = np.asarray(differences, dtype=float)
    random = np.random.default_rng(seed)
    means = values[random.integers(len(values), size=(draws, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(means.std()), float(low), float(high)


def patients_of(dataset: Any) -> list[str]:
    """Whose image each item is: its "patient", "case" or "image", whichever comes first; "" where none is named."""
    items = getattr(dataset, "data", dataset)
    if isinstance(items, MissingData):
        return []
    keys = [
        next((item[key] for key in ("patient", "case", "image") if key in item), None)
        for item in items
        if isinstance(item, Mapping)
    ]
    return [str(key) if isinstance(key, str | int | list) else "" for key in keys]


def by_patient(values: np.ndarray, patients: Sequence[str]) -> np.ndarray:
    """Mean of the cases of each patient, which are no independent ones: two phases of a heart, slices of a volume.

    Args:
        values: (N, K), NaN where a case has none.
        patients: of the cases; "" for one that is alone. Fewer than N of them: all cases are.

    Returns:
        (P, K) in the order in which the patients come first; NaN where no case of a patient has a value.

    Example:
        >>> by_patient(np.array([[1.0], [np.nan], [5.0], [3.0]]), ["a", "b", "a", ""]).tolist()
        [[3.0], [nan], [3.0]]
    """
    named = patients if len(patients) == len(values) else [""] * len(values)
    rows: dict[Any, list[int]] = {}
    for row, name in enumerate(named):
        rows.setdefault(name or row, []).append(row)
    found = np.full((len(rows), values.shape[1]), np.nan)
    for number, chosen in enumerate(rows.values()):
        known = ~np.isnan(values[chosen]).all(0)
        found[number, known] = np.nanmean(values[chosen][:, known], 0)
    return found


def _finite(score: float) -> float:
    if not np.isfinite(score):
        raise ValueError(f"score: expected a finite number of the first model, got {score!r}; look at its weights.")
    return float(score)
