"""The input of a classifier: augmented views in training, the central part in evaluation.

Training: random resized crop and flip, RandAugment, normalisation, random erasing. Every draw comes from (seed, epoch,
image), as in pre-training: a resumed run, and any number of workers or processes, see the same views. With balanced
sampling, an index gives an image drawn from a randomly drawn class.

Evaluation: the largest central part with the view's aspect, resized (bicubic). The saved image processor does the same.

Shapes: H, W the view; C channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import BeitImageProcessorPil

from hf_dbp.data.augmentation import Box, center_box, image_rng, normalized, random_resized_crop, resized
from hf_dbp.data.classes import ClassifiedImages
from hf_dbp.data.decoding import UnreadableImageError
from hf_dbp.data.values import ValueRange, in_unit_range, processor_scaling
from hf_dbp.downstream.classification.augmentation import erased, operations_for, rand_augment
from hf_dbp.errors import UserError

__all__ = ["Augmentation", "CentralViews", "TrainingViews", "central_view", "image_processor"]


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """The strength of each augmentation; defaults are He et al.'s.

    Args:
        scale: smallest and largest share of an image's area that a view shows.
        flip: probability of a horizontal flip.
        operations: number of RandAugment operations per image; 0 for none.
        magnitude: magnitude of RandAugment, 0 to 10.
        erasing: probability of random erasing.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    operations: int = 2
    magnitude: float = 9.0
    erasing: float = 0.25


class TrainingViews(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Augmented views: pixel_values (C, H, W) and labels (), indexed by (epoch, index).

    Args:
        data: the images and their classes.
        size: (height, width) of a view.
        augmentation: the strength of each augmentation.
        mean, std: per channel, in [0, 1].
        seed: seed of all draws.
        balanced: draw every class equally often.

    Attributes:
        left_out: operations of RandAugment that do not suit such images, with the reason.
    """

    def __init__(
        self,
        data: ClassifiedImages,
        size: tuple[int, int],
        augmentation: Augmentation,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        balanced: bool = False,
    ) -> None:
        self.data, self.images, self.size, self.augmentation, self.seed = data, data.images, size, augmentation, seed
        self.mean_C, self.std_C = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        eight_bits = data.images.readable(0).dtype == np.uint8
        self.operations, self.left_out = operations_for(len(mean), eight_bits)
        by_class = np.split(np.argsort(data.labels_N, kind="stable"), np.cumsum(data.counts_K)[:-1])
        self.rows = [rows for rows in by_class if len(rows)]
        self.balanced = balanced

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Tensor]:
        rng = image_rng(self.seed, *index)
        number = int(rng.choice(self.rows[int(rng.integers(len(self.rows)))])) if self.balanced else index[1]
        part, label = self.readable(number, rng)
        view = resized(part, self.size)
        if rng.random() < self.augmentation.flip:
            view = cv2.flip(view, 1).reshape(view.shape)
        image_HWC = in_unit_range(view, part.dtype, self.images.value_range)
        if self.augmentation.operations:
            image_CHW = torch.from_numpy(np.ascontiguousarray(np.moveaxis(image_HWC, 2, 0)))
            count, magnitude = self.augmentation.operations, self.augmentation.magnitude
            image_CHW = rand_augment(image_CHW, self.operations, rng, operations=count, magnitude=magnitude)
            image_HWC = np.moveaxis(image_CHW.numpy(), 0, 2)
        pixels = erased(normalized(image_HWC, self.mean_C, self.std_C), rng, self.augmentation.erasing)
        return {"pixel_values": pixels, "labels": torch.tensor(label)}

    def readable(self, index: int, rng: np.random.Generator) -> tuple[NDArray[Any], int]:
        """A random part of the image, or of the next one that can be read, and its class. UserError if none can."""

        def choose(size: tuple[int, int]) -> Box:
            return random_resized_crop(rng, size, self.size, scale=self.augmentation.scale)

        for offset in range(len(self)):
            row = (index + offset) % len(self)
            try:
                return self.images.part(row, choose, self.size), int(self.data.labels_N[row])
            except UnreadableImageError as error:
                last = str(error)
        raise UserError(f"none of the {len(self)} images can be read, the last: {last}")


class CentralViews(torch.utils.data.Dataset[tuple[int, Tensor, int] | None]):
    """Evaluation items: index, pixels (C, H, W) and class; None if the image cannot be read."""

    def __init__(
        self, data: ClassifiedImages, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.data, self.images, self.size, self.mean, self.std = data, data.images, size, mean, std

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[int, Tensor, int] | None:
        try:
            image = self.images[index]
        except UnreadableImageError:
            return None
        return (
            index,
            central_view(image, self.size, self.images.value_range, self.mean, self.std),
            int(self.data.labels_N[index]),
        )


def central_view(
    image_HWC: NDArray[Any],
    size: tuple[int, int],
    value_range: ValueRange,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """The largest central part with the view's aspect, at the view's size, normalised: (C, H, W)."""
    box = center_box((image_HWC.shape[0], image_HWC.shape[1]), size)
    view = in_unit_range(resized(image_HWC, size, box), image_HWC.dtype, value_range)
    return normalized(view, np.asarray(mean, np.float32), np.asarray(std, np.float32))


def image_processor(views: CentralViews) -> BeitImageProcessorPil:
    """The stock image processor of a classifier, which prepares images as evaluation does.

    It resizes the short side and crops the centre only for 8-bit images with 1 or 3 channels and square views; others
    it only normalises, so bring them to the view's size first.
    """
    dtype, (height, width) = views.images.readable(0).dtype, views.size
    scaling = processor_scaling(dtype, views.images.value_range, views.mean, views.std)
    resizes = len(views.mean) in (1, 3) and dtype == np.uint8 and height == width
    crop = {"height": height, "width": width}
    size = {"shortest_edge": height} if resizes else crop
    return BeitImageProcessorPil(
        do_resize=resizes, size=size, resample=3, do_center_crop=resizes, crop_size=crop, **scaling
    )
