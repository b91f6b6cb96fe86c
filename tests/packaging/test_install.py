"""The ways a user installs the package: wheel, from inside the checkout, editable. Offline; no name leaks to the top.

Every case runs in an environment of its own that sees the packages of this one (torch, monai) but not its
medconstraints: a .pth file appends the folder, and .pth files inside that folder (editable installs) are then not read.
"""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("medconstraints", "transforms", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def run(*command, cwd):
    """Run without the variables that would lead Python or pip elsewhere; give back what was printed."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_")) or k == "PIP_CERT"}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def copy_checkout(folder):
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    return copy_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    pytest.importorskip("build")
    source = copy_checkout(tmp_path_factory.mktemp("wheel_source"))
    target = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", target, source, cwd=source)
    (path,) = target.glob("*.whl")
    return path


@pytest.fixture
def environment(tmp_path):
    """The interpreter of a fresh environment without pip that also sees the packages of this one."""
    pytest.importorskip("pip")
    folder = tmp_path / "environment"
    venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt").create(folder)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path))
    seen = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (site / "parent.pth").write_text("\n".join(seen))
    return python


def install(python, *what, cwd):
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *what, cwd=cwd)


def imported_from(python, cwd):
    """The folders of the package, of its transforms, and whether a top-level `transforms` can be imported."""
    code = (
        "import importlib.util as u, os, medconstraints, medconstraints.transforms as t\n"
        "for m in (medconstraints, t): print(os.path.realpath(os.path.dirname(m.__file__)))\n"
        "print(u.find_spec('transforms') is not None)"
    )
    package, transforms, leaked = run(python, "-c", code, cwd=cwd).splitlines()
    return Path(package), Path(transforms), leaked == "True"


@pytest.fixture
def empty(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def test_wheel_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    package, transforms = ROOT / "medconstraints", ROOT / "transforms"
    modules = {f"medconstraints/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}
    modules |= {f"medconstraints/{path.relative_to(ROOT).as_posix()}" for path in transforms.rglob("*.py")}
    assert modules <= set(names)
    parts = ("page.html", "viewer.html", "niivue/niivue.umd.js", "niivue/LICENSE")
    assert {"medconstraints/py.typed", *(f"medconstraints/reports/{part}" for part in parts)} <= set(names)
    assert any(name.endswith("/LICENSE") for name in names)
    tops = {name.split("/")[0] for name in names}
    assert len(tops) == 2, f"only the package and its .dist-info belong at the top of the wheel, found {tops}"
    assert "medconstraints" in tops


def test_wheel_in_an_empty_folder(wheel, environment, empty):
    install(environment, wheel, cwd=empty)
    package, transforms, leaked = imported_from(environment, empty)
    assert package.is_relative_to(environment.parent.parent.resolve())
    assert transforms == package / "transforms"
    assert not leaked


def test_plain_install_while_standing_in_the_checkout(checkout, environment):
    install(environment, ".", cwd=checkout)
    package, transforms, _ = imported_from(environment, checkout)
    assert package == checkout.resolve() / "medconstraints", "the current folder comes first on Python's path"
    assert transforms == checkout.resolve() / "transforms"


def test_editable_install_from_another_folder(checkout, environment, empty):
    install(environment, "--editable", checkout, cwd=empty)
    package, transforms, leaked = imported_from(environment, empty)
    assert package == checkout.resolve() / "medconstraints"
    assert transforms == checkout.resolve() / "transforms"
    assert not leaked


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("transforms",), "transforms"),
        (("medconstraints/transforms",), "medconstraints/transforms"),
        (("transforms", "medconstraints/transforms"), "medconstraints/transforms"),
        ((), None),
    ],
)
def test_shim_of_the_package(tmp_path, folders, expected):
    """`medconstraints/__init__.py` looks beside itself only where nothing inside it has the name."""
    for folder in ("medconstraints", *folders):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "__init__.py").touch()
    for name in ("__init__.py", "version.py"):
        shutil.copy(ROOT / "medconstraints" / name, tmp_path / "medconstraints" / name)
    code = (
        "import importlib.util as u, medconstraints\n"
        "spec = u.find_spec('medconstraints.transforms'); print(spec and spec.origin, len(medconstraints.__path__))"
    )
    origin, entries = run(sys.executable, "-S", "-E", "-c", code, cwd=tmp_path).rsplit(" ", 1)
    assert origin == str(tmp_path / expected / "__init__.py" if expected else None)
    assert int(entries) == (2 if expected == "transforms" else 1)
