"""LookaheadReportHandler: the verdict, the differences, and the picture of the cycles."""

import numpy as np
import pytest

from medconstraints.handlers.lookahead_report import difference, draw_cycles, verdict


def report(after, control=None, peaks=1):
    def found(values):
        return {"val_mean_iou": {"all": {"mean": values[0], "interval": list(values[1:])}}}

    differences = {"after": found(after), **({"control": found(control)} if control else {})}
    return {"patients": 20, "differences": differences, "accepted_peaks": {"adversary": peaks}}


@pytest.mark.parametrize(
    ("after", "control", "peaks", "words"),
    [
        ((0.02, 0.01, 0.03), (0.001, -0.01, 0.01), 1, "Better than the start: 20 patients: mean IoU +0.0200"),
        ((0.02, 0.01, 0.03), None, 1, "Better than the start"),
        ((0.02, 0.01, 0.03), (0.03, 0.01, 0.05), 1, "No improvement that these patients could show"),
        ((0.02, -0.01, 0.03), None, 1, "No improvement that these patients could show"),
        ((-0.02, -0.03, -0.01), None, 1, "Worse than the start"),
        ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), 0, "No peak was better on the confirm part: the result is the start."),
    ],
)
def test_the_verdict(after, control, peaks, words):
    text = verdict(report(after, control, peaks))
    assert text.startswith(words) and ("noise control" in text) == (control is not None)


def test_differences_are_of_pairs_and_leave_out_what_is_not_there():
    before = np.array([[0.5, np.nan], [0.6, 0.4], [0.7, 0.5], [np.nan, np.nan]])
    found = difference(before + np.array([[0.1, 0.2]]), before)
    assert found["1"]["mean"] == pytest.approx(0.1) and found["1"]["patients"] == 3
    assert found["2"]["mean"] == pytest.approx(0.2) and found["2"]["patients"] == 2
    assert found["all"]["mean"] == pytest.approx((0.1 + 0.15 + 0.15) / 3)
    assert found["1"]["interval"] == pytest.approx([0.1, 0.1])


def test_the_picture_has_every_evaluation():
    rows = [
        {
            "search": search,
            "mean_iou": score,
            "start_mean_iou": 0.5,
            "start": "g0",
            "cycle": 0,
            "peak": peak,
            "event": event,
        }
        for search, score, peak, event in [
            ("adversary", 0.5, False, "start"),
            ("adversary", 0.6, True, ""),
            ("adversary", float("-inf"), False, "accepted"),
            ("noise", 0.5, False, "start"),
            ("noise", 0.45, False, "end"),
        ]
    ]
    pixels = np.asarray(draw_cycles(rows)).reshape(-1, 3)
    colours = {tuple(colour) for colour in np.unique(pixels, axis=0)}
    assert {(31, 95, 168), (160, 160, 160), (192, 48, 32)} <= colours
    draw_cycles(rows[:1])
