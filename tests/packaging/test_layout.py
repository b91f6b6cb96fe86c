"""The tree keeps its rules: listed packages, import direction, file sizes, names and docstrings."""

import ast
import configparser
import importlib
import importlib.util
import inspect
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(p for folder in ("medconstraints", "transforms") for p in (ROOT / folder).rglob("*.py"))
MAX_BYTES = 5_000_000

# What a package must not import: checks, statistics, distance, boxes, formulations <- losses <- handlers <- engines;
# transforms and losses share only the targets; nothing at all imports a bundle.
_ABOVE_LOSSES = ("handlers", "engines", "transforms", "reports")
FORBIDDEN = {
    "medconstraints.checks": ("statistics", "distance", "boxes", "formulations", "losses", "data", *_ABOVE_LOSSES),
    "medconstraints.statistics": ("formulations", "losses", "data", *_ABOVE_LOSSES),
    "medconstraints.distance": ("formulations", "losses", "data", *_ABOVE_LOSSES),
    "medconstraints.boxes": ("formulations", "losses", "data", *_ABOVE_LOSSES),
    "medconstraints.formulations": ("losses", "data", *_ABOVE_LOSSES),
    "medconstraints.losses": ("data", *_ABOVE_LOSSES),
    "medconstraints.handlers": ("engines", "transforms", "reports"),
    "medconstraints.transforms": ("losses", "handlers", "engines"),
}


def module_name(path):
    """The name a source file has once installed."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "transforms":
        parts.insert(0, "medconstraints")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path):
    """The absolute dotted names that a file imports, relative imports resolved."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def is_within(name, package):
    return name == package or name.startswith(package + ".")


def repository_files():
    """Tracked files and those that would be tracked with the next commit."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not a git checkout, or git is not installed: {error}")
    return [path for path in (ROOT / name for name in sorted(set(listed.split("\0"))) if name) if path.is_file()]


def listed_packages():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config["options"]["packages"].split()


def public_modules():
    names = [module_name(path) for path in SOURCES if path.name != "__main__.py"]
    return [name for name in names if not any(part.startswith("_") for part in name.split("."))]


def test_setup_cfg_lists_every_package():
    found = sorted(module_name(path) for path in SOURCES if path.name == "__init__.py")
    assert listed_packages() == found, "[options] packages in setup.cfg has to name every folder with an __init__.py"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_keep_their_direction(path):
    name = module_name(path)
    rules = [others for package, others in FORBIDDEN.items() if is_within(name, package)]
    banned = ["bundles", "torchvision", *(f"medconstraints.{other}" for others in rules for other in others)]
    wrong = sorted({i for i in imported_names(path) for package in banned if is_within(i, package)})
    assert not wrong, f"{name} must not import {', '.join(wrong)}"


def test_relative_imports_are_resolved():
    """The direction test would pass on anything if this did not hold."""
    path = ROOT / "medconstraints" / "losses" / "__init__.py"
    assert module_name(path) == "medconstraints.losses"
    assert module_name(ROOT / "transforms" / "boxes.py") == "medconstraints.transforms.boxes"
    assert is_within("medconstraints.losses.box_prior", "medconstraints.losses")
    assert not is_within("medconstraints.losses_of_others", "medconstraints.losses")


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("import medconstraints.engines", "medconstraints.engines"),
        ("from medconstraints import engines", "medconstraints.engines"),
        ("from ..engines import lookahead", "medconstraints.engines.lookahead"),
        ("from .. import engines", "medconstraints.engines"),
        ("from .base import x", "medconstraints.losses.base"),
    ],
)
def test_imported_names(tmp_path, monkeypatch, statement, expected):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "medconstraints" / "losses" / "some.py"
    path.parent.mkdir(parents=True)
    path.write_text(statement)
    assert expected in set(imported_names(path))


def test_no_large_files():
    large = {str(p.relative_to(ROOT)): p.stat().st_size for p in repository_files() if p.stat().st_size > MAX_BYTES}
    assert not large, f"files above {MAX_BYTES} bytes: {large}"


# Written in pieces, so that this file does not find itself.
MACHINE_PATH = re.compile(r"(?<![\w.:~$})-])/(?:" + "|".join(["work", "home", "root", "Users"]) + r")/")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see /" + "home/ann/data", True),
        ('"/' + 'work/main"', True),
        ("https://site.org/" + "home/x", False),
        ("a/" + "work/b", False),
    ],
)
def test_machine_path_pattern(text, found):
    assert bool(MACHINE_PATH.search(text)) == found


def test_no_machine_paths():
    hits = []
    for path in repository_files():
        content = path.read_bytes()
        if b"\0" in content or path.suffix == ".js":  # weights, pictures, the viewer that others wrote
            continue
        lines = content.decode("utf-8", errors="replace").splitlines()
        hits += [f"{path.relative_to(ROOT)}:{i}" for i, line in enumerate(lines, 1) if MACHINE_PATH.search(line)]
    assert not hits, f"absolute paths of one machine in {hits}"


def test_no_catch_all_modules():
    names = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert not [module_name(path) for path in SOURCES if names & set(module_name(path).split("."))]


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_modules_have_docstrings(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path.name} has no module docstring"


@pytest.mark.parametrize("name", public_modules())
def test_public_names_exist_and_have_docstrings(name):
    module = importlib.import_module(name)
    public = getattr(module, "__all__", [])
    assert len(public) == len(set(public)), f"{name}.__all__ names something twice"
    for item in public:  # as `from package import name` does: __all__ may name a submodule nobody has imported yet
        if not hasattr(module, item) and hasattr(module, "__path__") and importlib.util.find_spec(f"{name}.{item}"):
            importlib.import_module(f"{name}.{item}")
    missing = [item for item in public if not hasattr(module, item)]
    assert not missing, f"{name}.__all__ names what is not there: {missing}"
    objects = {item: getattr(module, item) for item in public}
    # A class must have its own docstring: vars() does not see the one of its base class.
    bare = [k for k, v in objects.items() if inspect.isclass(v) and not vars(v).get("__doc__")]
    bare += [k for k, v in objects.items() if inspect.isroutine(v) and not v.__doc__]
    assert not bare, f"without docstring in {name}: {bare}"
