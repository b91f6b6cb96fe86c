"""The command line: what it refuses before anything runs, and that every command does its work."""

import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from medconstraints.__main__ import COMMANDS, main
from medconstraints.synthetic import make_cohort, make_discs
from medconstraints.transforms.common_bounds import load_common_bounds

SUMMARY = {"dice_mean": 0.5, "dice_sd": None, "hd95_mm_mean": 2.0, "hd95_mm_sd": None, "hd95_undefined": 0, "n": 1}


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(capsys):
    """Status, standard output and error of a command line in this process."""

    def call(*arguments):
        status = main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return call


@pytest.fixture
def segmented(tmp_path):
    """A list of one image without and two with a label: class 1 of 4, 20 and 10 voxels, class 2 of 2 in each slice."""
    label = np.zeros((6, 6, 3), np.uint8)
    for position, size in enumerate([4, 20, 10]):
        label[..., position].flat[:size] = 1
    label[5, :2] = 2
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    pairs = []
    for name, array in (("first", label), ("second", np.flip(label * (label != 1), 0))):
        nib.save(nib.Nifti1Image(np.ascontiguousarray(array), affine), tmp_path / f"{name}.nii.gz")
        pairs.append({"image": "image.nii.gz", "label": f"{name}.nii.gz", "patient": name})
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random(label.shape), affine), tmp_path / "image.nii.gz")
    path = tmp_path / "datalist.json"
    path.write_text(json.dumps({"training": [{"image": "image.nii.gz"}, *pairs], "test": ["image.nii.gz"]}))
    return path


def test_list_and_help(run):
    status, shown, _ = run()
    assert status == 0
    assert [line.split()[0] for line in shown.splitlines()[1:]] == list(COMMANDS)
    for name in COMMANDS:
        status, shown, _ = run(name, "--help")
        assert status == 0 and "FLAGS" in shown and "FIRE" not in shown, name


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("demos", "no such command; did you mean demo?"),
        ("discs --output_dirs x", "--output_dirs: names no option; did you mean output_dir?"),
        ("discs --output_dir x --sead 1", "--sead: names no option; did you mean seed?"),
        ("discs --output_dir x 7", "Could not consume arg: 7"),
        ("discs --output_dir x --seed 1 --seed 2", "--seed: is given 2 times"),
        ("discs --size 32", "--output_dir: is missing"),
        ("discs --output_dir --size 32", "--output_dir: expected a text"),
        ("discs --output_dir x --size large", "--size: expected a whole number, got 'large'"),
        ("discs --output_dir x --size 32.5", "--size: expected a whole number, got '32.5'"),
        ("discs --output_dir x --seed True", "--seed: expected a whole number"),
        ("discs --output_dir x --radius null", "--radius: expected a number, got 'null'"),
        ("discs --output_dir x --overwrite false", "--overwrite: expected True or False, got 'false'"),
        ("discs --output_dir x --radius 90", "radius: expected None or from 1"),
        ("phantoms --output_dir x --shape [16,a,16]", "--shape: expected a whole number, or several"),
        ("curves --runs [1] --output x", "--runs: expected names and values"),
        ("curves --runs {} --output file", "--output: file exists; choose another name or add --overwrite"),
        ("phantoms --output_dir x --filling 0.95", "filling: expected None or from 0.12"),
        ("demo --output_dir x --bundle nowhere", "no configs/train.json in nowhere"),
        ("demo --output_dir . --bundle BUNDLE", "holds files already"),
        ("demo --output_dir file/below --bundle BUNDLE", "file"),
    ],
)
def test_what_is_refused_before_anything_runs(run, tmp_path, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"work")
    (tmp_path / "bundle" / "configs").mkdir(parents=True)
    (tmp_path / "bundle" / "configs" / "train.json").write_text("{}")
    before = files(tmp_path)
    status, shown, error = run(*arguments.replace("BUNDLE", "bundle").split())
    assert (status, shown) == (2, "")
    assert reason in error.splitlines()[-1]
    assert files(tmp_path) == before


def test_cohorts_take_their_options_in_both_spellings(run, tmp_path):
    counts = {"num_training": 1, "num_validation": 1, "num_test": 0, "seed": 2}
    line = "--num-training 1 --num_validation=1 --num-test 0 --seed 2"
    more = "--noise 0.3 --oblique-degrees 4 --spacing-mm [2,2,3] --distractor False --shape 16,16,16 --num-classes 2"
    status, shown, _ = run("phantoms", "--output_dir", tmp_path / "a", *line.split(), *more.split())
    assert (status, shown) == (0, f"{tmp_path / 'a' / 'datalist.json'}\n")
    options = {"noise": 0.3, "oblique_degrees": 4, "spacing_mm": (2, 2, 3), "distractor": False, "num_classes": 2}
    make_cohort(tmp_path / "b", shape=(16, 16, 16), **options, **counts)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    more = "--size 48 --radius 5.5 --target 99 --distractor 180 --max-noise 7"
    assert run("discs", "--output-dir", tmp_path / "c", *line.split(), *more.split())[0] == 0
    make_discs(tmp_path / "d", size=48, radius=5.5, target=99, distractor=180, max_noise=7, **counts)
    assert files(tmp_path / "c") == files(tmp_path / "d")


@pytest.mark.parametrize(
    ("more", "bounds", "cases"),
    [
        ("--slice-axis 2", [[3.6, 22], [1.8, 2.2]], ["first"]),
        ("--slice_axis 2 --cases 2 --factors 1,1", [[4, 20], [2, 2]], ["first", "second"]),
        ("--patients second --classes 2", [[5.4, 6.6]], ["second"]),
        ("--spacing_mm -1,-1,1 --classes 2 --factors [1,1]", [[10, 10]], ["first"]),
    ],
)
def test_common_bounds(run, segmented, more, bounds, cases):
    output = segmented.parent / "common.json"
    line = ("fit_common_bounds", "--datalist", segmented, "--num_classes", 3, "--output", output)
    status, shown, error = run(*line, *more.split())
    assert status == 0, error
    assert json.loads(shown) == pytest.approx(np.array(bounds))
    np.testing.assert_allclose(load_common_bounds(output), bounds)
    assert json.loads(output.read_text())["cases"] == [f"{case}.nii.gz" for case in cases]
    status, _, error = run(*line)
    assert status == 2 and "--output" in error and "exists" in error
    assert run(*line, "--overwrite")[0] == 0


def test_filling(run, segmented):
    status, shown, _ = run(
        "fit_filling", "--datalist", segmented, "--num-classes", 3, "--slice_axis", 2, "--quantiles", "0,1"
    )
    assert status == 0 and json.loads(shown)[1] == [1.0, 1.0]
    for more, reason in (
        ("--num_classes 3 --section test", "no entry of section 'test'"),
        ("--num_classes 3 --cases 0", "cases: expected at least 1"),
        ("--num_classes 2", "first.nii.gz: has values that are no class number"),
        ("--num_classes 3 --quantiles 0.5", "quantiles: expected two numbers"),
    ):
        status, shown, error = run("fit_filling", "--datalist", segmented, *more.split())
        assert (status, shown) == (2, "") and reason in error, more


def test_curves(run, tmp_path):
    path = tmp_path / "validation.csv"
    path.write_text("epoch,satisfied\n1,0.5\n2,1.0\n")
    runs = json.dumps({"a": str(path), "b, w=3": str(path)})
    status, shown, _ = run("curves", "--runs", runs, "--output", tmp_path / "c.json", "--picture", tmp_path / "c.png")
    assert status == 0 and "satisfied_mean" in shown
    assert set(json.loads((tmp_path / "c.json").read_text())["runs"]) == {"a", "b, w=3"}
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    status, _, error = run("curves", "--runs", '{"a": "absent.csv"}', "--output", tmp_path / "d.json")
    assert status == 2 and "absent.csv" in error and not (tmp_path / "d.json").exists()


def test_tables_need_no_torch(tmp_path):
    (tmp_path / "full.json").write_text(json.dumps({"summary": {"head": SUMMARY}, "cases": [{}], "provenance": {}}))
    (tmp_path / "a.md").write_text("<!-- table:one -->\nold\n<!-- /table:one -->\n")
    line = ["tables", "--markdown", "a.md", "--name", "one", "--rows", '{"Full, w=3": "full.json"}']
    program = (
        "import sys; from medconstraints.__main__ import main; status = main();"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules; sys.exit(status)"
    )

    def call(*more):
        command = [sys.executable, "-W", "error", "-c", program, *line, *more]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.stderr == ""
        return done.returncode, done.stdout

    assert call("--check") == (1, "a.md: table one would change\n")
    assert call() == (0, "a.md: table one updated\n")
    assert "| Full, w=3 | 1 | 0.500 | 2.00 |" in (tmp_path / "a.md").read_text()
    assert call("--check") == (0, "no problem found\n")
