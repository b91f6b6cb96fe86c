"""Inference where one bad volume does not stop the others, and says why it is bad."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, MetaTensor
from monai.transforms import Compose, Lambdad
from torch import nn

from medconstraints.engines import TolerantDataset, TolerantEvaluator, collate_or_failure


class LoadError(ValueError):
    """What a loading transform raises."""


def load(path):
    """An image full of the number in its name; "bad" files cannot be loaded."""
    if "bad" in str(path):
        raise LoadError(f"{path}: is truncated\nand more lines")
    number = float("".join(c for c in str(path).split("/")[-1] if c.isdigit()))
    return MetaTensor(torch.full((1, 4, 4), number), meta={"filename_or_obj": str(path)})


class Network(nn.Module):
    """Fails for images full of 13."""

    def forward(self, x):
        if (x == 13).any():
            raise RuntimeError("out of memory")
        return x + 1


def postprocess(pred):
    """Fails for predictions of 101."""
    if (pred == 101).any():
        raise OSError(28, "No space left on device")
    return pred * 2


@pytest.fixture
def make_evaluator():
    def make(names, *, network=None, batch_size=1, handlers=(), **more):
        data = TolerantDataset([{"image": f"/data/{name}"} for name in names], Compose([Lambdad("image", load)]))
        return TolerantEvaluator(
            device=torch.device("cpu"),
            val_data_loader=DataLoader(data, batch_size=batch_size, collate_fn=collate_or_failure),
            network=network or Network(),
            postprocessing=Compose([Lambdad("pred", postprocess)]),
            val_handlers=list(handlers),
            **more,
        )

    return make


def test_dataset_gives_the_failure_instead_of_raising():
    data = TolerantDataset([{"image": "1.nii"}, {"image": "bad.nii"}], Compose([Lambdad("image", load)]))
    assert float(data[0]["image"].mean()) == 1
    failed = {
        "name": "bad.nii",
        "mask": "",
        "file": "bad.nii",
        "state": "failed",
        "reason": "LoadError: bad.nii: is truncated",
    }
    assert data[1] == failed
    other = TolerantDataset([{"scan": "bad.nii"}], Compose([Lambdad("scan", load)]), image_key="scan")
    assert other[0] == failed


@pytest.mark.parametrize(("key", "state"), [("refused", "failed"), ("left_out", "left out"), ("kept", "kept")])
def test_dataset_does_not_read_what_is_not_to_be_segmented(key, state):
    data = TolerantDataset([{"image": "bad.nii", "name": "sub/bad.nii", key: "why"}], Compose([Lambdad("image", load)]))
    assert data[0] == {"name": "sub/bad.nii", "mask": "", "file": "bad.nii", "state": state, "reason": "why"}


def test_collate():
    item, failure = {"image": torch.zeros(1, 2)}, {"state": "failed", "reason": "why", "name": "a", "mask": ""}
    assert collate_or_failure([item])["image"].shape == (1, 1, 2)
    assert collate_or_failure([item, item])["image"].shape == (2, 1, 2)
    assert collate_or_failure([failure]) == failure
    with pytest.raises(ValueError, match="batch_size: expected 1 for inference that survives bad files, got 2"):
        collate_or_failure([item, failure])


NAMES = ["bad2.nii.gz", "1.nii.gz", "3.nii.gz", "13.nii.gz", "5.nii.gz", "100.nii.gz", "7.nii.gz"]
FAILURES = {
    "bad2.nii.gz": "LoadError: /data/bad2.nii.gz: is truncated",
    "13.nii.gz": "RuntimeError: out of memory",
    "100.nii.gz": "OSError: [Errno 28] No space left on device",
}
DONE = [f"{i}.nii.gz" for i in (1, 3, 5, 7)]


def done(rows):
    return [row["name"] for row in rows if row["state"] == "done"]


def failures(rows):
    return {row["name"]: row["reason"] for row in rows if row["state"] == "failed"}


def test_the_others_are_done(make_evaluator, tmp_path, caplog):
    saved = []
    evaluator = make_evaluator(NAMES, output_dir=tmp_path / "made")

    def remember(engine):
        if isinstance(engine.state.output, list):
            saved.extend(float(output["pred"].mean()) for output in engine.state.output)

    evaluator.add_event_handler(Events.ITERATION_COMPLETED, remember)
    with caplog.at_level(logging.INFO, "medconstraints"):
        evaluator.run()
    assert saved == [4, 8, 12, 16]  # 2 (i + 1)
    assert done(evaluator.rows) == DONE and failures(evaluator.rows) == FAILURES and evaluator.exit_status == 1
    report = json.loads((tmp_path / "made" / "inference.json").read_text())["volumes"]
    assert done(report) == DONE and failures(report) == FAILURES and "/data" not in str([row["mask"] for row in report])
    assert [row["mask"] for row in report if row["state"] == "done"] == [f"{i}_seg.nii.gz" for i in (1, 3, 5, 7)]
    messages = [r.message for r in caplog.records if r.levelno == logging.ERROR]
    assert messages[0] == "bad2.nii.gz failed: LoadError: /data/bad2.nii.gz: is truncated"
    assert messages[-1].splitlines() == [
        "4 of 7 volumes done",
        *(f"  {name}: {reason}" for name, reason in FAILURES.items()),
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_output_that_is_not_finite_fails_its_volume(make_evaluator, value):
    """Its argmax would be a mask like any other."""

    class Spoilt(nn.Module):
        def forward(self, x):
            return x.clone().index_fill_(-1, torch.tensor([0]), value) if (x == 2).any() else x

    evaluator = make_evaluator(["1.nii", "2.nii"], network=Spoilt())
    evaluator.run()
    assert done(evaluator.rows) == ["1.nii"]
    assert [*failures(evaluator.rows)] == ["2.nii"] and "NaN or infinite" in failures(evaluator.rows)["2.nii"]


def test_all_done(make_evaluator, tmp_path, caplog):
    evaluator = make_evaluator(DONE, output_dir=tmp_path)
    with caplog.at_level(logging.INFO, "medconstraints"):
        evaluator.run()
    assert done(json.loads((tmp_path / "inference.json").read_text())["volumes"]) == DONE
    assert evaluator.exit_status == 0
    assert [(r.levelno, r.message) for r in caplog.records if r.name.startswith("medconstraints")] == [
        (logging.INFO, "4 of 4 volumes done")
    ]


def test_all_failing(make_evaluator, tmp_path):
    evaluator = make_evaluator([*FAILURES], output_dir=tmp_path)
    evaluator.run()
    assert evaluator.exit_status == 2
    assert failures(json.loads((tmp_path / "inference.json").read_text())["volumes"]) == FAILURES


def test_the_summary_is_told_before_a_report_that_cannot_be_written(make_evaluator, tmp_path, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "1_seg.nii.gz").write_bytes(b"former")
    monkeypatch.setattr("medconstraints.writing.os.replace", full)
    with pytest.raises(OSError, match=r"the disk is full, inference.json was not written"):
        make_evaluator(["1.nii", "bad2.nii"], output_dir=tmp_path).run()
    assert "1 of 2 volumes done" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["1_seg.nii.gz"]


def test_a_second_run_starts_a_new_report(make_evaluator):
    evaluator = make_evaluator(["1.nii", "bad2.nii"])
    evaluator.run()
    evaluator.run()
    assert done(evaluator.rows) == ["1.nii"] and len(evaluator.rows) == 2


def test_reason_is_the_cause_without_the_chain_around_it(make_evaluator):
    """MONAI wraps errors of transforms as 'applying transform ...', several times."""

    class Wrapping(nn.Module):
        def forward(self, x):
            try:
                try:
                    raise FloatingPointError("first line\nsecond line")
                except FloatingPointError as error:
                    raise RuntimeError("applying transform Inner") from error
            except RuntimeError as error:
                raise RuntimeError("applying transform Outer") from error

    evaluator = make_evaluator(["bad1.nii", "2.nii"], network=Wrapping())
    evaluator.run()
    assert failures(evaluator.rows)["2.nii"] == "FloatingPointError: first line"


def test_an_interrupt_is_no_bad_volume(make_evaluator):
    class Interrupted(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    evaluator = make_evaluator(["1.nii", "2.nii"], network=Interrupted())
    with pytest.raises(KeyboardInterrupt):
        evaluator.run()
    assert evaluator.rows == []


def test_unusual_file_names(make_evaluator, tmp_path):
    name = 'o\'neil "[1]" back\\slash größe.nii.gz'
    failing = name.replace("1", "13")
    evaluator = make_evaluator([name, failing], output_dir=tmp_path)
    evaluator.run()
    report = json.loads((tmp_path / "inference.json").read_text(encoding="utf-8"))["volumes"]
    assert done(report) == [name] and failures(report) == {failing: "RuntimeError: out of memory"}


def test_the_evaluator_makes_its_loader(make_evaluator):
    data = make_evaluator(NAMES).data_loader.dataset
    evaluator = TolerantEvaluator(device="cpu", network=Network(), dataset=data)
    evaluator.run()
    assert [row["name"] for row in evaluator.rows] == NAMES
    assert [*failures(evaluator.rows)] == ["bad2.nii.gz", "13.nii.gz"]  # nothing here fails for 101
    with pytest.raises(ValueError, match="dataset, val_data_loader"):
        TolerantEvaluator(device="cpu", network=Network())


def test_images_without_meta_data(make_evaluator):
    evaluator = make_evaluator(["1.nii"])
    evaluator.data_loader.dataset.transform = Compose([Lambdad("image", lambda path: torch.ones(1, 4, 4))])
    evaluator.run()
    assert done(evaluator.rows) == ["1.nii"]


def test_a_failing_volume_keeps_no_mask_that_looks_new(make_evaluator, tmp_path, caplog):
    """Of the old masks those of failing volumes are put aside; the saving transform replaces the others."""
    names = ["1.nii.gz", "bad2.nii.gz", "13.nii", "100.nii.gz"]
    old = [f"{name.split('.')[0]}_seg.nii.gz" for name in names] + ["unrelated_seg.nii.gz"]
    for name in old:
        (tmp_path / name).write_bytes(b"old " + name.encode())
    (tmp_path / "13_seg.nii.gz.old").write_bytes(b"older")
    make_evaluator(names, output_dir=tmp_path).run()
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "inference.json"}
    failed = old[1:4]
    assert found == {f"{n}.old" if n in failed else n: b"old " + n.encode() for n in old}
    assert "bad2.nii.gz: its mask of a former run is now called bad2_seg.nii.gz.old" in caplog.text


def test_the_facts_of_a_failing_volume_go_with_its_mask(make_evaluator, tmp_path):
    for name in ("bad2_seg.nii.gz", "bad2_seg.nii.gz.json"):
        (tmp_path / name).write_bytes(b"old")
    make_evaluator(["1.nii.gz", "bad2.nii.gz"], output_dir=tmp_path).run()
    assert {path.name for path in tmp_path.iterdir()} == {
        "inference.json",
        "bad2_seg.nii.gz.old",
        "bad2_seg.nii.gz.json.old",
    }


def test_masks_stay_without_an_output_folder_or_with_another_postfix(make_evaluator, tmp_path):
    (tmp_path / "bad2_seg.nii.gz").write_bytes(b"old")
    make_evaluator(["1.nii", "bad2.nii.gz"]).run()
    make_evaluator(["1.nii", "bad2.nii.gz"], output_dir=tmp_path, postfix="organ").run()
    assert {path.name for path in tmp_path.iterdir()} == {"bad2_seg.nii.gz", "inference.json"}


def test_the_report_of_a_former_run_goes_with_the_start(make_evaluator, tmp_path):
    """A run that is killed leaves no report; one that has wrong weights leaves the old one."""
    report = tmp_path / "inference.json"

    class Killed(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    class WrongWeights:
        def attach(self, engine):
            engine.add_event_handler(Events.STARTED, self)

        def __call__(self, engine):
            raise FileNotFoundError("model.pt")

    report.write_text("old")
    with pytest.raises(FileNotFoundError):
        make_evaluator(["1.nii"], output_dir=tmp_path, handlers=[WrongWeights()]).run()
    assert report.read_text() == "old"
    with pytest.raises(KeyboardInterrupt):
        make_evaluator(["1.nii"], output_dir=tmp_path, network=Killed()).run()
    assert not report.exists()


def test_the_bar_names_the_volume_at_work(make_evaluator, monkeypatch):
    told = []
    bar = SimpleNamespace(update=lambda: told.append("done"), close=lambda: told.append("end"))
    bar.set_postfix_str = told.append
    monkeypatch.setattr("medconstraints.engines.inference.tqdm", lambda **options: told.append(options) or bar)
    make_evaluator(["knee1.nii", "bad.nii"]).run()
    assert told[0]["total"] == 2 and told[0]["disable"] is None  # seen on a terminal alone
    assert told[1:] == ["knee1.nii", "done", "bad.nii", "done", "end"]


@pytest.mark.filterwarnings("ignore:.*skip the `run`")
def test_a_process_without_volumes_takes_part_in_the_report(make_evaluator, tmp_path, monkeypatch):
    evaluator, told = make_evaluator([], output_dir=tmp_path), []
    other = {"name": "knee.nii", "state": "done", "reason": "", "mask": "knee_seg.nii.gz"}
    monkeypatch.setattr("ignite.distributed.get_world_size", lambda: 2)

    def gather(into, rows):
        told.append(rows)
        into[:] = [rows, [other]]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    evaluator.run()
    assert told == [[]] and evaluator.rows == [other]
    assert json.loads((tmp_path / "inference.json").read_text())["volumes"] == [other]
