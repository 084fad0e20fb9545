"""Survey a source of images: every image is read once, in threads, and little of it is kept.

`survey_images` returns size, channels, type or the error of each sample; `duplicates` groups files with equal contents.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from hf_dbp.data.decoding import DECODING_ERRORS, UnreadableImageError, check_finite, encoded_bytes, stored, to_array
from hf_dbp.data.images import value_name
from hf_dbp.data.threads import in_threads
from hf_dbp.inspection.reading import Row, Samples, value_of

__all__ = ["ImageKind", "copies", "duplicates", "survey_images"]

THREADS = 4
PIECE = 2**16  # bytes


@dataclass(frozen=True)
class ImageKind:
    """How messages refer to a sample, its height and width in pixels, channels and type, or why it cannot be read.

    ``stored`` is the type in the file, ``dtype`` the type that holds the values; ``low`` and ``high`` are the smallest
    and the largest value, ``bulk`` is the range of the middle 99.8 %. A ``picture`` (8-bit, from Pillow) becomes grey
    or RGB; an array keeps its channels. ``digest`` tells rows of a table apart.
    """

    name: str = ""
    size: tuple[int, int] = (0, 0)
    channels: int = 0
    dtype: str = ""
    picture: bool = False
    stored: str = ""
    low: float = 0.0
    high: float = 0.0
    bulk: tuple[float, float] = (0.0, 0.0)
    digest: bytes = b""
    finite: bool = True
    error: str = ""

    @property
    def counted(self) -> int:
        """The number of channels without alpha, which pictures lose on reading."""
        return (1 if self.channels < 3 else 3) if self.picture else self.channels


def survey_images(samples: Samples) -> dict[str, ImageKind]:
    """The kind of each sample, by name."""
    names = list(samples)

    def look(name: str) -> ImageKind:
        sample, where = samples[name], name
        try:
            value = value_of(sample)
            where = value_name(value, name)
            image = stored(value)
            picture = isinstance(image, Image.Image)
            bands = (3 if image.mode == "P" else len(image.getbands())) if picture else None
            array = to_array(image, bands)
        except DECODING_ERRORS as error:
            reason = "it is not a picture" if isinstance(error, UnidentifiedImageError) else str(error)
            return ImageKind(where, error=f"{where}: {reason}")
        try:
            check_finite(array, where)
        except UnreadableImageError as error:
            return ImageKind(where, finite=False, error=str(error))
        size, eight_bits = (array.shape[0], array.shape[1]), array.dtype == np.uint8
        held = str(array.dtype)
        digest = hashlib.blake2b(encoded_bytes(value), digest_size=16).digest() if isinstance(sample, Row) else b""
        return ImageKind(
            where, size, array.shape[2], held, picture and eight_bits,
            held if picture else str(np.asarray(image).dtype), float(array.min()), float(array.max()),
            bulk(array), digest,
        )  # fmt: skip

    progress = tqdm(in_threads(look, names, THREADS), "Images", len(names), leave=False)
    return dict(zip(names, progress, strict=True))


def bulk(array_HWC: NDArray[Any]) -> tuple[float, float]:
    """The range of the middle 99.8 % of an image's values, on a grid of 128 x 128 pixels."""
    rows, columns = (np.linspace(0, side - 1, min(side, 128), dtype=int) for side in array_HWC.shape[:2])
    low, high = np.quantile(array_HWC[np.ix_(rows, columns)], (0.001, 0.999))
    return float(low), float(high)


def duplicates(files: Iterable[str]) -> list[list[str]]:
    """Groups of files with equal contents: compare sizes, then three pieces, then everything."""
    groups = [[str(file) for file in files if Path(file).is_file()]]
    for key in (size_of, lambda file: digest(file, pieces=True), lambda file: digest(file, pieces=False)):
        split: dict[Any, list[str]] = defaultdict(list)
        for group in groups:
            for file in group:
                split[key(file)].append(file)
        groups = [group for group in split.values() if len(group) > 1]
    return groups


def copies(samples: Samples, kinds: Mapping[str, ImageKind]) -> list[list[str]]:
    """Groups of equal images, by the names in messages: files compared by their bytes, rows by their stored values."""
    rows: dict[bytes, list[str]] = defaultdict(list)
    for kind in kinds.values():
        if kind.digest:
            rows[kind.digest].append(kind.name)
    files = (file for sample in samples.values() if not isinstance(sample, Row) for file in sample)
    return [*duplicates(files), *(group for group in rows.values() if len(group) > 1)]


def size_of(file: str) -> int:
    return Path(file).stat().st_size


def digest(file: str, *, pieces: bool) -> bytes:
    """The digest of a file, to find duplicates: of all of it, or of its beginning, middle and end."""
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
