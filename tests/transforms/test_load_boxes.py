"""Boxes from files, in the grid of an image that MONAI loaded, turned and resampled."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import ITKReader, MetaTensor, NibabelReader
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    RandFlipd,
    Spacingd,
    SpatialCropd,
)

from medconstraints.boxes.files import BoxFileError, write_boxes
from medconstraints.transforms import BoxesToGridd, LoadBoxesd, LoadVolumed, box_transforms

SHAPE = (18, 22, 10)
LPS = np.array([[-1.5, 0, 0, 30], [0, -2.0, 0, 12], [0, 0, 3, -5], [0, 0, 0, 1]])
PSR = np.array(
    [[0, 0, 3.0, -5], [-1.5, 0, 0, 30], [0, 2.0, 0, 12], [0, 0, 0, 1]]
)  # P S R, as shared spinal cord volumes
ROWS = [[1, 2, 3, 1, 9, 12, 4], [2, 0, 14, 7, 18, 22, 10], [3, 12, 1, 2, 13, 2, 3]]


def save_case(folder, affine):
    """An image, and a label that holds the boxes of ROWS as cuboids of different classes."""
    label = np.zeros(SHAPE, dtype=np.uint8)
    for number, *sides in ROWS:
        label[sides[0] : sides[3], sides[1] : sides[4], sides[2] : sides[5]] = number
    image = np.random.default_rng(0).random(SHAPE).astype(np.float32)
    nib.save(nib.Nifti1Image(image, affine), folder / "case.nii.gz")
    nib.save(nib.Nifti1Image(label, affine), folder / "label.nii.gz")
    return {"image": str(folder / "case.nii.gz"), "label": str(folder / "label.nii.gz")}


def boxes_of(label):
    """Boxes of a label volume, class by class (independent of the package)."""
    volume = np.asarray(label)[0]
    rows = []
    for number in range(1, 4):
        where = np.argwhere(volume == number)
        rows.append([number, *where.min(0), *(where.max(0) + 1)])
    return rows


def box_file(folder, kind, affine):
    """ROWS as each kind of file says them."""
    path = folder / {"voxel": "b.json", "slicer": "b.mrk.json", "csv": "b.csv", "LPS": "mm.json"}[kind]
    if kind in ("voxel", "slicer"):
        write_boxes(path, ROWS, affine=affine)
    elif kind == "csv":
        path.write_text(
            "image,class,x_min,y_min,z_min,x_max,y_max,z_max\n"
            + "".join(f"case.nii.gz,{','.join(map(str, row))}\n" for row in ROWS)
            + "other.nii.gz,1,0,0,0,500,1,1\n"
        )
    else:
        boxes = []
        for number, *sides in ROWS:
            corners = [
                affine @ [*(np.array(side) - 0.5), 1] * np.array([-1, -1, 1, 1]) for side in (sides[:3], sides[3:])
            ]
            boxes.append({"class": number, "start": list(corners[0][:3]), "stop": list(corners[1][:3])})
        path.write_text(json.dumps({"coordinate_system": "LPS", "boxes": boxes}))
    return path


def load(reader=None):
    return [
        LoadImaged(["image", "label"], reader=reader),
        EnsureChannelFirstd(["image", "label"]),
    ]


@pytest.mark.parametrize("kind", ["voxel", "slicer", "csv", "LPS"])
@pytest.mark.parametrize(("affine", "axcodes"), [(LPS, "SAL"), (PSR, "RAS")], ids=["LPS", "PSR"])
def test_boxes_follow_the_orientation_of_the_label(tmp_path, kind, affine, axcodes):
    chain = Compose([*load(), Orientationd(["image", "label"], axcodes=axcodes, labels=None), LoadBoxesd()])
    item = chain({**save_case(tmp_path, affine), "boxes": box_file(tmp_path, kind, affine)})
    assert item["boxes"].dtype == torch.int64
    assert item["boxes"].tolist() == boxes_of(item["label"])
    assert item["boxes_affine"].dtype == torch.float64
    assert type(item["boxes_affine"]) is torch.Tensor
    assert torch.equal(item["boxes_affine"], item["image"].affine)


@pytest.mark.parametrize("affine", [LPS, PSR], ids=["LPS", "PSR"])
@pytest.mark.parametrize("reader", [NibabelReader(as_closest_canonical=True), ITKReader()], ids=["canonical", "itk"])
def test_readers_that_load_another_order(tmp_path, reader, affine):
    chain = Compose([*load(reader), LoadBoxesd()])
    item = chain({**save_case(tmp_path, affine), "boxes": box_file(tmp_path, "voxel", affine)})
    assert item["boxes"].tolist() == boxes_of(item["label"])


def test_boxes_follow_a_resampling(tmp_path):
    chain = Compose(
        [
            *load(),
            Orientationd(["image", "label"], axcodes="RAS", labels=None),
            Spacingd(["image", "label"], pixdim=(0.5, 0.5, 0.5), mode=("bilinear", "nearest")),
            LoadBoxesd(),
        ]
    )
    case = save_case(tmp_path, LPS)
    voxel = chain({**case, "boxes": box_file(tmp_path, "voxel", LPS)})
    millimetre = chain({**case, "boxes": box_file(tmp_path, "slicer", LPS)})
    assert torch.equal(voxel["boxes"], millimetre["boxes"])
    # nearest-neighbour resampling and rounding to edges may differ by one voxel of the new grid
    assert np.abs(voxel["boxes"].numpy() - np.array(boxes_of(voxel["label"]))).max() <= 1


def test_boxes_follow_later_augmentation(tmp_path):
    both = ["image", "label"]
    chain = Compose(
        [
            *load(),
            Orientationd(both, axcodes="RAS", labels=None),
            LoadBoxesd(),
            RandFlipd(both, prob=1.0, spatial_axis=1),
            BoxesToGridd(),
        ]
    )
    item = chain({**save_case(tmp_path, LPS), "boxes": box_file(tmp_path, "slicer", LPS)})
    assert item["boxes"].tolist() == boxes_of(item["label"])


def test_class_names_and_a_second_key(tmp_path):
    case = save_case(tmp_path, LPS)
    path = tmp_path / "named.json"
    write_boxes(path, ROWS[:1], class_names={1: "liver"})
    text = json.loads(path.read_text())
    del text["classes"]
    path.write_text(json.dumps(text))
    chain = Compose([*load(), LoadBoxesd(["boxes", "second"], classes={"liver": 4}, allow_missing_keys=True)])
    item = chain({**case, "second": str(path)})
    assert item["second"].tolist() == [[4, *ROWS[0][1:]]]
    assert set(item) == {"image", "label", "second", "second_affine"}
    with pytest.raises(KeyError, match="boxes"):
        LoadBoxesd()(dict(item))


def test_volumes_of_one_name_in_two_folders(tmp_path, monkeypatch):
    rows = "".join(f"p{i}/case.nii.gz,{','.join(map(str, ROWS[i - 1]))}\n" for i in (1, 2))
    (tmp_path / "b.csv").write_text(f"image,class,x_min,y_min,z_min,x_max,y_max,z_max\n{rows}")
    for i in (1, 2):
        (tmp_path / f"p{i}").mkdir()
        item = {**save_case(tmp_path / f"p{i}", LPS), "boxes": tmp_path / "b.csv"}
        assert Compose([*load(), LoadBoxesd()])(item)["boxes"].tolist() == [ROWS[i - 1]]
    monkeypatch.chdir(tmp_path / "p1")  # the folder that the rows name is not in the item
    item = {"image": "case.nii.gz", "label": "../p1/label.nii.gz", "boxes": "../b.csv"}
    assert Compose([*load(), LoadBoxesd()])(item)["boxes"].tolist() == [ROWS[0]]


def test_file_without_boxes(tmp_path):
    path = tmp_path / "none.csv"
    path.write_text("image,class,x_min,y_min,z_min,x_max,y_max,z_max\ncase.nii.gz,,,,,,,\n")
    item = Compose([*load(), LoadBoxesd()])({**save_case(tmp_path, LPS), "boxes": path})
    assert item["boxes"].shape == (0, 7)


def test_two_dimensional_image(tmp_path):
    image = np.random.default_rng(0).random((12, 9)).astype(np.float32)
    nib.save(nib.Nifti1Image(image, np.diag([-1.0, -2.0, 1.0, 1.0])), tmp_path / "flat.nii.gz")
    path = tmp_path / "b.json"
    write_boxes(path, [[1, 2, 3, 5, 4]])
    chain = Compose(
        [
            LoadImaged("image"),
            EnsureChannelFirstd("image"),
            Orientationd("image", axcodes="RA", labels=None),
            LoadBoxesd(),
        ]
    )
    item = chain({"image": tmp_path / "flat.nii.gz", "boxes": path})
    start, stop = item["boxes"][0, 1:3], item["boxes"][0, 3:]
    found = np.asarray(item["image"])[0, start[0] : stop[0], start[1] : stop[1]]
    assert np.array_equal(found, image[2:5, 3:4][::-1, ::-1])
    assert item["boxes_affine"].shape == (4, 4)


def test_real_volumes(data_root, tmp_path):
    """Three orientations of one cord: the label's own boxes, through the file and the chain."""
    pairs = json.loads((data_root / "spinal_cord.json").read_text())["test"]
    for pair in pairs:
        label = nib.load(data_root / pair["label"])
        where = np.argwhere(np.asarray(label.dataobj) > 0)
        write_boxes(
            tmp_path / "b.mrk.json", [[1, *where.min(0), *(where.max(0) + 1)]], affine=label.affine, overwrite=True
        )
        item = {
            "image": data_root / pair["image"],
            "label": data_root / pair["label"],
            "boxes": tmp_path / "b.mrk.json",
        }
        chain = [*load(), Orientationd(["image", "label"], axcodes="RAS", labels=None), LoadBoxesd()]
        item = Compose(chain)(item)
        where = np.argwhere(np.asarray(item["label"])[0] > 0)
        assert item["boxes"].tolist() == [[1, *where.min(0), *(where.max(0) + 1)]]


# What is refused


def test_faulty_rows_keep_their_words(tmp_path):
    path = tmp_path / "b.json"
    write_boxes(path, [[1, 0, 0, 0, 2, 2, 40]])
    item = {**save_case(tmp_path, LPS), "boxes": path}
    with pytest.raises(RuntimeError, match="applying transform") as caught:
        Compose([*load(), LoadBoxesd()])(item)
    assert isinstance(caught.value.__cause__, BoxFileError)
    assert "b.json, boxes[0]: reaches 30 voxels beyond the end of axis 3" in str(caught.value.__cause__)


def test_classes_that_the_network_does_not_have(tmp_path):
    item = Compose(load())({**save_case(tmp_path, LPS), "boxes": box_file(tmp_path, "csv", LPS)})
    assert len(LoadBoxesd(num_classes=4)(item)["boxes"]) == 3
    (chained,) = box_transforms("files", num_classes=3)
    for transform in (LoadBoxesd(num_classes=3), chained):
        with pytest.raises(BoxFileError, match=r"^b\.csv, row 3 \(line 4\): class 3 is none of the 2 classes to box"):
            transform(item)


def test_cropped_before(tmp_path):
    item = Compose([*load(), SpatialCropd(["image", "label"], roi_start=(0, 0, 0), roi_end=(18, 8, 10))])(
        save_case(tmp_path, LPS)
    )
    with pytest.raises(BoxFileError, match=r"boxes\[0\]: reaches 4 voxels .*axis 2 .*read boxes before any crop"):
        LoadBoxesd()({**item, "boxes": box_file(tmp_path, "voxel", LPS)})


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"boxes": torch.zeros(1, 7)}, TypeError, "boxes: expected the path of a box file or folder, .*got Tensor"),
        (
            {"image": "case.nii.gz"},
            TypeError,
            r"image: expected a loaded image \(MetaTensor\), got str; put LoadBoxesd after",
        ),
        ({"image": torch.zeros(1, 4, 4, 4)}, TypeError, "expected a loaded image"),
        ({"boxes": "absent.json"}, FileNotFoundError, "no box file at absent.json"),
    ],
)
def test_wrong_items(change, error, reason):
    item = {"image": MetaTensor(torch.zeros(1, *SHAPE)), "boxes": "absent.json", **change}
    with pytest.raises(error, match=reason):
        LoadBoxesd()(item)


def test_image_without_a_stored_grid(tmp_path):
    path = tmp_path / "b.json"
    write_boxes(path, ROWS)
    image = MetaTensor(torch.zeros(1, *SHAPE), affine=torch.as_tensor(LPS))
    assert LoadBoxesd()({"image": image, "boxes": path})["boxes"].tolist() == ROWS
    moved = Orientationd("image", axcodes="RAS", labels=None)({"image": image, "boxes": path})
    with pytest.raises(
        ValueError, match=r"image: expected original_affine and spatial_shape .* right after the loading"
    ):
        LoadBoxesd()(moved)
    image.meta |= {"original_affine": LPS, "spatial_shape": np.array(SHAPE[:2])}
    with pytest.raises(ValueError, match="expected an image of the 2 axes of its file, got 3 spatial axes"):
        LoadBoxesd()({"image": image, "boxes": path})


def test_boxes_of_several_files_and_of_a_folder_go_together(tmp_path):
    image = MetaTensor(torch.zeros(1, 8, 8), affine=torch.eye(4), meta={"filename_or_obj": "a.png"})
    header = "class,x_min,y_min,x_max,y_max\n"
    for name, row in (("one.csv", "1,0,2,3,4"), ("two.csv", "2,1,1,5,5")):
        (tmp_path / name).write_text(header + row)
    expected = [[1, 0, 2, 3, 4], [2, 1, 1, 5, 5]]
    for value in ([str(tmp_path / "one.csv"), str(tmp_path / "two.csv")], str(tmp_path)):
        assert LoadBoxesd()({"image": image, "boxes": value})["boxes"].tolist() == expected
    (tmp_path / "two.csv").rename(tmp_path / "TWO.CSV")
    (tmp_path / "._one.csv").write_text("a program's own")
    found = LoadBoxesd()({"image": image, "boxes": str(tmp_path)})["boxes"].tolist()
    assert sorted(found) == expected
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"boxes: no \.json or \.csv file in the folder empty"):
        LoadBoxesd()({"image": image, "boxes": tmp_path / "empty"})
    with pytest.raises(KeyError, match=r"boxes: the item of a\.png has none; add its box file to the datalist"):
        LoadBoxesd()({"image": image})


def test_millimetre_boxes_need_a_form_that_counts(tmp_path):
    voxels = np.random.default_rng(0).random((8, 8, 8)).astype(np.float32)
    image = nib.Nifti1Image(voxels, np.eye(4))
    image.set_sform(np.eye(4), 1)
    image.set_qform(np.diag([1.0, 1.0, 2.0, 1.0]), 1)
    nib.save(image, tmp_path / "a.nii")
    for system, start in (("RAS", 0.5), ("voxel", 1)):
        content = {"coordinate_system": system, "boxes": [{"class": 1, "start": [start] * 3, "stop": [start + 3] * 3}]}
        (tmp_path / f"{system}.json").write_text(json.dumps(content))
    load, boxes = (lambda form: LoadVolumed("image", form=form)({"image": tmp_path / "a.nii"})["image"]), LoadBoxesd()
    with pytest.raises(BoxFileError, match=r"in millimetres.*sform \(origin.*set form to sform or qform"):
        boxes({"image": load("best"), "boxes": tmp_path / "RAS.json"})
    assert boxes({"image": load("best"), "boxes": tmp_path / "voxel.json"})["boxes"].tolist() == [[1, 1, 1, 1, 4, 4, 4]]
    assert boxes({"image": load("sform"), "boxes": tmp_path / "RAS.json"})["boxes"].tolist() == [[1, 1, 1, 1, 4, 4, 4]]
    assert boxes({"image": load("qform"), "boxes": tmp_path / "RAS.json"})["boxes"].tolist() == [[1, 1, 1, 1, 4, 4, 2]]
