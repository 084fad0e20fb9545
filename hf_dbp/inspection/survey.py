"""What a folder of images holds: every file is read once, in threads, and little of it is kept.

`survey_images` gives size, channels, type or the error of each sample; `duplicates` the files with equal contents.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from hf_dbp.data.decoding import DECODING_ERRORS, UnreadableImageError, decode, stored
from hf_dbp.data.folders import Samples
from hf_dbp.data.shards import in_threads

__all__ = ["ImageKind", "duplicates", "file_value", "survey_images"]

THREADS = 4
PIECE = 2**16  # bytes


@dataclass(frozen=True)
class ImageKind:
    """Height and width in pixels, channels as stored and their type; or why the sample cannot be read.

    ``stored`` is the type in the file, ``dtype`` that in which the values are held; ``low`` and ``high`` are the least
    and the greatest value, ``bulk`` what the middle 99.8 % of the values span. Of a ``picture`` (8-bit, by Pillow) the
    tool makes grey or RGB, of an array it takes the channels as they are.
    """

    size: tuple[int, int] = (0, 0)
    channels: int = 0
    dtype: str = ""
    picture: bool = False
    stored: str = ""
    low: float = 0.0
    high: float = 0.0
    bulk: tuple[float, float] = (0.0, 0.0)
    error: str = ""


def file_value(files: Sequence[str]) -> dict[str, Any]:
    """The files of a sample in the form that `decode` reads."""
    return {"bytes": None, "path": files[0], "more": list(files[1:])}


def survey_images(samples: Samples) -> dict[str, ImageKind]:
    """The kind of each sample, by name."""

    def look(files: tuple[str, ...]) -> ImageKind:
        try:
            image = stored(file_value(files))
            picture = isinstance(image, Image.Image)
            bands = (3 if image.mode == "P" else len(image.getbands())) if picture else None
            array = decode(image, bands, "")
        except (*DECODING_ERRORS, UnreadableImageError) as error:
            return ImageKind(error=f"{files[0]}: {str(error).removeprefix(': ')}")
        size, eight_bits = (array.shape[0], array.shape[1]), array.dtype == np.uint8
        held = str(array.dtype)
        return ImageKind(
            size, array.shape[2], held, picture and eight_bits, held if picture else str(np.asarray(image).dtype),
            float(array.min()), float(array.max()), bulk(array),
        )  # fmt: skip

    progress = tqdm(in_threads(look, list(samples.values()), THREADS), "Images", len(samples), leave=False)
    return dict(zip(samples, progress, strict=True))


def bulk(array_HWC: NDArray[Any]) -> tuple[float, float]:
    """Between which values the middle 99.8 % lie, by a grid of 128 x 128 pixels."""
    rows, columns = (np.linspace(0, side - 1, min(side, 128), dtype=int) for side in array_HWC.shape[:2])
    low, high = np.quantile(array_HWC[np.ix_(rows, columns)], (0.001, 0.999))
    return float(low), float(high)


def duplicates(files: Iterable[str]) -> list[list[str]]:
    """Groups of files with equal contents: of equal size, then equal in three pieces, then in all."""
    groups = [[str(file) for file in files if Path(file).is_file()]]
    for key in (size_of, lambda file: digest(file, pieces=True), lambda file: digest(file, pieces=False)):
        split: dict[Any, list[str]] = defaultdict(list)
        for group in groups:
            for file in group:
                split[key(file)].append(file)
        groups = [group for group in split.values() if len(group) > 1]
    return groups


def size_of(file: str) -> int:
    return Path(file).stat().st_size


def digest(file: str, *, pieces: bool) -> bytes:
    """Of the whole file, or of its beginning, middle and end."""
    hashed = hashlib.blake2b(digest_size=16)
    with Path(file).open("rb") as opened:
        if not pieces:
            while block := opened.read(2**20):
                hashed.update(block)
            return hashed.digest()
        for start in (0, size_of(file) // 2, max(size_of(file) - PIECE, 0)):
            opened.seek(start)
            hashed.update(opened.read(PIECE))
    return hashed.digest()
