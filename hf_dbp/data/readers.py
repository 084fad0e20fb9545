"""Readers of picture files: TIFF by tifffile, ``.npy`` by NumPy, everything else by Pillow.

    TIFF    8 and 16 bit, float, any number of channels, interleaved, planar or one page each; series 0 of a file with
            several. What tifffile unpacks only with imagecodecs (LZW, JPEG) is read by OpenCV.
    .npy    (H, W), (H, W, C) or (C, H, W).
    PNG     16-bit colour by OpenCV: Pillow keeps 8 bits of it.

The kind is told by a file's first bytes, not by its name. Uncompressed TIFF and ``.npy`` files come as memory maps: of
a large image a tile is read, not the whole. Which axis holds the channels: the one a TIFF names so, else the shorter
one of the first and the last.

Shapes: H, W height and width; C channels.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageOps

from hf_dbp.errors import UserError

__all__ = ["read_picture"]

Array = NDArray[Any]
LARGEST = 2**29  # values that a compressed TIFF may unpack to; Pillow and OpenCV have limits of their own
NPY, TIFF = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_picture(file: str | bytes) -> Image.Image | Array:
    """A picture file: a Pillow image of what Pillow reads and of 8-bit grey and RGB, else an array (H, W, C).

    Values are as they are stored: indices of a palette, any integer or float type.

    Args:
        file: path, or the content of a file.

    Raises:
        ValueError: a damaged file, one too large for memory, an array that is no image, or a compression that nothing
            here reads.
        OSError: the file cannot be read, or Pillow finds it damaged.
    """
    try:
        return parsed(file)
    except (OSError, ValueError):
        raise
    except Exception as error:  # on damaged files the libraries stumble anywhere: TypeError, ZeroDivisionError ...
        raise UserError(f"damaged ({type(error).__name__}: {error})") from error


def parsed(file: str | bytes) -> Image.Image | Array:
    """As `read_picture`; errors as they come."""
    if isinstance(file, bytes):
        head = file[:6]
    else:
        with Path(file).open("rb") as opened:
            head = opened.read(6)
    if head == NPY:
        return channels_last(npy_values(file) if isinstance(file, bytes) else np.load(file, mmap_mode="r"))
    if head[:4] in TIFF:
        return read_tiff(file)
    return read_with_pillow(file)


def npy_values(content: bytes) -> Array:
    """The array in a ``.npy`` file. ValueError if its header promises more than it holds; nothing is allocated then."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if math.prod(shape) * dtype.itemsize > len(content):
        raise UserError(f"its header promises {dtype} of shape {shape}, more than the file holds")
    stream.seek(0)
    return np.asarray(np.load(stream, allow_pickle=False))


def read_with_pillow(file: str | bytes) -> Image.Image | Array:
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as picture:
        if picture.format == "PNG" and picture.mode in ("RGB", "RGBA") and ";16" in str(picture.tile):
            return read_with_opencv(file)
        picture.load()
        return ImageOps.exif_transpose(picture)


def read_tiff(file: str | bytes) -> Image.Image | Array:
    with tifffile.TiffFile(io.BytesIO(file) if isinstance(file, bytes) else file) as tiff:
        if not tiff.series:
            raise UserError("the TIFF holds no image")
        series = tiff.series[0]
        page = series.keyframe
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
            return read_with_pillow(file)
        try:
            if series.dataoffset is not None and page.is_memmappable and isinstance(file, str):
                array = tifffile.memmap(file, series=0, mode="r")
            elif series.size > LARGEST:
                raise UserError(
                    f"it unpacks to {series.size} values of shape {series.shape}, more than {LARGEST}; write it "
                    "uncompressed, which is read in parts, or cut it into tiles"
                )
            else:
                array = series.asarray()
            array = channels_last(array, series.axes)
            if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and array.dtype.kind == "u":
                array = np.iinfo(array.dtype).max - array
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            array = read_with_opencv(file)
        alpha = any(kind in (1, 2) for kind in page.extrasamples)
        picture = {1: page.photometric in (0, 1), 3: page.photometric == 2, 4: page.photometric == 2 and alpha}
    if array.dtype in (np.uint8, np.bool_) and picture.get(array.shape[2], False):
        return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array))
    return array


def read_with_opencv(file: str | bytes) -> Array:
    content = np.frombuffer(file if isinstance(file, bytes) else Path(file).read_bytes(), np.uint8)
    done, pages = cv2.imdecodemulti(content, cv2.IMREAD_UNCHANGED)
    if not done:
        raise UserError("its compression cannot be read; write it uncompressed or with zlib, or install imagecodecs")
    page = np.asarray(pages[0] if len(pages) == 1 else np.stack(pages))
    if len(pages) == 1 and page.ndim == 3 and page.shape[2] in (3, 4):
        page = cv2.cvtColor(page, cv2.COLOR_BGR2RGB if page.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)
    return channels_last(page)


def channels_last(array: Array, axes: str = "") -> Array:
    """An array of two or three axes as (H, W, C) in native byte order, without a copy where none is needed.

    Args:
        array: the pixels.
        axes: a letter for each axis as tifffile has them; S (samples) and C are channels.

    Raises:
        ValueError: other numbers of axes, or none that is longer than 0.
    """
    if len(axes) == array.ndim:
        axes = "".join(letter for letter, length in zip(axes, array.shape, strict=True) if length > 1 or letter in "YX")
    array = array.reshape([n for n in array.shape if n > 1]) if array.ndim > 3 else array
    if array.ndim not in (2, 3) or array.size == 0:
        raise UserError(
            f"an array of shape {array.shape} is no image: two axes and perhaps one of channels are expected; "
            "save the planes of a stack as files of their own"
        )
    if array.ndim == 2:
        array = array[..., None]
    else:
        named = next((axes.index(letter) for letter in "SC" if letter in axes), None) if len(axes) == 3 else None
        channel = named if named is not None else (0 if array.shape[0] < array.shape[2] else 2)
        array = np.moveaxis(array, channel, 2)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
