"""Writers of picture files for the tests of reading, none of which is the library that reads: GDAL, OpenCV, Pillow.

A `Layout` says how an array is written; `layouts()` lists the stated table of compression x depth x channels x layout.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

COMPRESSIONS = ("NONE", "LZW", "DEFLATE", "ZSTD", "PACKBITS", "LZMA", "LERC", "WEBP", "JPEG")
DEPTHS = ("uint8", "uint16", "int8", "int16", "int32", "uint32", "float32", "float64")
LAYOUTS: dict[str, dict[str, Any]] = {
    "interleaved": {"INTERLEAVE": "PIXEL"},
    "planar": {"INTERLEAVE": "BAND"},
    "tiled": {"INTERLEAVE": "PIXEL", "TILED": "YES", "BLOCKXSIZE": 16, "BLOCKYSIZE": 16},
    "planar tiles": {"INTERLEAVE": "BAND", "TILED": "YES", "BLOCKXSIZE": 16, "BLOCKYSIZE": 16},
    "strips": {"INTERLEAVE": "PIXEL", "BLOCKYSIZE": 5},
    "big-endian": {"INTERLEAVE": "PIXEL", "ENDIANNESS": "BIG"},
    "BigTIFF": {"INTERLEAVE": "PIXEL", "BIGTIFF": "YES"},
    "predictor 2": {"INTERLEAVE": "PIXEL", "PREDICTOR": 2},
    "predictor 3": {"INTERLEAVE": "PIXEL", "PREDICTOR": 3},
    "pyramid": {"INTERLEAVE": "PIXEL"},
}
LOSSLESS = {"WEBP": {"WEBP_LOSSLESS": "YES"}}


@dataclass(frozen=True)
class Layout:
    """A TIFF as GDAL writes it."""

    compression: str = "NONE"
    depth: str = "uint8"
    channels: int = 1
    layout: str = "interleaved"
    more: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def options(self) -> dict[str, Any]:
        return {"COMPRESS": self.compression, **LAYOUTS[self.layout], **LOSSLESS.get(self.compression, {}), **self.more}

    @property
    def lossy(self) -> bool:
        return self.compression == "JPEG"


def possible(kind: Layout) -> bool:
    """Whether the format, or GDAL, has such a file."""
    if kind.layout.startswith("predictor") and kind.compression not in ("LZW", "DEFLATE", "ZSTD"):
        return False
    if kind.layout == "predictor 2" and kind.depth.startswith("float"):
        return False
    if kind.layout == "predictor 3" and not kind.depth.startswith("float"):
        return False
    if kind.compression == "WEBP":
        return kind.depth == "uint8" and kind.channels in (3, 4) and "planar" not in kind.layout
    if kind.compression == "JPEG":
        return (
            kind.depth == "uint8"
            and kind.channels in (1, 3)
            and kind.layout not in ("planar", "planar tiles", "strips")
        )
    return kind.compression != "LERC" or kind.layout != "big-endian"  # GDAL does not read its own


def drawn(rng: np.random.Generator, depth: str, *shape: int) -> np.ndarray:
    """Random values over all of the depth."""
    if depth.startswith("float"):
        return (rng.normal(0, 1000, shape)).astype(depth)
    return rng.integers(np.iinfo(depth).min, np.iinfo(depth).max, shape, dtype=depth, endpoint=True)


def layouts() -> list[Layout]:
    """The stated table."""
    every = itertools.product(COMPRESSIONS, DEPTHS, (1, 2, 3, 4, 5), LAYOUTS)
    return [kind for kind in (Layout(*entries) for entries in every) if possible(kind)]


def write_tiff(path: Path, image_HWC: np.ndarray, kind: Layout) -> None:
    """Write with GDAL."""
    import rasterio

    logging.getLogger("rasterio").setLevel(logging.CRITICAL)
    shape = {"height": image_HWC.shape[0], "width": image_HWC.shape[1], "count": image_HWC.shape[2]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pictures lie nowhere on earth
        with rasterio.open(path, "w", driver="GTiff", dtype=image_HWC.dtype.name, **shape, **kind.options) as file:
            file.write(np.moveaxis(image_HWC, 2, 0))
        if kind.layout == "pyramid":
            with rasterio.open(path, "r+") as file:
                file.build_overviews([2, 4])
