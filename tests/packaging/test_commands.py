"""The command lines of the documents: each is read as a shell and `fire` read it and resolved; the slow tests run them.

A block of commands is tagged `bash` and stands on its own, with the repository's root as its folder. Its lines go
through bash itself, which only records what it would have started, so that variables and quotes count as they do for a
reader.
"""

import ast
import contextlib
import functools
import inspect
import io
import json
import os
import pydoc
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path

import fire
import monai.bundle.__main__ as monai_commands
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.bundle.scripts import create_workflow
from torch.distributed.run import get_args_parser as torchrun_options

from medconstraints.__main__ import COMMANDS, read_command

ROOT = Path(__file__).resolve().parents[2]
BUNDLES = sorted(path.parents[1] for path in ROOT.glob("bundles/*/configs/train.json"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "data_manifests/README.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *(bundle / "docs" / "README.md" for bundle in BUNDLES),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
STARTS_COMMAND = re.compile(r"^(python3?|torchrun|make|pip|cd|\$\w+) ", re.MULTILINE)
# Every program is unknown to this shell, so that it asks what to do: write down the folder and the words.
SHELL = r"""PATH=/nowhere; command_not_found_handle() { printf '%s\x1f' "$PWD" "$@"; printf '\x1e'; }"""
NOT_A_VALUE = {"none": "'$None'", "null": "'$None'", "true": "True", "false": "False"}


@dataclass(frozen=True)
class Command:
    """What a shell would start: the words, in a folder relative to the repository's root."""

    page: Path
    number: int
    folder: str
    words: tuple[str, ...]

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}-{self.number}-{Path(self.words[0]).name}"


def blocks(page):
    """Tag and text of each fenced block."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def commands_in(text, page=ROOT / "README.md", start=0):
    """The commands of one block; a shell error, such as a variable that nothing set, is an error here."""
    done = subprocess.run(
        ["bash", "-e", "-u", "-c", f"{SHELL}\n{text}"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    if done.returncode or done.stderr:
        raise ValueError(f"{page}: a shell does not read this block: {done.stderr}\n{text}")
    records = [record.split("\x1f")[:-1] for record in done.stdout.split("\x1e")[:-1]]
    return [
        Command(page, number, os.path.relpath(folder, ROOT), tuple(words))
        for number, (folder, *words) in enumerate(records, start)
    ]


def commands_of(page):
    found = []
    for tag, text in blocks(page):
        if tag == "bash":
            found += commands_in(text, page, len(found))
    return found


WRITTEN = [command for page in PAGES for command in commands_of(page)]


# Reading a command line


def read_by_fire(component, words):
    """Name of the function that `fire` would call with these words, and its arguments; the problems if it would not."""
    called = []

    def recorder(name, function):
        @functools.wraps(function)
        def record(*args, **kwargs):
            signature = inspect.signature(function)
            given = signature.bind(*args, **kwargs).arguments
            free = {k for k, parameter in signature.parameters.items() if parameter.kind is parameter.VAR_KEYWORD}
            named = {k: v for k, v in given.items() if k not in free and v is not signature.parameters[k].default}
            called.append((name, named | {k: v for part in free & {*given} for k, v in given[part].items()}))

        return record

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            fire.Fire({name: recorder(name, function) for name, function in component.items()}, command=list(words))
    except SystemExit:
        pass
    if len(called) != 1:
        first = re.sub(r"\x1b\[\d*m", "", said.getvalue()).strip().split("\n")[0]
        return "", {}, [f"{shlex.join(words)[:60]}: {first or 'no function is called'}"]
    return *called[0], []


def functions_of(module):
    return {name: value for name, value in vars(module).items() if inspect.isfunction(value) and name[0] != "_"}


def value_problems(name, value, default=None):
    """What is wrong with a value as it arrives, and the one spelling that is right."""
    if value is None:
        return [f"--{name} None: MONAI drops None on the way; write '$None'"]
    word = value.lower() if isinstance(value, str) else None
    if word in NOT_A_VALUE and not (word == "none" and isinstance(default, str)):  # a choice may have that name
        return [f"--{name} {value}: arrives as a text; write {NOT_A_VALUE[word]}"]
    if isinstance(value, str) and value[:1] in ("$", "@", "%"):
        return []
    if isinstance(default, bool) != isinstance(value, bool) and isinstance(default, bool | int | float):
        return [f"--{name} {value!r}: a {type(default).__name__} belongs here, as {default!r}"]
    if isinstance(value, str) and isinstance(default, int | float | list | dict):
        return [f"--{name} {value!r}: a text where a {type(default).__name__} belongs, as {default!r}"]
    return []


def setting_of(parser, name):
    """The configured value of a setting: (True, value), or (False, None) if no component would take it."""
    if name in parser:
        return True, parser[name]
    parent, _, last = name.rpartition("#")
    component = parser[parent] if parent and parent in parser else None
    target = pydoc.locate(component.get("_target_", "")) if isinstance(component, dict) else None
    parameters = inspect.signature(target).parameters if target else {}
    return (True, parameters[last].default) if last in parameters else (False, None)


def setting_problems(parser, options):
    found = []
    for name, value in options.items():
        known, default = setting_of(parser, name)
        if not known:
            near = get_close_matches(name, [str(key) for key in parser.get()], n=1)
            found.append(f"--{name}: no setting of this config" + (f"; is {near[0]} meant?" if near else ""))
        found += value_problems(name, value, default)
    return found


def merge(files):
    parser = ConfigParser()
    parser.read_config([str(file) for file in files])
    return parser


def files_of(arguments, *names):
    """The files that arguments of MONAI's commands name."""
    found = []
    for name in names:
        value = arguments.get(name, [])
        found += [value] if isinstance(value, str) else value
    return found


def monai_problems(words, folder):
    """`python -m monai.bundle ...`: files, options and values; returns what a run would get, too."""
    name, arguments, found = read_by_fire(functions_of(monai_commands), words)
    if found:
        return "", {}, found
    own = inspect.signature(getattr(monai_commands, name)).parameters
    options = {key: value for key, value in arguments.items() if key not in own}
    dropped = {key[2:] for key, value in pairwise(words) if key.startswith("--") and value == "None"} - {*options}
    found = [problem for key in dropped for problem in value_problems(key, None)]
    files = files_of(arguments, "config_file", "meta_file", "logging_file")
    found += [f"{file}: no such file in {folder}" for file in files if not (ROOT / folder / file).is_file()]
    configs = [ROOT / folder / file for file in files_of(arguments, "config_file")]
    if found or not configs:
        return name, arguments, found or [f"{name}: no --config_file"]
    return name, arguments, setting_problems(merge(configs), options)


def script_problems(path, words, folder):
    """`python benchmarks/...`: the script is there, and every option stands in its source."""
    script = ROOT / folder / path
    if not script.is_file():
        return [f"{path}: no such script"]
    texts = {node.value for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Constant)}
    return [f"{path}: no option {word}" for word in words if word.startswith("--") and word not in texts]


def module_problems(module, words, folder):
    if module == "monai.bundle":
        return monai_problems(words, folder)[2]
    if module != "medconstraints":
        return [f"python -m {module}: not a module that these documents use"]
    try:
        read_command(words)
    except ValueError as error:
        return [str(error)]
    return []


def make_problems(words, folder):
    makefile = (ROOT / folder / "Makefile").read_text(encoding="utf-8")
    targets, variables = re.findall(r"^([a-z-]+):", makefile, re.MULTILINE), re.findall(r"^([A-Z_]+) ", makefile, re.M)
    return [f"make {word}: not in the Makefile" for word in words if word.split("=")[0] not in [*targets, *variables]]


def problems(command):
    """All that keeps a command from doing what it says."""
    program, *words = command.words
    if program == "make":
        return make_problems(words, command.folder)
    if program == "torchrun":
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                given = torchrun_options().parse_args(words)
        except SystemExit:
            return [said.getvalue().strip().split("\n")[-1]]
        return module_problems(given.training_script, given.training_script_args, command.folder)
    if program == "python" and words[:1] == ["-m"]:
        return module_problems(words[1], words[2:], command.folder)
    if program == "python":
        return script_problems(words[0], words[1:], command.folder)
    return [f"{program}: not a program that these documents use"]


# What stands in the documents


@pytest.mark.parametrize("command", WRITTEN, ids=str)
def test_command_can_be_read(command):
    assert problems(command) == [], shlex.join(command.words)


def test_commands_stand_in_blocks_of_their_own():
    """A block without the tag would not be tested."""
    assert {command.page for command in WRITTEN} >= {page for page in PAGES if page.name == "README.md"}
    for page in PAGES:
        assert [text for tag, text in blocks(page) if tag != "bash" and STARTS_COMMAND.search(text)] == [], page


@functools.cache
def configs_of(bundle):
    """Inference and training, each alone and with each of its overlays."""
    names = {path.stem for path in (bundle / "configs").glob("*.json")} - {"metadata", "train", "inference"}
    sets = [["train"], ["inference"]]
    sets += [["inference" if name.startswith("inference") else "train", name] for name in sorted(names)]
    return [merge([bundle / "configs" / f"{name}.json" for name in names]) for names in sets]


def bundles_of(page):
    return [page.parents[1]] if page.parents[1] in BUNDLES else BUNDLES


def setting_on(page, name):
    """`setting_of` in the first config that has it, of those that a page is about."""
    found = (setting_of(parser, name) for bundle in bundles_of(page) for parser in configs_of(bundle))
    return next((setting for setting in found if setting[0]), (False, None))


def options_in_text(text):
    """`--name value` of inline code; the value None where nothing follows the name."""
    for span in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
        words = shlex.split(span.replace("\n", " ")) if span.startswith("--") else []
        for word, following in zip(words, [*words, "--"][1:], strict=False):
            if word.startswith("--"):
                yield word[2:], None if following.startswith("--") else following


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_in_the_text_are_settings_and_spelled_right(page):
    text = page.read_text(encoding="utf-8")
    own = {*inspect.signature(monai_commands.run).parameters, *package_options()}
    found = []
    for name, value in options_in_text(text):
        known, default = setting_on(page, name)
        if not known and name.replace("-", "_") not in own:
            found.append(f"--{name}: no setting, and no option of a command")
        if value is not None:
            found += value_problems(name, fire.parser.DefaultParseValue(value), default)
    assert found == []


def package_options():
    """Names of the options of the package's commands."""
    return {name for command in COMMANDS.values() for name in command.signature.parameters}


def settings_table(page):
    """Names and default of each row below the head `| setting | default | ...`."""
    rows = page.read_text(encoding="utf-8").split("| setting | default |")[1].split("\n\n")[0].splitlines()[2:]
    for row in rows:
        names, default = re.split(r"(?<!\\)\|", row)[1:3]
        yield re.findall(r"`([^`]+)`", names), default.strip()


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)
def test_table_of_settings_is_that_of_the_config(bundle):
    """Every name is a setting; a default that is code and stands alone is the config's."""
    page, [train, *_] = bundle / "docs" / "README.md", configs_of(bundle)
    for names, default in settings_table(page):
        assert names and [name for name in names if not setting_on(page, name)[0]] == []
        code = re.fullmatch(r"`([^`]+)`", default)
        if code and len(names) == 1 and names[0] in train:
            value = fire.parser.DefaultParseValue(shlex.split(code[1])[0] if code[1].startswith("'") else code[1])
            assert (None if value == "$None" else value) == train[names[0]], names[0]


# The checks above find what they are for


RUN = "python -m monai.bundle run --bundle_root bundles/box_prior --config_file bundles/box_prior/configs/train.json"


@pytest.mark.parametrize(
    ("line", "word"),
    [
        (f"{RUN} --epochs 3 --whole_image", "whole_image"),
        (f"{RUN} --max_epoch 3", "max_epoch"),
        (f"{RUN} --spacing '[1, 1, 1]'", "spacing_mm"),
        (f"{RUN} --network_def#chanels '[4, 8]'", "chanels"),
        (f"{RUN} --slice_axis None", "'$None'"),
        (f"{RUN} --slice_axis null", "'$None'"),
        (f"{RUN} --slice_axis none", "'$None'"),
        (f"{RUN} --box_mode null", "'$None'"),
        (f"{RUN} --cache_rate true", "True"),
        (f"{RUN} --epochs ten", "int"),
        (f"{RUN} --patch_size large", "list"),
        (f"{RUN} --epochs True", "int"),
        (RUN.replace("train.json", "training.json"), "no such file"),
        (RUN.replace(" run ", " runs "), "runs"),
        ("python -m monai.bundle run", "config_file"),
        (f"{RUN} --meta_file None", "'$None'"),
        (f"{RUN.replace(' run ', ' ckpt_export ')} --net_i network", "net_i"),
        ("torchrun --standalne -m monai.bundle run", "standalne"),
        ("torchrun --standalone -m monai.bundle run --config_file x.json", "x.json"),
        ("python -m medconstraints evaluate --datalist x.json", "evaluation"),
        ("python -m medconstraints discs --output runs/discs", "output_dir"),
        ("python -m medconstraints fit_filling --datalist x.json --num_clases 3", "num_clases"),
        ("python -m medconstraints fit_filling --datalist x.json --num_classes three", "num_classes"),
        ("python -m medconstraints fit_filling --num_classes 3", "datalist"),
        ("python -m medconstraints.reports.evaluation --datalist x.json", "not a module"),
        ("python benchmarks/box_prior_los.py", "no such script"),
        ("python benchmarks/box_prior_epoch.py --run 3", "--run"),
        ("make demos", "demos"),
        ("wget x", "wget"),
    ],
)
def test_a_wrong_line_is_found(line, word):
    [command] = commands_in(line)
    assert word in " ".join(problems(command))


def test_right_lines_pass_and_shell_errors_do_not():
    lines = [f"run='{RUN}'", "$run --slice_axis '$None' \\", "    --cache_rate 0.5  # half"]
    lines += ["""$run --device '$torch.device("cpu")'"""]
    assert [problems(command) for command in commands_in("\n".join(lines))] == [[], []]
    with pytest.raises(ValueError, match="unbound"):
        commands_in("$start --epochs 3")
    assert list(options_in_text("say `--overwrite true` or\n```\n`--no`\n```\n`--seed 1 --epochs`")) == [
        ("overwrite", "true"),
        ("seed", "1"),
        ("epochs", None),
    ]


# Resolved with a tiny cohort, and run to the end


def write_volumes(folder, num_classes, *, channels=1, spacing=(1.0, 1.0, 2.0), weak=False):
    """Seven volumes of labelled bars and `<folder>.json`; `weak` adds boxes for each slice, scribbles and sizes."""
    rng, entries, shape = np.random.default_rng(0), [], (24, 24, 12)
    folder.mkdir(parents=True)

    def save(name, array):
        nib.save(nib.Nifti1Image(array.astype(np.int16), np.diag([*spacing, 1.0])), folder / name)
        return f"{folder.name}/{name}"

    label, boxes = np.zeros(shape), []
    for number in range(1, num_classes):
        start, stop = [4, 6 * number - 4, 2], [20, 6 * number + 2, 10]
        label[tuple(map(slice, start, stop))] = number
        boxes += [{"class": number, "start": [*start[:2], z], "stop": [*stop[:2], z + 1]} for z in range(2, 10)]
    for index in range(34):
        images = [save(f"{index}_{i}.nii.gz", 50 * label + rng.normal(100, 5, shape)) for i in range(channels)]
        entry = {"image": images if channels > 1 else images[0], "label": save(f"{index}_label.nii.gz", label)}
        if weak:
            (folder / f"{index}.json").write_text(json.dumps({"coordinate_system": "voxel", "boxes": boxes}))
            sizes = {str(number): float((label == number).sum() * np.prod(spacing)) for number in range(1, num_classes)}
            entry["size_ml"] = {number: size / 1000 for number, size in sizes.items()}
            entry["boxes"] = f"{folder.name}/{index}.json"
            entry["scribble"] = save(f"{index}_scribble.nii.gz", np.where(rng.random(shape) < 0.1, label, 4))
        entries.append(entry | {"patient": f"patient{index // 2 + 1:03d}"})
    steering = entries[8:18]  # of five patients
    datalist = {"training": entries[:8], "validation": steering, "guide": steering, "confirm": entries[18:28]}
    datalist["test"] = entries[28:]
    folder.with_suffix(".json").write_text(json.dumps(datalist))


def write_classes(folder):
    """Twelve images of two classes in an npz file, and `classes.json`."""
    rng = np.random.default_rng(0)
    np.savez(folder / "classes.npz", images=rng.random((12, 28, 28)) * 255, labels=np.arange(12) % 2)
    entry = {"npz": "classes.npz", "images": "images", "labels": "labels"}
    (folder / "classes.json").write_text(json.dumps({name: [entry] for name in ("training", "validation", "test")}))


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A folder like that of a reader who types the commands: the bundles, and data where the documents say."""
    place = tmp_path_factory.mktemp("reader")
    for bundle in BUNDLES:
        copied = place / "bundles" / bundle.name
        shutil.copytree(bundle, copied, ignore=shutil.ignore_patterns("output", "__pycache__"))
        write_volumes(copied / "data" / "datalist", 3)
        write_classes(copied / "data")
    write_volumes(place / "data" / "hippocampus", 3)
    write_volumes(place / "data" / "acdc", 4, spacing=(2.0, 2.0, 8.0))
    write_volumes(place / "my" / "datalist", 2, weak=True)
    write_volumes(place / "my" / "segmented", 3)
    write_volumes(place / "my" / "lesions", 2, channels=2)
    (place / "my" / "volumes").mkdir()
    shutil.copy(place / "my" / "datalist" / "20_0.nii.gz", place / "my" / "volumes" / "a.nii.gz")
    (place / "docs" / "results").mkdir(parents=True)
    return place


def bundle_run(command):
    """Configs and options of a command that runs a bundle; None for other commands."""
    words = list(command.words)
    start = words.index("-m") if "-m" in words else len(words)
    if words[start + 1 : start + 3] != ["monai.bundle", "run"]:
        return None
    _, arguments, _ = monai_problems(words[start + 2 :], command.folder)
    return files_of(arguments, "config_file"), arguments


def small(configs, options, folder):
    """Options that make a run tiny, as far as its config has them."""
    parser = merge([folder / file for file in configs])
    given = options.get("patch_size", parser["patch_size"])  # an expression in what asks the weights, for volumes
    patch = [32, 32] if isinstance(given, list) and len(given) == 2 else [16, 16, 16]
    wanted = {"epochs": 1, "val_interval": 1, "cache_rate": 0.0, "patch_size": patch, "batch_size": 2, "num_workers": 0}
    wanted |= {"guide_fraction": 0.5, "as_trained": False}  # shipped weights had larger patches
    read = {name for name in wanted if f"@{name}" in json.dumps(parser.get())}
    return {name: value for name, value in wanted.items() if name in read} | {"device": "$torch.device('cpu')"}


RUNS = [command for command in WRITTEN if bundle_run(command)]


@pytest.fixture
def _quiet(monkeypatch):
    """Nothing of a run stays: search path, words, hook, threads."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("command", RUNS, ids=str)
def test_run_can_be_made(command, reader, tmp_path, monkeypatch):
    """Everything up to the start: the engine with its networks, losses, transforms and handlers, for these options."""
    monkeypatch.chdir(reader / command.folder)
    configs, options = bundle_run(command)
    if command.words[0] == "torchrun":
        pytest.skip("one process is not several: see the slow tests")
    write_what_other_commands_write(options)
    options = options | small(configs, options, Path()) | {"output_dir": str(tmp_path / "run")}
    workflow = create_workflow(logging_file=False, **options)
    run = str(workflow.parser["run"])
    engine = re.search(r"@([\w#:]+)\.run\(", run)
    parts = [engine[1]] if engine else [*{*re.findall(r"@([\w#]+)", run)}]  # a stage without an engine
    assert all(workflow.parser.get_parsed_content(part) is not None for part in parts)


def write_what_other_commands_write(options):
    """Files of other commands of the page that the configs look for."""
    entries = [{"image": "a.nii", "label": "b.nii"}] * 4
    contents = {
        "datalist": {"training": entries, "validation": entries, "test": entries},
        "common_bounds": {"bounds": [[100, 200]], "unit": "voxel"},
    }
    for name in contents.keys() & options.keys():
        path = Path(options[name])
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(json.dumps(contents[name]))


def with_options(words, options):
    """The words with the values of some options replaced, or added."""
    kept = []
    for word in words:
        known = kept and kept[-1].startswith("--") and kept[-1][2:].replace("-", "_") in options
        kept = kept[:-1] if known else [*kept, word]
    return kept + [part for name, value in options.items() for part in (f"--{name}", str(value))]


def run_command(command, place):
    """Run it for real, made tiny by options behind its own."""
    words, folder = list(command.words), place / command.folder
    if found := bundle_run(command):
        words = with_options(words, {"logging_file": False} | small(found[0], found[1], folder))
    elif words[2:4] == ["medconstraints", "discs"]:
        words = with_options(words, {"num_training": 4, "num_validation": 2, "size": 64, "radius": 10})
    os.chdir(folder)
    if words[0] == "torchrun":
        words = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return
    sys.argv = [words[2], *words[3:]]
    try:
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, words


NEEDS_A_DATA_SET = {"check_dataset", "make_datalist"}


@pytest.mark.slow
@pytest.mark.usefixtures("_quiet")
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands_of(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_commands_run_in_their_order(page, reader, tmp_path, monkeypatch):
    """All of a page on tiny data, so that one command finds what another has written."""
    place = tmp_path / "reader"
    shutil.copytree(reader, place)
    shutil.rmtree(place / "runs", ignore_errors=True)
    monkeypatch.chdir(place)
    for command in commands_of(page):
        started = command.words[:2] == ("python", "-m") or command.words[0] == "torchrun"
        if started and not NEEDS_A_DATA_SET & {*command.words}:
            run_command(command, place)
