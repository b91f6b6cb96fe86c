"""A distance map that was zoomed, turned or flipped after it was made."""

import pytest
import torch
from monai.data import MetaTensor

from medconstraints.distance.provenance import RECORD, check_not_resampled, record


def distance_map(now):
    made = MetaTensor(
        torch.zeros(2, 4, 4, 4), affine=torch.eye(4), meta={RECORD: record(torch.eye(4), (1.0,) * 3, 1.0)}
    )
    made.affine = torch.as_tensor(now, dtype=torch.float64)
    return made


@pytest.mark.parametrize("steps", [(2, 2, 2), (1, 1, 2), (0.5, 1, 1)])
def test_a_zoom_is_refused(steps):
    with pytest.raises(ValueError, match="resampled"):
        check_not_resampled(distance_map(torch.diag(torch.tensor([*steps, 1.0]))), "map")


def test_flips_and_quarter_turns_pass():
    turned = [[0.0, -1, 0, 3], [1, 0, 0, 0], [0, 0, -1, 5], [0, 0, 0, 1]]
    check_not_resampled(distance_map(turned), "map")
