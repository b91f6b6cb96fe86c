"""What SECURITY.md promises and no other test shows."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(p for folder in ("medconstraints", "transforms", "benchmarks") for p in (ROOT / folder).rglob("*.py"))
UNSAFE = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def calls(path, name):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
            yield node


@pytest.mark.parametrize("path", [p for p in SOURCES if "torch.load" in p.read_text()], ids=lambda path: path.name)
def test_weights_cannot_run_code(path):
    for node in calls(path, "torch.load"):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert given.get("weights_only") == "True", f"line {node.lineno}"


def test_configurations_load_weights_without_code():
    for path in (ROOT / "bundles").rglob("*.json"):
        for call in re.findall(r"torch\.load\([^)]*\)", path.read_text()):
            assert "weights_only=True" in call, path


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_unpickles_or_evaluates(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec") and called.split(".")[0] not in UNSAFE, (
                f"line {node.lineno}: {called}"
            )
