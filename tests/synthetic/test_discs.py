"""Two discs: equal but for their intensity, reproducible, and stored as files that MONAI reads."""

import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from monai.data import load_decathlon_datalist
from monai.transforms import LoadImaged
from scipy import ndimage

import medconstraints.data
from medconstraints.synthetic.discs import main, make_disc, make_discs


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


@pytest.mark.parametrize(
    ("size", "radius", "expected"), [(256, None, 25), (128, None, 12.5), (64, None, 6.25), (96, 16, 16), (60, 1.5, 1.5)]
)
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


@pytest.mark.parametrize(("max_noise", "mean"), [(99, 49.5), (20, 10)])
def test_noise_is_drawn_per_image_from_zero_to_the_largest(max_noise, mean):
    # Half of the background's noise is clipped at 0; what is left has a mean of sigma / sqrt(2 pi).
    sigmas = []
    for seed in range(200):
        clean = make_disc(seed, size=64, max_noise=0)[0]  # the discs are at the same places
        background = make_disc(seed, size=64, max_noise=max_noise)[0][clean == 0]
        sigmas.append(background.mean() * np.sqrt(2 * np.pi))
    assert min(sigmas) < 0.05 * max_noise
    assert 0.9 * max_noise < max(sigmas) < 1.1 * max_noise
    assert np.median(sigmas) == pytest.approx(mean, rel=0.2)


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


def test_images_do_not_depend_on_the_counts(cohort, tmp_path):
    make_discs(tmp_path, num_training=2, num_validation=0, num_test=1, size=32, seed=3)
    few, many = files(tmp_path), files(cohort.parent)
    images = [name for name in few if name.endswith(".nii")]
    assert len(images) == 6
    assert all(few[name] == many[name] for name in images)
    assert few["imagesTr/disc_0000.nii"] != few["imagesTr/disc_0001.nii"]


def test_existing_cohort_is_refused_or_replaced(tmp_path):
    counts = {"num_validation": 0, "num_test": 0, "size": 32}
    make_discs(tmp_path, num_training=2, **counts)
    (tmp_path / "notes.txt").write_text("mine")
    before = files(tmp_path)
    with pytest.raises(FileExistsError, match=r"holds a datalist\.json; name another one, or pass overwrite=True"):
        make_discs(tmp_path, num_training=1, **counts)
    with pytest.raises(ValueError, match="target must be from 1 to 255, but is 0"):
        make_discs(tmp_path, num_training=1, overwrite=True, target=0, **counts)
    assert files(tmp_path) == before, "a refused call changes nothing"
    make_discs(tmp_path, num_training=1, seed=1, overwrite=True, **counts)
    after = files(tmp_path)
    assert set(after) == {"datalist.json", "notes.txt", "imagesTr/disc_0000.nii", "labelsTr/disc_0000.nii"}
    assert after["imagesTr/disc_0000.nii"] != before["imagesTr/disc_0000.nii"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 8}, "size must be an integer of at least 16, but is 8; give pixels"),
        ({"size": 64.0}, "size must be an integer of at least 16"),
        ({"radius": 0.5}, "radius must be None or from 1 to size / 6, but is 0.5; enlarge size or try None"),
        ({"radius": 50}, "radius must be None or from 1 to size / 6, but is 50"),
        ({"target": 256}, "target must be from 1 to 255, but is 256"),
        ({"distractor": 0}, "distractor must be from 1 to 255, but is 0; the background is 0"),
        ({"max_noise": -1}, "max_noise must be an integer of at least 0, but is -1; 0 means none"),
    ],
)
@pytest.mark.parametrize("whole", [False, True], ids=["image", "cohort"])
def test_wrong_options(options, message, whole, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_discs(tmp_path / "new", **options) if whole else make_disc(0, **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("name", "least"), [("num_training", 1), ("num_validation", 0), ("num_test", 0), ("seed", 0)])
def test_wrong_counts(name, least, tmp_path):
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least {least}, but is {least - 1}"):
        make_discs(tmp_path / "new", **{name: least - 1})
    assert not (tmp_path / "new").exists()


def test_wrong_seed():
    with pytest.raises(ValueError, match="seed_or_rng must be a numpy Generator or an integer of at least 0"):
        make_disc(-1)


def test_command_line(tmp_path, capsys):
    arguments = (
        "--num-training 1 --num-validation 1 --num-test 0 --seed 2 --size 48 --radius 5.5 --target 99 --distractor 180"
    )
    main(["--output", str(tmp_path / "a"), *arguments.split(), "--max-noise", "7"])
    assert capsys.readouterr().out == f"{tmp_path / 'a' / 'datalist.json'}\n"
    options = {"size": 48, "radius": 5.5, "target": 99, "distractor": 180, "max_noise": 7}
    make_discs(tmp_path / "b", num_training=1, num_validation=1, num_test=0, seed=2, **options)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_command_line_errors(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path), "--radius", "90"])
    assert stop.value.code == 2
    assert "radius must be None or from 1" in capsys.readouterr().err


def test_runs_as_a_module_without_warnings(tmp_path):
    """The package must not import the module before ``python -m`` runs it."""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "medconstraints.synthetic.discs", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--max-noise" in done.stdout


def test_names_of_the_package():
    assert medconstraints.data.make_disc is make_disc
    assert medconstraints.data.make_discs is make_discs
