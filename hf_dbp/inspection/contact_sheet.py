"""A page of thumbnails of the images, and the masks beside them, as the tool sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from hf_dbp.data.augmentation import resized
from hf_dbp.data.decoding import DECODING_ERRORS, decode, stored
from hf_dbp.data.masks import Palette
from hf_dbp.downstream.detection.figures import draw_objects
from hf_dbp.downstream.detection.objects import Objects
from hf_dbp.downstream.segmentation.figures import class_colours
from hf_dbp.figures import literal_names
from hf_dbp.inspection.reading import Samples, value_of

__all__ = ["IMAGES", "thumbnail", "write_contact_sheet", "write_pictures"]

Array = NDArray[Any]
SIDE, COLUMNS = 256, 6
IMAGES = 24  # per sheet
LEGEND = 30  # classes


def thumbnail(image_HWC: Array) -> Array:
    """An image in [0, 1] as RGB, at most 256 pixels a side, each channel stretched between its 1st and 99th percentile.

    Two channels are shown as magenta and green; of more than three, the first three are shown.
    """
    height, width = image_HWC.shape[:2]
    factor = min(1.0, SIDE / max(height, width))
    view = max(1, round(height * factor)), max(1, round(width * factor))
    small = resized(image_HWC, view, (0, 0, width, height)).astype(np.float64)
    low, high = np.percentile(small, (1, 99), axis=(0, 1))
    small = np.clip((small - low) / np.maximum(high - low, 1e-12), 0, 1)
    order = {1: (0, 0, 0), 2: (0, 1, 0)}.get(small.shape[2], (0, 1, 2))
    return np.asarray(small[..., order])


def mask_thumbnail(mask: Any, palette: Palette | None) -> Array:
    """A mask in colour: with the colours of its classes, or its own."""
    array = np.asarray(mask if palette is None else palette(mask))
    step = max(1, max(array.shape[:2]) // SIDE)
    array = array[::step, ::step]
    if array.ndim == 3:
        return np.asarray(array[..., :3] / 255)
    return np.asarray(class_colours(20)[array.astype(np.int64) % 20] * (array != 255)[..., None])


def write_contact_sheet(path: Path, samples: Samples, masks: Samples, palette: str | None) -> None:
    """Write a PNG of up to 24 images at even steps, labelled ones first, each with its mask if it has one.

    Args:
        path: PNG file to write.
        samples: the readable images.
        masks: the masks, by the names of their images.
        palette: palette file or ``binary``, if masks need one.
    """
    known = Palette(palette, 255) if palette is not None else None
    names = sorted(samples, key=lambda name: (name not in masks, name))
    labelled = [name for name in names if name in masks] or names
    picks = [
        labelled[int(i)] for i in np.linspace(0, len(labelled) - 1, min(IMAGES // (2 if masks else 1), len(labelled)))
    ]
    pictures: list[tuple[str, Array]] = []
    for name in picks:
        pictures.append((name, thumbnail(decode(value_of(samples[name]), None, name))))
        if name in masks:
            try:
                pictures.append(("mask", mask_thumbnail(stored(value_of(masks[name])), known)))
            except DECODING_ERRORS:
                pictures.append(("mask unreadable", np.zeros((8, 8, 3))))
    write_pictures(path, pictures)


@literal_names
def write_pictures(
    path: Path,
    pictures: Sequence[tuple[str, Array]],
    objects: Mapping[int, Objects] | None = None,
    classes: Sequence[str] = (),
) -> None:
    """Write a PNG of titled pictures, RGB in [0, 1], six per row.

    Args:
        path: PNG file to write.
        pictures: titles and pictures.
        objects: the objects whose boxes are drawn, by the number of their picture.
        classes: names of their classes by id.
    """
    colours_K3 = class_colours(max(1, len(classes)))
    rows = -(-len(pictures) // COLUMNS)
    figure = Figure(figsize=(2.2 * COLUMNS, 2.4 * rows), layout="constrained")
    for axis in figure.subplots(rows, COLUMNS, squeeze=False).flat:
        axis.set_axis_off()
    for number, (axis, (name, picture)) in enumerate(zip(figure.axes, pictures, strict=False)):
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(name[-24:], fontsize=7)
        if objects is not None and number in objects:
            one = objects[number]
            height, width = (small / side for small, side in zip(picture.shape[:2], one.size, strict=True))
            draw_objects(axis, one.boxes_N4 * [width, height, width, height], one.classes_N, colours_K3)
    if classes:
        patches = [Patch(color=tuple(colour), label=name) for name, colour in zip(classes, colours_K3, strict=True)]
        figure.legend(handles=patches[:LEGEND], loc="outside lower center", ncols=6, fontsize="small", frameon=False)
    with matplotlib.rc_context({"savefig.dpi": 100}):
        figure.savefig(path)
