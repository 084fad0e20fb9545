"""Parts of stored images: only as much of a JPEG is decoded as will be seen.

A part is chosen from the image's size, which a JPEG's header states before anything is decoded. The file is then
decoded at 1/1, 1/2, 1/4 or 1/8, the smallest scale that leaves the part at least as large as its view: libjpeg scales
in the DCT, which saves most of the work. At 1/1 the pixels are bit for bit Pillow's; OpenCV returns them with fewer
copies.

This path takes only complete, upright three-colour files with nothing but image data after the header, so it accepts no
file that Pillow refuses. Everything else is decoded whole (`hf_dbp.data.decoding`) and cut.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from hf_dbp.data.augmentation import Box, cut
from hf_dbp.data.decoding import DECODING_ERRORS, check_finite, unchecked
from hf_dbp.errors import UserError

__all__ = ["decode_part", "jpeg_part"]

Size = tuple[int, int]  # height, width

START, END = b"\xff\xd8", b"\xff\xd9"
FRAMES, SCAN, APP1 = (0xC0, 0xC1, 0xC2), 0xDA, 0xE1  # markers: baseline, extended, progressive
ODD_MARKER = re.compile(rb"\xff[^\x00\xc4\xd0-\xd7\xda\xff]")  # neither data, table, restart nor next scan
RGB = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
FLAGS = {  # flags of cv2.imdecode, by the divisor of the size
    1: RGB,
    2: RGB | cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: RGB | cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: RGB | cv2.IMREAD_REDUCED_GRAYSCALE_8,
}


def decode_part(
    value: Any, num_channels: int | None, name: str, choose: Callable[[Size], Box], view: Size
) -> NDArray[np.generic]:
    """The part of an upright image that ``choose`` picks from its size: `decode`, then cut. It may be scaled down.

    Args:
        value, num_channels, name: as for `hf_dbp.data.decoding.decode`.
        choose: maps the size of the image to the part; may be called again for the same image.
        view: size that the part will be resized to; a larger part is not scaled below it.

    Raises:
        UnreadableImageError: as for `decode`.
    """
    part = jpeg_part(value, choose, view) if num_channels == 3 else None
    if part is not None:
        return part
    image = unchecked(value, num_channels, name)
    part = cut(image, choose((image.shape[0], image.shape[1])))
    check_finite(part, name)
    return part


def jpeg_part(value: Any, choose: Callable[[Size], Box], view: Size) -> NDArray[np.uint8] | None:
    """The part of a JPEG, see `decode_part`; None for any other file and for an unusual or damaged JPEG."""
    try:
        content = _content(value)
        if content is None or not content.endswith(END):
            return None
        size, scan = _header(content)
    except DECODING_ERRORS:
        return None
    if size is None or ODD_MARKER.search(content, scan, len(content) - len(END)):
        return None
    left, top, right, bottom = choose(size)
    room = min((bottom - top) / view[0], (right - left) / view[1])
    divisor = max(divisor for divisor in FLAGS if divisor <= max(room, 1))
    image = cv2.imdecode(np.frombuffer(content, np.uint8), FLAGS[divisor])
    if image is None:
        return None
    return cut(image, (left / divisor, top / divisor, right / divisor, bottom / divisor))


def _content(value: Any) -> bytes | None:
    """The bytes of a JPEG; only the first two of another file are read."""
    if not isinstance(value, dict) or value.get("more"):
        return None
    if value["bytes"] is not None:
        return value["bytes"] if value["bytes"].startswith(START) else None
    if value["path"] is None:
        return None
    with Path(value["path"]).open("rb") as file:
        head = file.read(len(START))
        return head + file.read() if head == START else None


def _header(content: bytes) -> tuple[Size | None, int]:
    """Size of an upright 8-bit image of three colours (None for others), and where its data begins.

    Raises:
        DECODING_ERRORS: there is no such header.
    """
    size, position = None, len(START)
    while True:
        mark, marker, length = struct.unpack_from(">BBH", content, position)
        if mark != 0xFF:
            raise UserError(f"no marker at byte {position}")
        if marker in FRAMES:
            depth, height, width, colours = struct.unpack_from(">BHHB", content, position + 4)
            size = (height, width) if (depth, colours) == (8, 3) and height and width else None
        elif marker == APP1 and content.startswith(b"Exif\0", position + 4):
            exif = Image.Exif()
            exif.load(content[position + 4 : position + 2 + length])
            if exif.get(ExifTags.Base.Orientation, 1) != 1:
                return None, position
        position += 2 + length
        if marker == SCAN:
            return size, position
