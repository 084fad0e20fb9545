"""Decode stored values to arrays (height, width, channels), and handle images that cannot be read.

A value is what a data set stores for an image: {"bytes", "path"} of an encoded picture, a decoded picture, or an array.
If it has {"more"}, the paths of further files, each file holds one channel. An image that cannot be decoded raises
`UnreadableImageError`; `UnreadableImages` counts and lists those of a run, over all loader workers, and ends the run
when there are too many.
"""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from hf_dbp.data.readers import orientation, read_picture
from hf_dbp.data.values import pixel_values
from hf_dbp.errors import UserError

__all__ = [
    "DECODING_ERRORS",
    "UnreadableImageError",
    "UnreadableImages",
    "check_finite",
    "check_fit",
    "check_kind",
    "decode",
    "encoded_bytes",
    "stored",
    "to_array",
    "too_many",
    "unchecked",
    "unturned_masks",
    "wrong_channels",
]

logger = logging.getLogger(__name__)

DECODING_ERRORS = (  # raised by Pillow, tifffile, OpenCV and NumPy on damaged pictures
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    struct.error,
    zlib.error,
    cv2.error,
    Image.DecompressionBombError,
)


class UnreadableImageError(UserError):
    """An image that cannot be decoded, or not with the wanted number of channels."""


class UnreadableImages:
    """The images of one list found to be unreadable so far; shared by all worker processes of a loader.

    Args:
        num_images: length of the list.
        limit: how many are tolerated.
    """

    def __init__(self, num_images: int, limit: int) -> None:
        self.flags, self.limit = torch.zeros(num_images, dtype=torch.bool), limit
        self.flags.share_memory_()  # type: ignore[no-untyped-call]

    def add(self, index: int, error: UnreadableImageError) -> None:
        """Count image ``index`` once, however often it is met.

        Raises:
            ValueError: there are now more than the limit.
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
    """The error that ends a run with too many unreadable images."""
    return UserError(
        f"more than {limit} unreadable images, the last: {last}; "
        "repair the data, or raise --max_unreadable if they can be left out"
    )


def encoded_bytes(value: Any) -> bytes:
    """The bytes of an encoded picture {"bytes", "path"}, from its file if necessary; for an array, those of its values.

    Raises:
        OSError: the file cannot be read.
    """
    if isinstance(value, dict):
        if value["bytes"] is not None or value["path"] is None:
            return bytes(value["bytes"] or b"")
        return b"".join(Path(file).read_bytes() for file in [value["path"], *(value.get("more") or ())])
    return np.ascontiguousarray(np.asarray(value)).tobytes()


def decode(value: Any, num_channels: int | None, name: str) -> NDArray[np.generic]:
    """A stored value as (height, width, channels), turned upright according to its EXIF data; see `to_array`.

    Raises:
        UnreadableImageError: it is damaged, empty or not a picture, has another number of channels, or has NaN or
            infinite values; the message begins with ``name``.
    """
    image_HWC = unchecked(value, num_channels, name)
    check_finite(image_HWC, name)
    return image_HWC


def unchecked(value: Any, num_channels: int | None, name: str) -> NDArray[np.generic]:
    """Like `decode`, but values may be NaN. A large file may come as a memory map, of which nothing has been read."""
    try:
        return to_array(stored(value), num_channels)
    except DECODING_ERRORS as error:
        reason = "it is not a picture" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UnreadableImageError(f"{name}: {reason}") from error


def check_finite(image_HWC: NDArray[Any], name: str) -> None:
    """UnreadableImageError if values are NaN or infinite, because one of them spoils a whole batch."""
    if image_HWC.dtype.kind != "f":
        return
    finite_HWC = np.isfinite(image_HWC)
    if not finite_HWC.all():
        count, share = int((~finite_HWC).sum()), 1 - float(finite_HWC.mean())
        raise UnreadableImageError(
            f"{name}: {count} of its values ({share:.3%}) are NaN or infinite; replace them, e.g. by the image's mean, "
            "and mark their pixels as ignored in its mask"
        )


def check_kind(dtype: np.dtype[Any], kind: str, name: str) -> None:
    """UnreadableImageError if an image has float values among unsigned ones (``kind`` "u"), or the reverse."""
    if kind and dtype.kind != kind:
        others = "unsigned integers" if kind == "u" else "float"
        raise UnreadableImageError(
            f"{name}: its values are {dtype}, those of the first image are {others}, which have another range; "
            "convert the images to one type"
        )


def check_fit(mask: tuple[int, ...], image: tuple[int, ...], name: str) -> None:
    """UnreadableImageError if a mask has another height and width than its image; begins with ``name``."""
    if mask[:2] != image[:2]:
        raise UnreadableImageError(
            f"{name}: the mask has {mask[0]} x {mask[1]} pixels (height x width) but the image {image[0]} x {image[1]}"
            "; a mask must label every pixel of its image: make it again at that size, or scale it without "
            "interpolation"
        )


def unturned_masks(pairs: Iterable[tuple[Any, Any]]) -> str:
    """A warning about images with EXIF orientation whose masks have none; empty if there are none.

    Reading turns the image but not the mask; only a 90 degree turn of a non-square image would reveal the mismatch.

    Args:
        pairs: the stored values of images and masks.
    """
    turned = [image for image, mask in pairs if turn(image) != 1 and turn(mask) == 1]
    if not turned:
        return ""
    return (
        f"{len(turned)} images are turned upright by their EXIF data, e.g. {turned[0]['path'] or 'one unnamed'}, "
        "but their masks have none and are used unturned: if the masks were drawn on the unturned pixels, remove the "
        "orientation from the images"
    )


def turn(value: Any) -> int:
    """The orientation (EXIF) of a stored value, see `hf_dbp.data.readers.orientation`."""
    if not isinstance(value, dict):
        return 1
    given = value["bytes"] is not None or value["path"] is None
    return orientation(bytes(value["bytes"] or b"") if given else str(value["path"]))


def stored(value: Any) -> Any:
    """A stored value as a picture or an array, with unchanged values.

    Raises:
        DECODING_ERRORS: the file is damaged; ValueError if the files of its channels do not fit together.
    """
    if not isinstance(value, dict):
        return value
    if value.get("more"):
        return joined([value["path"], *value["more"]])
    given = value["bytes"] is not None or value["path"] is None
    return read_picture(bytes(value["bytes"] or b"") if given else str(value["path"]))


def joined(files: list[str]) -> NDArray[np.generic]:
    """Join files of one channel each (--channel_files) into one array (H, W, C)."""
    channels = [to_array(read_picture(file, channel=True), 1) for file in files]
    kinds = [f"{c.shape[0]} x {c.shape[1]} pixels of {c.dtype} in {f}" for c, f in zip(channels, files, strict=True)]
    if len({(channel.shape, channel.dtype) for channel in channels}) > 1:
        raise UserError(f"the channels do not fit together: {', '.join(kinds)}")
    return np.concatenate(channels, axis=2)


def to_array(image: Any, num_channels: int | None) -> NDArray[np.generic]:
    """A picture or array as (height, width, channels) with the wanted number of channels.

    Pictures become RGB for 3 channels (the default) and grey for 1; 16-bit grey pictures keep their depth. Arrays keep
    their channels by default; grey and RGB are converted to each other.

    Raises:
        ValueError: the image does not have the wanted number of channels and cannot be converted.
    """
    if isinstance(image, Image.Image):
        if image.mode in ("I;16", "I;16L", "I;16B", "I", "F"):
            grey = np.asarray(image)[..., None]
            grey = grey.astype(np.uint16) if image.mode == "I" else grey
            if num_channels not in (None, 1, 3):
                raise wrong_channels(grey.shape, num_channels)
            return np.repeat(grey, num_channels or 1, axis=2)
        if image.mode == "P" and "transparency" in image.info:  # in one step, Pillow would warn about dropping it
            image = image.convert("RGBA")
        if num_channels in (None, 1, 3):
            array = np.asarray(image.convert("L" if num_channels == 1 else "RGB"))
            return array if array.ndim == 3 else array[..., None]
    array = np.asarray(image)
    array = pixel_values(array[..., None] if array.ndim == 2 else array)
    if num_channels in (None, array.shape[2]):
        return array
    if array.shape[2] == 1 and num_channels == 3:
        return np.repeat(array, 3, axis=2)
    if array.shape[2] == 3 and num_channels == 1:
        array = np.ascontiguousarray(array)
        return np.asarray(cv2.cvtColor(array, cv2.COLOR_RGB2GRAY))[..., None]
    raise wrong_channels(array.shape, num_channels)


def wrong_channels(shape: tuple[int, ...], num_channels: int | None) -> ValueError:
    """The error of an image of ``shape`` (height, width, channels) that has another number of channels than wanted."""
    return UserError(
        f"an image of shape {shape} (height, width, channels) cannot be read as {num_channels} channels; "
        f"convert the images, or train with --num_channels {shape[2]}"
    )
