"""GuideSplit and EpochSampler: who trains and who guides in an epoch."""

import numpy as np
import pytest

from medconstraints.data import EpochSampler, GuideSplit

PATIENTS = [{"image": str(i), "patient": f"p{i // 3}", "label": i % 2} for i in range(30)]


def test_parts_cover_all_items_and_no_patient_is_in_both():
    split = GuideSplit(PATIENTS, fraction=0.3)
    for epoch in range(5):
        training, guide = split.parts(epoch)
        assert sorted(training + guide) == list(range(30))
        assert len(guide) == 9
        assert not {PATIENTS[i]["patient"] for i in training} & {PATIENTS[i]["patient"] for i in guide}


def test_parts_are_a_function_of_seed_and_epoch():
    draws = [GuideSplit(PATIENTS, seed=3).parts(epoch) for epoch in range(6)]
    assert draws == [GuideSplit(PATIENTS, seed=3).parts(epoch) for epoch in range(6)]
    assert len({tuple(guide) for _, guide in draws}) > 1
    assert draws != [GuideSplit(PATIENTS, seed=4).parts(epoch) for epoch in range(6)]
    fixed = GuideSplit(PATIENTS, seed=3, redraw=False)
    assert fixed.parts(0) == fixed.parts(5) == draws[0]


def test_the_guide_part_has_more_than_one_class():
    rare = [{"image": str(i), "label": int(i < 3)} for i in range(30)]
    split = GuideSplit(rare, fraction=0.1)
    assert all(len({rare[i]["label"] for i in split.parts(epoch)[1]}) == 2 for epoch in range(20))


@pytest.mark.parametrize(
    ("items", "fraction", "words"),
    [
        (PATIENTS, 1.0, "between 0 and 1"),
        (PATIENTS, 0.04, "got 0 of 10 patients"),
        (PATIENTS[:3], 0.5, "1 patients"),
        ([{"image": str(i), "label": 1} for i in range(10)], 0.5, "two classes"),
    ],
)
def test_parts_that_cannot_be_are_refused(items, fraction, words):
    with pytest.raises(ValueError, match=f"fraction: .*{words}"):
        GuideSplit(items, fraction=fraction)


def test_a_sampler_shuffles_the_part_of_its_epoch_and_has_one_length(monkeypatch):
    parts = [[1, 2, 3, 4], [5, 6], [7, 8, 9, 10, 11, 12]]
    sampler = EpochSampler(lambda epoch: parts[epoch])
    drawn = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        drawn.append(list(sampler))
        assert len(drawn[-1]) == len(sampler) == 4
    assert sorted(drawn[0]) == parts[0]
    assert sorted(drawn[1]) == [5, 5, 6, 6]
    assert set(drawn[2]) < set(parts[2]) and len(set(drawn[2])) == 4


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_processes_share_a_part_evenly(monkeypatch, count):
    import ignite.distributed as idist

    drawn = []
    for rank in range(2):
        monkeypatch.setattr(idist, "get_world_size", lambda: 2)
        monkeypatch.setattr(idist, "get_rank", lambda rank=rank: rank)
        drawn.append(list(EpochSampler(lambda epoch: list(range(count)))))
    assert len(drawn[0]) == len(drawn[1]) == max(1, count // 2)
    assert len(np.unique(drawn)) == min(count, 2 * len(drawn[0]))
