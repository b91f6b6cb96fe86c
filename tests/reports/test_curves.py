"""Curves of several runs: what is read, the summary of the last epochs, the picture, and bad input."""

import pytest
from PIL import Image

from medconstraints.reports.curves import draw_curves, read_curves

CSV = "epoch,satisfied,stability,val_mean_dice,t\n1,0.5,,0.1,5.0\n2,0.75,0.5,0.3,5.5\n3,1.0,0.25,0.8,6.05\n"


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "validation.csv"
    path.write_text(CSV)
    return path


def test_columns_and_summary_of_the_last_epochs(run):
    curves = read_curves({"barrier": run}, last=2)
    assert curves["runs"]["barrier"] == {
        "epochs": [1, 2, 3],
        "satisfied": [0.5, 0.75, 1.0],
        "stability": [None, 0.5, 0.25],
        "val_mean_dice": [0.1, 0.3, 0.8],
    }
    summary = curves["summary"]["barrier"]
    assert summary["n"] == 2
    assert summary["satisfied_mean"] == 0.875
    assert summary["val_mean_dice_mean"] == pytest.approx(0.55)
    assert summary["val_mean_dice_sd"] == pytest.approx(0.5 / 2**0.5)
    every = read_curves({"all": run}, last=10)["summary"]["all"]
    assert every["stability_mean"] == pytest.approx(0.375), "an empty cell is not in the mean"
    assert every["n"] == 3


def test_picture_has_a_panel_for_each_run(run, tmp_path):
    sizes = []
    for count in (1, 3, 4):
        curves = read_curves({f"run {i}": run for i in range(count)})
        sizes.append(Image.open(draw_curves(curves, tmp_path / f"{count}.png")).size)
    assert sizes[1][0] > 2 * sizes[0][0] and sizes[2][1] > 1.5 * sizes[1][1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file .*missing.csv"),
        ("epoch,loss\n1,2\n", r"expected columns .* got \['epoch', 'loss'\]"),
        ("epoch,satisfied\n", "no row"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "missing.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        read_curves({"a": path})
