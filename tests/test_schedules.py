"""Schedules against torch's, and against the thesis's loop."""

import dataclasses
import json
import math

import pytest
import torch

from medconstraints.schedules import AlphaSchedule, cosine_decay


def test_cosine_equals_torch_scheduler():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7)
    for step in range(8):
        assert 2.0 * cosine_decay(step, 7) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_cosine_stays_at_zero_and_a_longer_run_goes_on_above_it():
    assert cosine_decay(9, 7) == 0
    assert 0 < cosine_decay(7, 14) < 1


@pytest.mark.parametrize(("step", "total", "name"), [(0, 0, "total"), (-1, 3, "step")])
def test_cosine_refuses_impossible_lengths(step, total, name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        cosine_decay(step, total)


# alpha


def weights(word, epoch, **options):
    return tuple(AlphaSchedule(word, **options)(epoch).values())


@pytest.mark.parametrize("options", [{}, {"alpha": 0.1, "increment": 0.25, "max_alpha": 0.8, "floor": 0.3}])
def test_schedules_step_by_step_as_in_the_thesis(options):
    """Against a loop that adds the increment at the end of each epoch (section 4.3.4)."""
    defaults = {"alpha": 0.01, "increment": 0.01, "max_alpha": 1, "floor": 0.01}
    start, increment, largest, floor = (defaults | options).values()
    a = start
    for epoch in range(120):
        regional = 1 - a if 1 - a > floor else floor
        assert weights("constant", epoch, **options) == (1, start)
        assert weights("increase", epoch, **options) == pytest.approx((1, a))
        assert weights("rebalance", epoch, **options) == pytest.approx((regional, a))
        assert weights("none", epoch, **options) == (1, 0)
        assert weights("alone", epoch, **options) == (0, 1)
        a = a + increment if a + increment < largest else largest
    assert a == largest


@pytest.mark.parametrize(("total", "alpha", "max_alpha"), [(2, 0.01, 1.0), (137, 0.2, 2.0)])
def test_any_length_ends_at_the_largest_alpha(total, alpha, max_alpha):
    options = {"alpha": alpha, "max_alpha": max_alpha, "increment": None, "total": total}
    rises = [weights("increase", epoch, **options)[1] for epoch in range(total + 3)]
    steps = [(alpha * (total - 1 - epoch) + max_alpha * epoch) / (total - 1) for epoch in range(total)]
    assert rises == pytest.approx([*steps, *[max_alpha] * 3])
    assert max(rises) <= max_alpha


def test_length_of_the_run():
    assert weights("increase", 0, alpha=0.3, increment=None, total=1) == (1, 0.3)
    # An increment that is given wins: a config may always name its number of epochs.
    assert weights("rebalance", 8, increment=0.02, total=3) == weights("rebalance", 8, increment=0.02)


def test_a_constant_may_be_above_one():
    assert weights("constant", 3, alpha=1.5) == weights("constant", 3, alpha=1.5, increment=None, total=9) == (1, 1.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "rebalanced"}, r"schedule: expected one of \['alone', 'constant', .*got 'rebalanced'"),
        ({"alpha": "0.1"}, "alpha: .*'0.1'"),
        ({"increment": math.nan}, "increment: .*nan"),
        ({"floor": 1.1}, r"floor: .*\[0, 1\].*1.1"),
        ({"alpha": 0.5, "max_alpha": 0.4}, "alpha: expected at most max_alpha = 0.4, got 0.5"),
        ({"increment": None}, "total .*increment=None.*None"),
        ({"regional": "dice", "boundary": "dice"}, "regional, boundary: .*'dice' for both"),
    ],
)
def test_refuses_impossible_schedules(options, message):
    with pytest.raises(ValueError, match=message):
        AlphaSchedule(**options)


def test_refuses_impossible_epochs():
    with pytest.raises(ValueError, match="epoch: expected"):
        AlphaSchedule("none")(-1)


def test_schedule_is_a_value():
    schedule = AlphaSchedule("increase", regional="dice", total=7)
    assert list(schedule(0)) == ["dice", "boundary"]
    assert eval(repr(schedule)) == schedule != AlphaSchedule("increase", regional="dice", total=8)
    assert AlphaSchedule(**json.loads(json.dumps(dataclasses.asdict(schedule)))) == schedule
