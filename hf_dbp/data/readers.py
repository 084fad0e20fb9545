"""Readers of picture files: TIFF by tifffile, ``.npy`` by NumPy, everything else by Pillow.

    TIFF    integers and floats, any number of channels, interleaved, planar or one per page, unpacked by imagecodecs;
            the first series of full size. WhiteIsZero is inverted at every unsigned depth; 2 and 4 bits become 8.
            Palettes and YCbCr other than JPEG are read by Pillow; 8-bit CMYK becomes RGB.
    .npy    (H, W), (H, W, C) or (C, H, W).
    WAV, FLAC    log-mel spectrograms of one channel; see `hf_dbp.data.sound`.
    PNG     16-bit colour by OpenCV: Pillow keeps 8 bits of it.

The first bytes of a file decide its kind, not its name. Uncompressed TIFF and ``.npy`` files come as memory maps, so a
tile of a large image can be read without the rest. The channel axis is the one that a TIFF declares, else the shorter
of the first and the last axis.

Shapes: H, W height and width; C channels.
"""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from hf_dbp.data.sound import is_sound, log_mel
from hf_dbp.errors import UserError

__all__ = ["orientation", "read_picture"]

Array = NDArray[Any]
LARGEST = 2**29  # values that a compressed TIFF may unpack to; Pillow and OpenCV have their own limits
NPY, TIFF = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_picture(file: str | bytes, channel: bool = False) -> Image.Image | Array:
    """Read a picture file, as a Pillow image if Pillow reads it or it is 8-bit grey or RGB, else as an array (H, W, C).

    Values are as stored: indices of a palette, any integer or float type.

    Args:
        file: path, or content of a file.
        channel: the file is one of several that form an image; of a multi-file OME-TIFF, read only this file.

    Raises:
        ValueError: the file is damaged or too large for memory, the array is not an image, the compression is not
            supported, or it is one file of a multi-file OME-TIFF where a whole image is wanted.
        OSError: the file cannot be read, or Pillow finds it damaged.
    """
    try:
        return parsed(file, channel)
    except (OSError, ValueError):
        raise
    except Exception as error:  # on damaged files the libraries raise anything: TypeError, ZeroDivisionError ...
        raise UserError(f"damaged ({type(error).__name__}: {error})") from error


def parsed(file: str | bytes, channel: bool = False) -> Image.Image | Array:
    """Like `read_picture`, but the errors of Pillow, tifffile and OpenCV are passed on unchanged."""
    if isinstance(file, bytes):
        head = file[:12]
    else:
        with Path(file).open("rb") as opened:
            head = opened.read(12)
    if is_sound(head):
        return log_mel(file)
    if head[:6] == NPY:
        return channels_last(npy_values(file) if isinstance(file, bytes) else np.load(file, mmap_mode="r"))
    if head[:4] in TIFF:
        return read_tiff(file, channel)
    return read_with_pillow(file)


def orientation(file: str | bytes) -> int:
    """The orientation in a picture's EXIF data or a TIFF's tag; 1 is upright."""
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as picture:
            return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # decoding reports what cannot be opened or is not a picture for Pillow
        return 1


def npy_values(content: bytes) -> Array:
    """The array in a ``.npy`` file. ValueError, before allocating, if its header promises more than the file holds."""
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
            array = read_with_opencv(file)
            return array[..., :1] if "LA;16" in str(picture.tile) else array  # grey, which OpenCV repeats
        picture.load()
        return ImageOps.exif_transpose(picture)


def read_tiff(file: str | bytes, channel: bool = False) -> Image.Image | Array:
    flags = {"is_ome": False} if channel else {}  # else tifffile would also read the other files of the set
    with tifffile.TiffFile(io.BytesIO(file) if isinstance(file, bytes) else file, **flags) as tiff:
        refuse_parts(tiff)
        if not tiff.series:
            raise UserError("the TIFF holds no image")
        full = (n for n, series in enumerate(tiff.series) if not series.keyframe.is_reduced)
        number = next(full, 0)  # skip thumbnails and the smaller levels of a pyramid
        series = tiff.series[number]
        page = series.keyframe
        colours, jpeg = page.photometric.name, "JPEG" in page.compression.name
        if colours == "PALETTE" or (colours == "YCBCR" and not jpeg):
            return read_with_pillow(file)
        if colours in ("CIELAB", "ICCLAB", "ITULAB", "LOGL", "LOGLUV") or (colours == "SEPARATED" and not cmyk(page)):
            raise UserError(f"its colours are {colours} of {page.bitspersample} bits; write it as RGB or grey")
        array = upright(channels_last(tiff_values(file, series, number, not channel), series.axes), page)
        if colours == "MINISWHITE" and array.dtype.kind in "bu":
            array = ~array if array.dtype == np.bool_ else array.dtype.type(2**page.bitspersample - 1) - array
        if array.dtype == np.uint8 and page.bitspersample < 8:
            array = np.rint(array * (255 / (2**page.bitspersample - 1))).astype(np.uint8)
        alpha = any(kind in (1, 2) for kind in page.extrasamples)
        rgb = colours in ("RGB", "YCBCR")
        modes = {1: "L" if colours in ("MINISBLACK", "MINISWHITE") else "", 3: "RGB" if rgb else "",
                 4: "CMYK" if colours == "SEPARATED" else "RGBA" if rgb and alpha else ""}  # fmt: skip
    mode = modes.get(array.shape[2], "")
    if array.dtype == np.bool_ and mode == "L":
        return Image.fromarray(np.ascontiguousarray(array[..., 0]))
    if array.dtype == np.uint8 and mode:
        height, width = array.shape[:2]
        return Image.frombytes(mode, (width, height), np.ascontiguousarray(array).tobytes())
    return array


def cmyk(page: Any) -> bool:
    """Whether Pillow turns a page of inks into RGB: four 8-bit inks, cyan, magenta, yellow and black."""
    return bool(page.samplesperpixel == 4 and page.bitspersample == 8 and page.tags.valueof(332, 1) == 1)


def refuse_parts(tiff: tifffile.TiffFile) -> None:
    """Raise a UserError for one file of a multi-file OME-TIFF, each of which would be read as the whole image."""
    description = (tiff.ome_metadata or "") if tiff.is_ome else ""
    names = sorted(set(re.findall(r'FileName="([^"]+)"', description)))
    if len(names) > 1 or "<BinaryOnly" in description:
        others = f"of {len(names)} files, {names[0]}, {names[1]} ..." if len(names) > 1 else "of several files"
        raise UserError(
            f"it is part of an OME-TIFF {others}: join the channels of each image with --channel_files, one name "
            f"pattern each, such as '*_ch0.ome.tif' '*_ch1.ome.tif'"
        )


def tiff_values(file: str | bytes, series: Any, number: int, mapped: bool = True) -> Array:
    """The values of a series of pages, with the shape and type they declare; a memory map if they are unpacked.

    Raises:
        ValueError: it is too large, the compression is not supported, or the codec returned something else than
            declared.
    """
    page = series.keyframe
    if mapped and series.dataoffset is not None and page.is_memmappable and isinstance(file, str):
        return np.asanyarray(tifffile.memmap(file, series=number, mode="r"))
    if series.size > LARGEST:
        raise UserError(
            f"it unpacks to {series.size} values of shape {series.shape}, more than {LARGEST}; write it "
            "uncompressed, so it can be read in parts, or cut it into tiles"
        )
    try:
        array = np.asarray(series.asarray())
    except (ValueError, ImportError, NotImplementedError) as error:
        if type(error) is ValueError and not re.search("imagecodecs|COMPRESSION", str(error)):
            raise
        raise UserError(
            f"compression {page.compression.name} of {page.bitspersample}-bit {page.photometric.name} cannot be read "
            f"({error}); write it uncompressed, or with LZW or zlib"
        ) from error
    if array.shape != series.shape or array.dtype.newbyteorder("=") != series.dtype.newbyteorder("="):
        raise UserError(
            f"unpacked it is {array.dtype} of {array.shape}, but its pages declare {series.dtype} of {series.shape}; "
            "write it uncompressed, or with LZW or zlib"
        )
    return array


def upright(array_HWC: Array, page: Any) -> Array:
    """The pixels of a TIFF page turned upright by its orientation tag; a view, not a copy."""
    orientation = page.tags.valueof(274, 1)
    if orientation in (5, 6, 7, 8):
        array_HWC = array_HWC.transpose(1, 0, 2)
    down, across = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return array_HWC[:: -1 if down else 1, :: -1 if across else 1]


def read_with_opencv(file: str | bytes) -> Array:
    content = np.frombuffer(file if isinstance(file, bytes) else Path(file).read_bytes(), np.uint8)
    image = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    if image is None:
        raise UserError("damaged (OpenCV cannot decode it)")
    if image.ndim == 3 and image.shape[2] in (3, 4):
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB if image.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)
    return channels_last(np.asarray(image))


def channels_last(array: Array, axes: str = "") -> Array:
    """An array of two or three axes as (H, W, C) in native byte order, copied only if necessary.

    Args:
        array: the pixels.
        axes: one letter per axis, as in tifffile; S (samples) and C are channels.

    Raises:
        ValueError: another number of axes, or an axis of length 0.
    """
    if len(axes) == array.ndim:
        axes = "".join(letter for letter, length in zip(axes, array.shape, strict=True) if length > 1 or letter in "YX")
    array = array.reshape([n for n in array.shape if n > 1]) if array.ndim > 3 else array
    if array.ndim not in (2, 3) or array.size == 0:
        raise UserError(
            f"an array of shape {array.shape} is not an image: expected two axes and perhaps one of channels; "
            "save the planes of a stack as separate files"
        )
    if array.ndim == 2:
        array = array[..., None]
    else:
        named = next((axes.index(letter) for letter in "SC" if letter in axes), None) if len(axes) == 3 else None
        channel = named if named is not None else (0 if array.shape[0] < array.shape[2] else 2)
        array = np.moveaxis(array, channel, 2)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
