"""Read rows of large TIFF files without the rest: uncompressed, striped or tiled, with any supported compression.

`open_rows` returns a reader of one image that decodes rows on request, from top to bottom, and keeps strips and tiles
that the next rows also need. It returns None for what is better read whole: other files, images of fewer than `LARGE`
values, types other than 8 or 16 unsigned bits, palettes, several pages or series, planes, turned images, and images
where black is not zero.

Shapes: H, W height and width; C channels; n rows.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

__all__ = ["LARGE", "TiffRows", "open_rows"]

LARGE = 2**27  # number of values from which an image is read in rows
PLAIN = (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB)


class TiffRows:
    """The rows of one TIFF image.

    Args:
        tiff: the open file, closed by `close`.

    Attributes:
        shape: (H, W, C).
        dtype: type of the values, in native byte order.
    """

    def __init__(self, tiff: tifffile.TiffFile) -> None:
        self.tiff, self.page = tiff, tiff.pages[0]
        self.shape = (self.page.imagelength, self.page.imagewidth, self.page.samplesperpixel)
        self.dtype = self.page.dtype.newbyteorder("=")
        tiled = self.page.is_tiled
        self.step = self.page.tilelength if tiled else min(self.page.rowsperstrip, self.shape[0])
        self.across = -(-self.shape[1] // self.page.tilewidth) if tiled else 1
        self.bands: dict[int, NDArray[Any]] = {}  # decoded rows of strips or tiles, numbered from the top
        self.asked = range(0), range(0)  # the last two ranges of bands: threads ask for two rows of windows in turns
        self.lock = threading.Lock()

    def rows(self, top: int, bottom: int, left: int = 0, right: int | None = None) -> NDArray[Any]:
        """The rows from ``top`` to ``bottom``, exclusive, in columns ``left`` to ``right``: (n, m, C).

        Raises:
            Exception: whatever tifffile finds wrong with the file.
        """
        with self.lock:
            numbers = range(top // self.step, -(-bottom // self.step))
            if numbers != self.asked[1]:
                self.asked = self.asked[1], numbers
            self.bands = {
                number: band for number, band in self.bands.items() if any(number in asked for asked in self.asked)
            }
            for number in numbers:
                if number not in self.bands:
                    self.bands[number] = self._decoded(number)
            parts = []
            for number in numbers:
                first = number * self.step
                parts.append(self.bands[number][max(0, top - first) : bottom - first, left:right])
            return np.concatenate(parts)  # a copy of only these values, so keeping it keeps no band

    def _decoded(self, number: int) -> NDArray[Any]:
        """The rows of one strip, or of one row of tiles."""
        height = min(self.step, self.shape[0] - number * self.step)
        band = np.zeros((height, *self.shape[1:]), self.dtype)
        file, page = self.tiff.filehandle, self.page
        tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader} if page.compression in (6, 7) else {}
        for index in range(number * self.across, (number + 1) * self.across):
            file.seek(page.dataoffsets[index])
            decoded, place, shape = page.decode(file.read(page.databytecounts[index]), index, **tables)
            if decoded is not None:
                left, rows, columns = place[3], min(shape[1], height), min(shape[2], self.shape[1] - place[3])
                band[:rows, left : left + columns] = decoded.reshape(shape)[0, :rows, :columns]
        return band

    def close(self) -> None:
        """Close the file."""
        self.tiff.close()


def open_rows(file: str, least: int = LARGE) -> TiffRows | None:
    """A reader of the rows of a TIFF with at least ``least`` values; None for what is better read whole."""
    if Path(file).suffix.lower() not in (".tif", ".tiff"):
        return None
    try:
        tiff = tifffile.TiffFile(file)
    except (OSError, ValueError):  # damaged: the reader of whole images reports how
        return None
    if len(tiff.pages) != 1 or not plain(tiff.pages[0], least):
        tiff.close()
        return None
    return TiffRows(tiff)


def plain(page: Any, least: int) -> bool:
    """Whether the rows of a TIFF page, read alone, mean the same as to the reader of whole images."""
    planes = page.planarconfig != 1 and page.samplesperpixel > 1
    alpha = any(kind in (1, 2) for kind in page.extrasamples)
    known = page.photometric in PLAIN and page.dtype in (np.uint8, np.uint16) and page.bitspersample in (8, 16)
    upright = page.tags.valueof(274, 1) == 1
    return bool(known and upright and not planes and not alpha and page.imagedepth == 1 and page.size >= least)
