"""Losses of regressed statistics and of a teacher, against torch's own."""

import pytest
import torch
from torch.nn import functional as F

from medconstraints.losses import ConsistencyLoss, RegressionLoss

OUTPUT = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(1))
TARGET = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({"spread": False}, lambda value, log, target: F.mse_loss(value, target)),
        ({"beta": 0}, lambda value, log, target: F.gaussian_nll_loss(value, target, log.exp())),
        (
            {"beta": 0.5},
            lambda value, log, target: (
                F.gaussian_nll_loss(value, target, log.exp(), reduction="none") * (0.5 * log).exp().detach()
            ).mean(),
        ),
    ],
)
def test_against_torch(options, reference):
    output = OUTPUT.clone().requires_grad_()
    expected = torch.autograd.grad(reference(*output.unbind(-1), TARGET), output)[0]
    loss = RegressionLoss(**options)(output, TARGET)
    torch.testing.assert_close(loss, reference(*OUTPUT.unbind(-1), TARGET))
    torch.testing.assert_close(torch.autograd.grad(loss, output)[0], expected)


@pytest.mark.parametrize("spread", [True, False])
def test_what_is_not_known_has_no_part(spread):
    target = TARGET.clone()
    target[:, 1] = torch.nan
    output = OUTPUT.clone().requires_grad_()
    loss = RegressionLoss(spread=spread)(output, target)
    torch.testing.assert_close(loss, RegressionLoss(spread=spread)(OUTPUT[:, [0, 2]], TARGET[:, [0, 2]]))
    loss.backward()
    assert not output.grad[:, 1].any() and output.grad[:, 0, 0].all()
    assert RegressionLoss()(OUTPUT, torch.full_like(TARGET, torch.nan)) == 0


def test_bad_arguments():
    with pytest.raises(ValueError, match="beta: expected 0 to 1"):
        RegressionLoss(beta=2)
    with pytest.raises(ValueError, match="input: expected"):
        RegressionLoss()(OUTPUT, TARGET[:, :2])
    with pytest.raises(ValueError, match="target: expected"):
        ConsistencyLoss()(torch.rand(1, 2, 4, 4), torch.rand(1, 2, 4, 5))


def test_consistency_is_the_mean_squared_difference_of_probabilities():
    logits, teacher = torch.randn(2, 3, 4, 4, 4), torch.rand(2, 3, 4, 4, 4)
    expected = F.mse_loss(logits.softmax(1), teacher)
    torch.testing.assert_close(ConsistencyLoss(softmax=True)(logits, teacher), expected)
