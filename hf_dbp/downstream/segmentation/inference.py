"""Predict whole images with a model trained on crops: class ids at the images' resolution, and what they count.

1. Scale the image as training does at factor 1: the long edge to `long_edge` pixels (or keep the native resolution),
   and normalise it.
2. Slide windows over it and average their logits: `sliding`.
3. Take the argmax, count.

Evaluation and prediction run this same code and give bit-identical results on the same machine: neither the number of
images, nor a resume, nor the number of cores changes a logit.

Shapes: C channels; K classes; h, w scaled height and width; H, W the image's; n rows of a band.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hf_dbp.data.augmentation import normalized, resized
from hf_dbp.data.decoding import UnreadableImageError
from hf_dbp.data.values import UNIT, ValueRange, in_unit_range
from hf_dbp.downstream.segmentation.data import LabelledImages
from hf_dbp.downstream.segmentation.mean_iou import confusion_matrix
from hf_dbp.downstream.segmentation.sliding import BATCH, PART, WholeView, logit_bands
from hf_dbp.downstream.segmentation.transforms import long_edge_size

__all__ = [
    "Counts",
    "ImageCounts",
    "Likely",
    "Preparation",
    "WholeImages",
    "count_pixels",
    "likely",
    "predict_labels",
    "whole_image_logits",
]


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Prepares an image for the model: scales it to `long_edge` (None: native) and normalises it.

    ``value_range`` is the range of float images, see `hf_dbp.data.values`.
    """

    long_edge: int | None
    mean: Sequence[float]
    std: Sequence[float]
    value_range: ValueRange = UNIT

    def pixels(self, image_HWC: npt.NDArray[Any]) -> Tensor:
        """(H, W, C) stored values -> (C, h, w)."""
        height, width = image_HWC.shape[:2]
        view = long_edge_size(height, width, self.long_edge)
        scaled = image_HWC if view == (height, width) else resized(image_HWC, view, (0, 0, width, height))
        return self.normalized(scaled, image_HWC.dtype)

    def normalized(self, scaled_HWC: npt.NDArray[Any], dtype: np.dtype[Any]) -> Tensor:
        """Scaled values of an image of ``dtype`` -> (C, h, w)."""
        pixels = in_unit_range(scaled_HWC, dtype, self.value_range)
        return normalized(pixels, np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32))


@dataclasses.dataclass(frozen=True)
class WholeImages(torch.utils.data.Dataset[tuple[Tensor, npt.NDArray[np.int32]] | None]):
    """Evaluation items: scaled, normalised pixels (C, h, w) and the untouched label (H, W); None if unreadable."""

    images: LabelledImages
    long_edge: int | None
    mean: Sequence[float]
    std: Sequence[float]

    @property
    def preparation(self) -> Preparation:
        """How images are prepared."""
        return Preparation(self.long_edge, self.mean, self.std, self.images.value_range)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, npt.NDArray[np.int32]] | None:
        try:
            image_HWC, label_HW = self.images[index]
        except UnreadableImageError:
            return None
        return self.pixels(image_HWC), label_HW

    def pixels(self, image_HWC: npt.NDArray[Any]) -> Tensor:
        """(H, W, C) stored values -> (C, h, w)."""
        return self.preparation.pixels(image_HWC)


def whole_image_logits(
    model: nn.Module, pixels: Sequence[Tensor], crop_size: int, batch_size: int, *, classes: int
) -> list[Tensor]:
    """Return logits (K, h, w), float32, of each image (C, h, w)."""
    views = [WholeView(image, (image.shape[1], image.shape[2])) for image in pixels]
    found: list[Tensor] = []
    for band in logit_bands(model, views, crop_size, batch_size, classes=classes):
        _, rows, columns = band.logits_KnW.shape
        if band.top == band.left == 0:
            found.append(band.logits_KnW.new_empty(classes, *band.view.target))
        found[-1][:, band.top : band.top + rows, band.left : band.left + columns] = band.logits_KnW
    return found


def predict_labels(model: nn.Module, data: WholeImages, image_HWC: npt.NDArray[Any], crop_size: int) -> Tensor:
    """Return the class ids (H, W) of one image, as evaluation predicts them; the model must be in eval mode."""
    view = WholeView(data.pixels(image_HWC), (image_HWC.shape[0], image_HWC.shape[1]))
    ids_HW = torch.zeros(view.target, dtype=torch.int64)
    for band in logit_bands(model, [view], crop_size, classes=data.images.num_labels):
        _, rows, columns = band.logits_KnW.shape
        ids_HW[band.top : band.top + rows, band.left : band.left + columns] = torch.cat(
            [part.ids_nW for part in likely(band.logits_KnW)]
        )
    return ids_HW


@dataclasses.dataclass
class ImageCounts:
    """Counts on one labelled image.

    Attributes:
        hits_K, true_K, predicted_K: its labelled pixels that are correct, true and predicted for each class.
        foreground: the highest probability, over its pixels, of any class but 0.
    """

    hits_K: npt.NDArray[np.int64]
    true_K: npt.NDArray[np.int64]
    predicted_K: npt.NDArray[np.int64]
    foreground: float = 0.0


@dataclasses.dataclass
class Counts:
    """Counts on labelled images.

    Attributes:
        confusion_KK: confusion matrix of all of them (rows: true class).
        ignore_index: label of pixels that are not counted.
        loss_sum: cross-entropy summed over the labelled pixels.
        images: counts of each image, by number.
    """

    confusion_KK: npt.NDArray[np.int64]
    ignore_index: int
    loss_sum: float = 0.0
    images: dict[int, ImageCounts] = dataclasses.field(default_factory=dict)

    def add(self, number: int, logits_KnW: Tensor, label_nW: npt.NDArray[np.int32]) -> None:
        """Count the pixels of a band of image ``number``."""
        classes = logits_KnW.shape[0]
        target_nW = torch.from_numpy(np.ascontiguousarray(label_nW)).to(logits_KnW.device, torch.int64)
        self.loss_sum += nn.functional.cross_entropy(
            logits_KnW[None], target_nW[None], ignore_index=self.ignore_index, reduction="sum"
        ).item()
        parts = list(likely(logits_KnW))
        predicted_nW = torch.cat([part.ids_nW for part in parts]).to(torch.uint8 if classes <= 256 else torch.int32)
        confusion_KK = confusion_matrix([predicted_nW], [label_nW], classes, self.ignore_index)
        self.confusion_KK += confusion_KK
        image = self.images.setdefault(number, ImageCounts(*np.zeros((3, classes), np.int64)))
        image.hits_K += np.diag(confusion_KK)
        image.true_K += confusion_KK.sum(axis=1)
        image.predicted_K += confusion_KK.sum(axis=0)
        image.foreground = max(image.foreground, *(part.foreground for part in parts))


@dataclasses.dataclass(frozen=True)
class Likely:
    """What some rows of logits say: from row ``top`` of them on, the classes, and how sure.

    Attributes:
        top: their first row.
        ids_nW: the likeliest class of each pixel.
        chance_nW: its probability.
        foreground: the highest probability, over the pixels, of any class but 0.
    """

    top: int
    ids_nW: Tensor
    chance_nW: Tensor
    foreground: float


def likely(logits_KnW: Tensor) -> Iterator[Likely]:
    """The likeliest classes, from at most `PART` logits (or one row) at a time, so that no copy of a band is held."""
    classes, rows, width = logits_KnW.shape
    step = max(1, PART // (classes * width))
    for top in range(0, rows, step):
        part_KnW = logits_KnW[:, top : top + step]
        best_nW, ids_nW = _largest(part_KnW)
        odds_KnW = (part_KnW - best_nW).exp_()  # 1 for the likeliest class
        chance_nW = odds_KnW.sum(dim=0).reciprocal_()
        others_nW = odds_KnW[1:].sum(dim=0).mul_(chance_nW)
        yield Likely(top, ids_nW, chance_nW, float(others_nW.max()))


def _largest(part_KnW: Tensor) -> tuple[Tensor, Tensor]:
    """``max(dim=0)``; on a CPU class by class, which is several times as fast. The first of equal ones wins."""
    if part_KnW.device.type != "cpu":
        return torch.max(part_KnW, dim=0)
    dtype = torch.uint8 if len(part_KnW) <= 256 else torch.int32
    best_nW, ids_nW = part_KnW[0].clone(), torch.zeros(part_KnW.shape[1:], dtype=dtype)
    for k, logits_nW in enumerate(part_KnW[1:], start=1):
        torch.maximum(ids_nW, (logits_nW > best_nW).to(dtype) * k, out=ids_nW)
        torch.maximum(best_nW, logits_nW, out=best_nW)
    return best_nW, ids_nW


def count_pixels(
    model: nn.Module,
    batches: Iterable[Sequence[tuple[Tensor, npt.NDArray[np.int32]] | None]],
    *,
    num_labels: int,
    ignore_index: int,
    crop_size: int,
    batch_size: int = BATCH,
) -> Counts:
    """Predict batches of `WholeImages` items with a model in eval mode, windows in batches of ``batch_size``.

    Returns:
        The counts, with those of each image by its number in the batches; items that are None are left out.
    """
    numbers: deque[int] = deque()
    labels: dict[int, npt.NDArray[np.int32]] = {}  # labels of the views in progress

    def views() -> Iterator[WholeView]:
        number = 0
        for items in batches:
            for item in items:
                if item is not None:
                    numbers.append(number)
                    labels[number] = item[1]
                    yield WholeView(item[0], (item[1].shape[0], item[1].shape[1]))
                number += 1

    found = Counts(np.zeros((num_labels, num_labels), np.int64), ignore_index)
    for band in logit_bands(model, views(), crop_size, batch_size, classes=num_labels):
        _, rows, columns = band.logits_KnW.shape
        part = slice(band.top, band.top + rows), slice(band.left, band.left + columns)
        found.add(numbers[0], band.logits_KnW, labels[numbers[0]][part])
        if band.last:
            del labels[numbers.popleft()]
    return found
