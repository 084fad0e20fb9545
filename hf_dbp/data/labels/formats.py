"""Readers and writers of label files.

    coco       one JSON file: images, annotations (polygons, plain or packed runs, or boxes), categories
    labelme    a folder of JSON files, one per image: polygon, rectangle, circle and mask shapes
    yolo       a folder of text files, one per image, with a class and a polygon per line as shares of width and height,
               or a class and the centre, width and height of a box;
               class names are in data.yaml (``names``) or classes.txt, there or in the folder above
    cvat       one XML file of "CVAT for images": polygon, box and mask shapes by z_order

Boxes alone serve detection, not segmentation. Class 0 is the background (a class called background or `_background_`,
or class 0); the others follow in the order of the file, those of LabelMe sorted by name. An image that is listed, or
has its own file, but no shape is all background.

Shapes: H, W height and width; V vertices, (x, y) each.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hf_dbp.data.labels.shapes import Labelled, Shape, from_runs, parts, to_runs
from hf_dbp.errors import UserError
from hf_dbp.recipes import safe_yaml

__all__ = [
    "BACKGROUND",
    "READERS",
    "coco_content",
    "label_format",
    "labelme_content",
    "read_labels",
    "unpacked",
]

OUTSIDE = 1.5  # YOLO's shares are at most 1, but for outlines that reach beyond the image
BACKGROUND = ("background", "_background_")
Found = tuple[list[Labelled], list[str]]  # the images, and the class names without background


def label_format(source: Path) -> str | None:
    """``coco``, ``cvat``, ``labelme`` or ``yolo``; None if it is not a source of labels, such as a folder of masks."""
    if source.is_file():
        return {".json": "coco", ".xml": "cvat"}.get(source.suffix.lower())
    kinds = {file.suffix.lower() for file in source.rglob("*") if file.is_file()} if source.is_dir() else set()
    if kinds & {".png", ".tif", ".tiff", ".bmp", ".npy", ".gif", ".jpg", ".jpeg", ".webp"}:
        return None
    return "labelme" if ".json" in kinds else "yolo" if ".txt" in kinds else None


def read_labels(source: str, image_size: Callable[[str], tuple[int, int]]) -> Found:
    """The labelled images of a file or folder, and the class names without background.

    Args:
        source: as in the module's docstring.
        image_size: returns (height, width) of an image by name, for formats that do not state it.

    Raises:
        UserError: there are no such labels, or one cannot be read; the message names it.
    """
    kind = label_format(Path(source))
    if kind is None:
        raise UserError(f"{source} holds no labels: give a COCO or CVAT file, or a folder of LabelMe or YOLO files")
    with reading(source, f" as {kind} labels"):
        return READERS[kind](Path(source), image_size)


@contextlib.contextmanager
def reading(file: Path | str, where: str) -> Iterator[None]:
    """Raise what goes wrong within as a UserError that names the file and the place in it."""
    try:
        yield
    except UserError as error:
        if str(file) in str(error):
            raise
        raise UserError(f"{file}{where}: {error}") from error
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, ElementTree.ParseError) as error:
        if isinstance(error, json.JSONDecodeError | ElementTree.ParseError | UnicodeDecodeError):
            reason = f"the file is damaged or of another kind ({error}); export it again"
        elif isinstance(error, KeyError):
            reason = f"{error} is missing; add it, or export the labels again"
        else:
            reason = f"{error}; correct it, or export the labels again"
        raise UserError(f"{file}{where}: {reason}") from error


def points(values: Sequence[float]) -> NDArray[np.float64]:
    """A label file's x0, y0, x1, y1 ... as (V, 2). UserError if a y is missing."""
    if np.ndim(values) == 1 and len(values) % 2:
        raise UserError(f"an outline has {len(values)} coordinates: give an x and a y for each point")
    return np.asarray(values, np.float64).reshape(-1, 2)


# ---- COCO ----


def read_coco(file: Path, image_size: Callable[[str], tuple[int, int]]) -> Found:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}; a COCO file has images, annotations and categories")
    names = {entry["id"]: str(entry["name"]) for entry in sorted(content["categories"], key=lambda entry: entry["id"])}
    twice = next((name for name, count in Counter(names.values()).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{file} has several categories called {twice!r}: give each its own name, or merge them")
    sizes: dict[Any, tuple[int, int]] = {}
    for entry in content["images"]:
        with reading(file, f": image {entry.get('id')}"):
            if entry["id"] in sizes:
                raise UserError("several images have this id; give each its own")
            sizes[entry["id"]] = int(entry["height"]), int(entry["width"])
    shapes: dict[Any, list[Shape]] = {image: [] for image in sizes}
    for entry in content.get("annotations", ()):
        with reading(file, f": annotation {entry.get('id')}"):
            shapes[known(entry, "image_id", sizes)].append(coco_shape(entry, names, sizes))
    images = [Labelled(str(entry["file_name"]), sizes[entry["id"]], shapes[entry["id"]]) for entry in content["images"]]
    return images, [name for name in names.values() if name not in BACKGROUND]


def known(entry: Mapping[str, Any], key: str, among: Mapping[Any, Any]) -> Any:
    """The id of an annotation's category or image. UserError if there is none."""
    if entry[key] not in among:
        listed = "categories" if key == "category_id" else "images"
        raise UserError(f"its {key} {entry[key]!r} is not among the {listed}; add it there, or remove the annotation")
    return entry[key]


def coco_shape(entry: Mapping[str, Any], names: Mapping[Any, str], sizes: Mapping[Any, tuple[int, int]]) -> Shape:
    """The shape of an annotation."""
    label, size = names[known(entry, "category_id", names)], sizes[entry["image_id"]]
    drawn, box = entry.get("segmentation"), entry.get("bbox")
    stated: dict[str, Any] = {"area": entry.get("area"), "crowd": bool(entry.get("iscrowd", 0))}
    stated["name"] = f"annotation {entry.get('id')}"
    if box is not None:
        if len(box) != 4:
            raise UserError(f"its bbox has {len(box)} numbers; give left, top, width and height")
        x, y, width, height = map(float, box)
        stated["box"] = (x, y, x + width, y + height)
    if isinstance(drawn, dict):
        counts = drawn["counts"]
        runs = unpacked(counts) if isinstance(counts, str) else counts
        if tuple(drawn["size"]) != size:
            raise UserError(
                f"its runs are for {drawn['size']} pixels (height, width), its image has {list(size)}; export it again "
                "at the image's size"
            )
        return Shape(label, pixels=from_runs(runs, (drawn["size"][0], drawn["size"][1])), **stated)
    if not drawn and box is None:
        raise UserError("it has neither a bbox nor a segmentation; draw one")
    return Shape(label, [points(ring) for ring in drawn or ()], **stated)


def unpacked(text: str) -> list[int]:
    """The run lengths in COCO's packed text: five bits per character, lowest first; from the fourth run on, differences
    to the run two before."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def coco_annotations(ids_HW: NDArray[Any], image_id: int, first: int) -> list[dict[str, Any]]:
    """The annotations of a mask: a polygon for each part without holes, runs for the others."""
    found: list[dict[str, Any]] = []
    for part in parts(ids_HW):
        if part.class_id == 0:
            continue
        rows, columns = np.flatnonzero(part.pixels.any(axis=1)), np.flatnonzero(part.pixels.any(axis=0))
        box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
        size = [int(side) for side in ids_HW.shape]
        drawn: Any = {"counts": to_runs(part.pixels), "size": size} if part.holes else [part.outer.ravel().tolist()]
        found.append({
            "id": first + len(found), "image_id": image_id, "category_id": part.class_id, "iscrowd": 0,
            "segmentation": drawn, "area": int(part.pixels.sum()), "bbox": [int(value) for value in box],
        })  # fmt: skip
    return found


# ---- LabelMe ----


def coco_content(masks: Iterable[tuple[str, NDArray[Any]]], names: Mapping[int, str]) -> dict[str, Any]:
    """The COCO file of masks (H, W), each with the file of its image; class 0 is not a category."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (file, ids_HW) in enumerate(masks):
        height, width = ids_HW.shape
        images.append({"id": number, "file_name": file, "height": height, "width": width})
        annotations += coco_annotations(ids_HW, number, len(annotations) + 1)
    categories = [{"id": k, "name": name, "supercategory": ""} for k, name in names.items() if k]
    return {"images": images, "annotations": annotations, "categories": categories}


def read_labelme(folder: Path, image_size: Callable[[str], tuple[int, int]]) -> Found:
    images, names = [], set()
    for file in sorted(folder.rglob("*.json")):
        with reading(file, ""):
            content = json.loads(file.read_text(encoding="utf-8"))
            size = int(content["imageHeight"]), int(content["imageWidth"])
            shapes = [labelme_shape(entry) for entry in content["shapes"]]
            suffix = PureWindowsPath(content["imagePath"]).suffix
        names |= {shape.label for shape in shapes}
        images.append(Labelled(file.relative_to(folder).with_suffix(suffix).as_posix(), size, shapes))
    return images, sorted(names - {*BACKGROUND})


def labelme_shape(entry: Mapping[str, Any]) -> Shape:
    kind, label, drawn = entry.get("shape_type", "polygon"), str(entry["label"]), points(entry["points"])
    if kind == "polygon":
        return Shape(label, [drawn])
    if kind == "rectangle":
        return Shape(label, [rectangle(*drawn[0], *drawn[1])])
    if kind == "circle":
        radius, turns = math.dist(*drawn), np.linspace(0, 2 * np.pi, 128, endpoint=False)
        return Shape(label, [drawn[0] + radius * np.stack([np.cos(turns), np.sin(turns)], axis=1)])
    if kind == "mask":
        with Image.open(io.BytesIO(base64.b64decode(entry["mask"]))) as picture:
            pixels = np.asarray(picture.convert("L")) > 0
        return Shape(label, pixels=pixels, corner=(int(drawn[0][0]), int(drawn[0][1])))
    raise UserError(f"a shape of type {kind!r} has no area; draw {label!r} as a polygon")


def rectangle(x0: float, y0: float, x1: float, y1: float) -> NDArray[np.float64]:
    return points([x0, y0, x1, y0, x1, y1, x0, y1])


def labelme_content(ids_HW: NDArray[Any], names: Mapping[int, str], image: str) -> dict[str, Any]:
    """The LabelMe file of a mask; what lies in a hole, even background, is painted after what surrounds it."""
    shapes = [
        {"label": names[part.class_id] if part.class_id else BACKGROUND[1], "points": part.outer.tolist(),
         "group_id": None, "description": "", "shape_type": "polygon", "flags": {}, "mask": None}
        for part in parts(ids_HW)
    ]  # fmt: skip
    height, width = (int(side) for side in ids_HW.shape)
    return {
        "version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": image, "imageData": None,
        "imageHeight": height, "imageWidth": width,
    }  # fmt: skip


# ---- YOLO ----


def read_yolo(folder: Path, image_size: Callable[[str], tuple[int, int]]) -> Found:
    names = yolo_names(folder)
    images = []
    for file in sorted(folder.rglob("*.txt")):
        if file.name in ("classes.txt", "train.txt", "val.txt", "test.txt"):
            continue
        name = file.relative_to(folder).with_suffix("").as_posix()
        height, width = image_size(name)
        shapes = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                with reading(file, f", line {number}"):
                    shapes.append(yolo_shape(line, number, names, (height, width)))
        images.append(Labelled(name, (height, width), shapes))
    return images, [name for name in names.values() if name not in BACKGROUND]


def yolo_shape(line: str, number: int, names: Mapping[int, str], size: tuple[int, int]) -> Shape:
    """The box or outline of a line."""
    first, *rest = line.split()
    if int(first) not in names:
        raise UserError(f"class {first} has no name; name it in data.yaml or classes.txt")
    label, numbers, (height, width) = names[int(first)], [float(value) for value in rest], size
    if max(map(abs, numbers), default=0) > OUTSIDE:
        raise UserError(
            f"{max(numbers, key=abs):g} is no share of the image's side; divide x by the width and y by the height"
        )
    name = f"line {number}"
    if len(numbers) == 4:
        x, y, w, h = numbers  # centre and sides
        box = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
        return Shape(label, box=box, name=name)
    if len(numbers) < 6 or len(numbers) % 2:
        raise UserError("an outline needs a class and at least three points")
    return Shape(label, [points(numbers) * (width, height)], name=name)


def yolo_names(folder: Path) -> dict[int, str]:
    """The names of the classes by number."""
    for place in (folder, *folder.parents[:2]):
        if (listed := place / "classes.txt").is_file():
            return dict(enumerate(listed.read_text(encoding="utf-8").split("\n")[:-1]))
        for file in [*sorted(place.glob("*.yaml")), *sorted(place.glob("*.yml"))]:
            content = safe_yaml(file.read_text(encoding="utf-8"))
            if isinstance(content, dict) and "names" in content:
                names = content["names"]
                pairs = names.items() if isinstance(names, dict) else enumerate(names)
                return {int(number): str(name) for number, name in pairs}
    raise UserError(f"the class names of {folder} are unknown: put a data.yaml with `names` beside it")


# ---- CVAT ----


def read_cvat(file: Path, image_size: Callable[[str], tuple[int, int]]) -> Found:
    root = ElementTree.parse(file).getroot()
    images = []
    if root.find("track") is not None:
        raise UserError(f"{file} holds tracks of a video; export the task as 'CVAT for images'")
    for image in root.iter("image"):
        with reading(file, f": image {image.get('name')}"):
            drawn = sorted(image, key=lambda shape: int(shape.get("z_order", 0)))
            size = int(image.attrib["height"]), int(image.attrib["width"])
            shapes = [cvat_shape(shape) for shape in drawn if shape.tag != "tag"]
        images.append(Labelled(image.attrib["name"], size, shapes))
    listed = [str(label.findtext("name")) for label in root.iter("label")]
    names = listed or sorted({shape.label for image in images for shape in image.shapes})
    return images, [name for name in names if name not in BACKGROUND]


def cvat_shape(shape: ElementTree.Element) -> Shape:
    label, given = shape.attrib["label"], shape.attrib
    if shape.tag == "polygon":
        return Shape(label, [points([float(v) for pair in given["points"].split(";") for v in pair.split(",")])])
    if shape.tag == "box":
        return Shape(label, [rectangle(*(float(given[side]) for side in ("xtl", "ytl", "xbr", "ybr")))])
    if shape.tag == "mask":
        height, width = int(given["height"]), int(given["width"])
        runs = [int(run) for run in given["rle"].split(",")]
        values = np.repeat(np.arange(len(runs)) % 2 == 1, runs)  # row by row within its box
        return Shape(label, pixels=values.reshape(height, width), corner=(int(given["left"]), int(given["top"])))
    raise UserError(f"a shape of type {shape.tag!r} has no area; draw {label!r} as a polygon or mask")


READERS: dict[str, Callable[[Path, Callable[[str], tuple[int, int]]], Found]] = {
    "coco": read_coco, "labelme": read_labelme, "yolo": read_yolo, "cvat": read_cvat,
}  # fmt: skip
