"""The picture of a few volumes: image, boxes and masks agree, however they are stored; which slice; what is refused."""

import itertools
import sys

import nibabel as nib
import numpy as np
import pytest

from medconstraints.reports.montage import MAX_PNG_BYTES, ReportCase, _cut, montage

SHAPE = (7, 9, 11)
START, STOP = (1, 2, 4), (4, 8, 6)  # asymmetric along every axis
ORIENTATIONS = [
    "".join(codes) for axes in itertools.permutations(["RL", "AP", "SI"]) for codes in itertools.product(*axes)
]


def affine_of(codes, spacing_mm=(1.0, 1.0, 1.0)):
    """Stored axis i runs towards codes[i]."""
    directions = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    affine = np.eye(4)
    affine[:3, :3] = np.array([directions[code] for code in codes]).T * np.array(spacing_mm)
    affine[:3, 3] = (5, -3, 2)
    return affine


def filled():
    mask = np.zeros(SHAPE, np.uint8)
    mask[tuple(slice(a, b) for a, b in zip(START, STOP, strict=True))] = 3
    return mask


BOXES = np.array([[3, *START, *STOP], [-1, 0, 0, 0, 0, 0, 0]])


def make_case(tmp_path, codes="LPS", spacing=(1.0, 2.0, 4.0), labels_codes=None, **changes):
    """The image is bright exactly where the labels and the box are."""
    labels = filled()
    nib.save(nib.Nifti1Image(labels.astype(np.float32) * 50, affine_of(codes, spacing)), tmp_path / "i.nii.gz")
    stored = nib.Nifti1Image(labels, affine_of(codes, spacing))
    if labels_codes:  # the same voxels in another order of axes
        turn = nib.orientations.ornt_transform(
            nib.io_orientation(stored.affine), nib.orientations.axcodes2ornt(tuple(labels_codes))
        )
        stored = stored.as_reoriented(turn)
    nib.save(stored, tmp_path / "l.nii.gz")
    values = {"name": "a", "image": tmp_path / "i.nii.gz", "prediction": tmp_path / "l.nii.gz"}
    values |= {"reference": tmp_path / "l.nii.gz", "boxes": BOXES, "dice": {"x": 0.5}}
    return ReportCase(**{**values, **changes})


def test_image_box_and_masks_agree_on_the_slice_in_all_48_orientations(tmp_path):
    places = dict(zip("RLAPSI", (0, 0, 1, 1, 2, 2), strict=True))
    for number, codes in enumerate(ORIENTATIONS):
        axis = (None, 0, 1, 2)[number % 4]
        row = _cut(make_case(tmp_path, codes, labels_codes="ASR" if number % 3 else None), axis)
        assert row.axis == (places[codes[2]] if axis is None else axis), "the thickest slices, 4 mm"
        np.testing.assert_array_equal(row.image > 0, row.masks["reference"] == 3)
        np.testing.assert_array_equal(row.masks["prediction"], row.masks["reference"])
        (rectangle,) = row.rectangles.tolist()
        rows, columns = np.nonzero(row.masks["reference"])
        corner = [columns.min() - 0.5, rows.min() - 0.5]
        assert rectangle == [3, *corner, columns.max() - corner[0] + 0.5, rows.max() - corner[1] + 0.5]
        spacing = dict(zip((places[code] for code in codes), (1.0, 2.0, 4.0), strict=True))
        x, y = (other for other in range(3) if other != row.axis)
        assert row.aspect == pytest.approx(spacing[y] / spacing[x])


def test_lps_by_hand(tmp_path):
    # L and P run against R and A: 7 - 4 .. 7 - 1 and 9 - 8 .. 9 - 2
    row = _cut(make_case(tmp_path, "LPS"), 2)
    assert row.rectangles.tolist() == [[3, 2.5, 0.5, 3, 6]]
    assert row.masks["reference"][1, 3] == row.masks["reference"][6, 5] == 3
    assert row.masks["reference"][1, 2] == row.masks["reference"][7, 5] == 0


def test_boxes_that_do_not_meet_the_slice_are_not_drawn(tmp_path):
    boxes = np.array([[1, 0, 0, 0, 7, 9, 4], [2, 0, 0, 4, 1, 1, 5], [3, 0, 0, 5, 7, 9, 11]])
    row = _cut(make_case(tmp_path, "RAS", boxes=boxes), 2)  # slice 4
    assert row.rectangles.tolist() == [[2, -0.5, -0.5, 1, 1]]
    assert row.classes == {2, 3}  # of the boxes and of the masks


@pytest.mark.parametrize(
    ("spacing", "shape", "expected"),
    [((1, 1, 1), (9, 9, 9), 2), ((5, 1, 1), (9, 9, 9), 0), ((1, 1.0, 0.999), (9, 9, 9), 2), ((5, 1, 1), (9, 1, 9), 1)],
)
def test_default_axis(tmp_path, spacing, shape, expected):
    nib.save(nib.Nifti1Image(np.zeros(shape, np.float32), affine_of("RAS", spacing)), tmp_path / "i.nii.gz")
    assert _cut(ReportCase("a", tmp_path / "i.nii.gz"), None).axis == expected


def test_slice_of_the_largest_reference_then_prediction_then_middle(tmp_path):
    labels = np.zeros(SHAPE, np.uint8)
    labels[1, 1, 2], labels[1:3, 1:3, 5] = 1, 1
    for name, data in {"i": labels * 9.0, "one": labels, "other": np.roll(labels, 3, 2), "none": labels * 0}.items():
        nib.save(nib.Nifti1Image(data.astype(np.float32), affine_of("RAS")), tmp_path / f"{name}.nii.gz")

    def shown(prediction, reference):
        row = _cut(ReportCase("a", tmp_path / "i.nii.gz", prediction, reference), 2)
        return row.image.sum(), row

    assert shown(tmp_path / "other.nii.gz", tmp_path / "one.nii.gz")[0] == 36
    assert shown(tmp_path / "one.nii.gz", tmp_path / "none.nii.gz")[0] == 36
    total, row = shown(None, None)
    assert total == 36  # 5 is the middle of 11
    assert row.classes == set()


def test_boxes_of_a_2d_image(tmp_path):
    nib.save(nib.Nifti1Image(np.ones((6, 8, 1), np.float32), affine_of("LAS")), tmp_path / "i.nii.gz")
    case = ReportCase("a", tmp_path / "i.nii.gz", boxes=np.array([[1, 1, 2, 3, 5]]))
    assert _cut(case, None).rectangles.tolist() == [[1, 2.5, 1.5, 2, 3]]
    with pytest.raises(ValueError, match="boxes: expected rows"):
        _cut(make_case(tmp_path, boxes=np.zeros((1, 5), int)), None)


def test_montage_writes_a_small_picture(tmp_path):
    rng = np.random.default_rng(0)
    shape = (160, 160, 4)  # noise, which PNG cannot compress
    nib.save(
        nib.Nifti1Image(rng.normal(size=shape).astype(np.float32), affine_of("LPS", (1, 1, 5))), tmp_path / "n.nii"
    )
    whole = ReportCase("$no_formula^ <b>", tmp_path / "n.nii", boxes=np.array([[1, 0, 0, 0, 160, 160, 4]]))
    output = montage([make_case(tmp_path), whole, whole, whole], tmp_path / "new" / "m.png", class_names={3: "organ"})
    content = output.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) < MAX_PNG_BYTES
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    with pytest.raises(FileExistsError, match=r"m\.png exists"):
        montage([whole], output)


def test_montage_rejects(tmp_path, monkeypatch):
    case = make_case(tmp_path)
    output = tmp_path / "m.png"
    with pytest.raises(ValueError, match="at least one case"):
        montage([], output)
    with pytest.raises(ValueError, match="axis: expected"):
        montage([case], output, axis=3)
    with pytest.raises(FileNotFoundError, match="reference of a: no file"):
        montage([make_case(tmp_path, reference=tmp_path / "absent.nii.gz")], output)
    nib.save(nib.Nifti1Image(filled(), affine_of("LPS")), tmp_path / "off.nii.gz")
    with pytest.raises(ValueError, match="different affines"):
        montage([make_case(tmp_path, reference=tmp_path / "off.nii.gz")], output)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install medconstraints\[report\]"):
        montage([case], output)
    assert not output.exists()
