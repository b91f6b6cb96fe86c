"""Two discs: equal but for their intensity, reproducible, and stored as files that MONAI reads."""

import json

import nibabel as nib
import numpy as np
import pytest
from monai.data import load_decathlon_datalist
from monai.transforms import LoadImaged
from scipy import ndimage

from medconstraints.synthetic.discs import make_disc, make_discs


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels_of_disc(radius):
    """Pixels at most `radius` from one pixel, counted one by one."""
    reach = range(-int(radius) - 1, int(radius) + 2)
    return sum(i * i + j * j <= radius * radius for i in reach for j in reach)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return make_discs(tmp_path_factory.mktemp("discs"), num_training=5, num_validation=2, num_test=1, size=32, seed=3)


def test_same_seed_same_image():
    first, again, other = (make_disc(seed, size=64) for seed in (5, np.random.default_rng(5), 6))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


@pytest.mark.parametrize(("size", "radius", "expected"), [(256, None, 25), (64, None, 6.25), (96, 16, 16)])
def test_discs_of_the_same_size_inside_and_apart(size, radius, expected):
    for seed in range(20):
        image, label = make_disc(seed, size=size, radius=radius, max_noise=0)
        assert (image.dtype, label.dtype, image.shape, label.shape) == (np.uint8, np.uint8, (size, size), (size, size))
        masks = [image == 125, image == 255]
        np.testing.assert_array_equal(label, masks[0])
        assert np.unique(image).tolist() == [0, 125, 255]
        for mask in masks:
            assert mask.sum() == pixels_of_disc(expected), "whole, neither cut by the border nor by the other disc"
            centre = ndimage.center_of_mass(mask)
            distances = np.hypot(*(np.indices(mask.shape) - np.reshape(centre, (2, 1, 1))))
            np.testing.assert_array_equal(mask, distances <= expected + 1e-9)


def test_discs_reach_every_side_and_neither_place_tells_them_apart():
    corners = [np.argwhere(make_disc(seed, size=32, max_noise=0)[1]) for seed in range(300)]
    assert min(c.min() for c in corners) <= 1 and max(c.max() for c in corners) >= 30
    centres = np.array([c.mean(0) for c in corners])
    np.testing.assert_allclose(centres.mean(0), 15.5, atol=1.5)


def test_intensities():
    image, label = make_disc(0, size=64, target=200, distractor=90, max_noise=0)
    assert np.unique(image[label == 1]).tolist() == [200]
    assert np.unique(image[label == 0]).tolist() == [0, 90]


def test_noise_is_drawn_per_image_from_zero_to_the_largest():
    # Half of the background's noise is clipped at 0; what is left has a mean of sigma / sqrt(2 pi).
    sigmas = []
    for seed in range(200):
        clean = make_disc(seed, size=64, max_noise=0)[0]  # the discs are at the same places
        background = make_disc(seed, size=64, max_noise=20)[0][clean == 0]
        sigmas.append(background.mean() * np.sqrt(2 * np.pi))
    assert min(sigmas) < 1
    assert 18 < max(sigmas) < 22
    assert np.median(sigmas) == pytest.approx(10, rel=0.2)


def test_noise_keeps_places_and_is_clipped():
    image, label = make_disc(4, size=64)
    clean, same = make_disc(4, size=64, max_noise=0)
    np.testing.assert_array_equal(label, same)
    assert not np.array_equal(image, clean)
    assert image[clean == 0].min() == 0, "nothing wraps around below 0"
    assert np.median(image[clean == 255].astype(int)) > 200, "nothing wraps around above 255"


def test_datalist(cohort):
    content = json.loads(cohort.read_text())
    assert {"name", "description", "labels", "licence", "training", "validation", "test"} <= set(content)
    assert content["labels"] == {"0": "background", "1": "target disc"}
    expected = {"size": 32, "radius": None, "target": 125, "distractor": 255, "max_noise": 99, "seed": 3}
    assert content["parameters"] == expected
    for section, numbers in {"training": range(5), "validation": range(5, 7), "test": [7]}.items():
        assert [case["image"] for case in content[section]] == [f"imagesTr/disc_{i:04d}.nii" for i in numbers]
    assert len(files(cohort.parent)) == 17


def test_files_hold_the_images_and_monai_reads_them(cohort):
    for index, case in enumerate(load_decathlon_datalist(str(cohort), True, "training")):
        arrays = make_disc(np.random.default_rng([3, index]), size=32)
        loaded = LoadImaged(["image", "label"], ensure_channel_first=True)(case)
        for key, array in zip(("image", "label"), arrays, strict=True):
            volume = nib.load(case[key])
            assert volume.get_data_dtype() == np.uint8
            np.testing.assert_array_equal(volume.affine, np.eye(4))
            np.testing.assert_array_equal(np.asarray(volume.dataobj), array)
            np.testing.assert_array_equal(loaded[key].numpy(), array[None])


def test_wrong_options():
    for options, name in (
        ({"size": 8}, "size"),
        ({"size": 64.5}, "size"),
        ({"radius": 0.5}, "radius"),
        ({"radius": 50}, "radius"),
        ({"target": 256}, "target"),
        ({"distractor": 0}, "distractor"),
        ({"max_noise": -1}, "max_noise"),
        ({"seed_or_rng": -1}, "seed_or_rng"),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected .* got {options[name]}"):
            make_disc(**{"seed_or_rng": 0, **options})
