"""The input of a masked autoencoder: views of images, and the noise that decides which patches are masked.

`MaskedImages` returns {pixel_values (C, H, W) float32, noise (T,) float32}. Crop, flip and noise are functions of
(seed, epoch, image), in evaluation of (seed, image): the same for any number of processes, after any resume, and for
every method compared. `EpochSampler` passes the epoch to the workers as part of the index.

With ``on_device`` the loader does not finish training views: it returns a part of the image as uint8 (h, w, C) and
whether to flip it, `collate` joins the parts of a batch, and `MaskedImages.finished` makes the views on the device that
holds the batch. This works only for 8-bit images.

An image that cannot be read is skipped: in training the next readable one takes its place in the batch, so batches keep
their size on every process; evaluation leaves it out (`EvaluationViews`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_dbp.data.augmentation import Box, center_box, image_rng, native_tile, random_resized_crop, resized
from hf_dbp.data.decoding import UnreadableImageError
from hf_dbp.data.images import ImageList
from hf_dbp.data.order import EpochSampler
from hf_dbp.data.resampling import collate, resample
from hf_dbp.data.values import unit_scale
from hf_dbp.errors import UserError

__all__ = ["EpochSampler", "EvaluationViews", "MaskedImages", "collate", "interpolation_loss"]

EVALUATION = 0x65766C  # used in place of the epoch


class MaskedImages(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Views of images for masked autoencoding.

    Indexed by (epoch, index) for training views and by index for evaluation views.

    Args:
        images: the images.
        size: (height, width) of a view in pixels.
        patch_size: side of a patch in pixels.
        mean, std: mean and standard deviation per channel, in [0, 1].
        seed: seed of crops, flips and masks.
        flip: probability of a horizontal flip in training views.
        native: views are tiles at native resolution instead of scaled-down parts of any size.
        on_device: training views are flipped, resized and normalised on the device.
    """

    def __init__(
        self,
        images: ImageList,
        *,
        size: tuple[int, int],
        patch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        flip: float = 0.5,
        native: bool = False,
        on_device: bool = False,
    ) -> None:
        self.images, self.size, self.seed, self.flip, self.native = images, size, seed, flip, native
        self.on_device = on_device
        self.num_patches = (size[0] // patch_size) * (size[1] // patch_size)
        self.mean, self.std = np.asarray(mean, np.float32), np.asarray(std, np.float32)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        """The view of the image, or of the next one if it cannot be read."""
        if isinstance(index, tuple):
            return self.training_view(*index)
        return self.evaluation_view(index, self.images.readable(index))

    def training_view(self, epoch: int, index: int) -> dict[str, Any]:
        """A random part of the image, perhaps flipped: as a view, or as the input of `finished`."""
        rng = image_rng(self.seed, epoch, index)
        noise = torch.from_numpy(rng.random(self.num_patches, dtype=np.float32))
        draw = native_tile if self.native else random_resized_crop

        def choose(size: tuple[int, int]) -> Box:
            return draw(rng, size, self.size)

        part = self.images.readable_part(index, choose, self.size)
        flip = rng.random() < self.flip
        if self.on_device:
            if part.dtype != np.uint8:
                raise UserError(f"an image of {part.dtype} among 8-bit ones; pass --augment_on_device false")
            if part.shape[0] > 2 * self.size[0] or part.shape[1] > 2 * self.size[1]:
                part = resized(part, self.size)  # never more bytes than the finished view
            return {"pixel_values": part, "flip": flip, "noise": noise}
        part = cv2.flip(part, 1).reshape(part.shape) if flip else part
        return {"pixel_values": self.normalized(resized(part, self.size), part.dtype), "noise": noise}

    def finished(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The views of a batch from `collate`, made on the device that holds it."""
        if "flip" not in batch:
            return batch
        pixels_BCHW = resample(batch["pixel_values"], batch["sizes"], batch["flip"], self.size)
        for channel, (mean, std) in enumerate(zip(self.mean.tolist(), self.std.tolist(), strict=True)):
            pixels_BCHW[:, channel].mul_(1 / (255 * std)).sub_(mean / std)
        return {"pixel_values": pixels_BCHW, "noise": batch["noise"]}

    def evaluation_view(self, index: int, image: NDArray[np.generic]) -> dict[str, Tensor]:
        """The central part of ``image``, with the mask of this index."""
        noise = image_rng(self.seed, EVALUATION, index).random(self.num_patches, dtype=np.float32)
        shape = (image.shape[0], image.shape[1])
        box = native_tile(None, shape, self.size) if self.native else center_box(shape, self.size)
        pixels = self.normalized(resized(image, self.size, box), image.dtype)
        return {"pixel_values": pixels, "noise": torch.from_numpy(noise)}

    def normalized(self, view_HWC: NDArray[Any], dtype: np.dtype[Any]) -> Tensor:
        """(H, W, C), resampled from an image of this type, to (C, H, W) with zero mean and unit variance per
        channel."""
        low, factor = unit_scale(dtype, self.images.value_range)
        pixels_CHW = np.moveaxis(view_HWC, 2, 0).astype(np.float32, order="C")
        if low:
            pixels_CHW -= np.float32(low)
        pixels_CHW *= (np.float32(factor) / self.std)[:, None, None]
        pixels_CHW -= (self.mean / self.std)[:, None, None]
        return torch.from_numpy(pixels_CHW)


class EvaluationViews(torch.utils.data.Dataset[dict[str, Tensor] | None]):
    """Evaluation views; None for an image that cannot be read."""

    def __init__(self, data: MaskedImages, indices: Sequence[int]) -> None:
        self.data, self.indices = data, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Tensor] | None:
        try:
            return self.data.evaluation_view(self.indices[index], self.data.images[self.indices[index]])
        except UnreadableImageError:
            return None

    @staticmethod
    def collate(views: list[dict[str, Tensor] | None]) -> dict[str, Tensor]:
        """A batch of the readable views; it may be empty."""
        readable = [view for view in views if view is not None]
        return torch.utils.data.default_collate(readable) if readable else {}


def interpolation_loss(data: MaskedImages, patch_size: int, mask_ratio: float) -> float:
    """Loss of the simplest guess, which a trained model must beat: masked patches filled from the means of visible
    ones.

    Each masked patch gets, per channel, one value: the means of the visible patches interpolated linearly between
    patch centres (nearest outside their hull). The loss is the mean squared error over masked pixels, like the model's
    loss without per-patch normalisation, over the evaluation views with their fixed masks.
    """
    from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator

    rows, columns = data.size[0] // patch_size, data.size[1] // patch_size
    centres = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1).reshape(-1, 2)
    losses = []
    views = EvaluationViews(data, range(len(data)))
    for index in range(len(views)):
        if (sample := views[index]) is None:
            continue
        pixels = sample["pixel_values"].numpy()
        patches = pixels.reshape(len(pixels), rows, patch_size, columns, patch_size)
        patches = patches.transpose(1, 3, 0, 2, 4).reshape(rows * columns, len(pixels), -1)  # (T, C, p * p)
        order = np.argsort(sample["noise"].numpy(), kind="stable")
        visible, masked = np.split(order, [int(len(order) * (1 - mask_ratio))])
        means = patches[visible].mean(axis=-1)
        guess = NearestNDInterpolator(centres[visible], means)(centres[masked])
        if len(visible) > 3 and np.linalg.matrix_rank(centres[visible] - centres[visible[0]]) == 2:
            linear = LinearNDInterpolator(centres[visible], means)(centres[masked])
            guess = np.where(np.isnan(linear), guess, linear)
        losses.append(float(np.square(patches[masked] - guess[..., None]).mean()))
    return float(np.mean(losses))
