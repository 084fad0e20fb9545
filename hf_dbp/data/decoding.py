"""From stored values to arrays (height, width, channels), and what becomes of images that cannot be read.

A value is what a data set stores of an image: {"bytes", "path"} of an encoded picture, a decoded picture, or an array.
An image that cannot be decoded raises `UnreadableImageError`; `UnreadableImages` counts and lists those of a run, over
all loader workers, and ends the run when they are too many.
"""

from __future__ import annotations

import io
import logging
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["UnreadableImageError", "UnreadableImages", "decode", "encoded_bytes", "to_array", "too_many"]

logger = logging.getLogger(__name__)

DECODING_ERRORS = (  # what Pillow raises on damaged pictures
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class UnreadableImageError(ValueError):
    """An image that cannot be decoded, or not as the wanted number of channels."""


class UnreadableImages:
    """The images of one list that turned out to be unreadable; shared by all worker processes of a loader.

    Args:
        num_images: length of the list.
        limit: how many are tolerated.
    """

    def __init__(self, num_images: int, limit: int) -> None:
        self.flags, self.limit = torch.zeros(num_images, dtype=torch.bool), limit
        self.flags.share_memory_()  # type: ignore[no-untyped-call]

    def add(self, index: int, error: UnreadableImageError) -> None:
        """Count image ``index``, once however often it is met.

        Raises:
            ValueError: that makes more than the limit.
        """
        if self.flags[index]:
            return
        self.flags[index] = True
        logger.warning("skipped an unreadable image: %s", error)
        if len(self) > self.limit:
            raise too_many(self.limit, error)

    def __len__(self) -> int:
        return int(self.flags.sum())

    def indices(self) -> list[int]:
        """Indices of the unreadable images found so far."""
        return [int(index) for index in self.flags.nonzero()[:, 0]]


def too_many(limit: int, last: object) -> ValueError:
    """The error that ends a run on too many unreadable images."""
    return ValueError(
        f"more than {limit} unreadable images, the last: {last}; "
        "repair the data, or raise --max_unreadable if they can be left out"
    )


def encoded_bytes(value: Any) -> bytes:
    """The bytes of an encoded picture {"bytes", "path"}, from its file if need be; of an array, those of its values.

    Raises:
        OSError: the file cannot be read.
    """
    if isinstance(value, dict):
        if value["bytes"] is not None or value["path"] is None:
            return bytes(value["bytes"] or b"")
        return Path(value["path"]).read_bytes()
    return np.ascontiguousarray(np.asarray(value)).tobytes()


def decode(value: Any, num_channels: int | None, name: str) -> NDArray[np.generic]:
    """A stored value as (height, width, channels), turned upright as its EXIF data says; see `to_array`.

    Raises:
        UnreadableImageError: damaged, empty or not a picture, or of another number of channels; begins with ``name``.
    """
    try:
        if isinstance(value, dict):
            with Image.open(io.BytesIO(encoded_bytes(value))) as picture:
                picture.load()
                value = ImageOps.exif_transpose(picture)
        return to_array(value, num_channels)
    except DECODING_ERRORS as error:
        reason = "it is no picture" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UnreadableImageError(f"{name}: {reason}") from error


def to_array(image: Any, num_channels: int | None) -> NDArray[np.generic]:
    """A picture or array as (height, width, channels) with the wanted number of channels.

    Pictures become RGB for 3 channels (the default) and grey for 1; 16-bit grey pictures keep their depth. Arrays must
    have the wanted number.

    Raises:
        ValueError: the image has another number of channels than wanted and cannot be converted.
    """
    if isinstance(image, Image.Image):
        if image.mode in ("I;16", "I;16L", "I;16B", "I", "F"):
            grey = np.asarray(image)[..., None]
            grey = grey.astype(np.uint16) if image.mode == "I" else grey
            if num_channels not in (None, 1, 3):
                raise _wrong_channels(grey, num_channels)
            return np.repeat(grey, num_channels or 1, axis=2)
        if num_channels in (None, 1, 3):
            array = np.asarray(image.convert("L" if num_channels == 1 else "RGB"))
            return array if array.ndim == 3 else array[..., None]
    array = np.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    if num_channels not in (None, array.shape[2]):
        raise _wrong_channels(array, num_channels)
    return array


def _wrong_channels(array: NDArray[np.generic], num_channels: int | None) -> ValueError:
    return ValueError(
        f"an image of shape {array.shape} (height, width, channels) cannot be read as {num_channels} channels; "
        f"pass --num_channels {array.shape[2]} or convert the images"
    )
