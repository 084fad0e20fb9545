"""A picture of a segmentation model's results: images, true masks and predictions, with a legend."""

import os
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from transformers import PreTrainedModel

from hf_dbp.data.values import displayed
from hf_dbp.downstream.segmentation.detection import ImageFigures, worst_images
from hf_dbp.downstream.segmentation.eomt import SemanticEomt
from hf_dbp.downstream.segmentation.inference import WholeImages, predict_labels
from hf_dbp.figures import literal_names

__all__ = ["class_colours", "plot_predictions", "plot_worst"]

VOID = (0.0, 0.0, 0.0)
LEGEND_LIMIT = 30
CAPTION = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2}


def class_colours(classes: int) -> npt.NDArray[np.float64]:
    """Return K x 3 RGB colours: distinct for up to 20 classes, spread over the hues for more."""
    if classes <= 20:
        return np.asarray(matplotlib.colormaps["tab20"](np.r_[0:20:2, 1:20:2][:classes]))[:, :3]
    hues = np.arange(classes) * 0.618034 % 1.0  # golden-ratio steps keep neighbouring ids apart
    lightness = 0.55 + 0.45 * (np.arange(classes) % 3) / 2
    return matplotlib.colors.hsv_to_rgb(np.stack([hues, np.full(classes, 0.75), lightness], axis=1))


def _painted(ids_HW: npt.NDArray[Any], colours_K3: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    known = (ids_HW >= 0) & (ids_HW < len(colours_K3))
    return np.where(known[..., None], colours_K3[np.where(known, ids_HW, 0)], VOID)


@literal_names
def plot_predictions(
    model: PreTrainedModel | SemanticEomt,
    data: WholeImages,
    path: str | os.PathLike[str],
    *,
    crop_size: int,
    num_images: int = 4,
    shown_images: Sequence[tuple[int, str]] | None = None,
) -> None:
    """Write a PNG with one row per image: image, true mask (void is black), prediction; the legend names the classes.

    Args:
        model: in eval mode, with `config.id2label`; see `hf_dbp.downstream.segmentation.heads.segmenter`.
        data: evaluation images; `num_images` at even steps are shown.
        path: PNG file to write.
        crop_size: as in training.
        num_images: how many images to show.
        shown_images: index and caption of the images to show instead of ``num_images`` at even steps.
    """
    names: dict[int, str] = model.config.id2label
    colours_K3 = class_colours(len(names))
    if shown_images is None:
        shown_images = [(int(k), "") for k in np.linspace(0, len(data) - 1, min(num_images, len(data)), dtype=int)]
    figure = Figure(figsize=(9, 2.6 * len(shown_images) + 0.8), layout="constrained")
    axes = figure.subplots(len(shown_images), 3, squeeze=False)
    shown: set[int] = set()
    for row, (index, caption) in zip(axes, shown_images, strict=True):
        image_HWC, true_HW = data.images.readable(index)
        predicted_HW = predict_labels(model, data, image_HWC, crop_size).cpu().numpy()
        shown |= {*np.unique(true_HW).tolist(), *np.unique(predicted_HW).tolist()}
        pictures = (
            displayed(image_HWC, data.images.value_range),
            _painted(true_HW, colours_K3),
            _painted(predicted_HW, colours_K3),
        )
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_axis_off()
        if caption:
            row[0].text(0.02, 0.02, caption, transform=row[0].transAxes, fontsize="small", bbox=CAPTION)
    for axis, title in zip(axes[0], ("image", "true mask", "prediction"), strict=True):
        axis.set_title(title)
    patches = [Patch(color=colours_K3[k], label=names[k]) for k in sorted(shown & names.keys())[:LEGEND_LIMIT]]
    if shown - names.keys():
        patches.append(Patch(color=VOID, label="void"))
    figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize="small", frameon=False)
    figure.savefig(path, dpi=100)


def plot_worst(
    model: PreTrainedModel | SemanticEomt,
    data: WholeImages,
    images: Sequence[ImageFigures],
    path: str | os.PathLike[str],
    *,
    crop_size: int,
) -> None:
    """Write a PNG as `plot_predictions` does of the images with the lowest mean IoU, worst first.

    Args:
        model: in eval mode, with `config.id2label`; see `hf_dbp.downstream.segmentation.heads.segmenter`.
        data: evaluation images.
        images: the figures of each.
        path: PNG file to write.
        crop_size: as in training.
    """
    worst = [(image.index, f"image {image.index}: {image.mean_iou:.4f}") for image in worst_images(images)]
    plot_predictions(model, data, path, crop_size=crop_size, shown_images=worst)
