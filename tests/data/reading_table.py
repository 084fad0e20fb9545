"""The table of docs/reading.md, found by writing files and reading them; as a program it writes it there."""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image
from written import COMPRESSIONS, DEPTHS, LAYOUTS, Layout, drawn, layouts, write_tiff

from hf_dbp.data.decoding import UnreadableImageError, decode
from hf_dbp.data.values import unit_scale

PAGE = Path(__file__).parents[2] / "docs" / "reading.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
RNG = np.random.default_rng(0)
PICTURE = drawn(RNG, "uint8", 12, 20, 3)


def pillow(kind: str, mode: str, **options: object) -> Callable[[Path], object]:
    return lambda path: Image.fromarray(PICTURE).convert(mode).save(path, kind, **options)


def array(dtype: str, *shape: int) -> Callable[[Path], object]:
    values = (drawn(RNG, "uint8", *shape) > 99) if dtype == "bool" else drawn(RNG, dtype, *shape)
    return lambda path: path.write_bytes(npy(values))


def npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def tiff(depth: str, channels: int, **more: object) -> Callable[[Path], object]:
    compression = str(more.pop("compression", "LZW"))
    top = 2 ** int(str(more.get("NBITS", 16)))
    values = drawn(RNG, depth, 12, 20, channels)
    values = values % top if "NBITS" in more else values
    return lambda path: write_tiff(path, values, Layout(compression, depth, channels, more=more))


def other_tiff(depth: str, channels: int, photometric: str) -> Callable[[Path], object]:
    return lambda path: tifffile.imwrite(path, drawn(RNG, depth, 12, 20, channels), photometric=photometric)


FILES: dict[str, Callable[[Path], object]] = {
    "PNG, BMP, WebP, GIF: grey of 1 or 8 bits": pillow("PNG", "L"),
    "... RGB of 8 bits": pillow("PNG", "RGB"),
    "... RGBA, grey with alpha": pillow("PNG", "RGBA"),
    "... palette": pillow("PNG", "P"),
    "PNG: grey of 16 bits": lambda path: Image.fromarray(drawn(RNG, "uint16", 12, 20)).save(path, "PNG"),
    "JPEG: grey or RGB": pillow("JPEG", "RGB"),
    "JPEG: CMYK": pillow("JPEG", "CMYK"),
    "TIFF: grey of 1 bit": tiff("uint8", 1, NBITS=1),
    "TIFF: grey of 4 bits": tiff("uint8", 1, NBITS=4),
    "TIFF: grey of 8 bits": tiff("uint8", 1),
    "TIFF: grey of 16 bits": tiff("uint16", 1),
    "TIFF: grey of 16 bits, WhiteIsZero": tiff("uint16", 1, photometric="MINISWHITE"),
    "TIFF: RGB of 8 bits": tiff("uint8", 3, photometric="RGB"),
    "TIFF: RGB of 16 bits": tiff("uint16", 3, photometric="RGB"),
    "TIFF: CMYK of 8 bits": pillow("TIFF", "CMYK"),
    "TIFF: CMYK of 16 bits": other_tiff("uint16", 4, "separated"),
    "TIFF: CIELAB": other_tiff("uint8", 3, "cielab"),
    "TIFF: 2 channels of 8 bits": tiff("uint8", 2),
    "TIFF: 2 channels of 16 bits": tiff("uint16", 2),
    "TIFF: 5 channels of 16 bits": tiff("uint16", 5),
    "TIFF: signed, 16 bits": tiff("int16", 1),
    "TIFF: float": tiff("float32", 1),
    "npy: bool": array("bool", 12, 20),
    "npy: uint8, 2 channels": array("uint8", 12, 20, 2),
    "npy: uint16, channels first": array("uint16", 2, 12, 20),
    "npy: int64": array("int64", 12, 20),
    "npy: float64": array("float64", 12, 20, 3),
    "npy: float with a NaN": lambda path: path.write_bytes(npy(np.full((12, 20), np.nan, np.float32))),
    "npy: 4 axes": array("uint8", 3, 2, 12, 20),
    "anything damaged": lambda path: path.write_bytes(b"II*\0" + bytes(50)),
}


def rows() -> Iterable[str]:
    """One row per kind of file, found by reading one."""
    with tempfile.TemporaryDirectory() as folder:
        for label, write in FILES.items():
            path = Path(folder) / "a"
            write(path)
            try:
                image = decode({"bytes": None, "path": str(path)}, None, "a")
            except UnreadableImageError as error:
                reason = str(error).removeprefix("a: ").split(";")[0].split(": ")[0]
                yield f"| {label} | refused: {reason} | | |"
                continue
            try:
                asked = decode({"bytes": None, "path": str(path)}, 1, "a").shape[2]
            except UnreadableImageError:
                asked = image.shape[2]
            factor = unit_scale(image.dtype, (0.0, 2.0))[1]
            values = {1 / 255: "v / 255", 1 / 65535: "v / 65535"}.get(factor, "(v - low) / (high - low)")
            channels = f"{image.shape[2]}" if asked == image.shape[2] else f"{image.shape[2]}, or {asked} if asked"
            yield f"| {label} | {image.dtype} | {channels} | {values} |"


def table() -> str:
    """The table as Markdown."""
    kinds = layouts()
    lines = ["| file | held as | channels | in [0, 1] |", "| --- | --- | --- | --- |", *rows(), ""]
    lines += ["| compression of a TIFF | depths | channels | layouts |", "| --- | --- | --- | --- |"]
    for compression in COMPRESSIONS:
        own = [kind for kind in kinds if kind.compression == compression]
        depths = [depth for depth in DEPTHS if any(kind.depth == depth for kind in own)]
        channels = sorted({kind.channels for kind in own})
        arranged = [layout for layout in LAYOUTS if any(kind.layout == layout for kind in own)]
        all_depths = "all" if len(depths) == len(DEPTHS) else ", ".join(depths)
        name = "none" if compression == "NONE" else compression
        lines.append(f"| {name} | {all_depths} | {', '.join(map(str, channels))} | {', '.join(arranged)} |")
    return "\n".join([*lines, "", f"All depths: {', '.join(DEPTHS)}. In all {len(kinds)} combinations."]) + "\n"


def with_table(page: str) -> str:
    """The page with the current table."""
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    return page[:start] + table() + page[end:]


if __name__ == "__main__":
    sys.path.insert(0, str(PAGE.parents[1]))
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
