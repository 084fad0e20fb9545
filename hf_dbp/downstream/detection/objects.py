"""The objects of an image: boxes, classes and, if asked for, pixels, from labels or from masks; and what is odd about
them.

From labels (`hf_dbp.data.labels.formats`) every shape is an object: its box is the one that the labels state, or that
of its outline. From masks every 8-connected part of a class is an object: two of one class that touch are one.

Pixels are kept as run lengths, as pycocotools packs them.

Shapes: N objects; H, W the image.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from hf_dbp.data.labels.shapes import Labelled, Shape
from hf_dbp.downstream.detection.runs import Runs, packed, packed_polygons
from hf_dbp.errors import UserError

__all__ = ["Objects", "Oddities", "labelled_objects", "mask_objects", "no_objects"]

EXAMPLES = 5  # names kept per oddity
TINY = 4.0  # pixels of the shorter side, as the model sees it
EDGE = 0.5  # pixels that a box may reach beyond its image by rounding

EMPTY = "boxes without area, left out"
OUTSIDE = "boxes outside their image, left out"
TWICE = "boxes drawn twice (the same class and corners), of which one is used"
BEYOND = "boxes that reach beyond their image, cut off at its edge in training"
CROWDS = "boxes around a crowd, which are neither learned nor scored"
SPECKS = "parts of masks below --min_area, left out"
UNWANTED = "objects of classes that are not among --classes, left out"


@dataclasses.dataclass(frozen=True)
class Objects:
    """The objects of one image.

    Args:
        size: height and width of the image that they were drawn on.
        boxes_N4: left, top, right and bottom in pixels; they may reach beyond the image.
        classes_N: class ids.
        areas_N: pixels of each.
        crowd_N: whether it is a group, which is neither learned nor scored.
        runs: the pixels of each; empty if only boxes are used.
    """

    size: tuple[int, int]
    boxes_N4: NDArray[np.float64]
    classes_N: NDArray[np.int64]
    areas_N: NDArray[np.float64]
    crowd_N: NDArray[np.bool_]
    runs: Sequence[Runs] = ()

    def __len__(self) -> int:
        return len(self.classes_N)

    def chosen(self, rows: NDArray[Any]) -> Objects:
        """Those of these rows, or of a mask of rows."""
        numbers = np.arange(len(self))[rows]
        runs = [self.runs[int(row)] for row in numbers] if self.runs else ()
        boxes_N4, classes_N, areas_N = self.boxes_N4[numbers], self.classes_N[numbers], self.areas_N[numbers]
        return Objects(self.size, boxes_N4, classes_N, areas_N, self.crowd_N[numbers], runs)


def no_objects(size: tuple[int, int]) -> Objects:
    """No object in an image."""
    return Objects(size, np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.bool_))


@dataclasses.dataclass
class Oddities:
    """What is odd about the objects of a list of images: how many of each kind, and some of their names."""

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def add(self, kind: str, names: Sequence[str]) -> None:
        """Count objects with these names."""
        if names:
            self.counts[kind] += len(names)
            self.examples[kind] = [*self.examples.get(kind, ()), *names][:EXAMPLES]

    def __add__(self, other: Oddities) -> Oddities:
        both = Oddities(self.counts.copy(), dict(self.examples))
        for kind, count in other.counts.items():
            both.counts[kind] += count
            both.examples[kind] = [*both.examples.get(kind, ()), *other.examples[kind]][:EXAMPLES]
        return both

    def lines(self) -> list[str]:
        """One line per kind."""
        return [f"{count} {kind}; e.g. {self.examples[kind][0]}" for kind, count in self.counts.items()]

    def record(self) -> dict[str, Any]:
        """As JSON: {kind: {count, examples}}."""
        return {kind: {"count": count, "examples": self.examples[kind]} for kind, count in self.counts.items()}


# ---- from labels ----


def labelled_objects(
    labelled: Labelled, ids: Mapping[str, int], odd: Oddities, *, instances: bool = False, min_area: int = 0
) -> Objects:
    """The objects of a labelled image.

    Args:
        labelled: its shapes.
        ids: class ids by name; shapes of other classes are left out.
        odd: collects what is odd.
        instances: keep the pixels of each object.
        min_area: objects with fewer pixels are left out.

    Raises:
        UserError: with ``instances``, a shape that is only a box.
    """
    wanted = [shape for shape in labelled.shapes if shape.label in ids]
    odd.add(UNWANTED, [told(labelled, shape) for shape in labelled.shapes if shape.label not in ids])
    if not wanted:
        return no_objects(labelled.size)
    boxes_N4 = np.array([box_of(shape) for shape in wanted], np.float64)
    crowd_N = np.array([shape.crowd for shape in wanted])
    runs = [runs_of(shape, labelled) for shape in wanted] if instances else []
    sides = np.maximum(boxes_N4[:, 2:] - boxes_N4[:, :2], 0)
    areas_N = sides.prod(axis=1)
    for row, shape in enumerate(wanted):
        if shape.area is not None:
            areas_N[row] = shape.area
        elif runs:
            areas_N[row] = runs[row].area
    found = Objects(labelled.size, boxes_N4, np.array([ids[shape.label] for shape in wanted]), areas_N, crowd_N, runs)
    names = [told(labelled, shape) for shape in wanted]
    odd.add(CROWDS, [name for name, crowd in zip(names, crowd_N, strict=True) if crowd])
    keep = sound(found, names, odd)
    small = keep & ~crowd_N & (areas_N < min_area)
    odd.add(SPECKS, [name for name, one in zip(names, small, strict=True) if one])
    return found.chosen(keep & ~small)


def told(labelled: Labelled, shape: Shape) -> str:
    """How messages refer to a shape."""
    return f"{shape.name} ({shape.label}) of {labelled.file}"


def box_of(shape: Shape) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a shape, as stated or around its pixels; all 0 without pixels."""
    if shape.box is not None:
        return shape.box
    if shape.rings:
        points = np.concatenate([np.asarray(ring) for ring in shape.rings])
        (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
        return float(left), float(top), float(right), float(bottom)
    assert shape.pixels is not None
    rows, columns = np.flatnonzero(shape.pixels.any(axis=1)), np.flatnonzero(shape.pixels.any(axis=0))
    if not len(rows):
        return 0.0, 0.0, 0.0, 0.0
    x, y = shape.corner
    return float(x + columns[0]), float(y + rows[0]), float(x + columns[-1] + 1), float(y + rows[-1] + 1)


def runs_of(shape: Shape, labelled: Labelled) -> Runs:
    """The pixels of a shape. UserError if it has none."""
    if not shape.outlined:
        raise UserError(
            f"{labelled.file}: {shape.name} is a box without a segmentation; draw its outline, or leave out --instances"
        )
    if shape.pixels is None:
        return packed_polygons([ring.ravel().tolist() for ring in shape.rings if len(ring) > 2], labelled.size)
    pixels_HW = np.zeros(labelled.size, np.uint8)
    left, top = shape.corner
    part = pixels_HW[top : top + shape.pixels.shape[0], left : left + shape.pixels.shape[1]]
    if part.shape != shape.pixels.shape:
        raise UserError(f"{labelled.file}: the mask of {shape.name} reaches beyond its {labelled.size} pixels")
    part[:] = shape.pixels
    return packed(pixels_HW)


def sound(found: Objects, names: Sequence[str], odd: Oddities) -> NDArray[np.bool_]:
    """Which objects can be used; the others, and those that reach beyond their image, are counted."""
    height, width = found.size
    left, top, right, bottom = found.boxes_N4.T
    kept_N = np.isfinite(found.boxes_N4).all(axis=1)
    empty_N = ~kept_N | (right <= left) | (bottom <= top)
    outside_N = ~empty_N & ((right <= 0) | (bottom <= 0) | (left >= width) | (top >= height))
    over = np.array([-left, -top, right - width, bottom - height]).max(axis=0, initial=0)
    beyond_N = ~empty_N & ~outside_N & (over > EDGE)
    twice_N, seen = np.zeros(len(found), np.bool_), set()
    for row in np.flatnonzero(~empty_N & ~outside_N & ~found.crowd_N):
        key = (int(found.classes_N[row]), *found.boxes_N4[row].tolist())
        twice_N[row] = key in seen
        seen.add(key)
    for kind, rows in ((EMPTY, empty_N), (OUTSIDE, outside_N), (TWICE, twice_N), (BEYOND, beyond_N)):
        odd.add(kind, [names[int(row)] for row in np.flatnonzero(rows)])
    return np.asarray(~(empty_N | outside_N | twice_N))


# ---- from masks ----


def mask_objects(
    ids_HW: NDArray[Any],
    ids: Mapping[int, int],
    name: str,
    odd: Oddities,
    *,
    instances: bool = False,
    min_area: int = 0,
) -> Objects:
    """The 8-connected parts of the classes of a mask.

    Args:
        ids_HW: ids of the mask.
        ids: class id of an object by id in the mask; others are no objects.
        name: how messages refer to the mask.
        odd: collects what is odd.
        instances, min_area: as in `labelled_objects`.
    """
    boxes, classes, areas, runs = [], [], [], []
    for stored, class_id in ids.items():
        pixels_HW = (ids_HW == stored).astype(np.uint8)
        if not pixels_HW.any():
            continue
        count, parts_HW, figures, _ = cv2.connectedComponentsWithStats(pixels_HW, connectivity=8)
        for part in range(1, count):
            left, top, width, height, area = (int(value) for value in figures[part])
            if area < min_area:
                odd.add(SPECKS, [f"{area} pixels at ({left}, {top}) of {name}"])
                continue
            boxes.append((left, top, left + width, top + height))
            classes.append(class_id)
            areas.append(area)
            if instances:
                runs.append(packed((parts_HW == part).astype(np.uint8)))
    size = (ids_HW.shape[0], ids_HW.shape[1])
    if not boxes:
        return no_objects(size)
    crowd = np.zeros(len(boxes), np.bool_)
    return Objects(size, np.array(boxes, np.float64), np.array(classes), np.array(areas, np.float64), crowd, runs)
