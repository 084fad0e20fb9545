"""The input of a detector: random parts of images in training, whole images in evaluation, each resized to one size.

Images are stretched to the view, as RF-DETR does; boxes are shares of it, so stretching does not move them. A training
view shows a random part with about the aspect of its image, perhaps flipped left to right; an object is learned if at
least `VISIBLE` of its box lies in the view, and its box ends at the view's edge. Every draw comes from (seed, epoch,
image): a resumed run, and any number of workers or processes, see the same views.

Evaluation sees whole images; the saved image processor prepares them likewise.

Shapes: H, W the view; C channels; N objects.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DeformableDetrImageProcessorPil

from hf_dbp.data.augmentation import Box, image_rng, normalized, random_resized_crop, resized
from hf_dbp.data.decoding import UnreadableImageError
from hf_dbp.data.values import ValueRange, in_unit_range, processor_scaling
from hf_dbp.downstream.detection.data import ObjectImages
from hf_dbp.downstream.detection.objects import Objects
from hf_dbp.errors import UserError

__all__ = ["Item", "TrainingViews", "WholeImages", "collate", "image_processor", "seen", "targets"]

VISIBLE = 0.1  # least share of a box

Labels = dict[
    str, Tensor
]  # class_labels (N), boxes (N, 4): centre and sides as shares of the view; maybe masks (N, H, W)


def targets(objects: Objects, box: Box, size: tuple[int, int], *, flip: bool = False) -> Labels:
    """What the model should find in a part of an image; crowds are left out.

    Args:
        objects: those of the image.
        box: the part, in pixels of the image.
        size: height and width of the view.
        flip: whether the view is flipped left to right.
    """
    left, top, right, bottom = box
    boxes_N4 = objects.boxes_N4.clip([left, top, left, top], [right, bottom, right, bottom])
    boxes_N4 = (boxes_N4 - [left, top, left, top]) / [right - left, bottom - top, right - left, bottom - top]
    height, width = objects.size
    inside_N4 = objects.boxes_N4.clip(0, [width, height, width, height])
    whole_N = (inside_N4[:, 2:] - inside_N4[:, :2]).prod(axis=1) / ((right - left) * (bottom - top))
    there_N = (boxes_N4[:, 2:] - boxes_N4[:, :2]).prod(axis=1)
    rows = np.flatnonzero(~objects.crowd_N & (there_N > 0) & (there_N >= VISIBLE * whole_N))
    boxes_N4 = boxes_N4[rows]
    if flip:
        boxes_N4 = np.stack([1 - boxes_N4[:, 2], boxes_N4[:, 1], 1 - boxes_N4[:, 0], boxes_N4[:, 3]], axis=1)
    centres_N4 = np.concatenate([(boxes_N4[:, :2] + boxes_N4[:, 2:]) / 2, boxes_N4[:, 2:] - boxes_N4[:, :2]], axis=1)
    found = {
        "class_labels": torch.from_numpy(objects.classes_N[rows]),
        "boxes": torch.from_numpy(centres_N4.astype(np.float32)),
    }
    if objects.runs or not len(objects):
        masks = [cut_mask(objects.runs[int(row)].pixels(), box, size, flip) for row in rows]
        found["masks"] = torch.from_numpy(np.stack(masks) if masks else np.zeros((0, *size), np.uint8))
    return found


def cut_mask(pixels_HW: NDArray[np.uint8], box: Box, size: tuple[int, int], flip: bool) -> NDArray[np.uint8]:
    """The pixels of an object in a view."""
    left, top, right, bottom = (round(edge) for edge in box)
    part = cv2.resize(pixels_HW[top:bottom, left:right], (size[1], size[0]), interpolation=cv2.INTER_NEAREST_EXACT)
    return np.ascontiguousarray(part[:, ::-1]) if flip else part


def seen(
    image_HWC: NDArray[Any],
    size: tuple[int, int],
    value_range: ValueRange,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    flip: bool = False,
) -> Tensor:
    """An image as the model sees it: stretched to the view, normalised: (C, H, W)."""
    view = np.asarray(resized(image_HWC, size))
    if flip:
        view = cv2.flip(view, 1).reshape(view.shape)
    unit = in_unit_range(view, image_HWC.dtype, value_range)
    return normalized(unit, np.asarray(mean, np.float32), np.asarray(std, np.float32))


class TrainingViews(torch.utils.data.Dataset[dict[str, Any]]):
    """Augmented views: pixel_values (C, H, W) and labels, indexed by (epoch, index).

    Args:
        data: the images and their objects.
        size: height and width of a view.
        mean, std: per channel, in [0, 1].
        seed: seed of all draws.
        scale: smallest share of an image's area that a view shows.
        flip: probability of a flip left to right.
    """

    def __init__(
        self,
        data: ObjectImages,
        size: tuple[int, int],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        scale: float = 0.3,
        flip: float = 0.5,
    ) -> None:
        self.data, self.images, self.size, self.mean, self.std = data, data.images, size, mean, std
        self.seed, self.scale, self.flip = seed, scale, flip

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        """The view of the image, or of the next one if it cannot be read. UserError if none can."""
        rng = image_rng(self.seed, *index)
        for offset in range(len(self)):
            try:
                return self.view((index[1] + offset) % len(self), rng)
            except UnreadableImageError as error:
                last = error
        raise UserError(f"none of the {len(self)} images can be read, the last: {last}")

    def view(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """A random part of the image. UnreadableImageError if it cannot be read."""
        drawn: list[tuple[Objects, Box]] = []

        def choose(size: tuple[int, int]) -> Box:
            objects = self.data.of(index, size)
            drawn.append((objects, random_resized_crop(rng, size, size, scale=(self.scale, 1.0))))
            return drawn[-1][1]

        part = self.images.part(index, choose, self.size)
        flip = bool(rng.random() < self.flip)
        pixels = seen(part, self.size, self.images.value_range, self.mean, self.std, flip=flip)
        return {"pixel_values": pixels, "labels": targets(*drawn[-1], self.size, flip=flip)}


def collate(views: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch: pixel_values (B, C, H, W), and the labels of each image."""
    return {
        "pixel_values": torch.stack([view["pixel_values"] for view in views]),
        "labels": [view["labels"] for view in views],
    }


@dataclasses.dataclass(frozen=True)
class Item:
    """An image of an evaluation: its number, pixels (C, H, W), what should be found in the view, and its objects."""

    index: int
    pixels: Tensor
    labels: Labels
    objects: Objects


class WholeImages(torch.utils.data.Dataset[Item | None]):
    """Whole images for evaluation; None for one that cannot be read."""

    def __init__(self, data: ObjectImages, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> None:
        self.data, self.images, self.size, self.mean, self.std = data, data.images, size, mean, std

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Item | None:
        try:
            image_HWC = self.images[index]
            objects = self.data.of(index, (image_HWC.shape[0], image_HWC.shape[1]))
        except UnreadableImageError as error:
            self.images.unreadable.add(index, error)
            return None
        pixels = seen(image_HWC, self.size, self.images.value_range, self.mean, self.std)
        height, width = objects.size
        return Item(index, pixels, targets(objects, (0.0, 0.0, float(width), float(height)), self.size), objects)


def image_processor(views: WholeImages) -> DeformableDetrImageProcessorPil:
    """The stock image processor of a detector, which prepares images as evaluation does.

    RF-DETR's own needs torchvision; that of Deformable DETR, whose outputs mean the same, does not. It resizes only
    8-bit images with 1 or 3 channels; others it only normalises, so bring them to the view's size first.
    """
    dtype, (height, width) = views.images.readable(0).dtype, views.size
    scaling = processor_scaling(dtype, views.images.value_range, views.mean, views.std)
    resizes = len(views.mean) in (1, 3) and dtype == np.uint8
    size = {"height": height, "width": width}
    return DeformableDetrImageProcessorPil(do_resize=resizes, size=size, resample=3, do_pad=False, **scaling)
