"""What every bundle promises: the model zoo's files, metadata and formatting, MONAI's commands, a folder on its own."""

import configparser
import json
import os
import pydoc
import re
import shutil
from pathlib import Path

import pytest
import torch
from monai.bundle import (
    ConfigComponent,
    ConfigExpression,
    ConfigParser,
    ReferenceResolver,
    ckpt_export,
    verify_metadata,
)
from monai.bundle.scripts import verify_net_in_out

from medconstraints import __version__

ROOT = Path(__file__).parents[2]
BUNDLES = sorted(path.parent.parent for path in ROOT.glob("bundles/*/configs/metadata.json"))
SAME = (
    "LICENSE",
    "configs/evaluate.json",
    "configs/multi_gpu_train.json",
    "configs/logging.conf",
)
FILES = (
    *SAME,
    "configs/inference.json",
    "configs/metadata.json",
    "configs/train.json",
    "docs/README.md",
    "docs/data_license.txt",
    "models/model.pt",
)
# Settings and components that the zoo and programs that use bundles ask for by name.
IDS = {
    "train": (
        *("bundle_root", "device", "dataset_dir", "output_dir", "val_interval", "network_def"),
        *("train#trainer", "train#trainer#max_epochs", "train#dataset", "train#inferer", "train#handlers"),
        *("validate#evaluator", "validate#handlers", "validate#dataset", "validate#inferer"),
    ),
    "inference": (
        *("bundle_root", "device", "dataset_dir", "output_dir", "network_def"),
        *("dataset", "inferer", "evaluator"),
    ),
}
LARGEST_WEIGHTS = 5 * 2**20
MOST_LINES, MOST_REFERENCES = 220, 60
LARGER = {
    "curriculum_size": 1.7,
    "e2e_augmentation": 1.5,
    "lookahead_adversarial": 1.5,
}  # further networks and optimizers

pytestmark = pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)


def read(bundle, name):
    return json.loads((bundle / "configs" / f"{name}.json").read_text(encoding="utf-8"))


def merged(bundle, *names):
    parser = ConfigParser()
    parser.read_config([str(bundle / "configs" / f"{name}.json") for name in names])
    return parser


def network_of(bundle):
    """The network of inference with the bundle's weights."""
    network = merged(bundle, "inference").get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(bundle / "models" / "model.pt", map_location="cpu", weights_only=True))
    return network


# Files


def test_files_are_there_and_its_own(bundle):
    """No links, and no path of a computer in a config."""
    assert [name for name in FILES if not (bundle / name).is_file() or not (bundle / name).stat().st_size] == []
    assert not [path for path in bundle.rglob("*") if path.is_symlink()]
    for config in (bundle / "configs").iterdir():
        assert not re.search(r'"(/|~|\.\./)\w', config.read_text(encoding="utf-8")), config.name
    logging = configparser.ConfigParser()
    logging.read(bundle / "configs" / "logging.conf")
    assert {"loggers", "handlers", "formatters", "logger_root"} <= set(logging.sections())


def test_what_is_the_same_in_all_is_byte_identical(bundle):
    assert [name for name in SAME if (bundle / name).read_bytes() != (BUNDLES[0] / name).read_bytes()] == []
    own, first = (read(folder, "inference") | {"network_def": None} for folder in (bundle, BUNDLES[0]))
    assert own == first  # the networks may differ


def test_json_is_formatted_as_the_zoo_does(bundle):
    """By `pretty-format-json --autofix --no-sort-keys --indent=4` of pre-commit-hooks."""
    found = {path.name: path.read_text(encoding="utf-8") for path in (bundle / "configs").glob("*.json")}
    assert [name for name, text in found.items() if text != json.dumps(json.loads(text), indent=4) + "\n"] == []


def test_training_reads_on_two_screens(bundle):
    config, share = read(bundle, "train"), LARGER.get(bundle.name, 1)
    assert len(json.dumps(config, indent=4).splitlines()) <= share * MOST_LINES
    assert len(re.findall("@[A-Za-z_]", json.dumps(config))) <= share * MOST_REFERENCES


def test_weights_are_small_and_load_with_care(bundle):
    assert (bundle / "models" / "model.pt").stat().st_size <= LARGEST_WEIGHTS
    state = network_of(bundle).state_dict()
    assert all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point())


# Metadata


def test_metadata_meets_the_schema(bundle):
    """The schema is MONAI's file, without a licence to pass it on: MONAI_BUNDLE_SCHEMA names a copy."""
    schema = os.environ.get("MONAI_BUNDLE_SCHEMA")
    if not schema:
        pytest.skip("MONAI_BUNDLE_SCHEMA does not name a copy of the schema, and tests do not download")
    assert Path(schema).is_file()  # verify_metadata would download it to there
    assert read(bundle, "metadata")["schema"].endswith(Path(schema).name)
    verify_metadata(meta_file=str(bundle / "configs" / "metadata.json"), filepath=schema)


def test_metadata_says_what_the_zoo_shows(bundle):
    metadata = read(bundle, "metadata")
    assert metadata["version"] in metadata["changelog"]
    assert " " in metadata["name"]  # a display name, not that of the folder
    assert metadata["intended_use"] and metadata["references"] and metadata["eval_metrics"]


def test_metadata_names_the_pinned_versions(bundle):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {name.lower(): version for name, version in (line.split("==") for line in lines if "==" in line)}
    metadata = read(bundle, "metadata")
    named = {
        "monai": metadata["monai_version"],
        "torch": metadata["pytorch_version"],
        "numpy": metadata["numpy_version"],
        **{name.lower(): version for name, version in metadata["required_packages_version"].items()},
    }
    assert named.pop("medconstraints") == __version__
    assert named == {name: pinned.get(name) for name in named}


def test_metadata_describes_the_network(bundle):
    metadata, config = read(bundle, "metadata"), inference_content(bundle)
    [image], [pred] = (metadata["network_data_format"][name].values() for name in ("inputs", "outputs"))
    assert image["is_patch_data"] and image["spatial_shape"] == config["patch_size"]
    assert pred["num_channels"] == config["num_classes"] == len(pred["channel_def"])
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(bundle / "configs" / "metadata.json"),
        config_file=str(bundle / "configs" / "inference.json"),
        device="cpu",
    )


# Configs


def inference_content(bundle):
    """What the inference takes from the shipped weights."""
    parser = merged(bundle, "inference")
    parser["bundle_root"] = str(bundle)
    return {key: parser.get_parsed_content(key) for key in ("patch_size", "num_classes", "spacing_mm")}


def config_sets(bundle):
    """Configs that are run alone, and each other config laid over inference (`inference_x`) or training."""
    names = sorted(path.stem for path in (bundle / "configs").glob("*.json"))
    overlays = [name for name in names if name not in ("train", "inference", "metadata")]
    alone = ["inference" if name.startswith("inference_") else "train" for name in overlays]
    return [["train"], ["inference"], *([base, name] for base, name in zip(alone, overlays, strict=True))]


def test_training_and_inference_agree(bundle):
    train, inference = read(bundle, "train"), read(bundle, "inference") | inference_content(bundle)
    for key in ("network_def", "patch_size", "num_classes", "spacing_mm"):
        assert train[key] == inference[key], key


def test_required_ids_are_there(bundle):
    for config, ids in IDS.items():
        parser = merged(bundle, config)
        assert [name for name in ids if name not in parser] == []


def test_configs_refer_only_to_what_is_there(bundle):
    """Every reference has its id, targets can be imported and expressions are Python, also where no run comes."""
    for names in config_sets(bundle):
        parser = merged(bundle, *names)
        parser.parse()
        for key, item in parser.ref_resolver.items.items():
            references = ReferenceResolver.find_refs_in_config(item.get_config(), id=key)
            for reference in references:
                assert reference in parser, f"{names}: {key} refers to @{reference}"
            if isinstance(item, ConfigExpression):
                compile(ReferenceResolver.update_refs_pattern(item.get_config(), references)[1:], key, "single")
            if isinstance(item, ConfigComponent):
                target = item.resolve_module_name()
                assert callable(target) or pydoc.locate(target), f"{names}: {key} has the target {target}"


@pytest.mark.parametrize("config", ["train", "inference"])
def test_has_monais_properties(bundle, config, make_workflow, tmp_path, monkeypatch):
    """Of a copied folder without data, as the zoo looks at it."""
    shutil.copytree(bundle / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    workflow = make_workflow(Path(), config)
    workflow.initialize()
    assert workflow.check_properties() == []


@pytest.mark.parametrize("config", ["train", "inference"])
def test_runs_can_be_tracked(bundle, config, make_workflow, tmp_path):
    """`--tracking mlflow` appends to the lists of handlers (MLflow itself is not needed to see this)."""
    workflow = make_workflow(bundle, config, tracking="mlflow", dataset_dir=tmp_path, output_dir=tmp_path / "run")
    lists = ["handlers"] if config == "inference" else ["train#handlers", "validate#handlers"]
    assert all(workflow.parser[handlers][-1]["_target_"] == "MLFlowHandler" for handlers in lists)
    assert "$import monai" in workflow.parser["imports"]


def test_exported_network_gives_the_same(bundle, tmp_path):
    configs = [str(bundle / "configs" / f"{name}.json") for name in ("train", "inference")]
    ckpt_export(
        net_id="network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(bundle / "models" / "model.pt"),
        meta_file=str(bundle / "configs" / "metadata.json"),
        config_file=configs,
    )
    files = {"inference.json": "", "train.json": "", "metadata.json": ""}
    exported = torch.jit.load(tmp_path / "model.ts", map_location="cpu", _extra_files=files)
    image = torch.randn(1, 1, *inference_content(bundle)["patch_size"])
    with torch.no_grad():
        torch.testing.assert_close(exported(image), network_of(bundle)(image))
    assert json.loads(files["inference.json"]) == read(bundle, "inference")
    assert json.loads(files["metadata.json"]).items() >= read(bundle, "metadata").items()
