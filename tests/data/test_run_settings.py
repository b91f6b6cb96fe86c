"""What a run was told: options that would be misread stop it, and its settings stand beside its results."""

import json

import pytest
from monai.bundle import ConfigWorkflow, run

from medconstraints.data import (
    CohortDataset,
    MissingData,
    cohort_items,
    inference_items,
    read_settings,
    run_settings,
    start_inference,
    write_settings,
)

CONFIG = {
    "imports": ["$import medconstraints.data as data"],
    "bundle_root": ".",
    "dataset_dir": "$@bundle_root + '/data'",
    "datalist": "$@dataset_dir + '/datalist.json'",
    "output_dir": "$@bundle_root + '/output'",
    "alpha": 0.5,
    "epochs": 2,
    "unread": 1,
    "overwrite": False,
    "slice_axis": 1,
    "classes": None,
    "patch_size": [8, 8],
    "schedule": "rebalance",
    "optimizer": {"_target_": "torch.optim.Adam", "lr": "@alpha"},
    "train": {"handlers": {"free": 1}, "random_transforms": ["flip"]},
    "compared": "$data.run_settings()",
    "reads": "$[@datalist, @epochs, @overwrite, @slice_axis, @classes, @patch_size, @schedule]",
    "reads_too": "$[@optimizer, @train#random_transforms]",
    "initialize": ["$data.check_options()"],
    "run": ["$data.start_run(@output_dir)"],
}


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "bundle" / "configs" / "train.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(CONFIG))
    return file


def told(config_file, tmp_path, **options):
    """The settings a run writes."""
    datalist = tmp_path / "datalist.json"
    datalist.write_text("{}")
    options = {"output_dir": str(tmp_path / "run"), "datalist": str(datalist), **options}
    run(config_file=str(config_file), logging_file=False, **options)
    return read_settings(tmp_path / "run")["settings"]


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("alpha", 2, 2),
        ("overwrite", True, True),
        ("slice_axis", "$None", None),
        ("classes", {"organ": 1}, {"organ": 1}),
        ("classes", "some_file.json", "some_file.json"),
        ("patch_size", [4, 4], [4, 4]),
        ("patch_size", "$[4, 4]", [4, 4]),
        ("schedule", "constant", "constant"),
    ],
)
def test_an_option_arrives_as_it_was_meant(config_file, tmp_path, option, value, expected):
    found = told(config_file, tmp_path, **{option: value})
    assert found[option] == expected
    assert found["output_dir"] == str(tmp_path / "run")


@pytest.mark.parametrize(
    ("option", "value"), [("optimizer#lr", 0.25), ("optimizer#betas", 0.25), ("train#random_transforms#0", "turn")]
)
def test_entries_of_components_and_lists_can_be_set(config_file, tmp_path, option, value):
    told(config_file, tmp_path, **{option: value})


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("alpah", 1.0, ["--alpah", "no setting", "--alpha"]),
        ("train#random_transform", [], ["no setting", "--random_transforms"]),
        ("slice_axis", None, ["--slice_axis None", "dropped", "'$None'"]),
        ("slice_axis", "null", ["--slice_axis null", "'$None'"]),
        ("slice_axis", "none", ["'$None'"]),
        ("overwrite", "false", ["--overwrite false", "--overwrite False"]),
        ("overwrite", "true", ["--overwrite True"]),
        ("overwrite", 1, ["True or False", "1"]),
        ("classes", "null", ["'$None'"]),
        ("alpha", "0,5", ["a number", "'0,5'"]),
        ("alpha", True, ["a number", "True"]),
        ("patch_size", "8x8", ["a list", "'8x8'"]),
        ("schedule", "False", ["--schedule False"]),
        ("output_dir", "runs/a::b", ["separator"]),
        ("epochs", 1.5, ["a whole number", "1.5"]),
        ("epochs", [1, 2], ["a whole number"]),
        ("patch_size", 8, ["a list", "8"]),
        ("optimizer", "adam", ["a mapping", "'adam'"]),
        ("unread", 2, ["--unread: is not used with train.json"]),
    ],
)
def test_an_option_that_would_be_misread_stops_the_run(config_file, tmp_path, option, value, words):
    with pytest.raises(RuntimeError) as caught:
        told(config_file, tmp_path, **{option: value})
    message = str(caught.value.__cause__)
    assert isinstance(caught.value.__cause__, ValueError)
    assert all(word in message for word in words)
    assert not (tmp_path / "run").exists()


def test_a_folder_named_by_a_number_is_told_how_to_write_it(config_file, tmp_path):
    with pytest.raises(RuntimeError) as caught:
        run(config_file=str(config_file), logging_file=False, output_dir=2024)
    assert "--output_dir 2024: is passed on as a number; write --output_dir ./2024" in str(caught.value.__cause__)


def test_all_faults_are_told_at_once(config_file, tmp_path):
    with pytest.raises(RuntimeError) as caught:
        told(config_file, tmp_path, alpha="x", overwrite="true")
    assert "--alpha" in str(caught.value.__cause__)
    assert "--overwrite" in str(caught.value.__cause__)


def test_a_workflow_made_in_python_is_checked_too(config_file, tmp_path):
    datalist = tmp_path / "datalist.json"
    datalist.write_text("{}")
    options = {"output_dir": str(tmp_path / "run"), "datalist": str(datalist), "slice_axis": None}  # None arrives here
    workflow = ConfigWorkflow(str(config_file), logging_file=False, **options)
    workflow.initialize()
    workflow.run()
    assert read_settings(tmp_path / "run")["settings"]["slice_axis"] is None
    for wrong in ({"alpah": 1.0}, {"overwrite": "false"}):
        with pytest.raises(RuntimeError) as caught:
            ConfigWorkflow(str(config_file), logging_file=False, **options, **wrong).initialize()
        assert next(iter(wrong)) in str(caught.value.__cause__)


def compared(config_file, **options):
    workflow = ConfigWorkflow(str(config_file), logging_file=False, **options)
    workflow.initialize()
    return workflow.parser.get_parsed_content("compared")


def test_settings_of_a_run_that_goes_on(config_file, tmp_path):
    cases = tmp_path / "datalist.json"
    cases.write_text(json.dumps({"training": [{"image": "a.nii"}], "validation": []}))
    base = compared(config_file, datalist=str(cases))
    same = {"output_dir": "elsewhere", "epochs": 100, "train#handlers#free": 2, "bundle_root": "moved"}
    assert compared(config_file, datalist=str(cases), **same) == base
    for option in ("alpha", "slice_axis", "optimizer#lr", "train#random_transforms"):
        changed = compared(config_file, datalist=str(cases), **{option: 7})
        assert {name for name in base if changed.get(name) != base[name]} >= {option}
    for section in ("training", "validation"):
        other = {"training": [{"image": "a.nii"}], "validation": []} | {section: [{"image": "b.nii"}]}
        cases.write_text(json.dumps(other))
        changed = compared(config_file, datalist=str(cases))
        differ = {name for name in {*base, *changed} if changed.get(name) != base.get(name)}
        assert differ == {f"{section} case 0 of the datalist"}


def test_a_patch_that_the_strides_do_not_divide_is_refused(config_file, tmp_path):
    (tmp_path / "datalist.json").write_text("{}")
    config = CONFIG | {
        "datalist": str(tmp_path / "datalist.json"),
        "patch_size": [48, 64],
        "network_def": {"_target_": "UNet", "strides": [2, 2, 2]},
    }
    config_file.write_text(json.dumps(config | {"run": ["$data.start_run(@output_dir)"]}))
    run(config_file=str(config_file), logging_file=False, output_dir=str(tmp_path / "one"))
    with pytest.raises(Exception) as caught:
        run(config_file=str(config_file), logging_file=False, output_dir=str(tmp_path / "two"), patch_size=[48, 60])
    assert "patch_size: expected multiples of 8" in str(caught.value.__cause__ or caught.value)
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("share", [5, -0.1, True, "1"])
def test_a_cache_rate_is_a_share(tmp_path, share):
    with pytest.raises(ValueError, match="cache_rate: expected"):
        CohortDataset(tmp_path / "datalist.json", "training", [], cache_rate=share)


def test_warns_of_volumes_that_train_and_validate(config_file, tmp_path, caplog):
    cases = tmp_path / "datalist.json"
    cases.write_text(
        json.dumps({"training": [{"image": "a.nii"}, "b.nii"], "validation": ["b.nii", {"image": "c.nii"}]})
    )
    config_file.write_text(json.dumps(CONFIG | {"datalist": str(cases), "run": ["$data.start_run(@output_dir)"]}))
    run(config_file=str(config_file), logging_file=False, output_dir=str(tmp_path / "run"))
    assert "1 volumes, such as b.nii, are in training and in validation" in caplog.text
    caplog.clear()
    rows = {name: [{"npz": "a.npz", "images": name, "labels": "b"}] for name in ("training", "validation")}
    cases.write_text(json.dumps(rows))
    run(config_file=str(config_file), logging_file=False, output_dir=str(tmp_path / "rows"))
    assert "are in training and in validation" not in caplog.text


def test_settings_carry_those_of_the_training(config_file, tmp_path):
    told(config_file, tmp_path, alpha=0.75)
    weights = str(tmp_path / "run" / "model.pt")
    config = {**CONFIG, "ckpt_path": weights, "run": ["$data.write_settings(@output_dir, @ckpt_path)"]}
    config_file.write_text(json.dumps(config))
    run(config_file=str(config_file), logging_file=False, output_dir=str(tmp_path / "masks"))
    found = read_settings(tmp_path / "masks")
    assert found["settings"]["alpha"] == 0.5
    assert found["training"]["settings"]["alpha"] == 0.75


def test_an_inference_that_contradicts_its_training_is_refused(config_file, tmp_path):
    told(config_file, tmp_path, patch_size=[4, 4])
    start = "$data.start_inference([], @output_dir, @ckpt_path, as_trained=@as_trained)"
    config = {**CONFIG, "ckpt_path": str(tmp_path / "run" / "model.pt"), "as_trained": True, "run": [start]}
    config_file.write_text(json.dumps(config))
    options = {"config_file": str(config_file), "logging_file": False, "output_dir": str(tmp_path / "masks")}
    with pytest.raises(RuntimeError) as caught:
        run(**options)
    expected = 'patch_size is [8, 8], but the weights were trained with [4, 4]: write --patch_size "[4, 4]"'
    assert expected in str(caught.value.__cause__) and not (tmp_path / "masks").exists()
    (tmp_path / "masks").mkdir()
    run(**options, as_trained=False)
    run(**options, patch_size=[4, 4])


def test_outside_of_a_run_there_is_nothing_to_tell(tmp_path):
    assert run_settings() == {}
    write_settings(tmp_path)
    assert read_settings(tmp_path) is None


def test_cases_that_are_not_there(tmp_path):
    items = cohort_items(tmp_path / "datalist.json", "training")
    assert isinstance(items, MissingData)
    assert len(items) == 1
    with pytest.raises(FileNotFoundError, match="datalist"):
        items[0]


def test_volumes_that_are_not_there_stop_an_inference_before_it_writes(tmp_path):
    volumes = inference_items(tmp_path / "nothing", output_dir=tmp_path / "masks")
    assert len(volumes) == 1
    with pytest.raises(FileNotFoundError, match="nothing"):
        start_inference(volumes, tmp_path / "masks")
    assert not (tmp_path / "masks").exists()


def test_other_files_of_the_same_names_are_another_cohort(config_file, tmp_path):
    """Every cohort of phantoms has an imagesTr/phantom_000.nii.gz; a folder that was moved is the same cohort."""
    found = {}
    for name, content in (("a", b"1"), ("b", b"2"), ("moved", b"1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.nii").write_bytes(content * 10)
        entries = {"training": [{"image": "x.nii"}], "validation": ["x.nii"]}
        (tmp_path / name / "datalist.json").write_text(json.dumps(entries))
        found[name] = compared(config_file, datalist=str(tmp_path / name / "datalist.json"))
    assert found["moved"] == found["a"]
    changed = {name for name in found["a"] if found["b"][name] != found["a"][name]}
    assert changed == {"training case 0 of the datalist", "validation case 0 of the datalist"}
    assert found["a"]["training case 0 of the datalist"].startswith("x.nii ")


@pytest.mark.parametrize(
    ("option", "free"),
    [
        ("train#dataset#drop", False),
        ("train#dataset#cache_rate", True),
        ("train#monitors#weights#increment", False),
        ("train#inferer#size", False),
        ("train#trainer#accumulation_steps", False),
        ("train#trainer#max_epochs", True),
        ("train#trainer#num_workers", True),
        ("train#handlers#extra", True),
    ],
)
def test_parts_of_the_training_that_may_change(config_file, option, free):
    train = {
        "dataset": {"drop": 1, "cache_rate": 1},
        "monitors": {"weights": {"increment": 1}},
        "inferer": {"size": 1},
        "trainer": {"accumulation_steps": 1, "max_epochs": 1, "num_workers": 1},
        "handlers": {"extra": 1},
    }
    config_file.write_text(json.dumps(CONFIG | {"train": train, "reads_too": "$[@optimizer, @train]"}))
    assert (compared(config_file, **{option: 2}) == compared(config_file)) == free


@pytest.mark.parametrize("way", ["python", "overlay", "nested"])
def test_a_separator_in_a_path_is_refused_wherever_it_comes_from(config_file, tmp_path, way):
    wrong = str(tmp_path / "runs#2")
    overlay = tmp_path / "overlay.json"
    content = {"optimizer#path": wrong} if way == "nested" else {"output_dir": wrong}
    overlay.write_text(json.dumps({} if way == "python" else content))
    options = {"output_dir": wrong} if way == "python" else {}
    workflow = ConfigWorkflow([str(config_file), str(overlay)], logging_file=False, **options)
    with pytest.raises(RuntimeError) as caught:
        workflow.initialize()
    assert "separator" in str(caught.value.__cause__)
