"""The cycles of lookahead adversarial learning, with scripted scores in place of networks."""

import math
import random

import numpy as np
import pytest

from medconstraints.lookahead import Lookahead, by_patient, paired_bootstrap, patients_of


def play(search, scores, accept=lambda: True):
    """Observe scores until they are used up or the search is finished; what each closed cycle came to."""
    found = []
    for score in scores:
        search.observe(score)
        if search.cycle_is_over:
            accepted = search.peak_score is not None and accept()
            found.append((search.close(accepted=accepted), list(search.buffer)))
        if search.finished:
            break
    return found


# Figure 1 of the paper: from g0 a cycle to nowhere, one over g1; from g1 two to nowhere, one over g2; from g2 two more.
# A cycle ends after four scores, or at 0.05 below its start.
FIGURE = [
    ([0.79, 0.78, 0.77, 0.765], "g0,0", None, ["g0", "g0,0"]),
    ([0.81, 0.83, 0.80, 0.74], "g0,1", "g1", ["g1", "g0,1"]),
    ([0.82, 0.81, 0.80, 0.79], "g1,0", None, ["g1", "g0,1", "g1,0"]),
    ([0.80, 0.77], "g1,1", None, ["g1", "g1,0", "g1,1"]),
    ([0.84, 0.86, 0.85, 0.84], "g1,2", "g2", ["g2", "g1,2"]),
    ([0.85, 0.80], "g2,0", None, ["g2", "g1,2", "g2,0"]),
    ([0.84, 0.83, 0.82, 0.81], "g2,1", None, ["g2", "g2,0", "g2,1"]),
]


def test_the_figure_of_the_paper():
    search = Lookahead(beta_lower=0.05, beta_upper=0.01, patience=4, max_cycles=2 + 1, buffer_size=3)
    search.begin(0.8)
    assert search.buffer == ["g0"]
    found = play(search, [score for scores, *_ in FIGURE for score in scores])
    assert [(cycle.end, cycle.start, buffer) for cycle, buffer in found] == [row[1:] for row in FIGURE]
    assert (search.start, search.start_score, search.finished) == ("g2", 0.86, False)
    assert play(search, [0.85, 0.7])[0][0].end == "g2,2" and search.finished


def test_a_cycle_begins_with_the_score_of_its_start():
    search = Lookahead(beta_lower=0.05, beta_upper=0.01, patience=10, max_cycles=5)
    search.begin(0.8)
    search.observe(0.7)
    assert search.cycle_is_over
    search.close(accepted=False)
    assert not search.cycle_is_over and search.score == 0.8


def test_a_peak_that_is_not_accepted_changes_nothing_but_the_buffer():
    search = Lookahead(beta_lower=0.05, beta_upper=0.01, patience=2, max_cycles=2)
    search.begin(0.5)
    [(cycle, buffer), (last, _)] = play(search, [0.6, 0.7, 0.6, 0.7, 0.9], accept=lambda: False)
    assert cycle.start is None and buffer == ["g0", "g0,0"] and last.end == "g0,1"
    assert (search.start, search.start_score, search.finished) == ("g0", 0.5, True)


@pytest.mark.parametrize("seed", range(30))
def test_the_number_of_cycles_is_bounded(seed):
    draws = random.Random(seed)
    beta, cycles = draws.choice([0.02, 0.1, 0.3]), draws.randint(1, 4)
    search = Lookahead(beta_lower=0.05, beta_upper=beta, patience=draws.randint(1, 5), max_cycles=cycles)
    first = draws.uniform(0, 0.9)
    search.begin(first)

    def scores():
        while True:
            yield min(1.0, search.start_score + draws.choice([1.01 * beta, -0.01, -0.1]))

    found = play(search, scores())
    assert search.finished and len(found) <= cycles * (1 + math.floor((1 - first) / beta))
    assert search.start_score >= first and all(len(buffer) <= search.buffer_size for _, buffer in found)


def test_the_margin_of_a_peak_is_the_error_of_its_difference():
    search = Lookahead()
    search.begin(0.5)
    assert not search.observe(0.51, error=0.02)
    assert search.observe(0.53, error=0.02) and search.peak_score == 0.53
    assert not search.observe(0.525, error=0.0)
    other = Lookahead()
    other.begin(0.5)
    assert not other.observe(0.5009, error=0.0) and other.observe(0.5011, error=0.0)


def test_a_broken_model_ends_its_cycle():
    search = Lookahead(patience=5)
    search.begin(0.5)
    assert not search.observe(float("nan")) and search.cycle_is_over


def test_a_search_goes_on_where_it_was():
    search, scores = Lookahead(beta_upper=0.01, patience=4, max_cycles=3), [s for row in FIGURE for s in row[0]]
    search.begin(0.8)
    play(search, scores[:11])
    other = Lookahead(beta_upper=0.01, patience=4, max_cycles=3)
    other.load_state_dict(search.state_dict())
    assert play(search, scores[11:]) == play(other, scores[11:]) and search == other


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"beta_upper": 0}, "beta_upper"),
        ({"beta_upper": -0.1}, "beta_upper"),
        ({"beta_lower": 0}, "beta_lower"),
        ({"buffer_size": 0}, "buffer_size"),
        ({"buffer_size": 1}, "buffer_size"),
        ({"patience": 0}, "patience"),
        ({"max_cycles": 0}, "max_cycles"),
    ],
)
def test_bad_bounds_are_named(options, name):
    with pytest.raises(ValueError, match=name):
        Lookahead(**options)


def test_a_score_or_a_peak_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="score: expected a finite number"):
        Lookahead().begin(float("nan"))
    search = Lookahead()
    search.begin(0.5)
    with pytest.raises(ValueError, match="accepted: expected False"):
        search.close(accepted=True)


def test_the_bootstrap_knows_noise_from_a_gain():
    random = np.random.default_rng(1)
    noise = random.normal(0, 0.1, 200)
    error, low, high = paired_bootstrap(noise)
    assert error == pytest.approx(0.1 / 200**0.5, rel=0.2) and low < 0 < high
    _, low, _ = paired_bootstrap(noise + 0.05)
    assert low > 0


@pytest.mark.parametrize("count", [1, 3])
def test_cases_of_a_patient_are_no_independent_ones(count):
    """Copies of a case change neither the mean nor the interval; as cases of their own they would narrow it."""
    values = np.random.default_rng(2).normal(0, 1, (12, 2))
    patients = [f"p{number}" for number in range(12)]
    together = by_patient(np.repeat(values, count, 0), [name for name in patients for _ in range(count)])
    np.testing.assert_allclose(together, values)
    alone = by_patient(np.repeat(values, 3, 0), [])
    assert paired_bootstrap(alone[:, 0])[0] < 0.7 * paired_bootstrap(values[:, 0])[0]


def test_means_of_patients_leave_out_what_is_not_there():
    values = np.array([[1.0, np.nan], [3.0, 5.0], [np.nan, np.nan], [7.0, 8.0]])
    found = by_patient(values, ["a", "a", "b", ""])
    np.testing.assert_array_equal(found, [[2, 5], [np.nan, np.nan], [7, 8]])


def test_patients_are_named_by_what_an_item_has():
    items = [{"patient": "p", "case": "c"}, {"case": 3}, {"image": "x.nii"}, {"image": np.zeros(2)}]
    assert patients_of(items) == ["p", "3", "x.nii", ""]
