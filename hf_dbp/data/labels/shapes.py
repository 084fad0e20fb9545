"""Shapes and masks: polygons and runs to pixels, and pixels to outlines that reproduce them exactly.

A pixel belongs to a polygon if its centre lies inside, by the even-odd rule; pixel (0, 0) covers the square from (0, 0)
to (1, 1). Shapes are painted in order, later ones over earlier ones; pixels that none covers are class 0.

Outlines run along the edges of pixels, at whole coordinates, so any rule that tests pixel centres fills them with
exactly the pixels they were traced around.

Shapes of arrays: H, W height and width; V vertices, (x, y) each.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from hf_dbp.errors import UserError

__all__ = ["Labelled", "Part", "Shape", "filled", "from_runs", "outlines", "painted", "parts", "to_runs"]

Ring = NDArray[np.float64]  # (V, 2)


@dataclasses.dataclass(frozen=True)
class Shape:
    """One drawn object.

    Args:
        label: name of its class.
        rings: polygons; the object is their union.
        pixels: its pixels (H, W), instead of polygons, or a part of them that begins at ``corner``.
        corner: (left, top) of ``pixels``.
        box: (left, top, right, bottom) as the labels state it; None for that of its pixels. Some have nothing else.
        area: pixels as the labels state them.
        crowd: whether it is a group of objects (COCO's ``iscrowd``).
        name: how messages refer to it, beside the file.
    """

    label: str
    rings: Sequence[Ring] = ()
    pixels: NDArray[np.bool_] | None = None
    corner: tuple[int, int] = (0, 0)
    box: tuple[float, float, float, float] | None = None
    area: float | None = None
    crowd: bool = False
    name: str = "a shape"

    @property
    def outlined(self) -> bool:
        """Whether its pixels are known, not only its box."""
        return self.pixels is not None or bool(self.rings)


@dataclasses.dataclass(frozen=True)
class Labelled:
    """The shapes of one image: its file name in the labels, (height, width), and shapes in painting order."""

    file: str
    size: tuple[int, int]
    shapes: Sequence[Shape]


def filled(ring: Ring, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels (H, W) whose centres lie inside a polygon."""
    height, width = size
    flips = np.zeros((height, width + 1), np.int32)  # where a row enters or leaves the polygon
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        if y0 == y1:
            continue
        (xa, ya), (xb, yb) = ((x0, y0), (x1, y1)) if y0 < y1 else ((x1, y1), (x0, y0))
        rows = np.arange(max(0, int(np.ceil(ya - 0.5))), min(height, int(np.ceil(yb - 0.5))))
        crossings = xa + (rows + 0.5 - ya) * (xb - xa) / (yb - ya)
        np.add.at(flips, (rows, np.ceil(crossings - 0.5).clip(0, width).astype(int)), 1)
    return np.asarray(np.cumsum(flips[:, :width], axis=1) % 2 == 1)


def painted(labelled: Labelled, ids: Mapping[str, int]) -> NDArray[np.int32]:
    """The mask (H, W) of class ids. UserError for a shape outside its image, or without an outline."""
    mask_HW = np.zeros(labelled.size, np.int32)
    for shape in labelled.shapes:
        if not shape.outlined:
            raise UserError(
                f"{labelled.file}: {shape.name} is a box without a segmentation; draw its outline, or find boxes with "
                "hf-dbp detect"
            )
        if shape.pixels is not None:
            left, top = shape.corner
            part = mask_HW[top : top + shape.pixels.shape[0], left : left + shape.pixels.shape[1]]
            if part.shape != shape.pixels.shape:
                raise UserError(f"{labelled.file}: a mask of {shape.label!r} reaches beyond its {labelled.size} pixels")
            part[shape.pixels] = ids[shape.label]
        for ring in shape.rings:
            if len(ring) < 3:
                raise UserError(
                    f"{labelled.file}: {shape.name} of {shape.label!r} has an outline of {len(ring)} points; draw "
                    "at least three, or remove it"
                )
            mask_HW[filled(ring, labelled.size)] = ids[shape.label]
    return mask_HW


# ---- runs, as COCO has them: column after column, starting with zeros ----


def from_runs(counts: Sequence[int], size: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels (H, W) of run lengths. UserError if they do not add up to the image."""
    if sum(counts) != size[0] * size[1] or min(counts, default=0) < 0:
        raise UserError(f"run lengths add up to {sum(counts)}, not to {size[0]} x {size[1]} pixels")
    values = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return values.reshape(size[1], size[0]).T


def to_runs(pixels_HW: NDArray[np.bool_]) -> list[int]:
    """The run lengths of pixels."""
    flat = np.concatenate([[False], pixels_HW.T.ravel()])
    starts = np.flatnonzero(flat[1:] != flat[:-1])
    return [int(run) for run in np.diff(np.concatenate([[0], starts, [flat.size - 1]]))]


# ---- masks to outlines ----


@dataclasses.dataclass(frozen=True)
class Part:
    """A 4-connected part of one class: its id, its pixels (H, W), its outer outline and those of its holes."""

    class_id: int
    pixels: NDArray[np.bool_]
    outer: Ring
    holes: Sequence[Ring]


def parts(ids_HW: NDArray[Any]) -> Iterator[Part]:
    """The parts of all classes, larger outlines first; those of class 0 only if others enclose them."""
    found = []
    for class_id in np.unique(ids_HW):
        count, labels = cv2.connectedComponents((ids_HW == class_id).astype(np.uint8), connectivity=4)
        border = {*labels[[0, -1]].ravel().tolist(), *labels[:, [0, -1]].ravel().tolist()}
        for number in range(1, count):
            if class_id == 0 and number in border:
                continue
            rings = sorted(outlines(labels == number), key=area, reverse=True)
            found.append((area(rings[0]), Part(int(class_id), labels == number, rings[0], rings[1:])))
    yield from (part for _, part in sorted(found, key=lambda pair: -pair[0]))


def area(ring: Ring) -> float:
    """The area inside an outline."""
    x, y = ring[:, 0], ring[:, 1]
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


def outlines(pixels_HW: NDArray[np.bool_]) -> list[Ring]:
    """The corners of the closed outlines along the edges of pixels; each has its pixels on the right.

    Where two pixels touch only at a corner, the outline turns right and stays with its own pixel.
    """
    inside = np.pad(pixels_HW, 1).astype(np.int8)
    down, right = inside[1:, 1:-1] - inside[:-1, 1:-1], inside[1:-1, 1:] - inside[1:-1, :-1]
    steps: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)  # from each corner to the next
    for y, x in np.argwhere(down).tolist():
        start, end = ((x, y), (x + 1, y)) if down[y, x] > 0 else ((x + 1, y), (x, y))
        steps[start].append(end)
    for y, x in np.argwhere(right).tolist():
        start, end = ((x, y + 1), (x, y)) if right[y, x] > 0 else ((x, y), (x, y + 1))
        steps[start].append(end)
    rings = []
    while steps:
        start = next(iter(steps))
        before, at, ring = start, steps[start][0], [start]
        while True:
            following = max(steps[at], key=lambda end: turn(before, at, end))
            if at == start and following == steps[start][0]:  # a full circle
                break
            ring.append(at)
            before, at = at, following
        for one, other in zip(ring, [*ring[1:], start], strict=True):
            steps[one].remove(other)
            if not steps[one]:
                del steps[one]
        rings.append(corners(np.array(ring, np.float64)))
    return rings


def turn(before: tuple[int, int], at: tuple[int, int], after: tuple[int, int]) -> int:
    """1 for a turn of an outline to the right (y points down), -1 to the left, 0 straight on."""
    return (at[0] - before[0]) * (after[1] - at[1]) - (at[1] - before[1]) * (after[0] - at[0])


def corners(ring: Ring) -> Ring:
    """An outline without vertices in the middle of straight lines."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    return np.asarray(ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]])
