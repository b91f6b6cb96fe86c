"""Point lists of 3D Slicer: the voxel that was clicked, of the class that is meant, or a reason."""

import json

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medconstraints.boxes import BoxFileError, read_points
from medconstraints.transforms import LoadPointsd, weak_label_transforms

SHAPE = (20, 30, 12)
GRID = np.array([[-2.0, 0, 0, 50], [0, -1.5, 0, 20], [0, 0, 3, -7], [0, 0, 0, 1]])
CLASSES = {"Tumour": 1, "cyst": 2}


def mm(voxel, system="LPS"):
    place = (GRID @ [*voxel, 1.0])[:3]
    return (place * ([-1, -1, 1] if system == "LPS" else 1)).tolist()


def point(voxel, label="F-1", system="LPS", **more):
    return {"id": "1", "label": label, "description": "", "position": mm(voxel, system), **more}


def markups(path, *points, **more):
    schema = "https://raw.githubusercontent.com/slicer/slicer/master/Schema/markups-schema-v1.0.3.json#"
    content = {"type": "Fiducial", "coordinateSystem": "LPS", "controlPoints": list(points), **more}
    path.write_text(json.dumps({"@schema": schema, "markups": [content]}))
    return path


def read(path, **more):
    return read_points(path, **{"affine": GRID, "shape": SHAPE, "classes": CLASSES, **more}).tolist()


@pytest.mark.parametrize("system", ["LPS", "RAS"])
def test_the_voxel_that_was_clicked(tmp_path, system):
    points = [point((3, 4, 5), "tumour-1", system), point((19.4, 0.4, 11), "cyst_2", system)]
    path = markups(tmp_path / "a.mrk.json", *points, coordinateSystem=system)
    assert read(path) == [[1, 3, 4, 5], [2, 19, 0, 11]]


@pytest.mark.parametrize("header", ["# CoordinateSystem = LPS", "# CoordinateSystem = 1", "#CoordinateSystem: RAS"])
def test_older_tables(tmp_path, header):
    system = "RAS" if "RAS" in header else "LPS"
    place = ",".join(map(str, mm((3, 4, 5), system)))
    columns = "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID"
    text = f"# Markups fiducial file version = 4.11\n{header}\n{columns}\n0,{place},0,0,0,1,1,1,0,Cyst-1,,\n"
    (tmp_path / "a.fcsv").write_text(text)
    assert read(tmp_path / "a.fcsv") == [[2, 3, 4, 5]]


@pytest.mark.parametrize(
    ("label", "name", "file", "expected"),
    [
        ("F-1", "", "tumour_3.mrk.json", 1),
        ("F-1", "CYST", "x.mrk.json", 2),
        ("2", "", "x.mrk.json", 2),
        ("", "MarkupsFiducial", "cyst.mrk.json", 2),
        ("vessel-2", "", "cyst.mrk.json", "unknown class 'vessel'"),
        ("F-1", "", "x.mrk.json", "unknown class 'x'"),
    ],
)
def test_class_of_a_point(tmp_path, label, name, file, expected):
    path = markups(tmp_path / file, point((1, 2, 3), label), name=name)
    if isinstance(expected, int):
        assert read(path) == [[expected, 1, 2, 3]]
    else:
        with pytest.raises(BoxFileError, match=expected):
            read(path)


def test_points_that_are_none_and_points_outside(tmp_path):
    waiting = point((0, 0, 0), "cyst", positionStatus="undefined")
    assert read(markups(tmp_path / "a.mrk.json", waiting)) == []
    path = markups(tmp_path / "b.mrk.json", point((1, 1, 1), "cyst"), point((20, 1, 1), "cyst"), point((1, 1, 1), "9"))
    with pytest.raises(BoxFileError) as caught:
        read(path)
    places = [fault.where for fault in caught.value.faults]
    assert places == ["markups[0].controlPoints[1]", "markups[0].controlPoints[2]"]
    assert "lies outside the volume, at voxel [20, 1, 1]" in caught.value.faults[0].reason
    with pytest.raises(BoxFileError, match="class 2 is none of the classes 1 to 1"):
        read(markups(tmp_path / "a.mrk.json", point((1, 1, 1), "cyst")), num_classes=2)
    with pytest.raises(BoxFileError, match="expected a point list, type 'Fiducial'"):
        read(markups(tmp_path / "a.mrk.json", type="ROI"))
    with pytest.raises(FileNotFoundError, match="no point file"):
        read(tmp_path / "gone.fcsv")


def test_balls_in_a_weak_label(tmp_path):
    """Against the distance of every voxel; the nearest point counts, and the border cuts."""
    path = markups(tmp_path / "a.mrk.json", point((0, 4, 5), "tumour"), point((3, 4, 5), "cyst"))
    image = MetaTensor(torch.zeros(1, *SHAPE), affine=torch.as_tensor(GRID), meta={"filename_or_obj": "a.nii"})
    found = {"image": image, "points": str(path)}
    for transform in weak_label_transforms("point_files", radius_voxels=2, classes=CLASSES, num_classes=3):
        found = transform(found)
    places = np.stack(np.indices(SHAPE), -1)
    apart = [np.square(places - centre).sum(-1) for centre in ((0, 4, 5), (3, 4, 5))]
    expected = np.where(np.minimum(*apart) > 4, -1, np.where(apart[0] <= apart[1], 1, 2))
    np.testing.assert_array_equal(found["weak_label"][0], expected)


def test_what_is_no_point_list(tmp_path):
    image = MetaTensor(torch.zeros(1, *SHAPE), affine=torch.as_tensor(GRID))
    with pytest.raises(TypeError, match="expected the path of a point list and a loaded image"):
        LoadPointsd()({"image": image, "points": 3})
    image.meta |= {"forms_differ": True, "geometry_notes": "two places"}
    with pytest.raises(ValueError, match="two places; set form to sform or qform"):
        LoadPointsd()({"image": image, "points": "a.fcsv"})
