"""Images from folders, parquet files, Hub data sets and the built-in `wire_bonding`, all as one kind of list.

`ImageList` maps an index to an array (height, width, channels) with a fixed number of channels. `load_images` makes the
training and validation lists that the flags ask for, and fails before training if something is wrong:

    `sources`: converted to Arrow files by `datasets`, or read in place
    -> training and validation rows -> `subset` by content key -> perhaps a `cache` of decoded images -> ImageList
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate.utils import gather_object
from filelock import FileLock
from numpy.typing import NDArray
from tqdm.auto import tqdm

from hf_dbp.data.augmentation import Box
from hf_dbp.data.cache import CachedImages, Materialization, materialized
from hf_dbp.data.decoding import UnreadableImageError, UnreadableImages, check_kind, decode, to_array
from hf_dbp.data.folders import file_stamp
from hf_dbp.data.left_out import LeftOut
from hf_dbp.data.parts import decode_part
from hf_dbp.data.sources import (
    BUILT_IN,
    IMAGE_FILES,
    ImageSource,
    encoded_splits,
    find_column,
    read_splits,
    streamed_splits,
)
from hf_dbp.data.subset import Keys, chosen, content_keys, draw, keys_digest, readable_bytes, split_rows
from hf_dbp.data.values import UNIT, ValueRange, unit_scale
from hf_dbp.data.wire_bonding import WireBonding
from hf_dbp.errors import UserError

__all__ = [
    "BUILT_IN",
    "IMAGE_FILES",
    "ImageList",
    "ImageSource",
    "channel_statistics",
    "find_column",
    "load_images",
    "read_splits",
    "rendered",
    "share_value_range",
    "to_array",
    "unreadable_images",
    "value_name",
]

logger = logging.getLogger(__name__)

MEASURED = 500  # images, at even steps, to measure mean and standard deviation on
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageList:
    """Images as arrays (height, width, channels).

    Args:
        samples: anything that maps an index to a mapping from column to image (`datasets.Dataset`, `ShardedImages`,
            `CachedImages`, `WireBonding`).
        column: the column of the images.
        num_channels: channels to convert them to; None means 3 for pictures and an array's own.
        max_unreadable: how many images that cannot be decoded are tolerated.
        name: how messages refer to images without a path.

    Attributes:
        unreadable: unreadable images found so far.
        subset: the chosen share: fraction, seed, images, of, digest; empty if all are used.
        keys: content keys of the images of a share.
        left_out: what is in the source but not used; for the training images only.
        value_range: range of float values, see `hf_dbp.data.values`.
        kind: "u" if values are unsigned integers, "f" if float, "" if unknown; other images are unreadable.
    """

    def __init__(
        self,
        samples: Any,
        column: str,
        num_channels: int | None = None,
        max_unreadable: int = 0,
        name: str = "image",
    ) -> None:
        self.samples, self.column, self.num_channels, self.name = samples, column, num_channels, name
        self.unreadable = UnreadableImages(len(samples), max_unreadable)
        self.subset: dict[str, Any] = {}
        self.keys: Keys | None = None
        self.left_out = LeftOut()
        self.value_range, self.kind = UNIT, ""
        self._reasons: dict[int, tuple[str, str]] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> NDArray[np.generic]:
        """The image (H, W, C). UnreadableImageError if it cannot be decoded; ValueError if that is one too many."""
        return self._decoded(index, decode)

    def _decoded(self, index: int, decoder: Callable[..., NDArray[np.generic]], *how: Any) -> NDArray[np.generic]:
        value = self.samples[int(index)][self.column]
        name = value_name(value, f"{self.name} {index}")
        try:
            image_HWC = decoder(value, self.num_channels, name, *how)
            check_kind(image_HWC.dtype, self.kind, name)
            return image_HWC
        except UnreadableImageError as error:
            self.unreadable.add(index, error)
            raise

    def __iter__(self) -> Iterator[NDArray[np.generic]]:
        return (self[index] for index in range(len(self)))

    def readable(self, index: int) -> NDArray[np.generic]:
        """The image (H, W, C), or the next one that can be decoded. UserError if none can."""
        return self._readable(index, decode)

    def readable_part(
        self, index: int, choose: Callable[[tuple[int, int]], Box], view: tuple[int, int]
    ) -> NDArray[np.generic]:
        """The part that ``choose`` picks from the image or the next readable one, see
        `hf_dbp.data.parts.decode_part`."""
        return self._readable(index, decode_part, choose, view)

    def part(self, index: int, choose: Callable[[tuple[int, int]], Box], view: tuple[int, int]) -> NDArray[np.generic]:
        """The part that ``choose`` picks of the image, see `hf_dbp.data.parts.decode_part`; errors as for the image."""
        return self._decoded(index, decode_part, choose, view)

    def images_alone(self) -> ImageList:
        """Itself; lists of images with labels give theirs."""
        return self

    def _readable(self, index: int, decoder: Callable[..., NDArray[np.generic]], *how: Any) -> NDArray[np.generic]:
        for offset in range(len(self)):
            try:
                return self._decoded((index + offset) % len(self), decoder, *how)
            except UnreadableImageError as error:
                last = str(error)  # the error itself would keep this frame, and all that called it, alive
        raise UserError(f"none of the {len(self)} images can be read, the last: {last}")

    def unreadable_images(self) -> dict[str, str]:
        """Paths (or numbers) of the unreadable images found so far, each with the reason."""
        found = dict(self.samples.unreadable) if isinstance(self.samples, CachedImages) else {}
        for index in self.unreadable.indices():
            if index not in self._reasons:  # found by a worker, which kept the reason
                self._reasons[index] = self._reason(index)
            name, reason = self._reasons[index]
            found[name] = reason
        return found

    def _reason(self, index: int) -> tuple[str, str]:
        value = self.samples[index][self.column]
        name = value_name(value, f"{self.name} {index}")
        try:
            check_kind(decode(value, self.num_channels, name).dtype, self.kind, name)
        except UnreadableImageError as error:
            return name, str(error).removeprefix(f"{name}: ")
        return name, "it could be read later"


def value_name(value: Any, name: str) -> str:
    """A unique name for a stored value: the path of its file, else ``name`` with whatever path it has."""
    path = value["path"] if isinstance(value, dict) else None
    if path and value["bytes"] is None:
        return str(path)
    return f"{path} ({name})" if path else name


def load_images(source: ImageSource) -> tuple[ImageList, ImageList]:
    """The training and the validation images.

    Raises:
        UserError: no such folder or data set, no access to it, no image in it, no such column, no readable image, or a
            number of channels other than the wanted one.
    """
    if source.dataset_name == BUILT_IN:
        return built_in_images(source)
    samples, column, left_out = streamed_splits(source) if source.streaming else encoded_splits(source)
    left_out.warn(source.name)
    train, validation = samples["train"], samples.get("validation")
    rows = np.arange(len(train))
    if validation is None:
        rows, validation_rows = split_rows(len(train), source.train_val_split, source.seed)
        validation = train.select(validation_rows)
    validation = selected(validation, draw(np.arange(len(validation)), source.max_eval_samples, source.seed))
    rows = draw(rows, source.max_train_samples, source.seed)
    num_channels, depth = check_first([selected(train, rows), validation], column, source)
    count, keys = len(rows), None
    if source.streaming and source.cache_dir is not None:
        how = Materialization(num_channels, source.cache_short_side, depth, limit=source.max_unreadable)
        validation = materialized(validation, source.kept_in, how)
        how = dataclasses.replace(how, fraction=source.train_fraction, seed=source.subset_seed)
        train, column = materialized(selected(train, rows), source.kept_in, how), "image"
        keys = train.keys
    else:
        if source.train_fraction < 1.0:
            keys = (train.keys() if source.streaming else shared_keys(train, column))[rows]
            mask = chosen(keys, source.train_fraction, source.subset_seed)
            rows, keys = rows[mask], keys[mask]
        train = selected(train, rows)
    if len(train) == 0:
        raise UserError(f"--train_fraction {source.train_fraction} of {count} images leaves none")
    lists = [
        ImageList(samples, column, num_channels, source.max_unreadable, name)
        for samples, name in ((train, "training image"), (validation, "validation image"))
    ]
    lists[0].left_out = left_out
    for images in lists:
        images.kind = np.dtype(depth).kind
    if source.train_fraction < 1.0:
        assert keys is not None
        describe_subset(lists[0], keys, count, source)
    return lists[0], lists[1]


def selected(samples: Any, rows: NDArray[np.int64]) -> Any:
    """The samples of these rows of a list of images; unchanged if these are all rows."""
    return samples if len(rows) == len(samples) else samples.select(rows)


def describe_subset(images: ImageList, keys: Keys, count: int, source: ImageSource) -> None:
    """Record and report which share of the training images is used."""
    images.keys = keys
    images.subset = {
        "fraction": source.train_fraction,
        "seed": source.subset_seed,
        "images": len(images),
        "of": count,
        "digest": keys_digest(keys),
    }
    logger.warning("training on %d of %d images (subset %s)", len(images), count, images.subset["digest"])


def built_in_images(source: ImageSource) -> tuple[ImageList, ImageList]:
    """The built-in images: training and validation render different scenes."""
    train = source.max_train_samples or 1000
    validation = source.max_eval_samples or 200
    if source.num_channels not in (None, 2):
        raise UserError(f"{BUILT_IN} images have 2 channels; leave out --num_channels or pass 2")
    scenes = [
        rendered(count, source.built_in_size, source.seed, first) for count, first in ((train, 0), (validation, 10**7))
    ]
    return ImageList(scenes[0], "image", 2), ImageList(scenes[1], "image", 2)


@functools.lru_cache(maxsize=2)  # a budget's plan looks at the images before training does
def rendered(count: int, size: Any, seed: int, first: int) -> WireBonding | list[dict[str, NDArray[Any]]]:
    """Built-in scenes, rendered once and kept in memory unless they would take more than a quarter of a gigabyte."""
    scenes = WireBonding(count, size=size, seed=seed, first=first)
    if len(scenes) * sum(array.nbytes for array in scenes[0].values()) > 2**28:
        return scenes
    return [scenes[index] for index in tqdm(range(len(scenes)), desc=f"Rendering {BUILT_IN}", leave=False)]


def shared_keys(data: datasets.Dataset, column: str) -> Keys:
    """Content keys of all images; one process reads the images, the others use its result."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "hf_dbp"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "keys.lock"):
        return content_keys(data, column)


def check_first(samples: Sequence[Any], column: str, source: ImageSource) -> tuple[int, str]:
    """Read the first readable image of each list; return the number of channels, the same in all, and the first's
    type."""
    counts, depths = [], []
    for data in samples:
        if len(data) == 0:
            raise UserError(f"{source.name}: a split without images")
        images = ImageList(data, column, None, source.max_unreadable)
        images.readable(0)
        images.num_channels = source.num_channels
        first = images[int(images.unreadable.flags.int().argmin())]
        counts.append(first.shape[2])
        depths.append(first.dtype.name)
    if len(set(counts)) > 1:
        raise UserError(f"{source.name}: training images have {counts[0]} channels, validation images {counts[1]}")
    return counts[0], depths[0]


def channel_statistics(
    images: ImageList, source: str = "auto", folder: Path | None = None
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of a list of images, values in [0, 1]; see `hf_dbp.data.values`.

    Args:
        images: the training images.
        source: ``imagenet``, ``measured``, or ``auto``: ImageNet's for 8-bit RGB, else measured.
        folder: where measured values are kept for the next run.

    Raises:
        UserError: ImageNet's were asked for but the images do not have 3 channels.
    """
    first = images.readable(0)
    if source == "imagenet" and first.shape[2] != 3:
        raise UserError(f"--image_statistics imagenet is for 3 channels, the images have {first.shape[2]}")
    if source == "imagenet" or (source == "auto" and first.shape[2] == 3 and first.dtype == np.uint8):
        return list(IMAGENET_MEAN), list(IMAGENET_STD)
    name = "statistics" if images.value_range == UNIT else "statistics-{:g}-{:g}".format(*images.value_range)
    mean, std = measured_once(images, name, measured_statistics, folder)
    return mean, std


def measured_once(
    images: ImageList,
    name: str,
    measure: Callable[[ImageList, Sequence[int]], tuple[Any, Any]],
    folder: Path | None,
) -> tuple[Any, Any]:
    """The result of ``measure`` (statistics, range) on up to `MEASURED` images at even steps; with a folder, kept there
    for the next run."""
    picks = [int(index) for index in np.linspace(0, len(images) - 1, min(MEASURED, len(images)))]
    if folder is None:
        return measure(images, picks)
    file = folder / f"{name}-{images_digest(images, picks)}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if file.is_file():
            with contextlib.suppress(ValueError, TypeError):  # cut off by a process that died: measured again
                first, second = json.loads(file.read_text(encoding="utf-8"))
                return first, second
        found = measure(images, picks)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(found, allow_nan=False), encoding="utf-8")
        part.replace(file)
    return found


def share_value_range(*lists: Any, kept: ValueRange | None = None, folder: Path | None = None) -> None:
    """Give lists of float images (`ImageList`, `LabelledImages`) a common range of values; see `hf_dbp.data.values`.

    Args:
        lists: the training images first.
        kept: the range in the model's image processor; without one it is measured on the first list.
        folder: where a measured range is kept for the next run.
    """
    images = lists[0] if isinstance(lists[0], ImageList) else lists[0].images_alone()
    if images.readable(0).dtype.kind != "f":
        return
    low, high = kept or measured_once(images, "range", measured_range, folder)
    if (low, high) != UNIT:
        logger.warning("float values: %g to %g, the range %s, are taken as 0 to 1", low, high,
                       "kept with the model" if kept else "measured on the training images")  # fmt: skip
    for each in lists:
        each.value_range = (low, high)


def measured_range(images: ImageList, picks: Sequence[int]) -> ValueRange:
    """[0, 1] if all values of the picked images lie in it, else their minimum and maximum."""
    extremes = [(float(image.min()), float(image.max())) for image in map(images.readable, picks)]
    low, high = min(low for low, _ in extremes), max(high for _, high in extremes)
    if low >= 0 and high <= 1:
        return UNIT
    return (low, high) if high > low else (low, low + 1.0)


def measured_statistics(images: ImageList, picks: Sequence[int]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation over a grid of 128 x 128 pixels of each picked image: keeps detail in constant
    memory."""
    count, total, squares = 0, np.zeros(images.readable(0).shape[2]), np.zeros(images.readable(0).shape[2])
    for index in tqdm(picks, desc="Mean and standard deviation of the channels", leave=False):
        image = images.readable(index)
        rows, columns = (np.linspace(0, side - 1, 128, dtype=int) for side in image.shape[:2])
        low, factor = unit_scale(image.dtype, images.value_range)
        pixels = (image[np.ix_(rows, columns)].reshape(-1, image.shape[2]).astype(np.float64) - low) * factor
        count, total, squares = count + len(pixels), total + pixels.sum(axis=0), squares + np.square(pixels).sum(axis=0)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    floor = 1e-3 if image.dtype.kind == "u" else 1e-12  # a constant channel stays finite
    return [float(f"{m:.6g}") for m in mean], [float(f"{max(d, floor):.6g}") for d in deviation]


def images_digest(images: ImageList, picks: Sequence[int]) -> str:
    """A digest of the picked images: files by path, size and time, others by their bytes."""
    digest = hashlib.blake2b(f"{len(images)} {images.num_channels}".encode(), digest_size=12)
    for index in picks:
        value = images.samples[index][images.column]
        if isinstance(value, dict) and value["bytes"] is None and value["path"]:
            digest.update(f"{value['path']} {value.get('more')} {file_stamp(value['path'])}".encode())
        else:
            digest.update(readable_bytes(value))
    return digest.hexdigest()


def unreadable_images(before: dict[str, Any], *lists: Any) -> dict[str, Any]:
    """How many images all processes have found unreadable, each counted once, and why, by path; includes an earlier
    record's."""
    found = gather_object([entry for images in lists for entry in images.unreadable_images().items()])
    reasons = {**before.get("images", {}), **dict(sorted(found))}
    return {"count": len(reasons), "images": reasons}
