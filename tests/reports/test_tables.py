"""Tables of results: cells, markers of a document, line ends."""

import json

import pytest

from medconstraints.reports.tables import replace_table, results_table, update_markdown


def summary(dice, distance, *, undefined=0, n=3):
    return {
        "dice_mean": dice,
        "dice_sd": None if dice is None else 0.0123,
        "hd95_mm_mean": distance,
        "hd95_mm_sd": None if distance is None else 1.005,
        "hd95_undefined": undefined,
        "n": n,
    }


@pytest.fixture
def runs(tmp_path):
    content = {
        "full": ({"head": summary(0.9, 2.0), "tail": summary(0.8, 3.0)}, 3),
        "boxes": ({"head": summary(0.71236, 4.5, undefined=1, n=2)}, 3),
        "empty": ({"head": summary(0.0, None, undefined=3)}, 3),
    }
    for name, (scores, total) in content.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"summary": scores, "cases": [{}] * total, "provenance": {}}))
    return tmp_path


def test_results_table(runs):
    rows = {"Full labels": runs / "full.json", "Boxes | w=3": runs / "boxes.json", "Nothing": runs / "empty.json"}
    assert results_table(rows).splitlines() == [
        "| Run | Volumes | head: Dice | head: HD95 (mm) | tail: Dice | tail: HD95 (mm) |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| Full labels | 3 | 0.900 (0.012) | 2.00 (1.00) | 0.800 (0.012) | 3.00 (1.00) |",
        r"| Boxes \| w=3 | 2 of 3 | 0.712 (0.012) | 4.50 (1.00), 1 undefined | – | – |",  # noqa: RUF001
        "| Nothing | 3 | 0.000 (0.012) | –, 3 undefined | – | – |",  # noqa: RUF001
    ]


def test_results_table_rejects(runs):
    with pytest.raises(ValueError, match="at least one"):
        results_table({})
    with pytest.raises(FileNotFoundError, match=r"results: no file .*absent\.json"):
        results_table({"a": runs / "absent.json"})
    for text in ("{}", "[1]", "{"):
        (runs / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad\.json (lacks|is not valid)"):
            results_table({"a": runs / "bad.json"})


DOCUMENT = "# A\n\n<!-- table:one -->\nold\n<!-- /table:one -->\n\ntext\n<!-- table:two --><!-- /table:two -->\nend\n"


def test_replace_is_idempotent_and_leaves_the_rest(runs):
    once = replace_table(DOCUMENT, "one", "| new |\n")
    assert once == DOCUMENT.replace("\nold\n", "\n\n| new |\n\n")
    assert replace_table(once, "one", "| new |") == once
    both = replace_table(once, "two", r"| \1 |")  # no regular expression
    assert r"| \1 |" in both
    assert both.startswith(once[:40])


def test_replace_rejects():
    for document, text, words in (
        ("no markers", "x", "found 0 and 0"),
        ("<!-- /table:one --><!-- table:one -->", "x", "once after it"),
        (DOCUMENT + DOCUMENT, "x", "found 2 and 2"),
        (DOCUMENT, "a <!-- /table:one -->", "marker of its own"),
    ):
        with pytest.raises(ValueError, match=words):
            replace_table(document, "one", text)


def test_update_keeps_line_ends(tmp_path):
    path = tmp_path / "a.md"
    path.write_bytes(DOCUMENT.replace("\n", "\r\n").encode())
    assert update_markdown(path, "one", "a\nb")
    content = path.read_bytes()
    assert content.count(b"\n") == content.count(b"\r\n")
    assert not update_markdown(path, "one", "a\nb")
    with pytest.raises(FileNotFoundError, match="markdown: no file"):
        update_markdown(tmp_path / "b.md", "one", "a")
