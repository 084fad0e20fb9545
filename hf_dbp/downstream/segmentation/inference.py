"""Whole images through a model that was trained on crops, to class ids at the labels' resolution.

1. Scale the image as training does at factor 1: its long edge to `long_edge` pixels (or leave it at native resolution).
2. Where it is smaller than the crop, pad right and below by the channel mean (0 after normalising), as training does;
   where it is larger, slide a crop-sized window with at least a third of overlap. Every forward sees a full crop.
3. Average the windows' logits, cut off the padding, resize to the label's height and width (bilinear), take the argmax.

Shapes: C channels; K classes; h, w scaled height and width; H, W the label's; S crop size.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hf_dbp.data.augmentation import resized
from hf_dbp.data.decoding import UnreadableImageError
from hf_dbp.data.values import in_unit_range
from hf_dbp.downstream.segmentation.data import LabelledImages, normalized
from hf_dbp.downstream.segmentation.mean_iou import confusion_matrix
from hf_dbp.downstream.segmentation.transforms import long_edge_size

__all__ = ["WholeImages", "count_pixels", "predict_labels", "whole_image_logits", "window_origins"]


@dataclasses.dataclass(frozen=True)
class WholeImages(torch.utils.data.Dataset[tuple[Tensor, npt.NDArray[np.int32]] | None]):
    """Evaluation items: scaled, normalised pixels (C, h, w) and the untouched label (H, W); None if unreadable."""

    images: LabelledImages
    long_edge: int | None
    mean: Sequence[float]
    std: Sequence[float]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, npt.NDArray[np.int32]] | None:
        try:
            image_HWC, label_HW = self.images[index]
        except UnreadableImageError:
            return None
        return self.pixels(image_HWC), label_HW

    def pixels(self, image_HWC: npt.NDArray[Any]) -> Tensor:
        height, width = image_HWC.shape[:2]
        view = long_edge_size(height, width, self.long_edge)
        scaled_HWC = image_HWC if view == (height, width) else resized(image_HWC, view, (0, 0, width, height))
        pixels = in_unit_range(scaled_HWC, image_HWC.dtype, self.images.value_range)
        return normalized(pixels, np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32))


def whole_image_logits(model: nn.Module, pixels: Sequence[Tensor], crop_size: int, batch_size: int) -> list[Tensor]:
    """Return logits (K, h, w), float32, of each image (C, h, w); windows of all images share batches."""
    padded = [
        nn.functional.pad(image, (0, max(0, crop_size - image.shape[2]), 0, max(0, crop_size - image.shape[1])))
        for image in pixels
    ]
    windows = [
        (number, top, left)
        for number, image in enumerate(padded)
        for top in window_origins(image.shape[1], crop_size)
        for left in window_origins(image.shape[2], crop_size)
    ]
    sums: list[Tensor] = []
    counts = [torch.zeros(image.shape[1:], device=image.device) for image in padded]
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        crops = [padded[n][:, top : top + crop_size, left : left + crop_size] for n, top, left in batch]
        logits_BKSS = model(pixel_values=torch.stack(crops)).logits.float()
        sums = sums or [logits_BKSS.new_zeros(logits_BKSS.shape[1], *image.shape[1:]) for image in padded]
        for (n, top, left), logits in zip(batch, logits_BKSS, strict=True):
            sums[n][:, top : top + crop_size, left : left + crop_size] += logits
            counts[n][top : top + crop_size, left : left + crop_size] += 1
    averages = [total / count for total, count in zip(sums, counts, strict=True)]
    return [logits[:, : image.shape[1], : image.shape[2]] for logits, image in zip(averages, pixels, strict=True)]


def window_origins(length: int, crop_size: int) -> list[int]:
    """Where windows begin along a side of ``length`` pixels, at least a crop: even steps, at least a third shared."""
    steps = math.ceil((length - crop_size) / (crop_size * 2 / 3))
    return [round(step * (length - crop_size) / max(steps, 1)) for step in range(steps + 1)]


@torch.no_grad()
def predict_labels(model: nn.Module, data: WholeImages, image_HWC: npt.NDArray[Any], crop_size: int) -> Tensor:
    """Return the class ids (H, W) of one image, as evaluation predicts them; the model must be in eval mode."""
    pixels = data.pixels(image_HWC).to(next(model.parameters()).device)
    logits_Khw = whole_image_logits(model, [pixels], crop_size, batch_size=1)[0]
    return _at_size(logits_Khw, image_HWC.shape[0], image_HWC.shape[1]).argmax(0)


def _at_size(logits_Khw: Tensor, height: int, width: int) -> Tensor:
    return nn.functional.interpolate(logits_Khw[None], size=(height, width), mode="bilinear", align_corners=False)[0]


@torch.no_grad()
def count_pixels(
    model: nn.Module,
    batches: Iterable[Sequence[tuple[Tensor, npt.NDArray[np.int32]] | None]],
    *,
    num_labels: int,
    ignore_index: int,
    crop_size: int,
) -> tuple[npt.NDArray[np.int64], float]:
    """Predict batches of `WholeImages` items with a model in eval mode.

    Returns:
        The K x K confusion matrix, and the sum over labelled pixels of the cross-entropy at the labels' resolution.
    """
    device = next(model.parameters()).device
    confusion_KK, loss_sum = np.zeros((num_labels, num_labels), dtype=np.int64), 0.0
    for items in batches:
        batch = [item for item in items if item is not None]
        if not batch:
            continue
        pixels = [item[0].to(device, non_blocking=True) for item in batch]
        all_logits = whole_image_logits(model, pixels, crop_size, batch_size=len(batch))
        for logits_Khw, (_, label_HW) in zip(all_logits, batch, strict=True):
            logits_KHW = _at_size(logits_Khw, label_HW.shape[0], label_HW.shape[1])
            target_HW = torch.from_numpy(label_HW).to(device, torch.int64)
            loss_sum += nn.functional.cross_entropy(
                logits_KHW[None], target_HW[None], ignore_index=ignore_index, reduction="sum"
            ).item()
            predicted_HW = logits_KHW.argmax(0).to(torch.uint8 if num_labels <= 256 else torch.int32)
            confusion_KK += confusion_matrix([predicted_HW], [label_HW], num_labels, ignore_index)
    return confusion_KK, loss_sum
