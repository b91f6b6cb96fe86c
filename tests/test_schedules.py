import dataclasses
import json
import math

import pytest
import torch
from monai.bundle import ConfigParser

from medconstraints.schedules import AlphaSchedule, alpha_weights, cosine_decay


def test_equals_torch_scheduler() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7)
    for step in range(8):
        assert 2.0 * cosine_decay(step, 7) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_stays_at_zero_and_a_longer_run_goes_on_above_it() -> None:
    assert cosine_decay(9, 7) == 0
    assert 0 < cosine_decay(7, 14) < 1


@pytest.mark.parametrize(("step", "total"), [(0, 0), (-1, 3)])
def test_refuses_impossible_lengths(step: int, total: int) -> None:
    with pytest.raises(ValueError, match="step >= 0 and total >= 1"):
        cosine_decay(step, total)


# alpha


def table(word, epochs, **options):
    return [alpha_weights(word, epoch, **options) for epoch in epochs]


@pytest.mark.parametrize("options", [{}, {"alpha": 0.1, "increment": 0.25, "max_alpha": 0.8, "floor": 0.3}])
def test_schedules_step_by_step_as_in_the_thesis(options):
    """Against a loop that adds the increment at the end of each epoch (section 4.3.4)."""
    start, increment, largest, floor = (
        {"alpha": 0.01, "increment": 0.01, "max_alpha": 1, "floor": 0.01} | options
    ).values()
    a = start
    for epoch in range(120):
        regional = 1 - a if 1 - a > floor else floor
        assert alpha_weights("constant", epoch, **options) == (1, start)
        assert alpha_weights("increase", epoch, **options) == pytest.approx((1, a))
        assert alpha_weights("rebalance", epoch, **options) == pytest.approx((regional, a))
        assert alpha_weights("none", epoch, **options) == (1, 0)
        assert alpha_weights("alone", epoch, **options) == (0, 1)
        a = a + increment if a + increment < largest else largest
    assert a == largest


def test_values_of_the_defaults():
    """After 100 epochs both losses of "increase" weigh the same; "rebalance" keeps the regional one."""
    assert table("increase", (0, 1, 49, 99)) == [pytest.approx((1, a)) for a in (0.01, 0.02, 0.5, 1)]
    assert table("rebalance", (0, 1, 98, 99)) == [
        pytest.approx(w) for w in ((0.99, 0.01), (0.98, 0.02), (0.01, 0.99), (0.01, 1))
    ]
    assert all(regional > 0 for regional, _ in table("rebalance", range(200)))


@pytest.mark.parametrize("total", [2, 5, 100, 137])
@pytest.mark.parametrize(("alpha", "max_alpha"), [(0.01, 1.0), (0.0, 0.5), (0.2, 2.0)])
def test_any_length_ends_at_the_largest_alpha(total, alpha, max_alpha):
    rises = [
        w[1] for w in table("increase", range(total + 3), alpha=alpha, max_alpha=max_alpha, increment=None, total=total)
    ]
    steps = [(alpha * (total - 1 - epoch) + max_alpha * epoch) / (total - 1) for epoch in range(total)]
    assert rises == pytest.approx([*steps, *[max_alpha] * 3])
    assert max(rises) <= max_alpha


def test_length_of_the_run():
    hundred = table("rebalance", range(100), increment=None, total=100)
    assert hundred == [pytest.approx(w) for w in table("rebalance", range(100))]
    assert alpha_weights("increase", 0, alpha=0.3, increment=None, total=1) == (1, 0.3)
    # An increment that is given wins: a config may always name its number of epochs.
    assert table("rebalance", range(9), increment=0.02, total=3) == table("rebalance", range(9), increment=0.02)


def test_a_constant_may_be_above_one():
    assert alpha_weights("constant", 3, alpha=1.5) == (1, 1.5)
    assert alpha_weights("constant", 3, alpha=1.5, increment=None, total=9) == (1, 1.5)


BAD_ALPHA = [
    ({"schedule": "rebalanced"}, r"schedule: expected one of \['alone', 'constant', .*got 'rebalanced'"),
    ({"schedule": None}, "schedule: expected one of .*got None"),
    ({"alpha": -0.1}, "alpha: expected a finite number >= 0, got -0.1"),
    ({"alpha": math.nan}, "alpha: expected a finite number >= 0, got nan"),
    ({"alpha": "0.1"}, "alpha: expected a finite number >= 0, got '0.1'"),
    ({"increment": -1}, "increment: expected a finite number >= 0, got -1"),
    ({"increment": math.nan}, "increment: expected a finite number >= 0, got nan"),
    ({"max_alpha": math.inf}, "max_alpha: expected a finite number >= 0, got inf"),
    ({"max_alpha": None}, "max_alpha: expected a finite number >= 0, got None"),
    ({"floor": -0.1}, "floor: expected a finite number >= 0, got -0.1"),
    ({"floor": 1.1}, r"floor: expected a number in \[0, 1\], .*got 1.1"),
    ({"alpha": 0.5, "max_alpha": 0.4}, "alpha: expected at most max_alpha = 0.4, .*got 0.5"),
    ({"increment": None}, "total: expected the number of epochs, >= 1, with increment=None, got None; give it or"),
    ({"increment": None, "total": 0}, "total: expected the number of epochs, >= 1, .*got 0"),
]


@pytest.mark.parametrize(("options", "message"), BAD_ALPHA)
def test_refuses_impossible_alphas(options, message):
    with pytest.raises(ValueError, match=message):
        AlphaSchedule(**options)
    with pytest.raises(ValueError, match=message):
        alpha_weights(**({"schedule": "rebalance", "epoch": 3} | options))


@pytest.mark.parametrize("epoch", [-1, math.nan])
@pytest.mark.parametrize("word", ["constant", "none", "rebalance"])
def test_refuses_impossible_epochs(word, epoch):
    with pytest.raises(ValueError, match=f"epoch: expected a finite number >= 0, got {epoch}"):
        alpha_weights(word, epoch)


def test_schedule_hands_everything_on():
    options = {"alpha": 0.1, "increment": None, "max_alpha": 0.9, "floor": 0.2, "total": 6}
    schedule = AlphaSchedule("rebalance", regional="dice", boundary="edge", **options)
    for epoch in range(8):
        regional, boundary = alpha_weights("rebalance", epoch, **options)
        assert schedule(epoch) == {"dice": regional, "edge": boundary}
    assert AlphaSchedule()(4) == dict(zip(("regional", "boundary"), alpha_weights("rebalance", 4), strict=True))
    assert AlphaSchedule("increase", increment=0.5)(1) == {"regional": 1, "boundary": 0.51}


def test_schedule_is_a_value():
    schedule = AlphaSchedule("increase", regional="dice", total=7)
    assert eval(repr(schedule)) == schedule != AlphaSchedule("increase", regional="dice", total=8)
    assert AlphaSchedule(**json.loads(json.dumps(dataclasses.asdict(schedule)))) == schedule
    parser = ConfigParser(
        {
            "word": "alone",
            "s": {"_target_": "medconstraints.schedules.AlphaSchedule", "schedule": "@word", "alpha": 0.5},
        }
    )
    assert parser.get_parsed_content("s") == AlphaSchedule("alone", alpha=0.5)
    with pytest.raises(ValueError, match="regional, boundary: expected the names of two losses, got 'dice' for both"):
        AlphaSchedule(regional="dice", boundary="dice")
