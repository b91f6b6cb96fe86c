"""Inference where one bad volume does not stop the others, and says why it is bad."""

import json
import logging

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
    def make(names, *, network=None, report_path=None, batch_size=1, handlers=(), **more):
        data = TolerantDataset([{"image": f"/data/{name}"} for name in names], Compose([Lambdad("image", load)]))
        return TolerantEvaluator(
            report_path=report_path,
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
    assert data[1] == {"failure": "LoadError: bad.nii: is truncated", "file": "bad.nii"}
    other = TolerantDataset([{"scan": "bad.nii"}], Compose([Lambdad("scan", load)]), image_key="scan")
    assert other[0]["file"] == "bad.nii"


def test_collate():
    item, failure = {"image": torch.zeros(1, 2)}, {"failure": "why", "file": "a"}
    assert collate_or_failure([item])["image"].shape == (1, 1, 2)
    assert collate_or_failure([item, item])["image"].shape == (2, 1, 2)
    assert collate_or_failure([failure]) == failure
    with pytest.raises(ValueError, match="batch_size: expected 1 for inference that survives bad files, got 2"):
        collate_or_failure([item, failure])


NAMES = ["bad2.nii.gz", "1.nii.gz", "3.nii.gz", "13.nii.gz", "5.nii.gz", "100.nii.gz", "7.nii.gz"]
FAILURES = [
    {"file": "bad2.nii.gz", "reason": "LoadError: /data/bad2.nii.gz: is truncated"},
    {"file": "13.nii.gz", "reason": "RuntimeError: out of memory"},
    {"file": "100.nii.gz", "reason": "OSError: [Errno 28] No space left on device"},
]
DONE = [f"{i}.nii.gz" for i in (1, 3, 5, 7)]


def test_the_others_are_done(make_evaluator, tmp_path, caplog):
    saved = []
    evaluator = make_evaluator(NAMES, report_path=tmp_path / "made" / "report.json")

    def remember(engine):
        if isinstance(engine.state.output, list):
            saved.extend(float(output["pred"].mean()) for output in engine.state.output)

    evaluator.add_event_handler(Events.ITERATION_COMPLETED, remember)
    with caplog.at_level(logging.INFO, "medconstraints"):
        evaluator.run()
    assert saved == [4, 8, 12, 16]  # 2 (i + 1)
    assert evaluator.done == DONE
    assert evaluator.failures == FAILURES
    assert json.loads((tmp_path / "made" / "report.json").read_text()) == {"done": DONE, "failed": FAILURES}
    messages = [r.message for r in caplog.records if r.levelno == logging.ERROR]
    assert messages[0] == "bad2.nii.gz failed: LoadError: /data/bad2.nii.gz: is truncated"
    assert messages[-1].splitlines() == [
        "4 of 7 volumes done",
        *(f"  {failure['file']}: {failure['reason']}" for failure in FAILURES),
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_output_that_is_not_finite_fails_its_volume(make_evaluator, value):
    """Its argmax would be a mask like any other."""

    class Spoilt(nn.Module):
        def forward(self, x):
            return x.clone().index_fill_(-1, torch.tensor([0]), value) if (x == 2).any() else x

    evaluator = make_evaluator(["1.nii", "2.nii"], network=Spoilt())
    evaluator.run()
    assert evaluator.done == ["1.nii"]
    assert [failure["file"] for failure in evaluator.failures] == ["2.nii"]
    assert "NaN or infinite" in evaluator.failures[0]["reason"]


def test_all_done(make_evaluator, tmp_path, caplog):
    evaluator = make_evaluator(DONE, report_path=tmp_path / "report.json")
    with caplog.at_level(logging.INFO, "medconstraints"):
        evaluator.run()
    assert json.loads((tmp_path / "report.json").read_text()) == {"done": DONE, "failed": []}
    assert [(r.levelno, r.message) for r in caplog.records if r.name.startswith("medconstraints")] == [
        (logging.INFO, "4 of 4 volumes done")
    ]


def test_all_failing_raises_after_the_report(make_evaluator, tmp_path):
    evaluator = make_evaluator([entry["file"] for entry in FAILURES], report_path=tmp_path / "report.json")
    with pytest.raises(RuntimeError, match=r"every volume failed:\n  bad2\.nii\.gz: LoadError.*\n  13.*\n  100.*"):
        evaluator.run()
    assert json.loads((tmp_path / "report.json").read_text()) == {"done": [], "failed": FAILURES}


def test_a_second_run_starts_a_new_report(make_evaluator):
    evaluator = make_evaluator(["1.nii", "bad2.nii"])
    evaluator.run()
    evaluator.run()
    assert evaluator.done == ["1.nii"]
    assert len(evaluator.failures) == 1


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
    with pytest.raises(RuntimeError, match="every volume failed"):
        evaluator.run()
    assert evaluator.failures[1]["reason"] == "FloatingPointError: first line"


def test_an_interrupt_is_no_bad_volume(make_evaluator):
    class Interrupted(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    evaluator = make_evaluator(["1.nii", "2.nii"], network=Interrupted())
    with pytest.raises(KeyboardInterrupt):
        evaluator.run()
    assert evaluator.failures == []


def test_unusual_file_names(make_evaluator, tmp_path):
    name = 'o\'neil "[1]" back\\slash größe.nii.gz'
    failing = name.replace("1", "13")
    evaluator = make_evaluator([name, failing], report_path=tmp_path / "report.json")
    evaluator.run()
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report == {"done": [name], "failed": [{"file": failing, "reason": "RuntimeError: out of memory"}]}


def test_the_evaluator_makes_its_loader(make_evaluator):
    data = make_evaluator(NAMES).data_loader.dataset
    evaluator = TolerantEvaluator(device="cpu", network=Network(), dataset=data)
    evaluator.run()
    assert [*evaluator.done, *(entry["file"] for entry in evaluator.failures)] == [
        *("1.nii.gz", "3.nii.gz", "5.nii.gz", "100.nii.gz", "7.nii.gz", "bad2.nii.gz", "13.nii.gz")
    ]
    with pytest.raises(ValueError, match="dataset, val_data_loader"):
        TolerantEvaluator(device="cpu", network=Network())


def test_images_without_meta_data(make_evaluator):
    evaluator = make_evaluator(["1.nii"])
    evaluator.data_loader.dataset.transform = Compose([Lambdad("image", lambda path: torch.ones(1, 4, 4))])
    evaluator.run()
    assert evaluator.done == ["volume"]


def test_a_failing_volume_keeps_no_mask_that_looks_new(make_evaluator, tmp_path, caplog):
    """Of the old masks those of failing volumes are put aside; the saving transform replaces the others."""
    names = ["1.nii.gz", "bad2.nii.gz", "13.nii", "100.nii.gz"]
    old = [f"{name.split('.')[0]}_seg.nii.gz" for name in names] + ["unrelated_seg.nii.gz"]
    for name in old:
        (tmp_path / name).write_bytes(b"old " + name.encode())
    (tmp_path / "13_seg.nii.gz.old").write_bytes(b"older")
    make_evaluator(names, output_dir=tmp_path).run()
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    failed = old[1:4]
    assert found == {f"{n}.old" if n in failed else n: b"old " + n.encode() for n in old}
    assert "bad2.nii.gz: its mask of a former run is now called bad2_seg.nii.gz.old" in caplog.text


def test_masks_stay_without_an_output_folder_or_with_another_postfix(make_evaluator, tmp_path):
    (tmp_path / "bad2_seg.nii.gz").write_bytes(b"old")
    make_evaluator(["1.nii", "bad2.nii.gz"]).run()
    make_evaluator(["1.nii", "bad2.nii.gz"], output_dir=tmp_path, postfix="organ").run()
    assert [path.name for path in tmp_path.iterdir()] == ["bad2_seg.nii.gz"]


def test_the_report_of_a_former_run_goes_with_the_start(make_evaluator, tmp_path):
    """A run that is killed leaves no report; one that has wrong weights leaves the old one."""
    report = tmp_path / "report.json"

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
        make_evaluator(["1.nii"], report_path=report, handlers=[WrongWeights()]).run()
    assert report.read_text() == "old"
    with pytest.raises(KeyboardInterrupt):
        make_evaluator(["1.nii"], report_path=report, network=Killed()).run()
    assert not report.exists()
