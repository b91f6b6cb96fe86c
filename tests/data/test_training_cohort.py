"""What training volumes were like, and that what is unlike them is told, and what is like them is not."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medconstraints.data.datalist_sections import read_datalist
from medconstraints.data.training_cohort import cohort_line, cohort_of, intensities_of, outside_of
from medconstraints.volumes.facts import mask_facts
from medconstraints.volumes.files import read_voxels
from medconstraints.volumes.grids import grid_of


@pytest.fixture
def items(tmp_path, rng):
    """Class 1 of three sizes, class 2 to the left of it and behind it; and a volume that is missing."""
    found = []
    for number, (step, side) in enumerate([(1.0, 3), (1.5, 4), (1.2, 5)]):
        label = np.zeros((10, 12, 8), np.uint8)
        label[2 : 2 + side, 5:8, 2:5], label[8:10, 1:3, 2:5] = 1, 2
        image = rng.normal(100 + 10 * number, 7, label.shape).astype(np.float32)
        for name, voxels in (("image", image), ("label", label)):
            nib.save(nib.Nifti1Image(voxels, np.diag([-step, step, 2.0, 1])), tmp_path / f"{name}{number}.nii.gz")
        found.append({key: str(tmp_path / f"{key}{number}.nii.gz") for key in ("image", "label")})
    return [*found, {"image": str(tmp_path / "missing.nii.gz")}]


def facts_of(item, *, flipped=None, values=None):
    """As `SaveMaskd` writes them, of the label or one that is flipped or renumbered."""
    image, affine = read_voxels(Path(item["image"]))
    label, _ = read_voxels(Path(item["label"]))
    label = label if flipped is None else np.flip(label, flipped)
    label = label if values is None else np.array(values, np.uint8)[label]
    intensities = intensities_of((image - image.mean()) / image.std())
    return {"classes": mask_facts(label, affine), **grid_of(label.shape, affine), "intensities": intensities}


def test_cohort(items):
    cohort = cohort_of(items, 3)
    assert cohort["volumes"] == 3
    np.testing.assert_allclose(cohort["spacing_mm"], [[1, 1, 2], [1.5, 1.5, 2]])
    np.testing.assert_allclose(cohort["size_mm"], [[10, 12, 16], [15, 18, 16]])
    np.testing.assert_allclose(cohort["ml"]["1"], [3 * 9 * 2 / 1000, 4 * 9 * 1.5**2 * 2 / 1000])
    # the first axis runs to the left: voxels 2 to 4 of 10 have their middle at 1 - 3.5 / 10
    np.testing.assert_allclose(cohort["place"]["1"], [[0.55, 6.5 / 12, 3.5 / 8], [0.65, 6.5 / 12, 3.5 / 8]], atol=1e-4)
    np.testing.assert_allclose(cohort["order"]["1 2"], [[-7.5, -6.75, 0], [-5.4, -4.5, 0]], atol=0.01)
    low, high = cohort["intensities"]
    assert low[2] == pytest.approx(0, abs=0.2) and high[0] == pytest.approx(-2.33, abs=0.4)
    none = cohort_of(items, 2)
    assert none["ml"] == none["place"] == none["order"] == {} and none["size_mm"] == cohort["size_mm"]
    assert cohort_of([]) == {}


def test_line(items):
    line = cohort_line(cohort_of(items), len(items))
    assert line.startswith(
        "4 training volumes, of 3 that were looked at: voxels of 1 x 1 x 2 to 1.5 x 1.5 x 2 mm, images"
    )
    assert line.endswith("class 1 of 0.054 to 0.162 ml, class 2 of 0.024 to 0.054 ml")
    assert cohort_line({}, 2) == "2 training volumes"


def test_voxels_that_are_zero_do_not_count_where_they_are_not_normalised(items, tmp_path):
    image, affine = read_voxels(Path(items[0]["image"]))
    image[:5] = 0
    nib.save(nib.Nifti1Image(image, affine), items[0]["image"])
    with_zeros, without = (cohort_of(items[:1], nonzero=nonzero)["intensities"][0] for nonzero in (False, True))
    assert with_zeros[1] == pytest.approx(-1, abs=0.1)  # half the image is black
    assert without[1] == pytest.approx(0, abs=0.2) and without[4] == pytest.approx(2, abs=0.5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, []),
        (
            {"spacing_mm": [1.2, 1.2, 5.0]},
            ["voxels of 1.2 x 1.2 x 5 mm, unlike the training's 1 x 1 x 2 to 1.5 x 1.5 x 2"],
        ),
        ({"size_mm": [200.0, 200.0, 150.0]}, ["an image of 200 x 200 x 150 mm"]),
        ({"intensities": [-0.4, -0.4, -0.4, 0.0, 3.5]}, ["intensities that are distributed unlike the training's"]),
    ],
)
def test_what_is_unlike_the_training(items, change, told):
    found = outside_of(cohort_of(items), facts_of(items[1]) | change)
    assert len(found) == len(told) and all(one.startswith(start) for one, start in zip(found, told, strict=True))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"flipped": 2}, ["1: at 0.60 / 0.54 / 0.56 of the image", "2: at 0.10 / 0.17 / 0.56"]),
        ({"flipped": 1}, ["2: at 0.10 / 0.83", "2: 6.75 mm in front of 1, where the training had it behind"]),
        ({"values": [0, 0, 2]}, []),  # one class alone: nothing to compare it with
        (
            {"values": [0, 2, 1]},
            ["1: at 0.10", "2: 0.162 ml", "2: at 0.60", "2: 7.5 mm right of 1, where", "2: 6.75 mm in front of 1"],
        ),
    ],
)
def test_places_and_order(items, options, told):
    found = outside_of(cohort_of(items), facts_of(items[1], **options))
    assert len(found) == len(told), found
    for text, start in zip(found, told, strict=True):
        assert text.startswith(start), text


def test_a_card_of_former_times_tells_of_what_it_has(items):
    cohort = {key: value for key, value in cohort_of(items).items() if key in ("volumes", "size_mm", "ml")}
    assert outside_of(cohort, facts_of(items[0], flipped=1)) == []
    assert outside_of({}, facts_of(items[0])) == outside_of(cohort_of(items), {}) == []


def test_references_of_real_volumes_are_like_the_training(data_root):
    """No false alarm of 21, and every one that is upside down or back to front is noticed."""
    datalist = data_root / "hippocampus.json"
    cohort = cohort_of(read_datalist(datalist, "training"), 3)
    test = read_datalist(datalist, "test")
    assert [outside_of(cohort, facts_of(item)) for item in test] == [[]] * len(test)
    for axis in (1, 2):
        assert all(outside_of(cohort, facts_of(item, flipped=axis)) for item in test)
