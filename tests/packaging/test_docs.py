"""The documents: links lead somewhere, the code in the README runs, and every table is what the results say."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from monai.bundle import ConfigParser

ROOT = Path(__file__).resolve().parents[2]
# Of the model zoo's template, and what its bundles add to it.
ZOO_HEADINGS = (
    *("Authors", "Tags", "Model Description", "Data", "Performance", "MONAI Bundle Commands", "System Configuration"),
    *("Intended Use and Limitations", "References", "License"),
)
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bundles/*/docs/*.md")]
    if ".venv" not in path.parts
)


def code_blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def guide_blocks(language):
    """Blocks of the guides as test cases; a page that lost all of its blocks has one that fails."""
    return [
        pytest.param(block, id=f"{name}-{number}")
        for name in ("constraints", "distance_maps")
        for number, block in enumerate(code_blocks(f"docs/{name}.md", language) or [f"no {language} block"])
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    local = [link.split("#")[0] for link in links if not re.match(r"[a-z]+:", link)]
    missing = [link for link in local if link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", sorted(ROOT.glob("bundles/*/docs/README.md")), ids=lambda page: page.parents[1].name)
def test_bundles_have_the_headings_of_the_zoo(page):
    text = page.read_text(encoding="utf-8")
    metadata = json.loads((page.parents[1] / "configs" / "metadata.json").read_text(encoding="utf-8"))
    assert text.startswith(f"# {metadata['name']}\n")
    headings = re.findall(r"^##+ (.*)$", text, re.MULTILINE)
    assert [heading for heading in headings if heading in ZOO_HEADINGS] == list(ZOO_HEADINGS)


def test_python_of_the_readme_runs(tmp_path, capsys):
    blocks = code_blocks("README.md", "python")
    assert blocks
    for number, block in enumerate(blocks):
        script = tmp_path / f"block_{number}.py"
        script.write_text(block, encoding="utf-8")
        runpy.run_path(str(script))
    assert "loss" in capsys.readouterr().out


@pytest.mark.parametrize("block", guide_blocks("python"))
def test_python_of_the_guides_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("block.py").write_text(block, encoding="utf-8")
    runpy.run_path("block.py")
    assert [path.name for path in tmp_path.iterdir()] == ["block.py"]  # nothing is left in the reader's folder


@pytest.mark.parametrize("block", guide_blocks("json"))
def test_json_of_the_guides_parses(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = json.loads(block)
    if "_target_" not in block:
        return
    # Configs stand for themselves: every entry can be made, with real names and arguments.
    parser = ConfigParser(content)
    made = {key: parser.get_parsed_content(key) for key in content if key != "imports"}
    assert not any(isinstance(value, dict) for value in made.values())


def test_tables_are_those_of_the_results(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["write_tables.py", "--check"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "docs" / "write_tables.py"), run_name="__main__")
    assert end.value.code == 0, capsys.readouterr().out


def test_a_row_is_compared_with_the_settings_of_its_run():
    is_recorded = runpy.run_path(str(ROOT / "docs" / "write_tables.py"))["is_recorded"]
    training = {"bundle": "b", "config_files": ["train.json"], "settings": {"slice_axis": 1, "size_bounds": [0.5, 0.9]}}
    claims = {"slice_axis": 1, "size_bounds": [0.5, 0.9], "config_files": ["train.json"]}
    assert is_recorded("row", claims, {"settings": {}, "training": training})
    assert not is_recorded("row", claims, None) and not is_recorded("row", claims, {"settings": {"slice_axis": 1}})
    for wrong, words in (({"slice_axis": None}, "slice_axis None, and its run had 1"), ({"x": 1}, "did not have")):
        with pytest.raises(ValueError, match=f"'One 3D box' claims .*{words}"):
            is_recorded("One 3D box", claims | wrong, {"settings": {}, "training": training})
