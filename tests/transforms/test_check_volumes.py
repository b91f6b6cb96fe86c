"""Errors about images and labels name the file, what was found and what to do."""

import gzip
import json
import zlib

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, LoadImaged
from PIL import Image

from medconstraints.transforms import CheckVolumesd, LoadVolumed, VolumeError

SHAPE = (12, 10, 8)
AFFINE = np.diag([-1.5, -2.0, 3.0, 1.0])


def save(path, array, affine=AFFINE):
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


@pytest.fixture
def picture(rng):
    return rng.random(SHAPE).astype(np.float32)


def meta(array, name="case.nii.gz", affine=AFFINE):
    return MetaTensor(torch.as_tensor(array), affine=torch.as_tensor(affine), meta={"filename_or_obj": f"/data/{name}"})


def item(image=None, label=None, **more):
    """A sound pair, with parts replaced."""
    image = torch.arange(960.0).reshape(1, *SHAPE) if image is None else image
    if label is None:
        label = torch.zeros(1, *SHAPE)
        label[0, 2:5, 3:6, 1:4] = 1
        label[0, 6:8, 3:6, 1:4] = 2
    return {"image": meta(image), "label": meta(label, "case_label.nii.gz", **more)}


def changed(values, index, new):
    out = values.clone()
    out[index] = new
    return out


IMAGE, LABEL = item()["image"].as_tensor(), item()["label"].as_tensor()


# LoadVolumed


def test_loads_what_monai_loads(tmp_path, picture):
    label = (picture > 0.5).astype(np.uint8)
    case = {"image": save(tmp_path / "a.nii.gz", picture), "label": str(save(tmp_path / "b.nii", label)), "id": 7}
    ours = LoadVolumed(["image", "label"])(case)
    theirs = LoadImaged(["image", "label"], ensure_channel_first=True)(case)
    for key in ("image", "label"):
        assert torch.equal(ours[key].as_tensor(), theirs[key].as_tensor())
        assert ours[key].dtype == torch.float32
        assert torch.equal(ours[key].affine, theirs[key].affine)
        assert ours[key].meta["filename_or_obj"] == theirs[key].meta["filename_or_obj"]
    assert ours["id"] == 7
    assert isinstance(case["label"], str)
    raw = LoadVolumed("label", dtype=None, ensure_channel_first=False, reader="NibabelReader")(case)
    assert raw["label"].shape == SHAPE
    assert raw["label"].dtype == torch.uint8
    assert LoadVolumed("other", allow_missing_keys=True)(case) == case


BAD_GZIP, BAD_NIFTI = gzip.BadGzipFile, nib.filebasedimages.ImageFileError
SPOILT = {
    "half": (
        "a.nii.gz",
        lambda raw: raw[: len(raw) // 2],
        r"is truncated \(its compressed data end too",
        EOFError,
    ),
    "plain": ("a.nii", lambda raw: gzip.decompress(raw)[:900], r"is truncated \(900 bytes of 4192\); copy", None),
    "packed": ("a.nii.gz", lambda raw: gzip.compress(gzip.decompress(raw)[:900]), r"is truncated \(900 bytes", None),
    "checksum": ("a.nii.gz", lambda raw: raw[:-8] + bytes(8), r"is damaged \(BadGzipFile: CRC check failed", BAD_GZIP),
    "bytes": ("a.nii.gz", lambda raw: raw[:40] + b"\xff" * 400 + raw[440:], r"is damaged \(error: Error", zlib.error),
    "name": ("a.nii.gz", lambda raw: b"scan " * 400, r"is not gzip-compressed although its name ends in \.gz", None),
    "text": ("a.nii.gz", lambda raw: gzip.compress(b"scan " * 400), "is not a NIfTI file, or its header", None),
    "empty": ("a.nii.gz", lambda raw: b"", r"is empty \(0 bytes\); copy or download it again", None),
    "good": ("a.nii", gzip.decompress, None, None),
}


@pytest.mark.parametrize(("name", "spoil", "reason", "cause"), SPOILT.values(), ids=SPOILT)
def test_files_that_cannot_be_read(tmp_path, picture, name, spoil, reason, cause):
    """Whichever reader would read them: ITK fills up, nibabel does not look."""
    raw = save(tmp_path / "good.nii.gz", picture).read_bytes()
    (tmp_path / name).write_bytes(spoil(raw))
    for reader in (None, "NibabelReader", "ITKReader"):
        load = LoadVolumed("image", reader=reader)
        if reason is None:  # the same bytes, unspoilt: the check is not what refuses the others
            assert load({"image": tmp_path / name})["image"].shape == (1, *SHAPE)
            continue
        with pytest.raises(VolumeError, match=rf"^{name}: {reason}") as caught:
            load({"image": tmp_path / name})
        assert caught.value.__cause__ is None if cause is None else isinstance(caught.value.__cause__, cause)


def test_missing_file(tmp_path):
    with pytest.raises(VolumeError, match=r"absent\.nii\.gz: no such file .*check the data list") as caught:
        LoadVolumed("image", reader="ITKReader")({"image": tmp_path / "absent.nii.gz"})
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_error_inside_a_pipeline_stays_readable(tmp_path):
    with pytest.raises(RuntimeError, match="applying transform") as caught:
        Compose([LoadVolumed("image")])({"image": tmp_path / "absent.nii.gz"})
    assert isinstance(caught.value.__cause__, VolumeError)


def test_a_reader_that_fails_is_named(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"no array at all")
    with pytest.raises(
        VolumeError, match=r"a\.npy: cannot be read \(\w+: .*\); save it again, or give another reader"
    ) as caught:
        LoadVolumed("image")({"image": tmp_path / "a.npy"})
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("shape", "arguments", "expected"),
    [
        ((6, 5, 4), {}, (1, 6, 5, 4)),
        ((6, 5, 4, 1), {}, (1, 6, 5, 4)),
        ((6, 5, 4, 3), {"allow_channels": True}, (3, 6, 5, 4)),
        (
            (6, 5, 4, 3),
            {},
            r"is 4D \(6, 5, 4, 3\), expected 3 spatial axes; save one time point .* allow_channels=True",
        ),
        ((6, 5), {}, r"has 2 axes \(6, 5\), expected 3 spatial axes; use a volume, or set spatial_dims=2"),
        ((6, 5), {"spatial_dims": 2}, (1, 6, 5)),
        ((6, 5, 4), {"spatial_dims": 2}, r"is 3D \(6, 5, 4\), expected 2 spatial axes"),
    ],
)
def test_number_of_axes(tmp_path, shape, arguments, expected):
    path = save(tmp_path / "a.nii.gz", np.arange(np.prod(shape), dtype=np.float32).reshape(shape))
    load = LoadVolumed("image", **arguments)
    if isinstance(expected, tuple):
        assert load({"image": path})["image"].shape == expected
    else:
        with pytest.raises(VolumeError, match=rf"^a\.nii\.gz: {expected}"):
            load({"image": path})


def test_colour_picture(tmp_path, rng):
    Image.fromarray(rng.integers(0, 255, (9, 7, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    load = LoadVolumed("image", spatial_dims=2, allow_channels=True)
    assert load({"image": tmp_path / "a.png"})["image"].shape == (3, 7, 9)
    with pytest.raises(VolumeError, match=r"a\.png: is 3D \(7, 9, 3\), expected 2 spatial axes"):
        LoadVolumed("image", spatial_dims=2)({"image": tmp_path / "a.png"})


def test_lists_of_files_are_channels(tmp_path, picture):
    first, second = save(tmp_path / "flair.nii.gz", picture), save(tmp_path / "t1.nii.gz", picture + 1)
    image = LoadVolumed("image")({"image": [first, str(second)]})["image"]
    assert image.shape == (2, *SHAPE)
    assert torch.allclose(image[1], image[0] + 1)
    flat = [save(tmp_path / f"{name}.nii", picture[..., None]) for name in "ab"]  # (X, Y, Z, 1) each
    assert LoadVolumed("image")({"image": flat})["image"].shape == (2, *SHAPE)
    small = save(tmp_path / "small.nii.gz", picture[:5])
    with pytest.raises(VolumeError, match=r"^small\.nii\.gz: has the shape .*, flair\.nii\.gz"):
        LoadVolumed("image")({"image": [first, small]})
    with pytest.raises(VolumeError, match=r"^gone\.nii: no such file"):
        LoadVolumed("image")({"image": [first, tmp_path / "gone.nii"]})
    series = [save(tmp_path / f"{name}.nii", np.stack([picture] * 3, axis=-1)) for name in "cd"]
    with pytest.raises(VolumeError, match=r"c\.nii, d\.nii: is 4D"):
        LoadVolumed("image")({"image": series})
    slices = [save(tmp_path / f"{name}.nii", picture[0]) for name in "ef"]
    with pytest.raises(VolumeError, match=r"e\.nii, f\.nii: has 2 axes"):
        LoadVolumed("image")({"image": slices})


def test_what_is_no_path():
    with pytest.raises(TypeError, match="image: expected a path or a list of paths, got Tensor; load images once only"):
        LoadVolumed("image")({"image": torch.zeros(1, 2, 2, 2)})


# CheckVolumesd


def test_sound_items_come_back_unchanged():
    pairs = [
        item(image=(IMAGE * 100).to(torch.int16), label=LABEL.to(torch.uint8)),
        item(image=torch.cat([IMAGE, -IMAGE]), label=torch.zeros(1, *SHAPE)),
        item(affine=AFFINE + 0.014),  # the smallest voxel side is 1.5 mm
        {"image": IMAGE, "label": LABEL},  # plain tensors
        {"image": IMAGE.numpy(), "label": LABEL.numpy().astype(np.uint16)},
    ]
    for pair in pairs:
        before = {key: np.array(value) for key, value in pair.items()}
        out = CheckVolumesd("image", "label", num_classes=3, min_shape=SHAPE)(pair)
        assert out is pair
        assert all(np.array_equal(out[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("image", "arguments", "reason"),
    [
        (
            torch.zeros(2, *SHAPE, 3),
            {},
            r"has the shape \(2, 12, 10, 8, 3\), expected one channel axis and 3 spatial axes; take",
        ),
        (torch.zeros(SHAPE), {}, r"has the shape \(12, 10, 8\), .*use EnsureChannelFirstd before this check"),
        (torch.zeros(1, 0, 10, 8), {}, r"has the shape \(1, 0, 10, 8\), it holds no voxel"),
        (
            changed(IMAGE, (0, slice(3, 5), 4, 5), float("nan")),
            {},
            r"has 2 NaN voxels, the first at \(3, 4, 5\) of channel 0; repair the file",
        ),
        (
            changed(IMAGE, (0, 1, 2, 3), float("-inf")),
            {},
            r"has 1 infinite voxel, the first at \(1, 2, 3\) of channel 0",
        ),
        (torch.cat([IMAGE, 0 * IMAGE + 7, 0 * IMAGE]), {}, "is constant in channel 1, 2 of 3; it holds no picture"),
        (changed(0 * IMAGE, (0, 1, 2, 3), float("nan")), {}, r"has 1 NaN voxel,.*\n.*is constant in channel 0 of 1"),
        (IMAGE, {"min_shape": (12, 16, 8)}, r"has the shape \(12, 10, 8\), expected at least \(12, 16, 8\); pad it"),
    ],
)
def test_unusable_images(image, arguments, reason):
    with pytest.raises(VolumeError, match=rf"^case\.nii\.gz: {reason}"):
        CheckVolumesd(**arguments)({"image": meta(image)})


def bad_label(new):
    return changed(LABEL, (0, 0, 0, slice(0, len(new))), torch.tensor(new))


@pytest.mark.parametrize(
    ("pair", "arguments", "reason"),
    [
        (
            item(label=LABEL[:, :, :, :7]),
            {},
            r"has the shape \(12, 10, 7\), its image case\.nii\.gz \(12, 10, 8\); check that",
        ),
        (
            item(affine=AFFINE + np.outer([1, 0, 0, 0], [0, 0, 0, 2.5])),
            {},
            r"has another affine than its image case\.nii\.gz: the origin differs by up to 2\.5 mm; use",
        ),
        (item(affine=np.diag([1.5, -2.0, 3.0, 1.0])), {}, "the voxel size or direction differs by up to 3 mm"),
        (item(affine=np.full((4, 4), np.nan)), {}, "has another affine than its image"),
        (item(label=bad_label([3.0, 7.0])), {}, r"has values that are no class number 0 to 2: 3, 7; map them"),
        (item(label=bad_label([0.5, 1.25])), {"num_classes": None}, r"no class number 0 to 1, 2, \.\.\.: 0\.5, 1\.25;"),
        (
            item(label=bad_label([float("nan"), float("nan"), float("inf"), -1.0])),
            {"num_classes": None},
            r"no class number 0 to 1, 2, \.\.\.: -1, inf, nan;",
        ),
        (item(label=bad_label([9.0, 8, 7, 6, 5, 4, 3])), {}, "0 to 2: 3, 4, 5, 6, 7 and 2 more;"),
        (
            item(label=0 * LABEL),
            {"allow_empty_label": False},
            "has no foreground voxel; leave this item out, or set allow",
        ),
        (item(label=0 * LABEL + 1), {}, r"has no background voxel \(all 960 are foreground\); nothing lies outside"),
        (
            item(label=torch.cat([LABEL, LABEL])),
            {},
            r"has 2 channels, expected one with class numbers; use AsDiscreted",
        ),
    ],
)
def test_unusable_labels(pair, arguments, reason):
    with pytest.raises(VolumeError, match=rf"^case_label\.nii\.gz: .*{reason}"):
        CheckVolumesd(label_key="label", **{"num_classes": 3, **arguments})(pair)
    CheckVolumesd()(pair)  # the image itself is sound


@pytest.mark.parametrize("scale", [1e-3, 50.0])
def test_affines_are_compared_in_voxels(scale):
    """Microscopy or a coarse scan: 1 % of the smallest voxel side is let through, 1.1 % is not."""
    turn = np.array([[0, -1, 0, 0], [0.8, 0, -0.6, 0], [0.6, 0, 0.8, 0], [0, 0, 0, 1.0]])
    affine = turn @ np.diag([2 * scale, scale, 3 * scale, 1])
    check = CheckVolumesd(label_key="label")
    moved = affine.copy()
    moved[1, 3] += 0.0099 * scale
    pair = {"image": meta(IMAGE, affine=affine), "label": meta(LABEL, "case_label.nii.gz", affine=moved)}
    assert check(pair) is pair
    with pytest.raises(VolumeError, match=r"has another affine than its image .* the origin differs"):
        CheckVolumesd(label_key="label", affine_tolerance=9e-3)(pair)
    moved[1, 3] += 0.0011 * scale
    with pytest.raises(VolumeError, match=r"has another affine than its image .* the origin differs"):
        check({**pair, "label": meta(LABEL, "case_label.nii.gz", affine=moved)})


def test_values_without_annotation():
    scribble = changed(torch.full((1, *SHAPE), 4.0), (0, slice(0, 2)), 0.0)
    pair = item(label=changed(scribble, (0, 5, 5, 5), 1.0))
    CheckVolumesd(label_key="label", num_classes=3, ignore_index=4, allow_empty_label=False)(pair)
    with pytest.raises(VolumeError, match="no class number 0 to 2: 4;"):
        CheckVolumesd(label_key="label", num_classes=3)(pair)
    with pytest.raises(VolumeError, match="has no foreground voxel"):
        CheckVolumesd(label_key="label", ignore_index=4, allow_empty_label=False)(item(label=scribble))
    CheckVolumesd(label_key="label", num_classes=3, ignore_index=-1)(item(label=bad_label([-1.0])))
    with pytest.raises(VolumeError, match=r"has no background voxel \(all 1 are foreground\)"):
        CheckVolumesd(label_key="label", ignore_index=4)(item(label=changed(0 * LABEL + 4, (0, 5, 5, 5), 1.0)))
    unlabelled = item(label=0 * LABEL + 4)
    assert CheckVolumesd(label_key="label", num_classes=3, ignore_index=4)(unlabelled) is unlabelled


def test_everything_wrong_is_said_at_once():
    pair = item(image=changed(IMAGE, (0, 0, 0, 0), float("nan")), label=bad_label([9.0])[..., :7])
    with pytest.raises(VolumeError) as caught:
        CheckVolumesd(label_key="label", num_classes=3)(pair)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["case.nii.gz", "case_label.nii.gz", "case_label.nii.gz"]
    assert "NaN" in lines[0]
    assert "9" in lines[1]
    assert "(12, 10, 7)" in lines[2]


def test_items_without_label_or_image():
    check = CheckVolumesd(label_key="label")
    only_image = {"image": meta(IMAGE)}
    assert check(only_image) is only_image
    with pytest.raises(KeyError, match=r"image: expected this key in the item, got \['label'\]; set image_key"):
        check({"label": meta(LABEL)})
    with pytest.raises(TypeError, match="label: expected a loaded volume, got str; put CheckVolumesd after loading"):
        check({"image": meta(IMAGE), "label": "label.nii.gz"})


def test_unnamed_volumes_go_by_their_key():
    with pytest.raises(VolumeError, match=r"^label: has no background voxel"):
        CheckVolumesd(label_key="label")({"image": IMAGE, "label": 0 * LABEL + 1})


def test_two_dimensions():
    pair = {"image": meta(IMAGE[..., 0]), "label": meta(LABEL[..., 1])}
    assert CheckVolumesd(label_key="label", spatial_dims=2, num_classes=3, min_shape=(12, 10))(pair) is pair
    with pytest.raises(VolumeError, match=r"expected one channel axis and 3 spatial axes; use EnsureChannelFirstd"):
        CheckVolumesd()(pair)


def test_arguments():
    wrong = {"num_classes": 1, "spatial_dims": 4, "min_shape": (4, 4), "affine_tolerance": float("nan")}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=rf"{name}: expected .*, got .*"):
            CheckVolumesd(**{name: value})


# Real files


def chain(**arguments):
    return Compose([LoadVolumed(["image", "label"]), CheckVolumesd(label_key="label", **arguments)])


def cause_of(call):
    with pytest.raises(RuntimeError) as caught:
        call()
    assert isinstance(caught.value.__cause__, VolumeError)
    return str(caught.value.__cause__)


def test_real_pairs_pass(data_root):
    pairs = json.loads((data_root / "hippocampus.json").read_text())["training"]
    chosen = [p for p in pairs if p["label"].endswith(("003.nii.gz", "243.nii.gz"))] + pairs[:1]  # float32 labels too
    for pair in chosen:
        loaded = chain(num_classes=3)({key: data_root / pair[key] for key in ("image", "label")})
        assert loaded["image"].shape == loaded["label"].shape


def test_real_label_of_another_organ(data_root):
    pair = json.loads((data_root / "hippocampus.json").read_text())["training"][0]
    organ = "label_wrong_organ_512x512x94_281.nii.gz"
    case = {"image": data_root / pair["image"], "label": data_root / "hippocampus/odd" / organ}
    message = cause_of(lambda: chain(num_classes=3)(case))
    assert message.startswith(f"{organ}: has the shape (512, 512, 94), its image ")


def test_real_image_without_label(data_root):
    odd = data_root / "hippocampus/odd/image_without_label_118.nii.gz"
    case = {"image": odd, "label": data_root / "hippocampus/labelsTr/hippocampus_118.nii.gz"}
    assert cause_of(lambda: chain()(case)).startswith("hippocampus_118.nii.gz: no such file (")
    assert CheckVolumesd(label_key="label")(LoadVolumed("image")({"image": odd}))["image"].ndim == 4


def test_real_scribble_needs_its_ignore_value(data_root):
    folder = data_root / "acdc/odd/same_image_as_patient074_second_label"
    case = {"image": folder / "patient076_frame01.nii.gz", "label": folder / "patient076_frame01_scribble.nii.gz"}
    message = cause_of(lambda: chain(num_classes=4)(case))
    assert message.startswith("patient076_frame01_scribble.nii.gz: has values that are no class number 0 to 3: 4;")
    assert chain(num_classes=4, ignore_index=4)(case)["label"].shape[0] == 1
