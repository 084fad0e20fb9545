"""What a folder of images and a folder of masks hold: every file is read once, in threads, and little of it is kept.

`survey_images` gives size, channels, type or the error of each sample; `survey_masks` the values in each mask and what
kind of masks that makes them; `duplicates` the files with equal contents.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from hf_dbp.data.decoding import DECODING_ERRORS, UnreadableImageError, decode, stored
from hf_dbp.data.folders import Samples
from hf_dbp.data.masks import rgb_codes
from hf_dbp.data.shards import in_threads

__all__ = ["ImageKind", "MaskSurvey", "duplicates", "file_value", "survey_images", "survey_masks"]

THREADS = 4
COLOURS = 64  # more than so many are no palette
PIECE = 2**16  # bytes
OBJECTS = 1000  # of a class in a mask that are looked at


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


@dataclass
class MaskSurvey:
    """The values in masks.

    Attributes:
        sizes: height and width of each mask that can be read, by name.
        values: of each mask, value -> pixels; a value is an id or, if ``coloured``, 0xRRGGBB.
        coloured: whether any mask has colours.
        objects: of each mask, how thick its objects are in pixels, see `thickness`.
        errors: masks that cannot be read, and why.
    """

    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    values: dict[str, Counter[int]] = field(default_factory=dict)
    coloured: bool = False
    objects: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def smallest(self) -> float | None:
        """Thickness of the smallest objects, the tenth percentile over all masks; None if there are no objects."""
        sizes = [size for sizes in self.objects.values() for size in sizes]
        return float(np.percentile(sizes, 10)) if sizes else None

    @property
    def pixels(self) -> Counter[int]:
        """Pixels of each value over all masks."""
        return sum(self.values.values(), Counter())

    @property
    def kind(self) -> str:
        """``binary``, ``index``, ``palette`` (colours, or grey values far apart) or ``smeared``, too many for both."""
        values = set(self.pixels)
        if values and values <= ({0x000000, 0xFFFFFF} if self.coloured else {0, 255}) and values != {0}:
            return "binary"
        if self.coloured:
            return "palette" if len(values) <= COLOURS else "smeared"
        apart = max(values - {255}, default=0) >= 4 * len(values)
        if apart:
            return "palette" if len(values) <= COLOURS else "smeared"
        return "smeared" if len(values) > 200 else "index"


def thickness(values_HW: NDArray[Any]) -> list[float]:
    """Of each connected object in a mask its area by the longer side of its box: the width of a scratch, of a spot.

    The commonest value is taken for the background; single pixels and masks of many values are left out.
    """
    values, counts = np.unique(values_HW, return_counts=True)
    sizes: list[float] = []
    for value in values[counts < counts.max()] if len(values) <= COLOURS else ():
        _, _, stats, _ = cv2.connectedComponentsWithStats((values_HW == value).astype(np.uint8))
        width, height, area = stats[1:, 2], stats[1:, 3], stats[1:, 4]
        sizes += (area / np.maximum(width, height))[area > 1][:OBJECTS].tolist()
    return sizes


def survey_masks(masks: Samples) -> MaskSurvey:
    """Read all masks."""
    found = MaskSurvey()

    def look(files: tuple[str, ...]) -> tuple[bool, Any, Any, list[float]] | str:
        try:
            mask = stored(file_value(files))
            array = np.asarray(mask)
            coloured = array.ndim == 3 and array.shape[2] > 1
            values = rgb_codes(mask) if coloured else array.reshape(array.shape[:2])
        except DECODING_ERRORS as error:
            return f"{files[0]}: {error}"
        if values.dtype.kind not in "biu":
            return f"{files[0]}: it holds {values.dtype}, not ids or colours"
        return coloured, values.shape, np.unique(values, return_counts=True), thickness(values)

    progress = tqdm(in_threads(look, list(masks.values()), THREADS), "Masks", len(masks), leave=False)
    for name, seen in zip(masks, progress, strict=True):
        if isinstance(seen, str):
            found.errors[name] = seen
            continue
        coloured, size, (values, counts), found.objects[name] = seen
        found.coloured |= coloured
        found.sizes[name] = size
        found.values[name] = Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    return found
