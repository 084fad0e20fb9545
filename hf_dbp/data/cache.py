"""Decoded images in memory-mapped files: streamed images are read, decoded and scaled down once, then read instantly.

A cache is a folder of parts. Part p holds the images of up to `PART_ROWS` source rows:

    part-00000.bin     the values of its images, one after the other, each (height, width, channels)
    part-00000.npz     heights, widths, keys; paths and reasons of unreadable images
    images.json        written last: number of parts, channels, dtype

A part appears whole or not at all, so an interrupted run continues with the missing parts. Processes that want the same
cache wait for the one that makes it; machines that share no disk make one each.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from hf_dbp.data.augmentation import resized
from hf_dbp.data.decoding import UnreadableImageError, decode, too_many
from hf_dbp.data.shards import ShardedImages, fingerprint
from hf_dbp.data.subset import Keys, chosen, content_key, readable_bytes
from hf_dbp.data.threads import in_threads
from hf_dbp.errors import UserError

__all__ = ["CachedImages", "Materialization", "materialized"]

logger = logging.getLogger(__name__)

PART_ROWS = 8192  # one thread makes a part
THREADS = 16


@dataclass(frozen=True)
class Materialization:
    """How images are stored in a cache, and which.

    Args:
        num_channels: channels of every image.
        depth: type of all values, such as ``uint8``; 8-bit and 16-bit images are converted to it.
        short_side: shorter side in pixels to which larger images are scaled down, bicubic and antialiased.
        fraction, seed: the subset, see `hf_dbp.data.subset.chosen`.
        limit: how many unreadable images are tolerated.
    """

    num_channels: int
    short_side: int
    depth: str
    fraction: float = 1.0
    seed: int = 0
    limit: int = 0


def materialized(images: ShardedImages, folder: Path, how: Materialization) -> CachedImages:
    """The cache of these images below ``folder``, created if it does not exist.

    Raises:
        UserError: more unreadable images than the limit, none readable, images of different types, or the Hub refuses.
    """
    listing = images.listing
    digest = hashlib.blake2b(images.rows.tobytes(), digest_size=8).hexdigest()
    settings = (listing.column, how.num_channels, how.depth, how.short_side, how.fraction, how.seed)
    target = folder / fingerprint(listing.files, digest, *settings)
    target.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not (target / "images.json").is_file():
            logger.warning("decoding images once into %s", target)
            _make(images, target, how)
    return CachedImages(target)


def _make(images: ShardedImages, target: Path, how: Materialization) -> None:
    parts: list[list[int]] = [[]]
    rows = 0
    for piece in images.pieces():
        if rows >= PART_ROWS:
            parts.append([])
            rows = 0
        parts[-1].append(piece)
        rows += int(images.listing.first[piece + 1] - images.listing.first[piece])
    count = 0
    unreadable: list[str] = []

    def make(number: int) -> dict[str, NDArray[Any]]:
        return _make_part(images, parts[number], target / _name(number), how)

    for part in in_threads(make, range(len(parts)), THREADS):
        count += len(part["keys"])
        unreadable += [": ".join(entry) for entry in part["unreadable"]]
        if len(unreadable) > how.limit:
            raise too_many(how.limit, unreadable[-1])
    if count == 0:
        raise UserError(f"{images.listing.files[0]} and similar files hold no readable image")
    content = {"parts": len(parts), "channels": how.num_channels, "dtype": how.depth}
    part_file = target / ".images.json"
    part_file.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
    part_file.replace(target / "images.json")


def _name(part: int) -> str:
    return f"part-{part:05d}"


def _make_part(images: ShardedImages, pieces: list[int], path: Path, how: Materialization) -> dict[str, NDArray[Any]]:
    """Read, choose, decode and write the images of some pieces, unless they are already written."""
    index = path.with_suffix(".npz")
    if index.is_file():
        with np.load(index) as saved:
            return dict(saved)
    shapes: list[tuple[int, int]] = []
    keys: list[int] = []
    unreadable: list[tuple[str, str]] = []
    with path.with_suffix(".part").open("wb") as file:
        for piece in pieces:
            values = [value for _, value in images.read(piece)]
            piece_keys = [content_key(readable_bytes(value)) for value in values]
            wanted = chosen(np.array(piece_keys, np.uint64), how.fraction, how.seed)
            for value, key in ((values[i], piece_keys[i]) for i in np.flatnonzero(wanted)):
                try:
                    image = _smaller(decode(value, how.num_channels, value["path"]), how.short_side)
                    image = _in_depth(image, how.depth, value["path"])
                except UnreadableImageError as error:
                    unreadable.append((value["path"], str(error).removeprefix(f"{value['path']}: ")))
                    continue
                file.write(np.ascontiguousarray(image).tobytes())
                shapes.append((image.shape[0], image.shape[1]))
                keys.append(key)
    path.with_suffix(".part").replace(path.with_suffix(".bin"))
    made = {
        "shapes": np.array(shapes, np.int64).reshape(-1, 2),
        "keys": np.array(keys, np.uint64),
        "unreadable": np.array(unreadable, str).reshape(-1, 2),
    }
    part = path.with_suffix(".part.npz")
    np.savez(part, **made)  # type: ignore[arg-type]
    part.replace(index)
    return made


def _smaller(image_HWC: NDArray[Any], short_side: int) -> NDArray[Any]:
    height, width = image_HWC.shape[:2]
    factor = short_side / min(height, width)
    if factor >= 1:
        return image_HWC
    view = (max(round(height * factor), 1), max(round(width * factor), 1))
    small = resized(image_HWC, view, (0.0, 0.0, float(width), float(height)))
    if image_HWC.dtype.kind == "u" and small.dtype != image_HWC.dtype:
        small = np.clip(np.rint(small), 0, np.iinfo(image_HWC.dtype).max).astype(image_HWC.dtype)
    return small


def _in_depth(image_HWC: NDArray[Any], depth: str, name: str) -> NDArray[Any]:
    """The image converted to that type, between 8 and 16 bits. UnreadableImageError for floats."""
    wanted = np.dtype(depth)
    if image_HWC.dtype == wanted:
        return image_HWC
    if {image_HWC.dtype.kind, wanted.kind} != {"u"}:
        raise UnreadableImageError(f"{name}: its values are {image_HWC.dtype.name}, the others' {depth}")
    factor = np.iinfo(wanted).max / np.iinfo(image_HWC.dtype).max
    return np.rint(image_HWC * factor).astype(wanted)


class CachedImages:
    """The images of a cache, as {"image": array (height, width, channels)} by index.

    Attributes:
        keys: content keys.
        unreadable: why each image was left out, by path.
    """

    def __init__(self, folder: Path) -> None:
        content = json.loads((folder / "images.json").read_text(encoding="utf-8"))
        self.folder, self.channels, self.dtype = folder, content["channels"], np.dtype(content["dtype"])
        parts = []
        for number in range(content["parts"]):
            with np.load(folder / f"{_name(number)}.npz") as saved:
                parts.append(dict(saved))
        self.shapes = np.concatenate([part["shapes"] for part in parts])
        self.keys: Keys = np.concatenate([part["keys"] for part in parts])
        self.unreadable = {str(path): str(reason) for part in parts for path, reason in part["unreadable"]}
        counts = [len(part["shapes"]) for part in parts]
        self.part = np.repeat(np.arange(len(parts)), counts)
        sizes = self.shapes.prod(axis=1) * self.channels
        starts = np.cumsum(sizes) - sizes
        first = np.concatenate([[0], np.cumsum(counts)])[:-1]
        self.start = starts - np.repeat([starts[f] if c else 0 for f, c in zip(first, counts, strict=True)], counts)
        self._maps: dict[int, NDArray[Any]] = {}

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> dict[str, NDArray[Any]]:
        part = int(self.part[index])
        if part not in self._maps:
            self._maps[part] = np.memmap(self.folder / f"{_name(part)}.bin", dtype=self.dtype, mode="r")
        height, width = (int(side) for side in self.shapes[index])
        start = int(self.start[index])
        values = self._maps[part][start : start + height * width * self.channels]
        return {"image": np.asarray(values).reshape(height, width, self.channels)}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}  # pickling a memory map would copy its contents
