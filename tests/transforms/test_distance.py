"""Distance maps as transforms: the spacing of any affine, storage, what may follow, caches and workers, refusals."""

import itertools
import pickle
from functools import partial

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader, MetaTensor, PersistentDataset, list_data_collate
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    CropForegroundd,
    DivisiblePadd,
    EnsureChannelFirstd,
    EnsureTyped,
    Flipd,
    Lambdad,
    LoadImaged,
    Orientationd,
    RandAffined,
    RandAxisFlipd,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandRotate90d,
    RandRotated,
    RandSpatialCropd,
    RandZoomd,
    Resized,
    ResizeWithPadOrCropd,
    Rotated,
    SelectItemsd,
    Spacingd,
    SpatialPadd,
    Transposed,
    Zoomd,
)
from scipy import ndimage
from scipy.spatial.transform import Rotation

from medconstraints.distance import Euclidean, Geodesic, grow_label, signed_distance_map, signed_geodesic_distance
from medconstraints.losses.boundary import BoundaryLoss
from medconstraints.losses.combined import CombinedLoss
from medconstraints.losses.distance_weighted import DistanceWeightedCrossEntropyLoss
from medconstraints.losses.hausdorff import HausdorffLoss
from medconstraints.transforms.distance import DecodeDistanceMapd, SignedDistanceMapd

SHAPE, SPACING = (7, 6, 5), (1.0, 2.0, 3.5)
STORAGES = ("float32", "float16", "int8")
BOTH = ["label", "distance_map"]
MODES = ["nearest", "bilinear"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Two threads wait for each other longer than they need for tensors of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def affine_of(axes, spacing=SPACING):
    """Affine whose columns are `axes` (3, D) of length 1, `spacing` apart."""
    affine = np.eye(4)
    affine[:3, : len(spacing)] = np.asarray(axes)[:, : len(spacing)] * spacing
    affine[:3, 3] = (-40.0, 12.5, 7.0)
    return affine


OBLIQUE = Rotation.from_euler("xyz", [20, -35, 50], degrees=True).as_matrix()


def sheared(cosine):
    """Axes of a tilted gantry, the first and the last at an angle of that cosine."""
    return np.array([[1, 0, cosine], [0, 1, 0], [0, 0, np.sqrt(1 - cosine**2)]])


AXES = {
    "diagonal": np.eye(3),
    "flipped": np.diag([-1, -1, 1]),
    "permuted": np.eye(3)[[2, 0, 1]],
    "oblique": OBLIQUE,
    "oblique and permuted": -OBLIQUE[:, [1, 2, 0]],
}


def blobs(shape, num_classes=3, seed=0):
    """Class numbers (1, *S) in blobs; all classes are there."""
    noise = np.random.default_rng(seed).random((num_classes, *shape))
    label = np.stack([ndimage.gaussian_filter(one, 1.0) for one in noise]).argmax(0)
    assert len(np.unique(label)) == num_classes
    return torch.from_numpy(label[None]).float()


def loaded(label=None, affine=None, **meta):
    """A label as LoadImaged gives it."""
    affine = affine_of(np.eye(3)) if affine is None else affine
    return MetaTensor(blobs(SHAPE) if label is None else label, affine=torch.as_tensor(affine), meta=meta)


def plain(tensor):
    return np.asarray(torch.as_tensor(tensor))


@pytest.fixture(scope="module")
def reference(distance_reference):
    """Brute force."""
    return distance_reference


@pytest.fixture(scope="module")
def exact(reference):
    """Maps (C, *S) of a label (1, *S), brute force."""
    return lambda label, spacing=SPACING, **options: reference.maps(plain(label)[0], 3, spacing, **options)


# Values


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_the_spacing_is_that_of_the_affine(axes, exact):
    label = loaded(affine=affine_of(axes))
    item = SignedDistanceMapd(num_classes=3)({"label": label})
    assert item["distance_map"].shape == (3, *SHAPE)
    assert item["distance_map"].dtype == torch.float32
    np.testing.assert_allclose(plain(item["distance_map"]), exact(label), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(item["spacing_mm"], SPACING, rtol=1e-6)
    assert type(item["spacing_mm"]) is torch.Tensor


def test_2d_images(exact):
    """With the affine of their volume, or one of their plane."""
    label = blobs(SHAPE[:2])
    affines = [affine_of(axes, SPACING[:2]) for axes in (np.eye(3)[[2, 0, 1]], OBLIQUE)]
    for affine in (*affines, np.diag([*SPACING[:2], 1.0])):
        item = SignedDistanceMapd(num_classes=3)({"label": loaded(label, affine)})
        np.testing.assert_allclose(plain(item["distance_map"]), exact(label, SPACING[:2]), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(item["spacing_mm"], SPACING[:2], rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"convention": "voxel"}, {"convention": "published"}, {"slice_axis": 2}, {"slice_axis": 0, "clip_mm": 1.5}],
    ids=str,
)
def test_the_measure_is_that_of_the_function(options, exact):
    label = loaded()
    for backend in ("auto", "torch"):
        make = SignedDistanceMapd(num_classes=3, measure=Euclidean(backend=backend, **options))
        found = make({"label": label})["distance_map"]
        np.testing.assert_allclose(plain(found), exact(label, **options), rtol=1e-5, atol=1e-5)


def test_a_given_spacing_wins(exact):
    label, spacing = loaded(), (3.0, 0.5, 1.0)
    for one in (label, label.as_tensor()):  # a plain tensor has no affine to ask
        item = SignedDistanceMapd(num_classes=3, spacing_mm=spacing)({"label": one})
        assert item["spacing_mm"].tolist() == list(spacing)
        assert type(item["distance_map"]) is type(one)
        np.testing.assert_allclose(plain(item["distance_map"]), exact(label, spacing), rtol=1e-5, atol=1e-5)


def test_types_of_labels(exact):
    for kind in (torch.uint8, torch.int64, torch.float64, torch.bool):
        label = (blobs(SHAPE) % 2).to(kind) if kind is torch.bool else blobs(SHAPE).to(kind)
        found = SignedDistanceMapd(num_classes=3)({"label": loaded(label)})["distance_map"]
        np.testing.assert_allclose(plain(found), exact(label), rtol=1e-5, atol=1e-5)


def test_absent_and_full_classes_have_no_boundary():
    label = blobs(SHAPE)
    transform = SignedDistanceMapd(num_classes=3)
    absent = transform({"label": loaded(label * (label < 2))})["distance_map"]
    assert bool((absent[:2] != 0).all()) and bool((absent[2] == 0).all())
    assert bool((transform({"label": loaded(torch.ones(1, *SHAPE))})["distance_map"] == 0).all())
    slices = label.clone()
    slices[..., 0], slices[..., 1] = 0, 1
    found = SignedDistanceMapd(num_classes=3, measure=Euclidean(slice_axis=2))({"label": loaded(slices)})[
        "distance_map"
    ]
    assert bool((found[..., :2] == 0).all()) and bool((found[..., 2:] != 0).any())


# Masks, and networks with other channels


def masks_of(*labels):
    """Masks (C, *S) of class 1 of each label."""
    return torch.cat([label == 1 for label in labels]).float()


MASK_OPTIONS = [
    {},
    {"convention": "voxel", "clip_mm": 2.0},
    {"convention": "published"},
    {"slice_axis": 2},
    {"classes": [2, 0]},
    {"classes": [1]},
]


@pytest.mark.parametrize("options", MASK_OPTIONS, ids=str)
def test_masks_may_overlap(options, reference):
    rest = {key: value for key, value in options.items() if key != "classes"}
    for kind, backend in itertools.product((torch.float32, torch.uint8, torch.bool), ("auto", "torch")):
        masks = masks_of(*(blobs(SHAPE, 2, seed) for seed in range(3))).to(kind)
        assert (masks.sum(0) > 1).any() and (masks.sum(0) == 0).any()
        measure = Euclidean(backend=backend, **rest)
        make = SignedDistanceMapd(num_classes=3, classes=options.get("classes"), measure=measure)
        item = make({"label": loaded(masks, affine_of(OBLIQUE))})
        expected = [reference.signed(plain(masks)[n], SPACING, **rest) for n in options.get("classes", range(3))]
        np.testing.assert_allclose(plain(item["distance_map"]), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(item["spacing_mm"], SPACING, rtol=1e-6)


def test_masks_of_all_classes_are_the_label():
    label = blobs(SHAPE)
    one_hot = torch.cat([label == n for n in range(3)]).float()
    for storage in STORAGES:
        make = SignedDistanceMapd(num_classes=3, storage=storage, measure=Euclidean(clip_mm=4.0))
        found, expected = (make({"label": loaded(one)})["distance_map"] for one in (one_hot, label))
        assert torch.equal(found.as_tensor(), expected.as_tensor())


@pytest.mark.parametrize("measure", [Euclidean(), Geodesic(image_weight=0.0)], ids=["straight", "along an image"])
def test_one_mask(measure, reference):
    """num_classes=1: negative inside the mask."""
    for shape, storage in itertools.product((SHAPE, SHAPE[:2]), ("float32", "float16")):
        mask, spacing = masks_of(blobs(shape, 2)), SPACING[: len(shape)]
        make = SignedDistanceMapd(num_classes=1, storage=storage, spacing_mm=spacing, measure=measure)
        found = make({"label": loaded(mask), "image": torch.zeros(mask.shape)})["distance_map"]
        assert found.shape == mask.shape
        assert torch.equal(found.as_tensor() < 0, mask > 0)
        if isinstance(measure, Euclidean):
            np.testing.assert_allclose(plain(found)[0], reference.signed(plain(mask)[0] > 0, spacing), rtol=1e-3)


def test_what_are_no_masks():
    masks = masks_of(blobs(SHAPE, 2), blobs(SHAPE, 2, 1))
    for measure, given in itertools.product((Euclidean(), Geodesic(image_weight=1.0)), (masks / 2, masks * 3)):
        make = SignedDistanceMapd(num_classes=2, measure=measure)
        with pytest.raises(ValueError, match=r"^a\.nii: mask: expected zeros and ones, got .*threshold"):
            make({"label": loaded(given, filename_or_obj="/data/a.nii"), "image": torch.zeros(1, *SHAPE)})


def test_some_classes():
    label = loaded()
    for classes, storage in itertools.product(([1], [2, 1], (0, 2)), STORAGES):
        options = {"num_classes": 3, "storage": storage, "measure": Euclidean(clip_mm=4.0)}
        found = SignedDistanceMapd(classes=classes, **options)({"label": label})["distance_map"]
        assert found.shape == (len(classes), *SHAPE)
        expected = SignedDistanceMapd(**options)({"label": label})["distance_map"][list(classes)]
        assert torch.equal(found.as_tensor(), expected)


def test_one_channel_networks(reference):
    """A network with one sigmoid channel, of a label with the background."""
    item = SignedDistanceMapd(num_classes=2, classes=[1])({"label": loaded(blobs(SHAPE, 2))})
    batch = list_data_collate([item, item])
    assert batch["distance_map"].shape == (2, 1, *SHAPE)
    losses = {"boundary": BoundaryLoss(sigmoid=True), "hausdorff": HausdorffLoss(sigmoid=True)}
    loss = CombinedLoss(losses)
    truth = plain(batch["label"]) == 1
    right, wrong = (torch.from_numpy(np.where(side, 20, -20)).float() for side in (truth, ~truth))
    assert loss(right, batch) < 0 < loss(wrong, batch)
    np.testing.assert_allclose(plain(item["distance_map"])[0], reference.signed(truth[0, 0], SPACING), rtol=1e-5)


def test_keys():
    label = loaded()
    item = SignedDistanceMapd("seg", "phi", spacing_key=None, num_classes=3)({"seg": label, "other": 7})
    assert set(item) == {"seg", "phi", "other"}
    item = SignedDistanceMapd("seg", "phi", spacing_key="steps", num_classes=3)({"seg": label})
    assert set(item) == {"seg", "phi", "steps"}
    without = {"image": label}
    assert SignedDistanceMapd(num_classes=3, allow_missing_keys=True)(without) == without
    assert DecodeDistanceMapd(allow_missing_keys=True)(without) == without
    for transform in (SignedDistanceMapd(num_classes=3), DecodeDistanceMapd()):
        with pytest.raises(KeyError, match=transform.keys[0]):
            transform(without)


def test_the_item_is_left_as_it_was():
    label = loaded(filename_or_obj="a.nii.gz", deep={"list": [1]})
    values, meta = label.as_tensor().clone(), dict(label.meta)
    item = {"label": label}
    found = SignedDistanceMapd(num_classes=3)(item)
    assert set(item) == {"label"}
    assert found["label"] is label
    found["distance_map"].zero_()
    found["distance_map"].meta["deep"]["list"].append(2)
    assert torch.equal(label.as_tensor(), values)
    assert label.meta.keys() == meta.keys()
    assert label.meta["deep"] == {"list": [1]}


def test_meta_data_are_kept():
    item = Orientationd("label", axcodes="PSL", labels=None)({"label": loaded(filename_or_obj="a.nii.gz")})
    label = item["label"]
    assert label.applied_operations
    found = SignedDistanceMapd(num_classes=3)(item)["distance_map"]
    assert found.meta["filename_or_obj"] == "a.nii.gz"
    assert torch.equal(found.affine, label.affine)
    assert str(found.applied_operations) == str(label.applied_operations)
    found.applied_operations.clear()
    assert label.applied_operations


# Storage


def test_float16(exact):
    label = loaded()
    for clip_mm in (None, 0.7):
        options = {"num_classes": 3, "measure": Euclidean(clip_mm=clip_mm)}
        item = SignedDistanceMapd(storage="float16", **options)({"label": label})
        assert item["distance_map"].dtype == torch.float16
        decoded = DecodeDistanceMapd()(item)["distance_map"]
        assert decoded.dtype == torch.float32
        expected = exact(label, clip_mm=clip_mm)
        assert (abs(plain(decoded) - expected) <= abs(expected) / 2048 + 1e-6).all()
        assert (plain(decoded) != plain(SignedDistanceMapd(**options)({"label": label})["distance_map"])).any()


@pytest.mark.parametrize("clip_mm", [4.0, 0.7])
def test_int8(clip_mm, exact):
    label = loaded()
    item = SignedDistanceMapd(num_classes=3, storage="int8", measure=Euclidean(clip_mm=clip_mm))({"label": label})
    stored = item["distance_map"]
    assert stored.dtype == torch.int8
    decoded = DecodeDistanceMapd()(item)["distance_map"]
    assert decoded.dtype == torch.float32
    expected = exact(label, clip_mm=clip_mm)
    assert abs(plain(decoded) - expected).max() <= clip_mm / 254 * 1.0001
    assert decoded.abs().max() == pytest.approx(clip_mm)
    assert bool(((plain(decoded) < 0) == (expected < 0)).all())
    assert item["distance_map"] is stored  # the item is left as it was
    again = DecodeDistanceMapd()({"distance_map": decoded})["distance_map"]
    assert torch.equal(again, decoded)


@pytest.mark.parametrize("storage", STORAGES)
def test_stored_values_are_made_class_by_class(storage, monkeypatch):
    """Never all of them in float32; the values are the same."""
    sizes, distances = [], SignedDistanceMapd._distances
    monkeypatch.setattr(
        SignedDistanceMapd,
        "_distances",
        lambda *given: (sizes.append(len(part)) or part for part in distances(*given)),
    )
    label = blobs(SHAPE)
    masks = torch.cat([label == n for n in range(3)]).float()
    for given, options in itertools.product((label, masks), ({}, {"slice_axis": 1, "convention": "voxel"})):
        make = SignedDistanceMapd(num_classes=3, storage=storage, measure=Euclidean(clip_mm=3.0, **options))
        found = make({"label": loaded(given)})["distance_map"].as_tensor()
        whole = signed_distance_map(label[0], 3, SPACING, clip_mm=3.0, **options)
        expected = {"float32": whole, "float16": whole.half(), "int8": (whole * (127 / 3)).round().char()}[storage]
        assert found.dtype == expected.dtype
        assert (found.float() - expected.float()).abs().max() <= (1 if storage == "int8" else 0)  # a tie, at most
        assert (found == expected).float().mean() > 0.99
        assert sizes == ([3] if storage == "float32" and given is label else [1, 1, 1])
        sizes.clear()


def test_plain_tensors_cannot_be_int8():
    label = loaded()
    make = SignedDistanceMapd(num_classes=3, storage="int8", measure=Euclidean(clip_mm=2.0), spacing_mm=SPACING)
    with pytest.raises(
        ValueError, match=r'^label: expected a MetaTensor for storage "int8", whose step its meta data keep'
    ):
        make({"label": label.as_tensor()})
    stored = make({"label": label})["distance_map"]
    with pytest.raises(ValueError, match=r'distance_map: expected a distance map with its meta data, .*"float16"'):
        DecodeDistanceMapd()({"distance_map": stored.as_tensor()})
    passed = DecodeDistanceMapd()({"distance_map": stored.as_tensor().half()})["distance_map"]
    assert passed.dtype == torch.float32


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_losses_take_float16_and_refuse_int8(storage):
    item = SignedDistanceMapd(num_classes=3, storage=storage, measure=Euclidean(clip_mm=4.0))({"label": loaded()})
    logits, batch = torch.randn(1, 3, *SHAPE), list_data_collate([item])
    target = {key: batch[key] for key in ("label", "distance_map", "spacing_mm")}
    decoded = DecodeDistanceMapd()(item)["distance_map"][None]
    for loss in (BoundaryLoss(softmax=True), HausdorffLoss(softmax=True), DistanceWeightedCrossEntropyLoss()):
        takes_map = isinstance(loss, BoundaryLoss)
        if storage == "int8":
            with pytest.raises(ValueError, match=r"int8.* DecodeDistanceMapd"):
                loss(logits, target["distance_map"] if takes_map else target)
        else:
            expected = loss(logits, decoded if takes_map else target | {"distance_map": decoded})
            torch.testing.assert_close(loss(logits, target["distance_map"] if takes_map else target), expected)


@pytest.mark.parametrize("storage", STORAGES)
def test_decoding_without_meta_data(storage):
    item = SignedDistanceMapd(num_classes=3, measure=Euclidean(clip_mm=9.0), storage=storage)({"label": loaded()})
    kept = DecodeDistanceMapd()(item)["distance_map"]
    bare = DecodeDistanceMapd(track_meta=False)(item)["distance_map"]
    assert isinstance(kept, MetaTensor) and not isinstance(bare, MetaTensor)
    assert bare.dtype == torch.float32
    torch.testing.assert_close(bare, kept.as_tensor())
    half = DecodeDistanceMapd(track_meta=False, keep_half=True)(item)["distance_map"]
    assert half.dtype == (torch.float16 if storage == "float16" else torch.float32)
    torch.testing.assert_close(half.float(), bare)


def test_decoding_refuses_a_resampled_map():
    item = SignedDistanceMapd(num_classes=3)({"label": loaded()})
    zoomed = Zoomd("distance_map", zoom=1.5, keep_size=False)(item)
    with pytest.raises(ValueError, match=r"distance_map: .* was resampled"):
        DecodeDistanceMapd(track_meta=False)(zoomed)


# What may follow

MOVES = {
    "crop": [RandSpatialCropd([*BOTH, "place"], roi_size=(4, 3, 3), random_size=False)],
    "flip": [RandFlipd([*BOTH, "place"], prob=1.0, spatial_axis=1)],
    "quarter turn": [RandRotate90d([*BOTH, "place"], prob=1.0, spatial_axes=(0, 2))],
    "padding": [SpatialPadd([*BOTH, "place"], spatial_size=(9, 9, 9))],
    "orientation": [Orientationd([*BOTH, "place"], axcodes="PSL", labels=None)],
    "axes": [Transposed([*BOTH, "place"], indices=(0, 3, 1, 2))],
}
MOVES["all"] = [MOVES[name][0] for name in ("orientation", "quarter turn", "padding", "crop", "flip")]


@pytest.mark.parametrize("moves", MOVES.values(), ids=MOVES)
def test_a_moved_map_is_the_map_of_the_whole_volume_moved(moves):
    """Every voxel takes its number along: where it ends, its distance is; padding is 0."""
    label = loaded(affine=affine_of(OBLIQUE))
    place = MetaTensor(torch.arange(1.0, 1 + label.numel()).view(1, *SHAPE), affine=label.affine)
    for storage, lazy in (("float32", False), ("float16", True), ("int8", False)):
        make = SignedDistanceMapd(num_classes=3, storage=storage, measure=Euclidean(clip_mm=3.0))
        whole = plain(DecodeDistanceMapd()(make({"label": label}))["distance_map"]).reshape(3, -1)
        chain = Compose([make, *moves, DecodeDistanceMapd()], lazy=lazy).set_random_state(5)
        item = chain({"label": label, "place": place})
        places = plain(item["place"]).astype(int)[0]
        assert places.shape != SHAPE or (places != plain(place)[0]).any()
        expected = np.concatenate([np.zeros((3, 1)), whole], axis=1)[:, places]
        np.testing.assert_allclose(plain(item["distance_map"]), expected, rtol=1e-6, atol=1e-6)
        # The spacing goes along too.
        for key in ("label", "distance_map"):
            np.testing.assert_allclose(item["spacing_mm"], item[key].affine[:3, :3].norm(dim=0), rtol=1e-5)
        assert item["spacing_mm"].dtype == torch.float32 and type(item["spacing_mm"]) is torch.Tensor


TURNS = {  # the old axis that each new one was
    "quarter turn": (RandRotate90d(BOTH, prob=1.0, max_k=1, spatial_axes=(0, 2)), [2, 1, 0]),
    "orientation": (Orientationd(BOTH, axcodes="PSL", labels=None), [1, 2, 0]),
    "flip": (Flipd(BOTH, (0, 2)), [0, 1, 2]),
    "crop": (CenterSpatialCropd(BOTH, (3, 3, 3)), [0, 1, 2]),
}
_STALE = pytest.mark.xfail(strict=True, reason="MONAI's Transposed does not change the affine")
TURN_ROWS = [pytest.param(*row, id=name) for name, row in TURNS.items()]
TURN_ROWS.append(pytest.param(Transposed(BOTH, indices=(0, 3, 1, 2)), [2, 0, 1], id="axes", marks=_STALE))
turns = pytest.mark.parametrize(("turn", "order"), TURN_ROWS)


@turns
def test_decoding_brings_the_spacing_up_to_date(turn, order):
    """Also one that was given by hand, whatever the affine says."""
    for given, track_meta in itertools.product((None, (3.0, 0.5, 1.25)), (False, True)):
        make = SignedDistanceMapd("label", spacing_key="steps", num_classes=3, spacing_mm=given)
        item = turn(make({"label": loaded(), "spacing_mm": 7}))
        before = np.array(SPACING if given is None else given)
        np.testing.assert_allclose(item["steps"], before, rtol=1e-6)
        decode = DecodeDistanceMapd(spacing_key="steps", track_meta=track_meta)
        for _ in range(2 if track_meta else 1):  # twice is as good as once
            found = decode(item)
            np.testing.assert_allclose(found["steps"], before[order], rtol=1e-6)
            np.testing.assert_allclose(item["steps"], before, rtol=1e-6)
            assert found["spacing_mm"] == 7
            item = item | {"distance_map": found["distance_map"]}
        assert "steps" not in decode({key: value for key, value in item.items() if key != "steps"})


def test_decoding_2d_images():
    for affine in (np.diag([*SPACING[:2], 1.0]), affine_of(OBLIQUE, SPACING[:2])):
        item = SignedDistanceMapd(num_classes=3)({"label": loaded(blobs(SHAPE[:2]), affine)})
        turned = RandRotate90d(BOTH, prob=1.0, max_k=1)(item)
        assert turned["label"].shape == (1, *SHAPE[1::-1])
        np.testing.assert_allclose(DecodeDistanceMapd()(turned)["spacing_mm"], SPACING[1::-1], rtol=1e-6)


def test_decoding_leaves_other_spacings():
    """Of maps without meta data, or with a header that tells no axes."""
    for label in (loaded().as_tensor(), loaded(affine=spoiled(1, 1, 0.0))):
        item = DecodeDistanceMapd()(SignedDistanceMapd(num_classes=3, spacing_mm=SPACING)({"label": label}))
        np.testing.assert_allclose(item["spacing_mm"], SPACING, rtol=1e-6)


@turns
def test_the_hausdorff_loss_knows_the_spacing_of_a_turned_map(turn, order):
    """By the map's meta data, or by the number beside it once it is decoded and bare."""
    made = turn(SignedDistanceMapd(num_classes=3)({"label": loaded()}))
    for item in (made, DecodeDistanceMapd(track_meta=False)(made)):
        batch = list_data_collate([item, item])
        logits = torch.randn(2, 3, *batch["label"].shape[2:], generator=torch.Generator().manual_seed(3))
        maps = torch.as_tensor(plain(batch["distance_map"]))
        right = {"label": batch["label"], "distance_map": maps, "spacing_mm": torch.tensor(SPACING)[order]}
        target = {key: batch[key] for key in ("label", "distance_map", "spacing_mm")}
        loss = HausdorffLoss(softmax=True)
        torch.testing.assert_close(loss(logits, target), loss(logits, right), rtol=1e-5, atol=0)
        wrong = loss(logits, right | {"spacing_mm": torch.tensor(SPACING)})
        assert torch.isclose(wrong, loss(logits, right)) == (order == [0, 1, 2])


@pytest.mark.parametrize("name", ["quarter turn", "orientation"])
def test_the_map_may_also_be_made_after_a_move(name):
    """Distances do not depend on how the volume is stored."""
    make = SignedDistanceMapd(num_classes=3)
    label = loaded(affine=affine_of(AXES["oblique and permuted"]))
    item = {"label": label, "place": loaded(label.as_tensor(), label.affine)}
    before = Compose([make, *MOVES[name]]).set_random_state(5)(item)
    moves = [pickle.loads(pickle.dumps(move)) for move in MOVES[name]]
    for move in moves:
        move.allow_missing_keys = True
    after = Compose([*moves, make]).set_random_state(5)(item)
    assert torch.equal(before["label"].as_tensor(), after["label"].as_tensor())
    np.testing.assert_allclose(plain(before["distance_map"]), plain(after["distance_map"]), rtol=1e-5, atol=1e-5)


def test_a_crop_before_the_map_is_another_thing():
    label = loaded()
    make, crop = SignedDistanceMapd(num_classes=3), CenterSpatialCropd(BOTH, (3, 3, 3), allow_missing_keys=True)
    before, after = (Compose(chain)({"label": label}) for chain in ([make, crop], [crop, make]))
    assert torch.equal(before["label"].as_tensor(), after["label"].as_tensor())
    assert bool((plain(before["distance_map"]) != plain(after["distance_map"])).any())


ALLOWED = {
    "crop": CenterSpatialCropd(BOTH, (5, 3, 4)),
    "random crop": RandSpatialCropd(BOTH, (5, 3, 4), random_size=False),
    "crop to classes": RandCropByPosNegLabeld(BOTH, "label", (4, 4, 4), num_samples=1),
    "crop to the object": CropForegroundd(BOTH, "label", select_fn=lambda label: label == 1, allow_smaller=True),
    "padding": DivisiblePadd(BOTH, 8),
    "crop or padding": ResizeWithPadOrCropd(BOTH, (9, 3, 5)),
    "flip": Flipd(BOTH, 0),
    "random flip": RandAxisFlipd(BOTH, prob=1.0),
    "quarter turn": RandRotate90d(BOTH, prob=1.0),
    "orientation": Orientationd(BOTH, axcodes="IPR", labels=None),
    "the spacing that is there": Spacingd(BOTH, pixdim=(-1, -1, -1), mode=MODES),
    "a random turn that does not come": RandAffined(BOTH, prob=0.0, rotate_range=0.5, mode=MODES),
    "type": EnsureTyped(BOTH),
}
REFUSED = {
    "Spacingd": Spacingd(BOTH, pixdim=(1, 1, 1), mode=MODES),
    "Zoomd": Zoomd(BOTH, zoom=1.3, mode=MODES),
    "Zoomd, other size": Zoomd(BOTH, zoom=0.8, mode=MODES, keep_size=False),
    "RandZoomd": RandZoomd(BOTH, prob=1.0, min_zoom=1.2, max_zoom=1.4, mode=MODES),
    "Resized": Resized(BOTH, spatial_size=(14, 6, 5), mode=["nearest", "trilinear"]),
    "Rotated": Rotated(BOTH, angle=(0.2, 0, 0), mode=MODES),
    "RandRotated": RandRotated(BOTH, prob=1.0, range_x=(0.3, 0.5), mode=MODES),
    "RandAffined, turned": RandAffined(BOTH, prob=1.0, rotate_range=((0.1, 0.2),) * 3, mode=MODES),
    "RandAffined, scaled": RandAffined(BOTH, prob=1.0, scale_range=((0.1, 0.2),) * 3, mode=MODES),
    "RandAffined, sheared": RandAffined(BOTH, prob=1.0, shear_range=((0.1, 0.2),) * 3, mode=MODES),
}
MADE_OF = {"diagonal": np.eye(3), "oblique": OBLIQUE}


def losses_of(item):
    """Each loss that takes a map, with its target in a batch of two, as functions of no argument."""
    batch = list_data_collate([item, item])
    assert isinstance(batch["distance_map"], MetaTensor)
    logits = torch.randn(2, *batch["distance_map"].shape[1:])
    target = {key: batch[key] for key in ("label", "distance_map", "spacing_mm")}
    target["label"] = target["label"].round()  # some lazy chains of MONAI interpolate labels whatever their mode
    losses = {
        "boundary": BoundaryLoss(softmax=True),
        "hausdorff": HausdorffLoss(softmax=True),
        "ce": DistanceWeightedCrossEntropyLoss(),
    }
    losses["combined"] = CombinedLoss(dict(losses))
    return {name: partial(loss, logits, target) for name, loss in losses.items()}


def passed(chain, lazy, axes):
    item = Compose([SignedDistanceMapd(num_classes=3), *chain], lazy=lazy)({"label": loaded(affine=affine_of(axes))})
    return item[0] if isinstance(item, list) else item


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("transform", ALLOWED.values(), ids=ALLOWED)
def test_losses_take_maps_that_were_only_moved(transform, lazy):
    for axes in MADE_OF.values():
        for loss in losses_of(passed([transform], lazy, axes)).values():
            assert bool(torch.isfinite(loss()))


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("transform", REFUSED.values(), ids=REFUSED)
def test_losses_refuse_maps_that_were_resampled(transform, lazy):
    for axes in MADE_OF.values():
        item = passed([transform, CenterSpatialCropd(BOTH, (4, 4, 4))], lazy, axes)
        for loss in losses_of(item).values():
            with pytest.raises(ValueError, match=r"^distance_map: this distance map was resampled .* after"):
                loss()


def test_one_bad_map_of_a_batch_is_enough():
    good, bad = (passed(chain, False, np.eye(3)) for chain in ([], [REFUSED["Zoomd"]]))
    maps = list_data_collate([good, bad])["distance_map"]
    logits = torch.rand(2, 3, *SHAPE)
    assert bool(torch.isfinite(BoundaryLoss()(logits[:1], maps[:1])))
    for batch in (maps, maps[1:], maps[1][None]):
        with pytest.raises(ValueError, match="was resampled"):
            BoundaryLoss()(logits[: len(batch)], batch)


def test_maps_of_2d_images_may_be_moved():
    """Also with an affine of the plane, (3, 3), whose last column is a shift."""
    moves = CenterSpatialCropd(BOTH, (4, 3)), Flipd(BOTH, 0), SpatialPadd(BOTH, (9, 8))
    affines = np.diag([*SPACING[:2], 1.0]), affine_of(OBLIQUE, SPACING[:2])
    for move, affine in itertools.product(moves, affines):
        item = move(SignedDistanceMapd(num_classes=3)({"label": loaded(blobs(SHAPE[:2]), affine)}))
        maps = list_data_collate([item, item])["distance_map"]
        assert bool(torch.isfinite(BoundaryLoss()(torch.rand(maps.shape), maps)))
        zoomed = Zoomd(BOTH, zoom=1.3, mode=MODES)(item)["distance_map"][None]
        with pytest.raises(ValueError, match="was resampled"):
            BoundaryLoss()(torch.rand(zoomed.shape), zoomed)


# Caches and workers


def shifted(cropped=True, clip_mm=None, **options):
    """A chain whose random part has no influence on the values; items with another label each."""
    labels = [blobs(SHAPE, seed=seed) for seed in range(4)]
    items = [{"label": loaded(label, filename_or_obj=f"{n}.nii.gz"), "n": n} for n, label in enumerate(labels)]
    moves = [RandSpatialCropd(BOTH, (4, 4, 4), random_size=False)] if cropped else []
    return items, Compose(
        [SignedDistanceMapd(num_classes=3, measure=Euclidean(clip_mm=clip_mm), **options), *moves, DecodeDistanceMapd()]
    )


@pytest.mark.parametrize("storage", ["float32", "int8"])
@pytest.mark.parametrize("kind", ["cache", "persistent", "persistent with meta data"])
def test_cached_maps_are_the_same(kind, storage, tmp_path, monkeypatch, exact):
    items, chain = shifted(cropped=False, storage=storage, clip_mm=2.0)
    # Without a random transform all of the chain would be cached: the decoding is to be done at every access.
    chain = Compose([*chain.transforms[:-1], RandFlipd(BOTH, prob=0.0), chain.transforms[-1]])
    calls = []
    make = SignedDistanceMapd._map
    monkeypatch.setattr(SignedDistanceMapd, "_map", lambda *given: calls.append(1) or make(*given))
    if kind == "cache":
        dataset = CacheDataset(items, chain, progress=False, num_workers=1)
    else:
        dataset = PersistentDataset(items, chain, tmp_path, track_meta="with" in kind)
    if kind == "persistent" and storage == "int8":
        assert dataset[0]["distance_map"].dtype == torch.float32  # it is not read from the file yet
        with pytest.raises(RuntimeError) as caught:  # MONAI drops the meta data, and with them the step
            dataset[0]
        assert "expected a distance map with its meta data" in str(caught.value.__cause__)
        return
    step = {"float32": 0.0, "float16": 2.0 / 2048, "int8": 2.0 / 254}[storage]
    for _ in range(2):
        for n, item in enumerate(dataset):
            expected = exact(items[n]["label"], clip_mm=2.0)
            np.testing.assert_allclose(plain(item["distance_map"]), expected, rtol=1e-5, atol=1.0001 * step + 1e-5)
            assert item["distance_map"].dtype == torch.float32
    assert len(calls) == len(items)
    if kind != "persistent":
        zoomed = Zoomd(BOTH, zoom=1.3, mode=MODES)(dataset[0])["distance_map"][None]
        with pytest.raises(ValueError, match="was resampled"):
            BoundaryLoss()(torch.rand(zoomed.shape), zoomed)


def batches(dataset, **options):
    torch.manual_seed(1)
    return list(DataLoader(dataset, batch_size=2, collate_fn=list_data_collate, **options))


def check_batches(found, items):
    numbers = torch.cat([batch["n"] for batch in found])
    assert numbers.tolist() == list(range(len(items)))
    for batch in found:
        maps, spacing = batch["distance_map"], batch["spacing_mm"]
        assert maps.shape == (2, 3, 4, 4, 4)
        np.testing.assert_allclose(spacing, [SPACING] * 2, rtol=1e-6)
        assert bool(torch.isfinite(BoundaryLoss()(torch.rand(maps.shape), maps)))
        inside = maps.gather(1, batch["label"].long())
        assert bool((inside < 0).all())  # every voxel lies inside its own class


def test_workers():
    items, chain = shifted(storage="float16")
    found = batches(CacheDataset(items, chain, progress=False, num_workers=1), num_workers=2)
    check_batches(found, items)


def test_transforms_can_be_sent_to_another_process():
    items, chain = shifted(storage="int8", clip_mm=3.0)
    again, item = pickle.loads(pickle.dumps((chain, items[0])))
    one, two = (each.set_random_state(2)(dict(given)) for each, given in ((chain, items[0]), (again, item)))
    assert torch.equal(one["distance_map"].as_tensor(), two["distance_map"].as_tensor())
    assert one["distance_map"].meta["distance_map"]["scale_mm"] == two["distance_map"].meta["distance_map"]["scale_mm"]


@pytest.mark.slow
def test_spawned_workers():
    items, chain = shifted(storage="float16")
    found = batches(
        CacheDataset(items, chain, progress=False, num_workers=1), num_workers=2, multiprocessing_context="spawn"
    )
    check_batches(found, items)


# Distances along an image


@pytest.mark.parametrize("slice_axis", [None, 2])
def test_along_an_image(slice_axis, rng):
    label, image = loaded(affine=affine_of(OBLIQUE)), rng.random((2, *SHAPE)).astype(np.float32)
    options = {"image_weight": 20.0, "clip_mm": 30.0, "slice_axis": slice_axis}
    for storage, masks in itertools.product(("float32", "float16"), (False, True)):
        make = SignedDistanceMapd(num_classes=3, measure=Geodesic(**options), classes=[2, 0], storage=storage)
        given = torch.cat([label == n for n in range(3)]) if masks else label
        found = make({"label": loaded(given, label.affine), "image": MetaTensor(torch.from_numpy(image))})
        numbers = plain(label)[0]
        expected = [signed_geodesic_distance(numbers == n, image, SPACING, **options) for n in (2, 0)]
        np.testing.assert_allclose(plain(found["distance_map"]), expected, rtol=1e-3, atol=1e-5)
        straight = signed_distance_map(numbers, 3, SPACING, slice_axis=slice_axis, classes=[2, 0])
        assert (abs(plain(found["distance_map"])) >= np.minimum(abs(straight), 30) - 2e-2).all()
        assert abs(abs(plain(found["distance_map"])) - abs(straight)).max() > 1


def test_weak_labels_grow_along_an_image(rng):
    """Points and scribbles: the map is that of the grown label, and a loss takes it."""
    label, image = loaded(), torch.from_numpy(rng.random((1, *SHAPE))).float()
    weak = torch.where(torch.from_numpy(rng.random((1, *SHAPE)) < 0.05), label.as_tensor(), torch.tensor(-1.0))
    measure = Geodesic(image_weight=20.0, reach_mm=15.0)
    make = SignedDistanceMapd("weak_label", num_classes=3, measure=measure)
    item = make({"weak_label": loaded(weak), "image": image})
    grown = grow_label(weak[0], image, 3, SPACING, image_weight=20.0, reach_mm=15.0)
    whole = SignedDistanceMapd(num_classes=3, measure=measure)({"label": loaded(grown[None]), "image": image})
    assert torch.equal(item["distance_map"].as_tensor(), whole["distance_map"].as_tensor())
    assert ((item["distance_map"].as_tensor() < 0) == torch.stack([grown == n for n in range(3)])).all()
    assert BoundaryLoss(softmax=True)(torch.randn(1, 3, *SHAPE), item["distance_map"][None]).isfinite()


def test_along_an_image_refusals():
    make = SignedDistanceMapd(num_classes=3, measure=Geodesic(image_weight=1.0))
    image = torch.rand(1, *SHAPE)
    for label, given, words in (
        (loaded(), image[..., 1:], r"^label: image: expected the shape of the label"),
        (loaded(blobs(SHAPE) + 1), image, r"^label: seeds: expected class numbers 0 to 2"),
        (loaded(filename_or_obj="/data/a.nii"), image / 0, r"^a\.nii: image: expected finite values"),
    ):
        with pytest.raises(ValueError, match=words):
            make({"label": label, "image": given})
    with pytest.raises(KeyError, match="image"):
        make({"label": loaded()})


# Refusals


def spoiled(row, column, value):
    affine = affine_of(np.eye(3))
    affine[row, column] = value
    return affine


def nan_label():
    label = blobs(SHAPE)
    label[0, 0, 0, 0] = torch.nan
    return label


@pytest.mark.parametrize(
    ("label", "options", "words"),
    [
        (loaded(blobs(SHAPE) + 0.5), {}, r"label: expected whole class numbers 0\.\.2, got .*nearest"),
        (loaded(255 * (blobs(SHAPE) > 0).byte()), {}, r"label: expected whole class numbers 0\.\.2, got .*255"),
        (loaded(nan_label()), {}, r"label: expected whole class numbers 0\.\.2, got .*nan"),
        (loaded(affine=spoiled(1, 1, 0.0)), {}, r"expected an affine with 3 independent axes .*spacing_mm"),
        (
            loaded(affine=spoiled(0, 1, np.nan)),
            {},
            r"affine with 3 independent axes of finite length, got \[\[1\.0, nan",
        ),
        (loaded(affine=affine_of(np.eye(3)[:, [0, 0, 1]])), {}, r"affine with 3 independent axes.*repair the header"),
        (blobs(SHAPE), {}, r"^label: expected a MetaTensor, whose affine tells the spacing, got Tensor; load it with"),
        (blobs(SHAPE).numpy(), {}, r"expected a MetaTensor, whose affine tells the spacing, got ndarray"),
        (loaded(blobs(SHAPE[:2])), {"measure": Euclidean(slice_axis=1)}, r"slice_axis: expected None"),
        (loaded(blobs(SHAPE).expand(2, -1, -1, -1)), {}, r"or 3 masks \(3, \*S\), one .*got shape \(2, 7, 6, 5\)"),
        (loaded(blobs(SHAPE).expand(3, -1, -1, -1)), {}, r"mask: expected zeros and ones, got .*threshold"),
        (loaded(blobs(SHAPE)[0]), {}, r"expected a label map \(1, \*S\) of class numbers, .*got shape \(7, 6, 5\)"),
        (loaded(), {"spacing_mm": (1.0, 1.0)}, r"spacing_mm: expected 3 positive finite values, one per axis"),
    ],
)
def test_bad_labels(label, options, words):
    if isinstance(label, MetaTensor):
        label.meta["filename_or_obj"] = "/data/a.nii"
        words = rf"^a\.nii: .*{words}"
    with pytest.raises(ValueError, match=words):
        SignedDistanceMapd(num_classes=3, **options)({"label": label})


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"keys": ["label", "other"]}, ValueError, r"keys: expected one key, got \['label', 'other'\]"),
        ({"num_classes": 0}, ValueError, "num_classes: expected an integer >= 1, got 0"),
        ({"num_classes": 2.5}, ValueError, "num_classes: expected an integer"),
        ({"classes": []}, ValueError, r"classes: expected class numbers 0\.\.2, got \[\]"),
        ({"classes": [3]}, ValueError, r"classes: expected class numbers 0\.\.2, got \[3\]"),
        ({"classes": [1.0]}, ValueError, r"classes: expected class numbers 0\.\.2, got \[1\.0\]"),
        ({"measure": "voxel"}, TypeError, r"measure: expected Euclidean\(...\) or Geodesic\(...\), got str"),
        ({"storage": "uint8"}, ValueError, "storage: expected one of float32, float16, int8, got 'uint8'"),
        ({"storage": "int8"}, ValueError, "clip_mm: expected a largest distance .*int8"),
        ({"spacing_mm": (1.0, np.nan, 1.0)}, ValueError, r"spacing_mm: expected 3 positive finite values, .*nan"),
    ],
)
def test_bad_arguments(options, error, words):
    with pytest.raises(error, match=words):
        SignedDistanceMapd(**{"num_classes": 3} | options)


@pytest.mark.parametrize("axes", [np.eye(3), OBLIQUE], ids=["diagonal", "oblique"])
def test_sheared_affines(axes, exact):
    """Steps along axes that are not perpendicular are no distances; a spacing by hand settles it."""
    for cosine in (0.02, -0.02, 0.6):
        label = loaded(affine=affine_of(axes @ sheared(cosine)))
        words = r"^label: expected an affine with perpendicular axes, got \[\[.* resample .*or give spacing_mm"
        with pytest.raises(ValueError, match=words):
            SignedDistanceMapd(num_classes=3)({"label": label})
        item = SignedDistanceMapd(num_classes=3, spacing_mm=SPACING)({"label": label})
        np.testing.assert_allclose(plain(item["distance_map"]), exact(label), rtol=1e-5, atol=1e-5)
    item = SignedDistanceMapd(num_classes=3)({"label": loaded(affine=affine_of(axes @ sheared(0.009)))})
    np.testing.assert_allclose(item["spacing_mm"], SPACING, rtol=1e-5)


def test_a_spacing_beside_a_broken_header(exact):
    """The message above says to give one: the losses then have nothing to compare, and take the map."""
    for value in (0.0, np.nan):
        item = SignedDistanceMapd(num_classes=3, spacing_mm=SPACING)({"label": loaded(affine=spoiled(1, 1, value))})
        np.testing.assert_allclose(plain(item["distance_map"]), exact(item["label"]), rtol=1e-5, atol=1e-5)
        maps = list_data_collate([item, item])["distance_map"]
        assert bool(torch.isfinite(BoundaryLoss()(torch.rand(maps.shape), maps)))


# A real volume


def test_an_anisotropic_volume(data_root):
    """Spinal cord, 0.5 x 0.5 x 7.5 mm: the grey matter is thin in plane."""
    planes = Euclidean(convention="voxel", slice_axis=2)
    path = data_root / "spinal_cord" / "t2s_uncropped_gmseg_manual.nii.gz"
    chain = Compose(
        [
            LoadImaged("label"),
            EnsureChannelFirstd("label"),
            Orientationd("label", axcodes="RAS", labels=None),
            SignedDistanceMapd(num_classes=2),
            SignedDistanceMapd(map_key="planes", num_classes=2, measure=planes),
            SelectItemsd(["label", "distance_map", "planes", "spacing_mm"]),
            Lambdad(["label", "distance_map", "planes"], lambda volume: volume[:, 100:220, 100:220]),
        ]
    )
    item = chain({"label": str(path)})
    zooms = nib.as_closest_canonical(nib.load(path)).header.get_zooms()
    np.testing.assert_allclose(item["spacing_mm"], zooms, rtol=1e-4)
    assert zooms[2] / zooms[0] > 10
    label, found = plain(item["label"])[0] == 1, plain(item["distance_map"])
    assert 0 < label.sum() < label.size
    assert ((found[1] < 0) == label).all()
    np.testing.assert_allclose(found[0], -found[1], atol=1e-5)  # one class: the background's map is minus its own
    assert abs(found).min() == pytest.approx(zooms[0] / 2, rel=1e-3)
    for plane in range(label.shape[2]):
        mask, planes = label[..., plane], plain(item["planes"])[1, ..., plane]
        if not mask.any():
            assert (planes == 0).all()
            continue
        signed = [ndimage.distance_transform_edt(side, sampling=zooms[:2]) for side in (~mask, mask)]
        np.testing.assert_allclose(planes, signed[0] - signed[1], rtol=1e-4, atol=1e-4)
        # Other slices are far: a voxel's nearest boundary is at most as far as that in its own plane.
        assert (abs(found[1, ..., plane]) <= abs(planes)).all()
