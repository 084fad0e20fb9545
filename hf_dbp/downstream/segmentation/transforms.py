"""The paper's joint augmentation of an image and its mask (method: fine-tuning recipe).

1. Scale the long edge to `long_edge` times a factor drawn in [0.5, 2.0] (image bicubic and antialiased, mask nearest);
   without `long_edge`, scale the native resolution by that factor.
2. Crop to `crop_size` at random, or at random around a pixel that must be inside (`rare`); if the scaled image is
   smaller, pad right and below (the image with the channel mean, the mask with `ignore_index`).
3. Flip horizontally half of the time.
4. Brightness and contrast +-25 %; for three channels (taken as RGB) hue +-15 degrees, saturation and value +-25 %.
   Other channel counts have no hue: all channels get the same brightness and contrast factors. This acts on values in
   [0, 1], the range of their depth or of the data set; the excess of float values outside it is added unchanged.
5. Normalise per channel.

Steps 1 and 2 are one resampling of a box of the source. Every draw comes from the given generator, a function of (seed,
epoch, index): resumed runs and any number of processes or workers see the same crops.

Shapes: H, W source height and width; C channels; S crop size.
"""

import dataclasses
import math
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from hf_dbp.data.augmentation import cut, resized
from hf_dbp.data.values import UNIT, ValueRange, in_unit_range

__all__ = ["Augmentation", "long_edge_size"]

Array = npt.NDArray[Any]
FloatImage = npt.NDArray[np.float32]


def long_edge_size(height: int, width: int, long_edge: int | None, factor: float = 1.0) -> tuple[int, int]:
    """Return (height, width) after scaling the long edge to `long_edge * factor` pixels, or all by `factor` if None."""
    scale = factor * (long_edge / max(height, width) if long_edge else 1.0)
    return max(1, int(height * scale)), max(1, int(width * scale))  # rounded down, as in transformers' processors


def _starts(side: int, crop: int, inside: float | None = None) -> tuple[int, int]:
    """The first and the last start of a crop along a side of the scaled image, given a point that it must contain."""
    last = max(side - crop, 0)
    if inside is None:
        return 0, last
    return min(max(0, math.floor(inside) - crop + 1), last), min(math.floor(inside), last)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Steps 1 to 4 above; defaults are the paper's."""

    crop_size: int
    long_edge: int | None
    ignore_index: int
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    brightness: float = 0.25
    contrast: float = 0.25
    hue_degrees: float = 15.0
    saturation: float = 0.25
    value: float = 0.25

    def __call__(
        self,
        image_HWC: Array,
        mask_HW: Array,
        mean_C: FloatImage,
        rng: np.random.Generator,
        value_range: ValueRange = UNIT,
        inside: tuple[int, int] | None = None,
    ) -> tuple[FloatImage, npt.NDArray[np.int64]]:
        """Return an S x S x C image, [0, 1] being the range of its values, and its S x S mask.

        Args:
            image_HWC: uint8, uint16 or float.
            mask_HW: class ids.
            mean_C: value for padded pixels, in [0, 1].
            rng: the source of all randomness.
            value_range: range of the data set, for float images, see `hf_dbp.data.values`.
            inside: row and column of a pixel that the crop must contain; None for any crop.
        """
        crop = self.crop_size
        height, width = mask_HW.shape
        scaled = long_edge_size(height, width, self.long_edge, rng.uniform(*self.scale))
        ranges = [_starts(side, crop) for side in scaled]
        if inside is not None:
            ranges = [
                _starts(side, crop, (at + 0.5) * side / whole)
                for side, at, whole in zip(scaled, inside, mask_HW.shape, strict=True)
            ]
        top, left = (rng.integers(first, last + 1) for first, last in ranges)
        view = (min(scaled[0], crop), min(scaled[1], crop))
        box = (
            left * width / scaled[1],
            top * height / scaled[0],
            (left + view[1]) * width / scaled[1],
            (top + view[0]) * height / scaled[0],
        )
        image = np.broadcast_to(mean_C, (crop, crop, mean_C.size)).astype(np.float32)
        pixels = in_unit_range(resized(image_HWC, view, box), image_HWC.dtype, value_range)
        excess: FloatImage | float = 0.0
        if image_HWC.dtype.kind == "f":
            part = in_unit_range(cut(image_HWC, box), image_HWC.dtype, value_range)
            beyond = pixels.clip(min(part.min(), 0), max(part.max(), 1))  # without the resampling's overshoot
            excess = beyond - beyond.clip(0, 1)
        mask = np.full((crop, crop), self.ignore_index, dtype=np.int64)
        picture = Image.fromarray(mask_HW.astype(np.int32))
        mask[: view[0], : view[1]] = np.asarray(picture.resize(view[::-1], Image.Resampling.NEAREST, box=box))
        image[: view[0], : view[1]] = self.recolored(pixels, rng) + excess
        if rng.random() < self.flip:
            image, mask = image[:, ::-1], mask[:, ::-1]
        return image, mask

    def recolored(self, image_HWC: FloatImage, rng: np.random.Generator) -> FloatImage:
        """Return the image in [0, 1] with changed brightness, contrast and, if RGB, hue, saturation and value."""
        brightness, contrast, saturation, value = (
            np.float32(1 + rng.uniform(-limit, limit))
            for limit in (self.brightness, self.contrast, self.saturation, self.value)
        )
        hue = rng.uniform(-self.hue_degrees, self.hue_degrees)
        image: FloatImage = image_HWC * brightness
        image = np.clip((image - image.mean()) * contrast + image.mean(), 0, 1)
        if image.shape[2] != 3:
            return image
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)  # float32: hue in degrees, saturation and value in [0, 1]
        hsv[..., 0] = (hsv[..., 0] + hue) % 360
        hsv[..., 1:] = np.clip(hsv[..., 1:] * (saturation, value), 0, 1)
        rgb: FloatImage = np.clip(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), 0, 1)
        return rgb
