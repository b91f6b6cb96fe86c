"""Box files: three formats, coordinate systems, what is refused and in which words, round trips."""

import json
import pickle
import re
from itertools import product

import numpy as np
import pytest
import torch

from medconstraints.boxes import BoxFileError, read_boxes, write_boxes

SHAPE = (20, 30, 12)
LPS_GRID = np.array([[-2.0, 0, 0, 50], [0, -1.5, 0, 20], [0, 0, 3, -7], [0, 0, 0, 1]])  # as an ITK file lies
PERMUTED = np.array([[0, 0, 3.0, -7], [-2.0, 0, 0, 50], [0, 1.5, 0, 20], [0, 0, 0, 1]])
CSV_3D = "class,start_1,start_2,start_3,stop_1,stop_2,stop_3\n"


def rotated(degrees=20.0):
    """An oblique grid: LPS_GRID turned about an axis that is no voxel axis."""
    a = np.deg2rad(degrees)
    axis = np.array([1.0, 2.0, 2.0]) / 3
    k = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    turn = np.eye(4)
    turn[:3, :3] = np.eye(3) + np.sin(a) * k + (1 - np.cos(a)) * k @ k
    return turn @ LPS_GRID


def edges_mm(affine, row, system="RAS"):
    """World coordinates of the eight corners of a box row, one at a time (an independent, slow reference)."""
    out = []
    for corner in product(*((row[1 + a] - 0.5, row[4 + a] - 0.5) for a in range(3))):
        world = affine @ np.array([*corner, 1.0])
        out.append([-world[0], -world[1], world[2]] if system == "LPS" else world[:3])
    return np.array(out)


def markup(centre, size, **more):
    """One ROI with the fields of a file that 3D Slicer saved; Slicer writes no name."""
    point = {"id": "1", "label": "R-1", "description": "", "associatedNodeID": "", "position": list(centre)}
    return {
        "type": "ROI",
        "coordinateSystem": "LPS",
        "coordinateUnits": "mm",
        "locked": False,
        "fixedNumberOfControlPoints": False,
        "labelFormat": "%N-%d",
        "lastUsedControlPointNumber": 1,
        "roiType": "Box",
        "center": list(centre),
        "orientation": [-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0],
        "size": list(size),
        "insideOut": False,
        "controlPoints": [{**point, "selected": True, "positionStatus": "defined"}],
        "measurements": [],
        "display": {"visibility": True},
        **more,
    }


def slicer_file(tmp_path, *markups, name="boxes.mrk.json", version="1.0.3"):
    path = tmp_path / name
    schema = f"https://raw.githubusercontent.com/slicer/slicer/master/Schema/markups-schema-v{version}.json#"
    path.write_text(json.dumps({"@schema": schema, "markups": list(markups)}))
    return path


def json_file(tmp_path, boxes, system="voxel", **more):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"coordinate_system": system, "boxes": boxes, **more}))
    return path


def box(label=1, start=(1, 2, 3), stop=(4, 6, 8), **more):
    return {"class": label, "start": list(start), "stop": list(stop), **more}


def read(path, **kwargs):
    return read_boxes(path, **{"affine": LPS_GRID, "shape": SHAPE, **kwargs})


# What is read


def test_voxel_json(tmp_path):
    path = json_file(
        tmp_path,
        [box(), box("kidney", (0, 0, 4), (20, 30, 5)), box("2", (5.0, 5, 5), (6, 6, 6))],
        classes={"liver": 1, "kidney": 2},
    )
    rows = read(path)
    assert rows.dtype == torch.int64
    assert rows.tolist() == [[1, 1, 2, 3, 4, 6, 8], [2, 0, 0, 4, 20, 30, 5], [2, 5, 5, 5, 6, 6, 6]]


@pytest.mark.parametrize(
    "text",
    [
        CSV_3D + "1,1,2,3,4,6,8\n",
        "\ufeff" + CSV_3D + "1,1,2,3,4,6,8\n",
        "# drawn by two readers\n# coordinate_system: voxel,,,,\n" + CSV_3D + "\n1, 1, 2, 3, 4, 6, 8.0\n",
        "X_min,Class,y_min,z_min,x_max,y_max,z_max,comment\n1,organ,2,3,4,6,8,blurred\n",
        CSV_3D.strip() + ",coordinate_system\norgan,1,2,3,4,6,8,\n",
        '"class","start_1","start_2","start_3","stop_1","stop_2","stop_3"\r\n"1","1","2","3","4","6","8"\r\n',
    ],
)
def test_csv_forms(tmp_path, text):
    path = tmp_path / "boxes.csv"
    path.write_bytes(text.encode())
    assert read(path, classes={"organ": 1}).tolist() == [[1, 1, 2, 3, 4, 6, 8]]


@pytest.mark.parametrize("affine", [LPS_GRID, PERMUTED], ids=["lps", "permuted"])
@pytest.mark.parametrize("system", ["RAS", "LPS"])
def test_millimetre_corners_go_to_the_nearest_edge(tmp_path, affine, system):
    row = [1, 2, 3, 4, 9, 20, 11]
    corners = edges_mm(affine, row, system)
    table = tmp_path / "boxes.csv"
    for shift_voxels in (0.0, 0.3, -0.3):
        step = (affine[:3, :3] @ np.full(3, shift_voxels)) * ([-1, -1, 1] if system == "LPS" else 1)
        first, last = corners[0] + step, corners[-1] + step
        numbers = ",".join(str(x) for x in [*first, *last])
        table.write_text(CSV_3D.strip() + f",coordinate_system\n1,{numbers},{system}\n")
        assert read(table, affine=affine).tolist() == [row]
        for ends in ((first, last), (last, first)):
            assert read(json_file(tmp_path, [box(1, *ends)], system), affine=affine).tolist() == [row]


def test_thin_millimetre_boxes_keep_one_voxel_and_half_a_voxel_over_is_cut(tmp_path):
    boxes = [box(1, (4.1, 5.2, 6.3), (4.2, 5.3, 6.4)), box(1, (-0.9, -0.6, 3.5), (19.9, 4.5, 4.5))]
    rows = read(json_file(tmp_path, boxes, "RAS"), affine=np.eye(4))
    assert rows.tolist() == [[1, 4, 5, 6, 5, 6, 7], [1, 0, 0, 4, 20, 5, 5]]


@pytest.mark.parametrize("affine", [LPS_GRID, PERMUTED, rotated()], ids=["lps", "permuted", "oblique"])
def test_a_flat_slicer_roi_is_one_voxel_thick(tmp_path, affine):
    """Drawn on a slice, along the volume's own axes: no thickness across it."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    turn = {"coordinateSystem": "RAS", "orientation": (affine[:3, :3] / spacing).ravel().tolist()}
    rois, rows = [], []
    for axis, offset_voxels in product(range(3), (-0.4, 0.0, 0.4)):
        row = np.array([1, 2, 3, 4, 9, 20, 11])
        row[4 + axis] = row[1 + axis] + 1
        centre = (row[1:4] + row[4:] - 1) / 2
        centre[axis] += offset_voxels
        size = spacing * (row[4:] - row[1:4])
        size[axis] = 0
        rois.append(markup((affine @ [*centre, 1])[:3], size, label=1, **turn))
        rows.append(row.tolist())
    assert read(slicer_file(tmp_path, *rois), affine=affine).tolist() == rows


@pytest.mark.parametrize("system", ["RAS", "LPS"])
def test_flat_millimetre_corners_are_one_voxel_thick(tmp_path, system):
    corners = edges_mm(LPS_GRID, [1, 2, 3, 4, 9, 20, 5], system)
    first, last = corners[0], corners[-1]
    first[2] = last[2] = (LPS_GRID @ [0, 0, 4, 1])[2]
    table = tmp_path / "boxes.csv"
    table.write_text(f"# coordinate_system: {system}\n{CSV_3D}1,{','.join(str(x) for x in [*first, *last])}\n")
    for path in (table, json_file(tmp_path, [box(1, last, first)], system)):
        assert read(path).tolist() == [[1, 2, 3, 4, 9, 20, 5]]
    flat = json_file(tmp_path, [box(1, (2, 2.5), (2, 8.5))], "LPS")
    assert read(flat, affine=np.diag([-2.0, -1.0, 1.0]), shape=(8, 10)).tolist() == [[1, 1, 3, 2, 9]]


def test_a_flat_box_across_no_voxel_axis_is_the_bounding_box_of_its_corners(tmp_path):
    affine = rotated()
    first, last = (affine @ [6, 10, 4, 1])[:3], (affine @ [10, 18, 8, 1])[:3]
    first[2] = last[2]
    corners = np.array(list(product(*zip(first, last, strict=True))))
    index = np.array([np.linalg.solve(affine, [*c, 1.0])[:3] for c in corners])
    expected = [1, *np.floor(index.min(0) + 1).astype(int), *np.floor(index.max(0) + 1).astype(int)]
    assert read(json_file(tmp_path, [box(1, first, last)], "RAS"), affine=affine, max_looseness=1e9).tolist() == [
        expected
    ]
    first[2] = last[2] = last[2] + 60
    with pytest.raises(BoxFileError, match=r"entirely outside the volume|beyond the volume along its own axis 3"):
        read(json_file(tmp_path, [box(1, first, last)], "RAS"), affine=affine, max_looseness=1e9)


def test_millimetre_box_in_an_oblique_grid_is_the_bounding_box_of_its_corners(tmp_path):
    affine = rotated()
    inside = [1, 6, 10, 4, 10, 18, 8]
    world = edges_mm(affine, inside)
    rows = read(json_file(tmp_path, [box(1, world.min(0), world.max(0))], "RAS"), affine=affine, max_looseness=1e9)
    corners = np.array(list(product(*zip(world.min(0), world.max(0), strict=True))))
    index = np.array([np.linalg.solve(affine, [*c, 1.0])[:3] for c in corners])
    expected = [1, *np.floor(index.min(0) + 1), *np.floor(index.max(0) + 1)]
    assert rows.tolist() == [[int(x) for x in np.clip(expected, 0, [1, *SHAPE, *SHAPE])]]
    start, stop = rows[0, 1:4].tolist(), rows[0, 4:].tolist()
    assert all(s <= i for s, i in zip(start, inside[1:4], strict=True))
    assert all(s >= i for s, i in zip(stop, inside[4:], strict=True))
    assert (rows[0, 4:] - rows[0, 1:4]).prod() > 4 * 8 * 4, "an oblique box is looser"


def test_oblique_box_of_an_object_at_the_border_is_accepted(tmp_path):
    # The object lies inside the volume; only the corners of its world-aligned box do not.
    affine = rotated()
    world = edges_mm(affine, [1, 0, 0, 0, 4, 6, 3])
    rows = read(json_file(tmp_path, [box(1, world.min(0), world.max(0))], "RAS"), affine=affine, max_looseness=1e9)
    assert rows[0, 1:4].tolist() == [0, 0, 0]
    assert (rows[0, 4:] >= torch.tensor([4, 6, 3])).all()


@pytest.mark.parametrize("system", ["LPS", "RAS"])
def test_slicer_roi_as_slicer_saves_it(tmp_path, system):
    # In LPS_GRID: LPS x = 2 i - 50, LPS y = 1.5 j - 20, z = 3 k - 7.
    roi = markup((2 * 4.5 - 50, 1.5 * 9.5 - 20, 3 * 5 - 7), (2 * 4, 1.5 * 10, 3 * 1))
    if system == "RAS":
        roi |= {"coordinateSystem": "RAS", "center": [41.0, 5.75, 8.0], "orientation": np.eye(3).ravel().tolist()}
    path = slicer_file(tmp_path, roi, name="prostate.mrk.json")
    assert read(path, classes={"prostate": 3}).tolist() == [[3, 3, 5, 5, 7, 15, 6]]


@pytest.mark.parametrize(
    "text",
    [
        "# coordinate_system: LPS\n{header}\n{row}\n",
        "# CoordinateSystem = LPS\n{header}\n{row}\n",
        "#space: left-posterior-superior\n{header}\n{row}\n",
        "# Coordinate System: 1\n{header}\n{row}\n",
        "{header},Coordinate System\n{row},lps\n",
        "{header},space\n{row},LPS\n",
        "sep=,\n# CoordinateSystem = LPS,,,\n{header}\n{row}\n",
    ],
)
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_spellings_of_a_table(tmp_path, text, delimiter, encoding):
    first, last = (2.0 * 3 - 51, 1.5 * 5 - 20.75, 3 * 5 - 8.5), (2.0 * 7 - 51, 1.5 * 15 - 20.75, 3 * 6 - 8.5)
    row = ",".join(map(str, (1, *first, *last)))
    path = tmp_path / "a.csv"
    path.write_text(text.format(header=CSV_3D.strip(), row=row).replace(",", delimiter), encoding=encoding)
    assert read(path).tolist() == [[1, 3, 5, 5, 7, 15, 6]]


def test_each_box_of_a_json_file_may_have_its_own_system(tmp_path):
    content = {
        "coordinateSystem": "voxel",
        "boxes": [
            {"class": 1, "start": [3, 5, 5], "stop": [7, 15, 6]},
            {"class": 1, "start": [-45, -13.25, 6.5], "stop": [-37, 1.75, 9.5], "coordinateSystem": "LPS"},
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert read(tmp_path / "a.json").tolist() == [[1, 3, 5, 5, 7, 15, 6]] * 2


def test_a_number_may_be_the_name_of_another_class(tmp_path):
    path = slicer_file(tmp_path, markup((-41.0, -5.75, 8.0), (8, 15, 3), label=1))
    assert read(path, classes={"1": 2}).tolist() == [[2, 3, 5, 5, 7, 15, 6]]
    path = slicer_file(tmp_path, markup((-41.0, -5.75, 8.0), (8, 15, 3), label={"value": 0}))
    assert read(path, classes={"0": 1}).tolist() == [[1, 3, 5, 5, 7, 15, 6]]


def test_what_is_not_placed_is_no_box(tmp_path, caplog):
    placed, waiting = markup((-41.0, -5.75, 8.0), (8, 15, 3), label=1), markup((0.0, 0.0, 0.0), (1, 1, 1), label=1)
    waiting["controlPoints"][0]["positionStatus"] = "preview"
    assert read(slicer_file(tmp_path, waiting, placed)).tolist() == [[1, 3, 5, 5, 7, 15, 6]]
    assert "markups[0]: is not placed in the volume" in caplog.text


def test_a_bounding_box_roi_is_a_box(tmp_path):
    roi = markup((-41.0, -5.75, 8.0), (8, 15, 3), label=1, roiType="BoundingBox")
    assert read(slicer_file(tmp_path, roi)).tolist() == [[1, 3, 5, 5, 7, 15, 6]]


def test_a_turned_box_says_how_much_it_is_looser(tmp_path):
    a = np.deg2rad(30)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    roi = markup((17.5, 17.5, 6.0), (8.0, 8.0, 4.0), label=1, orientation=turn.ravel().tolist())
    path = slicer_file(tmp_path, roi)
    with pytest.raises(BoxFileError, match=r"the box along their axes is 1\.87 times as large.*max_looseness=1\.87"):
        read(path, affine=np.diag([-1.0, -1.0, 1.0, 1.0]))
    assert len(read(path, affine=np.diag([-1.0, -1.0, 1.0, 1.0]), max_looseness=1.9)) == 1


def test_millimetres_of_an_image_in_doubt(tmp_path):
    path = json_file(tmp_path, [box(1, (-1.0, 2, 3), (5, 8.0, 9))], "RAS")
    with pytest.raises(BoxFileError, match="is in millimetres, but of its image it is not known where they are: forms"):
        read(path, doubt="forms")
    assert len(read(json_file(tmp_path, [box(1, (3, 5, 5), (7, 15, 6))], "voxel"), doubt="forms")) == 1


def test_slicer_defaults(tmp_path):
    """No coordinate system is LPS, no orientation the file's axes, no center the control point's position."""
    roi = markup((-41.0, -5.75, 8.0), (8, 15, 3), label="1")
    for key in ("coordinateSystem", "orientation", "center", "roiType", "insideOut", "coordinateUnits"):
        del roi[key]
    for name, version in (("a.mrk.json", "1.0.0"), ("b.json", "1.0.4")):
        assert read(slicer_file(tmp_path, roi, name=name, version=version)).tolist() == [[1, 3, 5, 5, 7, 15, 6]]


def test_rotated_slicer_roi_is_the_bounding_box_of_its_corners(tmp_path):
    a = np.deg2rad(30)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    roi = markup((10.0, 12.0, 6.0), (8.0, 2.0, 4.0), label=1, orientation=turn.ravel().tolist())
    corners = [turn @ (np.array(s) * [4, 1, 2]) + [10, 12, 6] for s in product((-1, 1), repeat=3)]
    low, high = np.min(corners, 0), np.max(corners, 0)
    rows = read(slicer_file(tmp_path, roi), affine=np.diag([-1.0, -1.0, 1.0, 1.0]), max_looseness=4)
    assert rows.tolist() == [[1, *np.floor(low + 1).astype(int), *np.floor(high + 1).astype(int)]]
    # the transposed matrix turns the other way about: the box would be the same by symmetry, so shift one axis
    lean = turn @ np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])
    roi["orientation"] = lean.ravel().tolist()
    corners = [lean @ (np.array(s) * [4, 1, 2]) + [10, 12, 6] for s in product((-1, 1), repeat=3)]
    low, high = np.min(corners, 0), np.max(corners, 0)
    rows = read(slicer_file(tmp_path, roi), affine=np.diag([-1.0, -1.0, 1.0, 1.0]), max_looseness=4)
    assert rows.tolist() == [[1, *np.floor(low + 1).astype(int), *np.floor(high + 1).astype(int)]]


@pytest.mark.parametrize(
    ("fields", "file", "number"),
    [
        ({"label": "bladder"}, "x.mrk.json", 2),
        ({"label": {"value": 1}}, "x.mrk.json", 1),  # MONAI's detection bundles
        ({"name": "bladder"}, "x.mrk.json", 2),
        ({"name": "2"}, "x.mrk.json", 2),
        ({"name": "Reader A", "controlPoints": [{"label": "bladder"}]}, "x.mrk.json", 2),
        ({"controlPoints": [{"label": "bladder-1"}]}, "x.mrk.json", 2),  # Slicer's %N-%d
        ({"controlPoints": [{"label": "R-1", "description": "bladder"}]}, "x.mrk.json", 2),
        ({"controlPoints": [{"label": "R_1-1"}]}, "bladder.mrk.json", 2),
        ({"controlPoints": []}, "bladder.mrk.json", 2),
        ({"label": "prostate"}, "bladder.mrk.json", 1),
        ({"label": "rectum"}, "bladder.mrk.json", "unknown class 'rectum'"),
        ({"controlPoints": [{"label": "rectum-1"}]}, "bladder.mrk.json", "unknown class 'rectum'"),
        ({"controlPoints": [{"label": "Bladder_2-1"}]}, "x.mrk.json", 2),
        ({"label": "PROSTATE"}, "bladder.mrk.json", 1),
        ({"name": "Crop Volume ROI-1"}, "bladder.mrk.json", 2),
        ({"name": "Volume rendering ROI"}, "Bladder_3.mrk.json", 2),
        ({"name": "MarkupsROI_1"}, "x.mrk.json", "unknown class 'MarkupsROI'"),
        ({"controlPoints": [{"label": "R-1"}]}, "x.mrk.json", "unknown class 'R'"),
        ({"controlPoints": []}, "x.mrk.json", "has no class"),
    ],
)
def test_class_of_a_slicer_roi(tmp_path, fields, file, number):
    path = slicer_file(tmp_path, markup((-41.0, -5.75, 8.0), (8, 15, 3), **fields), name=file)
    classes = {"prostate": 1, "bladder": 2}
    if isinstance(number, str):
        with pytest.raises(BoxFileError, match=rf"markups\[0\]: {number}"):
            read(path, classes=classes)
    else:
        assert read(path, classes=classes)[0, 0] == number


def test_two_dimensional_boxes(tmp_path):
    affine = np.diag([-2.0, -1.0, 1.0, 1.0])
    path = tmp_path / "boxes.csv"
    path.write_text("class,x_min,y_min,x_max,y_max\n1,2,3,4,9\n")
    assert read(path, affine=affine, shape=(8, 10)).tolist() == [[1, 2, 3, 4, 9]]
    mm = json_file(tmp_path, [box(1, (3, 2.5), (7, 8.5))], "LPS")
    for matrix in (affine, np.diag([-2.0, -1.0, 1.0]), torch.as_tensor(affine)):
        assert read(mm, affine=matrix, shape=(8, 10)).tolist() == [[1, 2, 3, 4, 9]]


def test_file_without_boxes(tmp_path):
    table = tmp_path / "boxes.csv"
    table.write_text(CSV_3D)
    for path in (json_file(tmp_path, []), table, slicer_file(tmp_path)):
        rows = read(path)
        assert rows.shape == (0, 7)
        assert rows.dtype == torch.int64


def test_format_overrides_the_extension(tmp_path):
    path = tmp_path / "boxes.txt"
    path.write_text(CSV_3D + "1,1,2,3,4,6,8\n")
    assert read(path, format="csv").tolist() == [[1, 1, 2, 3, 4, 6, 8]]
    with pytest.raises(BoxFileError, match=r"boxes\.txt: unknown kind of box file; use \.json, \.csv or \.mrk\.json"):
        read(path)
    with pytest.raises(ValueError, match="format must be one of"):
        read(path, format="xml")


def test_many_images_in_one_csv(tmp_path):
    path = tmp_path / "boxes.csv"
    # the box of case_3 lies outside this volume: rows of other images are not judged
    path.write_text(
        "image," + CSV_3D + "case_1.nii.gz,1,1,2,3,4,6,8\n/data/a/case_2.nii.gz,1,0,0,0,1,1,1\n"
        "case_1.nii.gz,2,0,0,0,2,2,2\ncase_3,1,0,0,0,400,1,1\ncase_4.nii.gz,,,,,,\n"
    )
    expected = {
        "case_1.nii.gz": [[1, 1, 2, 3, 4, 6, 8], [2, 0, 0, 0, 2, 2, 2]],
        "/other/case_1.nii": [[1, 1, 2, 3, 4, 6, 8], [2, 0, 0, 0, 2, 2, 2]],
        "case_2": [[1, 0, 0, 0, 1, 1, 1]],
        r"C:\scans\case_4.nii.gz": [],
    }
    for image, rows in expected.items():
        assert read(path, image=image).tolist() == rows
    with pytest.raises(BoxFileError, match=r"row 4 \(line 5\): reaches 380 voxels beyond the end of axis 1"):
        read(path, image="case_3.nii.gz")
    with pytest.raises(BoxFileError, match=r"has no row for the image 'case_9\.nii' .*needs a row with its name alone"):
        read(path, image="case_9.nii")
    with pytest.raises(BoxFileError, match=r"holds boxes of 4 images .* say which with image="):
        read(path)


def test_image_name_is_ignored_without_an_image_column(tmp_path):
    assert read(json_file(tmp_path, [box()]), image="any.nii.gz").tolist() == [[1, 1, 2, 3, 4, 6, 8]]


def test_images_are_told_apart_by_their_folders(tmp_path):
    path = tmp_path / "boxes.csv"
    rows = "p1/image.nii.gz,1,1,2,3,4,6,8\np1\\image,1,0,0,0,2,2,2\np2/image.nii.gz,2,0,0,0,1,1,1\n"
    path.write_text(f"image,{CSV_3D}{rows}./other.nii.gz,,,,,,,\n")
    expected = {
        "data/p1/image.nii.gz": [[1, 1, 2, 3, 4, 6, 8], [1, 0, 0, 0, 2, 2, 2]],
        "/data/p2/image.nii": [[2, 0, 0, 0, 1, 1, 1]],
        "p2/image.nii.gz": [[2, 0, 0, 0, 1, 1, 1]],
        "/any/other.nii.gz": [],
    }
    for image, boxes in expected.items():
        assert read(path, image=image).tolist() == boxes
    for image in ("/data/p3/image.nii.gz", "/data/xp1/image.nii.gz", "/p1/p3/image.nii.gz"):
        with pytest.raises(BoxFileError, match=rf"has no row for the image '[^']*{image[-18:]}'.*folders in a row"):
            read(path, image=image)
    with pytest.raises(BoxFileError, match=r"'p1\\.*image' and 'p2/image.nii.gz' both fit .*; give image= its folders"):
        read(path, image="image.nii.gz")


@pytest.mark.parametrize("short", ["image.nii.gz", "image", "p2/image.nii.gz"])
def test_a_row_with_too_few_folders_is_refused(tmp_path, short):
    path = tmp_path / "boxes.csv"
    full = "a/p2/image.nii.gz"
    path.write_text(f"image,{CSV_3D}{short},1,1,2,3,4,6,8\n{full},1,0,0,0,2,2,2\n")
    reason = f"boxes.csv: is ambiguous: '{short}' and '{full}' both fit the image 'a/p2/image.nii.gz'; write '{short}'"
    with pytest.raises(BoxFileError, match=re.escape(reason) + " with as many folders as tell the volumes apart"):
        read(path, image="/data/a/p2/image.nii.gz")


# Another grid than the stored one


def reoriented(affine, shape, permutation, flips):
    """Affine and shape of an array after ``np.flip(np.transpose(array, permutation), axes of flips)``."""
    new_shape = tuple(shape[p] for p in permutation)
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for new, old in enumerate(permutation):
        matrix[old, new] = -1 if flips[new] else 1
        matrix[old, 3] = shape[old] - 1 if flips[new] else 0
    return affine @ matrix, new_shape


@pytest.mark.parametrize(
    ("permutation", "flips"), [((0, 1, 2), (0, 0, 0)), ((2, 0, 1), (1, 0, 1)), ((1, 0, 2), (1, 1, 1))]
)
@pytest.mark.parametrize("grid", [LPS_GRID, rotated()], ids=["lps", "oblique"])
def test_voxel_boxes_follow_a_permutation_and_flips_exactly(tmp_path, permutation, flips, grid):
    rows = [[1, 2, 3, 4, 9, 20, 11], [2, 0, 0, 0, 20, 30, 12], [3, 19, 29, 11, 20, 30, 12]]
    affine, shape = reoriented(grid, SHAPE, permutation, flips)
    path = json_file(tmp_path, [box(r[0], r[1:4], r[4:]) for r in rows])
    found = read(path, affine=affine, shape=shape, stored_affine=grid, stored_shape=SHAPE)
    volume = np.zeros((len(rows), *SHAPE), dtype=bool)
    for i, row in enumerate(rows):
        volume[i, row[1] : row[4], row[2] : row[5], row[3] : row[6]] = True
    for i, row in enumerate(found.tolist()):
        moved = np.flip(np.transpose(volume[i], permutation), [a for a in range(3) if flips[a]])
        where = np.argwhere(moved)
        assert row == [rows[i][0], *where.min(0), *(where.max(0) + 1)]


@pytest.mark.parametrize(("zoom", "stop"), [(3.0, [58, 88, 34]), (1 / 3, [7, 10, 4])])
def test_boxes_at_the_border_survive_resampling(tmp_path, zoom, stop):
    # MONAI's Spacingd keeps the centre of the first voxel and rounds the number of voxels.
    spacing = 1 / zoom
    shape = tuple(int(np.round((n - 1) * zoom + 1)) for n in SHAPE)
    affine = np.diag([spacing, spacing, spacing, 1.0])
    boxes = [box(1, (0, 0, 0), SHAPE), box(1, (-0.5, -0.5, -0.5), np.array(SHAPE) - 0.5, coordinate_system="RAS")]
    found = read(json_file(tmp_path, boxes), affine=affine, shape=shape, stored_affine=np.eye(4), stored_shape=SHAPE)
    assert found.tolist() == [[1, 0, 0, 0, *stop]] * 2


def test_box_beyond_the_cropped_image_is_refused(tmp_path):
    affine = LPS_GRID.copy()
    path = json_file(tmp_path, [box(1, (1, 2, 3), (9, 6, 8))])
    with pytest.raises(BoxFileError, match=r"reaches 4 voxels beyond the end of axis 1 .*read boxes before any crop"):
        read(path, affine=affine, shape=(5, 30, 12), stored_affine=affine, stored_shape=SHAPE)


# What is refused

BAD_BOXES = {
    "unknown class": (
        box("spleen"),
        "unknown class 'spleen' (known: liver = 1); use one of these or add it to classes=",
    ),
    "unknown number": (box(2), "unknown class 2 (known: liver = 1)"),
    "background": (box(0), "class 0 is no class to box: numbers start at 1, 0 is the background"),
    "fraction class": (box(1.5), "class must be a name or a whole number, got 1.5"),
    "boolean class": (box(True), "class must be a name or a whole number, got True"),
    "empty class": (box(" "), "has no class"),
    "empty": (box(stop=(4, 2, 8)), "is empty along axis 2 (start 2, stop 2)"),
    "inverted": (box(stop=(0, 6, 8)), "is inverted along axis 1 (start 1, stop 0)"),
    "entirely outside": (
        box(1, (20, 0, 0), (22, 4, 4)),
        "lies entirely outside the volume along axis 1 (20 to 22, the volume spans 0 to 20)",
    ),
    "beyond the end": (
        box(stop=(4, 31, 8)),
        "reaches 1 voxels beyond the end of axis 2 (2 to 31, the volume spans 0 to 30)",
    ),
    "below the start": (box(1, (1, 2, -2)), "reaches 2 voxels beyond the start of axis 3 (-2 to 8"),
    "fraction": (
        box(1, (1, 2.5, 3)),
        "start_2 is 2.5, voxel coordinates are whole numbers; for millimetres set coordinate_system to RAS or LPS",
    ),
    "nan": (box(1, (1, float("nan"), 3)), "start_2 is nan; every coordinate must be a finite number"),
    "infinite": (box(1, stop=(1, 5, float("inf"))), "stop_3 is inf; every coordinate must be a finite number"),
    "null": (box(1, (1, None, 3)), "start_2: None is not of type 'number'"),
    "huge": (box(1, (1, 2, 10**400)), "start_3 is 1"),
    "text": (box(1, (1, "two", 3)), "start_2 is 'two', which is no number"),
    "two numbers": (box(1, (1, 2)), "start: [1, 2] is too short; a corner is a list of 3 numbers"),
    "no list": (
        {"class": 1, "start": 5, "stop": [1, 2, 3]},
        "start: 5 is not of type 'array'; a corner is a list of 3 numbers",
    ),
    "no start": ({"class": 1, "stop": [1, 2, 3]}, "'start' is a required property; add it"),
    "no class": ({"start": [0, 0, 0], "stop": [1, 2, 3]}, "'class' is a required property; add it"),
    "unknown system": (box(coordinate_system="scanner"), "unknown coordinate system 'scanner'; use voxel, RAS or LPS"),
    "not an object": ([1, 2], "is no object, got [1, 2]; correct the entry"),
    "point mm": (
        box(1, (40, 0, 0), (40, 0, 0), coordinate_system="RAS"),
        "is empty: start and stop are the same point; a box may be flat",
    ),
}


def test_faulty_json_rows(tmp_path):
    path = json_file(tmp_path, [box("liver"), *(bad for bad, _ in BAD_BOXES.values())])
    with pytest.raises(BoxFileError) as caught:
        read(path, classes={"liver": 1})
    assert len(caught.value.faults) == len(BAD_BOXES) and caught.value.path == path and caught.value.row == 1
    for row, (fault, (_, reason)) in enumerate(zip(caught.value.faults, BAD_BOXES.values(), strict=True), start=1):
        assert (fault.row, fault.where) == (row, f"boxes[{row}]") and fault.reason.startswith(reason), reason


@pytest.mark.parametrize("kind", ["voxel", "csv", "slicer", "named"])
def test_classes_that_the_network_does_not_have(tmp_path, kind):
    names = None
    if kind == "csv":
        path, where = tmp_path / "boxes.csv", "row 2 (line 3)"
        path.write_text(CSV_3D + "1,1,2,3,4,6,8\n3,1,2,3,4,6,8\n")
    elif kind == "slicer":
        rois = [markup((-41.0, -5.75, 8.0), (8, 15, 3), label=label) for label in ("1", "3")]
        path, where = slicer_file(tmp_path, *rois), "markups[1]"
    else:
        names = {"liver": 1, "spleen": 3} if kind == "named" else None
        path, where = json_file(tmp_path, [box(1), box("spleen" if names else 3)]), "boxes[1]"
    assert read(path, classes=names, num_classes=4)[:, 0].tolist() == [1, 3]
    with pytest.raises(BoxFileError) as caught:
        read(path, classes=names, num_classes=3)
    reason = "class 3 is none of the 2 classes to box (1 to 2, as num_classes is 3 with the background)"
    assert str(caught.value).startswith(f"{path.name}, {where}: {reason}")


@pytest.mark.parametrize(
    ("classes", "text"),
    [
        (None, """(known: none); use a class number or add it to classes= (bundle: --classes "{'prostate': 1}")"""),
        (
            {"liver": 1},
            """(known: liver = 1); use one of these or add it to classes= (bundle: --classes "{..., 'prostate': 2}")""",
        ),
    ],
)
def test_an_unknown_name_says_how_to_add_it(tmp_path, classes, text):
    with pytest.raises(BoxFileError) as caught:
        read(json_file(tmp_path, [box("prostate")]), classes=classes)
    assert caught.value.reason == f"unknown class 'prostate' {text}"


@pytest.mark.parametrize(
    ("start", "stop", "reason"),
    [
        (
            (100, 0, 0),
            (104, 4, 4),
            "lies entirely outside the volume along axis 1 (100.5 to 104.5, the volume spans 0 to 20)",
        ),
        ((-1.2, 0, 0), (4, 4, 4), "reaches 0.7 voxels beyond the start of axis 1"),
        ((3, 0, 0), (4, 4, 12.3), "reaches 0.8 voxels beyond the end of axis 3"),
        (
            (-8, -9, 2),
            (-3, -4, 5),
            "entirely outside the volume along axis 1 (-7.5 to -2.5, the volume spans 0 to 20); "
            "it would lie inside as LPS: correct the coordinate system",
        ),
    ],
)
def test_millimetre_box_outside(tmp_path, start, stop, reason):
    with pytest.raises(BoxFileError) as caught:
        read(json_file(tmp_path, [box(1, start, stop)], "RAS"), affine=np.eye(4))
    assert reason in str(caught.value)


def test_oblique_box_outside(tmp_path):
    affine = rotated()
    world = edges_mm(affine, [1, 0, 0, 0, 20, 30, 12])
    low, high = world.min(0), world.max(0)
    read(json_file(tmp_path, [box(1, low, high)], "RAS"), affine=affine, max_looseness=1e9)
    high[2] += 6.0
    with pytest.raises(BoxFileError, match=r"reaches [\d.]+ mm beyond the volume along its own axis 3"):
        read(json_file(tmp_path, [box(1, low, high)], "RAS"), affine=affine, max_looseness=1e9)


BAD_ROIS = [
    ({"type": "Fiducial"}, "type: 'ROI' was expected; keep only ROI boxes in the file"),
    ({"roiType": "Sphere"}, "roiType: 'Sphere' is not one of ['Box', 'BoundingBox']; draw it as a box ROI"),
    ({"insideOut": True}, "insideOut: True is not"),
    (
        {"coordinateUnits": "um"},
        "coordinateUnits: 'um' is not valid under any of the given schemas; save it in millimetres",
    ),
    ({"coordinateSystem": "IJK"}, "unknown coordinate system 'voxel' for a Slicer ROI; use LPS or RAS"),
    ({"coordinateSystem": "voxel"}, "unknown coordinate system 'voxel' for a Slicer ROI"),
    ({"center": None, "controlPoints": []}, "center: None is not of type 'array'; place the ROI in Slicer"),
    ({"size": None}, "'size' is a required property; place the ROI in Slicer"),
    ({"size": [8, 15]}, "size: [8, 15] is too short"),
    ({"size": [8, -1, 3]}, "size_2: -1 is less than the minimum of 0"),
    ({"size": [0, 0, 0]}, "is empty: its size is 0 mm in every direction; draw it again in Slicer"),
    ({"orientation": [0] * 9}, "'orientation' is not a rotation"),
    ({"center": [float("nan"), 0, 0]}, "center_1 is nan"),
    (
        {"center": [41.0, 5.75, 8.0]},
        "lies entirely outside the volume along axis 1 (44 to 48, the volume spans 0 to 20)"
        "; it would lie inside as RAS: correct the coordinate system",
    ),
]


def test_unusable_slicer_rois(tmp_path):
    good = markup((-41.0, -5.75, 8.0), (8, 15, 3), label="1")
    assert len(read(slicer_file(tmp_path, good))) == 1
    with pytest.raises(BoxFileError) as caught:
        read(slicer_file(tmp_path, good, *(good | change for change, _ in BAD_ROIS)))
    for row, (fault, (_, reason)) in enumerate(zip(caught.value.faults, BAD_ROIS, strict=True), start=1):
        assert fault.where == f"markups[{row}]" and fault.reason.startswith(reason), reason


def test_slicer_roi_on_a_2d_image(tmp_path):
    with pytest.raises(BoxFileError, match="three-dimensional, but the image is 2D; use a JSON or CSV box file"):
        read(slicer_file(tmp_path, markup((0, 0, 0), (1, 1, 1), label="1")), shape=(20, 30))


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.json", '{"boxes": [', r"is not valid JSON \(.*line 1"),
        ("a.json", "[1, 2]", r"\[1, 2\] is not of type 'object'; a JSON box file"),
        ("a.json", '{"coordinate_system": "voxel"}', "'boxes' is a required property"),
        ("a.json", '{"boxes": []}', "'coordinate_system' is a required property"),
        (
            "a.json",
            '{"coordinate_system": "voxel", "boxes": [], "classes": {"a": 0}}',
            "classes.a: 0 is less than the minimum of 1",
        ),
        (
            "a.json",
            '{"coordinate_system": "voxel", "boxes": [], "classes": ["a"]}',
            r"classes: \['a'\] is not of type 'object'; map names",
        ),
        (
            "a.json",
            '{"coordinate_system": "voxel", "boxes": [], "classes": {"liver": 2}}',
            "'liver' is 2 in this file but 1",
        ),
        ("a.mrk.json", '{"boxes": []}', "'markups' is a required property; a Slicer box file"),
        (
            "a.mrk.json",
            '{"@schema": "markups-schema-v2.0.0.json#", "markups": []}',
            "expected Slicer's markups-schema-v1.x",
        ),
        ("a.csv", "", "needs the columns class,start_1,.* for a 3D image; found none; add the missing columns"),
        ("a.csv", "class,start_1\n1,2\n", "found class,start_1; add the missing columns"),
        ("a.csv", CSV_3D.replace("start_2", "start_1"), "has the column 'start_1' 2 times; keep one"),
        (
            "a.csv",
            "# coordinates: LPS\n" + CSV_3D,
            "'coordinates' looks like a coordinate system",
        ),
        ("a.csv", CSV_3D.replace("class", "class,frame"), "'frame' looks like a coordinate system"),
        ("a.csv", CSV_3D + "1,1_0,2,3,4,5,6\n", r"row 1 \(line 2\): start_1 is '1_0', which is no number"),
        ("a.csv", CSV_3D + f"1,{'9' * 5000},2,3,4,5,6\n", r"row 1 .*start_1 is '9+\.\.\. \(5002 characters\)"),
        ("a.json", '{"coordinate_system": "voxel", "boxes": [' + "9" * 5000 + "]}", "is not valid JSON"),
        ("a.json", "[" * 100_000, "is not valid JSON"),
        ("a.csv", "class,x_min,y_min,x_max,y_max\n1,0,0,1,1\n", "needs the columns .*x_min,y_min,z_min"),
        ("a.csv", b"class,\xff\xfe", r"is not UTF-8 text .*; save it as UTF-8"),
        ("a.csv", CSV_3D + "1,1,2,3,4,6\n", r"row 1 \(line 2\): stop_3 is '', which is no number"),
        ("a.csv", CSV_3D + "1,1,2,3,4,6,8,9\n", r"row 1 \(line 2\): has 8 cells, the header has 7; correct the row"),
        ("a.csv", CSV_3D + "1,1,2,3,4,6,8\n\n1,1,x,3,4,6,8\n", r"row 2 \(line 4\): start_2 is 'x', which is no number"),
        (
            "a.csv",
            "# coordinate_system: pixels\n" + CSV_3D + "1,1,2,3,4,6,8\n",
            r"row 1 \(line 3\): unknown coordinate system",
        ),
    ],
)
def test_unusable_file(tmp_path, name, text, reason):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BoxFileError, match=reason) as caught:
        read(path, classes={"liver": 1})
    assert str(caught.value).startswith(name)


def test_three_coordinates_on_a_2d_image(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(CSV_3D)
    with pytest.raises(BoxFileError, match=r"three coordinates a corner \(column start_3\), the image is 2D"):
        read(path, shape=(20, 30))


def test_all_faulty_rows_are_reported_once(tmp_path):
    path = json_file(tmp_path, [box(), *(box(1, (1, 2, 3), (1 + i % 2, 2, 8)) for i in range(13))])
    with pytest.raises(BoxFileError) as caught:
        read(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "boxes.json: 13 faulty rows"
    assert lines[1].strip().startswith("boxes[1]: is empty along axis 1")
    assert lines[2].strip().startswith("boxes[2]: is empty along axis 2")
    assert lines[-1].strip() == "and 3 more"
    assert len(lines) == 12
    assert [fault.row for fault in caught.value.faults] == list(range(1, 14))
    copy = pickle.loads(pickle.dumps(caught.value))  # as worker processes hand it back
    assert str(copy) == str(caught.value)
    assert (copy.path, copy.row, copy.reason) == (path, 1, caught.value.reason)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no box file at .*absent\.json"):
        read(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"affine": np.zeros((4, 4))}, "affine must be finite and invertible"),
        ({"affine": np.eye(2)}, r"affine must be a \(4, 4\) matrix .*got shape \(2, 2\)"),
        ({"shape": (4,)}, "shape must be the spatial shape, two or three sizes"),
        ({"shape": (4, 0, 2)}, "shape must be the spatial shape"),
        ({"stored_shape": SHAPE}, "give stored_affine and stored_shape together"),
        ({"stored_shape": (4, 4), "stored_affine": np.eye(4)}, "stored_shape has 2 sizes and shape 3"),
        ({"num_classes": 1}, "num_classes must be at least 2, with the background, got 1"),
        ({"classes": {"liver": 0}}, "classes: liver: 0 is less than the minimum of 1"),
    ],
)
def test_arguments(tmp_path, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        read(json_file(tmp_path, []), **arguments)


# Round trips


@pytest.mark.parametrize("name", ["b.json", "b.mrk.json"])
@pytest.mark.parametrize("affine", [LPS_GRID, PERMUTED, rotated()], ids=["lps", "permuted", "oblique"])
def test_round_trip(tmp_path, name, affine):
    rows = torch.tensor(
        [[1, 2, 3, 4, 9, 20, 11], [-1, 0, 0, 0, 0, 0, 0], [4, 0, 0, 0, 20, 30, 12], [1, 19, 29, 5, 20, 30, 6]]
    )
    path = tmp_path / name
    for class_names in (None, {1: "prostate", 4: "bladder"}):
        write_boxes(path, rows, class_names=class_names, affine=affine, overwrite=True)
        assert torch.equal(read(path, affine=affine), rows[rows[:, 0] > 0])
    # the numbers of a Slicer file are millimetres: they hold in a re-oriented grid without further help
    if name.endswith(".mrk.json"):
        moved, shape = reoriented(affine, SHAPE, (2, 0, 1), (1, 0, 0))
        expected = [[1, 1, 2, 3, 8, 9, 20], [4, 0, 0, 0, 12, 20, 30], [1, 6, 19, 29, 7, 20, 30]]
        assert read(path, affine=moved, shape=shape).tolist() == expected


def test_written_slicer_file_has_slicers_fields(tmp_path):
    path = tmp_path / "b.mrk.json"
    write_boxes(path, [[1, 3, 5, 5, 7, 15, 6]], affine=LPS_GRID, class_names={1: "prostate"})
    document = json.loads(path.read_text())
    assert document["@schema"].endswith("markups-schema-v1.0.3.json#")
    roi = document["markups"][0]
    assert (roi["type"], roi["roiType"], roi["coordinateSystem"], roi["name"]) == ("ROI", "Box", "LPS", "prostate")
    assert np.allclose(roi["center"], [-41.0, -5.75, 8.0])
    assert np.allclose(roi["size"], [8, 15, 3])
    assert np.allclose(roi["orientation"], np.eye(3).ravel())
    assert roi["controlPoints"][0]["position"] == roi["center"]


def test_two_dimensional_and_empty_round_trip(tmp_path):
    for rows in (torch.tensor([[2, 0, 1, 3, 4]]), torch.zeros(0, 5, dtype=torch.int64)):
        write_boxes(tmp_path / "b.json", rows, overwrite=True)
        assert torch.equal(read(tmp_path / "b.json", shape=(8, 9)), rows)


def test_overwrite(tmp_path):
    path = tmp_path / "b.json"
    write_boxes(path, [[1, 0, 0, 2, 2]])
    with pytest.raises(FileExistsError):
        write_boxes(path, [[1, 0, 0, 3, 3]])
    assert read(path, shape=(8, 9)).tolist() == [[1, 0, 0, 2, 2]]
    write_boxes(path, [[1, 0, 0, 3, 3]], overwrite=True)
    assert read(path, shape=(8, 9)).tolist() == [[1, 0, 0, 3, 3]]


@pytest.mark.parametrize(
    ("name", "rows", "arguments", "reason"),
    [
        ("b.csv", [[1, 0, 0, 2, 2]], {}, r"path must end in \.json or \.mrk\.json, got 'b\.csv'"),
        ("b.json", [[1, 0, 0, 2]], {}, r"boxes must have the shape \(N, 1 \+ 2 D\) .* got \(1, 4\)"),
        ("b.json", [[1.0, 0, 0, 2, 2]], {}, "boxes must be integers, got torch.float32"),
        ("b.json", [[1, 2, 0, 2, 2]], {}, r"boxes has the row \[1, 2, 0, 2, 2\]"),
        ("b.json", [[0, 0, 0, 2, 2]], {}, r"class must be >= 1 \(or -1, padding\)"),
        ("b.json", [[2, 0, 0, 2, 2]], {"class_names": {1: "a"}}, r"without one: \[2\]"),
        ("b.json", [[2, 0, 0, 2, 2]], {"class_names": {1: "a", 2: "a"}}, "a name of its own"),
        ("b.mrk.json", [[1, 0, 0, 0, 2, 2, 2]], {}, r"affine is needed for a \.mrk\.json file"),
        ("b.mrk.json", [[1, 0, 0, 2, 2]], {"affine": np.eye(4)}, "three-dimensional boxes; write 2D boxes as .json"),
        ("b.mrk.json", [[1, 0, 0, 0, 2, 2, 2]], {"affine": np.eye(4) + np.eye(4, k=1) * 0.2}, "affine is sheared"),
    ],
)
def test_unwritable(tmp_path, name, rows, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        write_boxes(tmp_path / name, rows, **arguments)
    assert not (tmp_path / name).exists()
