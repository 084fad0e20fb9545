"""Labels to masks and back: against pycocotools, and every format's round trip."""

import base64
import functools
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_dbp.data.labels.formats import coco_content, label_format, labelme_content, read_labels, unpacked
from hf_dbp.data.labels.masks import is_labels, mask_folder, named
from hf_dbp.data.labels.shapes import filled, from_runs, outlines, painted, parts, to_runs
from hf_dbp.errors import UserError

coco_masks = pytest.importorskip("pycocotools.mask")
NAMES = {0: "background", 1: "wire", 2: "pit"}
IDS = {name: number for number, name in NAMES.items()}


def drawing(seed, height=24, width=31, share=0.5):
    """Blobs and single pixels of three classes, with holes, and corners that touch."""
    rng = np.random.default_rng(seed)
    coarse = np.where(rng.random((height, width)) < share, rng.integers(1, 3, (height, width)), 0)
    if seed % 2:
        coarse = coarse[:: 1 + seed % 3, :: 1 + seed % 3].repeat(1 + seed % 3, 0).repeat(1 + seed % 3, 1)
    return coarse[:height, :width].astype(np.uint8)


masks = st.builds(
    drawing, st.integers(0, 10**6), st.integers(1, 24), st.integers(1, 31), st.sampled_from([0.1, 0.5, 0.9])
)


def size_of(name):
    raise AssertionError("the format says the size")


@settings(deadline=None, max_examples=60)
@given(mask=masks)
def test_runs_are_those_of_pycocotools(mask):
    packed = coco_masks.encode(np.asfortranarray((mask == 1).astype(np.uint8)))
    runs = to_runs(mask == 1)
    assert unpacked(packed["counts"].decode()) == runs
    np.testing.assert_array_equal(from_runs(runs, mask.shape), mask == 1)


@settings(deadline=None, max_examples=60)
@given(mask=masks)
def test_outlines_hold_the_pixels_that_they_go_around(mask):
    for part in parts(mask):
        inside = filled(part.outer, mask.shape)
        for hole in part.holes:
            inside &= ~filled(hole, mask.shape)
        np.testing.assert_array_equal(inside, part.pixels)
        polygon = coco_masks.frPyObjects([part.outer.ravel().tolist()], *mask.shape)
        np.testing.assert_array_equal(coco_masks.decode(polygon)[..., 0] > 0, filled(part.outer, mask.shape))


def test_a_pixel_belongs_if_its_centre_lies_inside():
    triangle = np.array([[1.2, 0.4], [9.7, 2.1], [3.3, 8.9]])
    rows, columns = np.mgrid[:10, :12] + 0.5
    sides = [
        (b[0] - a[0]) * (rows - a[1]) - (b[1] - a[1]) * (columns - a[0])
        for a, b in zip(triangle, np.roll(triangle, -1, axis=0), strict=True)
    ]
    np.testing.assert_array_equal(filled(triangle, (10, 12)), np.all(np.array(sides) > 0, axis=0))
    assert filled(triangle - 100, (10, 12)).sum() == 0  # outside the image
    assert len(outlines(np.ones((3, 4), bool))[0]) == 4


def coco_file(folder, mask_by_name):
    content = coco_content(((f"{name}.png", mask) for name, mask in mask_by_name.items()), NAMES)
    (folder / "labels.json").write_text(json.dumps(content))
    return folder / "labels.json"


def labelme_folder(folder, mask_by_name):
    for name, mask in mask_by_name.items():
        (folder / f"{name}.json").write_text(json.dumps(labelme_content(mask, NAMES, f"{name}.png")))
    return folder


def yolo_folder(folder, mask_by_name):
    """As YOLO documents it: a class and a normalised outline per line. Holes cannot be expressed, so none are drawn."""
    (folder / "data.yaml").write_text("names: {0: wire, 1: pit}\n")
    for name, mask in mask_by_name.items():
        height, width = mask.shape
        lines = [
            f"{part.class_id - 1} " + " ".join(str(value) for value in (part.outer / (width, height)).ravel().tolist())
            for part in parts(mask)
            if part.class_id
        ]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return folder


def cvat_file(folder, mask_by_name):
    """Polygons for parts without a hole, masks of the box for the others."""
    lines = ["<annotations><meta><labels>"]
    lines += [f"<label><name>{name}</name></label>" for name in ("wire", "pit")] + ["</labels></meta>"]
    for name, mask in mask_by_name.items():
        lines.append(f'<image name="{name}.png" width="{mask.shape[1]}" height="{mask.shape[0]}">')
        for part in parts(mask):
            if part.class_id == 0:
                continue
            if not part.holes:
                drawn = ";".join(f"{x},{y}" for x, y in part.outer.tolist())
                lines.append(f'<polygon label="{NAMES[part.class_id]}" points="{drawn}" z_order="0"/>')
                continue
            rows, columns = np.flatnonzero(part.pixels.any(1)), np.flatnonzero(part.pixels.any(0))
            box = part.pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            runs = ", ".join(map(str, to_runs(box.T)))
            lines.append(
                f'<mask label="{NAMES[part.class_id]}" rle="{runs}" left="{columns[0]}" top="{rows[0]}" '
                f'width="{box.shape[1]}" height="{box.shape[0]}" z_order="0"/>'
            )
        lines.append("</image>")
    (folder / "labels.xml").write_text("\n".join([*lines, "</annotations>"]))
    return folder / "labels.xml"


WRITERS = {"coco": coco_file, "labelme": labelme_folder, "yolo": yolo_folder, "cvat": cvat_file}


def without_holes(mask):
    """For YOLO, whose outlines have none: fill what a part encloses, larger parts first."""
    drawn = np.zeros_like(mask)
    for part in parts(mask):
        if part.class_id:
            drawn[filled(part.outer, mask.shape)] = part.class_id
    return drawn


@pytest.mark.parametrize("kind", WRITERS)
def test_round_trip_through_the_folder_that_training_reads(kind, tmp_path):
    """As finetune, inspect and predict get them: masks named like the images, classes by id, and one empty mask."""
    drawn = {f"{seed:02}": drawing(seed) for seed in range(1, 6)} | {"empty": np.zeros((9, 7), np.uint8)}
    if kind == "yolo":
        drawn = {name: without_holes(mask) for name, mask in drawn.items()}
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for name, mask in drawn.items():
        Image.fromarray(mask).save(tmp_path / "images" / f"{name}.png")
    source = WRITERS[kind](tmp_path / "labels", drawn)
    assert label_format(source) == kind and is_labels(str(source)) and not is_labels(str(tmp_path / "images"))
    folder, names = mask_folder(str(source), str(tmp_path / "images"), cache_dir=str(tmp_path / "cache"))
    order = [names.index(NAMES[k]) for k in range(3)]
    assert names[0] == "background"
    for name, mask in drawn.items():
        with Image.open(f"{folder}/{name}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), np.array(order)[mask])
    assert mask_folder(str(source), str(tmp_path / "images"), cache_dir=str(tmp_path / "cache"))[0] == folder


def test_pycocotools_reads_what_is_exported(tmp_path):
    tools = pytest.importorskip("pycocotools.coco")
    drawn = {f"{seed:02}": drawing(seed) for seed in range(1, 6)}
    read = tools.COCO(str(coco_file(tmp_path, drawn)))
    for number, mask in enumerate(drawn.values()):
        seen = np.zeros_like(mask)
        for entry in read.loadAnns(read.getAnnIds(imgIds=number)):
            pixels = read.annToMask(entry) > 0
            assert entry["area"] == pixels.sum()
            np.testing.assert_array_equal(coco_masks.toBbox(read.annToRLE(entry)), entry["bbox"])
            if not isinstance(entry["segmentation"], dict):  # a polygon without holes is all of its part
                assert (mask[pixels] == entry["category_id"]).all()
            seen[pixels] = entry["category_id"]
        np.testing.assert_array_equal(seen, mask)


def test_an_image_is_found_by_its_path_or_else_by_its_name():
    files = dict.fromkeys(("train/1", "validation/0", "validation/1", "3"), "")
    assert named("validation/1.png", files, "labels") == "validation/1"
    assert named("..\\pictures\\0.jpg", files, "labels") == "validation/0"
    assert named("3.png", files, "labels") == named("pictures/3.png", files, "labels") == "3"
    for wrong, count in (("train/0.png", "no image has"), ("1.png", "2 images have"), ("4.png", "no image has")):
        with pytest.raises(UserError, match=f"labels {wrong!r}, but {count} that name"):
            named(wrong, files, "labels")


def test_other_shapes_of_labelme(tmp_path):
    mask = io.BytesIO()
    Image.fromarray(np.array([[0, 255], [255, 255]], np.uint8)).save(mask, "PNG")
    encoded = base64.b64encode(mask.getvalue()).decode()
    shapes = [
        {"label": "wire", "points": [[2, 1], [6, 4]], "shape_type": "rectangle"},
        {"label": "pit", "points": [[15, 10], [15, 14]], "shape_type": "circle"},
        {"label": "pit", "points": [[20, 2], [22, 4]], "shape_type": "mask", "mask": encoded},
    ]  # fmt: skip
    content = {"shapes": shapes, "imagePath": "..\\images\\a.png", "imageHeight": 20, "imageWidth": 30}
    (tmp_path / "a.json").write_text(json.dumps(content))
    (image,), names = read_labels(str(tmp_path), size_of)
    ids = painted(image, {"wire": 1, "pit": 2})
    assert names == ["pit", "wire"] and image.file == "a.png"
    assert (ids == 1).sum() == 12 and (ids[1:4, 2:6] == 1).all()
    assert abs((ids[:, :20] == 2).sum() - np.pi * 16) < 4
    assert ids[2:4, 20:22].tolist() == [[0, 2], [2, 2]]


def coco(file="a.png", **annotation):
    """A COCO file of one image of 3 x 3 pixels, and of one annotation if that is given."""
    image = {"id": 1, "file_name": file, "height": 3, "width": 3}
    drawn = [{"id": 7, "image_id": 1, "category_id": 1, **annotation}] if annotation else []
    return json.dumps({"images": [image], "categories": [{"id": 1, "name": "pit"}], "annotations": drawn})


@pytest.mark.parametrize(("content", "message"), [
    ("{", r"labels.json as coco labels: the file is damaged or of another kind .*; export it again"),
    ("[]", "labels.json holds a list; a COCO file has images, annotations and categories"),
    ('{"images": [], "annotations": []}', "labels.json as coco labels: 'categories' is missing; add it, or export"),
    (coco(bbox=["abc", 0, 1, 1]), "annotation 7: could not convert string to float: 'abc'; correct it, or export"),
    (coco(bbox=[0, 0, 1]), "annotation 7: its bbox has 3 numbers; give left, top, width and height"),
    (coco(segmentation={"size": [3, 3]}), "annotation 7: 'counts' is missing"),
    (coco().replace('[{"id": 1, "file', '[{"id": 1, "file_name": "a.png", "height": 3, "width": 3}, {"id": 1, "file'),
     "image 1: several images have this id; give each its own"),
    (coco(bbox=[0, 0, 1, 1]), "annotation 7 is a box"),
    (coco("b.png"), "labels 'b.png', but no image has that name"),
    (coco(segmentation={"counts": [1, 2], "size": [3, 3]}), "json: annotation 7: run lengths add up to 3"),
    (coco(segmentation={"counts": [1, 3], "size": [2, 2]}), r"annotation 7: its runs are for \[2, 2\] pixels"),
    (coco(segmentation=[[0, 0, 2, 0, 2]]), "an outline has 5 coordinates: give an x and a y"),
    (coco(segmentation=[[0, 0, 2, 2]]), "annotation 7 of 'pit' has an outline of 2 points; draw at least three"),
    (coco(segmentation=[[0, 0, 2, 0, 2, 2]], category_id=9), "annotation 7: its category_id 9 is not among"),
    (coco(segmentation=[[0, 0, 2, 0, 2, 2]], image_id=8), "annotation 7: its image_id 8 is not among the images"),
    (coco().replace('"name": "pit"}', '"name": "pit"}, {"id": 2, "name": "pit"}'), "several categories called 'pit'"),
])  # fmt: skip
def test_mistakes_name_the_file_and_the_remedy(content, message, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("L", (3, 3)).save(tmp_path / "images" / "a.png")
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(UserError, match=message):
        mask_folder(str(tmp_path / "labels.json"), str(tmp_path / "images"), cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize(("kind", "content", "message"), [
    ("yolo", "3 0.1 0.1 0.5 0.1 0.5 0.5", r"a\.txt, line 1: class 3 has no name; name it in data.yaml or classes.txt"),
    ("yolo", "0 12 12 40 12 40 30", r"a\.txt, line 1: 40 is no share of the image's side; divide x by the width"),
    ("yolo", "0 0.1 0.1 0.5\n0 0.1 x 0.5 0.5", r"a\.txt, line 1: an outline needs a class and at least three points"),
    ("yolo", "0 0.1 x 0.5 0.5", r"a\.txt, line 1: could not convert string to float: 'x'; correct it"),
    ("labelme", [["x", 1], [2, 2]], r"a\.json: could not convert string to float: 'x'; correct it"),
    ("cvat", "<annotations><image name='a.png' width='3'/></annotations>", r"image a\.png: 'height' is missing"),
    ("labelme", [[1, 1], [2, 2]], "a shape of 'pit' has an outline of 2 points; draw at least three"),
    ("cvat", "<annotations><track id='0' label='pit'/></annotations>", "tracks of a video; export the task as"),
])  # fmt: skip
def test_mistakes_in_other_formats_too(kind, content, message, tmp_path):
    """None becomes a mask of background alone."""
    (tmp_path / "images").mkdir()
    Image.new("L", (50, 40)).save(tmp_path / "images" / "a.png")
    labels = tmp_path / "labels"
    labels.mkdir()
    if kind == "yolo":
        (labels / "a.txt").write_text(content)
        (labels / "classes.txt").write_text("pit\n")
    elif kind == "labelme":
        shapes = [{"label": "pit", "points": content, "shape_type": "polygon"}]
        own = {"shapes": shapes, "imagePath": "a.png", "imageHeight": 40, "imageWidth": 50}
        (labels / "a.json").write_text(json.dumps(own))
    else:
        labels = labels / "a.xml"
        labels.write_text(content)
    with pytest.raises(UserError, match=message):
        mask_folder(str(labels), str(tmp_path / "images"), cache_dir=str(tmp_path / "cache"))


VALID = {
    "images": [{"id": 1, "file_name": "a.png", "height": 3, "width": 3}],
    "categories": [{"id": 1, "name": "pit"}],
    "annotations": [
        {"id": 7, "image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2], "area": 4, "iscrowd": 0,
         "segmentation": [[0, 0, 2, 0, 2, 2]]},
        {"id": 8, "image_id": 1, "category_id": 1, "segmentation": {"counts": [1, 8], "size": [3, 3]}},
    ],
}  # fmt: skip


def places(value, path=()):
    """The path of every value within a JSON content."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, one in inner for found in places(one, (*path, key)))]


@pytest.mark.parametrize("wrong", [None, "abc", [], {}, -1, 1e300, [[1]], True], ids=repr)
def test_whatever_is_wrong_in_a_file_one_line_names_the_file(wrong, tmp_path):
    file = tmp_path / "labels.json"
    for path in places(VALID)[1:]:
        content = json.loads(json.dumps(VALID))
        inner = functools.reduce(lambda value, key: value[key], path[:-1], content)
        inner[path[-1]] = wrong
        file.write_text(json.dumps(content))
        try:
            read_labels(str(file), lambda _: (3, 3))
        except UserError as error:
            assert str(file) in str(error) and "\n" not in str(error), (path, error)
