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

import numpy as np
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


@dataclass(frozen=True)
class ImageKind:
    """Height and width in pixels, channels as stored and their type; or why the sample cannot be read.

    Of a ``picture`` (8-bit, by Pillow) the tool makes grey or RGB, of an array it takes the channels as they are.
    """

    size: tuple[int, int] = (0, 0)
    channels: int = 0
    dtype: str = ""
    picture: bool = False
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
        return ImageKind(size, array.shape[2], str(array.dtype), picture and eight_bits)

    progress = tqdm(in_threads(look, list(samples.values()), THREADS), "Images", len(samples), leave=False)
    return dict(zip(samples, progress, strict=True))


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
        errors: masks that cannot be read, and why.
    """

    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    values: dict[str, Counter[int]] = field(default_factory=dict)
    coloured: bool = False
    errors: dict[str, str] = field(default_factory=dict)

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


def survey_masks(masks: Samples) -> MaskSurvey:
    """Read all masks."""
    found = MaskSurvey()

    def look(files: tuple[str, ...]) -> tuple[bool, Any, Any] | str:
        try:
            mask = stored(file_value(files))
            array = np.asarray(mask)
            coloured = array.ndim == 3 and array.shape[2] > 1
            values = rgb_codes(mask) if coloured else array.reshape(array.shape[:2])
        except DECODING_ERRORS as error:
            return f"{files[0]}: {error}"
        if values.dtype.kind not in "biu":
            return f"{files[0]}: it holds {values.dtype}, not ids or colours"
        return coloured, values.shape, np.unique(values, return_counts=True)

    progress = tqdm(in_threads(look, list(masks.values()), THREADS), "Masks", len(masks), leave=False)
    for name, seen in zip(masks, progress, strict=True):
        if isinstance(seen, str):
            found.errors[name] = seen
            continue
        coloured, size, (values, counts) = seen
        found.coloured |= coloured
        found.sizes[name] = size
        found.values[name] = Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    return found
