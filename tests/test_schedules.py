import pytest
import torch

from medconstraints.schedules import cosine_decay


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
