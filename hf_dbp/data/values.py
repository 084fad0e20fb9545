"""What stored values mean, stated once for training, evaluation, inspection, image processors and prediction.

    stored                      held as    in [0, 1]
    bool                        uint8      0 and 1 as 0 and 255
    uint8                       uint8      v / 255
    uint16                      uint16     v / 65535
    float, all other integers   float32    (v - low) / (high - low), with the range [low, high] of the data set

The range of a data set is [0, 1] if all measured values lie in it, else their minimum and maximum: CT in Hounsfield
units, heights, temperatures, plain NumPy integers. It is measured once, on training images, kept in the model's image
processor as ``value_range``, and used for every image from then on. Values outside are not clipped.

The images of a data set are either all unsigned or all float. NaN and infinite values are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_dbp.errors import UserError

__all__ = ["UNIT", "ValueRange", "displayed", "in_unit_range", "pixel_values", "processor_scaling", "unit_scale"]

ValueRange = tuple[float, float]  # low, high
UNIT: ValueRange = (0.0, 1.0)


def pixel_values(array: NDArray[Any]) -> NDArray[Any]:
    """An array of pixels (height, width, channels), converted to the type in the table above.

    Raises:
        ValueError: it does not have three axes, or its values are not numbers.
    """
    if array.ndim != 3 or array.dtype.kind not in "buif":
        raise UserError(f"an array of {array.dtype} and shape {array.shape} is not an image")
    if array.dtype in (np.uint8, np.uint16, np.float32):
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    with np.errstate(over="ignore"):  # values beyond float32 become infinite, which makes the image unreadable
        return array.astype(np.float32)


def unit_scale(dtype: np.dtype[Any], value_range: ValueRange) -> tuple[float, float]:
    """``low`` and ``factor`` that map values of this type to [0, 1]: (value - low) * factor.

    Raises:
        UserError: `pixel_values` never returns this type.
    """
    if dtype.kind == "f":
        low, high = value_range
        return low, 1.0 / (high - low)
    if dtype not in (np.uint8, np.uint16):
        raise UserError(f"images of {dtype} are not supported; convert them to uint8, uint16 or float")
    return 0.0, 1.0 / float(np.iinfo(dtype).max)


def in_unit_range(values: NDArray[Any], dtype: np.dtype[Any], value_range: ValueRange) -> NDArray[np.float32]:
    """The values in [0, 1] as float32.

    Args:
        values: an image, or a resampled one.
        dtype: the type of the image.
        value_range: range of the data set, for float images.
    """
    low, factor = unit_scale(dtype, value_range)
    unit = values.astype(np.float32)
    if low:
        unit -= np.float32(low)
    unit *= np.float32(factor)
    return unit


def displayed(image_HWC: NDArray[Any], value_range: ValueRange) -> NDArray[Any]:
    """The image in [0, 1], to look at: RGB unchanged; otherwise the first channel, in grey."""
    pixels = np.clip(in_unit_range(image_HWC, image_HWC.dtype, value_range), 0, 1)
    return pixels if pixels.shape[2] == 3 else np.repeat(pixels[..., :1], 3, axis=2)


def processor_scaling(
    dtype: np.dtype[Any], value_range: ValueRange, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    """The fields that make a stock image processor treat stored values as training does.

    It computes (value * rescale_factor - image_mean) / image_std, so the mean absorbs ``low``. If the model takes 8-bit
    RGB, grey, palette, RGBA and CMYK pictures become RGB, as on reading; transparent pixels become white.

    Args:
        dtype: type of the images.
        value_range: range of the data set, for float images.
        mean, std: mean and standard deviation per channel of values in [0, 1].
    """
    low, factor = unit_scale(dtype, value_range)
    scaling: dict[str, Any] = {
        "do_rescale": factor != 1,
        "rescale_factor": factor,
        "image_mean": [m + low * factor for m in mean],
        "image_std": list(std),
    }
    if dtype == np.uint8 and len(mean) == 3:
        scaling["do_convert_rgb"] = True
    return scaling | ({"value_range": list(value_range)} if dtype.kind == "f" else {})
