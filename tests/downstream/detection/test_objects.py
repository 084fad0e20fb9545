"""Objects of labels and of masks; what is odd about them; what of them a view shows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from object_images import NAMES, object_folder, scene
from PIL import Image
from scipy import ndimage

from hf_dbp.data.decoding import UnreadableImageError
from hf_dbp.data.labels.shapes import Labelled, Shape
from hf_dbp.downstream.detection import objects as kinds
from hf_dbp.downstream.detection.data import ObjectImages, ObjectSource, load_objects
from hf_dbp.downstream.detection.objects import Objects, Oddities, labelled_objects, mask_objects
from hf_dbp.downstream.detection.runs import packed
from hf_dbp.downstream.detection.views import TrainingViews, WholeImages, image_processor, targets
from hf_dbp.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return object_folder(tmp_path_factory.mktemp("objects"), count=4)


def loaded(folder: Path, labels: str, cache: Path, **options: Any) -> tuple[ObjectImages, ObjectImages]:
    source = ObjectSource(
        train_dir=str(folder / "images"), train_mask_dir=str(folder / labels), cache_dir=str(cache), **options
    )
    return load_objects(source)


@pytest.mark.parametrize("labels", ["labels.json", "yolo", "labelme", "masks"])
@pytest.mark.parametrize("instances", [False, True])
def test_labels_of_every_form_and_masks_give_the_same_objects(
    labels: str, instances: bool, folder: Path, tmp_path: Path
) -> None:
    if labels == "yolo" and instances:
        with pytest.raises(
            UserError, match=r"train/0: line 1 is a box without a segmentation; .* leave out --instances"
        ):
            loaded(folder, labels, tmp_path, instances=True)
        return
    named = {"id2label": str(folder / "names.json")} if labels == "masks" else {}
    train, validation = loaded(folder, labels, tmp_path, instances=instances, **named)
    assert train.names == list(NAMES) and (len(train), len(validation)) == (4, 3)
    for data, shift in ((train, 0), (validation, 100)):
        for number, found in enumerate(data.objects):
            image, boxes = scene(number + shift)
            assert found is not None and found.size == image.shape[:2]
            assert np.array_equal(data.images[number], image)
            order = np.argsort(found.classes_N)
            assert found.classes_N[order].tolist() == [kind for kind, _ in boxes]
            np.testing.assert_allclose(found.boxes_N4[order], [box for _, box in boxes], atol=1e-9)
            np.testing.assert_allclose(found.areas_N[order], [(r - x) * (b - t) for _, (x, t, r, b) in boxes])
            assert len(found.runs) == len(boxes) * instances
            for row, runs in zip(order, found.runs, strict=False):
                pixels = np.zeros(found.size, np.uint8)
                left, top, right, bottom = found.boxes_N4[row].round().astype(int)
                pixels[top:bottom, left:right] = 1
                assert np.array_equal(found.runs[int(row)].pixels(), pixels)
                assert runs.size == found.size


def test_classes_areas_and_splits(folder: Path, tmp_path: Path) -> None:
    train, validation = loaded(folder, "labels.json", tmp_path, classes=["stripe"])
    assert train.names == ["stripe"] and train.counts_K.tolist() == [2] and len(train) == 4
    assert train.odd.counts == {kinds.UNWANTED: 4}
    assert validation.report((32, 32))[-1] == "2 of 3 images hold no object"
    large, _ = loaded(folder, "labels.json", tmp_path, min_area=100)  # blocks have 90 pixels, stripes 120
    assert large.counts_K.tolist() == [0, 2] and large.odd.counts == {kinds.SPECKS: 4}
    named = {"id2label": str(folder / "names.json")}
    specks, _ = loaded(folder, "masks", tmp_path, min_area=100, **named)
    assert specks.counts_K.tolist() == [0, 2] and specks.odd.counts == {kinds.SPECKS: 4}
    split = {"train_dir": str(folder / "images" / "train"), "train_mask_dir": str(folder / "labelme" / "train")}
    parts = load_objects(ObjectSource(**split, cache_dir=str(tmp_path), train_val_split=0.5))
    assert [len(part) for part in parts] == [2, 2]
    given = {"validation_dir": str(folder / "images" / "validation"), "validation_mask_dir": str(folder / "labelme")}
    given["validation_mask_dir"] += "/validation"
    parts = load_objects(ObjectSource(**split, **given, cache_dir=str(tmp_path)))
    assert [len(part) for part in parts] == [4, 3]


masks = st.builds(
    lambda seed, height, width: np.random.default_rng(seed).choice(4, (height, width), p=(0.6, 0.2, 0.1, 0.1)),
    st.integers(0, 10**6),
    st.integers(1, 20),
    st.integers(1, 20),
)


@settings(deadline=None, max_examples=40)
@given(mask=masks)
def test_objects_of_a_mask_are_its_connected_parts(mask: Any) -> None:
    """Together they are the pixels of the wanted classes; each is connected and fills its box from edge to edge."""
    found = mask_objects(mask, {1: 0, 3: 1}, "mask", Oddities(), instances=True)
    painted = np.zeros_like(mask)
    for number, runs in enumerate(found.runs):
        pixels = runs.pixels() > 0
        assert ndimage.label(pixels, np.ones((3, 3)))[1] == 1
        assert not painted[pixels].any()
        painted[pixels] = (1, 3)[found.classes_N[number]]
        rows, columns = np.nonzero(pixels)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert found.boxes_N4[number].tolist() == box and found.areas_N[number] == pixels.sum()
    np.testing.assert_array_equal(painted, np.where(mask == 2, 0, mask))
    assert len(found) == sum(ndimage.label(mask == one, np.ones((3, 3)))[1] for one in (1, 3))


def test_odd_boxes_are_counted_and_named() -> None:
    boxes = {
        "empty": (4, 4, 4, 9), "inverted": (9, 4, 4, 9), "nan": (float("nan"), 0, 5, 5), "left": (-9, 2, -1, 6),
        "below": (3, 20, 6, 30), "over": (-2, 3, 5, 8), "twice": (1, 1, 6, 6), "crowd": (0, 0, 20, 10),
        "rounded": (0, 0, 20.3, 10.4), "tiny": (2, 2, 3, 4),
    }  # fmt: skip
    shapes = [Shape("a", box=box, name=name, crowd=name == "crowd") for name, box in boxes.items()]
    shapes.append(Shape("a", box=boxes["twice"], name="again"))
    shapes.append(Shape("b", box=boxes["twice"], name="another class"))
    odd = Oddities()
    found = labelled_objects(Labelled("x.png", (10, 20), shapes), {"a": 0, "b": 1}, odd)
    assert len(found) == 6 and found.crowd_N.sum() == 1
    named = {kind: [name.split(" (")[0] for name in examples] for kind, examples in odd.examples.items()}
    assert named == {
        kinds.CROWDS: ["crowd"], kinds.EMPTY: ["empty", "inverted", "nan"], kinds.OUTSIDE: ["left", "below"],
        kinds.TWICE: ["again"], kinds.BEYOND: ["over"],
    }  # fmt: skip
    assert "3 boxes without area, left out; e.g. empty (a) of x.png" in odd.lines()
    images: Any = [None]
    data = ObjectImages(images, [found], ["a", "b"], odd)
    assert data.counts_K.tolist() == [4, 1]
    assert data.tiny((10, 20)) == 1 and data.tiny((100, 200)) == 0
    seen = targets(found, (0.0, 0.0, 20.0, 10.0), (10, 20))
    assert len(seen["class_labels"]) == 5  # without the crowd
    corners = seen["boxes"][:, :2] - seen["boxes"][:, 2:] / 2
    assert corners.min() >= 0 and (seen["boxes"][:, :2] + seen["boxes"][:, 2:] / 2).max() <= 1


objects = st.builds(
    lambda seed, count: np.random.default_rng(seed).integers(0, 30, (count, 4)),
    st.integers(0, 10**6),
    st.integers(1, 6),
)


@settings(deadline=None, max_examples=60)
@given(corners=objects, seed=st.integers(0, 1000), flip=st.booleans())
def test_a_view_shows_boxes_and_masks_at_the_same_place(corners: Any, seed: int, flip: bool) -> None:
    """A filled box stays a filled box: the extent of its mask in the view is that of its box, up to a pixel."""
    boxes = np.stack([corners[:, 0], corners[:, 1], corners[:, 0] + 5 + corners[:, 2], corners[:, 1] + 6], axis=1)
    size, view = (40, 70), (32, 48)
    drawn = []
    for left, top, right, bottom in boxes:
        pixels = np.zeros(size, np.uint8)
        pixels[top:bottom, left:right] = 1
        drawn.append(packed(pixels))
    areas = np.array([one.area for one in drawn], np.float64)
    count = len(boxes)
    whole = Objects(size, boxes.astype(float), np.arange(count), areas, np.zeros(count, bool), drawn)
    rng = np.random.default_rng(seed)
    left, top = (float(rng.integers(0, 20)) for _ in range(2))
    box = (left, top, left + float(rng.integers(20, 50)), top + float(rng.integers(10, 20)))
    seen = targets(whole, box, view, flip=flip)
    for centre, label, mask in zip(seen["boxes"], seen["class_labels"], seen["masks"], strict=True):
        rows, columns = torch.nonzero(mask, as_tuple=True)
        if not len(rows):  # thinner than half a pixel of the view
            assert min(centre[2] * view[1], centre[3] * view[0]) < 1
            continue
        x0, y0 = (centre[:2] - centre[2:] / 2).tolist()
        x1, y1 = (centre[:2] + centre[2:] / 2).tolist()
        extent = [
            columns.min() / view[1],
            rows.min() / view[0],
            (columns.max() + 1) / view[1],
            (rows.max() + 1) / view[0],
        ]
        assert np.abs(np.array(extent) - [x0, y0, x1, y1]).max() <= 1 / min(view)
        assert whole.classes_N[int(label)] == int(label)
    inside = boxes.clip([box[0], box[1]] * 2, [box[2], box[3]] * 2)
    share = (inside[:, 2:] - inside[:, :2]).prod(axis=1) / (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    assert set(seen["class_labels"].tolist()) >= set(np.flatnonzero(share > 0.11).tolist())
    assert set(seen["class_labels"].tolist()) <= set(np.flatnonzero(share > 0).tolist())


def test_a_flipped_view_is_the_mirrored_view() -> None:
    image, boxes = scene(1)
    corners = np.array([box for _, box in boxes], float)
    classes = np.array([kind for kind, _ in boxes])
    whole = Objects(image.shape[:2], corners, classes, np.ones(2), np.zeros(2, bool))
    plain, flipped = (targets(whole, (0.0, 0.0, 48.0, 36.0), (32, 32), flip=flip)["boxes"] for flip in (False, True))
    torch.testing.assert_close(flipped[:, 0], 1 - plain[:, 0])
    torch.testing.assert_close(flipped[:, 1:], plain[:, 1:])


def test_views_hold_the_pixels_of_their_objects(folder: Path, tmp_path: Path) -> None:
    """In every view, flipped or not, the block is where its box is, and the view follows from seed, epoch and image."""
    train, validation = loaded(folder, "labels.json", tmp_path)
    views = TrainingViews(train, (64, 96), mean=[0.0] * 3, std=[1.0] * 3, seed=3, scale=0.6)
    flips = set()
    for epoch in range(4):
        for index in range(len(views)):
            view, again = views[epoch, index], views[epoch, index]
            assert torch.equal(view["pixel_values"], again["pixel_values"])
            assert torch.equal(view["labels"]["boxes"], again["labels"]["boxes"])
            for kind, (x, y, w, h) in zip(
                view["labels"]["class_labels"], view["labels"]["boxes"].tolist(), strict=True
            ):
                pixels = view["pixel_values"][:, int(64 * y), int(96 * x)]
                if min(w, h) > 0.1:
                    assert (pixels - (0.95 if kind == 0 else 0.6)).abs().max() < 0.05
            blocks = view["labels"]["boxes"][view["labels"]["class_labels"] == 0, 0]
            flips |= {bool(x > 0.5) for x in blocks.tolist()}
    assert flips == {False, True}
    whole = WholeImages(validation, (32, 32), [0.0] * 3, [1.0] * 3)
    item = whole[1]
    assert item is not None and item.index == 1 and item.pixels.shape == (3, 32, 32)
    processor = image_processor(whole)
    prepared = processor(Image.fromarray(scene(101)[0]), return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(prepared, item.pixels, atol=0.02, rtol=0)  # two resizings of eight bits


def test_labels_of_another_size_than_every_image_end_the_command(tmp_path: Path) -> None:
    folder = object_folder(tmp_path / "data", count=4)
    content = json.loads((folder / "labels.json").read_text())
    for image in content["images"]:
        image["width"] = 60
    (folder / "labels.json").write_text(json.dumps(content))
    (folder / "images" / "train" / "0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1\.png: its labels are for 36 x 60 pixels .* but it has 36 x 48; label it"):
        loaded(folder, "labels.json", tmp_path / "cache")


def test_images_that_labels_do_not_fit_are_skipped_and_named(tmp_path: Path, caplog: Any) -> None:
    folder = object_folder(tmp_path / "data", count=4)
    content = json.loads((folder / "labels.json").read_text())
    content["images"][1]["width"] = 60
    (folder / "labels.json").write_text(json.dumps(content))
    (folder / "images" / "train" / "2.png").write_bytes(b"no picture")
    train, _ = loaded(folder, "labels.json", tmp_path / "cache")
    views = TrainingViews(train, (32, 32), mean=[0.0] * 3, std=[1.0] * 3, seed=0)
    for index in (1, 2, 3):  # the next one that fits takes the place of the first two
        assert len(views[0, index]["labels"]["class_labels"]) == 2
    found = {Path(name).name: reason for name, reason in train.unreadable_images().items()}
    assert found["1.png"].startswith("its labels are for 36 x 60 pixels (height x width), but it has 36 x 48")
    assert found["2.png"] == "it is not a picture" and len(found) == 2
    with pytest.raises(UnreadableImageError, match="it has 36 x 48"):
        train.of(1, (36, 48))
    (folder / "masks" / "train" / "3.png").write_bytes(b"no picture")
    masked, _ = loaded(folder, "masks", tmp_path / "cache", id2label=str(folder / "names.json"))
    assert masked.objects[3] is None and WholeImages(masked, (32, 32), [0.0] * 3, [1.0] * 3)[3] is None
    assert [name for name in masked.unreadable_images() if "masks" in name]
    assert len(masked.unreadable_images()) == 1


def changed(folder: Path, **fields: Any) -> None:
    content = json.loads((folder / "labels.json").read_text())
    (folder / "labels.json").write_text(json.dumps(content | fields))


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (lambda f: changed(f, annotations=[]), {}, "the 4 training images hold no object of block, stripe"),
        (lambda f: None, {"classes": ["cube"]}, "--classes cube: there is no such class; there are block, stripe"),
        (lambda f: None, {"min_area": -1}, "--min_area is a number of pixels, got -1"),
        (lambda f: None, {"background_dir": "good"}, "--background_dir is for masks; with labels, list such images"),
        (
            lambda f: changed(
                f,
                images=[{"id": k, "file_name": "train/0.png", "height": 36, "width": 48} for k in (1, 2)],
                annotations=[],
            ),
            {},
            "lists the image 'train/0.png' more than once",
        ),
        (lambda f: changed(f, images=[], annotations=[]), {}, "none of the images in .* is labelled in"),
        (
            lambda f: changed(f, annotations=[{"id": 5, "image_id": 1, "category_id": 10}]),
            {},
            "annotation 5: it has neither a bbox nor a segmentation",
        ),
        (
            lambda f: changed(f, annotations=[{"id": 5, "image_id": 1, "category_id": 11, "bbox": [1, 1, 2, 2]}]),
            {},
            "annotation 5: its category_id 11 is not among the categories",
        ),
        (
            lambda f: changed(f, annotations=[{"id": 5, "image_id": 1, "category_id": 10, "bbox": [1, 1, 2]}]),
            {},
            "annotation 5: its bbox has 3 numbers; give left, top, width and height",
        ),
        (lambda f: (f / "labels.json").write_text("{"), {}, "as coco labels: the file is damaged or of another kind"),
        (
            lambda f: changed(f, images=[{"id": 1, "file_name": "train/77.png", "height": 36, "width": 48}]),
            {},
            "annotation 2: its image_id 2 is not among the images",
        ),
        (
            lambda f: changed(
                f, images=[{"id": 1, "file_name": "train/77.png", "height": 36, "width": 48}], annotations=[]
            ),
            {},
            "labels 'train/77.png', but no image has that name",
        ),
        (
            lambda f: changed(f, annotations=[{"id": 5, "image_id": 1, "category_id": 10, "bbox": [1, 1, 2, 2]}]),
            {"instances": True},
            "annotation 5 is a box without a segmentation; draw its outline, or leave out --instances",
        ),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_used_are_refused_by_one_line(
    spoil: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = object_folder(tmp_path / "data", count=4)
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        loaded(folder, "labels.json", tmp_path / "cache", **options)
    assert "\n" not in str(error.value)
