"""What every bundle promises: files, metadata, MONAI's commands, and that its folder stands alone."""

import configparser
import json
import os
import pydoc
import re
import shutil
from pathlib import Path

import jsonschema
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
CONFIGS = ("train", "inference", "evaluate", "multi_gpu_train")
FILES = (
    "LICENSE",
    "configs/metadata.json",
    *(f"configs/{name}.json" for name in CONFIGS),
    "configs/logging.conf",
    "docs/README.md",
    "docs/data_license.txt",
    "models/model.pt",
)
REQUIRED_METADATA = (
    "schema",
    "version",
    "changelog",
    "monai_version",
    "pytorch_version",
    "numpy_version",
    "required_packages_version",
    "task",
    "description",
    "authors",
    "copyright",
    "network_data_format",
)
TENSOR_KEYS = {"type", "format", "num_channels", "spatial_shape", "dtype", "value_range"}
LARGEST_WEIGHTS = 5 * 2**20

pytestmark = pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)


def read(bundle, name):
    return json.loads((bundle / "configs" / f"{name}.json").read_text(encoding="utf-8"))


def network_of(bundle):
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "inference.json"))
    return parser.get_parsed_content("network_def").eval()


def fake_input(metadata):
    [image] = metadata["network_data_format"]["inputs"].values()
    return torch.randn(1, image["num_channels"], *image["spatial_shape"])


def pins():
    """Package name in lower case -> pinned version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {name.lower(): version for name, version in (line.split("==") for line in lines if "==" in line)}


# Files and metadata


@pytest.mark.parametrize("name", FILES)
def test_has_the_file(bundle, name):
    assert (bundle / name).is_file()
    assert (bundle / name).stat().st_size > 0


def test_files_are_its_own(bundle):
    """No links, and no path of this computer in a config."""
    assert not [path for path in bundle.rglob("*") if path.is_symlink()]
    for config in (bundle / "configs").iterdir():
        assert not re.search(r'"(/|~|\.\./)\w', config.read_text(encoding="utf-8")), config.name


def test_weights_are_small_and_load_with_care(bundle):
    path = bundle / "models" / "model.pt"
    assert path.stat().st_size <= LARGEST_WEIGHTS
    network = network_of(bundle)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    assert all(torch.isfinite(value).all() for value in network.state_dict().values() if value.is_floating_point())


def test_logging_conf(bundle):
    config = configparser.ConfigParser()
    config.read(bundle / "configs" / "logging.conf")
    assert {"loggers", "handlers", "formatters", "logger_root"} <= set(config.sections())


def test_metadata_has_the_required_keys(bundle):
    metadata = read(bundle, "metadata")
    assert set(REQUIRED_METADATA) <= set(metadata)
    assert metadata["version"] in metadata["changelog"]
    assert metadata["name"] == bundle.name
    assert re.fullmatch(r"https://\S+/meta_schema_\d+\.json", metadata["schema"])
    for tensors in metadata["network_data_format"].values():
        assert all(set(tensor) >= TENSOR_KEYS for tensor in tensors.values())


def test_metadata_names_the_pinned_versions(bundle):
    metadata, pinned = read(bundle, "metadata"), pins()
    named = {
        "monai": metadata["monai_version"],
        "torch": metadata["pytorch_version"],
        "numpy": metadata["numpy_version"],
        **{name.lower(): version for name, version in metadata["required_packages_version"].items()},
    }
    assert named.pop("medconstraints") == __version__
    assert named == {name: pinned.get(name) for name in named}


def test_metadata_meets_the_schema(bundle):
    """The schema is MONAI's file, which is not part of this repository: MONAI_BUNDLE_SCHEMA names a copy."""
    schema = os.environ.get("MONAI_BUNDLE_SCHEMA")
    if not schema or not Path(schema).is_file():
        pytest.skip("MONAI_BUNDLE_SCHEMA does not name a copy of the schema, and tests do not download")
    jsonschema.validate(read(bundle, "metadata"), json.loads(Path(schema).read_text(encoding="utf-8")))
    verify_metadata(meta_file=str(bundle / "configs" / "metadata.json"), filepath=schema)


# Configs


def test_training_and_inference_agree(bundle):
    train, inference = read(bundle, "train"), read(bundle, "inference")
    for key in ("network_def", "patch_size", "num_classes", "spacing_mm"):
        assert train.get(key) == inference.get(key), key
    assert "network_def" in train


def test_metadata_describes_the_network(bundle):
    formats, config = read(bundle, "metadata")["network_data_format"], read(bundle, "inference")
    [image], [pred] = formats["inputs"].values(), formats["outputs"].values()
    if image.get("is_patch_data"):
        assert image["spatial_shape"] == config["patch_size"]
    assert pred["num_channels"] == config["num_classes"] == len(pred["channel_def"])


def config_sets(bundle):
    """Configs that are run alone, and each other config laid over inference (`inference_x`) or training."""
    names = sorted(path.stem for path in (bundle / "configs").glob("*.json"))
    overlays = [name for name in names if name not in ("train", "inference", "metadata")]
    alone = ["inference" if name.startswith("inference_") else "train" for name in overlays]
    return [["train"], ["inference"], *([base, name] for base, name in zip(alone, overlays, strict=True))]


def test_configs_refer_only_to_what_is_there(bundle):
    """Every reference has its id, targets can be imported and expressions are Python, also where no run comes."""
    for names in config_sets(bundle):
        parser = ConfigParser()
        parser.read_config([str(bundle / "configs" / f"{name}.json") for name in names])
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
def test_has_monais_properties(bundle, config, make_workflow, two_class_cohort, tmp_path):
    source = two_class_cohort.parent if config == "train" else two_class_cohort
    workflow = make_workflow(bundle, config, dataset_dir=source, output_dir=tmp_path / "run")
    workflow.initialize()
    assert workflow.check_properties() == []


@pytest.mark.parametrize("config", ["train", "inference"])
def test_runs_can_be_tracked(bundle, config, make_workflow, tmp_path):
    """`--tracking mlflow` appends to the lists of handlers (MLflow itself is not needed to see this)."""
    output = tmp_path / "run"
    workflow = make_workflow(bundle, config, tracking="mlflow", dataset_dir=tmp_path, output_dir=output)
    lists = ["handlers"] if config == "inference" else ["train#handlers", "validate#handlers"]
    assert all(workflow.parser[handlers][-1]["_target_"] == "MLFlowHandler" for handlers in lists)
    assert "monai.utils.path_to_sqlite_uri" in workflow.parser["tracking_uri"]
    assert "$import monai" in workflow.parser["imports"]


# Commands


def verify(folder):
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(folder / "configs" / "metadata.json"),
        config_file=str(folder / "configs" / "inference.json"),
        device="cpu",
    )


def test_network_meets_its_metadata(bundle):
    verify(bundle)


@pytest.mark.parametrize("change", ["channels", "dtype"])
def test_a_network_that_does_not_is_found(bundle, change, tmp_path):
    """The check above can fail."""
    folder = tmp_path / bundle.name
    shutil.copytree(bundle / "configs", folder / "configs")
    metadata = read(bundle, "metadata")
    metadata["network_data_format"]["outputs"]["pred"] |= (
        {"num_channels": 7} if change == "channels" else {"dtype": "float64"}
    )
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="match"):
        verify(folder)


def test_folder_works_elsewhere(bundle, tmp_path, monkeypatch):
    """A user copies one folder and runs it from there."""
    folder = tmp_path / "copied"
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("output", "__pycache__"))
    monkeypatch.chdir(folder)
    for names in config_sets(folder):
        parser = ConfigParser()
        parser.read_config([f"configs/{name}.json" for name in names])
        parser.parse()
        assert parser["bundle_root"] == "."
    verify(Path())


def test_exported_network_gives_the_same(bundle, tmp_path):
    """With the bundle's weights, or with random ones as long as it has none."""
    network, weights = network_of(bundle), bundle / "models" / "model.pt"
    if weights.is_file():
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    else:
        weights = tmp_path / "model.pt"
        torch.save(network.state_dict(), weights)
    ckpt_export(
        net_id="network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(weights),
        meta_file=str(bundle / "configs" / "metadata.json"),
        config_file=[str(bundle / "configs" / f"{name}.json") for name in ("train", "inference")],
    )
    files = {"inference.json": "", "train.json": "", "metadata.json": ""}
    exported = torch.jit.load(tmp_path / "model.ts", map_location="cpu", _extra_files=files)
    image = fake_input(read(bundle, "metadata"))
    with torch.no_grad():
        torch.testing.assert_close(exported(image), network(image))
    assert json.loads(files["inference.json"]) == read(bundle, "inference")
    assert json.loads(files["metadata.json"]).items() >= read(bundle, "metadata").items()
