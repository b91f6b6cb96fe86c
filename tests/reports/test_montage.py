import itertools
import sys

import nibabel as nib
import numpy as np
import pytest

from medconstraints.reports.montage import (
    MAX_PNG_BYTES,
    ReportCase,
    _cut,
    canonical_boxes,
    canonical_volume,
    default_axis,
    montage,
    plane,
    slice_rectangles,
)

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


def paint(boxes, shape):
    mask = np.zeros(shape, np.uint8)
    for row in boxes:
        mask[row[1] : row[4], row[2] : row[5], row[3] : row[6]] = row[0]
    return mask


BOXES = np.array([[3, *START, *STOP], [-1, 0, 0, 0, 0, 0, 0]])


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_boxes_follow_the_volume_in_all_48_orientations(codes):
    affine = affine_of(codes)
    volume, boxes = canonical_volume(filled(), affine), canonical_boxes(BOXES, SHAPE, affine)
    assert len(boxes) == 1  # padding dropped
    np.testing.assert_array_equal(paint(boxes, volume.shape), volume)


def test_lps_by_hand():
    # L and P run against R and A: 7 - 4 .. 7 - 1 and 9 - 8 .. 9 - 2
    assert canonical_boxes(BOXES, SHAPE, affine_of("LPS")).tolist() == [[3, 3, 1, 4, 6, 7, 6]]
    volume = canonical_volume(filled(), affine_of("LPS"))
    assert volume[3, 1, 4] == volume[5, 6, 5] == 3
    assert volume[2, 1, 4] == volume[5, 7, 5] == 0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rectangles_cover_the_pixels_of_the_plane(axis):
    boxes = np.array([[3, *START, *STOP]])
    for index in range(SHAPE[axis]):
        shown = plane(filled(), axis, index)
        rectangles = slice_rectangles(boxes, axis, index)
        assert bool(rectangles) == bool(shown.any())
        rows, columns = np.indices(shown.shape)
        inside = np.zeros(shown.shape, np.uint8)
        for number, x, y, width, height in rectangles:
            inside[(x < columns) & (columns < x + width) & (y < rows) & (rows < y + height)] = number
        np.testing.assert_array_equal(inside, shown)


@pytest.mark.parametrize(
    ("spacing", "shape", "expected"),
    [
        ((1, 1, 1), (9, 9, 9), 2),
        ((1, 3, 1), (9, 9, 9), 1),
        ((5, 1, 1), (9, 9, 9), 0),
        ((1, 1.0, 0.999), (9, 9, 9), 2),
        ((5, 1, 1), (9, 1, 9), 1),
    ],
)
def test_default_axis(spacing, shape, expected):
    assert default_axis(spacing, shape) == expected


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


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PIR", "SLA"])
@pytest.mark.parametrize("labels_codes", [None, "ASR"])
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_image_box_and_masks_agree_on_the_slice(tmp_path, codes, labels_codes, axis):
    row = _cut(make_case(tmp_path, codes, labels_codes=labels_codes), axis)
    letters = dict(zip("RLAPSI", (0, 0, 1, 1, 2, 2), strict=True))
    thickest = letters[codes[2]]  # 4 mm
    assert row.axis == (thickest if axis is None else axis)
    np.testing.assert_array_equal(row.image > 0, row.reference == 3)
    np.testing.assert_array_equal(row.prediction, row.reference)
    (rectangle,) = row.rectangles
    rows, columns = np.nonzero(row.reference)
    assert rectangle == (
        3,
        columns.min() - 0.5,
        rows.min() - 0.5,
        columns.max() + 1 - columns.min(),
        rows.max() + 1 - rows.min(),
    )
    spacing = dict(zip((letters[code] for code in codes), (1.0, 2.0, 4.0), strict=True))
    x, y = (other for other in range(3) if other != row.axis)
    assert row.aspect == pytest.approx(spacing[y] / spacing[x])


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


def test_boxes_of_a_2d_image():
    assert canonical_boxes(np.array([[1, 1, 2, 3, 5]]), (6, 8, 1), affine_of("LAS")).tolist() == [[1, 3, 2, 0, 5, 5, 1]]
    for boxes in (np.zeros((1, 5), int), np.zeros(7, int)):
        with pytest.raises(ValueError, match="boxes: expected rows"):
            canonical_boxes(boxes, SHAPE, np.eye(4))


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
