"""A table of epochs: repeated ones are cut, columns may come later, and what is no such table stays."""

import math

import pytest

from medconstraints.handlers.epoch_table import EpochTable


def test_rows_of_repeated_epochs_are_cut(tmp_path):
    table = EpochTable(tmp_path / "made" / "t.csv")
    for epoch in range(1, 5):
        table.write(epoch, {"a": epoch / 5, "b": None})
    EpochTable(table.path).write(3, {"a": math.inf, "b": 1e-30})
    assert table.path.read_bytes() == b"epoch,a,b\n1,0.2,\n2,0.4,\n3,inf,1e-30\n"


def test_a_column_that_comes_later_is_empty_before(tmp_path):
    table = EpochTable(tmp_path / "t.csv")
    table.write(1, {"a": 1.0})
    table.write(2, {"b": 3.0, "a": 2.0})
    assert table.path.read_bytes() == b"epoch,a,b\n1,1.0,\n2,2.0,3.0\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch,a,c\n1,2,3\n", r"columns are those of another run \(\['c'\] besides\)"),
        ("name,a,b\n1,2,3\n", r"t\.csv: .*another run .*; choose another file"),
        ("epoch,a,b\nfirst,2,3\n", r"t\.csv: expected the number of an epoch .*'first'.*; move it away"),
    ],
)
def test_a_file_of_another_run_stays(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(RuntimeError, match=message):
        EpochTable(path).write(1, {"a": 1.0, "b": 2.0})
    assert path.read_text() == text


def test_a_kill_while_writing_leaves_the_former_table(tmp_path, monkeypatch):
    table = EpochTable(tmp_path / "t.csv")
    table.write(1, {"a": 1.0})
    before = table.path.read_bytes()

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("medconstraints.handlers.epoch_table.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        table.write(2, {"a": 1.0})
    assert table.path.read_bytes() == before


def test_the_table_of_a_former_run_is_kept_aside(tmp_path):
    path = tmp_path / "t.csv"
    for run in range(3):
        table = EpochTable(path)
        for epoch in (1, 2):
            table.write(epoch, {"a": float(run)})
    assert path.read_text() == "epoch,a\n1,2.0\n2,2.0\n"
    assert (tmp_path / "t.csv.old1").read_text() == "epoch,a\n1,0.0\n2,0.0\n"
    assert (tmp_path / "t.csv.old2").read_text() == "epoch,a\n1,1.0\n2,1.0\n"
    EpochTable(path).write(2, {"a": 9.0})  # resumed after epoch 1
    assert path.read_text() == "epoch,a\n1,2.0\n2,9.0\n"
    assert len(list(tmp_path.iterdir())) == 3
