"""A folder as a clinic has it, through a command: each file is segmented rightly, or refused with its reason."""

import csv
import json
import locale
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

ROOT = Path(__file__).parents[2]
AFFINE = np.array([[-1.0, 0, 0, 20], [0, 1.0, 0, -30], [0, 0, 1.0, 5], [0, 0, 0, 1]])
TURNED = np.array([[-0.96, 0.28, 0, 20], [0.28, 0.96, 0, -30], [0, 0, 1.0, 5], [0, 0, 0, 1]])


def scene():
    """A dark spindle in smooth noise, in which the network finds both classes."""
    noise = ndimage.gaussian_filter(np.random.default_rng(3).normal(size=(36, 50, 36)), 3)
    noise = (noise - noise.min()) / np.ptp(noise) * 800
    away = np.linalg.norm((np.indices(noise.shape).T - [18, 25, 18]) / [5, 14, 5], axis=-1).T
    return np.where(away < 1, 450 + 0.05 * noise, noise).round().astype(np.int16)[::-1]


VOXELS = scene()


def nifti(path, voxels=VOXELS, affine=AFFINE, *, kind=nib.Nifti1Image, dtype=None, unit="mm", **header):
    image = kind(voxels, affine)
    if dtype:
        image.set_data_dtype(dtype)
    image.header.set_xyzt_units(unit) if unit else None
    for key, value in header.items():
        image.header[key] = value
    nib.save(image, path)


def turned(path, codes):
    target = nib.orientations.axcodes2ornt(tuple(codes))
    image = nib.Nifti1Image(VOXELS, AFFINE)
    nib.save(image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(AFFINE), target)), path)


def itk(path, voxels=VOXELS, **meta):
    image = sitk.GetImageFromArray(voxels.transpose(2, 1, 0))
    image.SetOrigin((-20.0, 30.0, 5.0))
    image.SetDirection((1, 0, 0, 0, -1, 0, 0, 0, 1))
    for key, value in meta.items():
        image.SetMetaData(key, value)
    sitk.WriteImage(image, str(path))


def dicom(folder, voxels=VOXELS, *, uid="1.2.3", skip=()):
    """Slices upwards, rows towards the patient's left, columns towards the back."""
    folder.mkdir(exist_ok=True)
    for k in set(range(voxels.shape[2])) - set(skip):
        plane = sitk.GetImageFromArray(voxels[:, ::-1, k].T[None])
        values = {"0008|0060": "MR", "0010|0010": "Secret^Name", "0020|000d": "1.2", "0020|000e": uid}
        values |= {"0020|0052": "1.2.9", "0010|0020": "P1", "0020|0011": "1"}
        values |= {"0020|0013": str(k), "0020|0037": "1\\0\\0\\0\\1\\0", "0028|0030": "1\\1", "0018|0050": "1"}
        values |= {"0020|0032": f"-20\\{30 - voxels.shape[1] + 1}\\{5 + k}"}
        for tag, value in values.items():
            plane.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{uid}.{k:03d}.dcm"))
        before = locale.setlocale(locale.LC_ALL)
        writer.Execute(plane)
        locale.setlocale(locale.LC_ALL, before)  # writing DICOM sets it to C, and what is opened later is ASCII


def two_series(folder):
    dicom(folder)
    dicom(folder, uid="1.2.4")


def cut(path, write=nifti):
    write(path)
    path.write_bytes(path.read_bytes()[:9000])


def cut_slice(folder):
    dicom(folder)
    file = folder / "1.2.3.004.dcm"
    file.write_bytes(file.read_bytes()[:-200])


def inverted(folder):
    dicom(folder)
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes().replace(b"MONOCHROME2", b"MONOCHROME1"))


def twice(folder):
    dicom(folder)
    shutil.copy(folder / "1.2.3.004.dcm", folder / "again.dcm")


def with_nan(path):
    voxels = VOXELS.astype(np.float32)
    voxels[0, 0, :3] = np.nan
    nifti(path, voxels)


def colours(path):
    nifti(path, np.zeros(VOXELS.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")]))


def patched(path, where, value):
    """A NIfTI header with some bytes replaced; the qform is not set."""
    nifti(path, qform_code=0)
    content = bytearray(path.read_bytes())
    content[where : where + len(value)] = value
    path.write_bytes(content)


def apart(path):
    """sform and qform that place the voxels 12 mm apart."""
    image = nib.Nifti1Image(VOXELS, AFFINE)
    image.set_qform(AFFINE + np.array([[0, 0, 0, 12.0]] + [[0] * 4] * 3), 1)
    image.set_sform(AFFINE, 2)
    nib.save(image, path)


def without_place(path):
    image = nib.Nifti1Image(VOXELS, AFFINE)
    image.set_qform(None, 0)
    image.set_sform(None, 0)
    nib.save(image, path)


# How each is written, and a part of what is noted.
GOOD = {
    "plain.nii.gz": (nifti, ""),
    "plain.2.nii": (nifti, ""),
    "CAPITALS.NII.GZ": (nifti, ""),
    "pair.img": (lambda path: nifti(path, kind=nib.Nifti1Pair), ""),
    "nifti2.nii": (lambda path: nifti(path, kind=nib.Nifti2Image), ""),
    "double.nii": (lambda path: nifti(path, VOXELS.astype(np.float64)), ""),
    "scaled.nii": (lambda path: nifti(path, VOXELS / 8.0, dtype=np.uint16), ""),
    "bright.nii.gz": (lambda path: nifti(path, VOXELS * 1000.0 + 1e8), ""),
    "frame.nii.gz": (lambda path: nifti(path, VOXELS[..., None]), ""),
    "frames.nii.gz": (lambda path: nifti(path, VOXELS[..., None, None]), ""),
    "lpi.nii.gz": (lambda path: turned(path, "LPI"), ""),
    "pir.nii.gz": (lambda path: turned(path, "PIR"), ""),
    "sal.nii.gz": (lambda path: turned(path, "SAL"), ""),
    "oblique.nii.gz": (lambda path: nifti(path, affine=TURNED), ""),
    "thin.nii.gz": (lambda path: nifti(path, affine=AFFINE @ np.diag([0.3, 0.3, 0.3, 1])), ""),
    "thick.nii.gz": (lambda path: nifti(path, affine=AFFINE @ np.diag([1, 1, 7.5, 1])), ""),
    "micron.nii.gz": (lambda path: nifti(path, affine=np.diag([1e3, 1e3, 1e3, 1]) @ AFFINE, unit="micron"), ""),
    "metre.nii.gz": (lambda path: nifti(path, affine=np.diag([1e-3, 1e-3, 1e-3, 1]) @ AFFINE, unit="meter"), ""),
    "no unit.nii.gz": (lambda path: nifti(path, unit=None), ""),
    "forms apart.nii.gz": (apart, "12"),
    "no place.nii.gz": (without_place, "which side is left is not known"),
    "hair.nii": (lambda path: patched(path, 252, np.int16([1, 0]).tobytes() + np.float32([0, 1, 0]).tobytes()), ""),
    "größe #1 %s.nii.gz": (nifti, ""),
    "sub/plain.nii.gz": (nifti, ""),
    "sub/sub-01/anat/plain.nii.gz": (nifti, ""),
    "nrrd.nrrd": (itk, ""),
    "detached.nhdr": (itk, ""),
    "meta.mha": (itk, ""),
    "header.mhd": (itk, ""),
    "series": (dicom, ""),
    "unnamed series": (dicom, ""),
}
BAD = {
    "complex.nii.gz": (lambda path: nifti(path, VOXELS.astype(np.complex64)), "complex"),
    "colours.nii.gz": (colours, "colour|RGB"),
    "time.nii.gz": (lambda path: nifti(path, np.stack([VOXELS] * 3, -1)), r"\(36, 50, 36, 3\)"),
    "nan.nii.gz": (with_nan, "3 NaN voxels"),
    "flat.nii.gz": (lambda path: nifti(path, np.full_like(VOXELS, 7)), "constant"),
    "cut.nii": (cut, "truncated"),
    "packed and cut.nii.gz": (cut, "is truncated"),
    "empty.nii.gz": (Path.touch, "empty|truncated|not a"),
    "words.nii.gz": (lambda path: path.write_text("no volume at all"), "not a|is no|cannot"),
    "zeros.nii": (lambda path: patched(path, 280, bytes(48)), "no place to the voxels"),
    "no numbers.nii": (lambda path: patched(path, 280, np.full(12, np.nan, "<f4").tobytes()), "no place to the voxels"),
    "twin.nii": (nifti, "would have one file"),
    "twin.nii.gz": (nifti, "would have one file"),
    "itself.nii.gz": (lambda path: path.symlink_to(path.name), "leads nowhere"),
    f"{'long' * 60}.nii.gz": (nifti, "255 bytes"),
    "cut.nrrd": (lambda path: cut(path, itk), "cannot read it"),
    "raw gone.mhd": (lambda path: (itk(path), path.with_suffix(".raw").unlink()), "cannot read it"),
    "gap": (lambda folder: dicom(folder, skip=(3, 4)), "slices are missing"),
    "two": (two_series, r"2 series.*1\.2\.3.*1\.2\.4"),
    "cut series": (cut_slice, "1.2.3.004.dcm"),
    "twice": (twice, "again.dcm"),
    "inverted": (inverted, "MONOCHROME1"),
}
OTHERS = {
    "notes.txt": (lambda path: path.write_text("call back"), "no NIfTI"),
    "study.zip": (lambda path: path.write_bytes(b"PK"), "archive"),
    "array.npy": (lambda path: np.save(path, VOXELS), "run code"),
    ".hidden.nii.gz": (nifti, "hidden"),
    "linked": (lambda path: path.symlink_to("sub"), "link to a folder"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder, what came out, and the exit status."""
    folder = tmp_path_factory.mktemp("clinic")
    for name, (write, _) in {**GOOD, **BAD, **OTHERS}.items():
        path = folder / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    for file in (folder / "in" / "unnamed series").iterdir():
        file.rename(file.with_suffix(""))
    bundle = ROOT / "bundles" / "size_constraint"
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(bundle / "configs" / "inference.json")]
    command += ["--bundle_root", str(bundle), "--dataset_dir", str(folder / "in"), "--output_dir", str(folder / "out")]
    command += ["--dicom_seg", "True", "--probabilities", "True"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", errors="replace")
    told = json.loads((folder / "out" / "inference.json").read_text())["volumes"]
    return folder, {row["name"]: row for row in told}, done


def voxels_in_place(path, shape=VOXELS.shape):
    """Class numbers in RAS order, and the affine."""
    if path.name.endswith((".nrrd", ".mha")):
        image = sitk.ReadImage(str(path))
        affine = np.eye(4)
        affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
        affine[:3, 3] = image.GetOrigin()
        found = nib.Nifti1Image(sitk.GetArrayFromImage(image).transpose(2, 1, 0), np.diag([-1, -1, 1, 1]) @ affine)
    else:
        found = nib.load(path)
        found = type(found)(np.asarray(found.dataobj).reshape(found.shape[:3]), found.affine)
    found = nib.as_closest_canonical(found)
    return np.asarray(found.dataobj), found.affine


@pytest.mark.parametrize("name", GOOD)
def test_the_mask_is_that_of_the_plain_file_in_its_place(run, name):
    folder, rows, _ = run
    row = rows[name]
    assert row["state"] == "done", row["reason"]
    plain, _ = voxels_in_place(folder / "out" / "plain_seg.nii.gz")
    assert set(np.unique(plain)) == {0, 1, 2}
    mask, affine = voxels_in_place(folder / "out" / row["mask"])
    facts = json.loads((folder / "out" / f"{row['mask']}.json").read_text())
    assert GOOD[name][1] in facts["notes"]
    if name == "no place.nii.gz":  # what is right and left is not known
        assert mask.any()
        return
    np.testing.assert_array_equal(mask, plain)
    # ml and centroid in millimetres, by the file's own affine and its unit
    scale = {"micron.nii.gz": 1e-3, "metre.nii.gz": 1e3}.get(name, 1.0)
    affine = np.diag([scale, scale, scale, 1.0]) @ affine
    for value, part in ((1, facts["classes"]["anterior"]), (2, facts["classes"]["posterior"])):
        where = np.argwhere(mask == value)
        assert part["ml"] == pytest.approx(len(where) * abs(np.linalg.det(affine[:3, :3])) / 1000, rel=1e-4)
        np.testing.assert_allclose(part["centroid_mm"], affine[:3, :3] @ where.mean(0) + affine[:3, 3], atol=0.01)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_told_with_its_reason(run, name):
    folder, rows, _ = run
    row = rows[name]
    assert row["state"] == "failed" and not row["mask"]
    assert re.search(BAD[name][1], row["reason"]), row["reason"]
    assert "Traceback" not in row["reason"] and str(folder) not in row["reason"]


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_volume_is_left_out_with_its_reason(run, name):
    row = run[1][name]
    assert row["state"] == "left out" and OTHERS[name][1] in row["reason"]


def test_what_was_asked_for_lies_beside_the_masks(run):
    out = run[0] / "out"
    assert {path.name for path in out.rglob("*.dcm")} == {"series_seg.dcm", "unnamed series_seg.dcm"}
    shares = {path.name.replace("_probabilities", "") for path in out.rglob("*_probabilities.nii.gz")}
    masks = {Path(row["mask"]).name for row in run[1].values() if row["mask"]}
    assert shares == {name if name.endswith(".nii.gz") else f"{name}.nii.gz" for name in masks}


def test_the_run_as_a_whole(run):
    folder, rows, done = run
    assert done.returncode == 1, done.stderr[-2000:]
    companions = {"pair.hdr", "header.raw", "detached.raw"}
    assert set(rows) - companions == {*GOOD, *BAD, *OTHERS}
    with (folder / "out" / "volumes.csv").open(encoding="utf-8") as file:
        assert {line["name"] for line in csv.DictReader(file)} == set(rows)
    page = (folder / "out" / "index.html").read_text("utf-8")
    links = re.findall(r'<a href="([^"]+)"', page)
    assert len(links) == len(GOOD) and page.count("<tr>") == len(rows) + 1
    everything = "".join(path.read_text("utf-8") for path in (folder / "out").rglob("*.json")) + page + done.stderr
    assert "Secret" not in everything
    assert not list((folder / "out").rglob(".part*"))
