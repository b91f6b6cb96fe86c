"""Phantoms: reproducible, labelled as promised, and stored as the NIfTI files of clinics are."""

import nibabel as nib
import numpy as np
import pytest
from monai.data import load_decathlon_datalist
from monai.transforms import LoadImaged, Orientationd
from scipy import ndimage

from medconstraints.synthetic.phantoms import ORIENTATIONS, make_cohort, make_phantom

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


@pytest.mark.parametrize(
    ("shape", "filling"), [((48, 48, 32), None), ((24, 24, 16), 0.12), ((16, 40, 20), 0.85), ((24, 24, 16), None)]
)
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


@pytest.mark.parametrize(("shape", "tolerance"), [((48, 48, 32), 0.02), ((24, 24, 16), 0.03)])
def test_filling(shape, tolerance):
    for filling in (0.12, 0.3, 0.52, 0.7, 0.85):
        shares = [box_share(make_phantom(seed, shape=shape, filling=filling)[1] > 0) for seed in range(3)]
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


@pytest.mark.parametrize(
    ("spacing_mm", "orientation", "oblique_degrees"),
    [
        ((1.0, 1.0, 2.0), "RAS", 0.0),
        ((1.0, 1.0, 2.0), "PSR", 12.0),
        ((0.7, 0.8, 5.0), "LPS", 30.0),
        ((0.7, 0.8, 5.0), "IRP", 12.0),
    ],
)
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


@pytest.mark.parametrize("orientation", ["LPS", "IRP"])
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


@pytest.mark.parametrize("seed", range(2))
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


def test_wrong_options(tmp_path):
    for options, name in (
        ({"shape": (48, 48)}, "shape"),
        ({"shape": (48, 48, 8)}, "shape"),
        ({"shape": (48.0, 48, 32)}, "shape"),
        ({"spacing_mm": (1, 1, -2)}, "spacing_mm"),
        ({"spacing_mm": (1, 1, float("nan"))}, "spacing_mm"),
        ({"num_classes": 3}, "num_classes"),
        ({"filling": 0.05}, "filling"),
        ({"filling": 0.9}, "filling"),
        ({"noise": -0.1}, "noise"),
        ({"noise": float("nan")}, "noise"),
        ({"oblique_degrees": 45}, "oblique_degrees"),
    ):
        for make in (lambda **options: make_phantom(0, **options), lambda **options: make_cohort(tmp_path, **options)):
            with pytest.raises(ValueError, match=f"{name}: expected"):
                make(**options)
    for orientation in ("RAX", "RLS", "RA", "ras"):
        with pytest.raises(ValueError, match=f"orientation: expected one each of .*'{orientation}'"):
            make_phantom(0, orientation=orientation)
    with pytest.raises(ValueError, match="seed_or_rng: expected"):
        make_phantom(-1)
    assert not list(tmp_path.iterdir())
