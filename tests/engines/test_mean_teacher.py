"""PrepareBatchTeacher: what the teacher says is a target, and no gradient reaches it."""

import pytest
import torch
from torch import nn

from medconstraints.engines import PrepareBatchTeacher
from medconstraints.losses import CombinedLoss, ConsistencyLoss, PartialCrossEntropyLoss

LOSS = CombinedLoss({"ce": PartialCrossEntropyLoss(), "consistency": ConsistencyLoss(softmax=True)})


def test_the_teacher_is_a_target():
    teacher = nn.Conv2d(1, 2, 1)
    batch = {"image": torch.rand(2, 1, 4, 4), "weak_label": torch.zeros(2, 1, 4, 4)}
    image, targets = PrepareBatchTeacher(LOSS, teacher, noise=0.0)(batch, "cpu")
    torch.testing.assert_close(targets["teacher"], teacher(image).softmax(1))
    assert not targets["teacher"].requires_grad and {*targets} == {"weak_label", "teacher"}
    _, noisy = PrepareBatchTeacher(LOSS, teacher, noise=0.5)(batch, "cpu")
    assert not torch.allclose(noisy["teacher"], targets["teacher"])
    student = nn.Conv2d(1, 2, 1)
    LOSS(student(image), targets).backward()
    assert student.weight.grad.any() and teacher.weight.grad is None


def test_bad_arguments():
    with pytest.raises(ValueError, match="expected one that reads 'teacher'"):
        PrepareBatchTeacher(PartialCrossEntropyLoss(), nn.Conv2d(1, 2, 1))
    with pytest.raises(ValueError, match="noise"):
        PrepareBatchTeacher(LOSS, nn.Conv2d(1, 2, 1), noise=-1)
