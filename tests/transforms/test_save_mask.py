"""Saved masks: the grid of their file whatever its header says, and no half-written file."""

import json

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from monai.transforms import Compose

from medconstraints.synthetic import make_phantom
from medconstraints.transforms import SaveMaskd, mask_transforms, reading_transforms
from medconstraints.volumes import save_mask

SHAPE = (6, 7, 5)
GEOMETRY = ("qform_code", "sform_code", "xyzt_units", "pixdim", "srow_x", "srow_y", "srow_z", "quatern_b", "qoffset_x")


def oblique(degrees=20.0):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    affine = np.diag([1.5, 2.0, 3.0, 1.0])
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ affine[:3, :3]
    affine[:3, 3] = [-10, 4, 7.5]
    return affine


def write(path, *, codes=(1, 1), shape=SHAPE, affine=None, units=("mm", "sec"), kind=nib.Nifti1Image, dtype=np.int16):
    """A NIfTI file; codes are those of qform and sform."""
    image = kind(np.arange(np.prod(shape)).reshape(shape).astype(dtype), None)
    affine = oblique() if affine is None else affine
    image.header.set_qform(affine, codes[0])
    image.header.set_sform(affine, codes[1])
    image.header.set_xyzt_units(*units)
    image.header.set_slope_inter(0.5, 3)
    image.header["cal_max"] = 900
    image.header["descrip"] = b"patient 17"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"patient 17"))
    nib.save(image, path)
    return path


def mask_of(shape=SHAPE):
    return np.arange(np.prod(shape[:3])).reshape(shape[:3]) % 3


@pytest.mark.parametrize(
    ("kind", "codes", "ending"),
    [
        (nib.Nifti1Image, (1, 1), ".nii.gz"),
        (nib.Nifti1Image, (2, 0), ".nii"),
        (nib.Nifti1Image, (0, 2), ".nii.gz"),
        (nib.Nifti1Image, (0, 0), ".nii"),
        (nib.Nifti2Image, (1, 4), ".nii.gz"),
    ],
)
def test_geometry_is_that_of_the_file(tmp_path, kind, codes, ending):
    source = nib.load(write(tmp_path / f"in{ending}", codes=codes, kind=kind))
    saved = nib.load(save_mask(mask_of(), tmp_path / f"in{ending}", tmp_path / "mask.nii.gz"))
    assert type(saved) is kind
    assert np.array_equal(saved.affine, source.affine)
    for field in GEOMETRY:
        assert np.array_equal(saved.header[field], source.header[field]), field
    assert saved.header.get_xyzt_units() == ("mm", "sec")
    assert saved.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(saved.dataobj), mask_of())  # no slope of the image
    assert saved.dataobj.slope == 1 and saved.dataobj.inter == 0
    assert saved.header["cal_max"] == 0
    assert not saved.header.extensions and saved.header["descrip"] == b""


def test_forms_that_disagree_both_stay(tmp_path):
    image = nib.load(write(tmp_path / "in.nii"))
    image.header.set_sform(oblique(50.0), 2)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), oblique(50.0), image.header), tmp_path / "two.nii")
    source = nib.load(tmp_path / "two.nii")
    assert not np.allclose(source.get_qform(), source.get_sform())
    saved = nib.load(save_mask(mask_of(), tmp_path / "two.nii", tmp_path / "mask.nii"))
    assert np.array_equal(saved.get_qform(coded=True)[0], source.get_qform(coded=True)[0])
    assert np.array_equal(saved.get_sform(coded=True)[0], source.get_sform(coded=True)[0])


@pytest.mark.parametrize("shape", [(6, 7, 5, 1), (6, 7, 5, 1, 1), (6, 7, 1)])
def test_axes_of_length_one(tmp_path, shape):
    write(tmp_path / "in.nii.gz", shape=shape)
    saved = nib.load(save_mask(mask_of(shape), tmp_path / "in.nii.gz", tmp_path / "mask.nii.gz"))
    assert saved.shape == shape
    assert np.array_equal(np.asarray(saved.dataobj).reshape(shape[:3]), mask_of(shape))


def test_big_endian(tmp_path):
    header = nib.Nifti1Header(endianness=">")
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.int16), oblique(), header), tmp_path / "in.nii")
    source = nib.load(tmp_path / "in.nii")
    saved = nib.load(save_mask(mask_of(), tmp_path / "in.nii", tmp_path / "mask.nii"))
    assert np.array_equal(saved.affine, source.affine)


@pytest.mark.parametrize(
    ("mask", "name", "message"),
    [
        (np.zeros((7, 6, 5)), "in.nii.gz", r"mask: expected the shape \(6, 7, 5\) of in\.nii\.gz, got \(7, 6, 5\)"),
        (np.full(SHAPE, 300), "in.nii.gz", r"mask: expected class numbers 0 to 255, got 300 to 300"),
        (np.full(SHAPE, 0.5), "in.nii.gz", r"mask: expected class numbers"),
        (np.zeros(SHAPE), "in.mha", r"path: expected the ending \.mha for a mask of in\.mha, got mask\.nii"),
        (np.zeros(SHAPE), "series.nii", r"mask: expected the shape \(6, 7, 5, 2\) of series\.nii, got \(6, 7, 5\)"),
    ],
)
def test_masks_that_do_not_fit(tmp_path, mask, name, message):
    write(tmp_path / "in.nii.gz")
    write(tmp_path / "series.nii", shape=(*SHAPE, 2))
    with pytest.raises(ValueError, match=message):
        save_mask(mask, tmp_path / name, tmp_path / "mask.nii.gz")
    assert not (tmp_path / "mask.nii.gz").exists()


def test_a_write_that_fails_leaves_the_former_mask(tmp_path, monkeypatch):
    write(tmp_path / "in.nii.gz")
    (tmp_path / "mask.nii.gz").write_bytes(b"former")

    def full(image, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib, "save", full)
    with pytest.raises(OSError, match=r"the disk is full, mask\.nii\.gz was not written"):
        save_mask(mask_of(), tmp_path / "in.nii.gz", tmp_path / "mask.nii.gz")
    monkeypatch.undo()
    assert (tmp_path / "mask.nii.gz").read_bytes() == b"former"
    assert {path.name for path in tmp_path.iterdir()} == {"in.nii.gz", "mask.nii.gz"}
    save_mask(mask_of(), tmp_path / "in.nii.gz", tmp_path / "mask.nii.gz")
    assert nib.load(tmp_path / "mask.nii.gz").shape == SHAPE


# The transform


def test_transform_names_the_file(tmp_path):
    meta = {"filename_or_obj": str(write(tmp_path / "a.b.nii")), "original_affine": oblique(), "geometry_notes": "odd"}
    item = {"pred": MetaTensor(torch.as_tensor(mask_of())[None].float(), meta=meta), "x": 1}
    out = SaveMaskd("pred", output_dir=tmp_path / "made" / "masks", postfix="organ", classes={1: "cyst", 5: "vein"})(
        item
    )
    assert out == item
    saved = nib.load(tmp_path / "made" / "masks" / "a.b_organ.nii.gz")
    assert np.array_equal(np.asarray(saved.dataobj), mask_of())
    facts = json.loads((tmp_path / "made" / "masks" / "a.b_organ.nii.gz.json").read_text())
    assert facts["notes"] == "odd" and facts["classes"]["vein"] == {"value": 5, "voxels": 0, "ml": 0.0}
    assert facts["classes"]["cyst"]["ml"] == pytest.approx((mask_of() == 1).sum() * 9 / 1000)
    SaveMaskd("pred", output_dir=tmp_path, postfix="")({**item, "mask": "sub/x.nii.gz"})
    assert (tmp_path / "sub" / "x.nii.gz").is_file() and (tmp_path / "sub" / "x.nii.gz.json").is_file()


@pytest.mark.parametrize(
    ("pred", "message"),
    [
        (torch.zeros(1, *SHAPE), "pred: no filename_or_obj in its meta data; load the image with LoadVolumed"),
        (
            MetaTensor(torch.zeros(2, *SHAPE), meta={"filename_or_obj": "a.nii"}),
            r"pred: expected one channel \(1, X, Y, Z\) with class numbers, got \(2, 6, 7, 5\)",
        ),
    ],
)
def test_transform_refuses(tmp_path, pred, message):
    with pytest.raises(ValueError, match=message):
        SaveMaskd(output_dir=tmp_path)({"pred": pred})


@pytest.mark.parametrize(
    ("axcodes", "codes", "trailing", "spacing_mm"),
    [
        ("RAS", (1, 1), False, (-1, -1, -1)),
        ("LPS", (2, 0), True, (-1, -1, -1)),
        ("PSR", (0, 2), False, (-1, -1, -1)),
        ("RAS", (0, 2), True, (1.0, 1.0, 1.0)),
        ("PSR", (1, 1), False, (1.0, 1.0, 1.0)),
    ],
)
def test_there_and_back(tmp_path, axcodes, codes, trailing, spacing_mm):
    """Logits made of the preprocessed image come back as a mask of the stored voxels."""
    volume, _, affine = make_phantom(5, shape=(16, 20, 18), orientation=axcodes)
    volume = volume[..., None] if trailing else volume
    path = tmp_path / "in.nii.gz"
    image = nib.Nifti1Image(volume, affine)
    image.set_qform(affine, codes[0])
    image.set_sform(affine, codes[1])
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    chain = Compose(reading_transforms(num_classes=2, label_key=None, spacing_mm=spacing_mm))
    item = chain({"image": str(path)})
    bright = item["image"] - 0.5
    item["pred"] = torch.cat([-bright, bright])
    Compose(mask_transforms(chain, output_dir=str(tmp_path / "masks")))(item)
    source, saved = nib.load(path), nib.load(tmp_path / "masks" / "in_seg.nii.gz")
    assert saved.shape == source.shape == volume.shape
    assert np.array_equal(saved.affine, source.affine)
    assert (int(saved.header["qform_code"]), int(saved.header["sform_code"])) == codes
    assert saved.header.get_xyzt_units()[0] == "mm"
    values = np.asarray(source.dataobj, np.float64)
    expected = values > values.mean() + 0.5 * values.std()
    wrong = (np.asarray(saved.dataobj) != expected).mean()
    assert wrong == 0 if spacing_mm[0] < 0 else wrong < 0.05


@pytest.mark.parametrize("name", ["in.nii.gz", "in.nrrd"])
@pytest.mark.parametrize("spacing_mm", [None, (1.0, 1.3, 0.9)])
@pytest.mark.parametrize("dense_crf", [False, True])
def test_probabilities_are_those_that_the_mask_was_taken_from(tmp_path, name, spacing_mm, dense_crf):
    """On the voxels of the mask, whatever the format; but for ties in steps of 1/65535."""
    volume, _, affine = make_phantom(5, shape=(16, 20, 18), orientation="PSR")
    nib.save(nib.Nifti1Image(volume, affine), tmp_path / "in.nii.gz")
    if name.endswith("nrrd"):
        sitk.WriteImage(sitk.ReadImage(tmp_path / "in.nii.gz"), tmp_path / name)
    chain = Compose(reading_transforms(num_classes=3, label_key=None, spacing_mm=spacing_mm))
    item = chain({"image": str(tmp_path / name)})
    item["pred"] = torch.cat([0 * item["image"], item["image"] - 0.5, 0.8 * item["image"]])
    folder = tmp_path / "masks"
    Compose(mask_transforms(chain, output_dir=folder, class_values=[0, 5, 9], dense_crf=dense_crf, probabilities=True))(
        item
    )
    mask = sitk.ReadImage(folder / name.replace("in.", "in_seg."))
    [file] = folder.glob("*_probabilities.nii.gz")
    found = nib.load(file)
    shares = found.get_fdata()
    assert found.get_data_dtype() == np.uint16 and shares.shape == (*volume.shape, 3)
    np.testing.assert_allclose(found.affine, affine, atol=1e-5)
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-4)
    top = np.sort(shares, -1)
    clear = top[..., 2] - top[..., 1] > 4 / 65535
    values = sitk.GetArrayFromImage(mask).transpose(2, 1, 0)
    assert clear.mean() > 0.99 and set(np.unique(values)) == {0, 5, 9}
    np.testing.assert_array_equal(np.array([0, 5, 9])[shares.argmax(-1)][clear], values[clear])


def test_what_belongs_to_a_mask_that_is_replaced_is_not_left_beside_the_new_one(tmp_path):
    image = tmp_path / "in.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.int16), np.eye(4)), image)
    mask = MetaTensor(torch.ones(1, *SHAPE), meta={"filename_or_obj": str(image), "original_affine": np.eye(4)})
    masks = tmp_path / "masks"
    masks.mkdir()
    beside = [masks / "in_seg_probabilities.nii.gz", masks / "in_seg.dcm"]
    for file in beside:
        file.write_bytes(b"of another mask")
    SaveMaskd(output_dir=masks)({"pred": mask})  # the first mask: these are not its own
    assert all(file.exists() for file in beside)
    SaveMaskd(output_dir=masks)({"pred": mask, "probabilities": np.zeros((2, *SHAPE), np.uint16)})
    assert [file.exists() for file in beside] == [True, False]
    assert all(file.with_name(f"{file.name}.old").read_bytes() == b"of another mask" for file in beside)
    assert nib.load(beside[0]).shape == (*SHAPE, 2)
