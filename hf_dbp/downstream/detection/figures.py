"""Pictures of objects: true ones and predictions on validation images, and predictions on new images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray

from hf_dbp.data.decoding import UnreadableImageError
from hf_dbp.data.values import displayed
from hf_dbp.downstream.detection.coco import Found
from hf_dbp.downstream.detection.runs import Runs
from hf_dbp.downstream.detection.views import WholeImages
from hf_dbp.downstream.segmentation.figures import class_colours
from hf_dbp.figures import literal_names

__all__ = ["draw_objects", "plot_detections"]

DRAWN = 40  # objects per picture
LEGEND = 30  # classes
PAINT = 0.45  # opacity of masks


def draw_objects(
    axis: Axes,
    boxes_N4: NDArray[np.float64],
    classes_N: NDArray[np.int64],
    colours_K3: NDArray[np.float64],
    runs: Sequence[Runs] = (),
    captions: Sequence[str] = (),
) -> None:
    """Draw the first `DRAWN` objects over a picture: boxes in pixels, perhaps masks and captions."""
    for number in range(min(DRAWN, len(classes_N))):
        colour = tuple(colours_K3[int(classes_N[number])])
        left, top, right, bottom = (boxes_N4[number] - 0.5).tolist()  # a picture's first pixel is centred at 0
        axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.2))
        if captions:
            axis.text(left, top, captions[number], color="white", fontsize=5, va="bottom",
                      bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.6})  # fmt: skip
        if runs:
            pixels_HW = runs[number].pixels()
            paint = np.zeros((*pixels_HW.shape, 4))
            paint[pixels_HW > 0] = (*colour, PAINT)
            axis.imshow(paint, interpolation="nearest")


@literal_names
def plot_detections(
    data: WholeImages,
    found: Mapping[int, Found],
    names: Mapping[int, str],
    path: str | os.PathLike[str],
    *,
    num_images: int = 4,
    threshold: float = 0.3,
) -> None:
    """Write a PNG with one row per image: the true objects, and those found with at least ``threshold``.

    Args:
        data: evaluation images; ``num_images`` at even steps are shown.
        found: what was found in each, by its number.
        names: class names by id.
        path: PNG file to write.
        num_images: how many images to show.
        threshold: lowest score of what is drawn.
    """
    colours_K3, known = class_colours(len(names)), sorted(found)
    shown = [known[int(k)] for k in np.linspace(0, len(known) - 1, min(num_images, len(known)))]
    figure = Figure(figsize=(9, 3.4 * len(shown) + 0.6), layout="constrained")
    axes = figure.subplots(len(shown), 2, squeeze=False)
    present: set[int] = set()
    for row, index in zip(axes, shown, strict=True):
        for axis in row:
            axis.set_axis_off()
        picture: Any
        try:
            image_HWC = data.images[index]
            true, one = data.data.of(index, (image_HWC.shape[0], image_HWC.shape[1])), found[index]
        except UnreadableImageError:
            continue
        picture = displayed(image_HWC, data.images.value_range)
        count = int((one.scores_M >= threshold).sum())
        for axis in row:
            axis.imshow(picture, interpolation="nearest")
        draw_objects(row[0], true.boxes_N4, true.classes_N, colours_K3, true.runs)
        captions = [f"{score:.2f}" for score in one.scores_M[:count]]
        draw_objects(row[1], one.boxes_M4[:count], one.classes_M[:count], colours_K3, one.runs[:count], captions)
        present |= {*true.classes_N.tolist(), *one.classes_M[:count].tolist()}
    for axis, title in zip(axes[0], ("true", f"found with a score of at least {threshold:g}"), strict=True):
        axis.set_title(title)
    patches = [Patch(color=tuple(colours_K3[k]), label=names[k]) for k in sorted(present)[:LEGEND]]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize="small", frameon=False)
    figure.savefig(path, dpi=100)
