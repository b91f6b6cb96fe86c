"""Phantoms: reproducible, labelled as promised, and stored as the NIfTI files of clinics are."""

import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from monai.data import load_decathlon_datalist
from monai.transforms import LoadImaged, Orientationd
from scipy import ndimage

import medconstraints.data
from medconstraints.synthetic.phantoms import ORIENTATIONS, main, make_cohort, make_phantom

SMALL = {"shape": (24, 24, 16)}


def box_share(mask):
    """Filled share of the bounding box, by index extremes."""
    corners = np.argwhere(mask)
    return mask.sum() / np.prod(corners.max(0) - corners.min(0) + 1)


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return make_cohort(tmp_path_factory.mktemp("cohort"), num_training=5, num_validation=2, num_test=1, seed=3, **SMALL)


def test_same_seed_same_phantom():
    first, again, other = (make_phantom(seed, **SMALL) for seed in (5, np.random.default_rng(5), 6))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


@pytest.mark.parametrize("shape", [(48, 48, 32), (24, 24, 16), (16, 40, 20)])
@pytest.mark.parametrize("filling", [None, 0.12, 0.85])
def test_types_and_organ(shape, filling):
    for seed in range(4):
        image, label, affine = make_phantom(seed, shape=shape, filling=filling)
        assert (image.dtype, label.dtype, affine.dtype) == (np.int16, np.uint8, np.float64)
        assert image.shape == label.shape == shape and affine.shape == (4, 4)
        assert image.min() >= 0 and image.max() > 600
        assert np.unique(label).tolist() == [0, 1]
        assert ndimage.label(label)[1] == 1, "the organ is one connected component"
        inner = label[1:-1, 1:-1, 1:-1]
        assert inner.sum() == label.sum() > 0, "the organ does not touch the border"


@pytest.mark.parametrize("filling", [0.12, 0.2, 0.3, 0.4, 0.52, 0.6, 0.7, 0.8, 0.85])
@pytest.mark.parametrize(("shape", "tolerance"), [((48, 48, 32), 0.02), ((24, 24, 16), 0.03)])
def test_filling(filling, shape, tolerance):
    shares = [box_share(make_phantom(seed, shape=shape, filling=filling)[1] > 0) for seed in range(5)]
    np.testing.assert_allclose(shares, filling, atol=tolerance)


def test_natural_filling_varies():
    shares = [box_share(make_phantom(seed, **SMALL)[1] > 0) for seed in range(20)]
    assert 0.39 < min(shares) < 0.45 and 0.51 < max(shares) < 0.58


def test_organs_are_deformed():
    """An ellipsoid is its own mirror image through its centre; the bent organ is not, and still is a blob."""
    for seed in range(6):
        label = make_phantom(seed)[1]
        mask = label[ndimage.find_objects(label)[0]] > 0
        mirrored = mask[::-1, ::-1, ::-1]
        assert 0.05 < (mask ^ mirrored).sum() / mask.sum() < 0.4


def test_organs_differ_in_size_place_and_side():
    labels = np.stack([make_phantom(seed, **SMALL)[1] for seed in range(12)])
    centres = np.array([np.argwhere(label).mean(0) for label in labels])
    assert centres.std(0).min() > 0.3
    assert {*np.sign(centres[:, 0] - 11.5)} == {-1, 1}
    sizes = labels.sum((1, 2, 3))
    assert sizes.max() > 1.3 * sizes.min()


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 2.0), (0.7, 0.8, 5.0)])
@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PSR", "IRP"])
@pytest.mark.parametrize("oblique_degrees", [0.0, 12.0, 30.0])
def test_affine(spacing_mm, orientation, oblique_degrees):
    shape = (24, 28, 16)
    options = {"shape": shape, "spacing_mm": spacing_mm, "oblique_degrees": oblique_degrees}
    image, label, affine = make_phantom(1, orientation=orientation, **options)
    order = ["RLAPSI".index(code) // 2 for code in orientation]
    assert image.shape == label.shape == tuple(shape[axis] for axis in order)
    assert nib.aff2axcodes(affine) == tuple(orientation)
    np.testing.assert_allclose(nib.affines.voxel_sizes(affine), [spacing_mm[axis] for axis in order])
    np.testing.assert_allclose(affine[3], [0, 0, 0, 1])
    directions = affine[:3, :3] / nib.affines.voxel_sizes(affine)
    np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-12)
    angle = nib.affines.obliquity(affine).max()  # at most the angle of the rotation
    assert (angle < 1e-6) if oblique_degrees == 0 else (0.1 < np.degrees(angle) / oblique_degrees <= 1)


@pytest.mark.parametrize("orientation", ["LPS", "PSR", "IRP"])
def test_orientation_changes_storage_only(orientation):
    """Every voxel keeps its place in the patient, its intensity and its label."""
    plain = make_phantom(2, num_classes=2, **SMALL)
    stored = make_phantom(2, num_classes=2, orientation=orientation, **SMALL)
    for a, b in zip(plain[:2], stored[:2], strict=True):
        back = nib.as_closest_canonical(nib.Nifti1Image(b, stored[2]))
        np.testing.assert_allclose(back.affine, plain[2], atol=1e-9)
        np.testing.assert_array_equal(np.asarray(back.dataobj), a)


def test_two_classes_are_front_and_back_of_the_same_organ():
    for seed in range(5):
        whole, parts = (make_phantom(seed, num_classes=count, **SMALL)[1] for count in (1, 2))
        np.testing.assert_array_equal(whole > 0, parts > 0)
        assert np.unique(parts).tolist() == [0, 1, 2]
        assert 0.4 < (parts == 1).sum() / whole.sum() < 0.6
        front, back = (np.argwhere(parts == value).mean(0) for value in (1, 2))
        assert front[1] > back[1]


def test_two_classes_have_different_intensities():
    image, label, _ = make_phantom(0, num_classes=2)
    medians = [np.median(image[label == value]) for value in (1, 2)]
    assert 1.05 < medians[0] / medians[1] < 1.4


@pytest.mark.parametrize("seed", range(4))
def test_intensities_separate_organ_body_and_distractor(seed):
    image, label, _ = make_phantom(seed)
    without, same_label, _ = make_phantom(seed, distractor=False)
    np.testing.assert_array_equal(label, same_label)
    other = np.abs(image.astype(int) - without) > 300
    assert 100 < other.sum() < label.sum()
    assert not label[other].any(), "the distractor is background"
    assert np.mean(image[other] > np.quantile(image[label == 1], 0.95)) > 0.9
    around = ndimage.binary_dilation(label, iterations=4) & ~ndimage.binary_dilation(label)
    assert np.mean(without[around] < np.quantile(image[label == 1], 0.05)) > 0.9


def test_noise_sets_the_standard_deviation():
    """0.2 of the contrast, 300, apart from the same phantom without noise."""
    noisy, clean = (make_phantom(0, noise=noise)[0].astype(float) for noise in (0.2, 0.0))
    assert np.std((noisy - clean)[clean > 500]) == pytest.approx(60, rel=0.05)


def test_background_has_texture_bias_and_air():
    image, label, _ = make_phantom(0, noise=0, distractor=False)
    assert np.median(image[[0, -1]][:, [0, -1]]) < 60, "air in the corners"
    assert 10 < np.std(image[(label == 0) & (image > 150)]) < 100
    assert np.std(image[ndimage.binary_erosion(label, iterations=2)]) > 5, "the bias field reaches the organ"


def test_datalist(cohort):
    content = json.loads(cohort.read_text())
    assert {"name", "description", "labels", "licence", "training", "validation", "test"} <= set(content)
    assert content["labels"] == {"0": "background", "1": "organ"}
    assert content["parameters"]["seed"] == 3 and content["parameters"]["shape"] == [24, 24, 16]
    for section, numbers in {"training": range(5), "validation": range(5, 7), "test": [7]}.items():
        assert [case["image"] for case in content[section]] == [f"imagesTr/phantom_{i:03d}.nii.gz" for i in numbers]
        for case in load_decathlon_datalist(str(cohort), True, section):
            assert nib.load(case["image"]).shape == nib.load(case["label"]).shape
    assert len(files(cohort.parent)) == 17


def test_cohort_files_hold_the_phantoms(cohort):
    for index, case in enumerate(load_decathlon_datalist(str(cohort), True, "training")):
        image, label, affine = make_phantom(
            np.random.default_rng([3, index]), orientation=ORIENTATIONS[index], spacing_mm=(1, 1, 2), **SMALL
        )
        for path, array in ((case["image"], image), (case["label"], label)):
            volume = nib.load(path)
            assert volume.get_data_dtype() == array.dtype
            np.testing.assert_array_equal(np.asarray(volume.dataobj), array)
            assert (volume.header["sform_code"], volume.header["qform_code"]) == (1, 1)
            assert volume.header.get_xyzt_units()[0] == "mm"
            np.testing.assert_allclose(volume.get_qform(), volume.affine, atol=1e-4)
            ratio = nib.affines.voxel_sizes(volume.affine) / nib.affines.voxel_sizes(affine)
            np.testing.assert_allclose(ratio, 1, atol=0.0501)
            assert np.abs(ratio - 1).max() > 1e-3
            np.testing.assert_allclose(volume.affine[:3, :3] / ratio, affine[:3, :3], atol=1e-5)


def test_cohort_orientations_vary_and_monai_undoes_them(cohort):
    cases = load_decathlon_datalist(str(cohort), True, "training")
    codes = ["".join(nib.aff2axcodes(nib.load(case["image"]).affine)) for case in cases]
    assert codes == ["RAS", "LPS", "RAS", "LAS", "PSR"]
    load = LoadImaged(["image", "label"], ensure_channel_first=True)
    orient = Orientationd(["image", "label"], axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")))
    for case in cases:
        oriented = orient(load(case))
        assert oriented["image"].shape == oriented["label"].shape == (1, 24, 24, 16)


def test_volumes_do_not_depend_on_the_counts(cohort, tmp_path):
    make_cohort(tmp_path, num_training=2, num_validation=0, num_test=1, seed=3, **SMALL)
    few, many = files(tmp_path), files(cohort.parent)
    volumes = [name for name in few if name.endswith(".nii.gz")]
    assert len(volumes) == 6
    assert all(few[name] == many[name] for name in volumes)
    assert few["imagesTr/phantom_000.nii.gz"] != few["imagesTr/phantom_002.nii.gz"]


def test_files_carry_no_time(cohort):
    for name, content in files(cohort.parent).items():
        if name.endswith(".gz"):
            assert content[4:8] == bytes(4), "the gzip header's time"


def test_seed_changes_the_cohort(cohort, tmp_path):
    make_cohort(tmp_path, num_training=1, num_validation=0, num_test=0, seed=4, **SMALL)
    name = "imagesTr/phantom_000.nii.gz"
    assert files(tmp_path)[name] != files(cohort.parent)[name]


def test_existing_cohort_is_refused_or_replaced(tmp_path):
    counts = {"num_validation": 0, "num_test": 0, **SMALL}
    make_cohort(tmp_path, num_training=2, **counts)
    (tmp_path / "notes.txt").write_text("mine")
    before = files(tmp_path)
    with pytest.raises(FileExistsError, match=r"holds a datalist\.json; name another one, or pass overwrite=True") as e:
        make_cohort(tmp_path, num_training=1, **counts)
    assert str(tmp_path) in str(e.value)
    with pytest.raises(ValueError, match="num_classes must be 1 or 2, but is 3"):
        make_cohort(tmp_path, num_training=1, overwrite=True, num_classes=3, **counts)
    assert files(tmp_path) == before, "a refused call changes nothing"
    make_cohort(tmp_path, num_training=1, seed=1, overwrite=True, **counts)
    after = files(tmp_path)
    expected = {"datalist.json", "notes.txt", "imagesTr/phantom_000.nii.gz", "labelsTr/phantom_000.nii.gz"}
    assert set(after) == expected
    assert after["imagesTr/phantom_000.nii.gz"] != before["imagesTr/phantom_000.nii.gz"]


def test_no_datalist_after_an_interrupted_replacement(tmp_path, monkeypatch):
    make_cohort(tmp_path, num_training=2, num_validation=0, num_test=0, **SMALL)

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr("pathlib.Path.write_bytes", full_disk)
    with pytest.raises(OSError, match="no space left"):
        make_cohort(tmp_path, num_training=2, overwrite=True, **SMALL)
    assert not (tmp_path / "datalist.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (48, 48)}, r"shape must be three integers of at least 16, but is \(48, 48\); give the voxels"),
        ({"shape": (48, 48, 8)}, "shape must be three integers of at least 16"),
        ({"shape": (48.0, 48, 32)}, "shape must be three integers"),
        ({"spacing_mm": (1, 1, -2)}, r"spacing_mm must be three positive numbers, but is \(1, 1, -2\); give mm"),
        ({"spacing_mm": (1, 1, float("nan"))}, "spacing_mm must be three positive numbers"),
        ({"spacing_mm": 1.0}, "spacing_mm must be three positive numbers"),
        ({"num_classes": 3}, "num_classes must be 1 or 2, but is 3; 2 splits"),
        ({"filling": 0.05}, r"filling must be None or from 0\.12 to 0\.85, but is 0\.05; try None"),
        ({"filling": 0.9}, "filling must be None or from"),
        ({"filling": 0.0}, "filling must be None or from"),
        ({"noise": -0.1}, r"noise must be a finite number of at least 0, but is -0\.1; 0 means none"),
        ({"noise": float("nan")}, "noise must be a finite number"),
        ({"oblique_degrees": 45}, "oblique_degrees must be from 0 to 30, but is 45; 0 aligns the axes"),
    ],
)
@pytest.mark.parametrize("whole", [False, True], ids=["phantom", "cohort"])
def test_wrong_options(options, message, whole, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_cohort(tmp_path / "new", **options) if whole else make_phantom(0, **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("orientation", ["RAX", "RLS", "RA", "ras"])
def test_wrong_orientation(orientation):
    with pytest.raises(ValueError, match=f"orientation must be one each of R/L, A/P and S/I, but is '{orientation}'"):
        make_phantom(0, orientation=orientation)


def test_wrong_seed():
    with pytest.raises(
        ValueError, match="seed_or_rng must be a numpy Generator or an integer of at least 0, but is -1"
    ):
        make_phantom(-1)


@pytest.mark.parametrize(("name", "least"), [("num_training", 1), ("num_validation", 0), ("num_test", 0), ("seed", 0)])
def test_wrong_counts(name, least, tmp_path):
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least {least}, but is {least - 1}"):
        make_cohort(tmp_path / "new", **{name: least - 1})
    assert not (tmp_path / "new").exists()


def test_command_line(tmp_path, capsys):
    arguments = (
        "--num-training 1 --num-validation 1 --num-test 0 --seed 2 --filling 0.3 --num-classes 2 --shape 24 24 16"
    )
    main(["--output", str(tmp_path / "a"), *arguments.split()])
    assert capsys.readouterr().out == f"{tmp_path / 'a' / 'datalist.json'}\n"
    counts = {"num_training": 1, "num_validation": 1, "num_test": 0}
    make_cohort(tmp_path / "b", seed=2, filling=0.3, num_classes=2, **counts, **SMALL)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    labels = json.loads((tmp_path / "a" / "datalist.json").read_text())["labels"]
    assert labels == {"0": "background", "1": "anterior part of the organ", "2": "posterior part of the organ"}


def test_command_line_options_reach_the_cohort(tmp_path):
    arguments = "--num-training 1 --noise 0.3 --oblique-degrees 4 --spacing-mm 2 2 3 --no-distractor --shape 16 16 16"
    main(["--output", str(tmp_path), *arguments.split()])
    parameters = json.loads((tmp_path / "datalist.json").read_text())["parameters"]
    expected = {"noise": 0.3, "oblique_degrees": 4.0, "spacing_mm": [2.0, 2.0, 3.0], "distractor": False, "seed": 0}
    assert parameters == {"num_classes": 1, "filling": None, "shape": [16, 16, 16], **expected}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("--filling 0.95", "filling must be None or from"), ("--num-training 0", "num_training must be an integer")],
)
def test_command_line_errors(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path), *arguments.split()])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_runs_as_a_module_without_warnings(tmp_path):
    """The package must not import the module before ``python -m`` runs it."""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "medconstraints.synthetic.phantoms", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--num-training" in done.stdout


def test_names_of_the_package():
    assert medconstraints.data.make_cohort is make_cohort
    assert medconstraints.data.make_phantom is make_phantom
    with pytest.raises(AttributeError, match="no attribute 'make_phantoms'"):
        _ = medconstraints.data.make_phantoms
