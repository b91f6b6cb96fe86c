"""Truth values from a command line."""

import pytest

from medconstraints.data.flags import read_flag


@pytest.mark.parametrize(
    ("value", "expected"), [(True, True), (False, False), ("true", True), ("False", False), ("FALSE", False)]
)
def test_truth_values_and_their_texts(value, expected):
    assert read_flag("overwrite", value) is expected


@pytest.mark.parametrize("value", [None, 0, 1, "no", "", [True]])
def test_everything_else_is_refused(value):
    with pytest.raises(ValueError, match="overwrite: expected true or false, got"):
        read_flag("overwrite", value)
